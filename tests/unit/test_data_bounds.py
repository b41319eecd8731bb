"""Never hang, never balloon, never believe a cache beyond what can be checked: each limit of docs/data.md is held."""

import hashlib
import io
import json
import os
import resource
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.pack import pack_image_folder
from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.source import DamagedSampleError
from dataloaders.sources import files
from dataloaders.sources.arrays import map_arrays, write_arrays
from dataloaders.sources.files import MOST_VALUES, OddFileError, open_regular, parse_json, read_whole, walk
from dataloaders.sources.foreign import index_shards
from dataloaders.sources.index import ARRAYS_NAME, INDEX_NAME, fingerprint_of
from dataloaders.storage.base import read_small
from dataloaders.storage.homes import make_private, trusted, why_not_private
from setformer_dist.core.errors import DataError
from tests.unit.serving import served
from tests.unit.test_data_foreign import picture, sample, write_tar

# What one accepted input may take above what is there already: the largest line of the budget table, and a margin.
ROOM = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def bounded():
    """Let the process have `ROOM` bytes of address space more than it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def opened(path, **changes):
    return open_source(str(path), "", DataConfig(**{"root": str(path), "read_timeout": 5.0, **changes}))


def images(root):
    for number in range(4):
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def test_only_regular_files_are_opened_and_nobody_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "plain").write_bytes(b"123")
    (tmp_path / "link").symlink_to("plain")
    for name, what in (("pipe", "a pipe"), ("zero", "a device"), (".", "a folder")):
        with pytest.raises(OddFileError, match=what):
            open_regular(tmp_path / name)
    assert read_whole(tmp_path / "link", 3) == b"123"
    with pytest.raises(OddFileError, match="more than the 2"):
        read_whole(tmp_path / "plain", 2)
    with pytest.raises(OSError, match="symbolic links"):
        read_whole(tmp_path / "link", 3, follow=False)


@pytest.mark.parametrize("name", ["a.tar", "classes.txt", "index.json", "data.beton"])
def test_pipes_in_the_place_of_data_are_a_sentence(tmp_path, name):
    write_tar(tmp_path / "b.tar", sample(0))
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"no regular file but a pipe"):
        opened(tmp_path / name if name.endswith("beton") else tmp_path)


def test_links_that_lead_back_and_webs_of_links_end(tmp_path):
    root = images(tmp_path / "in")
    for name in "ab":
        (root / name / "up").symlink_to("..")
    for use in (opened, lambda path: pack_image_folder(path, tmp_path / "packed")):
        with pytest.raises(DataError, match="link to a folder that it lies in"):
            use(root)
    web = tmp_path / "web"
    for depth in range(12):  # 2 ** 12 ways to the last
        (web / str(depth)).mkdir(parents=True)
        for way in "xy":
            (web / str(depth) / way).symlink_to(f"../{depth + 1}")
    (web / "12").mkdir()
    with pytest.raises(DataError, match="by links"):
        list(walk(str(web)))


def test_a_link_to_another_folder_of_images_is_followed(tmp_path):
    root = images(tmp_path / "in")
    (root / "c").symlink_to("a")
    assert opened(root).classes == ("a", "b", "c")


def test_json_is_counted_before_it_is_built(bounded):
    with pytest.raises(ValueError, match="values"):
        parse_json(b"[" + b"[]," * MOST_VALUES + b"1]")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(b"[" * 100_000)
    assert len(parse_json(b"[" + b"{}," * (MOST_VALUES // 2 - 2) + b"1]")) > MOST_VALUES // 3


def png_of(width, height, kind, bits=8):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "kind", "bits"), [(13000, 6, 8), (13000, 0, 16), (13000, 2, 8), (60000, 0, 1)])
def test_images_that_would_not_fit_are_refused_by_their_headers(side, kind, bits, bounded):
    with pytest.raises(UndecodableError, match=r"it claims|has more than 178,956,970 pixels"):
        decode(png_of(side, side, kind, bits))


def test_a_large_image_within_the_limit_takes_no_more_than_its_budget(bounded):
    out = io.BytesIO()
    Image.new("RGBA", (8000, 8000), (1, 2, 3, 4)).save(out, "PNG", compress_level=1)
    pixels = decode(out.getvalue())
    assert pixels.shape == (8000, 8000, 3)
    assert pixels[[0, -1], [0, -1]].tolist() == [[1, 2, 3], [1, 2, 3]]


def test_files_of_enormous_length_are_damage_and_not_read(tmp_path, bounded):
    root = images(tmp_path / "in")
    for name in ("0.jpg", "2.jpg"):
        os.truncate(root / "a" / name, 1 << 40)
    (root / "a" / "2.jpg").write_bytes(b"junk")
    os.truncate(root / "a" / "2.jpg", 1 << 40)
    found = opened(root)
    for number in (0, 1):
        with pytest.raises(DamagedSampleError, match="more than any image"):
            found.read(number)
    assert len(found.read(2).image) > 0


def test_long_keys_large_headers_and_large_labels_are_bounded(tmp_path, bounded):
    long = "x" * 900_000
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [
            (f"{long}.jpg", picture(0)),
            (f"{long}.cls", b"0"),
            *(f for i in range(900) for f in sample(i)),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = opened(tmp_path)
    assert found.num_samples == 901
    assert found.index.keys.shape[1] <= 512
    (tmp_path / "b").mkdir()
    write_tar(
        tmp_path / "b" / "b.tar",
        [("0.jpg", picture(0)), ("0.json", b'{"label": 1, "a": [' + b"[]," * (2 << 20) + b"1]}")],
    )
    with pytest.raises(DataError, match=r"has \d+ bytes, more than the 4194304 that are read"):
        opened(tmp_path / "b")


def forged(index, edit=lambda table: None, arrays=lambda columns: None):
    table = json.loads((index / "files.json").read_text())
    columns = {name: array.copy() for name, array in map_arrays(index / "files.safetensors").items()}
    arrays(columns)
    table["sha256"] = write_arrays(index / "files.safetensors", columns)
    edit(table)
    table["fingerprint"] = fingerprint_of(table)
    (index / "files.json").write_text(json.dumps(table))


def swap_labels(columns):
    columns["label"][:] = 1 - columns["label"]


def lead_out(columns):
    names = [b"../secret.jpg", *(b"b/1.jpg",) * 3]
    columns["names"] = np.frombuffer(b"".join(names), np.uint8)
    columns["end"] = np.cumsum([len(name) for name in names])


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": swap_labels},
        {"arrays": lead_out},
        {"arrays": lambda columns: columns.update(size=columns["size"][:1])},
        {"arrays": lambda columns: columns.pop("label") is None or None},
        {"edit": lambda table: table.pop("classes")},
        {"edit": lambda table: table.update(classes=["b", "a"])},
    ],
)
def test_a_forged_index_of_an_image_folder_changes_nothing(tmp_path, change):
    root = images(tmp_path / "in")
    first = opened(root)
    forged(next((tmp_path / "xdg").rglob("files.json")).parent, **change)
    second = opened(root)
    numbers = np.arange(4)
    assert second.labels(numbers).tolist() == first.labels(numbers).tolist() == [0, 0, 1, 1]
    assert [second.key(i) for i in range(4)] == ["a/0.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg"]
    assert second.fingerprint == first.fingerprint


def test_cache_folders_of_others_or_open_to_others_are_not_believed(tmp_path):
    ours = tmp_path / "cache" / "indexes"
    make_private(ours)
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.chmod(0o777)
    assert why_not_private(ours) == ""
    assert not ours.stat().st_mode & 0o022  # closed to them
    (tmp_path / "link").symlink_to(ours)
    assert "link" in why_not_private(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(ours, 12345, 12345)
        assert "another user" in why_not_private(ours)
        assert not trusted(ours / "0123")
        with pytest.raises(DataError, match="belongs to another user"):
            make_private(ours)


def test_an_index_next_to_shards_that_is_a_link_is_neither_read_nor_cleared(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    write_tar(root / "0.tar", sample(0))
    precious = tmp_path / "precious"
    (precious / ("0" * 32)).mkdir(parents=True)
    (root / ".setformer-index").symlink_to(precious)
    assert opened(root).num_samples == 1
    assert [path.name for path in precious.iterdir()] == ["0" * 32]


def packed(tmp_path):
    pack_image_folder(images(tmp_path / "in"), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda table: table["arrays"].update(name="../index.safetensors"), "no plain name"),
        (lambda table: table["shards"][0].update(name="../shard-000000.tar"), "no plain name"),
        (lambda table: table.update(shards="x"), "no list of shards"),
        (lambda table: table["shards"][0].update(evil=1), "no list of shards"),
        (lambda table: table.update(extent=5), "an extent"),
        (lambda table: table.update(samples="4"), "no number of samples"),
        (lambda table: table.pop("options"), "no options"),
        (lambda table: table.update(classes=[1, 2]), "no list of class names"),
    ],
)
def test_an_index_says_what_a_packing_writes_or_is_refused(tmp_path, edit, what):
    folder = packed(tmp_path)
    table = json.loads((folder / INDEX_NAME).read_text())
    edit(table)
    table["fingerprint"] = fingerprint_of(table)
    (folder / INDEX_NAME).write_text(json.dumps(table))
    with pytest.raises(DataError, match=what):
        opened(folder)


def test_a_forged_copy_of_the_index_of_a_url_is_fetched_again(tmp_path):
    folder = packed(tmp_path)
    with served(folder.parent) as server:
        config = DataConfig(root=server.url, cache=str(tmp_path / "cache"), read_timeout=5.0)
        first = open_source(server.url, "packed", config)
        copy = next((tmp_path / "cache" / "indexes").rglob(INDEX_NAME)).parent
        table = json.loads((copy / INDEX_NAME).read_text())
        columns = {name: array.copy() for name, array in map_arrays(copy / ARRAYS_NAME).items()}
        columns["label"][:] = 1 - columns["label"]
        table["arrays"]["sha256"] = write_arrays(copy / ARRAYS_NAME, columns)
        table["identity"] = first.fingerprint
        table["fingerprint"] = fingerprint_of(table)
        (copy / INDEX_NAME).write_text(json.dumps(table))
        second = open_source(server.url, "packed", config)
        assert second.labels(np.arange(4)).tolist() == [0, 0, 1, 1]
        # A cached shard is compared with its sha256, whatever its samples' checksums say.
        second.read(0)
        second.close()
        shard = next(path for path in (tmp_path / "cache" / "shards").iterdir() if path.name.endswith(".tar"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        third = open_source(server.url, "packed", config)
        third.read(0)
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == third.index.shards[0].sha256
        # Neither a shard nor one in the making is written through a link.
        victim = tmp_path / "victim"
        victim.write_bytes(b"precious")
        shard.unlink()
        shard.symlink_to(victim)
        shard.with_name(shard.name + ".partial").symlink_to(victim)
        fourth = open_source(server.url, "packed", config)
        fourth.read(0)
        assert victim.read_bytes() == b"precious"
        assert not shard.is_symlink()


class Endless:
    """A storage whose file never ends."""

    def __init__(self, block, pause=lambda: None):
        self.block, self.pause = block, pause

    def shown(self, name):
        return name

    def blocks(self, name):
        while True:
            self.pause()
            yield self.block


def test_files_that_never_end_or_drip_do_end(monkeypatch):
    with pytest.raises(DataError, match="more than the 1000 bytes"):
        read_small(Endless(b" " * 100), "index.json", 1000, 5.0)
    now = [0.0]
    monkeypatch.setattr("dataloaders.storage.base.time.monotonic", lambda: now[0])

    def pause():
        now[0] += 0.5

    with pytest.raises(DataError, match="arrives too slowly"):
        read_small(Endless(b" ", pause), "index.json", 1000, 5.0)


def test_a_packed_index_survives_its_own_rules(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    write_tar(root / "0.tar", sample(0))
    index_shards(str(root), "*.tar", cache=tmp_path / "cache", checksums=True)
    shutil.copytree(root, tmp_path / "copy")
    assert opened(tmp_path / "copy").fingerprint == opened(root).fingerprint
    assert files.is_plain_name("a b")
    assert not any(map(files.is_plain_name, ("", ".", "..", "a/b", "/a", 3, "a\0")))
