"""Streams: the same samples and pixels on any ranks, micro batches and workers; resumable; nothing leaks."""

import gc
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.order.order import BlockOrder
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.loading import Loaded, Request
from dataloaders.reading.readers import Readers
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.sources.shards import check_same_classes, open_split
from setformer_dist.core.batch import EvalStream, TrainStream
from setformer_dist.core.errors import ConfigError, DataError, TransientError
from setformer_dist.core.ranks import RankInfo


class Interrupted(BaseException):
    """Stands for Ctrl-C, which must not be loose in the process that runs the tests."""


EVERYTHING = AugmentConfig(
    crop="resized",
    randaugment_ops=2,
    color_jitter=0.4,
    erasing=0.5,
    mixup=0.2,
    cutmix=1.0,
    mix_prob=0.8,
    smoothing=0.1,
)


def make_split(folder, count, size, source):
    for i in range(count):
        path = source / f"class{i % 3}" / f"{i:04d}.{'png' if i % 7 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*size(i), 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size(i)[::-1], Image.Resampling.BOX).save(path, quality=95)
    pack_image_folder(source, folder, PackOptions(samples_per_shard=40))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """106 images of many sizes, and 30 of 16 x 16."""
    root = tmp_path_factory.mktemp("data")
    make_split(root / "train", 106, lambda i: (17 + i % 13, 24 + i % 9), root / "source" / "train")
    make_split(root / "val", 30, lambda i: (16, 16), root / "source" / "val")
    return root


def config_of(data, **changes):
    return DataConfig(**{"root": str(data), "image_size": 16, "augment": EVERYTHING, **changes})


def take(stream, first_step, count):
    batches = stream.micro_batches(first_step)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assemble(data, config, world, micro, steps, batch=24, seed=5, split="train"):
    """Return what all ranks see in each step, joined in the order of positions."""
    per_step = {step: {} for step in steps}
    for rank in range(world):
        stream = ShardTrainStream(open_split(data / split), config, seed, RankInfo(rank, world), batch, micro)
        accumulation = batch // (micro * world)
        for step in steps:
            for a, one in enumerate(take(stream, step, accumulation)):
                assert one.step == step
                assert one.weights.tolist() == [1.0] * micro
                per_step[step][a * world + rank] = one
        stream.close()
    joined = []
    for slots in per_step.values():
        parts = [slots[slot] for slot in sorted(slots)]
        offsets = [torch.full((micro,), micro * slot) for slot in sorted(slots)]
        joined.append(
            (
                torch.cat([p.inputs for p in parts]),
                torch.cat([p.labels for p in parts]),
                torch.cat([p.sample_ids for p in parts]),
                torch.cat([p.mix.partner + o for p, o in zip(parts, offsets, strict=True)]),
                torch.cat([p.mix.lam for p in parts]),
                torch.cat([p.mix.box for p in parts]),
            )
        )
    return joined


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def reference(data):
    return assemble(data, config_of(data), 1, 24, (0, 1, 3, 9))


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 8), (2, 4), (2, 12), (3, 4), (4, 2), (6, 4), (12, 2)])
def test_pixels_do_not_depend_on_ranks_and_micro_batch(data, reference, world, micro):
    assert_same(assemble(data, config_of(data), world, micro, (0, 1, 3, 9)), reference)


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 3), (1, 0), (2, 2)])
def test_pixels_do_not_depend_on_readers(data, reference, workers, threads):
    config = config_of(data, workers=workers, threads=threads)
    stream = ShardTrainStream(open_split(data / "train"), config, 5, RankInfo(), 24, 12)
    taken = take(stream, 0, 8)
    stream.close()
    for step, expected in ((0, reference[0]), (1, reference[1]), (3, reference[2])):
        images = torch.cat([one.inputs for one in taken[2 * step : 2 * step + 2]])
        assert torch.equal(images, expected[0])


@pytest.mark.parametrize("augment", [EVERYTHING, AugmentConfig(crop="pad", pad=3), AugmentConfig(crop="none")])
def test_resumption_at_any_step_is_the_uninterrupted_run(data, augment):
    config = config_of(data, augment=augment, train="val")
    whole = ShardTrainStream(open_split(data / "val"), config, 3, RankInfo(), 8, 4)
    assert whole.steps_per_epoch == 3
    expected = take(whole, 0, 24)
    numbers = random.Random(0)
    for _ in range(6):
        step = numbers.randrange(11)
        again = ShardTrainStream(open_split(data / "val"), config, 3, RankInfo(), 8, 4)
        first = again.check_state(whole.state(step))
        assert first == step
        for one, other in zip(take(again, first, 2), expected[2 * step :], strict=False):
            assert one.step == other.step
            assert torch.equal(one.sample_ids, other.sample_ids)
            assert torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("changes", [{"order": "block", "block_shards": 2}, {"epoch_end": "wrap"}])
