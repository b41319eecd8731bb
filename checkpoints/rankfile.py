"""The file that one rank writes: fragments in the safetensors format, written and read by our own few lines.

    8 bytes  length of the header, little endian
    header   JSON: {"__metadata__": {"shapes": ...}, key: {"dtype", "shape", "data_offsets"}}, padded by spaces
    tensors  one after the other, widest element type first, so that each is aligned

The library's writer wants a second copy of all bytes in memory and leaves hashing to a second pass; its reader maps
files and takes what it is given. Here a header is believed only as far as it fits the file: its length against the
file's size before it is read, every tensor against its dtype and shape, the tensors against each other (no gap, no
overlap), every key against its parameter's shape. Nothing is allocated by a number that was not checked.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.digest import Digest, Seen, opened
from checkpoints.disk import Disk
from checkpoints.errors import DamagedError
from checkpoints.manifest import FileRecord
from checkpoints.strictjson import parse
from setformer_dist.core.fragments import Fragment

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ALIGNMENT = 8
MAX_HEADER = 32 << 20  # some 300,000 fragments of a rank; the safetensors library's own limit is 100 MB
_MAX_NUMEL = 2**48
_KEY = re.compile(r"(?s:(.+))\|([A-Za-z0-9_.]{1,64})\|(0|[1-9]\d{0,14})\|([1-9]\d{0,14})")
_CHUNK = 8 << 20


def fragment_key(fragment: Fragment) -> str:
    """Return the key of a fragment in a rank file."""
    return f"{fragment.name}|{fragment.state}|{fragment.start}|{fragment.end}"


# Writing.


class Layout:
    """Where the fragments of a rank lie in its file.

    Args:
        fragments: those of one rank.

    Raises:
        ValueError: two fragments have one key or overlap, one leaves its parameter, or a dtype cannot be stored.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        _check(fragments)
        full = [f for f in fragments if f.tensor.numel()]
        full.sort(key=lambda f: (-f.tensor.element_size(), fragment_key(f)))
        self.placed: list[tuple[int, Fragment]] = []
        # Shapes of empty fragments count too: a reader must know each parameter that the writer had.
        shapes = {f.name: list(f.shape) for f in fragments}
        header: dict[str, object] = {"__metadata__": {"shapes": json.dumps(shapes)}}
        offset = 0
        for fragment in full:
            numel = fragment.tensor.numel()
            end = offset + numel * fragment.tensor.element_size()
            dtype = DTYPES[fragment.tensor.dtype]
            header[fragment_key(fragment)] = {"dtype": dtype, "shape": [numel], "data_offsets": [offset, end]}
            self.placed.append((offset, fragment))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.header = struct.pack("<Q", len(text)) + text
        self.nbytes = offset

    def live(self) -> Iterator[memoryview]:
        """Yield the tensors' bytes in file order; at most one is copied to the host at a time."""
        for _, fragment in self.placed:
            host = fragment.tensor.detach().to("cpu").contiguous().reshape(-1)
            yield host.view(torch.uint8).numpy().data

    def copy_to(self, image: torch.Tensor) -> None:
        """Copy all tensors to where they lie in the file.

        Args:
            image: uint8 on the host, of at least `nbytes` elements; when this returns it is filled.
        """
        for offset, fragment in self.placed:
            tensor = fragment.tensor.detach()
            place = image[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype)
            place.copy_(tensor.reshape(-1), non_blocking=True)
        for device in {f.tensor.device for _, f in self.placed if f.tensor.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)


def host_memory(nbytes: int) -> torch.Tensor:
    """Return uninitialised bytes of the host, in huge pages where the system has them.

    The first save of a process fills memory that the system gives out while training waits: in pages of 2 MiB and not
    of 4 KiB that takes a fraction of the time (docs/decisions.md, "Copies have the layout of the file").
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def image_parts(image: torch.Tensor, nbytes: int) -> Iterator[memoryview]:
    """Yield the first bytes of a filled image, in pieces that a write and a digest take at once."""
    data = image.numpy().data
    for first in range(0, nbytes, _CHUNK):
        yield data[first : min(first + _CHUNK, nbytes)]


def _check(fragments: Iterable[Fragment]) -> None:
    held: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for fragment in fragments:
        key = fragment_key(fragment)
        if (fragment.start, fragment.end) in held[fragment.name, fragment.state]:
            raise ValueError(f"fragment {key} was given twice")
        held[fragment.name, fragment.state].append((fragment.start, fragment.end))
        if fragment.start < 0 or fragment.end > fragment.full_numel:
            raise ValueError(f"fragment {key} leaves its parameter of shape {fragment.shape}")
        if fragment.tensor.dtype not in DTYPES:
            raise ValueError(f"fragment {key} has dtype {fragment.tensor.dtype}, which cannot be stored")


def write_rank_file(disk: Disk, path: Path, header: bytes, parts: Iterable[memoryview]) -> FileRecord:
    """Write header and tensors and make them durable; the digest is taken of the bytes as they go out.

    Raises:
        OSError: the file could not be written in full.
    """
    digest = Digest()
    size = 0
    with disk.create(path) as file:
        for part in _chained(header, parts):
            disk.write(file, part)
            digest.update(part)
            size += len(part)
        disk.sync(file)
    return FileRecord(name=path.name, size=size, digest=digest.text())


def _chained(header: bytes, parts: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    yield header
    yield from parts


def write_bytes(disk: Disk, path: Path, data: bytes) -> FileRecord:
    """Write a small file and make it durable.

    Raises:
        OSError: the file could not be written in full.
    """
    return write_rank_file(disk, path, data, ())


# Reading.


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of one state of one parameter, and where in a file they are."""

    name: str
    state: str
    start: int
    end: int
    dtype: torch.dtype
    offset: int


