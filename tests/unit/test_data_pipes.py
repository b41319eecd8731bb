"""Sequential access: whole shards through memory, none before the one that is needed, each fetched once."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.sources.shards import open_split
from dataloaders.storage.cache import Known
from dataloaders.storage.memory import SequentialStorage
from dataloaders.storage.remote import HttpStorage
from setformer_dist.core.errors import DataError
from tests.unit.serving import served
from tests.unit.test_data_foreign import picture

SHARDS, EACH = 6, 5


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with served(packed) as server:
        server.ranges = False
        yield server


def opened(server):
    config = DataConfig(root=server.url, access="sequential", read_timeout=5.0)
    return open_source(server.url, "packed", config)


def fetched(server):
    return [path.rpartition("/")[2] for method, path, _ in server.log if method == "GET" and path.endswith(".tar")]


def test_a_pass_through_the_data_fetches_each_shard_once_and_whole(server, packed):
    source, local = opened(server), open_split(packed / "packed")
    for sample in range(SHARDS * EACH):
        assert source.read(sample) == local.read(sample)
        assert source.shards[sample] == sample // EACH
        assert len(fetched(server)) == sample // EACH + 1
    assert all(asked is None for method, _, asked in server.log if method == "GET")
    source.close()


def test_a_resumption_fetches_no_shard_before_its_own(server, packed):
    """The order names samples, the index their shards: what was consumed is not even asked for."""
    source, local = opened(server), open_split(packed / "packed")
    order = np.concatenate(
        [shard * EACH + np.random.default_rng(shard).permutation(EACH) for shard in (4, 1, 3, 0, 5, 2)]
    )
    for position in range(2 * EACH + 3, len(order)):
        assert source.read(int(order[position])) == local.read(int(order[position]))
    assert fetched(server) == [f"shard-{shard:06d}.tar" for shard in (3, 0, 5, 2)]
    source.close()


def test_shards_expected_are_there_when_reads_come(server):
    source = opened(server)
    source.expect(np.array([2, 4]))
    ahead = source.storage._ahead._thread
    if ahead is not None:
        ahead.join(30)
    assert fetched(server) == ["shard-000002.tar", "shard-000004.tar"]
    source.read(2 * EACH)
    source.read(5 * EACH - 1)
    assert len(fetched(server)) == 2
    source.close()


def test_several_threads_fetch_a_shard_once(server, packed):
    source, local = opened(server), open_split(packed / "packed")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, range(2 * EACH)))
    assert read == [local.read(sample) for sample in range(2 * EACH)]
    assert sorted(fetched(server)) == ["shard-000000.tar", "shard-000001.tar"]
    source.close()


def test_closing_gives_up_what_is_fetched_ahead(server):
    for number in range(SHARDS):
        server.faults[f"/packed/shard-{number:06d}.tar"] = [("stall",)]
    source = opened(server)
    source.expect(np.arange(SHARDS))
    server.ended.set()  # the server breaks the connections off, the fetching thread would try them again
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "shards ahead"]


def test_what_the_server_changed_is_found_by_size_and_digest(server, packed, tmp_path):
    data = (packed / "packed" / "shard-000000.tar").read_bytes()
    known = {"shard-000000.tar": Known(len(data), hashlib.sha256(data[:-1] + b"x").hexdigest())}
    storage = SequentialStorage(HttpStorage(f"{server.url}/packed", 5), known, 1)
    with pytest.raises(DataError, match=r"shard-000000\.tar is not what the index says"):
        storage.read("shard-000000.tar", 0, 10)
    storage.close()


def test_a_failure_reaches_every_reader_and_does_not_last(server, packed):
    server.faults["/packed/shard-000003.tar"] = [("status", 404)] * 2
    source, sample = opened(server), 3 * EACH
    for _ in range(2):
        with pytest.raises(DataError, match=rf"sample {sample} .*shard-000003\.tar is not there"):
            source.read(sample)
    assert source.read(sample) == open_split(packed / "packed").read(sample)
    source.close()
