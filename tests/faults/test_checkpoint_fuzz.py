"""Crafted manifests, headers and folders: refused before anything is allocated or opened elsewhere, never accepted."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.errors import DamagedError
from checkpoints.identity import Identity, digest_json
from checkpoints.manager import CheckpointManager
from checkpoints.manifest import read_manifest
from checkpoints.rankfile import open_rank_file
from checkpoints.reader import open_checkpoint, verified
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot

VALUES = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
RANK_FILE = layout.rank_file(0, 1)


def save(root: Path) -> Path:
    fragments = [Fragment(name, "param", 0, tuple(t.shape), t.reshape(-1)) for name, t in VALUES.items()]
    return CheckpointManager(root, Alone(), CheckpointConfig()).save(
        Snapshot(1, fragments, {"x": 1}, {}), Identity(model="m")
    )


@pytest.fixture
def bounded_memory():
    """Let nothing in here allocate more than 2 GiB above what is mapped now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as a forger would: with its hash made right again."""
    path = folder / layout.MANIFEST
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    change(body)
    path.write_text(json.dumps(body | {"sha256": digest_json(body)}))


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path upwards": lambda b: b["files"][0].update(name="../../secret"),
    "an absolute path": lambda b: b["files"][0].update(name="/etc/passwd"),
    "a nul in a name": lambda b: b["files"][0].update(name="a\0b"),
    "a dot": lambda b: b["files"][0].update(name=".."),
    "a million million ranks": lambda b: b["identity"].update(world_size=10**12),
    "no ranks": lambda b: b["identity"].update(world_size=0),
    "minus one rank": lambda b: b["identity"].update(world_size=-1),
    "an enormous size": lambda b: b["files"][0].update(size=2**70),
    "a large size": lambda b: b["files"][0].update(size=2**50),
    "a negative size": lambda b: b["files"][0].update(size=-1),
    "a size that is text": lambda b: b["files"][0].update(size="12"),
    "an unknown digest": lambda b: b["files"][0].update(digest="md5:00"),
    "a short digest": lambda b: b["files"][0].update(digest="xxh3_128:00"),
    "an empty digest": lambda b: b["files"][0].update(digest=""),
    "a file twice": lambda b: b["files"].append(b["files"][0]),
    "a file too few": lambda b: b["files"].pop(),
    "an unknown field": lambda b: b["files"][0].update(extra=1),
    "a negative step": lambda b: b.update(step=-1),
    "a huge step": lambda b: b.update(step=10**30),
    "a step that is true": lambda b: b.update(step=True),
    "files that are no list": lambda b: b.update(files=7),
    "metrics that are no table": lambda b: b.update(metrics=[1]),
    "a metric that is text": lambda b: b.update(metrics={"top1": "x"}),
    "an identity that is null": lambda b: b.update(identity=None),
    "a version that is true": lambda b: b.update(version=True),
    "a version that is text": lambda b: b.update(version="2"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.usefixtures("bounded_memory")
def test_a_forged_manifest_is_refused(tmp_path, forgery):
    folder = save(tmp_path)
    forge_manifest(folder, FORGERIES[forgery])
    with pytest.raises(CheckpointError):
        verified(folder)


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 100_000, b'{"a": 1, "a": 2}', b"\xff", b""]
)
@pytest.mark.usefixtures("bounded_memory")
def test_json_that_would_exhaust_a_reader_is_refused(tmp_path, text):
    folder = save(tmp_path)
    (folder / layout.MANIFEST).write_bytes(text)
    with pytest.raises(DamagedError):
        read_manifest(folder)


def rank_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], first: Any, last: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


META = {"__metadata__": {"shapes": '{"w": [4], "v": [2, 3]}'}}
GOOD = META | {"w|param|0|4": entry("F32", [4], 0, 16)}
HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "a header of gigabytes": rank_file(GOOD, b"\0" * 16, length=2**40),
    "a header of 2^64 bytes": rank_file(GOOD, b"\0" * 16, length=2**64 - 1),
    "a header beyond the end by one": rank_file(GOOD, b"", length=len(json.dumps(GOOD)) + 1),
    "a list": rank_file([], b""),
    "deep": rank_file(b"[" * 100_000, b""),
    "no shapes": rank_file({"w|param|0|4": entry("F32", [4], 0, 16)}, b"\0" * 16),
    "shapes that are no JSON": rank_file({"__metadata__": {"shapes": "{"}}, b""),
    "a shape of 2^60": rank_file({"__metadata__": {"shapes": f'{{"w": [{2**60}]}}'}}, b""),
    "a product of shapes": rank_file({"__metadata__": {"shapes": f'{{"w": [{2**40}, {2**40}]}}'}}, b""),
    "a negative side": rank_file({"__metadata__": {"shapes": '{"w": [-4]}'}}, b""),
    "a thousand sides": rank_file({"__metadata__": {"shapes": json.dumps({"w": [1] * 1000})}}, b""),
    "a key of no fragment": rank_file(META | {"w": entry("F32", [4], 0, 16)}, b"\0" * 16),
    "an unknown parameter": rank_file(META | {"x|param|0|4": entry("F32", [4], 0, 16)}, b"\0" * 16),
    "beyond its parameter": rank_file(META | {"w|param|1|5": entry("F32", [4], 0, 16)}, b"\0" * 16),
    "backwards": rank_file(META | {"w|param|4|0": entry("F32", [4], 0, 16)}, b"\0" * 16),
    "an unknown dtype": rank_file(META | {"w|param|0|4": entry("C64", [4], 0, 16)}, b"\0" * 16),
    "a wrong dtype": rank_file(META | {"w|param|0|4": entry("F64", [4], 0, 16)}, b"\0" * 16),
    "a wrong shape": rank_file(META | {"w|param|0|4": entry("F32", [2, 2], 0, 16)}, b"\0" * 16),
    "offsets that are text": rank_file(META | {"w|param|0|4": entry("F32", [4], "0", "16")}, b"\0" * 16),
    "negative offsets": rank_file(META | {"w|param|0|4": entry("F32", [4], -16, 0)}, b"\0" * 16),
    "offsets beyond the end": rank_file(META | {"w|param|0|4": entry("F32", [4], 0, 16)}, b"\0" * 15),
    "bytes that belong to none": rank_file(GOOD, b"\0" * 17),
    "a gap": rank_file(META | {"w|param|0|4": entry("F32", [4], 4, 20)}, b"\0" * 20),
    "an overlap": rank_file(
        META | {"w|param|0|4": entry("F32", [4], 0, 16), "v|param|0|4": entry("F32", [4], 8, 24)}, b"\0" * 24
    ),
    "a field too many": rank_file(META | {"w|param|0|4": entry("F32", [4], 0, 16) | {"x": 1}}, b"\0" * 16),
    "the same key twice": rank_file(b'{"__metadata__": {"shapes": "{}"}, "__metadata__": {"shapes": "{}"}}', b""),
    "an entry that is null": rank_file(META | {"w|param|0|4": None}, b""),
    "no data_offsets": rank_file(META | {"w|param|0|4": {"dtype": "F32", "shape": [4]}}, b""),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.usefixtures("bounded_memory")
def test_a_crafted_header_is_refused(tmp_path, header):
    path = tmp_path / RANK_FILE
    path.write_bytes(HEADERS[header])
    with pytest.raises(DamagedError), open_rank_file(path):
        pass


def test_the_header_that_the_crafted_ones_vary_is_accepted(tmp_path):
    path = tmp_path / RANK_FILE
    path.write_bytes(rank_file(GOOD, b"\0" * 16))
    with open_rank_file(path) as file:
        assert [(p.name, p.start, p.end) for p in file.pieces] == [("w", 0, 4)]


def test_elements_that_two_fragments_hold_are_refused(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    overlap = META | {"w|param|0|3": entry("F32", [3], 0, 12), "w|param|2|4": entry("F32", [2], 12, 20)}
    (path / RANK_FILE).write_bytes(rank_file(overlap, b"\0" * 20))
    manager = CheckpointManager(tmp_path, Alone(), CheckpointConfig())
    fragments = [Fragment("w", "param", a, (4,), torch.zeros(b - a)) for a, b in ((0, 3), (2, 4))]
    with pytest.raises(CheckpointError, match="holds elements of param of w twice"):
        manager.save(Snapshot(1, fragments, {}, {}), Identity(model="m"))


@pytest.mark.parametrize("name", [RANK_FILE, layout.TRAINER, layout.MANIFEST])
def test_links_and_pipes_are_refused_without_waiting(tmp_path, name):
    folder = save(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="link"):
        verified(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DamagedError, match="not a plain file"):
        verified(folder)


def test_a_folder_that_is_a_link_is_skipped_by_a_resume(tmp_path):
    save(tmp_path / "other")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / "step-00000001").symlink_to(tmp_path / "other" / "step-00000001")
    manager = CheckpointManager(root, Alone(), CheckpointConfig())
    assert manager.newest() is None
    assert "is a link" in manager.skipped[0].reason


def test_an_extra_file_and_swapped_files_are_named(tmp_path):
    folder = save(tmp_path)
    (folder / "note.txt").write_text("x")
    with pytest.raises(DamagedError, match=r"note\.txt does not belong there"):
        verified(folder)
    (folder / "note.txt").unlink()

    def swap(body: dict[str, Any]) -> None:
        a, b = body["files"]
        a["digest"], b["digest"] = b["digest"], a["digest"]

    forge_manifest(folder, swap)
    with pytest.raises(DamagedError, match="it holds what belongs into"):
        verified(folder)


def test_a_file_replaced_after_it_was_verified_is_refused(tmp_path):
    folder = save(tmp_path)
    checkpoint = open_checkpoint(folder)
    path = folder / RANK_FILE
    twin = folder.parent / "twin"
    twin.write_bytes(path.read_bytes())
    twin.rename(path)
    with pytest.raises(DamagedError, match="not the file that was verified"):
        checkpoint.read_full()
    trainer = folder / layout.TRAINER
    trainer.write_bytes(trainer.read_bytes().replace(b"1", b"2"))
    with pytest.raises(DamagedError, match="not the file that was verified"):
        _ = checkpoint.trainer


def fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Change manifest or header at random, hashes made right; return how many were refused and how many accepted.

    Whatever is accepted must hold exactly the elements of the parameters that it claims.
    """
    chance = random.Random(seed)
    manifest, data = (folder / layout.MANIFEST).read_bytes(), (folder / RANK_FILE).read_bytes()
    interesting = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"|",
        b"..",
        b"/",
        b"-1",
        b"9" * 30,
        b"null",
        b"\0",
        b"1e999",
        b"\\u0000",
    ]
    refused = accepted = 0
    path = folder.parent / RANK_FILE
    for _ in range(count):
        in_manifest = chance.random() < 0.4
        text = bytearray(manifest if in_manifest else data[: len(data) - 58])
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            at = chance.randrange(len(text))
            kind = chance.randrange(4)
            if kind == 0:
                text[at] = chance.randrange(256)
            elif kind == 1:
                text[at : at + chance.randrange(1, 9)] = b""
            elif kind == 2:
                text[at:at] = chance.choice(interesting)
            else:
                other = chance.randrange(len(text))
                text[at:at] = text[other : other + chance.randrange(1, 40)]
        try:
            if in_manifest:
                (folder / layout.MANIFEST).write_bytes(with_its_hash(bytes(text)))
                read = read_manifest(folder)
                read.identity.check_same_model(Identity(model="m"))
                assert all(Path(record.name).name == record.name and record.size >= 0 for record in read.files)
                assert len(read.files) == read.identity.world_size + 1
            else:
                path.write_bytes(bytes(text) + data[len(data) - 58 :])
                with open_rank_file(path) as file:
                    held = sum((p.end - p.start) * p.dtype.itemsize for p in file.pieces)
                    assert held == path.stat().st_size - min(
                        (p.offset for p in file.pieces), default=path.stat().st_size
                    )
            accepted += 1
        except CheckpointError:
            refused += 1
    return refused, accepted


