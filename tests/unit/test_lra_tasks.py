"""Reading public files and preparing tasks, on small files made here."""

import gzip
import io
import multiprocessing
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.lra import listops
from dataloaders.lra.generating import accepted_samples
from dataloaders.lra.stats import statistics
from dataloaders.lra.tasks import NAMES, Preparation, open_task, prepare, task_named
from dataloaders.tokens import TokenSplit
from setformer_dist.core.errors import ConfigError, DataError

CLASSES = ("cat", "dog", "owl")


def write_images(folder: Path, per_class: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    for split, count in (("train", 10), ("test", 4)):
        write_images(tmp_path / "cifar" / split, count, len(split))
    return tmp_path / "cifar"


def test_image_is_grey_row_after_row_and_split_by_tenths(cifar: Path, tmp_path: Path) -> None:
    splits = prepare(task_named("image"), tmp_path / "lra", Preparation(source=cifar))
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 27, "val": 3, "test": 12}
    train = splits["train"]
    assert train.classes == CLASSES
    assert train.facts.full
    assert train.facts.length == 1024
    known = {}
    for path in cifar.glob("train/*/*.png"):
        red, green, blue = np.asarray(Image.open(path)).astype(int).reshape(-1, 3).T
        grey = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
        known[grey.tobytes()] = CLASSES.index(path.parent.name)
    seen = []
    for split in (train, splits["val"]):
        for index in range(split.num_samples):
            tokens = split.raw(index)[0]
            assert split.labels(np.array([index])).item() == known[tokens.tobytes()]
            seen.append(tokens.tobytes())
    assert len(set(seen)) == 30  # every training image in exactly one of the two
    labels = train.labels(np.arange(27)).tolist()
    assert labels != sorted(labels)  # mixed, or the last tenth would be of one class


def test_short_images_are_averaged(cifar: Path, tmp_path: Path) -> None:
    full = prepare(task_named("image"), tmp_path / "lra", Preparation(source=cifar))["test"]
    short = prepare(task_named("image", short=True), tmp_path / "lra", Preparation(source=cifar))["test"]
    for index in range(12):
        large = full.raw(index)[0].astype(float).reshape(16, 2, 16, 2).mean((1, 3))
        assert np.abs(large - short.raw(index)[0].reshape(16, 16)).max() <= 1.0  # rounded once more


def test_images_mixed_by_another_seed_are_not_taken_for_these(cifar: Path, tmp_path: Path) -> None:
    task = task_named("image", short=True)
    prepare(task, tmp_path / "lra", Preparation(source=cifar))
    prepare(task, tmp_path / "lra", Preparation(source=cifar))
    with pytest.raises(DataError, match="seed = 0 in train, not 1: give --force"):
        prepare(task, tmp_path / "lra", Preparation(source=cifar, seed=1))


def test_image_from_tars(cifar: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "test"):
        with tarfile.open(tars / f"cifar10_{split}.tar.gz", "w:gz") as tar:
            tar.add(cifar / split, arcname=split)
    from_tar = prepare(task_named("image"), tmp_path / "a", Preparation(source=tars))
    from_folder = prepare(task_named("image"), tmp_path / "b", Preparation(source=cifar))
    assert [split.fingerprint for split in from_tar.values()] == [split.fingerprint for split in from_folder.values()]


