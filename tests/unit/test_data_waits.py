"""Waits for storage: as long as bytes come, never for ever; what is needed next is fetched meanwhile."""

import contextlib
import fcntl
import gc
import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from dataloaders.beton.writer import BetonSample, write_beton
from dataloaders.config import DataConfig, MixtureEntry
from dataloaders.helpers import helper_context, lean_start
from dataloaders.opening import open_source
from dataloaders.order.order import BlockOrder, FullOrder, SetPlan
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.reading.ahead import coming_files, coming_of_split
from dataloaders.reading.loading import Loaded, Request
from dataloaders.reading.readers import Readers
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import Boxes, Stored
from dataloaders.sources.shards import open_split
from dataloaders.storage.base import UnreadableError
from dataloaders.storage.cache import CachedStorage, Known, ShardCache, fitting, locked
from dataloaders.storage.memory import SequentialStorage
from dataloaders.storage.remote import FsspecStorage, HttpStorage
from launch.run.inputs import ImageInputs
from setformer_dist.core.errors import ConfigError, DataError, TransientError
from setformer_dist.core.ranks import RankInfo
from tests.unit.serving import served
from tests.unit.test_data_foreign import picture

SHARDS, EACH = 6, 10


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for number in range(SHARDS * EACH):
        path = root / "images" / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    pack_image_folder(root / "images", root / "packed", PackOptions(samples_per_shard=EACH))
    return root


