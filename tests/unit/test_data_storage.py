"""Storage and the shard cache: the bytes asked for or one clear error, over a real server, by several processes."""

import fcntl
import hashlib
import os
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataloaders.helpers import helper_context, lean_start
from dataloaders.storage.base import DeniedError, LocalFolder, MissingError, NoRangesError, UnreadableError
from dataloaders.storage.cache import CachedStorage, Known, ShardCache, locked
from dataloaders.storage.memory import SequentialStorage
from dataloaders.storage.remote import FsspecStorage, HttpStorage, join_url, open_storage, shown_url
from setformer_dist.core.errors import DataError
from tests.unit.serving import served

SIZE = 300_000


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "origin"
    root.mkdir()
    for number in range(4):
        (root / f"s{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    (root / "other.txt").write_text("x")
    return root


@pytest.fixture
def server(folder):
    with served(folder) as server:
        yield server


@pytest.fixture
def waits():
    return []


@pytest.fixture
def http(server, waits):
    storage = HttpStorage(server.url, 3.0, waits.append)
    yield storage
    storage.close()


def known_of(folder):
    return {
        path.name: Known(SIZE, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.glob("*.tar"))
    }


# All storages alike


@pytest.fixture(params=["local", "http", "fsspec", "cached", "sequential"])
def storage(request, folder, tmp_path):
    with served(folder) as server:
        http = HttpStorage(server.url, 3.0)
        made = {
            "local": lambda: LocalFolder(folder),
            "http": lambda: http,
            "fsspec": lambda: FsspecStorage(f"local://{folder}"),
            "cached": lambda: CachedStorage(http, ShardCache(tmp_path / "cache", 1, 5), known_of(folder)),
            "sequential": lambda: SequentialStorage(http, known_of(folder), 1),
        }[request.param]()
        yield made
        made.close()


def test_reads_are_the_files_bytes(storage, folder):
    numbers = random.Random(3)
    for _ in range(60):
        name = f"s{numbers.randrange(4)}.tar"
        offset = numbers.randrange(SIZE)
        size = numbers.randrange(1, min(5000, SIZE - offset) + 1)
        assert storage.read(name, offset, size) == (folder / name).read_bytes()[offset : offset + size]
    assert storage.facts("s1.tar").size == SIZE
    assert storage.facts("s1.tar").version == storage.facts("s1.tar").version != ""
    assert b"".join(storage.blocks("s2.tar")) == (folder / "s2.tar").read_bytes()


def test_threads_read_at_once(storage, folder, monkeypatch):
    monkeypatch.setattr("dataloaders.storage.base._MAX_OPEN", 2)
    whole = {f"s{n}.tar": (folder / f"s{n}.tar").read_bytes() for n in range(4)}

    def work(seed):
        numbers = random.Random(seed)
        for _ in range(100):
            name, offset = f"s{numbers.randrange(4)}.tar", numbers.randrange(SIZE - 900)
            assert storage.read(name, offset, 900) == whole[name][offset : offset + 900]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_copy_in_another_process_reads_the_same(storage, folder):
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read("s3.tar", 10, 99) == (folder / "s3.tar").read_bytes()[10:109]
    assert copy.name == storage.name
    copy.close()


def test_a_missing_file_is_said_at_once(storage):
    begun = time.monotonic()
    with pytest.raises(MissingError, match=r"nothere\.tar"):
        storage.facts("nothere.tar")
    assert time.monotonic() - begun < 2


def test_patterns_list_where_there_is_a_listing(folder):
    for storage in (LocalFolder(folder), FsspecStorage(f"local://{folder}")):
        assert storage.names("s[12]*.tar") == ["s1.tar", "s2.tar"]
        assert storage.names("none*") == []
    with pytest.raises(DataError, match=r"http lists no files: name the shards as train-\{0000\.\.0146\}\.tar"):
        HttpStorage("http://localhost:1", 1).names("*.tar")


def test_closing_local_files_leaves_none_open(folder):
    storage = LocalFolder(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(4):
        storage.read(f"s{number}.tar", 0, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 4
    storage.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_storage_of_a_root_and_an_unknown_scheme(folder):
    assert isinstance(open_storage(str(folder), 1), LocalFolder)
    assert isinstance(open_storage(f"file://{folder}", 1), LocalFolder)
    assert isinstance(open_storage("https://example.org/x", 1), HttpStorage)
    assert isinstance(open_storage("memory://x", 1), FsspecStorage)
    with pytest.raises(DataError, match=r"nosuch://place cannot be opened: .*nosuch"):
        open_storage("nosuch://place", 1).read("x", 0, 1)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://host:99999", "http://", f"http://{'a' * 70}.org", "http://a..b"]
)
def test_an_address_that_cannot_be_read_is_not_called_a_redirection(url, waits, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UnreadableError, match="is no address that can be read: check its host, and its port"):
        HttpStorage(url, 1.0, waits.append).facts("s0.tar")
    assert waits == []


def test_a_proxy_that_cannot_be_read_is_named(waits, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://[::1")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UnreadableError, match="has a proxy whose address cannot be read: check http_proxy"):
        HttpStorage("http://host", 1.0, waits.append).facts("s0.tar")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://someone:sEcReT@127.0.0.1:1/x", r"ftp://127\.0\.0\.1:1/x.*tries \(.*refused"),
        ("zip://x::file:///nowhere.zip", r"is not there"),
        ("zip://x::file:///dev/null", r"tries|cannot be opened"),
    ],
)
def test_a_client_that_cannot_even_be_made_is_a_sentence(waits, url, said):
    storage = FsspecStorage(url, 3.0, waits.append)
    for work in (lambda: storage.read("a.tar", 0, 1), lambda: storage.names("*.tar"), lambda: storage.facts("a.tar")):
        with pytest.raises(DataError, match=said) as refused:
            work()
        assert "sEcReT" not in str(refused.value)


# Http


@pytest.mark.parametrize("fault", [("status", 500), ("status", 503), ("status", 429), ("reset",), ("short", 100)])
@pytest.mark.parametrize("times", [1, 3])
def test_what_may_pass_is_tried_again(server, http, folder, waits, fault, times):
    server.faults["/s0.tar"] = [fault] * times
    assert http.read("s0.tar", 5000, 700) == (folder / "s0.tar").read_bytes()[5000:5700]
    assert waits == [0.1, 0.5, 2.0][:times]


def test_what_does_not_pass_ends_with_the_url_and_the_repair(server, http, waits):
    server.always["/s0.tar"] = ("status", 502)
    with pytest.raises(
        UnreadableError, match=rf"{server.url}/s0\.tar cannot be read after 4 tries \(status 502\): check"
    ):
        http.read("s0.tar", 0, 10)
    assert waits == [0.1, 0.5, 2.0]  # 5 s more would be beyond the time-out of 3 s


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (404, MissingError, "is not there .status 404.: check the URL"),
        (403, DeniedError, "may not be read .status 403.: check the URL's user, password or signature"),
        (401, DeniedError, "may not be read .status 401."),
        (418, UnreadableError, "is answered with status 418"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(server, http, waits, status, kind, said):
    server.always["/s0.tar"] = ("status", status)
    for ask in (lambda: http.read("s0.tar", 0, 1), lambda: http.facts("s0.tar"), lambda: list(http.blocks("s0.tar"))):
        with pytest.raises(kind, match=said):
            ask()
    assert waits == []


def test_a_stalled_server_ends_by_the_time_out(server):
    server.always["/s0.tar"] = ("stall",)
    storage = HttpStorage(server.url, 0.9)
    begun = time.monotonic()
    with pytest.raises(UnreadableError, match="nothing came in time"):
        storage.read("s0.tar", 0, 10)
    assert 0.25 < time.monotonic() - begun < 10
    storage.close()


def test_a_server_may_ask_to_be_left_alone_for_a_while(server, http, waits):
    server.faults["/s0.tar"] = [("status", 429, {"Retry-After": "2"})]
    http.read("s0.tar", 0, 10)
    assert waits == [2.0]


def test_a_connection_that_breaks_within_a_file_continues_where_it_broke(server, http, folder):
    server.faults["/s1.tar"] = [("short", 100_000), ("short", 50_000)]
    assert b"".join(http.blocks("s1.tar")) == (folder / "s1.tar").read_bytes()
    starts = [asked for _, _, asked in server.fetched("s1.tar")]
    assert starts[0] is None
    assert len(starts) == 3
    assert 0 < int(starts[1][6:-1]) <= 100_000 <= int(starts[2][6:-1]) <= 150_000


def test_a_file_replaced_while_it_is_read_is_noticed(server, http, folder):
    server.faults["/s1.tar"] = [("short", 100_000)]
    blocks = http.blocks("s1.tar")
    next(blocks)
    (folder / "s1.tar").write_bytes(bytes(SIZE))
    with pytest.raises(UnreadableError, match="was replaced while it was read"):
        list(blocks)


def test_a_server_without_ranges_is_detected(server, http, folder):
    server.ranges = False
    with pytest.raises(NoRangesError, match=r"without byte ranges: set data\.cache .* or data\.access"):
        http.read("s0.tar", 0, 10)
    assert b"".join(http.blocks("s0.tar")) == (folder / "s0.tar").read_bytes()


def test_sizes_where_head_is_refused_or_nothing_is_said(server, http, folder):
    server.no_head = True
    assert http.facts("s0.tar").size == SIZE
    server.no_head, server.say_length = False, False
    assert http.facts("s0.tar").size == -1
    assert b"".join(http.blocks("s0.tar")) == (folder / "s0.tar").read_bytes()


def test_secrets_are_sent_and_never_shown(server, waits):
    url = server.url.replace("http://", "http://me:top%20secret@") + "?sig=hidden"
    storage = HttpStorage(url, 3.0, waits.append)
    assert len(storage.read("s0.tar", 0, 10)) == 10
    assert server.secrets == ["Basic bWU6dG9wIHNlY3JldA=="]
    server.always["/s0.tar"] = ("status", 403)
    with pytest.raises(DeniedError) as denied:
        storage.read("s0.tar", 0, 10)
    server.always["/s0.tar"] = ("reset",)
    with pytest.raises(UnreadableError) as reset:
        storage.read("s0.tar", 0, 10)
    for text in (str(denied.value), str(reset.value), storage.name, storage.shown("s0.tar")):
        assert "secret" not in text
        assert "hidden" not in text
        assert server.url in text
    storage.close()


def test_nobody_listens(server, waits):
    storage = HttpStorage("http://127.0.0.1:9", 3.0, waits.append)
    with pytest.raises(UnreadableError, match=r"http://127\.0\.0\.1:9/a cannot be read after .* tries \(.*refused"):
        storage.read("a", 0, 1)


def test_urls_are_joined_and_shown():
    assert join_url("http://h/a/?k=1", "b/c.tar") == "http://h/a/b/c.tar?k=1"
    assert join_url("s3://bucket", "x") == "s3://bucket/x"
    assert shown_url("http://u:p@h:80/a@b?k=1") == "http://h:80/a@b"
    assert shown_url("/a/b") == "/a/b"


# The cache


def cached(server, folder, tmp_path, gib=1.0, timeout=5.0, known=None):
    origin = HttpStorage(server.url, timeout)
    return CachedStorage(origin, ShardCache(tmp_path / "cache", gib, timeout), known or known_of(folder))


def shards_in(tmp_path):
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*-s?.tar"))


def test_a_shard_is_fetched_once_for_all(server, folder, tmp_path):
    one, other = cached(server, folder, tmp_path), cached(server, folder, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for data in pool.map(lambda n: (one, other)[n % 2].read("s0.tar", n, 50), range(16)):
            assert len(data) == 50
    assert len(server.fetched("s0.tar")) == 1
    assert shards_in(tmp_path) == ["s0.tar"]


def test_the_shards_used_longest_ago_go_first(server, folder, tmp_path):
    (tmp_path / "cache").mkdir()
    theirs = [tmp_path / "cache" / name for name in ("train-0000.tar", "x.partial")]
    for path in theirs:
        path.write_bytes(bytes(3 * SIZE))
        os.utime(path, (0, 0))
    storage = cached(server, folder, tmp_path, gib=2.5 * SIZE / 2**30)
    for name in ("s0.tar", "s1.tar"):
        storage.read(name, 0, 1)
    for path in (tmp_path / "cache").glob("*-s?.tar"):  # long ago, the second one longer
        age = 1000 if path.name.endswith("s0.tar") else 2000
        os.utime(path, (time.time() - age, time.time() - 5000))
    storage.read("s2.tar", 0, 1)
    assert shards_in(tmp_path) == ["s0.tar", "s2.tar"]
    storage.read("s1.tar", 0, 1)
    assert shards_in(tmp_path) == ["s1.tar", "s2.tar"]
    for seed in range(30):
        name = f"s{random.Random(seed).randrange(4)}.tar"
        assert storage.read(name, 7, 9) == (folder / name).read_bytes()[7:16]
        assert len(shards_in(tmp_path)) <= 2
    assert all(path.stat().st_size == 3 * SIZE for path in theirs)


def test_a_shard_that_is_being_read_stays(server, folder, tmp_path):
    storage = cached(server, folder, tmp_path, gib=1.5 * SIZE / 2**30, timeout=0.3)
    storage.read("s0.tar", 0, 1)
    [path] = (tmp_path / "cache").glob("*.tar")
    with path.open("rb") as reading:
        fcntl.flock(reading, fcntl.LOCK_SH)
        with pytest.raises(DataError, match=r"has no room for .*s1\.tar: all of its .* raise data\.cache_gib"):
            storage.read("s1.tar", 0, 1)
        assert storage.read("s0.tar", 3, 3) == (folder / "s0.tar").read_bytes()[3:6]
    assert len(storage.read("s1.tar", 0, 1)) == 1
    assert shards_in(tmp_path) == ["s1.tar"]


def test_what_is_not_what_the_index_says_never_gets_into_the_cache(server, folder, tmp_path):
    known = known_of(folder)
    data = bytearray((folder / "s0.tar").read_bytes())
    data[1000] ^= 1
    (folder / "s0.tar").write_bytes(data)
    (folder / "s1.tar").write_bytes(data[:-1])
    storage = cached(server, folder, tmp_path, known=known)
    with pytest.raises(DataError, match=r"s0\.tar does not have the sha256 that the index says"):
        storage.read("s0.tar", 0, 1)
    with pytest.raises(DataError, match=r"s1\.tar has 299999 bytes, the index says 300000"):
        storage.read("s1.tar", 0, 1)
    assert shards_in(tmp_path) == []
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_file_of_unknown_size_gets_no_more_room_than_there_is(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dataloaders.storage.cache._STRETCH", SIZE // 3)
    server.say_length, limit = False, int(1.5 * SIZE)
    storage = cached(server, folder, tmp_path, gib=limit / 2**30, known={"s0.tar": Known(-1), "s1.tar": Known(-1)})
    for name in ("s0.tar", "s1.tar"):
        assert storage.read(name, SIZE - 9, 9) == (folder / name).read_bytes()[-9:]
        assert shards_in(tmp_path) == [name]
    [path] = (tmp_path / "cache").glob("*.tar")
    assert path.stat().st_size == SIZE
    small = cached(server, folder, tmp_path, gib=0.5 * SIZE / 2**30, known={"s2.tar": Known(-1)})
    with pytest.raises(DataError, match=r"s2\.tar has .* GiB, the cache no more than data\.cache_gib"):
        small.read("s2.tar", 0, 9)


def test_a_cached_shard_cut_behind_our_back_is_fetched_again(server, folder, tmp_path):
    storage = cached(server, folder, tmp_path)
    storage.read("s0.tar", 0, 1)
    [path] = (tmp_path / "cache").glob("*.tar")
    os.truncate(path, 1000)
    assert storage.read("s0.tar", 5000, 10) == (folder / "s0.tar").read_bytes()[5000:5010]
    assert path.stat().st_size == SIZE


def test_a_cache_that_cannot_be(server, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be written .*set data\.cache"):
        ShardCache(tmp_path / "file" / "cache", 1, 1)
    storage = cached(server, folder, tmp_path, gib=0.5 * SIZE / 2**30)
    with pytest.raises(DataError, match=r"s0\.tar has .* GiB, the cache no more than data\.cache_gib"):
        storage.read("s0.tar", 0, 1)


def test_a_full_disk_is_said(server, folder, tmp_path, monkeypatch):
    storage = cached(server, folder, tmp_path)

    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"the disk of cache folder .* is full: free it, set data\.cache to another"):
        storage.read("s0.tar", 0, 1)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_shards_expected_are_fetched_ahead(server, folder, tmp_path):
    for storage in (
        cached(server, folder, tmp_path),
        SequentialStorage(HttpStorage(server.url, 3), known_of(folder), 1),
    ):
        storage.expect(["s2.tar", "s0.tar"])
        ahead = storage._ahead._thread
        if ahead is not None:
            ahead.join(10)
        before = len(server.log)
        assert storage.read("s2.tar", 1, 5) + storage.read("s0.tar", 1, 5)
        assert len(server.log) == before
        storage.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "shards ahead"]


def test_memory_holds_no_more_than_it_may(server, folder):
    storage = SequentialStorage(HttpStorage(server.url, 3), known_of(folder), 2.5 * SIZE / 2**30)
    for number in (0, 1, 2, 0, 3):
        name = f"s{number}.tar"
        assert storage.read(name, 9, 9) == (folder / name).read_bytes()[9:18]
        assert sum(map(len, storage._held.values())) <= 2 * SIZE
    assert all(asked is None for _, _, asked in server.fetched("s0.tar"))
    small = SequentialStorage(HttpStorage(server.url, 3), known_of(folder), 0.5 * SIZE / 2**30)
    with pytest.raises(DataError, match=r"memory is to hold no more than data\.cache_gib"):
        small.read("s0.tar", 0, 1)


def read_much(url, cache, origin, seed, ready):
    """In a process of its own: read shards through a cache that holds two of the four."""
    known = {f"s{number}.tar": Known(SIZE) for number in range(4)}
    storage = CachedStorage(HttpStorage(url, 20), ShardCache(cache, 2.5 * SIZE / 2**30, 20), known)
    numbers = random.Random(seed)
    ready.touch()
    for _ in range(40):
        name, offset = f"s{numbers.randrange(4)}.tar", numbers.randrange(SIZE - 50)
        assert storage.read(name, offset, 50) == (origin / name).read_bytes()[offset : offset + 50]


def reader(server, folder, tmp_path, seed):
    ready = tmp_path / f"ready{seed}"
    with lean_start():
        words = (server.url, tmp_path / "cache", folder, seed, ready)
        process = helper_context().Process(target=read_much, args=words)
        process.start()
    return process, ready


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_several_processes_share_a_cache_too_small_for_them(server, folder, tmp_path):
    """Shards come and go under each other's hands, and one process is killed in between."""
    readers = [reader(server, folder, tmp_path, seed)[0] for seed in range(2)]
    victim, ready = reader(server, folder, tmp_path, 9)
    wait_until(ready.exists)
    victim.kill()
    for process in (*readers, victim):
        process.join(60)
    assert [process.exitcode for process in readers] == [0, 0]
    assert len(shards_in(tmp_path)) <= 2


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(server, folder, tmp_path):
    for number in range(4):
        server.faults[f"/s{number}.tar"] = [("stall",)]
    victim, _ = reader(server, folder, tmp_path, 1)
    cache = tmp_path / "cache"
    wait_until(lambda: list(cache.glob("*.partial")))
    victim.kill()
    victim.join(60)
    assert len(list(cache.glob("*.partial"))) == 1
    ShardCache(cache, 1, 1)
    assert not list(cache.glob("*.partial"))
    server.faults.clear()
    storage = cached(server, folder, tmp_path)
    assert all(len(storage.read(f"s{number}.tar", 0, 5)) == 5 for number in range(4))


def test_locks_exclude_and_time_out_unless_something_moves(tmp_path):
    path, moved = tmp_path / "lock", iter(range(5))
    with locked(path, 0) as one:
        assert one
        with locked(path, 0) as other:
            assert not other
        with locked(path, 0.02, lambda: next(moved, None)) as later:
            assert not later
        assert next(moved, None) is None
    with locked(path, 0) as again:
        assert again
