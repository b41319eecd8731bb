"""The FFCV engine: our order, crops and rules for damage, whatever FFCV does; skipped where FFCV is not built."""

import importlib.metadata
import importlib.util
import io
import itertools
import os
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.beton.reader import BetonSample, open_beton, write_beton
from dataloaders.beton.sidecar import sidecar_path
from dataloaders.config import AugmentConfig, DataConfig, ResolutionStage
from dataloaders.ffcv import check as ffcv_check
from dataloaders.ffcv.check import ffcv_problem, load_ffcv_engine
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo

built = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not built, reason="FFCV is not built here (make ffcv)")
COUNT, BATCH, SIZE = 40, 8, 32


@pytest.fixture(scope="module")
def engine():
    return load_ffcv_engine()


def samples():
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        height, width = 40 + number, 90 - number
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        yield BetonSample(out.getvalue(), number % 3, height, width)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beton")
    for mode in ("jpg", "raw"):
        write_beton(folder / f"{mode}.beton", samples(), COUNT, classes=("a", "b", "c"), mode=mode)
    return folder


@pytest.fixture
def path(whole, tmp_path):
    """A copy to damage."""
    path = tmp_path / "jpg.beton"
    for name in (path, sidecar_path(path)):
        name.write_bytes((whole / name.name).read_bytes())
    return path


def config_of(**changes):
    augment = changes.pop("augment", AugmentConfig(mixup=0.2))
    return DataConfig(**{"root": "x", "image_size": SIZE, "interpolation": "bilinear", "augment": augment, **changes})


def stream_of(kind, path, ranks=None, micro=BATCH, seed=4, **changes):
    return kind(open_beton(path), config_of(**changes), seed, ranks or RankInfo(), BATCH, micro)


def taken(stream, count, first=0):
    found = list(itertools.islice(stream.micro_batches(first), count))
    stream.close()
    return found


def mean_difference(one, other):
    return (one.inputs.float() - other.inputs.float()).abs().mean().item()