def test_images_of_another_size_or_damaged_are_named(cifar: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(cifar / "train" / "dog" / "5.png")
    with pytest.raises(DataError, match=r"dog/5.png is 20x20 pixels"):
        prepare(task_named("image"), tmp_path / "lra", Preparation(source=cifar))
    (cifar / "train" / "dog" / "5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/5.png: it is no image of a format that is read"):
        prepare(task_named("image"), tmp_path / "lra", Preparation(source=cifar))


REVIEWS = {"neg": ["Dull.", "Not ünder any circumstances"], "pos": ["Grand <br /> stuff", "A" * 5000, "Go!"]}


def texts_of(split: TokenSplit) -> list[tuple[bytes, int]]:
    labels = split.labels(np.arange(split.num_samples)).tolist()
    return [(split.raw(i)[0].tobytes(), label) for i, label in enumerate(labels)]


def test_text_from_acl_imdb(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name, reviews in REVIEWS.items():
            folder = tmp_path / "aclImdb" / split / name
            folder.mkdir(parents=True)
            for number, review in enumerate(reviews):
                (folder / f"{number}_{5}.txt").write_text(review, encoding="utf-8")
    splits = prepare(task_named("text"), tmp_path / "lra", Preparation(source=tmp_path / "aclImdb"))
    expected = [(r.encode()[:4000], label) for label, name in enumerate(("neg", "pos")) for r in REVIEWS[name]]
    for split in splits.values():
        assert texts_of(split) == expected
        assert split.classes == ("neg", "pos")
    # Validation is the test split.
    assert splits["val"].fingerprint == splits["test"].fingerprint


@pytest.mark.parametrize(
    "lines",
    [
        ["good film\t1", "bad film\t0"],
        ["1\tgood film", "0\tbad film"],
        ["sentence\tlabel", "good film\t1", "bad film\t0"],
        ['"id"\t"sentiment"\t"review"', '"a_1"\t1\t"good film"', '"a_2"\t0\t"bad film"'],
    ],
)
def test_text_from_tsv(lines: list[str], tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    splits = prepare(task_named("text"), tmp_path / "lra", Preparation(source=tmp_path))
    assert texts_of(splits["train"]) == texts_of(splits["test"]) == [(b"good film", 1), (b"bad film", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a film\n", "neither a header"), ("good\t1\nbad\t7\n", "sample 2 has no label"), ("\t1\nx\t0", "empty text")],
)
def test_text_that_is_not_of_the_format(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(content)
    (tmp_path / "test.tsv").write_text("fine\t1\n")
    with pytest.raises(DataError, match=message):
        prepare(task_named("text"), tmp_path / "lra", Preparation(source=tmp_path))
    assert not (tmp_path / "lra" / "text" / "train").exists()


def test_retrieval_from_pairs(tmp_path: Path) -> None:
    rows = [("1.0", "b'A paper'", "b'Its citation'"), ("0", "x" * 5000, "ö")]
    for name in ("train", "eval", "test"):
        lines = [f"{label}\tid{i}\tother{i}\t{a}\t{b}" for i, (label, a, b) in enumerate(rows)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = prepare(task_named("retrieval"), tmp_path / "lra", Preparation(source=tmp_path))
    for split in splits.values():
        assert split.labels(np.arange(2)).tolist() == [1, 0]
        assert [tokens.tobytes() for tokens in split.raw(0)] == [b"b'A paper'", b"b'Its citation'"]
        assert [len(tokens) for tokens in split.raw(1)] == [4000, 2]
        assert split.batch(np.arange(2), 4000).shape == (2, 2, 4000)
    (tmp_path / "new_aan_pairs.test.tsv").write_text("1\ta\tb\tonly one text\n")
    with pytest.raises(DataError, match="line 1: it is not label"):
        prepare(task_named("retrieval"), tmp_path / "lra", Preparation(source=tmp_path, force=True))


def test_real_cifar(shared_data: Path, tmp_path: Path) -> None:
    """One class of the real images, whole: their grey values have the mean of the published normalisation."""
    with tarfile.open(shared_data / "cifar10_test.tar.gz") as source:
        members = [m for m in source.getmembers() if m.isfile()][::40]
        images = [(member.name, source.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    for split in ("train", "test"):
        with gzip.open(tmp_path / f"{split}.tar.gz", "wb", compresslevel=1) as packed, tarfile.open(
            fileobj=packed, mode="w"
        ) as tar:  # fmt: skip
            for name, data in images:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    splits = prepare(task_named("image"), tmp_path / "lra", Preparation(source=tmp_path))
    test = splits["test"]
    assert len(test.classes) == 10
    grey = np.concatenate([test.raw(i)[0] for i in range(test.num_samples)]).astype(float)
    assert test.num_samples == len(images) == 250
    # 122.6 / 255 and 61 / 255 (state-spaces/s4); the mean of 250 images of deviation 31 is within 4 x 31 / sqrt(250).
    assert grey.mean() == pytest.approx(122.6, abs=8)
    assert grey.std() == pytest.approx(61, abs=6)


def test_a_prepared_task_is_kept_if_it_is_the_same(tmp_path: Path) -> None:
    task = replace(task_named("listops", short=True), counts=(50, 10, 10))
    first = prepare(task, tmp_path, Preparation())
    index = tmp_path / "listops-short" / "train" / "tokens.json"
    written = index.stat().st_mtime_ns
    again = prepare(task, tmp_path, Preparation(workers=1))
    assert again["train"].fingerprint == first["train"].fingerprint
    assert index.stat().st_mtime_ns == written
    shallow = replace(task, generated=replace(task.generated, max_depth=3))
    for other, how, difference in (
        (task, Preparation(seed=5), "seed = 0 in train, not 5"),
        (shallow, Preparation(), "max_depth = 4 in train, not 3"),
        (task, Preparation(counts=(50, 10, 11)), "samples = 10 in test, not 11"),
    ):
        with pytest.raises(DataError, match=f"{difference}: give --force to make it again, or another --root"):
            prepare(other, tmp_path, how)
    assert index.stat().st_mtime_ns == written
    other = prepare(task, tmp_path, Preparation(seed=5, force=True))
    assert other["train"].fingerprint != first["train"].fingerprint
    assert open_task(task, tmp_path)["test"].fingerprint == other["test"].fingerprint


def test_a_killed_process_is_one_sentence() -> None:
    """As the system does when memory is short."""
    before = set(multiprocessing.active_children())
    samples = accepted_samples(listops.chunk_maker(listops.ListOpsConfig(), 0), 64, workers=2)
    next(samples)
    (set(multiprocessing.active_children()) - before).pop().kill()
    with pytest.raises(DataError, match=r"one of the 2 processes that make samples was killed.*fewer --workers"):
        for _ in samples:
            pass
    assert set(multiprocessing.active_children()) <= before


def test_generated_images_fill_their_frame(tmp_path: Path) -> None:
    task = replace(task_named("pathfinder", short=True), counts=(20, 10, 10))
    started: list[tuple[str, int | None]] = []
    splits = prepare(task, tmp_path, Preparation(), on_start=lambda split, total: started.append((split, total)))
    assert started == [("train", 20), ("val", 10), ("test", 10)]
    for split in splits.values():
        assert split.facts.full
        assert set(split.lengths.reshape(-1).tolist()) == {144}
        assert split.labels(np.arange(split.num_samples)).float().mean() == 0.5
    figures = {row.name: row for row in statistics(splits.values(), published=False)}
    assert figures["majority class"].value == 0.5
    assert figures["samples"].value == 40
    assert all(row.published is None for row in figures.values())


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for name in ("text", "retrieval", "image"):
        with pytest.raises(DataError, match="give --source"):
            prepare(task_named(name), tmp_path, Preparation())
        with pytest.raises(DataError, match="is no folder"):
            prepare(task_named(name), tmp_path, Preparation(source=tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="empty"):
            prepare(task_named(name), tmp_path, Preparation(source=tmp_path / "empty"))


def test_tasks_not_prepared_say_how(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"setformer lra prepare listops --short --root"):
        open_task(task_named("listops", short=True), tmp_path)
    with pytest.raises(DataError, match="--source FOLDER, the folder aclImdb"):
        open_task(task_named("text"), tmp_path)


@pytest.mark.parametrize(("typed", "meant"), [("listop", "listops"), ("path-x", "pathx"), ("retreival", "retrieval")])
def test_unknown_tasks_get_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        task_named(typed)


def test_published_sizes() -> None:
    sizes = {name: task_named(name).counts for name in NAMES}
    assert sizes["listops"] == (96_000, 2_000, 2_000)
    assert sizes["image"] == (45_000, 5_000, 10_000)
    assert sizes["pathfinder"] == sizes["pathx"] == (160_000, 20_000, 20_000)
    lengths = [task_named(name).facts.length for name in NAMES]
    assert lengths == [1999, 4000, 4000, 1024, 1024, 16384]