@pytest.fixture
def server(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with served(packed) as server:
        yield server


def config_of(server, **changes):
    return DataConfig(**{"root": server.url, "train": "packed", "image_size": 8, "read_timeout": 6.0, **changes})


def fetched(server):
    return [path.rpartition("/")[2] for method, path, _ in server.log if method == "GET" and path.endswith(".tar")]


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Slow is not silent


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", ["cache", "memory"])
def test_a_shard_that_comes_slowly_is_waited_for(server, tmp_path, workers, kept):
    """Longer than a reader may be silent, as its bytes do come."""
    how = {"cache": str(tmp_path / "cache")} if kept == "cache" else {"access": "sequential"}
    config = config_of(server, workers=workers, **how)
    source = open_source(server.url, "packed", config)
    for number in range(SHARDS):
        server.always[f"/packed/shard-{number:06d}.tar"] = ("slow", 3.0)
    stream = ShardEvalStream(source, config, RankInfo(0, SHARDS), EACH)
    stream._readers._wait_s = 1.5
    begun = time.monotonic()
    [one] = stream.micro_batches()
    assert time.monotonic() - begun > 2.5
    assert one.sample_ids.tolist() == list(range(EACH))
    stream.close()


def test_samples_that_are_slow_one_by_one_are_waited_for():
    class Slow(Fake):
        spans = (range(6),)

        def fill(self, span):
            for _ in span:
                time.sleep(0.25)
                self.done += 1

    readers = Readers(Slow(), DataConfig(root="x", threads=1))
    readers._wait_s = 1.0
    assert len(list(readers.answers(lambda: iter([Request(np.arange(3))])))) == 1
    readers.close()


# What comes next


def test_files_are_named_before_their_steps_and_as_long_as_readers_need_them():
    shards = np.repeat(np.arange(20, dtype=np.int32), 13)
    for order, behind in itertools.product((BlockOrder(shards, 3, 5), FullOrder(len(shards), 5)), (0, 2)):
        plan = SetPlan(order, 8)
        needs = [list(dict.fromkeys(shards[plan.pick(step, np.arange(8))[0]].tolist())) for step in range(120)]
        for first in (0, 29):
            named = list(itertools.islice(coming_files(plan, np.arange(8), shards, first, 7, behind), 60))
            assert named[0][: len(needs[first])] == tuple(needs[first])
            for step, files in enumerate(named, first):
                held = set(itertools.chain(*needs[max(first, step - behind) : step + 1]))
                assert held <= set(files)
                assert len(files) == len(set(files)) >= 7
            if isinstance(order, BlockOrder):  # the block being read and the next one, not the whole set
                assert max(map(len, named)) <= 12


def test_evaluation_names_its_files_in_order():
    shards = np.repeat(np.arange(5), 4)
    share = range(2, 15)
    assert coming_of_split(shards, 0, share, 0, 4) == (0, 1, 2)
    assert coming_of_split(shards, 4, share, 4, 8) == (0, 1, 2, 3)
    assert coming_of_split(shards, 0, share, 8, 99) == (2, 3)
    assert coming_of_split(shards, 0, range(0), 0, 4) == ()
    known = {"a": Known(4), "b": Known(4), "c": Known(-1), "d": Known(9)}
    assert fitting(["a", "b", "c", "d"], known, 9) == ["a", "b", "c"]
    assert fitting(["d", "a"], known, 8) == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", ["cache", "memory"])
def test_the_next_block_is_fetched_while_this_one_is_read(server, tmp_path, kept, workers):
    how = {"cache": str(tmp_path / "cache")} if kept == "cache" else {"access": "sequential"}
    config = config_of(server, order="block", block_shards=2, prefetch=1, workers=workers, **how)
    stream = ShardTrainStream(open_source(server.url, "packed", config), config, 3, RankInfo(), 2, 2)
    batches = stream.micro_batches(0)
    next(batches)
    order = BlockOrder(shards_of_split(), 2, 3)
    blocks = set((order(0, np.arange(4 * EACH)) // EACH).tolist())
    assert len(blocks) == 4
    wait_until(lambda: {f"shard-{shard:06d}.tar" for shard in blocks} <= set(fetched(server)))
    stream.close()


def shards_of_split():
    return np.repeat(np.arange(SHARDS, dtype=np.int32), EACH)


def test_a_cache_of_two_blocks_fetches_each_shard_once_an_epoch(server, packed, tmp_path):
    """What is fetched ahead drives nothing out that is still read."""
    size = max(path.stat().st_size for path in (packed / "packed").glob("*.tar"))
    config = config_of(
        server, order="block", block_shards=1, cache=str(tmp_path / "cache"), cache_gib=(2 * size + 100) / 2**30
    )
    stream = ShardTrainStream(open_source(server.url, "packed", config), config, 3, RankInfo(), 2, 2)
    for _ in itertools.islice(stream.micro_batches(0), SHARDS * EACH // 2):
        pass
    stream.close()
    assert set(fetched(server)) == {f"shard-{shard:06d}.tar" for shard in range(SHARDS)}
    assert len(fetched(server)) <= 2 * SHARDS


# Never for ever


class Fake:
    """Answers requests without data."""

    spans = (range(1),)

    def __init__(self):
        self.done = 0

    def begin(self, request):
        return self

    def moved(self):
        return self.done

    def loaded(self):
        return Loaded(Request(np.arange(3)), torch.empty(0), np.arange(3))


class Hanging(Fake):
    def __init__(self):
        super().__init__()
        self.begun, self.released = threading.Event(), threading.Event()

    def fill(self, span):
        if self.begun.is_set():
            self.released.wait(60)
        self.begun.set()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-reader")]


def test_closing_leaves_a_thread_behind_that_hangs(monkeypatch, caplog):
    monkeypatch.setattr("dataloaders.reading.readers._CLOSE_S", 0.2)
    loading = Hanging()
    readers = Readers(loading, DataConfig(root="x", threads=1))
    next(readers.answers(lambda: iter([Request(np.arange(3))] * 9)))
    begun = time.monotonic()
    readers.close()
    assert time.monotonic() - begun < 20
    assert "1 data reader threads are left behind, as they hang" in caplog.text
    loading.released.set()
    wait_until(lambda: not reader_threads())


_HANGS = """
import threading
import numpy as np
from dataloaders.config import DataConfig
from dataloaders.reading import readers
from dataloaders.reading.loading import Request
from tests.unit.test_data_waits import Fake
readers._GRACE_S = readers._CLOSE_S = 0.2

class Hanging(Fake):
    def fill(self, span):
        threading.Event().wait()

one = readers.Readers(Hanging(), DataConfig(root="x", threads=2, read_timeout=0.2))
next(one.answers(lambda: iter([Request(np.arange(3))] * 9)))
"""


def test_a_process_whose_reader_hangs_does_end():
    ended = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, timeout=120, check=False, text=True)
    assert ended.returncode == 1
    assert "TransientError: a data reader gave no sample" in ended.stderr


def test_threads_that_the_system_does_not_start_are_said(monkeypatch):
    start, count = threading.Thread.start, itertools.count()

    def limited(thread):
        if next(count) >= 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    readers = Readers(Fake(), DataConfig(root="x", threads=5))
    with pytest.raises(ConfigError, match=r"started 2 of data\.threads = 5 threads .*lower it"):
        next(readers.answers(lambda: iter([Request(np.arange(3))])))
    assert not reader_threads()


def known_of(packed):
    return {path.name: Known(path.stat().st_size) for path in (packed / "packed").glob("*.tar")}


def test_a_cached_shard_that_is_locked_is_not_waited_for_without_end(server, packed, tmp_path):
    origin = HttpStorage(f"{server.url}/packed", 5)
    storage = CachedStorage(origin, ShardCache(tmp_path / "cache", 1, 0.3), known_of(packed))
    storage.read("shard-000000.tar", 0, 9)
    [path] = (tmp_path / "cache").glob("*.tar")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"shard-000000\.tar was locked by another process for 0\.3 s"):
            storage.read("shard-000000.tar", 0, 9)
    assert len(storage.read("shard-000000.tar", 0, 9)) == 9
    storage.close()


def test_a_thread_that_fetches_is_not_waited_for_without_end(server, packed, monkeypatch, caplog):
    monkeypatch.setattr("dataloaders.storage.cache._CLOSE_S", 0.2)
    storage = SequentialStorage(HttpStorage(f"{server.url}/packed", 30), known_of(packed), 1, 0.3)
    server.always["/packed/shard-000001.tar"] = ("stall",)
    storage.expect(["shard-000001.tar"])
    wait_until(lambda: fetched(server))
    with pytest.raises(UnreadableError, match=r"shard-000001\.tar is being fetched, but nothing came for 0\.3 s"):
        storage.read("shard-000001.tar", 0, 9)
    begun = time.monotonic()
    storage.close()
    assert time.monotonic() - begun < 20
    assert "fetching a shard in advance is abandoned" in caplog.text
    server.always.clear()
    server.ended.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "shards ahead"])


