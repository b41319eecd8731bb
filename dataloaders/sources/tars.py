"""The samples of external tar shards: members of one base name, with their labels and sizes of images.

    000017.jpg  000017.cls     members of one base name are a sample; their order does not matter
    a/b/000017.seg.png         names are cut at the first dot of the last part, as WebDataset does: key a/b/000017
    000017.1.jpg               a key with a dot: refused, or left out where that is asked for, and never merged

Hidden and system members are skipped at any depth and counted, and so are members that belong to no sample.
Work and memory are bounded by the bytes of the shard: keys beyond `_LONGEST_KEY` bytes are shortened, and larger bodies
are no labels.

Only headers are read (`tar_headers`), labels, and of images as much as says their height and width; or, for checksums
and from storage that reads from end to end alone, everything once.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dataloaders.pixels.decode import ANY_SIZE, UndecodableError, image_size
from dataloaders.pixels.formats import IMAGE_PARTS
from dataloaders.sources.classes import LabelError, decoded, label_of
from dataloaders.sources.files import LARGEST_SAMPLE, parse_json
from dataloaders.sources.passed import Passed, is_ignored, is_visible
from dataloaders.sources.tar_headers import BLOCK, WINDOW, Member, Reader, members
from setformer_dist.core.errors import DataError

# Height and width of a JPEG may lie behind a thumbnail and colour profiles; if even this says nothing, all is read.
_LONG_HEAD = 1 << 16

# Bodies of labels: what is larger is none.
_LARGEST_LABEL = {"cls": 1 << 16, "json": 1 << 22}

# Bytes of a key that the index holds: no more than the header of each sample has, so that the matrix of all keys is
# no larger than the shards, whatever the longest is.
_LONGEST_KEY = 512

# Members between two signs of life.
_PROGRESS_EVERY = 64

MASK_PART, BOXES_PART, SOFT_PART = "mask.png", "boxes.json", "soft.json"
_FURTHER_PARTS = (MASK_PART, BOXES_PART, SOFT_PART)
_LABEL_PARTS = ("cls", "json")
_READ_SUFFIXES = frozenset((*IMAGE_PARTS, *_LABEL_PARTS))
LABEL_FIELDS = ("label", "cls", "class")

# As WebDataset cuts names; what has no dot belongs to no sample.
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)


@dataclass
class Sample:
    """One sample of a shard: its members by extension."""

    key: str
    parts: dict[str, Member] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What the index says of one sample; crc32 are -1 where they were not computed.

    `label` is what the sample says: an int, a class name, or None.
    """

    key: str
    label: int | str | None
    image: tuple[int, int, int]
    mask: tuple[int, int, int]
    boxes: tuple[int, int, int]
    soft: tuple[int, int, int]
    height: int
    width: int


@dataclass(frozen=True)
class Scan:
    """What is in a shard.

    Attributes:
        rows: its samples, in the order of their first members.
        headers: sha256 of all headers: changes with any name, size, place or time in the shard.
        unreadable: keys of images whose height and width could not be read; they got their neighbour's.
        left_out: members and samples that are no whole ones, and why; only where that was asked for.
        passed: members that are not read.
    """

    rows: list[Row]
    headers: str
    unreadable: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    passed: Passed = field(default_factory=Passed)


def scan(
    reader: Reader,
    shown: str,
    whole: bool,
    on_progress: Callable[[int], None] = lambda samples: None,
    skip_bad: bool = False,
) -> Scan:
    """Read the headers of a shard.

    Args:
        reader: of the shard.
        shown: its name, for messages.
        whole: read every sample's bytes for its crc32, at rising offsets.
        on_progress: called now and then with the members found since the last call.
        skip_bad: leave out what is no whole sample, and say so in the result; a shard may then have none at all.

    Raises:
        DataError: the shard is damaged, has no samples, or has some that are ambiguous or have no image.
    """
    return _Scanner(reader, shown, whole, skip_bad).scan(on_progress)


