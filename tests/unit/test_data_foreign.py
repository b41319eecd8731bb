"""Shards that others made: every sample or an error with its place; the index appears once and whole."""

import io
import json
import logging
import os
import random
import shutil
import tarfile
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import braceexpand
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataloaders.sources.foreign
from dataloaders.helpers import helper_context, lean_start
from dataloaders.source import DamagedSampleError
from dataloaders.sources.foreign import _count, find_shards, index_shards, open_foreign
from dataloaders.sources.index import ARRAYS_NAME, INDEX_NAME, write_index
from dataloaders.sources.shards import check_same_classes
from dataloaders.sources.tar_headers import FileReader, StreamReader, members
from dataloaders.storage.homes import INDEX_FOLDER, user_cache
from setformer_dist.core.errors import DataError
from tests.unit.serving import served

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number, kind="JPEG"):
    """Bytes of a picture whose height and width say its number."""
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10 + number % 7, 9 + number % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_tar(path, files, form="ustar"):
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number, label=None):
    return [
        (f"{number:04d}.jpg", picture(number)),
        (f"{number:04d}.cls", str(number % 3 if label is None else label).encode()),
    ]


def shards(root, count=3, each=5):
    root.mkdir(exist_ok=True)
    for number in range(count):
        files = [file for i in range(number * each, (number + 1) * each) for file in sample(i)]
        write_tar(root / f"train-{number:02d}.tar", files, list(FORMATS)[number % 3])
    return root


def opened(root, pattern="*.tar", cache=None):
    found = find_shards(str(root), pattern, 5)
    return open_foreign(found, cache or Path(root).parent / "cache", 5)


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def folder(tmp_path):
    return shards(tmp_path / "shards")


# Headers


def by_stream(path):
    data = path.read_bytes()
    return StreamReader(data[start : start + 1000] for start in range(0, len(data), 1000))


def listed(path):
    with path.open("rb") as file:
        found = [(one.name, one.offset, one.size) for one in members(FileReader(file.fileno()), "it")]
    assert [(one.name, one.offset, one.size) for one in members(by_stream(path), "it")] == found
    return found


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]


NAMES = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_characters="/\x7f"), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=6), st.integers(0, 3000)), min_size=1, max_size=6),
    st.sampled_from(["gnu", "pax"]),
)
def test_headers_are_read_as_tarfile_reads_them(files, form):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_tar(path, [("/".join(parts), bytes(size)) for parts, size in files], form)
        assert listed(path) == by_tarfile(path)


