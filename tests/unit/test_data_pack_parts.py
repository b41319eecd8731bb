"""Packing masks, boxes, texts and other containers; what is made of odd images; what is refused."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.text import TextOptions, pack_text
from dataloaders.pixels.decode import decode
from dataloaders.source import box_areas
from dataloaders.sources.shards import open_split
from dataloaders.tokens import open_token_split
from setformer_dist.core.errors import ConfigError, DataError


def pixels_of(number, size):
    """A smooth picture, so that resizing and JPEG change it little."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.stack([(3 * x + number) % 256, (2 * y) % 256, (x + y) % 256], 2).astype(np.uint8)


def saved(pixels, form="JPEG", mode="RGB", **how):
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).convert(mode).save(out, form, **how)
    return out.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def mask_of(size, *classes):
    mask = np.zeros((size[1], size[0]), np.uint8)
    for place, number in enumerate(classes):
        mask[place] = number
    return mask


@pytest.fixture
def streets(tmp_path):
    """Images and masks of two splits; one mask is a palette image, one says 9 for void."""
    root = tmp_path / "streets"
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write(root / split / "images" / f"s.{i}.jpg", saved(pixels_of(i, (20, 16))))
            write(root / split / "annotations" / f"s.{i}.png", saved(mask_of((20, 16), 1, 2, 9), "PNG", "L"))
    palette = Image.fromarray(mask_of((20, 16), 2, 1))
    palette.putpalette([value for i in range(256) for value in (255 - i, i, 77)])
    out = io.BytesIO()
    palette.save(out, "PNG")
    write(root / "train" / "annotations" / "s.1.png", out.getvalue())
    return root


def mask_values(split, sample):
    return np.asarray(Image.open(io.BytesIO(split.read(sample).mask)))


def test_masks_come_back_as_classes(streets, tmp_path):
    options = PackOptions(split="train", masks="annotations", void=9)
    result = pack_image_folder(streets, tmp_path / "out", options)
    split = open_split(tmp_path / "out")
    assert split.parts == {"mask"}
    assert split.classes == ("class 0", "class 1", "class 2")
    assert split.num_samples == 4
    assert not result.rejected
    assert np.array_equal(mask_values(split, 0), mask_of((20, 16), 1, 2, 255))
    assert np.array_equal(mask_values(split, 1), mask_of((20, 16), 2, 1)), "palettes go by index"
    assert split.read(2).image == (streets / "train" / "images" / "s.2.jpg").read_bytes()
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        names = [name.split(".", 1)[1] for name in tar.getnames()[:3]]
    assert names == ["jpg", "cls", "mask.png"]


def test_masks_from_a_tar_are_the_same(streets, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        tar.add(streets, arcname="streets")
    options = PackOptions(split="train", masks="annotations", void=9)
    pack_image_folder(streets, tmp_path / "dir", options)
    pack_image_folder(tmp_path / "s.tar.gz", tmp_path / "tar", options)
    one, other = ((tmp_path / name / "shard-000000.tar").read_bytes() for name in ("dir", "tar"))
    assert one == other


def test_masks_that_do_not_fit_are_named(streets, tmp_path):
    train = streets / "train" / "annotations"
    write(train / "s.0.png", saved(mask_of((20, 15)), "PNG", "L"))
    write(train / "s.1.png", saved(pixels_of(0, (20, 16)), "PNG"))
    (train / "s.2.png").unlink()
    write(train / "other.png", saved(mask_of((20, 16)), "PNG", "L"))
    classes = tmp_path / "classes.txt"
    classes.write_text("road\nsky\n")
    options = PackOptions(split="train", masks="annotations", void=9, classes_file=classes)
    with pytest.raises(DataError) as caught:
        pack_image_folder(streets, tmp_path / "out", options)
    said = str(caught.value)
    assert "4 of 4 images cannot be packed" in said
    assert "s.0.jpg: its mask is 20x15 pixels, the image 20x16" in said
    assert "s.1.jpg: its mask has 3 channels" in said
    assert "s.2.jpg: it has no mask" in said
    assert "s.3.jpg: its mask has class 2, but there are 2 classes" in said
    whole = PackOptions(split="train", masks="annotations", void=9, skip_bad=True)
    result = pack_image_folder(streets, tmp_path / "whole", whole)
    assert len(result.index) == 1
    assert "1 mask has no image, the first 'train/images/other'" in result.notes
    lines = (tmp_path / "whole" / "rejects.tsv").read_text().splitlines()
    assert lines[0] == "name\treason"
    assert [line.split("\t")[0] for line in lines[1:]] == [f"train/images/s.{i}.jpg" for i in range(3)]


def test_masks_without_their_options_are_refused(streets, tmp_path):
    with pytest.raises(DataError, match="several splits \\(train, val\\): choose one with --split"):
        pack_image_folder(streets, tmp_path / "out", PackOptions(masks="annotations"))
    with pytest.raises(DataError, match="name the folder of the masks with --masks annotations"):
        pack_image_folder(streets / "train", tmp_path / "out")
    with pytest.raises(DataError, match="no folder 'images'"):
        pack_image_folder(streets / "train" / "annotations", tmp_path / "out", PackOptions(masks="labels"))
    with pytest.raises(ConfigError, match="--void"):
        PackOptions(void=3)
    with pytest.raises(ConfigError, match="not both"):
        PackOptions(masks="a", coco="b")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


# ------------------------------------------------------------------------------------------------------------ boxes


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    for i in range(3):
        write(root / "train" / f"{i}.jpg", saved(pixels_of(i, (40, 30))))
    table = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3)],
        "categories": [{"id": 7, "name": "bee"}, {"id": 3, "name": "ant"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 20]},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 40.4, 30]},
            {"id": 3, "image_id": 11, "category_id": 3, "bbox": [5, 5, 3, 3]},
            {"id": 4, "image_id": 11, "category_id": 3, "bbox": [5, 5, 30, 20], "iscrowd": 1},
        ],
    }
    write(root / "annotations" / "instances_train.json", json.dumps(table).encode())
    return root


