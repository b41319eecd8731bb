"""From a source that a user names to the samples to be packed, in their final order.

class folders        <class>/…/image.jpg                       a directory, a tar, a compressed tar
images and masks     images/…/a.jpg + annotations/…/a.png      likewise; `--masks annotations`
images and boxes     …/a.jpg + instances.json (COCO)           likewise; `--coco instances.json`
another container    packed split, external shards, .beton      what `dataloaders.opening.open_source` opens
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.catalog import Catalog
from dataloaders.packing.coco import read_coco
from dataloaders.packing.mask_table import MaskTable
from dataloaders.packing.origins import FileOrigin, Origin, SourceOrigin
from dataloaders.source import Source
from dataloaders.sources.class_folders import (
    SPLIT_NAMES,
    Stretch,
    Tree,
    check_class_names,
    list_files,
    plain_source,
    read_class_map,
)
from dataloaders.sources.classes import UNLABELLED, check_numbers_in_place
from dataloaders.sources.files import LARGEST_SAMPLE
from dataloaders.sources.index import INDEX_NAME, read_table
from dataloaders.sources.kinds import kind_of
from dataloaders.sources.passed import Passed
from dataloaders.sources.scanning import left_out_of
from dataloaders.sources.shards import ShardDataset
from dataloaders.sources.slides import SlideFolder
from dataloaders.storage.homes import user_cache
from dataloaders.storage.remote import is_url
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.seeding import Purpose, generator
from setformer_dist.core.words import counted

_IMAGES = "images"


@dataclass(frozen=True)
class Wanted:
    """What is to be taken of a source.

    Attributes:
        split: sub-folder to take.
        masks: name of the folder of masks next to `images`.
        coco: COCO annotations: a file, or the name of one within the source.
        classes_file: class map to use.
        classes_from: packed split whose class map to use.
        shuffle_seed: mix the samples by this seed; None keeps their order.
        skip_bad: leave out what of shards of others is no whole sample.
        allow_empty: class folders may hold no image.
        largest: bytes that a file may have.
        labels: whether classes are wanted; without, all images at any depth are of one class.
        slides: level that is read of whole-slide images; None for other images.
        mask_table: what values of masks stand for; it names the classes.
    """

    split: str | None = None
    masks: str | None = None
    coco: str | None = None
    classes_file: Path | None = None
    classes_from: Path | None = None
    shuffle_seed: int | None = None
    skip_bad: bool = False
    allow_empty: bool = False
    largest: int = LARGEST_SAMPLE
    labels: bool = True
    slides: int | None = None
    mask_table: MaskTable | None = None

    def class_map(self) -> tuple[tuple[str, ...], object] | None:
        """Return the class map that was asked for, and where it is from.

        Raises:
            DataError: a packed split and a table of mask values name other classes.
        """
        table = self.mask_table
        if self.classes_from is not None:
            classes = tuple(read_table(self.classes_from)["classes"])
            if table is not None and table.classes != classes:
                raise DataError(
                    f"{table.place} and {self.classes_from} name other classes, or in another order: pack both splits "
                    "with one file for --mask-values"
                )
            return classes, self.classes_from
        if table is not None:
            return table.classes, table.place
        if self.classes_file is not None:
            return read_class_map(self.classes_file), self.classes_file
        return None


@dataclass(frozen=True)
class FoundOrigin:
    """Samples to be packed, what was chosen or skipped, and what was left out of them (name, reason)."""

    origin: Origin
    notes: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)


def find_origin(source: Path | str, wanted: Wanted, scratch: Path) -> FoundOrigin:
    """Find the samples of a source.

    Args:
        source: directory, tar, compressed tar, or a container's folder, file, pattern or URL.
        wanted: what to take of it.
        scratch: existing folder for tables and an unpacked tar; must stay until the samples are packed.

    Raises:
        ConfigError: an option that does not go with such a source.
        DataError: there is no such source, or nothing in it to pack.
    """
    if wanted.slides is None and is_container(source):
        return _container(source, wanted)
    source = Path(source)
    if not source.exists():
        raise DataError(f"source {source} does not exist: name an image folder or a tar of one")
    if wanted.slides is not None:
        return _slides(source, wanted, wanted.slides)
    if wanted.coco:
        return _with_boxes(source, wanted, scratch)
    if wanted.masks:
        return _with_masks(source, wanted, scratch)
    return _class_folders(source, wanted, scratch) if wanted.labels else _unlabelled(source, wanted, scratch)


def is_container(source: Path | str) -> bool:
    """Return whether a source holds samples by number already: a packed split, a .beton file, a pattern of shards."""
    text, path = os.fspath(source), Path(source)
    if "://" in text or path.suffix == ".beton":
        return True
    if not path.exists():
        return "::" in text or any(sign in text for sign in "*{[")
    return (path / INDEX_NAME).is_file() or (path.is_dir() and kind_of(path)[0] == "shards")


def parted(path: Path | str) -> tuple[str, str]:
    """Return the folder or URL, and the name or pattern below it, as a run config gives them."""
    root, _, name = os.fspath(path).rstrip("/").rpartition("/")
    return root or ("/" if os.fspath(path).startswith("/") else "."), name


def open_container(path: Path | str, skip_bad: bool = False) -> Source:
    """Open data by its path, pattern or URL, as training would; copies of .beton files go to the user's cache folder.

    Args:
        path: of the data.
        skip_bad: as `DataConfig.skip_bad`.

    Raises:
        DataError: there is none, or it is damaged.
    """
    root, name = parted(path)
    is_copied = is_url(root) and name.partition("?")[0].endswith(".beton")
    cache = str(user_cache()) if is_copied else ""
    return open_source(root, name, DataConfig(root=root, train=name, val=name, cache=cache, skip_bad=skip_bad))


def _container(source: Path | str, wanted: Wanted) -> FoundOrigin:
    for option, given in (
        ("--split", wanted.split),
        ("--masks", wanted.masks),
        ("--coco", wanted.coco),
        ("--no-labels", not wanted.labels),
    ):
        if given:
            raise ConfigError(f"{option} does not go with {source}, which holds samples and not files")
    return _of_source(open_container(source, wanted.skip_bad), wanted)


def _slides(source: Path, wanted: Wanted, level: int) -> FoundOrigin:
    folder = source / wanted.split if wanted.split else source
    if not folder.is_dir():
        raise DataError(f"--slides reads slides in a folder, and {folder} is none")
    return _of_source(SlideFolder(folder, level, wanted.labels), wanted)


def _of_source(container: Source, wanted: Wanted) -> FoundOrigin:
    classes = wanted.class_map()
    renumber = None
    if classes is not None:
        check_class_names(container.classes, *classes)
        renumber = np.array([classes[0].index(name) for name in container.classes], np.int64)
    order = _order(container.num_samples, wanted)
    origin = SourceOrigin(container, order, classes[0] if classes else container.classes, renumber)
    left_out = left_out_of(container.index) if isinstance(container, ShardDataset) else []
    return FoundOrigin(origin, [], left_out)


def _class_folders(source: Path, wanted: Wanted, scratch: Path) -> FoundOrigin:
    tree = Tree(source)
    listing = _Listing(source, scratch, tree.passed)
    listing.catalog.add_found(file for file in listing.files() if tree.add(file.name))
    depth = tree.class_depth(wanted.split)
    seen: dict[str, int] = {}  # class name -> number, as they come
    listing.catalog.add_files(
        (image, seen.setdefault(name, len(seen)), None)
        for image in listing.catalog.found()
        if (name := tree.class_of(image.name, depth, wanted.split)) is not None
    )
    notes = tree.closing_notes(listing.catalog.num_files())
    tree.check_classes(seen, depth, wanted.split, wanted.allow_empty)
    classes = tuple(sorted(seen))
    if (given := wanted.class_map()) is not None:
        check_class_names(seen, *given)
        classes = given[0]
    else:
        check_numbers_in_place(
            classes,
            f"source {source}: the order of its class folders",
            "give their order with --classes FILE, one name per line, or name them 00, 01, …",
        )
    label_of = {name: label for label, name in enumerate(classes)}
    settled = listing.settled(classes, frozenset(), wanted, [label_of[name] for name in seen])
    return FoundOrigin(replace(settled, above=depth), [*notes, *_said(tree.passed)])


def _unlabelled(source: Path, wanted: Wanted, scratch: Path) -> FoundOrigin:
    tree = Tree(source)
    listing = _Listing(source, scratch, tree.passed)

    def is_wanted(name: str) -> bool:
        return tree.add(name) and (wanted.split is None or wanted.split in name.split("/")[:-1])

    listing.catalog.add_found(file for file in listing.files() if is_wanted(file.name))
    tree.check_images()
    listing.catalog.add_files((image, 0, None) for image in listing.catalog.found())
    if not listing.catalog.num_files():
        raise DataError(f"source {source} has no images in a folder {wanted.split!r}")
    return FoundOrigin(listing.settled((UNLABELLED,), frozenset(), wanted, [0]), _said(tree.passed))


def _with_masks(source: Path, wanted: Wanted, scratch: Path) -> FoundOrigin:
    tree, masks = Tree(source), str(wanted.masks)
    listing = _Listing(source, scratch, tree.passed)
    splits: set[str] = set()

    def is_wanted(name: str) -> bool:
        folders = set(name.split("/")[:-1])
        if not tree.add(name) or not folders & {_IMAGES, masks} or (wanted.split or "") not in {"", *folders}:
            return False
        splits.update(folders & SPLIT_NAMES)
        return True

    catalog = listing.catalog
    catalog.add_found(file for file in listing.files() if is_wanted(file.name))
    tree.check_images()
    if wanted.split is None and len(splits) > 1:
        raise DataError(f"source {source} holds several splits ({', '.join(sorted(splits))}): choose one with --split")
    catalog.add_masks((stem, file) for file in catalog.found() if (stem := _mask_stem(file.name, masks)))
    catalog.add_files(
        (file, 0, _without_suffix(file.name)) for file in catalog.found() if _mask_stem(file.name, masks) is None
    )
    if not catalog.num_files():
        raise DataError(
            f"source {source} has no folder {_IMAGES!r}{f' in {wanted.split!r}' if wanted.split else ''}: "
            f"--masks {masks} wants {_IMAGES}/a.jpg next to {masks}/a.png"
        )
    _check_partners(catalog, source, "mask")
    notes = _unpaired(catalog.without_image("masks"), "mask has", "masks have", "no image")
    given = wanted.class_map()
    settled = listing.settled(given[0] if given else (), frozenset({"mask"}), wanted)
    return FoundOrigin(settled, [*notes, *_said(tree.passed)])


def _said(passed: Passed) -> list[str]:
    return [f"skipped: {line}"] if (line := passed.line()) else []


def _without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _mask_stem(name: str, masks: str) -> str | None:
    """Return the image's path without suffix that a mask belongs to; None for a file that is no mask."""
    parts = _without_suffix(name).split("/")
    if masks not in parts[:-1]:
        return None
    parts[parts.index(masks)] = _IMAGES
    return "/".join(parts)