class HangingFiles(fsspec.AbstractFileSystem):
    """A client without time-outs."""

    protocol = "hanging"
    released = threading.Event()

    def _hang(self, *words, **more):
        self.released.wait(60)
        raise OSError("let go")

    info = cat_file = glob = open = _hang


def test_a_client_without_time_outs_gets_ours():
    fsspec.register_implementation("hanging", HangingFiles, clobber=True)
    storage = FsspecStorage("hanging://bucket/a", 0.3)
    asks = (
        lambda: storage.facts("x"),
        lambda: storage.read("x", 0, 9),
        lambda: storage.names("*"),
        lambda: list(storage.blocks("x")),
    )
    for ask in asks:
        with pytest.raises(UnreadableError, match=r"cannot be read after 1 try .nothing came for 0\.3 s.: check"):
            ask()
    HangingFiles.released.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "storage client"])


# The cache


def test_a_cached_shard_that_was_damaged_is_fetched_again(server, packed, tmp_path):
    config = config_of(server, cache=str(tmp_path / "cache"))
    source, local = open_source(server.url, "packed", config), open_split(packed / "packed")
    assert source.read(EACH) == local.read(EACH)
    for fetches in (2, 3):
        [path] = (tmp_path / "cache" / "shards").glob("*-shard-000001.tar")
        place = int(source.index.columns["offset"][EACH]) + 40
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        assert source.read(EACH) == local.read(EACH)
        assert len(fetched(server)) == fetches
    source.close()