def test_links_folders_and_old_tars_are_read_as_tarfile_reads_them(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, link in (
            ("d", tarfile.DIRTYPE, ""),
            ("d/a.jpg", tarfile.REGTYPE, ""),
            ("d/b.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/c.jpg", tarfile.SYMTYPE, "x" * 150),
            ("d/" + "n" * 140, tarfile.AREGTYPE, ""),
            ("d/pipe", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = 700 if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    found = {name: place for name, *place in listed(path)}
    assert found.pop("d/b.jpg") == found["d/a.jpg"]  # a hard link: tarfile has no bytes for it
    assert [(name, *place) for name, place in found.items()] == by_tarfile(path)
    assert len(found) == 2


def test_numbers_beyond_octal_and_sizes_in_pax_records(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size, info.mtime = 700, 1e12
    for name, data in (("gnu", info.tobuf(tarfile.GNU_FORMAT)), ("pax", info.tobuf(tarfile.PAX_FORMAT))):
        (tmp_path / name).write_bytes(data + bytes(1024) + bytes(1024))
        assert [one[2] for one in listed(tmp_path / name)] == [700]
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (1300).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    (tmp_path / "large").write_bytes(bytes(header) + bytes(1536) + bytes(1024))
    assert listed(tmp_path / "large") == by_tarfile(tmp_path / "large") == [("a.jpg", 512, 1300)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damage", ["flip", "zero", "cut", "noise"])
def test_no_damage_to_any_header_loses_a_sample_in_silence(tmp_path, form, damage):
    path = tmp_path / "a.tar"
    files = [
        (f"{'k' * (120 if form != 'ustar' else 5)}{i}.{ext}", data)
        for i in range(4)
        for ext, data in (("jpg", picture(i)), ("cls", b"1"))
    ]
    write_tar(path, files, form)
    whole, original, numbers = listed(path), path.read_bytes(), random.Random(2)
    end = -(-(whole[-1][1] + whole[-1][2]) // 512)
    places = sorted({(at - 512) // 512 for _, at, _ in whole} | {0, 1, 2})
    for block in range(end + 1) if damage == "cut" else places:
        data = bytearray(original)
        at = block * 512
        if damage == "flip":
            data[at + numbers.randrange(512)] ^= 1 << numbers.randrange(8)
        elif damage == "zero":
            data[at : at + 512] = bytes(512)
        elif damage == "noise":
            data[at : at + 512] = numbers.randbytes(512)
        else:
            data = data[: at + numbers.choice((0, 100))]
        path.write_bytes(data)
        found = outcome(path)
        if isinstance(found, str):
            assert "it" in found
            assert "restore" in found
        else:  # only a block that is contents, not header, may be damaged without an error here
            assert [one[1:] for one in found] == [one[1:] for one in whole]
            assert damage != "cut"
            assert block in (1, 2)


def outcome(path):
    try:
        return listed(path)
    except DataError as error:
        return str(error)


# Samples


@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_those_that_webdataset_finds(tmp_path, form):
    root = tmp_path / "shards"
    root.mkdir()
    files = [file for i in range(12) for file in sample(i)]
    files.insert(4, ("__meta__", b"{}"))
    files += [("sub/x1.JPG", picture(40)), ("sub/x1.cls", b"2"), ("sub/x1.txt", b"a caption")]
    write_tar(root / "a.tar", files, form)
    source = opened(root)
    theirs = list(webdataset.WebDataset(str(root / "a.tar"), shardshuffle=False))
    assert [source.key(i) for i in range(source.num_samples)] == [one["__key__"] for one in theirs]
    for number, one in enumerate(theirs):
        assert source.read(number).image == one["jpg"]
        assert source.labels(np.array([number])).tolist() == [int(one["cls"])]
        assert source.size(number) == Image.open(io.BytesIO(one["jpg"])).size[::-1]
    assert source.classes == ("0", "1", "2")
    assert source.parts == frozenset()


def test_members_of_a_sample_may_be_anywhere_in_the_shard(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    files = [file for i in range(9) for file in sample(i)]
    random.Random(1).shuffle(files)
    write_tar(root / "a.tar", files)
    source = opened(root)
    assert source.num_samples == 9
    for number in range(9):
        name = int(source.key(number))
        assert source.read(number).image == picture(name)
        assert source.labels(np.array([number])).tolist() == [name % 3]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([b'{"label": 2, "x": 1}', b'{"label": 0}'], ("0", "1", "2"), [2, 0]),
        ([b'{"class": "dog"}', b'{"label": "cat"}'], ("cat", "dog"), [1, 0]),
        ([b"7", b'{"cls": 1}'], tuple("01234567"), [7, 1]),
    ],
)
def test_labels_of_json(tmp_path, labels, classes, numbers):
    root = tmp_path / "shards"
    root.mkdir()
    files = [file for i, text in enumerate(labels) for file in ((f"{i}.png", picture(i, "PNG")), (f"{i}.json", text))]
    write_tar(root / "a.tar", files)
    source = opened(root)
    assert source.classes == classes
    assert source.labels(np.array([0, -1, 1])).tolist() == [numbers[0], 0, numbers[1]]


def test_class_names_next_to_the_shards(folder):
    (folder / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    assert opened(folder).classes == ("ant", "bee", "cow", "dog")
    (folder / "classes.txt").unlink()
    (folder / "classes.json").write_text('["ant", "bee"]')
    shutil.rmtree(folder / INDEX_FOLDER)
    with pytest.raises(
        DataError, match=r"sample '0002' of train-00\.tar in .* has label 2, but the class file names 2"
    ):
        opened(folder)


def test_masks_and_boxes(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    boxes = [{"boxes": [[0, 1, 5, 6.5]], "labels": [3]}, {"boxes": [], "labels": []}]
    files = []
    for i in range(3):
        files += [(f"{i}.jpg", picture(i)), (f"{i}.mask.png", picture(i, "PNG"))]
        files += [(f"{i}.boxes.json", json.dumps(boxes[i]).encode())] if i < 2 else []
    write_tar(root / "a.tar", files)
    with pytest.raises(DataError, match=r"have masks or boxes, but their classes are unknown: put a classes\.txt"):
        opened(root)
    (root / "classes.txt").write_text("road\nsky\ntree\ncar\n")
    for checksums in (False, True):
        index_shards(str(root), "*.tar", cache=tmp_path / "cache", checksums=checksums)
        source = opened(root)
        assert ("mask_crc32" in source.index.columns) == checksums
        assert source.parts == {"mask", "boxes"}
        one, two, three = (source.read(i) for i in range(3))
        assert one.mask == picture(0, "PNG")
        assert one.boxes.corners.tolist() == [[0, 1, 5, 6.5]]
        assert one.boxes.labels.tolist() == [3]
        assert two.boxes.corners.shape == three.boxes.corners.shape == (0, 4)


def test_an_image_without_a_readable_header_keeps_its_place(tmp_path, caplog):
    root = tmp_path / "shards"
    root.mkdir()
    files = [file for i in range(4) for file in sample(i)]
    files[2] = ("0001.jpg", b"<html>not found</html>")
    write_tar(root / "a.tar", files)
    with caplog.at_level(logging.WARNING):
        source = opened(root)
    assert "1 images" in caplog.text
    assert source.num_samples == 4
    assert source.read(1).image == files[2][1]
    assert source.size(1) == source.size(0)


def test_height_and_width_behind_a_long_profile(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    out = io.BytesIO()
    Image.new("RGB", (33, 21)).save(out, "JPEG", icc_profile=bytes(150_000))
    write_tar(root / "a.tar", [("0.jpg", out.getvalue()), ("0.cls", b"0")])
    assert opened(root).size(0) == (21, 33)


BAD = {
    "twice": ([*sample(1), *sample(2), *sample(1)], r"holds '0001\.jpg' twice"),
    "dots": ([("a.b.jpg", picture(1)), ("a.b.cls", b"1")], r"'a\.b\.jpg', a key with a dot: .*first dot"),
    "no image": ([*sample(1), ("0002.cls", b"1")], r"no image .* for sample '0002', only cls"),
    "no sample": ([("README", b"x")], r"holds no sample"),
    "no label": ([("1.jpg", picture(1))], r"no labels \(<key>\.cls.* sample '1' of a\.tar"),
    "some labels": (
        [*sample(1), ("0002.jpg", picture(2))],
        r"is mixed: its sample '0001' has a number .* '0002' no label",
    ),
    "two kinds": ([*sample(1), *sample(2, "dog")], r"is mixed: .*a name for a label"),
    "negative": (sample(1, -1), r"sample '0001' has label -1, which is no class"),
    "huge": (sample(1, 10**12), r"has label 1000000000000, which is no class"),
    "no number": ([*sample(1, "")[:1], ("0001.cls", b"")], r"label file '0001\.cls' says '', which is neither"),
    "float": ([("1.jpg", picture(1)), ("1.json", b'{"label": 1.5}')], r"says '1\.5', which is neither"),
    "not json": ([("1.jpg", picture(1)), ("1.json", b"{")], r"'1\.json' is not readable as json"),
    "deep json": ([("1.jpg", picture(1)), ("1.json", b"[" * 200_000)], r"'1\.json' is not readable as json"),
    "list": ([("1.jpg", picture(1)), ("1.json", b'{"label": [[1]]}')], r"says '\[\[1\]\]', which is neither"),
    "label twice": (
        [("1.jpg", picture(1)), ("1.json", b'{"label": 1, "label": 2}')],
        r"'1\.json' is not readable as json",
    ),
    "two fields": ([("1.jpg", picture(1)), ("1.json", b'{"label": 1, "cls": 2}')], r"says label 1 and cls 2: keep one"),
    "two files": (
        [("1.jpg", picture(1)), ("1.cls", b"1"), ("1.json", b'{"label": 2}')],
        r"sample '1': its labels contradict each other: cls 1 and json 2",
    ),
    "no picture": ([("1.jpg", b"x"), ("1.cls", b"1")], r"none has a readable image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_ambiguous_is_refused_by_name(tmp_path, kind):
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "a.tar", BAD[kind][0])
    with pytest.raises(DataError, match=BAD[kind][1]) as refused:
        opened(root)
    assert "a.tar" in str(refused.value)
    assert not list((root / INDEX_FOLDER).glob("[!.]*"))


def test_a_number_and_a_name_are_no_contradiction(tmp_path):
    more = b'{"label": "dog", "class": [1]}'
    write_tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.cls", b"0"), ("1.json", more)])
    assert opened(tmp_path).classes == ("0",)


def test_labels_that_count_from_1_are_told(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [*sample(1, 1), *sample(2, 2)])
    assert opened(tmp_path).classes == ("0", "1", "2")
    assert "count from 1, so that there are classes 0 to 0 without a sample" in caplog.text
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="the labels count from 1, and must count from 0"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused_by_its_kind(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        (tmp_path / "noise").write_bytes(random.Random(1).randbytes(5000))
        tar.add(tmp_path / "noise")
    with pytest.raises(DataError, match=r"a\.tar is compressed by (gzip|bzip2|xz), .*: unpack it"):
        opened(tmp_path)


def test_an_empty_shard(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"a\.tar ends before byte 512, without the mark of a tar's end"):
        opened(tmp_path)


def test_shards_with_and_without_labels(folder):
    write_tar(folder / "train-07.tar", [("x.jpg", picture(1))])
    with pytest.raises(DataError, match=r"are mixed: train-00\.tar has a number .* train-07\.tar no label"):
        opened(folder)


# Patterns


def test_patterns(folder):
    def names(pattern):
        return find_shards(str(folder), pattern, 5).names

    every = ("train-00.tar", "train-01.tar", "train-02.tar")
    assert names("train-{00..02}.tar") == names("*.tar") == names("") == names("train-*") == every
    assert names("train-{02,00}.tar") == ("train-02.tar", "train-00.tar")
    assert names("train-02.tar::train-00.tar") == ("train-02.tar", "train-00.tar")
    fingerprint = opened(folder).fingerprint
    for root, pattern in (
        (folder.parent, "shards"),
        (folder.parent, "shards/train-*.tar"),
        (folder.parent, f"{folder}/train-0{{0..2}}.tar"),
        ("", str(folder)),
    ):
        found = find_shards(str(root), pattern, 5)
        assert found.names == every
        assert open_foreign(found, folder.parent / "cache", 5).fingerprint == fingerprint
    assert len(homes(folder)) == 1
    (folder.parent / "more").mkdir()
    write_tar(folder.parent / "more" / "x.tar", sample(77))
    assert find_shards(str(folder.parent), "{shards/train-00,more/x}.tar", 5).names == (
        "shards/train-00.tar",
        "more/x.tar",
    )


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("val-*.tar", r"no shard matches .*shards/val-\*\.tar: the folder holds .*train-00\.tar"),
        ("none/*.tar", r"folder .*shards/none does not exist"),
        (
            "train-{00..03}.tar",
            r"train-03\.tar cannot be opened .*; it is one of 4 shards",
        ),
        ("train-{00..01.tar", r"train-\{00\.\.01\.tar"),
        ("train-00.tar::train-*.tar", r"names shard .*train-00\.tar twice"),
        ("{0..999999999}.tar", r"stands for more than 1,048,576 shards"),
        ("x{-999999999..0..2}{a,b}.tar", r"stands for more than 1,048,576 shards"),
        ("{0..9}" * 9 + ".tar", r"stands for more than 1,048,576 shards"),
        ("{a,b}" * 21 + ".tar", r"stands for more than 1,048,576 shards"),
        ("{" + "9" * 5000 + "..0}.tar", r"stands for more than 1,048,576 shards"),
        ("{{0..999999}{0..9},a}.tar", r"stands for more than 1,048,576 shards"),
        ("{" * 3000 + "}" * 3000, r"braces within braces too deep"),
    ],
)
def test_patterns_that_name_nothing(folder, pattern, said):
    with pytest.raises(DataError, match=said):
        find_shards(str(folder), pattern, 5)


def test_the_names_of_a_pattern_are_counted_before_they_are_made(folder):
    for pattern in ("{a,b}" * 21, "{a..z}" * 6, "x{{0..1023},b}{0..1023}"):
        began = time.process_time()
        with pytest.raises(DataError, match="stands for more than"):
            find_shards(str(folder), pattern, 5)
        assert time.process_time() - began < 0.2  # a million names take a second


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        "",
        "{a,b}{0..3}",
        "{3..0}",
        "{0..9..4}",
        "x{a,{1..3}y,}",
        "{a}{,b}",
        r"\{a,b\}{1..2}",
        "{x{0..2}}",
        "{01..10}",
        "a,b",
    ],
)
def test_as_many_names_are_counted_as_are_made(pattern):
    assert _count(pattern) == len(list(braceexpand.braceexpand(pattern)))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="the folder is empty"):
        find_shards(str(tmp_path), "*.tar", 5)


# The index


def homes(folder):
    return sorted(path.name for path in (folder / INDEX_FOLDER).iterdir() if not path.name.startswith("."))


def test_the_index_is_made_once_and_found_again(folder, monkeypatch):
    first = opened(folder)
    monkeypatch.setattr(dataloaders.sources.foreign, "scan_shard", None)
    again = opened(folder)
    assert again.fingerprint == first.fingerprint
    assert len(homes(folder)) == 1


def test_a_shard_that_changed_makes_a_new_index_and_a_line_says_so(folder, caplog):
    first = opened(folder)
    with caplog.at_level(logging.WARNING):
        assert "older" not in caplog.text
        write_tar(folder / "train-01.tar", sample(99))
        second = opened(folder)
        assert caplog.text.count("is older than its shards") == 1
        opened(folder)
        assert caplog.text.count("is older than its shards") == 1
    assert second.num_samples == first.num_samples - 4
    assert second.fingerprint != first.fingerprint
    assert second.read(5).image == picture(99)
    assert len(homes(folder)) == 1


def test_the_fingerprint_is_that_of_the_contents(folder, tmp_path):
    first = opened(folder).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(INDEX_FOLDER))
    for path in copy.glob("*.tar"):
        os.utime(path, (1, 1))
    assert opened(copy).fingerprint == first
    assert index_shards(str(folder), "*.tar", cache=tmp_path / "c", checksums=True).fingerprint == first
    (copy / "classes.txt").write_text("a\nb\nc\n")
    shutil.rmtree(copy / INDEX_FOLDER)
    assert opened(copy).fingerprint != first
    (copy / "train-02.tar").unlink()
    (copy / "classes.txt").unlink()
    assert opened(copy).fingerprint != first


def test_checksums_are_added_when_asked_for(folder, tmp_path):
    opened(folder)
    done = []
    index = index_shards(
        str(folder), "*.tar", cache=tmp_path, checksums=True, workers=2, on_start=done.append, on_progress=done.append
    )
    assert done == [3, 1, 1, 1]
    assert all(shard.sha256 for shard in index.shards)
    with (folder / "train-01.tar").open("r+b") as file:
        stamp = (folder / "train-01.tar").stat()
        file.seek(int(index.columns["offset"][6]) + 50)
        file.write(b"\xff\x00\xff")
    os.utime(folder / "train-01.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match=r"sample 6 .*train-01\.tar: its bytes do not have the checksum"):
        opened(folder).read(6)


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (folder / INDEX_FOLDER).write_text("in the way")
    source = opened(folder, cache=tmp_path / "cache")
    assert source.num_samples == 15
    assert (tmp_path / "cache" / "indexes").is_dir()
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DataError, match=r"the index of .*cannot be written anywhere, .*blocked.*: set data\.cache"):
        opened(folder, cache=tmp_path / "blocked")


def test_an_index_in_the_users_cache_serves_runs_with_a_cache_of_their_own(folder, tmp_path, monkeypatch):
    (folder / INDEX_FOLDER).write_text("in the way")
    made = index_shards(str(folder), "*.tar", cache=user_cache(), checksums=True)
    monkeypatch.setattr(dataloaders.sources.foreign, "scan_shard", None)
    assert opened(folder, cache=tmp_path / "cache").fingerprint == made.fingerprint


def test_those_who_come_second_wait_for_the_index(folder, monkeypatch):
    scanned, real = [], dataloaders.sources.foreign.scan_shard

    def slow(storage, name, *rest):
        scanned.append(name)
        time.sleep(0.05)
        return real(storage, name, *rest)

    monkeypatch.setattr(dataloaders.sources.foreign, "scan_shard", slow)
    with ThreadPoolExecutor(5) as pool:
        fingerprints = {source.fingerprint for source in pool.map(lambda _: opened(folder), range(5))}
    assert len(fingerprints) == 1
    assert sorted(scanned) == ["train-00.tar", "train-01.tar", "train-02.tar"]


def index_and_wait(folder, ready):
    """In a process of its own: be killed just before the index gets its name."""

    def last(*words):
        write_index(*words)
        ready.touch()
        time.sleep(60)

    dataloaders.sources.foreign.write_index = last
    opened(folder)


def test_a_process_killed_while_it_indexes_leaves_nothing_in_the_way(folder, tmp_path):
    ready = tmp_path / "ready"
    with lean_start():
        victim = helper_context().Process(target=index_and_wait, args=(folder, ready))
        victim.start()
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert homes(folder) == []
    with pytest.raises(DataError, match=r"is being made by another process, which has shown no progress for 0\.1 s"):
        open_foreign(find_shards(str(folder), "*.tar", 5), tmp_path, 0.1)
    victim.kill()
    victim.join(60)
    assert opened(folder).num_samples == 15
    assert len(homes(folder)) == 1
    assert not list((folder / INDEX_FOLDER).glob(".*.partial"))


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("name", [INDEX_NAME, ARRAYS_NAME])
def test_an_index_damaged_on_disk_is_made_again_and_a_line_says_so(folder, caplog, name, checksums):
    whole = index_shards(str(folder), "*.tar", cache=folder, checksums=checksums)
    [home] = homes(folder)
    path = folder / INDEX_FOLDER / home / name
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes(20) + data[-20:])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            again = opened(folder)
            assert again.fingerprint == whole.fingerprint
            assert ("crc32" in again.index.columns) == checksums
    assert caplog.text.count("is damaged and is made again") == 1
    assert homes(folder) == [home]


def test_checksums_outlive_a_change_of_times(folder):
    first = index_shards(str(folder), "*.tar", cache=folder, checksums=True)
    os.utime(folder / "train-01.tar")
    second = opened(folder).index
    assert second.columns["crc32"].tolist() == first.columns["crc32"].tolist()
    assert second.shards == first.shards
    [name] = homes(folder)
    assert name.endswith("-crc")
    with (folder / "train-01.tar").open("r+b") as file:  # its time changes too
        file.seek(int(first.columns["offset"][6]) + 50)
        file.write(b"\xff\x00\xff")
    for _ in range(2):
        with pytest.raises(DataError, match=rf"shard train-01\.tar in .* not the sha256 that the index .*{name} says"):
            opened(folder)
    assert homes(folder) == [name]
    write_tar(folder / "train-01.tar", sample(99))  # rewritten: its headers changed
    last = opened(folder).index
    assert last.columns["crc32"][5] == zlib.crc32(picture(99))


def test_a_key_of_two_shards_is_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        opened(folder)
        assert "another shard" not in caplog.text
        write_tar(folder / "train-03.tar", [*sample(20), *sample(11), *sample(3)])
        assert opened(folder).num_samples == 18
    assert "2 samples in" in caplog.text
    assert "the first '0011' in train-02.tar and train-03.tar" in caplog.text


def test_a_class_file_without_end(folder):
    (folder / "classes.json").write_bytes(b"[" * 200_000)
    with pytest.raises(DataError, match=r"class map .*classes\.json is not JSON: it is nested too deep"):
        opened(folder)


def test_class_names_that_come_later_are_taken(folder):
    first = opened(folder)
    (folder / "classes.txt").write_text("ant\nbee\ncow\n")
    second = opened(folder)
    assert second.classes == ("ant", "bee", "cow")
    assert second.fingerprint != first.fingerprint


def test_numbers_for_classes_that_differ_ask_for_a_class_file(folder, tmp_path):
    other = tmp_path / "val"
    other.mkdir()
    write_tar(other / "a.tar", [*sample(0), *sample(1)])
    with pytest.raises(DataError, match=r"label 2 is '2' in .*shards but no class in .*val: lay a classes\.txt"):
        check_same_classes(opened(folder), opened(other))
    for place in (folder, other):
        (place / "classes.txt").write_text("ant\nbee\ncow\n")
    check_same_classes(opened(folder), opened(other))


def test_an_image_without_bytes_is_a_damaged_sample(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    write_tar(root / "a.tar", [*sample(0), ("0001.jpg", b""), ("0001.cls", b"1"), *sample(2)])
    source = opened(root)
    assert source.num_samples == 3
    with pytest.raises(DamagedSampleError, match=r"sample 1 \(0001\) .*: its image has no bytes"):
        source.read(1)
    assert source.read(2).image == picture(2)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [2]}', "a box is of class 2, but the data has classes 0 to 1"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [-1]}', "a box is of class -1"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1' + b"0" * 24 + b"]}", "no table of boxes"),
        (b'{"boxes": [[0, 0, 1, NaN]], "labels": [1]}', "a corner is no number"),
        (b'{"boxes": [], "labels": []', "no table of boxes"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1], "crowds": []}', "1 boxes have 0 crowds"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1], "crowds": [2]}', "a crowd is neither true nor false"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1], "areas": [1, 2]}', "1 boxes have 2 areas"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1], "areas": [-1]}', "an area is no number from 0 on"),
        (b'{"boxes": [[0, 0, 1, 1]], "labels": [1], "areas": [null]}', "an area is no number from 0 on"),
        (b"[" * 200_000, "no table of boxes"),
    ],
)
def test_boxes_that_cannot_be_are_a_damaged_sample(tmp_path, table, said):
    root = tmp_path / "shards"
    root.mkdir()
    (root / "classes.txt").write_text("car\ntree\n")
    write_tar(root / "a.tar", [("0.jpg", picture(0)), ("0.boxes.json", table)])
    with pytest.raises(DamagedSampleError, match=said):
        opened(root).read(0)


