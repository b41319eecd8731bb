"""Never silently other data: labels mean what they say, and what is skipped is counted, reported, or refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.finding import open_container
from dataloaders.packing.pack import REJECTS_NAME, PackOptions, pack_image_folder
from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.pixels.formats import FORMATS, IMAGE_SUFFIXES
from dataloaders.sources.classes import LabelError, label_of, parse_class_map
from dataloaders.sources.passed import IGNORED
from setformer_dist.core.errors import DataError
from tests.unit.test_data_foreign import picture, sample, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def opened(path, **changes):
    return open_source(str(path), "", DataConfig(root=str(path), read_timeout=5.0, **changes))


def folder(root, classes=("cat", "dog"), count=2):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(picture(10 * label + number))
    return root


CAT_DOG = ("cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        '["cat", "dog"]',
        '{"cat": 0, "dog": 1}',
        '{"dog": 1, "cat": 0}',
        '{"dog": 1.0, "cat": 0.0}',
        '{"1": "dog", "0": "cat"}',
        '{"model": "x", "id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}',
        "cat\ndog\n",
        "# names\r\ncat\r\n\r\ndog",
        "0,cat\n1,dog",
        "index,name\n1,dog\n0,cat\n",
        "name;label\ncat;0\ndog;1\n",
        "dog\t1\ncat\t0\n",
        '"cat",0\n"dog",1\n',
        "0: cat\n1: dog\n",
        "1: dog\n0: cat\n",
    ],
)
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_maps_are_read_for_what_they_mean(text, code):
    assert parse_class_map(text.encode(code), "classes") == CAT_DOG


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0\n1\n10\n2\n3\n4\n5\n6\n7\n8\n9\n", "sorted as text"),
        ('["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]', "sorted as text"),
        ('{"cat": 0, "dog": 2}', "none of number 1"),
        ('{"cat": 0, "dog": 0}', "gives number 0 to"),
        ('{"0": "1", "1": "0"}', "maps numbers to numbers"),
        ('{"0": ["n1", "cat"]}', "table of names and numbers"),
        ('["cat", 3]', "must hold class names"),
        ("dog 1\ncat 0\n", "put a comma"),
        ("#cat\ndog\n", "comment or a name"),
        ("class\ncat\ndog\n", "header"),
        ("cat\ndog\ncat\n", "names 'cat' twice"),
        ('{"0": "cat", "0": "dog", "1": "emu"}', "key '0' is there twice"),
        ("cat\n" + "d" * 200_000, "has 200000 characters in line 2 'dddd"),
        ('"cat,0\n"dog,1\n', "quote that does not end in line 1"),
        ("c\0a\0t\0\n\0", "another encoding"),
        ("cat\n\x1b[31mdog\n", "control characters"),
        ('["cat", "do\\u0000g"]', "control characters"),
        ("names:\n  0: cat\n  1: dog\n", "as YAML has them"),
        ("item {\n  id: 1\n}\n", "as protobuf's text has them"),
        ("id,name,supercategory\n1,cat,pet\n2,dog,pet\n", "header of columns"),
        ("name,kind\ncat,pet\ndog,pet\n", "header of columns"),
        ("1 cat\n2 dog\n", "numbers its classes from 1"),
        ("cat 2\ndog 1\n", "numbers its classes from 1"),
    ],
)
def test_class_maps_that_may_mean_two_things_are_refused(text, what):
    with pytest.raises(DataError, match=what):
        parse_class_map(text.encode(), "classes")


@pytest.mark.parametrize(
    "names",
    [
        ("tench, Tinca tinca", "goldfish, Carassius auratus"),
        ("n01440764 tench, Tinca tinca", "n01443537 goldfish"),
        ("7up", "5 o'clock", "class: three", '12" ruler'),
        ("class 1", "class 2"),
        ("1", "2"),
    ],
)
def test_names_stay_what_they_are(names):
    assert parse_class_map("\n".join(names).encode(), "classes.txt") == names


def test_many_names_cost_no_square():
    names = "\n".join(f"name{number}" for number in range(200_000))
    assert len(parse_class_map(names.encode(), "classes.txt")) == 200_000
    with pytest.raises(DataError, match="names 'name3' twice"):  # took hours
        parse_class_map(f"{names}\nname3".encode(), "classes.txt")


def test_labels_are_whole_numbers_or_one_name():
    assert [label_of(said) for said in ("3", "3.0", " 03\n", 3.0, 4, "+5", None)] == [3, 3, 3, 3, 4, 5, None]
    assert [label_of(said) for said in ("cat", "tench, Tinca tinca", "n01440764")] == [
        "cat", "tench, Tinca tinca", "n01440764",
    ]  # fmt: skip
    for said in ("[0, 1]", "1 3", "0,1", "3.5", "nan", "1e3", "cat\ndog", "", True, [1], {"a": 1}, 3.5, float("nan")):
        with pytest.raises(LabelError):
            label_of(said)


def test_numbers_written_as_floats_and_with_marks_are_their_classes(tmp_path):
    for number, form in enumerate(("{}.0", "\ufeff{}")):
        root = tmp_path / str(number)
        root.mkdir()
        files = [file for i in range(24) for file in (sample(i)[0], (f"{i:04d}.cls", form.format(i % 12).encode()))]
        write_tar(root / "a.tar", files)
        found = opened(root)
        assert found.classes == tuple(map(str, range(12)))
        assert found.labels(np.arange(24)).tolist() == [i % 12 for i in range(24)]


def test_a_label_far_beyond_the_samples_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0, 9_999_999))
    with pytest.raises(DataError, match=r"a label in .* is 9999999, but there are 1 samples"):
        opened(tmp_path)


def test_dotted_keys_never_merge(tmp_path):
    files = [(f"IMG{i}{dot}.{part}", data) for i in range(3) for dot in ("", ".1") for part, data in
             (("jpg", picture(i)), ("cls", b"1"))]  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"'IMG0\.1\.jpg', a key with a dot.* which has an image already"):
        opened(tmp_path)
    found = opened(tmp_path, skip_bad=True)
    assert found.num_samples == 3
    assert [row[0] for row in found.index.options["left_out"]][:2] == ["a.tar: IMG0.1.jpg", "a.tar: IMG0.1.cls"]


def test_further_pictures_of_a_sample_are_no_keys_with_dots(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [*sample(0), ("0000.depth.png", picture(1, "PNG")), ("0000.txt", b"a cat")])
    assert opened(tmp_path).num_samples == 1
    assert "skipped 2 files that are no images (1 .txt, 1 .depth.png)" in caplog.text


def test_class_folders_that_are_numbers_in_text_order_are_reported(tmp_path, caplog):
    root = folder(tmp_path / "photos", [str(number) for number in range(11)], 1)
    assert opened(root).classes[:3] == ("0", "1", "10")
    assert "label 2 is class folder '10'" in caplog.text
    with pytest.raises(DataError, match=r"has number '10' at label 2.*--classes FILE"):
        pack_image_folder(root, tmp_path / "packed", PackOptions(workers=0))
    caplog.clear()
    opened(folder(tmp_path / "padded", [f"{number:02}" for number in range(11)], 1))
    assert "class folder" not in caplog.text


def test_hidden_members_are_skipped_at_any_depth_and_reported(tmp_path, caplog):
    files = [(f"train/{i}.{part}", data) for i in range(4) for part, data in (("jpg", picture(i)), ("cls", b"0"))]
    hidden = [("train/._0.jpg", b"x"), ("train/.DS_Store", b"x"), ("__MACOSX/train/1.jpg", b"x"), ("README", b"x")]
    write_tar(tmp_path / "a.tar", [*files, *hidden])
    for _ in range(2):  # also when the index is there
        caplog.clear()
        found = opened(tmp_path)
        assert [found.key(i) for i in range(found.num_samples)] == [f"train/{i}" for i in range(4)]
        assert "3 hidden or system files and folders" in caplog.text
        assert "1 no suffix" in caplog.text


def test_odd_members_are_refused_or_left_out_and_listed(tmp_path):
    whole = [file for i in range(4) for file in sample(i)]
    odd = {
        "noimage": [("9.cls", b"1")],
        "nolabel": [("9.jpg", picture(9))],
        "readme": [("README.md", b"x")],
        "list": [("9.jpg", picture(9)), ("9.cls", b"[0, 1]")],
        "twice": [sample(0)[0]],
    }
    for name, more in odd.items():
        root = tmp_path / name
        root.mkdir()
        write_tar(root / "a.tar", [*whole, *more])
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty" / "a.tar", whole)
    write_tar(tmp_path / "empty" / "b.tar", [])
    for name in (*odd, "empty"):
        with pytest.raises(DataError, match="skip"):
            opened(tmp_path / name)
        assert opened(tmp_path / name, skip_bad=True).num_samples == 4
        result = pack_image_folder(tmp_path / name, tmp_path / "packed" / name, PackOptions(skip_bad=True))
        assert len(result.index) == 4
        listed = (tmp_path / "packed" / name / REJECTS_NAME).read_text().splitlines()
        assert len(listed) == 2, name  # a header and what was left out


def test_a_class_folder_without_images_is_an_error_unless_allowed(tmp_path, caplog):
    root = folder(tmp_path / "in")
    (root / "bird").mkdir()
    (root / "bird" / "1.heic").write_bytes(b"x")
    for use in (opened, lambda path: pack_image_folder(path, tmp_path / "p")):
        with pytest.raises(DataError, match=r"class folder 'bird' .* holds only \.heic"):
            use(root)
    found = opened(root, allow_empty_classes=True)
    assert found.classes == CAT_DOG
    assert "1 file that is no image (1 .heic)" in caplog.text
    packed = pack_image_folder(root, tmp_path / "p", PackOptions(allow_empty_classes=True))
    assert packed.index.classes == CAT_DOG
    (root / "bird" / "1.heic").unlink()
    with pytest.raises(DataError, match=r"class folder 'bird' .* holds nothing"):
        opened(root)


@pytest.mark.parametrize("name", [*sorted(IGNORED), ".ipynb_checkpoints", ".git", "@eaDir", "#recycle", "Thumbs.db"])
def test_system_folders_are_no_classes_to_anyone(tmp_path, name, caplog):
    root = folder(tmp_path / "in")
    for place in (root, root / "cat"):
        (place / name).mkdir()
        (place / name / "T.jpg").write_bytes(picture(1))
    assert opened(root).classes == open_container(root).classes == CAT_DOG
    assert opened(root).num_samples == 4
    assert "2 hidden or system files and folders" in caplog.text
    packed = pack_image_folder(root, tmp_path / "packed")
    assert packed.index.classes == CAT_DOG
    assert len(packed.index) == 4


def test_shards_that_are_not_read_are_reported(tmp_path, caplog):
    root = tmp_path / "in"
    root.mkdir()
    write_tar(root / "0.tar", sample(0))
    for other in ("1.tar.gz", "2.TAR", "3.tgz"):
        (root / other).write_bytes(b"x")
    (root / "deep").mkdir()
    write_tar(root / "deep" / "4.tar", sample(1))
    assert opened(root).num_samples == 1
    assert "3 shards of another suffix" in caplog.text
    assert "1 shards one folder deeper" in caplog.text
    (root / "0.tar").unlink()
    with pytest.raises(DataError, match=r"3 shards of another suffix, the first 1\.tar\.gz"):
        opened(root)
    for other in ("1.tar.gz", "2.TAR", "3.tgz"):
        (root / other).unlink()
    with pytest.raises(DataError, match=r"1 shards one folder deeper, the first in deep"):
        opened(root)


def test_classes_with_folders_inside_and_names_with_marks_of_patterns(tmp_path):
    root = tmp_path / "set[1]{a}*"
    for name in CAT_DOG:
        folder(root / "train" / name, ("images",))
    found = open_source(str(tmp_path), "set[1]{a}*/train", DataConfig(root=str(tmp_path)))
    assert found.classes == CAT_DOG
    assert found.num_samples == 4
    shards = tmp_path / "tars[2]"
    shards.mkdir()
    write_tar(shards / "0.tar", sample(0))
    assert open_source(str(tmp_path), "tars[2]", DataConfig(root=str(tmp_path))).num_samples == 1
    assert open_source(str(tmp_path), "tars[2]/*.tar", DataConfig(root=str(tmp_path))).num_samples == 1


def test_names_that_are_not_utf8_go_through(tmp_path):
    root = folder(tmp_path / "in")
    odd = os.fsencode(root) + b"/cl\xe9"
    Path(os.fsdecode(odd)).mkdir()
    Path(os.fsdecode(odd + b"/\xff.jpg")).write_bytes(picture(5))
    found = opened(root)
    assert found.classes == ("cat", "cl\udce9", "dog")
    assert len(found.read(found.num_samples - 3).image) > 0
    packed = pack_image_folder(root, tmp_path / "packed")
    assert packed.index.classes == found.classes == opened(tmp_path / "packed").classes
    json.loads((tmp_path / "packed" / "index.json").read_bytes())


@pytest.mark.parametrize("form", ["GIF", "TIFF", "AVIF"])
def test_further_formats_are_read_strictly(form):
    pixels = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.stack([pixels] * 3, -1)).save(out, form)
    data = out.getvalue()
    whole = decode(data)
    assert whole.shape == (40, 50, 3)
    for end in range(0, len(data), max(1, len(data) // 80)):
        try:
            cut = decode(data[:end])
        except UndecodableError:
            continue
        assert (cut == whole).all()  # at most what holds no pixels may be missing
    assert form in FORMATS


def test_messages_say_what_bytes_are_and_nothing_of_memory(tmp_path):
    for data, what in (
        (b"<html>404</html>", "it is no image but an HTML page"),
        (b"", "it is no image but empty"),
        (b"\0" * 100, "it is no image but zeros"),
        (b"hello", "no image of a format that is read"),
        (b"\x89PNG\r\n\x1a\nx", "not a whole image"),
    ):
        with pytest.raises(UndecodableError, match=what) as error:
            decode(data)
        assert "0x" not in str(error.value)


def test_every_suffix_that_is_read_is_that_of_a_format_that_is_decoded():
    Image.init()
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    assert known | {".jfif", ".jpe", ".dib"} >= IMAGE_SUFFIXES


def test_a_tar_of_class_folders_is_packed_as_the_folders_are(tmp_path):
    root = folder(tmp_path / "in")
    (root / "@eaDir").mkdir()
    (root / "@eaDir" / "x.jpg").write_bytes(picture(1))
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(root, "in")
    one = pack_image_folder(root, tmp_path / "one")
    other = pack_image_folder(tmp_path / "in.tar", tmp_path / "other")
    assert one.index.shards == other.index.shards