def _with_boxes(source: Path, wanted: Wanted, scratch: Path) -> FoundOrigin:
    tree = Tree(source)
    listing = _Listing(source, scratch, tree.passed)
    annotations: list[Stretch] = []

    def is_wanted(file: Stretch) -> bool:
        if f"/{file.name}".endswith(f"/{wanted.coco}"):
            annotations.append(file)
        return tree.add(file.name) and (wanted.split is None or wanted.split in file.name.split("/")[:-1])

    catalog = listing.catalog
    catalog.add_found(file for file in listing.files() if is_wanted(file))
    tree.check_images()
    coco = read_coco(_annotations(source, str(wanted.coco), annotations), wanted.class_map())
    catalog.add_boxes(coco.boxes.items())
    named = ((image, catalog.boxes_name(image.name)) for image in catalog.found())
    catalog.add_files((image, 0, name) for image, name in named if name is not None)
    if not catalog.num_files():
        raise DataError(f"no image of {source} is named in {wanted.coco}, which begins with {next(iter(coco.boxes))!r}")
    _check_partners(catalog, source, "boxes")
    alone = catalog.without_image("boxes")
    away = "image of the annotations is", "images of the annotations are", "not in the source"
    notes = [*coco.notes, *_unpaired(alone, *away)]
    if skipped := catalog.num_found() - catalog.num_files():
        tree.passed.others["images that the annotations do not name"] = skipped
    notes += _said(tree.passed)
    return FoundOrigin(listing.settled(coco.classes, frozenset({"boxes"}), wanted), notes)


