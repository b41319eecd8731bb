"""Tar shards that others made, read header by header: every sample of them, or an error that names the place.

`tarfile` takes a damaged header for the end of the archive, and so does everything that is built on it: one flipped
byte loses the rest of a shard without a word. Here each header's checksum is compared, a shard must end with the
mark of a tar's end, and nothing but zeros may follow. Read are ustar, pax and GNU names and sizes. A hard link is the
member that it names.

    000017.jpg  000017.cls     members of one base name are a sample; their order does not matter
    a/b/000017.seg.png         names are cut at the first dot of the last part, as WebDataset does: key a/b/000017

Only headers are read, labels, and of images as much as says their height and width; or, for checksums and from
storage that reads from end to end alone, everything once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dataloaders.pixels.decode import UndecodableError, image_size
from setformer_dist.core.errors import DataError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)

# Bytes that one look at a local shard takes in: a header, a label and, of most images, height and width.
_WINDOW = 4096

# Height and width of a JPEG may lie behind a thumbnail and colour profiles; if even this says nothing, all is read.
_LONG_HEAD = 1 << 16

# Bodies of pax records, GNU names, labels: what is larger is no such thing.
_LARGEST_TEXT = 1 << 20
_LARGEST_TABLE = 1 << 26

# Members between two signs of life.
_TOLD = 64

# First bytes of files that are no tars but hold one.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Parts by their extension, in the order of preference where a sample has several images.
IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
MASK_PART, BOXES_PART = "mask.png", "boxes.json"
_LABEL_PARTS = ("cls", "json")
LABEL_FIELDS = ("label", "cls", "class")

# As WebDataset cuts names; what has no dot, or only a leading one, belongs to no sample.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)

_REGULAR = (b"0", b"\0", b"7")
_LINK = b"1"
_WITHOUT_DATA = (b"2", b"3", b"4", b"5", b"6")

# No file is larger; what follows such a one would lie beyond what an offset can say.
_LARGEST_FILE = 1 << 62


class Reader(Protocol):
    """A shard's bytes, asked for at rising offsets."""

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the shard's end."""
        ...


class FileReader:
    """A local file, looked at through a window.

    Args:
        file: descriptor.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._end = os.fstat(file).st_size
        self._start = 0
        self._window = b""

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes by a pread, unless the last one had them."""
        start = offset - self._start
        if start >= 0 and start + size <= len(self._window):
            return self._window[start : start + size]
        self._start = offset
        # Room is made for what is there alone, whatever size a header speaks of.
        self._window = os.pread(self._file, max(0, min(max(size, _WINDOW), self._end - offset)), offset)
        return self._window[:size]