def write_links(path, form, links):
    """A shard of two samples, and hard links of the sort that `tar` writes: (name, file)."""
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, data in [*sample(0), *sample(1)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_hard_links_are_the_members_that_they_name(tmp_path, form, checksums):
    root, long = tmp_path / "shards", "n" * 130
    root.mkdir()
    links = [
        ("0007.jpg", "0001.jpg"),
        ("0007.cls", "0000.cls"),
        (f"{long}.jpeg", "0007.jpg"),
        (f"{long}.cls", "0001.cls"),
    ]
    write_links(root / "a.tar", form, [*links, ("0009.jpg", f"{long}.jpeg"), ("0009.cls", f"{long}.cls")])
    index_shards(str(root), "*.tar", cache=tmp_path, checksums=checksums)
    source = opened(root)
    assert [source.key(i) for i in range(5)] == ["0000", "0001", "0007", long, "0009"]
    assert source.labels(np.arange(5)).tolist() == [0, 1, 0, 1, 1]
    assert [source.read(i).image for i in range(5)] == [picture(0), *[picture(1)] * 4]


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ([("0007.jpg", "0003.jpg")], r"hard link '0007\.jpg' at byte \d+ to '0003\.jpg', which is no file before it"),
        ([("0007.jpg", "0001.cls")], r"hard link '0007\.jpg' to a file that is no 'jpg' of a sample"),
    ],
)
def test_hard_links_that_lead_nowhere_are_refused(tmp_path, links, said):
    write_links(tmp_path / "a.tar", "gnu", links)
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def header_of(info, size):
    """A header that says a size of its own, with the checksum that goes with it."""
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    return bytes(header)