def _annotations(source: Path, named: str, inside: list[Stretch]) -> Stretch:
    path = Path(named)
    if path.is_file():
        return Stretch(named, 0, path.stat().st_size, named)
    if len(inside) != 1:
        found = f"{len(inside)} files are" if inside else "no file is"
        raise DataError(f"{found} named {named} in {source}: name the COCO annotations by their path")
    return inside[0]


def _check_partners(catalog: Catalog, source: Path, what: str) -> None:
    if twice := catalog.shared_partner():
        raise DataError(
            f"images {twice[0]!r} and {twice[1]!r} of {source} belong to the same {what}: name one split with --split"
        )


def _unpaired(names: list[str], one: str, several: str, what: str) -> list[str]:
    return [f"{counted(len(names), one, several)} {what}, the first {names[0]!r}"] if names else []


class _Listing:
    """The files of a source on their way into a catalog: kept on disk, as there may be many."""

    def __init__(self, source: Path, scratch: Path, passed: Passed) -> None:
        self._source = source
        self._passed = passed
        self._plain = plain_source(source, scratch)
        self._table = scratch / "catalog.sqlite"
        self.catalog = Catalog(self._table, self._plain, new=True)

    def files(self) -> Iterator[Stretch]:
        """Yield every visible file of the source."""
        return list_files(self._source, self._plain, self._passed)

    def settled(
        self, classes: tuple[str, ...], parts: frozenset[str], wanted: Wanted, labels: list[int] | None = None
    ) -> FileOrigin:
        """Return the files that were added as samples in their final order."""
        count = self.catalog.num_files()
        self.catalog.settle(_order(count, wanted), labels)
        self.catalog.close()
        return FileOrigin(self._table, self._plain, count, classes, parts, wanted.largest)


def _order(count: int, wanted: Wanted) -> npt.NDArray[np.int64] | None:
    if wanted.shuffle_seed is None:
        return None
    words = generator(Purpose.PACK, wanted.shuffle_seed).bit_generator.random_raw(count)
    return np.argsort(words, kind="stable")
