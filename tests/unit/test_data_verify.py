"""`verify` names every damaged thing, and nothing else; the same with processes."""

import io
import json
import multiprocessing
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from dataloaders.beton.reader import index_beton
from dataloaders.packing.convert import convert
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.text import TextOptions, pack_text
from dataloaders.packing.verify import unreadable, verify, verify_split
from dataloaders.sources.index import COLUMNS, read_index, write_index
from launch.data import commands as data_commands
from setformer_dist.core.errors import ConfigError, DataError, TransientError
from tests.unit.serving import served


def jpeg(number):
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=80)
    return out.getvalue()


@pytest.fixture
def packed(tmp_path):
    for i in range(12):
        folder = tmp_path / "s" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=4))
    return tmp_path / "out"


def flip(path, place, bits=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def found(result):
    return [(damage.shard, damage.key[:9], damage.kind) for damage in result.damaged]


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_data_is_whole_and_counted(packed, workers):
    done, totals = [], []
    result = verify(packed, workers, on_start=totals.append, on_progress=done.append)
    assert result.damaged == []
    assert (result.shards, result.samples, result.decoded) == (3, 12, True)
    assert totals == [12]
    assert sum(done) == 12


def test_data_behind_a_url_are_compared_as_those_here(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    convert(packed, tmp_path / "a.beton")
    with served(tmp_path) as server:
        assert verify(f"{server.url}/a.beton").damaged == []
        [copy] = (tmp_path / "xdg" / "setformer" / "shards").glob("*-a.beton")
        assert copy.read_bytes() == (tmp_path / "a.beton").read_bytes()
        assert verify(f"{server.url}/out").shards == 3
        flip(packed / "shard-000000.tar", 3)  # a header: no sample is touched
        assert found(verify(f"{server.url}/out", decode=False)) == [("shard-000000.tar", "", "shard")]
        with pytest.raises(ConfigError, match=r"the index of .*/a\.beton is next to it: make it on a copy"):
            data_commands.index(f"{server.url}/a.beton?key=secret", None, True, 0, print, print)


def test_every_damaged_thing_is_named_once(packed):
    index = read_index(packed)
    flip(packed / "shard-000000.tar", 3)  # a header: no sample is touched
    flip(packed / "shard-000001.tar", int(index.columns["offset"][5]) + 40)  # sample 5
    short = packed / "shard-000002.tar"
    short.write_bytes(short.read_bytes()[: int(index.columns["offset"][11]) + 10])  # sample 11, and the end
    expected = [
        ("shard-000000.tar", "", "shard"),
        ("shard-000001.tar", "", "shard"),
        ("shard-000001.tar", "000000005", "checksum"),
        ("shard-000002.tar", "", "shard"),
        ("shard-000002.tar", "000000011", "read"),
    ]
    result = verify(packed)
    assert found(result) == expected
    assert found(verify(packed, workers=2)) == expected
    assert [kind for *_, kind in found(verify(packed, decode=False))] == ["shard"] * 3
    with pytest.raises(DataError, match=r"3 of 3 shards .* restore shard-000000.tar, shard-000001.tar, shard-000002"):
        verify_split(packed)


def test_a_missing_shard_is_named_and_the_rest_looked_at(packed):
    (packed / "shard-000000.tar").unlink()
    flip(packed / "shard-000002.tar", int(read_index(packed).columns["offset"][9]) + 40)
    result = verify(packed)
    assert found(result)[0] == ("shard-000000.tar", "", "shard")
    assert [kind for *_, kind in found(result)] == ["shard", *["read"] * 4, "shard", "checksum"]


def test_bytes_that_are_as_packed_but_no_image_or_another_size(packed, tmp_path):
    """An index made over images that nobody decoded: checksums agree, decoding does not."""
    index = read_index(packed)
    columns = {name: index.columns[name].copy() for name in COLUMNS}
    columns["size"][2] -= 30  # cut off
    columns["width"][3] += 1
    shards = tuple(index.shards)
    with (packed / shards[0].name).open("rb") as file:
        file.seek(int(columns["offset"][2]))
        columns["crc32"][2] = zlib.crc32(file.read(int(columns["size"][2])))
    write_index(packed, index.classes, shards, columns, [index.key(i) for i in range(12)], {})
    result = verify(packed)
    assert [(key, kind) for _, key, kind in found(result)] == [("000000002", "decode"), ("000000003", "size")]
    assert "33x24" in result.damaged[1].detail


def test_beton_and_class_folders_are_read_too(packed, tmp_path):
    convert(packed, tmp_path / "x.beton")
    assert verify(tmp_path / "x.beton").damaged == []
    data = bytearray((tmp_path / "x.beton").read_bytes())
    place = data.find((tmp_path / "s" / "a" / "06.jpg").read_bytes()) + 100
    flip(tmp_path / "x.beton", place)
    assert [kind for *_, kind in found(verify(tmp_path / "x.beton"))] == ["checksum"]
    assert [kind for *_, kind in found(verify(tmp_path / "x.beton", decode=False))] == ["checksum"]


def test_data_without_digests_are_not_called_whole_unread(packed, tmp_path):
    convert(packed, tmp_path / "x.beton")
    (tmp_path / "x.beton.index.safetensors").unlink()
    for name in ("index.json", "index.safetensors"):
        (packed / name).unlink()
    for path in (tmp_path / "s", tmp_path / "x.beton", f"{packed}/shard-*.tar"):
        with pytest.raises(ConfigError, match=r"neither checksums nor digests.* leave out --no-decode"):
            verify(path, decode=False)
        assert verify(path).damaged == []
    index_beton(tmp_path / "x.beton")
    assert verify(tmp_path / "x.beton", decode=False).damaged == []


def test_a_killed_helper_is_one_sentence(tmp_path):
    (tmp_path / "s" / "a").mkdir(parents=True)
    for i in range(80):  # a job each: most of them wait when the first is done
        (tmp_path / "s" / "a" / f"{i:02d}.jpg").write_bytes(jpeg(i))
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=1))
    packed = tmp_path / "out"

    def kill(done):
        for helper in multiprocessing.active_children():
            helper.kill()

    with pytest.raises(TransientError, match=r"a process that verified .* died"):
        verify(packed, workers=2, on_progress=kill)
    assert multiprocessing.active_children() == []


