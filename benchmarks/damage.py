"""What loaders do with damaged data: every kind of damage, each loader in a process of its own.

    python -m benchmarks.damage [--json OUT] [--timeout 60]

One shard, image folder and .beton file of 97 pictures are made, damaged in one place each, and read by WebDataset (as
its manual has it, and with its warn_and_continue handler), torchvision's ImageFolder, FFCV where it is built, and
ours. "wrong" are pictures that came but are not what was stored under their label. Damage to pictures ("jpeg") was
there before anything was packed; damage to containers came after.

A loader hangs if it neither answers nor computes for the time-out. One that computes is starved by other programs, or
slow, and waited for ten times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import selectors
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.damage_peers import ANOTHER
from benchmarks.machine import describe
from benchmarks.measure import write
from dataloaders.beton.format import ALLOCATION, FIELD, HEADER, read_table, record_type
from dataloaders.beton.reader import BetonSample, write_beton
from dataloaders.beton.sidecar import sidecar_path
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.pixels.decode import UndecodableError, decode

COUNT, SIZE, HIT = 97, 64, 50
# A process's first answer may take so many times the time-out: it imports, and FFCV compiles.
_STARTS = 4
# A process that computes is waited for so many times the time-out; it does if it gets such a share of one processor.
_PATIENCE = 10
_COMPUTES = 0.005
WEBDATASET = ("WebDataset", "WebDataset, warn and continue")

Pixels = npt.NDArray[np.uint8]
Change = Callable[[bytearray], bytearray]


class Job(NamedTuple):
    """One damaged set: of which table and what it is, where, the true pictures (an .npy file), who reads it."""

    group: str
    kind: str
    path: Path
    truth: Path
    loaders: tuple[str, ...]


def picture(number: int) -> Pixels:
    """Return a smooth picture of its own, of which neighbours differ clearly."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def encoded(pixels: Pixels, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Return an image file."""
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": 90} if kind == "JPEG" else {}
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


# Damage to one picture's file: name -> what becomes of the bytes.
def _zeroed(data: bytes, start: float, end: float) -> bytes:
    first, last = int(len(data) * start), int(len(data) * end)
    return data[:first] + bytes(last - first) + data[last:]