class _Scanner:
    """One shard on its way to rows."""

    def __init__(self, reader: Reader, shown: str, whole: bool, skip_bad: bool) -> None:
        self._reader, self._shown, self._whole, self._skip = reader, shown, whole, skip_bad
        self._samples: dict[str, Sample] = {}
        self._looked: dict[tuple[int, str], _Look] = {}
        self._left_out: list[tuple[str, str]] = []
        self._passed = Passed()
        self._bare: dict[str, str] = {}  # key -> a part of it that is not read; most members of some shards

    def scan(self, on_progress: Callable[[int], None]) -> Scan:
        """Return what is in the shard."""
        headers = hashlib.sha256()
        for count, member in enumerate(members(self._reader, self._shown, headers.update), 1):
            if not count % _PROGRESS_EVERY:
                on_progress(_PROGRESS_EVERY)
            self._take(member)
        for key, part in self._bare.items():
            if key not in self._samples:
                self._refuse(key, f"it has no image, only {part}", _why_no_image(key, [part], self._shown))
        for sample in self._samples.values():
            self._split_dotted(sample)
            self._count_unread(sample)
        whole = [sample for sample in self._samples.values() if self._is_whole(sample)]
        if not whole and not self._skip:
            raise DataError(
                f"shard {self._shown} holds no sample (files named <key>.jpg, <key>.cls, ...): remove it, {_SKIP}"
            )
        rows, unreadable = _rows(whole, self._looked, self._shown) if whole else ([], [])
        return Scan(rows, headers.hexdigest(), unreadable, self._left_out, self._passed)

    def _take(self, member: Member) -> None:
        name = member.name
        if not is_visible(name):
            self._passed.ignore(next(part for part in name.split("/") if part not in ("", ".") and is_ignored(part)))
            return
        match = _NAME.fullmatch(name)
        if match is None:
            self._passed.unread["no suffix"] += 1
            return
        if "/" not in name and re.fullmatch(r"__.*__", name):
            self._passed.others["members of WebDataset's own (__…__)"] += 1
            return
        key, part = match[1], match[2].lower()
        if part.rpartition(".")[2] not in _READ_SUFFIXES:
            self._bare.setdefault(key, part)
            self._passed.unread[f".{part}"] += 1
            return
        sample = self._samples.setdefault(key, Sample(key))
        if part in sample.parts:
            self._refuse(
                name,
                "its name is there twice",
                f"shard {self._shown} holds {name!r} twice, so sample {key!r} is ambiguous: pack "
                f"it again with one name per sample, {_SKIP}",
            )
            return
        sample.parts[part] = member
        place = _place_of(member, part)
        if not member.is_link:
            self._looked[place] = self._look(member, part)
        elif place not in self._looked and place[1]:
            raise DataError(
                f"shard {self._shown} has a hard link {name!r} to a file that is no {part!r} of a sample: pack it "
                "again without links"
            )

    def _look(self, member: Member, part: str) -> _Look:
        look, body = _Look(), None
        if part not in (*IMAGE_PARTS, *_LABEL_PARTS, *_FURTHER_PARTS):
            return look
        limit = _LARGEST_LABEL.get(part, LARGEST_SAMPLE)
        if member.size > limit:
            look.problem = f"{member.name!r} has {member.size} bytes, more than the {limit} that are read"
            return look
        if self._whole and part not in _LABEL_PARTS:
            body = _whole(self._reader, member, self._shown)
            look.crc32 = zlib.crc32(body)
        if part in IMAGE_PARTS:
            look.size = _image_size(self._reader, member) if body is None else _size_or_none(body)
        elif part in _LABEL_PARTS:
            try:
                look.label = _label(_whole(self._reader, member, self._shown), part)
            except LabelError as error:
                look.problem = f"label file {member.name!r} {error}"
        return look

    def _split_dotted(self, sample: Sample) -> None:
        """Take out the parts that are samples of their own whose keys have a dot."""
        if all("." not in part for part in sample.parts):
            return
        has_image = any(part in IMAGE_PARTS for part in sample.parts)
        for part in list(sample.parts):
            prefix, _, suffix = part.rpartition(".")
            if suffix not in IMAGE_PARTS or not prefix or part == MASK_PART:
                continue
            labelled = any(f"{prefix}.{label}" in sample.parts for label in _LABEL_PARTS)
            if has_image and not labelled and not prefix.isdecimal():
                continue  # a second picture of the sample, such as depth.png
            said = _why_dotted(sample, part, self._shown)
            for other in [other for other in sample.parts if other.startswith(f"{prefix}.")]:
                name = sample.parts.pop(other).name
                self._refuse(name, "its key has a dot", said)

    def _count_unread(self, sample: Sample) -> None:
        image = _image_part(sample)
        for part in sample.parts:
            if part in IMAGE_PARTS and part != image:
                self._passed.others["further images of a sample"] += 1
            elif part not in (*IMAGE_PARTS, *_LABEL_PARTS, *_FURTHER_PARTS):
                self._passed.unread[f".{part}"] += 1

    def _is_whole(self, sample: Sample) -> bool:
        if not sample.parts:
            return False
        image = _image_part(sample)
        if image is None:
            what = f"it has no image, only {', '.join(sorted(sample.parts))}"
            self._refuse(sample.key, what, _why_no_image(sample.key, sorted(sample.parts), self._shown))
            return False
        for part in (image, *(part for part in (*_LABEL_PARTS, *_FURTHER_PARTS) if part in sample.parts)):
            problem = self._looked[_place_of(sample.parts[part], part)].problem
            if problem:
                self._refuse(sample.key, problem, f"shard {self._shown}: {problem}: restore or pack it again, {_SKIP}")
                return False
        said = {p: self._looked[_place_of(sample.parts[p], p)].label for p in _LABEL_PARTS if p in sample.parts}
        if (both := _contradiction(said)) is not None:
            what = f"its labels contradict each other: {both}"
            self._refuse(sample.key, what, f"shard {self._shown}, sample {sample.key!r}: {what}: keep one, {_SKIP}")
            return False
        return True

    def _refuse(self, name: str, what: str, message: str) -> None:
        """Leave a member or sample out, or stop at it."""
        if not self._skip:
            raise DataError(message)
        self._left_out.append((name, what))


