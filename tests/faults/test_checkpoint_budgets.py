"""The budgets of docs/checkpoints.md: what is larger is refused within bounded memory, and ours is far from it."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import setformer_dist.models  # noqa: F401 - registers the models
from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.manifest import MAX_BYTES
from checkpoints.rankfile import MAX_HEADER
from checkpoints.reader import MAX_TRAINER
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.files import MAX_STATE, read_state
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot
from tests.faults.test_killed_then_damaged import reseal

STATES = ("param", "exp_avg", "exp_avg_sq", "ema")
HEADROOM = 8
ROOM = 1 << 30  # what reading may take above what is mapped


@pytest.fixture
def bounded() -> Iterator[None]:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def saved(root: Path, fragments: list[Fragment] | None = None, trainer: dict[str, object] | None = None) -> Path:
    fragments = fragments or [Fragment("w", "param", 0, (4,), torch.zeros(4))]
    return CheckpointManager(root, Alone(), CheckpointConfig()).save(
        Snapshot(1, fragments, trainer or {"x": 1}, {}), Identity(model="m")
    )


def newest(root: Path) -> object:
    """Return the newest checkpoint whose trainer.json can be read, None where there is none."""
    try:
        return CheckpointManager(root, Alone(), CheckpointConfig()).newest(lambda found: found.trainer)
    except CheckpointError:
        return None


def test_the_largest_checkpoint_of_ours_has_eight_times_the_room(tmp_path: Path) -> None:
    """The registered model of most tensors; 21,841 classes in a script that JSON escapes; losses of 10,000 steps."""
    with torch.device("meta"):
        names = [name for name, _ in timm.create_model("soft_huge_norm").named_parameters()]
    assert len(names) > 1000
    fragments = [Fragment(name, state, 0, (1,), torch.zeros(1)) for name in names for state in STATES]
    classes = [f"n{number:08d} {chr(0x4E00 + number % 20000) * 6}" for number in range(21_841)]
    trainer = {"classes": classes, "run": {"pending_losses": [1.0 / 3 + step for step in range(10_000)]}}
    folder = saved(tmp_path, fragments, trainer)
    header = int.from_bytes((folder / layout.rank_file(0, 1)).read_bytes()[:8], "little")
    assert header * HEADROOM <= MAX_HEADER
    assert (folder / layout.TRAINER).stat().st_size * HEADROOM <= MAX_TRAINER
    assert newest(tmp_path) is not None


@pytest.mark.parametrize(
    "text",
    [
        b'{"x": "' + b"y" * MAX_TRAINER + b'"}',
        b'{"x": [' + b"1," * (MAX_TRAINER // 2 - 100) + b"1]}",
        b'{"x": [' + b"[]," * (MAX_TRAINER // 3 - 100) + b"1]}",
        b"[" * (MAX_TRAINER - 1),
        b"{" + b",".join(b'"%x":0' % key for key in range(MAX_TRAINER // 12)) + b"}",
    ],
    ids=["longer", "numbers", "lists", "depth", "keys"],
)
def test_no_trainer_json_takes_more_than_its_budget(tmp_path: Path, text: bytes, bounded: None) -> None:
    folder = saved(tmp_path)
    reseal(folder, layout.TRAINER, text)
    if len(text) < MAX_TRAINER and text.count(b"[") < 2:  # within the budget: read, in bounded memory
        assert newest(tmp_path) is not None
    else:
        assert newest(tmp_path) is None


@pytest.mark.parametrize("length", [MAX_HEADER + 8, 1 << 62])
def test_no_header_longer_than_its_budget_is_read(tmp_path: Path, length: int, bounded: None) -> None:
    folder = saved(tmp_path)
    name = layout.rank_file(0, 1)
    reseal(folder, name, length.to_bytes(8, "little") + b" " * (MAX_HEADER + 100))
    assert newest(tmp_path) is None


def test_no_manifest_or_state_file_longer_than_its_budget_is_read(tmp_path: Path, bounded: None) -> None:
    folder = saved(tmp_path / "checkpoints")
    with (folder / layout.MANIFEST).open("r+b") as file:
        file.truncate(max(MAX_BYTES, 4 << 30))  # sparse
    assert newest(tmp_path / "checkpoints") is None
    (tmp_path / "guard.json").write_text(json.dumps({"x": 1}))
    os.truncate(tmp_path / "guard.json", max(MAX_STATE, 4 << 30))
    with pytest.raises((ValueError, OSError)):
        read_state(tmp_path / "guard.json")
