"""The determinism matrix: what may change without a sample or a pixel changing, and what a failing rank does to all."""

import functools
from pathlib import Path

import pytest
import torch

from dataloaders.opening import open_source
from dataloaders.packing.convert import convert
from dataloaders.testing.determinism import (
    Checked,
    Pixels,
    check_containers,
    check_cuts,
    check_interruptions,
    check_pixel_cuts,
    check_readers,
    check_resumed_pixels,
    make_images,
    pack_images,
    pixel_config,
    step_ids,
)
from dataloaders.testing.determinism import plans as all_plans


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def shards(images: Path) -> Path:
    return pack_images(images, images.parent / "packed")


def opener(path: Path):
    return functools.partial(open_source, str(path.parent), path.name, pixel_config())


def all_identical(rows: list[Checked]) -> bool:
    assert rows
    return all(row.identical and row.cases > 1 for row in rows)


def test_samples_do_not_depend_on_ranks_and_micro_batches():
    assert all_identical(check_cuts())


def test_samples_do_not_depend_on_interruptions():
    rows = check_interruptions(200)
    assert all_identical(rows)
    assert all(row.cases >= 200 for row in rows)


def test_the_comparison_of_samples_sees_a_difference():
    """Else the tests above show nothing: other seeds, epochs and plans do give other ids."""
    names = ("full, drop", "block, drop", "mixture", "buckets, drop")  # wrapped, an epoch begins as without
    found = [step_ids(all_plans()[name], 2, 8, step, 2) for name in names for step in (0, 5)]
    found += [step_ids(all_plans(seed=12)[name], 2, 8, 0, 2) for name in names]
    assert len({repr(ids) for ids in found}) == len(found)


def test_pixels_do_not_depend_on_workers_and_threads(shards: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the training process computes with more; readers must not
    try:
        row = check_readers(opener(shards), [(0, 0), (0, 1), (0, 2), (0, 4), (1, 0), (1, 2), (2, 1)])
        assert row.identical
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_pixels_do_not_depend_on_ranks_and_micro_batches(shards: Path):
    assert check_pixel_cuts(opener(shards)).identical


def test_pixels_do_not_depend_on_where_a_run_began(shards: Path):
    assert check_resumed_pixels(opener(shards)).identical


def test_the_comparison_of_pixels_sees_a_difference(shards: Path):
    plain = Pixels(opener(shards), pixel_config()).by_step()
    assert len(set(plain.values())) == 4
    other = Pixels(opener(shards), pixel_config(interpolation="bilinear")).by_step()
    assert not set(plain.values()) & set(other.values())


def test_pixels_do_not_depend_on_the_container(images: Path, shards: Path):
    beton = images.parent / "packed.beton"
    convert(shards, beton)
    assert check_containers({"shards": opener(shards), ".beton": opener(beton), "folder": opener(images)}).identical