class StreamReader:
    """Bytes that come from end to end, hashed on the way; what lies before the last offset is forgotten.

    Args:
        blocks: the bytes.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._start = 0
        self._held = bytearray()
        self._sha256 = hashlib.sha256()
        self.size = 0

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes, once they have come."""
        while self.size < offset + size and (block := next(self._blocks, b"")):
            self._sha256.update(block)
            self.size += len(block)
            self._held += block
            self._forget(offset)
        self._forget(offset)
        return bytes(self._held[:size])

    def digest(self) -> str:
        """Read to the end; return the sha256 of everything."""
        while self.read(self.size, 1 << 20):
            pass
        return self._sha256.hexdigest()

    def _forget(self, offset: int) -> None:
        gone = min(offset - self._start, len(self._held))
        if gone > 0:
            del self._held[:gone]
            self._start += gone


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and the place of its bytes; those of an earlier member for a hard link."""

    name: str
    offset: int
    size: int
    is_link: bool = False


def members(reader: Reader, shown: str, on_header: Callable[[bytes], None] = lambda header: None) -> Iterator[Member]:
    """Yield the regular files of a tar.

    Args:
        reader: of the tar.
        shown: its name, for messages.
        on_header: told every block that is no file's contents.

    Raises:
        DataError: a header is damaged, the tar is cut short, something follows its end, or a hard link leads nowhere.
    """
    place = 0
    files: dict[str, Member] = {}
    long_name: str | None = None
    long_link: str | None = None
    records: dict[str, str] = {}
    shared: dict[str, str] = {}
    while True:
        header = reader.read(place, _BLOCK)
        if len(header) < _BLOCK:
            raise DataError(
                f"shard {shown} ends before byte {place + _BLOCK}, without the mark of a tar's end, so it was cut "
                "short: restore it"
            )
        if header == _ZEROS:
            _check_end(reader, place + _BLOCK, shown)
            return
        if not place:
            _check_plain(header, shown)
        on_header(header)
        kind, size, name = _parsed(header, place, shown)
        body = place + _BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            text = _text(reader, body, size, place, shown)
            on_header(text)
            if kind == b"L":
                long_name = _until_zero(text)
            elif kind == b"K":
                long_link = _until_zero(text)
            elif kind == b"g":
                shared.update(_records(text, place, shown))
            else:
                records = _records(text, place, shown)
        else:
            known = {**shared, **records}
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in known):
                raise DataError(f"shard {shown} has a sparse file at byte {place}, which has no bytes of its own: pack")
            if "size" in known:
                size = _pax_size(known["size"], place, shown)
            name = known.get("path") or long_name or name
            if kind in _REGULAR:
                files[name] = Member(name, body, size)
                yield files[name]
            elif kind == _LINK:
                target = known.get("linkpath") or long_link or _until_zero(header[157:257])
                files[name] = _linked(files.get(target), name, target, place, shown)
                yield files[name]
                size = 0
            elif kind in _WITHOUT_DATA:
                size = 0
            long_name, long_link, records = None, None, {}
        place = body + -(-size // _BLOCK) * _BLOCK


def _linked(target: Member | None, name: str, said: str, place: int, shown: str) -> Member:
    if target is None:
        raise DataError(
            f"shard {shown} has a hard link {name!r} at byte {place} to {said!r}, which is no file before it: pack it "
            "again without links"
        )
    return Member(name, target.offset, target.size, is_link=True)


def _until_zero(text: bytes) -> str:
    return text.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _check_plain(header: bytes, shown: str) -> None:
    packed = next((kind for start, kind in _PACKED.items() if header.startswith(start)), None)
    if packed:
        raise DataError(
            f"shard {shown} is compressed by {packed}, so no sample in it has a place of its own: unpack it"
        )


def _parsed(header: bytes, place: int, shown: str) -> tuple[bytes, int, str]:
    """Return (kind, size, name) of a header whose checksum agrees."""
    try:
        said = _number(header[148:156])
        # The field itself counts as blanks; some old tars summed signed bytes.
        plain = sum(header) - sum(header[148:156]) + 256
        if said != plain:
            high = sum(byte > 127 for byte in header[:148]) + sum(byte > 127 for byte in header[156:])
            if said != plain - 256 * high:
                raise ValueError("its checksum does not agree")
        size = _number(header[124:136])
        if not 0 <= size <= _LARGEST_FILE:
            raise ValueError("its size is negative" if size < 0 else "its size is that of no file")
    except ValueError as error:
        raise DataError(
            f"shard {shown} has a damaged header at byte {place} ({error}), beyond which nothing is sure: restore it"
        ) from None
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], size, name.decode(errors="surrogateescape")


def _number(field: bytes) -> int:
    """Return a number in octal digits, or in base 256 where it is too large for them."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise ValueError("a number in it has other signs than digits")
    return int(digits or b"0", 8)


def _text(reader: Reader, body: int, size: int, place: int, shown: str) -> bytes:
    text = reader.read(body, size) if size <= _LARGEST_TEXT else b""
    if len(text) < size:
        raise DataError(f"shard {shown} has a long name at byte {place} that does not end: restore it")
    return text


def _records(text: bytes, place: int, shown: str) -> dict[str, str]:
    """Return pax records: `length key=value` and a newline each, length counting all of it."""
    records, start = {}, 0
    try:
        while start < len(text) and text[start]:
            length = int(text[start : text.index(b" ", start)])
            record = text[start : start + length]
            key, mark, value = record.partition(b" ")[2].partition(b"=")
            if length < 1 or not mark or len(record) < length or record[-1:] != b"\n":
                raise ValueError
            records[key.decode()] = value[:-1].decode(errors="surrogateescape")
            start += length
    except ValueError:
        raise DataError(f"shard {shown} has a damaged pax header at byte {place}: restore it") from None
    return records