def _silent_bit(data: bytes) -> int:
    """Return a byte of a JPEG of which the lowest bit can be flipped so that no decoder objects to another picture."""
    before = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    for place in range(len(data) // 2, len(data) - 2):
        changed = bytearray(data)
        changed[place] ^= 1
        try:
            after = decode(bytes(changed)).astype(int)
        except UndecodableError:
            continue
        if np.abs(after - before).max() > 2 * ANOTHER:
            return place
    raise ValueError("no such bit")


def _bit(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[_silent_bit(data)] ^= 1
    return bytes(changed)


JPEG_KINDS: dict[str, Callable[[bytes, Pixels], bytes]] = {
    "no start mark": lambda data, pixels: b"\0\0" + data[2:],
    "truncated": lambda data, pixels: data[: len(data) // 2],
    "middle third zeroed": lambda data, pixels: _zeroed(data, 1 / 3, 2 / 3),
    "200 random bytes": lambda data, pixels: (
        data[: len(data) // 2] + np.random.default_rng(0).bytes(200) + data[len(data) // 2 + 200 :]
    ),
    "one bit flipped": lambda data, pixels: _bit(data),
    "empty": lambda data, pixels: b"",
    "an HTML page": lambda data, pixels: b"<html><body>404 Not Found</body></html>",
    "CMYK (not damaged)": lambda data, pixels: encoded(pixels, mode="CMYK"),
    "PNG named .jpg (not damaged)": lambda data, pixels: encoded(pixels, "PNG"),
}


# Damage to a tar: bytes, place of the header of picture HIT's image, size of that image.
def _flipped(data: bytearray, place: int) -> bytearray:
    data[place] ^= 1
    return data


def _put(data: bytearray, place: int, new: bytes) -> bytearray:
    data[place : place + len(new)] = new
    return data


TAR_KINDS: dict[str, Callable[[bytearray, int, int], bytearray]] = {
    "header: one bit flipped": lambda data, at, size: _flipped(data, at + 5),
    "header zeroed": lambda data, at, size: _put(data, at, bytes(512)),
    "header: size is garbage": lambda data, at, size: _put(data, at + 124, b"77777777777\0"),
    "truncated at a header": lambda data, at, size: data[:at],
    "truncated inside a member": lambda data, at, size: data[: at + 512 + size // 2],
    "picture's bytes zeroed": lambda data, at, size: _put(data, at + 512, bytes(size)),
    "one bit of a picture flipped": lambda data, at, size: _flipped(
        data, at + 512 + _silent_bit(bytes(data[at + 512 : at + 512 + size]))
    ),
    "empty file": lambda data, at, size: bytearray(),
}


# Damage to a .beton: bytes, first byte and size of picture HIT.
def _table_at(data: bytearray) -> int:
    return int(np.frombuffer(data, HEADER, 1)["allocations"][0])


BETON_KINDS: dict[str, Callable[[bytearray, int, int], bytearray]] = {
    "start mark zeroed": lambda data, at, size: _put(data, at, b"\0\0"),
    "middle third zeroed": lambda data, at, size: _put(data, at + size // 3, bytes(size // 3)),
    "one bit of a picture flipped": lambda data, at, size: _flipped(
        data, at + _silent_bit(bytes(data[at : at + size]))
    ),
    "last 1000 bytes cut off": lambda data, at, size: data[:-1000],
    "allocation table cut off": lambda data, at, size: data[: _table_at(data)],
    "cut by half": lambda data, at, size: data[: len(data) // 2],
    "allocation table: a place flipped": lambda data, at, size: _flipped(
        data, _table_at(data) + HIT * ALLOCATION.itemsize + 9
    ),
    "allocation table: a size flipped": lambda data, at, size: _flipped(
        data, _table_at(data) + HIT * ALLOCATION.itemsize + 17
    ),
    "records: a place flipped": lambda data, at, size: _flipped(
        data, HEADER.itemsize + 2 * FIELD.itemsize + HIT * record_type().itemsize + 6
    ),
    "records: a width flipped": lambda data, at, size: _flipped(
        data, HEADER.itemsize + 2 * FIELD.itemsize + HIT * record_type().itemsize + 1
    ),
}


def make_jobs(folder: Path) -> list[Job]:
    """Make all damaged sets below a folder."""
    pixels = [picture(number) for number in range(COUNT)]
    files = [encoded(one) for one in pixels]
    truth = folder / "truth.npy"
    np.save(truth, np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files]))
    return [
        *_jpeg_jobs(folder, files, pixels, truth),
        *_tar_jobs(folder, files, truth),
        *_beton_jobs(folder, files, truth),
    ]


def _jpeg_jobs(folder: Path, files: list[bytes], pixels: list[Pixels], truth: Path) -> Iterator[Job]:
    group = "pictures, before packing"
    for number, (kind, change) in enumerate(JPEG_KINDS.items()):
        changed = [*files]
        changed[HIT] = change(files[HIT], pixels[HIT])
        true = truth
        if "not damaged" in kind:  # then what was stored is what must come
            true = folder / f"truth-{number}.npy"
            stored = np.load(truth)
            stored[HIT] = np.asarray(Image.open(io.BytesIO(changed[HIT])).convert("RGB"))
            np.save(true, stored)
        tar = folder / f"jpeg-{number}" / "train-000000.tar"
        _write_tar(tar, changed)
        yield Job(group, kind, tar, true, (*WEBDATASET, "ours, other people's tar"))
        for name in ("ImageFolder", "ours, image folder"):
            images = folder / f"jpeg-{number}" / name
            _write_folder(images, changed)
            yield Job(group, kind, images, true, (name,))


def _tar_jobs(folder: Path, files: list[bytes], truth: Path) -> Iterator[Job]:
    _write_folder(folder / "images", files)
    for number, (kind, change) in enumerate(TAR_KINDS.items()):
        packed = folder / f"tar-{number}"
        pack_image_folder(folder / "images", packed, PackOptions(samples_per_shard=COUNT))
        (tar,) = packed.glob("*.tar")
        data = bytearray(tar.read_bytes())
        at, size = _member(tar, f"{HIT:09d}")
        tar.write_bytes(change(data, at, size))
        yield Job("WebDataset shards, after packing", kind, tar, truth, WEBDATASET)
        yield Job("WebDataset shards, after packing", kind, packed, truth, ("ours",))
        bare = folder / f"bare-tar-{number}" / "train-000000.tar"
        bare.parent.mkdir()
        bare.write_bytes(tar.read_bytes())
        yield Job("WebDataset shards, after packing", kind, bare, truth, ("ours, no index",))


def _beton_jobs(folder: Path, files: list[bytes], truth: Path) -> Iterator[Job]:
    group = ".beton files, after packing"
    for number, (kind, change) in enumerate(BETON_KINDS.items()):
        path = folder / f"beton-{number}" / "train.beton"
        path.parent.mkdir()
        samples = (BetonSample(data, label, SIZE, SIZE) for label, data in enumerate(files))
        write_beton(path, samples, COUNT, classes=tuple(map(str, range(COUNT))))
        table = read_table(path)
        path.write_bytes(change(bytearray(path.read_bytes()), int(table.place[HIT]), int(table.size[HIT])))
        yield Job(group, kind, path, truth, ("FFCV", "ours", "ours by FFCV"))
        bare = folder / f"beton-{number}" / "bare.beton"
        bare.write_bytes(path.read_bytes())
        assert not sidecar_path(bare).exists()
        yield Job(group, kind, bare, truth, ("ours, no index",))


def _write_tar(path: Path, files: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(files):
            for name, content in ((f"{number:09d}.jpg", data), (f"{number:09d}.cls", b"%d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_folder(folder: Path, files: list[bytes]) -> None:
    for number, data in enumerate(files):
        (folder / f"{number:03d}").mkdir(parents=True)
        (folder / f"{number:03d}" / "picture.jpg").write_bytes(data)


def _member(path: Path, start: str) -> tuple[int, int]:
    """Return the place of the header, and the size, of the first member whose name begins so."""
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.startswith(start))
        return member.offset, member.size


def run_loader(loader: str, jobs: list[Job], timeout: float) -> list[dict[str, Any]]:
    """Return a loader's reports on its jobs; one that hangs or dies is started again with the next job."""
    reports: list[dict[str, Any]] = []
    while len(reports) < len(jobs):
        reports += _run_until_it_breaks(loader, jobs[len(reports) :], timeout)
    return reports


def _run_until_it_breaks(loader: str, jobs: list[Job], timeout: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.damage_peers", loader]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([{"path": str(job.path), "truth": str(job.truth)} for job in jobs]))
    process.stdin.close()
    reports: list[dict[str, Any]] = []
    lines = selectors.DefaultSelector()
    lines.register(process.stdout, selectors.EVENT_READ)
    try:
        while len(reports) < len(jobs):
            if silent := _silence(process.pid, lines, timeout if reports else _STARTS * timeout):
                reports.append({"broke": silent})
                break
            line = process.stdout.readline()
            if not line:
                reports.append({"broke": f"its process ended with code {process.wait()}"})
                break
            reports.append(json.loads(line))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return reports


def _silence(process: int, lines: selectors.BaseSelector, limit: float) -> str:
    """Wait for a line; return "" once there is one, else what the process did instead."""
    for turn in range(1, _PATIENCE + 1):
        before = _computed(process)
        if lines.select(limit):
            return ""
        if _computed(process) - before < _COMPUTES * limit:
            return f"hangs (nothing for {turn * limit:.0f} s)"
    return f"timed out: no answer in {_PATIENCE * limit:.0f} s, though it computes"


def _computed(process: int) -> float:
    """Return the processor seconds of a process and its children; 0 of one that is gone."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process)
        for one in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(one.cpu_times()[:4])
    return total


def verdict(report: dict[str, Any]) -> str:
    """Return a report in a few words."""
    if "broke" in report:
        return str(report["broke"])
    if report["said"] and not report["delivered"]:
        return "refused"
    words = [f"{report['delivered']}"]
    if report["wrong"]:
        words.append(f"{report['wrong']} wrong")
    if report["replaced"]:
        words.append(f"{report['replaced']} replaced and named")
    elif report["said"]:
        words.append("then an error")
    elif report["delivered"] < COUNT:
        words.append("then a normal end")
    return ", ".join(words)


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Yield one table per group: a line per kind, a column per loader."""
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        loaders = list(dict.fromkeys(row["loader"] for row in mine))
        table = Table("damage to one", *loaders, title=f"{group}: of {COUNT} pictures came")
        for kind in dict.fromkeys(row["kind"] for row in mine):
            found = {row["loader"]: row["verdict"] for row in mine if row["kind"] == kind}
            table.add_row(kind, *(found.get(loader, "") for loader in loaders))
        yield table


def main() -> None:
    """Make, damage, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/damage.json"))
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of silence after which a loader hangs")
    arguments = parser.parse_args()
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    console = Console()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = make_jobs(Path(folder))
        for loader in dict.fromkeys(loader for job in jobs for loader in job.loaders):
            if "FFCV" in loader and not has_ffcv:
                console.print(f"{loader}: FFCV is not built here (make ffcv)")
                continue
            mine = [job for job in jobs if loader in job.loaders]
            for job, report in zip(mine, run_loader(loader, mine, arguments.timeout), strict=True):
                report["said"] = report.get("said", "").replace(folder, "")
                rows.append(
                    {"group": job.group, "kind": job.kind, "loader": loader, **report, "verdict": verdict(report)}
                )
    console.print(describe())
    for table in tables(rows):
        console.print(table)
    write(arguments.json, {"machine": describe(), "pictures": COUNT, "rows": rows})


if __name__ == "__main__":
    main()