def test_config_chooses_the_order(data, changes):
    dataset = open_split(data / "train")
    config = config_of(data, threads=1, **changes)
    stream = ShardTrainStream(dataset, config, 3, RankInfo(), 24, 12)
    taken = take(stream, 0, 20)
    ids = [i for one in taken for i in one.sample_ids.tolist()]
    if "order" in changes:
        assert stream.steps_per_epoch == 4
        assert ids[:96] == BlockOrder(dataset.shards, 2, seed=3)(0, np.arange(96)).tolist()
    else:
        assert stream.steps_per_epoch == 5
        assert sorted(ids[:106]) == sorted(ids[106:212]) == list(range(106))
    again = ShardTrainStream(dataset, config, 3, RankInfo(), 24, 24)
    assert again.check_state(stream.state(7)) == 7
    expected = torch.cat([one.inputs for one in taken[14:16]])
    assert torch.equal(take(again, 7, 1)[0].inputs, expected)
    plain = ShardTrainStream(dataset, config_of(data), 3, RankInfo(), 24, 24)
    with pytest.raises(DataError, match=r"order .*set data.order, block_shards, epoch_end"):
        plain.check_state(stream.state(7))


def test_epochs_and_seeds_draw_other_pixels(data):
    dataset = open_split(data / "train")
    by_sample = {}
    for seed, steps in ((1, 4), (1, 8), (2, 4)):
        stream = ShardTrainStream(dataset, config_of(data), seed, RankInfo(), 24, 24)
        for one in take(stream, 0, steps)[-4:]:
            for sample, image in zip(one.sample_ids.tolist(), one.inputs, strict=True):
                by_sample.setdefault(sample, []).append(image)
    repeated = [images for images in by_sample.values() if len(images) == 3]
    assert len(repeated) > 50
    for images in repeated:
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])


def test_loading_leaves_the_random_state_of_the_run_alone(data):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    for workers, threads in ((0, 0), (0, 2), (1, 0)):
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        stream = ShardTrainStream(
            open_split(data / "train"), config_of(data, workers=workers, threads=threads), 1, RankInfo(), 24, 8
        )
        take(stream, 0, 3)
        stream.close()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]


def test_labels_belong_to_the_samples(data):
    dataset = open_split(data / "train")
    stream = ShardTrainStream(dataset, config_of(data), 1, RankInfo(), 24, 8)
    for one in take(stream, 0, 12):
        assert one.labels.tolist() == dataset.labels(one.sample_ids.numpy()).tolist()


@pytest.mark.parametrize(("workers", "threads"), [(1, 0), (0, 2), (0, 0)])
def test_a_second_iteration_ends_the_first(data, workers, threads):
    config = config_of(data, workers=workers, threads=threads)
    stream = ShardTrainStream(open_split(data / "train"), config, 1, RankInfo(), 24, 24)
    first = stream.micro_batches(0)
    next(first)
    second = stream.micro_batches(7)
    assert next(second).step == 7
    assert next(first, None) is None
    assert next(second).step == 8
    stream.close()
    assert next(second, None) is None


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("micro", [1, 4, 7, 32])
def test_evaluation_counts_each_sample_once_with_equal_batches(data, world, micro):
    seen, batches = [], set()
    for rank in range(world):
        stream = ShardEvalStream(open_split(data / "val"), config_of(data), RankInfo(rank, world), micro)
        taken = list(stream.micro_batches())
        batches.add(len(taken))
        for one in taken:
            assert one.inputs.shape == (micro, 3, 16, 16)
            assert one.sample_ids[one.weights == 0].tolist() == [-1] * int((one.weights == 0).sum())
            seen += one.sample_ids[one.weights == 1].tolist()
    assert len(batches) == 1
    assert sorted(seen) == list(range(30))


def test_evaluation_with_workers_is_the_same_and_can_be_repeated(data):
    plain = ShardEvalStream(open_split(data / "train"), config_of(data), RankInfo(), 16)
    expected = list(plain.micro_batches())
    stream = ShardEvalStream(open_split(data / "train"), config_of(data, workers=2), RankInfo(), 16)
    for _ in range(2):
        for one, other in zip(stream.micro_batches(), expected, strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.sample_ids, other.sample_ids)
    stream.close()


