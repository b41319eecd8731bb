"""The headers of an external tar, one by one: every regular file in it, or an error that names the place.

`tarfile` takes a damaged header for the end of the archive, and so does everything that is built on it: one flipped
byte loses the rest of a shard without a word. Here each header's checksum is compared, a shard must end with the
mark of a tar's end, and nothing but zeros may follow. Read are ustar, pax and GNU names and sizes. A hard link is the
member that it names. Of a pax header only what is used is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from setformer_dist.core.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)

# Bytes that one look at a local shard takes in: a header, a label and, of most images, height and width.
WINDOW = 4096

# Bodies of pax records and GNU names: what is larger is no such thing.
_LARGEST_TEXT = 1 << 20

# First bytes of files that are no tars but hold one.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Records of pax headers that say anything of a member; of a sparse file's only that there are some.
_USED_RECORDS = frozenset({"path", "linkpath", "size"})
_SPARSE = "GNU.sparse"

_REGULAR = (b"0", b"\0", b"7")
_LINK = b"1"
_SAYING = (b"x", b"X", b"g", b"L", b"K")  # of the file that follows
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
        # Room is made for what is there alone, no matter what size a header states.
        self._window = os.pread(self._file, max(0, min(max(size, WINDOW), self._end - offset)), offset)
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
        on_header: called with every block that is no file's contents.

    Raises:
        DataError: a header is damaged, the tar is cut short, something follows its end, or a hard link leads nowhere.
    """
    place = 0
    files: dict[str, Member] = {}
    said = _Said()
    while True:
        header = reader.read(place, BLOCK)
        if len(header) < BLOCK:
            raise DataError(
                f"shard {shown} ends before byte {place + BLOCK}, without the mark of a tar's end, so it was cut "
                "short: restore it"
            )
        if header == _ZEROS:
            _check_end(reader, place + BLOCK, shown)
            return
        if not place:
            _check_plain(header, shown)
        on_header(header)
        kind, size, name = _parsed(header, place, shown)
        body = place + BLOCK
        if kind in _SAYING:
            text = _text(reader, body, size, place, shown)
            on_header(text)
            said.take(kind, text, place, shown)
        else:
            name, size = said.of(kind, name, size, place, shown)
            if kind in _REGULAR:
                files[name] = Member(name, body, size)
                yield files[name]
            elif kind == _LINK:
                target = said.link or _until_zero(header[157:257])
                files[name] = _linked(files.get(target), name, target, place, shown)
                yield files[name]
                size = 0
            elif kind in _WITHOUT_DATA:
                size = 0
            said.forget()
        place = body + -(-size // BLOCK) * BLOCK


class _Said:
    """What headers say of the file that follows them: GNU's long names, pax records of one file and of all."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {}
        self.forget()

    def forget(self) -> None:
        """Begin with the next file."""
        self._long_name = ""
        self._long_link = ""
        self._records: dict[str, str] = {}

    def take(self, kind: bytes, text: bytes, place: int, shown: str) -> None:
        """Hear such a header, of one of the kinds `_SAYING`."""
        if kind == b"L":
            self._long_name = _until_zero(text)
        elif kind == b"K":
            self._long_link = _until_zero(text)
        elif kind == b"g":
            self._shared.update(_records(text, place, shown))
        else:
            self._records = _records(text, place, shown)

    def of(self, kind: bytes, name: str, size: int, place: int, shown: str) -> tuple[str, int]:
        """Return the file's name and size; those of its own header where nothing else was said."""
        known = {**self._shared, **self._records}
        if kind == b"S" or _SPARSE in known:
            raise DataError(f"shard {shown} has a sparse file at byte {place}, which has no bytes of its own: pack")
        if "size" in known:
            size = _pax_size(known["size"], place, shown)
        return known.get("path") or self._long_name or name, size

    @property
    def link(self) -> str:
        """The file that a hard link names, "" where only its own header says it."""
        return {**self._shared, **self._records}.get("linkpath") or self._long_link


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
        raise DataError(f"shard {shown} is compressed by {packed}, so its samples cannot be read one by one: unpack it")


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
            f"shard {shown} has a damaged header at byte {place} ({error}), and cannot be read beyond it: restore it"
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
            name = _SPARSE if key.startswith(_SPARSE.encode()) else key.decode()
            if name in _USED_RECORDS or name == _SPARSE:
                records[name] = value[:-1].decode(errors="surrogateescape")
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
                f"shard {shown} continues at byte {at} after an empty header: a damaged header, or joined tars; "
                "restore it or pack it again"
            )
        place += len(rest)