class RankFile:
    """An open rank file whose header was checked.

    Attributes:
        shapes: of every parameter that the writer had, by name.
        pieces: what the file holds.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self.seen = Seen.of(descriptor)
        header, data_start = _read_header(descriptor, self.seen.size, name)
        self.shapes = _shapes(header.pop("__metadata__", None), name)
        self.pieces = [_piece(key, value, self.shapes, data_start, name) for key, value in header.items()]
        _refuse_gaps(header, self.seen.size - data_start, name)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the file from `offset` on.

        Raises:
            DamagedError: the file has become shorter.
        """
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done : done + _CHUNK]], offset + done)
            if not count:
                raise DamagedError(f"{self.name} became shorter while it was read")
            done += count

    def check_unchanged(self) -> None:
        """Compare the file with what it was when it was opened.

        Raises:
            DamagedError: another process has written to it since.
        """
        if Seen.of(self._descriptor) != self.seen:
            raise DamagedError(f"{self.name} changed while it was read")


@contextlib.contextmanager
def open_rank_file(path: Path) -> Iterator[RankFile]:
    """Open a rank file.

    Raises:
        DamagedError: it is missing, no plain file, or its header does not fit it.
        OSError: it cannot be read.
    """
    with opened(path) as descriptor:
        yield RankFile(descriptor, path.name)


def _read_header(descriptor: int, size: int, name: str) -> tuple[dict[str, object], int]:
    start = os.pread(descriptor, 8, 0)
    if len(start) < 8:
        raise DamagedError(f"{name} is too short for a rank file")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MAX_HEADER):
        raise DamagedError(f"{name} claims a header of {length} bytes, more than it holds or may hold")
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length and (count := os.preadv(descriptor, [view[done:]], 8 + done)):
        done += count
    if done < length:
        raise DamagedError(f"{name} became shorter while it was read")
    header = parse(bytes(data), f"the header of {name}")
    if not isinstance(header, dict):
        raise DamagedError(f"the header of {name} is not an object")
    return header, 8 + length


def _shapes(metadata: object, name: str) -> dict[str, tuple[int, ...]]:
    text = metadata.get("shapes") if isinstance(metadata, dict) else None
    shapes = parse(text.encode(), f"the list of shapes in {name}") if isinstance(text, str) else None
    if not isinstance(shapes, dict):
        raise DamagedError(f"the header of {name} has no list of shapes")
    for parameter, shape in shapes.items():
        if (
            not isinstance(shape, list)
            or len(shape) > 32
            or not all(type(side) is int and 0 <= side <= _MAX_NUMEL for side in shape)
            or math.prod(shape) > _MAX_NUMEL
        ):
            raise DamagedError(f"{name} gives {parameter[:200]!r} an impossible shape")
    return {parameter: tuple(shape) for parameter, shape in shapes.items()}


def _piece(key: str, value: Any, shapes: dict[str, tuple[int, ...]], data_start: int, name: str) -> Piece:
    match = _KEY.fullmatch(key)
    if match is None:
        raise DamagedError(f"{name} has a tensor of no fragment's name, {key[:200]!r}")
    parameter, state, start, end = match[1], match[2], int(match[3]), int(match[4])
    shape = shapes.get(parameter)
    if shape is None or not start < end <= math.prod(shape):
        raise DamagedError(f"{name}: fragment {key[:200]!r} is not of its parameter's shape {shape}")
    dtype = _BY_NAME.get(str(value["dtype"])) if isinstance(value, dict) and set(value) == _FIELDS else None
    offsets = value["data_offsets"] if dtype is not None else None
    if (
        dtype is None
        or value["shape"] != [end - start]
        or not isinstance(offsets, list)
        or [type(offset) for offset in offsets] != [int, int]
        or not 0 <= offsets[0] < offsets[1]
        or offsets[1] - offsets[0] != (end - start) * dtype.itemsize
    ):
        raise DamagedError(f"{name}: fragment {key[:200]!r} has a dtype, shape and place that do not fit")
    return Piece(parameter, state, start, end, dtype, data_start + offsets[0])


_FIELDS = {"dtype", "shape", "data_offsets"}


def _refuse_gaps(header: dict[str, Any], size: int, name: str) -> None:
    """Refuse tensors that share bytes, bytes that belong to none, and tensors beyond the end."""
    position = 0
    for first, last in sorted(value["data_offsets"] for value in header.values()):
        if first != position:
            raise DamagedError(f"{name} has tensors that {'overlap' if first < position else 'leave a gap'}")
        position = last
    if position != size:
        raise DamagedError(f"{name} holds {size} bytes of tensors, its header states {position}")