# What else can be done about an odd member.
_SKIP = "or leave it out (data.skip_bad = true, or --skip-bad)"


@dataclass(slots=True)
class _Look:
    """What reading a member said: its crc32 or -1; height and width of an image; the label of a label; or a problem."""

    crc32: int = -1
    size: tuple[int, int] | None = None
    label: int | str | None = None
    problem: str = ""


def _place_of(member: Member, part: str) -> tuple[int, str]:
    """Return where a member's bytes are, and as what they are looked at; "" for parts that are not."""
    if part in IMAGE_PARTS:
        return member.offset, "image"
    return member.offset, part if part in (*_LABEL_PARTS, *_FURTHER_PARTS) else ""


def _whole(reader: Reader, member: Member, shown: str) -> bytes:
    body = reader.read(member.offset, member.size)
    if len(body) < member.size:
        raise DataError(
            f"shard {shown} ends within {member.name!r} at byte {member.offset + len(body)}, so it was cut short: "
            "restore it"
        )
    return body


def _image_size(reader: Reader, member: Member) -> tuple[int, int] | None:
    """Return (height, width) from as little of an image as has them; None where even all of it does not."""
    for length in (WINDOW - BLOCK, _LONG_HEAD):
        head = reader.read(member.offset, min(length, member.size))
        found = _size_or_none(head)
        if found is not None or len(head) >= member.size:
            return found
    return _size_or_none(reader.read(member.offset, min(member.size, LARGEST_SAMPLE)))


