"""Samples from public files: CIFAR-10 as an ImageFolder, IMDB as aclImdb or TSV, AAN as TSV pairs. Bytes are tokens.

    SOURCE/train/<class>/*.png …         or SOURCE/*train*.tar.gz, *test*.tar.gz of such folders
    SOURCE/{train,test}/{neg,pos}/*.txt  or SOURCE/train.tsv, SOURCE/{test,dev}.tsv
    SOURCE/*.{train,eval,test}.tsv       label, id, id, text, text; no header

Every reader yields samples in an order that depends on the files' names and contents and on the seed alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.sources.class_folders import LabelledImage, find_images, read_stretch
from dataloaders.tokens import TokenSample
from setformer_dist.core.errors import DataError
from setformer_dist.core.seeding import Purpose, generator

# ITU-R BT.601 in thousandths, as in TensorFlow's and PIL's grey; in integers, so that no rounding hangs on a machine.
_GREY = np.array([299, 587, 114], np.int64)

SENTIMENTS = ("neg", "pos")
_TEXT_COLUMNS = ("text", "sentence", "review")
_LABEL_COLUMNS = ("label", "sentiment")


class GreyImages:
    """The images of one split of an ImageFolder as grey values, row after row.

    Args:
        source: see the top of the file.
        split: "train" or "test".
        side: pixels; images of a multiple of it are averaged down.

    Raises:
        DataError: there are no such images.
    """

    def __init__(self, source: Path, split: str, side: int) -> None:
        self._side = side
        self._scratch = tempfile.TemporaryDirectory(prefix="setformer-")
        found = find_images(*_image_source(source, split), Path(self._scratch.name))
        self._images = found.images
        self.classes = tuple(sorted({image.class_name for image in self._images}))

    def __len__(self) -> int:
        return len(self._images)

    def samples(self, seed: int) -> Iterator[TokenSample]:
        """Yield all samples, mixed by the seed.

        Raises:
            DataError: an image is damaged or of another size.
        """
        labels = {name: label for label, name in enumerate(self.classes)}
        words = generator(Purpose.PACK, seed).bit_generator.random_raw(len(self._images))
        for place in np.argsort(words, kind="stable").tolist():
            image = self._images[place]
            yield TokenSample((self._grey(image),), labels[image.class_name])

    def _grey(self, image: LabelledImage) -> npt.NDArray[np.uint8]:
        stretch, side = image.stretch, self._side
        try:
            pixels = decode(read_stretch(stretch))
        except UndecodableError as error:
            raise DataError(f"image {stretch.name}: {error}") from None
        height, width, _ = pixels.shape
        if height != width or height % side:
            raise DataError(f"image {stretch.name} is {height}x{width} pixels: it must be {side}x{side} or a multiple")
        cell = height // side
        whole = 1000 * cell * cell
        sums = (pixels.astype(np.int64) * _GREY).reshape(side, cell, side, cell, 3).sum((1, 3, 4))
        grey: npt.NDArray[np.uint8] = ((sums + whole // 2) // whole).astype(np.uint8).reshape(-1)
        return grey


def _image_source(source: Path, split: str) -> tuple[Path, str | None]:
    """Return what `find_images` takes: a tar of the split, or the folder with the split's name."""
    tars = sorted(path for path in source.glob(f"*{split}*") if ".tar" in path.name or path.suffix == ".tgz")
    cifar = [path for path in tars if "cifar" in path.name.lower()] or tars
    if (source / split).is_dir():
        return source / split, None
    if len(cifar) == 1:
        return cifar[0], None
    raise DataError(
        f"source {source} holds neither a folder {split!r} of class folders nor one tar named like {split}.tar.gz: "
        "give --source the folder of CIFAR-10's images"
    )


def texts(source: Path, split: str) -> Iterator[TokenSample]:
    """Yield the labelled texts of one split, bytes as tokens.

    Args:
        source: folder of aclImdb, or of TSV files.
        split: "train" or "test".

    Raises:
        DataError: there are no such files, or one is not of the format.
    """
    if (source / split / "neg").is_dir() and (source / split / "pos").is_dir():
        yield from _acl_imdb(source / split)
        return
    names = {"train": ["train.tsv"], "test": ["test.tsv", "dev.tsv"]}[split]
    found = [source / name for name in names if (source / name).is_file()]
    if not found:
        raise DataError(
            f"source {source} holds neither {split}/neg and {split}/pos (aclImdb) nor {' or '.join(names)}: give "
            "--source the folder of the reviews"
        )
    yield from _tsv_texts(found[0])


def _acl_imdb(folder: Path) -> Iterator[TokenSample]:
    for label, name in enumerate(SENTIMENTS):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise DataError(f"{folder / name} holds no .txt files: unpack aclImdb again")
        for path in files:
            yield TokenSample((_bytes(path.read_bytes(), path),), label)


def _tsv_texts(path: Path) -> Iterator[TokenSample]:
    """Read text and label, by a header's names, or from two columns of which one is 0 or 1 throughout."""
    lines = path.read_bytes().splitlines()
    head = (
        [word.strip().strip(b'"').decode(errors="replace").lower() for word in lines[0].split(b"\t")] if lines else []
    )
    text_at = next((i for i, name in enumerate(head) if name in _TEXT_COLUMNS), None)
    label_at = next((i for i, name in enumerate(head) if name in _LABEL_COLUMNS), None)
    if text_at is None or label_at is None:
        label_at = next((i for i, name in enumerate(head) if name in ("0", "1")), None)
        if label_at is None or len(head) != 2:
            raise DataError(
                f"{path} has neither a header with {'/'.join(_TEXT_COLUMNS)} and {'/'.join(_LABEL_COLUMNS)} nor two "
                "columns of text and 0 or 1: make it a TSV of one of these forms"
            )
        text_at = 1 - label_at
    else:
        lines = lines[1:]
    for number, line in enumerate(lines, 1):
        cells = line.split(b"\t")
        label = cells[label_at].strip() if len(cells) > max(text_at, label_at) else b""
        if label not in (b"0", b"1"):
            raise DataError(f"{path}: sample {number} has no label 0 or 1 in column {label_at + 1}")
        yield TokenSample((_bytes(cells[text_at].strip().strip(b'"'), path),), int(label))


def pairs(source: Path, split: str) -> Iterator[TokenSample]:
    """Yield the labelled pairs of documents of one split, bytes as tokens.

    Args:
        source: folder of the three TSV files.
        split: "train", "eval" or "test".

    Raises:
        DataError: there is no such file, or a line is not of the format.
    """
    found = sorted(source.glob(f"*{split}.tsv"))
    if len(found) != 1:
        raise DataError(
            f"source {source} holds {len(found)} files *{split}.tsv where one is needed: give --source the folder of "
            "new_aan_pairs.{train,eval,test}.tsv"
        )
    with found[0].open("rb") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip(b"\r\n").split(b"\t")
            if len(cells) != 5 or cells[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise DataError(f"{found[0]}, line {number}: it is not label (0 or 1), id, id, text, text")
            first, second = (_bytes(cell, found[0]) for cell in cells[3:])
            yield TokenSample((first, second), int(float(cells[0])))


def _bytes(data: bytes, path: Path) -> npt.NDArray[np.uint8]:
    if not data:
        raise DataError(f"{path} holds an empty text: take it out")
    return np.frombuffer(data, np.uint8)