def with_its_hash(text: bytes) -> bytes:
    """Make the hash of a manifest right again, where the text is JSON at all."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict):
        return text
    value["sha256"] = digest_json({k: v for k, v in value.items() if k != "sha256"})
    return json.dumps(value).encode()


def test_a_manifest_of_format_version_1_is_still_read_and_verified(tmp_path):
    folder = save(tmp_path)

    def age(body: dict[str, Any]) -> None:
        body["version"] = 1
        for record in body["files"]:
            del record["digest"]
            record["sha256"] = hashlib.sha256((folder / record["name"]).read_bytes()).hexdigest()

    forge_manifest(folder, age)
    checkpoint = verified(folder)
    assert torch.equal(checkpoint.read_full()["w"], VALUES["w"])
    assert checkpoint.trainer == {"x": 1}
    path = folder / RANK_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="its sha256 differs"):
        verified(folder)


@pytest.mark.usefixtures("bounded_memory")
def test_a_few_hundred_random_changes(tmp_path):
    refused, accepted = fuzz(save(tmp_path), 400, seed=1)
    assert refused > 200
    assert refused + accepted == 400


@pytest.mark.drill
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_random_changes(tmp_path, seed):
    refused, accepted = fuzz(save(tmp_path), 1000, seed=100 + seed)
    assert refused > 500
    assert refused + accepted == 1000