def test_images_already_at_size_are_evaluated_as_they_are(data):
    dataset = open_split(data / "val")
    stream = ShardEvalStream(dataset, config_of(data), RankInfo(), 30)
    (one,) = stream.micro_batches()
    for i, image in enumerate(one.inputs):
        stored = np.asarray(Image.open(io.BytesIO(dataset.read(i).image)).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)


def test_streams_meet_the_protocols(data):
    dataset = open_split(data / "train")
    train: TrainStream = ShardTrainStream(dataset, config_of(data), 1, RankInfo(), 24, 24)
    val: EvalStream = ShardEvalStream(dataset, config_of(data), RankInfo(), 24)
    assert train.fingerprint == dataset.fingerprint
    assert (train.steps_per_epoch, val.num_samples) == (4, 106)


def test_what_does_not_fit_is_refused_before_the_first_step(data):
    dataset = open_split(data / "train")
    with pytest.raises(ConfigError, match="larger than the data set of 106"):
        ShardTrainStream(dataset, config_of(data), 1, RankInfo(), 128, 128)
    with pytest.raises(ConfigError, match="mix_group = 2 does not divide the micro batch 3"):
        ShardTrainStream(dataset, config_of(data), 1, RankInfo(), 24, 3)
    with pytest.raises(ConfigError, match=r"needs images of 16 x 16.*from 17 x 24 to 29 x 32"):
        ShardTrainStream(dataset, config_of(data, augment=AugmentConfig(crop="pad")), 1, RankInfo(), 24, 4)
    with pytest.raises(ConfigError, match="at least 1"):
        ShardEvalStream(dataset, config_of(data), RankInfo(), 0)


def test_class_maps_must_agree(data, tmp_path):
    check_same_classes(open_split(data / "train"), open_split(data / "val"))
    make_split(tmp_path / "v", 2, lambda i: (16, 16), tmp_path / "s")
    with pytest.raises(DataError, match=r"label 2 is 'class2' in .* but no class in .*--classes-from"):
        check_same_classes(open_split(data / "train"), open_split(tmp_path / "v"))


_READ = """
import sys, time
from dataloaders.config import DataConfig
from dataloaders.reading.streams import ShardTrainStream
from dataloaders.sources.shards import open_split
from pathlib import Path
from setformer_dist.core.ranks import RankInfo
if __name__ == "__main__":
    config = DataConfig(root=sys.argv[1], image_size=16, workers=2)
    stream = ShardTrainStream(open_split(Path(sys.argv[1]) / "train"), config, 1, RankInfo(), 24, 8)
    for batch in stream.micro_batches(0):
        print(batch.step, flush=True)
        time.sleep(0.01)
"""