def edited(coco, change):
    path = coco / "annotations" / "instances_train.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("packed", [False, True])
def test_boxes_come_back(coco, tmp_path, packed):
    source = coco
    if packed:
        source = tmp_path / "coco.tar.gz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(coco, arcname="coco")
    result = pack_image_folder(source, tmp_path / "out", PackOptions(coco="annotations/instances_train.json"))
    split = open_split(tmp_path / "out")
    assert split.parts == {"boxes"}
    assert split.classes == ("ant", "bee")
    first = split.read(0).boxes
    assert first.corners.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]  # cut at the edge by less than a pixel
    assert first.labels.tolist() == [1, 0]
    assert first.areas.tolist() == [200, 1200]  # of the boxes, as the file has none
    second = split.read(1).boxes
    assert (second.labels.tolist(), second.crowds.tolist()) == ([0, 0], [False, True])
    assert len(split.read(2).boxes.labels) == 0
    assert result.notes[0] == "1 box is of a crowd: kept, not learnt from"


def test_shrinking_takes_boxes_and_masks_along(coco, streets, tmp_path):
    pack_image_folder(coco, tmp_path / "b", PackOptions(coco="annotations/instances_train.json", max_side=20))
    boxes = open_split(tmp_path / "b")
    assert boxes.size(0) == (15, 20)
    assert boxes.read(0).boxes.corners.tolist() == [[0.5, 1, 5.5, 11], [0, 0, 20, 15]]
    how = PackOptions(split="val", masks="annotations", void=9, max_side=10)
    pack_image_folder(streets, tmp_path / "m", how)
    masks = open_split(tmp_path / "m")
    assert masks.size(0) == (8, 10)
    assert mask_values(masks, 0).shape == (8, 10)
    assert set(np.unique(mask_values(masks, 0))) <= {0, 1, 2, 255}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda t: t["annotations"][0].update(bbox=[30, 2, 20, 5]),
            "30, 2, 50, 7\\) extends beyond its image of 40x30",
        ),
        (lambda t: t["annotations"][0].update(bbox=[3, 3, 0, 5]), "has no area"),
        (lambda t: t["annotations"][0].update(bbox=[3, float("nan"), 5, 5]), "extends beyond"),
        (lambda t: t["annotations"][0].update(category_id=99), "category_id 99 is not among the categories"),
        (lambda t: t["annotations"][0].update(image_id=99), "image_id 99 is not among the images"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2]), "another format"),
        (lambda t: t.pop("categories"), "has no 'categories'"),
        (lambda t: t.update(images=[], annotations=[]), "name no image"),
        (lambda t: [i.update(file_name=f"x{i['id']}.jpg") for i in t["images"]], "no image of .* is named in"),
    ],
)
def test_boxes_that_cannot_be_are_refused(coco, tmp_path, change, fault):
    edited(coco, change)
    with pytest.raises(DataError, match=fault):
        pack_image_folder(coco, tmp_path / "out", PackOptions(coco="annotations/instances_train.json"))