def _pax_size(text: str, place: int, shown: str) -> int:
    # Nineteen digits hold the largest; Python refuses to read thousands of them.
    if not text.isdecimal() or len(text) > 19 or int(text) > _LARGEST_FILE:
        raise DataError(f"shard {shown} has a pax header at byte {place} with size {text[:20]!r}: restore it")
    return int(text)


def _check_end(reader: Reader, place: int, shown: str) -> None:
    while rest := reader.read(place, 1 << 16):
        if rest.strip(b"\0"):
            at = place + len(rest) - len(rest.lstrip(b"\0"))
            raise DataError(
                f"shard {shown} goes on at byte {at} behind an empty header: a damaged header, or tars joined; restore "
                "it or pack it again"
            )
        place += len(rest)


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
    height: int
    width: int


@dataclass(frozen=True)
class Scan:
    """What is in a shard.

    Attributes:
        rows: its samples, in the order of their first members.
        headers: sha256 of all headers: changes with any name, size, place or time in the shard.
        unreadable: keys of images whose height and width could not be read; they got their neighbour's.
    """

    rows: list[Row]
    headers: str
    unreadable: list[str]


def scan(reader: Reader, shown: str, whole: bool, on_progress: Callable[[int], None] = lambda samples: None) -> Scan:
    """Read the headers of a shard.

    Args:
        reader: of the shard.
        shown: its name, for messages.
        whole: read every sample's bytes for its crc32, at rising offsets.
        on_progress: told now and then the members found since the last call.

    Raises:
        DataError: the shard is damaged, has no samples, or has some that cannot be told apart or have no image.
    """
    headers = hashlib.sha256()
    samples: dict[str, Sample] = {}
    looked: dict[tuple[int, str], _Look] = {}
    for count, member in enumerate(members(reader, shown, headers.update), 1):
        if not count % _TOLD:
            on_progress(_TOLD)
        match = _NAME.fullmatch(member.name)
        if match is None or ("/" not in member.name and re.fullmatch(r"__.*__", member.name)):
            continue
        key, part = match[1], match[2].lower()
        sample = samples.setdefault(key, Sample(key))
        if part in sample.parts:
            raise DataError(
                f"shard {shown} holds {member.name!r} twice, so which of them sample {key!r} is cannot be told: pack "
                "it again with one name per sample"
            )
        sample.parts[part] = member
        place = _place_of(member, part)
        if not member.is_link:
            looked[place] = _look(reader, member, part, whole, shown)
        elif place not in looked and place[1]:
            raise DataError(
                f"shard {shown} has a hard link {member.name!r} to a file that is no {part!r} of a sample: pack it "
                "again without links"
            )
    if not samples:
        raise DataError(f"shard {shown} holds no sample (files named <key>.jpg, <key>.cls, ...): leave it out")
    rows, unreadable = _rows(list(samples.values()), looked, shown)
    return Scan(rows, headers.hexdigest(), unreadable)


@dataclass(slots=True)
class _Look:
    """What reading a member said: its crc32 or -1; height and width of an image; the label of a label."""

    crc32: int = -1
    size: tuple[int, int] | None = None
    label: int | str | None = None


def _place_of(member: Member, part: str) -> tuple[int, str]:
    """Return where a member's bytes are, and as what they are looked at; "" for parts that are not."""
    if part in IMAGE_PARTS:
        return member.offset, "image"
    return member.offset, part if part in (*_LABEL_PARTS, MASK_PART, BOXES_PART) else ""