def test_texts_are_compared_with_their_digests(tmp_path):
    (tmp_path / "t.tsv").write_text("good\t1\nbad\t0\n")
    pack_text(tmp_path / "t.tsv", tmp_path / "texts", TextOptions())
    assert verify(tmp_path / "texts").damaged == []
    flip(tmp_path / "texts" / "part-00000.safetensors", 90)
    assert [damage.kind for damage in verify(tmp_path / "texts").damaged] == ["shard"]


def test_a_damaged_index_is_damage_and_no_data_a_mistake(packed, tmp_path):
    table = json.loads((packed / "index.json").read_text())
    table["samples"] = 11
    (packed / "index.json").write_text(json.dumps(table))
    with pytest.raises(DataError) as caught:
        verify(packed)
    assert unreadable(packed, caught.value).damaged[0].kind == "shard"
    with pytest.raises(DataError) as caught:
        verify(tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        unreadable(tmp_path / "nowhere", caught.value)


def test_shards_of_others_that_are_damaged_are_damage(packed, tmp_path):
    for name in ("index.json", "index.safetensors"):
        (packed / name).unlink()
    assert verify(packed).damaged == []
    shutil.rmtree(packed / ".setformer-index")
    flip(packed / "shard-000001.tar", 100)  # a header
    for path in (packed, f"{packed}/shard-*.tar"):
        with pytest.raises(DataError) as caught:
            verify(path)
        assert "shard-000001.tar" in unreadable(path, caught.value).damaged[0].detail