def test_annotations_must_be_there_and_plain(coco, tmp_path):
    with pytest.raises(DataError, match=r"no file is named x\.json"):
        pack_image_folder(coco, tmp_path / "out", PackOptions(coco="x.json"))
    (coco / "val").mkdir()
    (coco / "val" / "0.jpg").write_bytes(saved(pixels_of(5, (40, 30))))
    with pytest.raises(DataError, match="belong to the same boxes: name one split with --split"):
        pack_image_folder(coco, tmp_path / "out", PackOptions(coco="instances_train.json"))
    pack_image_folder(coco, tmp_path / "out", PackOptions(coco="instances_train.json", split="train"))
    assert open_split(tmp_path / "out").num_samples == 3


# ------------------------------------------------------------------------------------------------------- odd images


def test_images_that_others_refuse_are_rewritten(tmp_path):
    pixels = pixels_of(3, (30, 20))
    write(tmp_path / "s" / "a" / "cmyk.jpg", saved(pixels, mode="CMYK", quality=95))
    deep = (pixels[:, :, 0].astype(np.uint16) << 8) + 200
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG")
    write(tmp_path / "s" / "a" / "deep.png", out.getvalue())
    write(tmp_path / "s" / "a" / "plain.jpg", saved(pixels))
    result = pack_image_folder(tmp_path / "s", tmp_path / "out")
    assert any(note.startswith("2 images were rewritten") for note in result.notes)
    split = open_split(tmp_path / "out")
    cmyk, deep_again, plain = (Image.open(io.BytesIO(split.read(i).image)) for i in range(3))
    assert (cmyk.mode, cmyk.format) == ("RGB", "JPEG")
    assert (deep_again.mode, deep_again.format) == ("RGB", "PNG")
    assert np.array_equal(np.asarray(deep_again)[:, :, 1], pixels[:, :, 0])
    before = decode((tmp_path / "s" / "a" / "cmyk.jpg").read_bytes()).astype(int)
    assert np.abs(np.asarray(cmyk).astype(int) - before).mean() < 6
    assert split.read(2).image == (tmp_path / "s" / "a" / "plain.jpg").read_bytes()
    assert plain.mode == "RGB"


def test_shrinking_is_antialiased_and_leaves_small_images_alone(tmp_path):
    large = pixels_of(0, (600, 300))
    write(tmp_path / "s" / "a" / "large.png", saved(large, "PNG"))
    write(tmp_path / "s" / "a" / "small.jpg", saved(pixels_of(1, (60, 100))))
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(max_side=150, quality=97))
    split = open_split(tmp_path / "out")
    assert split.size(0) == (75, 150)
    assert split.size(1) == (100, 60)
    assert split.read(1).image == (tmp_path / "s" / "a" / "small.jpg").read_bytes()
    expected = np.asarray(Image.fromarray(large).resize((150, 75), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(split.read(0).image).astype(int) - expected).mean() < 8


def test_quality_alone_rewrites_where_that_is_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    write(tmp_path / "s" / "a" / "fat.jpg", saved(noise, quality=98))
    write(tmp_path / "s" / "a" / "thin.jpg", saved(noise, quality=10))
    pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(quality=60))
    split = open_split(tmp_path / "out")
    assert len(split.read(0).image) < (tmp_path / "s" / "a" / "fat.jpg").stat().st_size / 2
    assert split.read(1).image == (tmp_path / "s" / "a" / "thin.jpg").read_bytes()
    for bad in ({"quality": 0}, {"quality": 101}, {"max_side": -1}):
        with pytest.raises(ConfigError):
            PackOptions(**bad)