def test_beton_files_are_counted_and_give_way_unless_in_use(server, packed, tmp_path):
    split = open_split(packed / "packed")
    samples = [BetonSample(split.read(i).image, 0, *split.size(i)) for i in range(EACH)]
    (tmp_path / "files").mkdir()
    for name in "abc":
        write_beton(tmp_path / "files" / f"{name}.beton", samples, EACH, classes=(name,))
    size = sum(path.stat().st_size for path in (tmp_path / "files").glob("a.*"))
    limit = int(2.5 * size)
    with served(tmp_path / "files") as files:

        def opened(name):
            config = config_of(files, cache=str(tmp_path / "cache"), cache_gib=limit / 2**30, read_timeout=0.5)
            return open_source(files.url, f"{name}.beton", config)

        def kept():
            assert cached_bytes(tmp_path / "cache") <= limit
            return sorted(path.name[17:] for path in (tmp_path / "cache" / "shards").glob("*.beton"))

        one, two = opened("a"), opened("b")
        assert kept() == ["a.beton", "b.beton"]
        with pytest.raises(DataError, match=r"has no room for .*c\.beton: .* in use, so raise data\.cache_gib"):
            opened("c")
        del two
        gc.collect()
        three = opened("c")
        assert kept() == ["a.beton", "c.beton"]
        assert one.read(3).image == three.read(3).image == split.read(3).image
        again = opened("a")
        assert again.fingerprint == one.fingerprint
        assert len(files.fetched("a.beton")) == 1


def cached_bytes(cache):
    """Return the bytes of all files in the folder of cached shards and .beton files, at one moment."""
    found = {}
    with locked(cache / "shards" / ".room", 20):
        for path in list((cache / "shards").iterdir()):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                found[facts.st_ino] = facts.st_size  # one that is being renamed counts once
    return sum(found.values())


def two_kinds(packed, folder):
    """Write a .beton file next to a copy of the packed split; return the sizes of both."""
    split = open_split(packed / "packed")
    shutil.copytree(packed / "packed", folder / "packed")
    samples = [BetonSample(split.read(i).image, 0, *split.size(i)) for i in range(EACH)]
    write_beton(folder / "a.beton", samples, EACH, classes=("a",))
    shards = sum(path.stat().st_size for path in (folder / "packed").glob("*.tar"))
    return shards, sum(path.stat().st_size for path in folder.glob("a.beton*"))


def read_both(url, cache, limit, seed):
    """In a process of its own: hold a .beton file and read shards, through a cache that does not hold them all."""
    config = DataConfig(root=url, cache=str(cache), cache_gib=limit / 2**30, order="block", block_shards=1)
    held = open_source(url, "a.beton", config)
    source = open_source(url, "packed", config)
    numbers = random.Random(seed)
    for _ in range(40):
        source.read(numbers.randrange(source.num_samples))
        assert Path(held.path).exists()
        assert cached_bytes(cache) <= limit
    source.close()


def test_shards_and_beton_files_have_one_budget(packed, tmp_path):
    """Several processes hold a .beton file, and read shards for which there is only so much room next to it."""
    folder, cache = tmp_path / "served", tmp_path / "cache"
    folder.mkdir()
    shards, beton = two_kinds(packed, folder)
    limit = beton + int(1.6 * shards / SHARDS)
    with served(folder) as files:
        with lean_start():
            readers = [
                helper_context().Process(target=read_both, args=(files.url, cache, limit, seed)) for seed in range(2)
            ]
            for one in readers:
                one.start()
        for one in readers:
            one.join(60)
        assert [one.exitcode for one in readers] == [0, 0]
        assert cached_bytes(cache) <= limit
        before = len(files.fetched("a.beton"))
        config = config_of(files, cache=str(cache), cache_gib=1.2 * shards / 2**30)
        source = open_source(files.url, "packed", config)  # the .beton file, open nowhere now, gives way
        for sample in range(source.num_samples):
            source.read(sample)
        assert not list((cache / "shards").glob("*.beton"))
        assert cached_bytes(cache) <= 1.2 * shards
        assert before == 1
        source.close()