def shared_files(pid):
    """Files in shared memory that a process has mapped under a name."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[-1] for line in lines if "/dev/shm/" in line}
    return {Path(name) for name in names if not name.endswith("(deleted)")}


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_readers_outlive_a_foreign_sigterm_but_not_a_killed_trainer(data):
    command = [sys.executable, "-c", _READ, str(data)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert trainer.stdout.readline() == b"0\n"
    helpers = psutil.Process(trainer.pid).children(recursive=True)
    readers = [p for p in helpers if p.ppid() != trainer.pid]
    assert len(readers) == 2
    for reader in readers:
        os.kill(reader.pid, signal.SIGTERM)
    steps = [int(trainer.stdout.readline()) for _ in range(40)]
    assert steps[-1] > 10  # more than was read ahead
    shared = set.union(*(shared_files(pid) for pid in (trainer.pid, *(p.pid for p in helpers))))
    assert shared  # else the check below shows nothing
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 60
    while any(is_alive(helper) for helper in helpers):
        assert time.monotonic() < deadline, "readers outlive a killed trainer"
        time.sleep(0.05)
    assert not [path for path in shared if path.exists()]


def test_a_trainer_that_forgets_to_close_ends_all_the_same(data):
    script = _READ.replace("time.sleep(0.01)", "if batch.step == 3: break")
    ended = subprocess.run([sys.executable, "-c", script, str(data)], capture_output=True, timeout=150, check=True)
    assert ended.stdout.split()[-1] == b"3"
    assert ended.stderr == b""


class DefectiveLoading:
    spans = (range(1),)

    def begin(self, request):
        return self

    def fill(self, span):
        raise RuntimeError("a defect of ours")

    def moved(self):
        return 0


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (0, 2), (1, 0), (1, 2)])
def test_a_defect_in_a_reader_keeps_its_traceback(workers, threads):
    readers = Readers(DefectiveLoading(), DataConfig(root="", workers=workers, threads=threads))
    with pytest.raises(RuntimeError, match="a defect of ours"):
        next(readers.answers(lambda: iter([Request(np.arange(3))])))
    readers.close()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-reader")]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_no_thread_is_left(data, threads):
    config = config_of(data, threads=threads, prefetch=4)
    for end in ("close", "forget", "error"):
        stream = ShardTrainStream(open_split(data / "train"), config, 1, RankInfo(), 24, 8)
        batches = stream.micro_batches(0)
        next(batches)
        assert len(reader_threads()) == max(1, threads)
        if end == "close":
            stream.close()
        elif end == "forget":
            del batches
        else:
            with pytest.raises(Interrupted):
                batches.throw(Interrupted)
        assert not reader_threads()


class Counting:
    """Counts the requests that were begun; answers none but by an empty batch."""

    spans = ()

    def __init__(self):
        self.begun = 0

    def begin(self, request):
        self.begun += 1
        return self

    def loaded(self):
        return Loaded(Request(np.arange(3)), torch.empty(0), np.arange(3))

    def moved(self):
        return 0


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (1, 5), (4, 5)])
def test_readers_run_ahead_by_so_many_micro_batches_and_no_further(threads, ahead):
    loading = Counting()
    readers = Readers(loading, DataConfig(root="", threads=threads, prefetch=5))
    answers = readers.answers(lambda: (Request(np.arange(3)) for _ in itertools.count()))
    for taken in range(1, 6):
        next(answers)
        assert loading.begun == taken + ahead
    readers.close()
    few = readers.answers(lambda: iter([Request(np.arange(3))] * 3))
    assert len(list(few)) == 3


class Hanging(Counting):
    """A storage that answers nothing until it is let go."""

    spans = (range(1),)

    def __init__(self):
        super().__init__()
        self.released = threading.Event()

    def fill(self, span):
        self.released.wait(60)


def test_a_reader_that_hangs_stops_the_run_with_a_reason(monkeypatch):
    monkeypatch.setattr("dataloaders.reading.readers._GRACE_S", 0.0)
    loading = Hanging()
    readers = Readers(loading, DataConfig(root="", threads=1, read_timeout=0.2))
    with pytest.raises(TransientError, match=r"gave no sample for 0 s: the storage hangs.*data.read_timeout"):
        next(readers.answers(lambda: iter([Request(np.arange(3))])))
    loading.released.set()
    for thread in reader_threads():
        thread.join(10)
    assert not reader_threads()


def test_memory_of_a_stream_does_not_grow(data):
    """Batches are given back as they are used: what is alive is what is ahead."""
    config = config_of(data, threads=2, prefetch=3)
    stream = ShardTrainStream(open_split(data / "train"), config, 1, RankInfo(), 24, 24)
    batches = stream.micro_batches(0)
    for _ in range(5):
        next(batches)
    gc.collect()

    def alive():
        return sum(type(one) is Loaded for one in gc.get_objects())

    before = alive()
    for _ in range(40):
        next(batches)
    gc.collect()
    assert alive() <= before + 1
    assert before <= 5
    stream.close()


def reader_pids(stream):
    """Process ids of a stream's readers; its way to end them is a method of torch's iterator, which knows them."""
    return {worker.pid for worker in stream._readers._end.__self__._workers}


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no socket")])
def test_a_reader_that_dies_while_it_hands_a_tensor_over_does_too(data, error):
    def answers(found):
        raise found
        yield

    stream = ShardTrainStream(open_split(data / "train"), config_of(data, workers=1), 1, RankInfo(), 24, 24)
    with pytest.raises(TransientError, match="reader process died"):
        stream._readers._next_of(answers(error), [])
    within = type(error)("Caught " + type(error).__name__ + " in DataLoader worker process 0.")
    with pytest.raises(type(error), match="Caught"):
        stream._readers._next_of(answers(within), [])
    stream.close()


def test_a_killed_reader_stops_the_run_with_a_reason(data):
    stream = ShardTrainStream(open_split(data / "train"), config_of(data, workers=1), 1, RankInfo(), 24, 24)
    batches = stream.micro_batches(0)
    next(batches)
    before = time.monotonic()
    for child in psutil.Process().children(recursive=True):
        if child.pid in reader_pids(stream):
            child.kill()
    with pytest.raises(TransientError, match="reader process died"):
        list(itertools.islice(batches, 20))
    assert time.monotonic() - before < 100
    stream.close()