# ---------------------------------------------------------------------------------------------- continuing, and limits


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_changed_image_is_packed_again_and_the_rest_taken_over(tmp_path):
    for i in range(9):
        write(tmp_path / "s" / "a" / f"{i}.jpg", saved(pixels_of(i, (20, 20))))
    write(tmp_path / "s" / "a" / "4.jpg", b"\xff\xd8 damaged")
    options = PackOptions(samples_per_shard=3)
    with pytest.raises(DataError, match="1 of 9 images cannot be packed"):
        pack_image_folder(tmp_path / "s", tmp_path / "out", options)
    write(tmp_path / "s" / "a" / "4.jpg", saved(pixels_of(4, (20, 20))))
    result = pack_image_folder(tmp_path / "s", tmp_path / "out", options)
    assert result.notes == ["2 of 3 shards were finished by an earlier packing and taken over"]
    pack_image_folder(tmp_path / "s", tmp_path / "whole", options)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_other_options_or_a_damaged_shard_are_not_taken_over(tmp_path):
    for i in range(6):
        write(tmp_path / "s" / "a" / f"{i}.jpg", saved(pixels_of(i, (20, 20))))
    write(tmp_path / "s" / "a" / "5.jpg", b"nothing")

    def stopped(**options):
        with pytest.raises(DataError, match="1 of 6"):
            pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=2, **options))

    stopped()
    shard = tmp_path / ".out.partial" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    result = pack_image_folder(tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=2, skip_bad=True))
    assert "2 of 3 shards were finished by an earlier packing and taken over" in result.notes
    pack_image_folder(tmp_path / "s", tmp_path / "whole", PackOptions(samples_per_shard=2, skip_bad=True))
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")

    (tmp_path / "s" / "a" / "0.jpg").touch()  # changed since
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    stopped()
    result = pack_image_folder(
        tmp_path / "s", tmp_path / "out", PackOptions(samples_per_shard=2, skip_bad=True, shuffle_seed=1)
    )
    assert any("repacked" in note for note in result.notes)
    assert not (tmp_path / ".out.partial").exists()


def test_a_full_destination_keeps_what_is_finished(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    size = "size=400k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: run as root")
    try:
        for i in range(30):
            noise = np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            write(tmp_path / "s" / "a" / f"{i:02d}.png", saved(noise, "PNG"))  # 19 kB each
        options = PackOptions(samples_per_shard=5)
        with pytest.raises(DataError, match=r"failed, \d finished shards? (is|are) kept in .*No space left"):
            pack_image_folder(tmp_path / "s", small / "out", options)
        subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
        result = pack_image_folder(tmp_path / "s", small / "out", options)
        assert any("taken over" in note for note in result.notes)
        pack_image_folder(tmp_path / "s", tmp_path / "whole", options)
        assert shards_of(small / "out") == shards_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)


def test_unwritable_and_odd_places(tmp_path):
    write(tmp_path / "s" / "a" / "0.jpg", saved(pixels_of(0, (8, 8))))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        pack_image_folder(tmp_path / "s", tmp_path / "file" / "out")
    with pytest.raises(DataError, match="is a file: name a folder"):
        pack_image_folder(tmp_path / "s", tmp_path / "file")


# -------------------------------------------------------------------------------------------- containers and texts


def test_a_packed_split_is_packed_again(tmp_path):
    for name in ("ant", "bee"):
        for i in range(4):
            write(tmp_path / "s" / name / f"{i}.jpg", saved(pixels_of(i + ord(name[0]), (20, 12))))
    pack_image_folder(tmp_path / "s", tmp_path / "one", PackOptions(samples_per_shard=3))
    pack_image_folder(tmp_path / "one", tmp_path / "two", PackOptions(samples_per_shard=5, shuffle_seed=2))
    one, two = open_split(tmp_path / "one"), open_split(tmp_path / "two")
    assert [shard.samples for shard in two.index.shards] == [5, 3]

    def labelled(split):
        return [(split.read(i).image, int(split.labels(np.array([i])))) for i in range(8)]

    assert labelled(one) != labelled(two)
    assert sorted(labelled(one)) == sorted(labelled(two))
    pack_image_folder(tmp_path / "one", tmp_path / "same")
    pack_image_folder(tmp_path / "s", tmp_path / "same-from-files")
    assert (tmp_path / "same" / "shard-000000.tar").read_bytes() == (
        tmp_path / "same-from-files" / "shard-000000.tar"
    ).read_bytes()


def test_class_maps_of_two_data_sets(tmp_path):
    for split, names in (("train", ("ant", "bee", "cow")), ("val", ("cow", "bee")), ("other", ("bee", "dog"))):
        for name in names:
            write(tmp_path / split / name / "0.jpg", saved(pixels_of(len(name), (9, 9))))
        pack_image_folder(tmp_path / split, tmp_path / f"{split}-packed")
    again = PackOptions(classes_from=tmp_path / "train-packed")
    pack_image_folder(tmp_path / "val-packed", tmp_path / "val-again", again)
    split = open_split(tmp_path / "val-again")
    assert split.classes == ("ant", "bee", "cow")
    assert split.labels(np.arange(2)).tolist() == [1, 2]
    with pytest.raises(DataError, match="'dog' is not in the class map"):
        pack_image_folder(tmp_path / "other-packed", tmp_path / "other-again", again)
    with pytest.raises(ConfigError, match="--split does not go with"):
        pack_image_folder(tmp_path / "val-packed", tmp_path / "x", PackOptions(split="val"))