def same(one, other):
    for name in ("inputs", "labels", "sample_ids", "weights"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.step == other.step
    assert one.substitutions == other.substitutions


def damage(path, sample, how="flip"):
    """Flip a bit, or (with no sidecar to find it) take away the mark that a JPEG begins with."""
    table = open_beton(path).table
    data = bytearray(path.read_bytes())
    start = int(table.place[sample])
    if how == "flip":
        data[start + int(table.size[sample]) // 2] ^= 4
    else:
        data[start : start + 2] = b"\0\0"
        sidecar_path(path).unlink(missing_ok=True)
    path.write_bytes(data)


# What it gives


@needs_ffcv
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_samples_labels_mixing_and_crops_are_those_of_the_native_engine(engine, whole, mode):
    path = whole / f"{mode}.beton"
    ours = taken(stream_of(ShardTrainStream, path), 12)
    theirs = taken(stream_of(engine.FfcvTrainStream, path), 12)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.mix.lam, other.mix.lam)
        assert one.step == other.step
        assert mean_difference(one, other) < 6  # area against bilinear; other crops differ by 40 and more
    assert mean_difference(ours[0], theirs[1]) > 20


@needs_ffcv
def test_images_are_turned_upside_down_as_by_the_native_engine(engine, whole):
    path, augment = whole / "jpg.beton", AugmentConfig(vflip=0.5)
    ours = taken(stream_of(ShardTrainStream, path, augment=augment), 6)
    theirs = taken(stream_of(engine.FfcvTrainStream, path, augment=augment), 6)
    plain = taken(stream_of(engine.FfcvTrainStream, path, augment=AugmentConfig()), 6)
    assert all(mean_difference(one, other) < 6 for one, other in zip(ours, theirs, strict=True))
    assert all(mean_difference(one, other) > 6 for one, other in zip(plain, theirs, strict=True))


@needs_ffcv
def test_pixels_do_not_depend_on_threads_ranks_micro_batches_or_interruptions(engine, whole):
    path = whole / "jpg.beton"
    expected = taken(stream_of(engine.FfcvTrainStream, path), 12)
    for one, other in zip(expected, taken(stream_of(engine.FfcvTrainStream, path, threads=2), 12), strict=True):
        same(one, other)
    for first in (3, 5, 11):
        for one, other in zip(
            expected[first:], taken(stream_of(engine.FfcvTrainStream, path), 12 - first, first), strict=True
        ):
            same(one, other)
    parts = [taken(stream_of(engine.FfcvTrainStream, path, RankInfo(r, 2), 2), 24) for r in (0, 1)]
    for step, one in enumerate(expected):
        pieces = [parts[rank][2 * step + part] for part in (0, 1) for rank in (0, 1)]
        assert torch.equal(one.inputs, torch.cat([piece.inputs for piece in pieces]))
        assert torch.equal(one.sample_ids, torch.cat([piece.sample_ids for piece in pieces]))


@needs_ffcv
def test_a_cursor_of_one_engine_is_one_of_the_other(engine, whole):
    ours = stream_of(ShardTrainStream, whole / "jpg.beton")
    theirs = stream_of(engine.FfcvTrainStream, whole / "jpg.beton")
    assert theirs.check_state(ours.state(7)) == 7
    assert (ours.steps_per_epoch, ours.fingerprint) == (theirs.steps_per_epoch, theirs.fingerprint)


@needs_ffcv
def test_sizes_change_at_exact_steps_and_stretches_leave_no_gap(engine, whole, monkeypatch):
    monkeypatch.setattr(engine, "_STRETCH", 2 * BATCH)
    stages = [{"step": 3, "image_size": 48}, {"epoch": 1, "image_size": 24}]
    path = whole / "jpg.beton"
    for threads in (1, 2):
        found = taken(stream_of(engine.FfcvTrainStream, path, threads=threads, resolutions=stages), 7)
        assert [one.inputs.shape[-1] for one in found] == [32, 32, 32, 48, 48, 24, 24]
    for one, other in zip(found, taken(stream_of(ShardTrainStream, path, resolutions=stages), 7), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert mean_difference(one, other) < 6
    resumed = taken(stream_of(engine.FfcvTrainStream, path, resolutions=stages), 2, first=4)
    same(found[4], resumed[0])
    same(found[5], resumed[1])


@needs_ffcv
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_counts_each_sample_once(engine, whole, world):
    seen = []
    for rank in range(world):
        ranks = RankInfo(rank, world)
        ours = ShardEvalStream(open_beton(whole / "jpg.beton"), config_of(), ranks, 6)
        theirs = engine.FfcvEvalStream(open_beton(whole / "jpg.beton"), config_of(), ranks, 6)
        for one, other in zip(ours.micro_batches(), theirs.micro_batches(), strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids)
            assert torch.equal(one.weights, other.weights)
            assert mean_difference(one, other) < 8
            assert not other.inputs[other.weights == 0].any()
            seen += other.sample_ids[other.weights == 1].tolist()
        ours.close()
        theirs.close()
    assert seen == list(range(COUNT))


@needs_ffcv
def test_batches_that_are_kept_do_not_change(engine, whole):
    stream = stream_of(engine.FfcvTrainStream, whole / "jpg.beton")
    batches = stream.micro_batches(0)
    kept, copies = [], []
    for one in itertools.islice(batches, 12):
        kept.append(one.inputs)
        copies.append(one.inputs.clone())
    assert all(torch.equal(one, copy) for one, copy in zip(kept, copies, strict=True))
    stream.close()


# Damage


def _without_address(line):
    return re.sub(r"0x[0-9a-f]+", "0x", line)


@needs_ffcv
def test_mixing_ends_and_images_are_repeated_as_with_the_native_engine(engine, whole):
    augment = AugmentConfig(mixup=0.2, mix_off_step=2, repeats=2)
    ours = taken(stream_of(ShardTrainStream, whole / "jpg.beton", augment=augment), 5)
    theirs = taken(stream_of(engine.FfcvTrainStream, whole / "jpg.beton", augment=augment), 5)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.copies, other.copies)
        assert (one.mix is None) == (other.mix is None) == (one.step >= 2)
        assert mean_difference(one, other) < 8


@needs_ffcv
@pytest.mark.parametrize("how", ["flip", "no start"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scale", [None, (0.05, 0.1)])
def test_damaged_samples_are_replaced_as_the_native_engine_would(engine, path, how, threads, scale):
    stages = () if scale is None else (ResolutionStage(step=0, image_size=SIZE, scale=scale),)
    before = taken(stream_of(engine.FfcvTrainStream, path, resolutions=stages), 5)
    for sample in (3, 17):
        damage(path, sample, how)
    ours = taken(stream_of(ShardTrainStream, path, resolutions=stages), 5)
    theirs = taken(stream_of(engine.FfcvTrainStream, path, threads=threads, resolutions=stages), 5)
    replaced = 0
    for one, other, first in zip(ours, theirs, before, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert [_without_address(line) for line in one.substitutions] == list(
            map(_without_address, other.substitutions)
        )
        hit = torch.tensor([sample in (3, 17) for sample in first.sample_ids.tolist()])
        assert torch.equal(one.inputs[hit], other.inputs[hit])
        assert torch.equal(first.inputs[~hit], other.inputs[~hit])
        replaced += len(other.substitutions)
    assert replaced == 2


@needs_ffcv
def test_damage_in_validation_stops_or_counts_nothing(engine, path):
    damage(path, 3)
    stream = engine.FfcvEvalStream(open_beton(path), config_of(), RankInfo(), 16)
    with pytest.raises(DataError, match=r"sample 3 .*bad_validation"):
        list(stream.micro_batches())
    stream.close()
    stream = engine.FfcvEvalStream(open_beton(path), config_of(bad_validation="zero_weight"), RankInfo(), 16)
    batches = list(stream.micro_batches())
    counted = [s for b in batches for s in b.sample_ids[b.weights == 1].tolist()]
    assert counted == [number for number in range(COUNT) if number != 3]
    assert len([line for b in batches for line in b.substitutions]) == 1
    assert not batches[0].inputs[3].any()
    stream.close()


@needs_ffcv
def test_a_file_that_shrinks_stops_the_run(engine, path):
    beton = open_beton(path)
    beton._sleep = lambda seconds: None
    stream = engine.FfcvTrainStream(beton, config_of(), 4, RankInfo(), BATCH, BATCH)
    os.truncate(path, int(beton.table.place[9]))
    with pytest.raises(DataError, match="cannot be read after 5 tries"):
        list(itertools.islice(stream.micro_batches(0), 5))
    stream.close()


# Its thread


@needs_ffcv
def test_a_dead_thread_is_an_error_and_not_a_wait_for_ever(engine, whole, monkeypatch):
    pipeline = importlib.import_module("dataloaders.ffcv.pipeline")

    def broken(self, *arguments):
        raise ZeroDivisionError("the pipeline broke")

    monkeypatch.setattr(pipeline._Iterator, "run_pipeline", broken)
    stream = stream_of(engine.FfcvTrainStream, whole / "jpg.beton")
    with pytest.raises(ZeroDivisionError, match="the pipeline broke"):
        next(stream.micro_batches(0))
    stream.close()
    monkeypatch.setattr(pipeline._Iterator, "run", lambda self: None)
    with pytest.raises(DataError, match="FFCV's thread ended before its last batch"):
        next(stream.micro_batches(0))
    stream.close()


@needs_ffcv
def test_a_read_that_hangs_has_a_limit(engine, whole, monkeypatch):
    go_on = threading.Event()
    beton = open_beton(whole / "jpg.beton")
    monkeypatch.setattr(type(beton), "read", lambda self, sample: go_on.wait())
    monkeypatch.setattr(importlib.import_module("dataloaders.ffcv.pipeline"), "_PATIENCE", 0.1)
    stream = engine.FfcvTrainStream(beton, config_of(read_timeout=0.3), 4, RankInfo(), BATCH, BATCH)
    with pytest.raises(DataError, match=r"FFCV gave no batch within 0\.3 s"):
        next(stream.micro_batches(0))
    go_on.set()
    for thread in threading.enumerate():
        if isinstance(thread, importlib.import_module("ffcv.loader.epoch_iterator").EpochIterator):
            thread.join(20)
    stream.close()


@needs_ffcv
def test_nothing_is_left_behind(engine, whole):
    threads, torch_threads = threading.active_count(), torch.get_num_threads()
    stream = stream_of(engine.FfcvTrainStream, whole / "jpg.beton", threads=2)
    first = stream.micro_batches(0)
    next(first)
    second = stream.micro_batches(3)
    same(next(second), taken(stream_of(engine.FfcvTrainStream, whole / "jpg.beton"), 1, first=3)[0])
    assert next(first, None) is None  # ended by the second
    stream.close()
    assert next(second, None) is None
    assert threading.active_count() == threads
    assert torch.get_num_threads() == torch_threads


# What it does not offer


@needs_ffcv
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": AugmentConfig(randaugment_ops=2)}, r"randaugment_ops = 2"),
        ({"augment": AugmentConfig(policy="3augment")}, r'policy = "3augment"'),
        ({"augment": AugmentConfig(color_jitter=0.3, erasing=0.2)}, r"color_jitter = 0.3, augment.erasing = 0.2"),
        ({"workers": 2}, r"workers = 2 \(its threads are data.threads\)"),
    ],
)
def test_what_it_does_not_offer_is_refused(engine, whole, changes, said):
    with pytest.raises(ConfigError, match=rf'data.engine = "ffcv" does not offer .*{said}'):
        stream_of(engine.FfcvTrainStream, whole / "jpg.beton", **changes)


@needs_ffcv
def test_other_containers_are_refused(engine, digits):
    shards = importlib.import_module("dataloaders.sources.shards").open_split(digits / "train")
    with pytest.raises(ConfigError, match=r"reads one \.beton file, which .* is not: convert it"):
        engine.FfcvTrainStream(shards, config_of(), 0, RankInfo(), BATCH, BATCH)


@needs_ffcv
def test_a_threading_layer_that_ends_the_process_is_refused(engine, monkeypatch):
    monkeypatch.setattr(importlib.import_module("numba").config, "THREADING_LAYER", "workqueue")
    with pytest.raises(ConfigError, match='NUMBA_THREADING_LAYER = "workqueue" cannot'):
        importlib.import_module("dataloaders.ffcv.pipeline")._choose_threading()


def test_where_ffcv_is_missing_or_of_another_version_it_is_said(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert ffcv_problem() == "it is not installed"
    with pytest.raises(ConfigError, match=r"does not work here \(it is not installed\): `make ffcv` builds it"):
        load_ffcv_engine()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0")
    assert ffcv_problem() == "version 2.0 is installed, 1.0.2 is needed"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.2")

    def broken(name):
        raise OSError("libturbojpeg.so.0: cannot open shared object file")

    monkeypatch.setattr(ffcv_check.importlib, "import_module", broken)
    with pytest.raises(ConfigError, match=r"libturbojpeg\.so\.0"):
        load_ffcv_engine()


@needs_ffcv
@pytest.mark.parametrize("stored", [(100, 60), (60, 100), (33, 32), (32, 32), (500, 7)])
def test_a_centre_view_becomes_the_part_of_the_image_it_shows(engine, stored):
    view = importlib.import_module("dataloaders.pixels.view").centre_view(stored, (32, 32), 0.875)
    top, left, height, width = engine.seen_part(view)
    assert 0 <= top <= top + height <= stored[0]
    assert 0 <= left <= left + width <= stored[1]
    if stored == (32, 32):
        assert (top, left, height, width) == (0, 0, 32, 32)
    elif min(stored) > 7:
        assert abs(height - width) <= 1
        assert abs(height - 0.875 * min(stored)) <= 1.2
        assert abs((stored[0] - height) / 2 - top) <= 1


@needs_ffcv
def test_ffcv_works_where_it_is_built():
    assert ffcv_problem() == ""