@pytest.mark.parametrize("name", ["0.jpg", "0.txt"])
@pytest.mark.parametrize("power", [40, 61, 62, 63, 64, 87])
def test_absurd_sizes_in_headers_are_refused(tmp_path, name, power):
    (tmp_path / "a.tar").write_bytes(header_of(tarfile.TarInfo(name), (1 << power) + 5) + bytes(4096))
    for checksums in (False, True):
        with pytest.raises(DataError, match=r"shard .*a\.tar (has a damaged header at byte 0|ends )"):
            index_shards(str(tmp_path), "*.tar", cache=tmp_path, checksums=checksums)


@pytest.mark.parametrize("size", ["9" * 19, "1" + "0" * 40, "1" * 5000])
def test_absurd_sizes_in_pax_records_are_refused(tmp_path, size):
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"size": size}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"a\.tar has a pax header at byte \d+ with size '[19]"):
        opened(tmp_path)


def test_shards_behind_http_are_indexed_as_they_pass(folder, tmp_path):
    local = opened(folder)
    shutil.rmtree(folder / INDEX_FOLDER)
    with served(folder) as server:
        source = opened(server.url, "train-{00..02}.tar", tmp_path / "cache")
        assert source.fingerprint == local.fingerprint
        assert "crc32" in source.index.columns
        assert source.read(7).image == local.read(7).image
        before = len(server.log)
        opened(server.url, "train-{00..02}.tar", tmp_path / "cache").close()
        assert all(method == "HEAD" for method, _, _ in server.log[before:])
        source.close()