def test_equal_names_and_dots_make_keys_that_differ_and_have_none(tmp_path):
    write(tmp_path / "s" / "a" / "x" / "im.age.v2.jpg", saved(pixels_of(0, (9, 9))))
    write(tmp_path / "s" / "a" / "y" / "im.age.v2.jpg", saved(pixels_of(1, (9, 9))))
    write(tmp_path / "s" / "b" / "im.age.v2.jpg", saved(pixels_of(2, (9, 9))))
    pack_image_folder(tmp_path / "s", tmp_path / "out")
    split = open_split(tmp_path / "out")
    keys = [split.key(i) for i in range(3)]
    assert keys == ["000000000-im_age_v2", "000000001-im_age_v2", "000000002-im_age_v2"]


def test_texts_become_tokens(tmp_path):
    rows = ["sentence\tlabel", "good film\tpos", "bäd film\tneg", "", "so so, 5\u20286\tpos"]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    pack_text(tmp_path / "train.tsv", tmp_path / "out", TextOptions())
    split = open_token_split(tmp_path / "out")
    assert split.classes == ("neg", "pos")
    assert split.labels(np.arange(3)).tolist() == [1, 0, 1]
    assert bytes(split.raw(1)[0]).decode() == "bäd film"
    assert bytes(split.raw(2)[0]).decode() == "so so, 5\u20286"
    (tmp_path / "val.tsv").write_text("fine\tpos\r\n")
    val = pack_text(tmp_path / "val.tsv", tmp_path / "val", TextOptions(length=3, classes_from=tmp_path / "out"))
    assert val.classes == ("neg", "pos")
    assert bytes(val.raw(0)[0]) == b"fin"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no label\n", "line 1 of t.tsv is not a text, a tab and a label"),
        ("", "holds no texts"),
        ("a\tb\n\tc\n", "line 2"),
    ],
)
def test_texts_that_are_none(tmp_path, text, fault):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=fault):
        pack_text(tmp_path / "t.tsv", tmp_path / "out", TextOptions())
    assert not (tmp_path / "out").exists()


def test_real_masks_and_boxes(shared_data, tmp_path):
    how = PackOptions(split="val", masks="annotations", void=11)
    pack_image_folder(shared_data / "camvid.tar.gz", tmp_path / "camvid", how)
    camvid = open_split(tmp_path / "camvid")
    assert (camvid.num_samples, len(camvid.classes)) == (101, 11)
    assert set(np.unique(mask_values(camvid, 50))) <= {*range(11), 255}
    how = PackOptions(split="val", coco="annotations/instances_val.json")
    pack_image_folder(shared_data / "pennfudan.tar.gz", tmp_path / "penn", how)
    penn = open_split(tmp_path / "penn")
    assert (penn.num_samples, penn.classes) == (34, ("person",))
    boxes = [penn.read(i).boxes for i in range(34)]
    assert all(len(one.labels) for one in boxes)
    assert sum(len(one.labels) for one in boxes) == 86
    assert all((one.areas < box_areas(one.corners)).all() for one in boxes)  # of outlines
    texts = pack_text(shared_data / "sst2.tar.gz", tmp_path / "sst2", TextOptions(split="dev"))
    assert (texts.num_samples, texts.classes) == (872, ("0", "1"))


def test_paths_are_free(tmp_path):
    """Spaces, signs that shells know, and names that are not UTF-8."""
    source = tmp_path / "a b [c]"
    write(source / "weiß & blau" / "1 2.jpg", saved(pixels_of(0, (9, 9))))
    name = b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    write(Path(f"{source}/weiß & blau/{name}"), b"damaged")
    result = pack_image_folder(source, tmp_path / "out", PackOptions(skip_bad=True))
    assert len(result.index) == 1
    assert open_split(tmp_path / "out").classes == ("weiß & blau",)
    assert (
        (tmp_path / "out" / "rejects.tsv")
        .read_bytes()
        .splitlines()[1]
        .startswith("weiß & blau/".encode() + b"\xff\xfe")
    )