def _look(reader: Reader, member: Member, part: str, whole: bool, shown: str) -> _Look:
    look = _Look()
    body = None
    if whole and part in (*IMAGE_PARTS, MASK_PART, BOXES_PART):
        body = _whole(reader, member, shown)
        look.crc32 = zlib.crc32(body)
    if part in IMAGE_PARTS:
        look.size = _image_size(reader, member) if body is None else _size_or_none(body)
    elif part in _LABEL_PARTS:
        if member.size > _LARGEST_TABLE:
            raise DataError(f"shard {shown}: label file {member.name!r} has {member.size} bytes, which is no label")
        look.label = _label(_whole(reader, member, shown), part, member.name, shown)
    return look


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
    for length in (_WINDOW - _BLOCK, _LONG_HEAD):
        head = reader.read(member.offset, min(length, member.size))
        found = _size_or_none(head)
        if found is not None or len(head) >= member.size:
            return found
    return _size_or_none(reader.read(member.offset, member.size))


def _size_or_none(data: bytes) -> tuple[int, int] | None:
    try:
        height, width = image_size(data)
    except UndecodableError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _label(body: bytes, part: str, name: str, shown: str) -> int | str | None:
    """Return the label that a .cls or .json file says; None where a table has no field for it."""
    try:
        text = body.decode()
        said = json.loads(text) if part == "json" else text.strip()
    except (ValueError, RecursionError):
        raise DataError(
            f"shard {shown}: label file {name!r} is not readable as {part}: restore or pack it again"
        ) from None
    if part == "json":
        said = next((said[name] for name in LABEL_FIELDS if name in said), None) if isinstance(said, dict) else said
    if said is None or (isinstance(said, int) and not isinstance(said, bool)):
        return said
    if isinstance(said, str) and said:
        return int(said) if re.fullmatch(r"[+-]?\d{1,18}", said) else said
    shown_as = said if isinstance(said, str) else reprlib.repr(said)  # which goes into no depth
    raise DataError(
        f"shard {shown}: label file {name!r} says {shown_as[:40]!r}, which is neither a number nor a class name"
    )


def _rows(samples: list[Sample], looked: dict[tuple[int, str], _Look], shown: str) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    unreadable: list[str] = []
    sizes: list[tuple[int, int] | None] = []
    for sample in samples:
        image = next((sample.parts[part] for part in IMAGE_PARTS if part in sample.parts), None)
        if image is None:
            raise DataError(_why_no_image(sample, shown))
        sizes.append(looked[image.offset, "image"].size)
        if sizes[-1] is None:
            unreadable.append(sample.key)
    some = next((size for size in sizes if size is not None), None)
    if some is None:
        raise DataError(f"shard {shown} holds {len(samples)} samples, of which none has a readable image: restore it")
    for sample, size in zip(samples, sizes, strict=True):
        some = size or some  # the neighbour's: such an image is found damaged when it is read, and replaced
        image = next(sample.parts[part] for part in IMAGE_PARTS if part in sample.parts)
        labels = [looked[sample.parts[part].offset, part].label for part in _LABEL_PARTS if part in sample.parts]
        rows.append(
            Row(
                sample.key,
                next((label for label in labels if label is not None), None),
                _place(image, "image", looked),
                _place(sample.parts.get(MASK_PART), MASK_PART, looked),
                _place(sample.parts.get(BOXES_PART), BOXES_PART, looked),
                *some,
            )
        )
    return rows, unreadable


def _place(member: Member | None, part: str, looked: dict[tuple[int, str], _Look]) -> tuple[int, int, int]:
    return (0, 0, 0) if member is None else (member.offset, member.size, looked[member.offset, part].crc32)


def _why_no_image(sample: Sample, shown: str) -> str:
    for part in sample.parts:
        inner = part.rpartition(".")
        if inner[0] and inner[2] in IMAGE_PARTS and part != MASK_PART:
            return (
                f"shard {shown} holds {sample.key + '.' + part!r}, a key with a dot: names are cut at the first dot "
                f"(as by WebDataset), so it is part {part!r} of sample {sample.key!r}, which has no image; rename it, "
                "or pack the images with `setformer data pack`"
            )
    return (
        f"shard {shown} has no image ({', '.join(IMAGE_PARTS)}) for sample {sample.key!r}, only "
        f"{', '.join(sorted(sample.parts))}: images of other formats are not read, so convert it, or pack it again"
    )