def test_beton_files_count_among_the_sets_of_a_mixture(packed, tmp_path):
    folder, cache = tmp_path / "served", tmp_path / "cache"
    folder.mkdir()
    shards, beton = two_kinds(packed, folder)
    with served(folder) as files:
        entries = (MixtureEntry(root=files.url, train="a.beton"), MixtureEntry(root=files.url, train="packed"))
        config = config_of(files, mixture=entries, cache=str(cache), cache_gib=(beton + shards // 2) / 2**30)
        with pytest.raises(ConfigError, match=r"does not hold the files .* of data\.mixture"):
            ImageInputs(config).open_train()


def test_sets_of_a_mixture_share_one_cache(server, packed, tmp_path):
    size = sum(path.stat().st_size for path in (packed / "packed").glob("*.tar"))
    entries = tuple(MixtureEntry(root=server.url, train="packed") for _ in range(2))
    for room, refused in ((1.5 * size, True), (2.5 * size, False)):
        config = config_of(server, mixture=entries, cache=str(tmp_path / "cache"), cache_gib=room / 2**30)
        said = pytest.raises(ConfigError, match=r"does not hold the files .* of data\.mixture .*raise it, or set")
        with said if refused else contextlib.nullcontext():
            source = ImageInputs(config).open_train()
    assert source.fetches
    before = source.moved()
    source.expect(np.array([0, SHARDS + 1]))
    wait_until(lambda: {"shard-000000.tar", "shard-000001.tar"} <= set(fetched(server)))
    wait_until(lambda: source.moved() > before)
    source.close()


def test_evaluation_is_distinguished_from_training_where_the_url_has_a_query(server, packed, tmp_path):
    size = max(path.stat().st_size for path in (packed / "packed").glob("*.tar"))
    config = config_of(server, train="other", val="packed", cache=str(tmp_path / "cache"), cache_gib=1.5 * size / 2**30)
    open_source(f"{server.url}?sig=1", "packed", config).close()


# Boxes between processes


class Boxed:
    """Images with many boxes each."""

    num_samples, name, classes, fingerprint = 64, "boxed", ("a",), "0"
    parts = frozenset({"boxes"})

    def __init__(self):
        corners = np.stack([np.arange(4), np.arange(4), np.arange(4) + 5, np.arange(4) + 5], axis=1)
        self.stored = Stored(picture(1), None, Boxes(corners.astype(np.float32), np.arange(4)))

    def read(self, sample):
        keep = sample % 5
        return Stored(self.stored.image, None, Boxes(self.stored.boxes.corners[:keep], self.stored.boxes.labels[:keep]))

    def labels(self, samples):
        return torch.zeros(len(samples), dtype=torch.int64)

    def close(self):
        pass


def test_boxes_take_no_file_descriptor_each():
    config = DataConfig(root="x", image_size=32, workers=1)
    stream = ShardEvalStream(Boxed(), config, RankInfo(), 64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    [one] = stream.micro_batches()
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 32
    assert [len(boxes) for boxes in one.annotations.boxes] == [min(i % 5, 4) for i in range(64)]
    assert one.annotations.box_labels[4].tolist() == [0, 1, 2, 3]
    assert one.annotations.boxes[3].dtype == torch.float32
    assert one.annotations.boxes[0].shape == (0, 4)
    stream.close()


class Silent(Fake):
    def fill(self, span):
        threading.Event().wait(60)


def test_silence_ends_the_wait_in_processes_too():
    readers = Readers(Silent(), DataConfig(root="x", workers=1, threads=0))
    readers._wait_s = 0.5
    with pytest.raises(TransientError, match="gave no sample"):
        next(readers.answers(lambda: iter([Request(np.arange(3))])))
    readers.close()
