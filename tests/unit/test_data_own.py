"""Augmentations of a user's own: the same pixels on any ranks, threads and workers; what is not keyed is refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.packing.pack import pack_image_folder
from dataloaders.pixels import own
from dataloaders.pixels.draws import Lane, sample_words, uniforms
from dataloaders.reading.streams import ShardTrainStream
from dataloaders.sources.shards import open_split
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo


def dim(image: torch.Tensor, key: int) -> torch.Tensor:
    """Multiply by a factor that the key decides, and leave a trace of the key in the first pixel."""
    factor = torch.rand((), generator=torch.Generator().manual_seed(key))
    made = (image.float() * factor).to(torch.uint8)
    made[:, 0, 0] = key % 251
    return made


def invert(image: torch.Tensor, key: int) -> torch.Tensor:
    return 255 - image


def from_torch(image: torch.Tensor, key: int) -> torch.Tensor:
    torch.rand(())  # and the image does not show it
    return image


def from_numpy(image: torch.Tensor, key: int) -> torch.Tensor:
    return image // int(np.random.default_rng().integers(1, 200))


def from_random(image: torch.Tensor, key: int) -> torch.Tensor:
    return image // random.randint(1, 200)


def fails(image: torch.Tensor, key: int) -> torch.Tensor:
    raise KeyError("no such colour")


def floats(image: torch.Tensor, key: int) -> torch.Tensor:
    return image.float()


def smaller(image: torch.Tensor, key: int) -> torch.Tensor:
    return image[:, 1:]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_OWN", {})
    for function in (dim, invert, from_torch, from_numpy, from_random, fails, floats, smaller):
        own.register_augmentation(function.__name__, function)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for i in range(48):
        path = root / "source" / str(i % 2) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    pack_image_folder(root / "source", root / "train")
    return root


def images_of(data: Path, names: tuple[str, ...], world: int = 1, micro: int = 12, **changes: int) -> torch.Tensor:
    """Return the images of steps 1 and 2 in the order of positions, (24, 3, 8, 8)."""
    config = DataConfig(root=str(data), image_size=8, augment=AugmentConfig(crop="none", own=names), **changes)
    parts = []
    for rank in range(world):
        stream = ShardTrainStream(open_split(data / "train"), config, 3, RankInfo(rank, world), 12, micro)
        batches = stream.micro_batches(1)
        parts.append([next(batches).inputs for _ in range(2 * 12 // (micro * world))])
        stream.close()
    return torch.cat([part[at] for at in range(len(parts[0])) for part in parts])


def test_pixels_depend_on_neither_ranks_threads_nor_workers(data: Path) -> None:
    alone = images_of(data, ("dim",))
    for layout in ({"world": 2, "micro": 3}, {"threads": 3}, {"workers": 1}, {"threads": 0, "micro": 4}):
        assert torch.equal(images_of(data, ("dim",), **layout), alone), layout
    plain = images_of(data, ())
    assert not torch.equal(alone, plain)
    traces = alone[:, 0, 0, 0].tolist()
    assert len(set(traces)) > 15  # each sample has a key of its own


def test_each_has_its_own_key_and_they_go_in_order(data: Path) -> None:
    plain, inverted = images_of(data, ()), images_of(data, ("invert",))
    assert torch.equal(inverted, 255 - plain)
    assert torch.equal(images_of(data, ("dim", "invert")), 255 - images_of(data, ("dim",)))
    assert not torch.equal(images_of(data, ("invert", "dim"))[:, :, 0, 0], images_of(data, ("dim",))[:, :, 0, 0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("from_torch", "draws from a global generator"),
        ("from_numpy", "gives different results for the same image and key"),
        ("from_random", "gives different results for the same image and key"),
        ("fails", "failed: KeyError: 'no such colour'"),
        ("floats", r"returned \(3, 8, 8\) torch.float32: it must return an image like the one it gets"),
        ("smaller", r"returned \(3, 7, 8\) torch.uint8"),
        ("inverted", r"not an augmentation: did you mean invert\?; to use your own"),
    ],
)
def test_what_is_no_keyed_augmentation_is_refused(data: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        images_of(data, (name,))


def test_what_reader_processes_do_not_find_is_refused(data: Path) -> None:
    own.register_augmentation("local", lambda image, key: image)
    assert images_of(data, ("local",)).shape == (24, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"'local' is defined within a function.*data.workers = 0"):
        images_of(data, ("local",), workers=1)
    dim.__module__, module = "__main__", dim.__module__
    try:
        with pytest.raises(ConfigError, match="'dim' is defined in the program that was started"):
            images_of(data, ("dim",), workers=1)
    finally:
        dim.__module__ = module


def test_a_name_is_taken_once() -> None:
    own.register_augmentation("dim", dim)
    with pytest.raises(ConfigError, match="'dim' is registered twice"):
        own.register_augmentation("dim", invert)


def test_other_draws_are_what_they_were() -> None:
    # Lane numbers are part of what a run is: appended to, never changed.
    names = ["CROP", "FLIP", "RANDAUGMENT", "JITTER", "ERASING", "OWN", "VFLIP", "POLICY"]
    assert [lane.name for lane in sorted(Lane)] == names
    words = sample_words(3, np.zeros(1, np.int64), np.arange(1))
    assert uniforms(words, Lane.CROP, 2).tolist() == [[0.7437499307463624, 0.1447557416171954]]