def _size_or_none(data: bytes) -> tuple[int, int] | None:
    try:
        height, width = image_size(data, ANY_SIZE)
    except UndecodableError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _label(body: bytes, part: str) -> int | str | None:
    """Return the label that a .cls or .json file says; None where a table has no field for it.

    Raises:
        LabelError: what is wrong with it, in words.
    """
    try:
        text = decoded(body)
        said = parse_json(text.encode()) if part == "json" else text.strip()
    except ValueError:
        raise LabelError(f"is not readable as {part}") from None
    fields = {name: said[name] for name in LABEL_FIELDS if name in said} if isinstance(said, dict) else {"": said}
    labels: dict[str, int | str | None] = {}
    for name, one in fields.items():
        try:
            labels[name] = label_of(one)
        except LabelError:
            if labels:
                continue  # another field, of something else
            shown_as = one if isinstance(one, str) else reprlib.repr(one)  # which goes into no depth
            raise LabelError(f"says {shown_as[:40]!r}, which is neither a number nor a class name") from None
    if (both := _contradiction(labels)) is not None:
        raise LabelError(f"says {both}: keep one of them")
    return next(iter(labels.values()), None)


def _contradiction(labels: Mapping[str, int | str | None]) -> str | None:
    """Return which two labels of one kind differ, as a number and a name may; None where none do."""
    for kind in (int, str):
        said = {name: label for name, label in labels.items() if isinstance(label, kind)}
        if len(set(said.values())) > 1:
            return " and ".join(f"{name} {label!r}" for name, label in said.items())
    return None


def _image_part(sample: Sample) -> str | None:
    return next((part for part in IMAGE_PARTS if part in sample.parts), None)


def _short(key: str) -> str:
    """Return a key as the index holds it."""
    encoded = key.encode(errors="surrogateescape")
    if len(encoded) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return encoded[: _LONGEST_KEY - 17].decode(errors="surrogateescape") + "~" + digest


def _rows(samples: list[Sample], looked: dict[tuple[int, str], _Look], shown: str) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    unreadable: list[str] = []
    sizes: list[tuple[int, int] | None] = []
    for sample in samples:
        sizes.append(looked[_image_of(sample).offset, "image"].size)
        if sizes[-1] is None:
            unreadable.append(_short(sample.key))
    some = next((size for size in sizes if size is not None), None)
    if some is None:
        raise DataError(f"shard {shown} holds {len(samples)} samples, of which none has a readable image: restore it")
    for sample, size in zip(samples, sizes, strict=True):
        some = size or some  # the neighbour's: such an image is found damaged when it is read, and replaced
        image = _image_of(sample)
        labels = [looked[sample.parts[part].offset, part].label for part in _LABEL_PARTS if part in sample.parts]
        rows.append(
            Row(
                _short(sample.key),
                next((label for label in labels if label is not None), None),
                _place(image, "image", looked),
                _place(sample.parts.get(MASK_PART), MASK_PART, looked),
                _place(sample.parts.get(BOXES_PART), BOXES_PART, looked),
                _place(sample.parts.get(SOFT_PART), SOFT_PART, looked),
                *some,
            )
        )
    return rows, unreadable


def _image_of(sample: Sample) -> Member:
    return next(sample.parts[part] for part in IMAGE_PARTS if part in sample.parts)


def _place(member: Member | None, part: str, looked: dict[tuple[int, str], _Look]) -> tuple[int, int, int]:
    return (0, 0, 0) if member is None else (member.offset, member.size, looked[member.offset, part].crc32)


def _why_dotted(sample: Sample, part: str, shown: str) -> str:
    merged = "which has an image already" if _image_part(sample) else "which has no image"
    return (
        f"shard {shown} holds {sample.key + '.' + part!r}, a key with a dot: names are cut at the first dot "
        f"(as by WebDataset), so it is part {part!r} of sample {sample.key!r}, {merged}; rename it, "
        f"or pack the images with `setformer data pack`, {_SKIP}"
    )


def _why_no_image(key: str, parts: list[str], shown: str) -> str:
    return (
        f"shard {shown} has no image ({', '.join(IMAGE_PARTS)}) for sample {key!r}, only "
        f"{', '.join(parts)}: images of other formats are not read, so convert it, {_SKIP}"
    )
