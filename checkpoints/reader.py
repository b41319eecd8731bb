"""Reading a checkpoint: any ranges of any parameter, from whichever rank files hold them.

A reader never asks how many ranks wrote or under which ZeRO stage: the keys of the rank files say which
elements they hold, and that is enough to fill any other division of the same parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manifest import Manifest, hash_faults, read_manifest, size_faults
from checkpoints.policy import Candidate, best_first
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment

_NAMED = 3  # parameters that an error message names before it only counts


@dataclass(frozen=True)
class Skipped:
    """A folder that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Entry:
    """A line of a listing: a folder with its manifest, or with the reason why it has none that holds."""

    path: Path
    manifest: Manifest | None
    fault: str | None


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    file: str
    key: str


class _RankFiles:
    """All rank files of a checkpoint, opened, and an index of what they hold."""

    def __init__(self, folder: Path, manifest: Manifest, stack: contextlib.ExitStack) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self._folder = folder
        self._files: dict[str, Any] = {}
        for rank in range(manifest.identity.world_size):
            name = layout.rank_file(rank, manifest.identity.world_size)
            self._files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            self._index(name)
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: (piece.start, -piece.end))

    def _index(self, file: str) -> None:
        handle = self._files[file]
        for name, shape in json.loads(handle.metadata()["shapes"]).items():
            if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise CheckpointError(f"{self._folder}: rank files disagree about the shape of {name}")
        for key in handle.keys():  # noqa: SIM118 — a safetensors file, not a dict
            name, state, start, end = key.rsplit("|", 3)
            self.pieces[name, state].append(_Piece(int(start), int(end), file, key))

    @property
    def states(self) -> set[str]:
        return {state for _, state in self.pieces}

    def fill(self, name: str, state: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) into `out`, whatever its device and dtype."""
        position, end = start, start + out.numel()
        for piece in self.pieces[name, state]:
            if piece.start <= position < piece.end:
                stop = min(end, piece.end)
                view = self._files[piece.file].get_slice(piece.key)
                values = view[position - piece.start : stop - piece.start]
                out[position - start : stop - start].copy_(values)
                position = stop
            if position >= end:
                return
        if position < end:
            raise CheckpointError(
                f"{self._folder} lacks elements {position} to {end} of {state} of {name}: it was written by a run "
                "that did not save all ranks; use another checkpoint"
            )

    def dtype(self, name: str, state: str) -> torch.dtype:
        piece = self.pieces[name, state][0]
        values = self._files[piece.file].get_slice(piece.key)[0:0]
        assert isinstance(values, torch.Tensor)
        return values.dtype


class Checkpoint:
    """A verified checkpoint folder. Made by `CheckpointManager.newest` and `open_checkpoint`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def identity(self) -> Identity:
        """What wrote it."""
        return self.manifest.identity

    @property
    def metrics(self) -> dict[str, float]:
        """Latest evaluation at the time of writing."""
        return dict(self.manifest.metrics)

    @cached_property
    def trainer(self) -> dict[str, Any]:
        """The engine's state besides tensors, as it was given to `save`."""
        value = json.loads((self.path / layout.TRAINER).read_bytes())
        assert isinstance(value, dict)
        return value

    def load_into(self, fragments: Iterable[Fragment]) -> None:
        """Fill each fragment's tensor in place, converting to its dtype and device.

        Args:
            fragments: any division of the parameters over any number of ranks.

        Raises:
            CheckpointError: a name, shape, state or range is not in the checkpoint, or a file cannot be read.
        """
        wanted = list(fragments)
        with self._open() as files:
            self._check(files, wanted)
            for fragment in wanted:
                # detach: a live view of a parameter that requires a gradient refuses writes in place.
                files.fill(fragment.name, fragment.state, fragment.start, fragment.tensor.detach())

    def read_full(self, state: str = "param", fallback: str | None = None) -> dict[str, torch.Tensor]:
        """Assemble whole tensors on the CPU, in fp32 where they are floating point.

        Args:
            state: which state, "param" or "ema" for instance.
            fallback: state to take for parameters that lack the first, such as "param" when EMA is partial.

        Returns:
            Parameter name to tensor of the parameter's shape.

        Raises:
            CheckpointError: a parameter has neither state, or a part of one is missing.
        """
        full: dict[str, torch.Tensor] = {}
        with self._open() as files:
            for name, shape in files.shapes.items():
                chosen = next((s for s in (state, fallback) if s and files.pieces.get((name, s))), None)
                if chosen is None and 0 not in shape:
                    raise self._no_state(files, state, name)
                full[name] = self._assemble(files, name, chosen, shape)
        return full

    @staticmethod
    def _assemble(files: _RankFiles, name: str, state: str | None, shape: tuple[int, ...]) -> torch.Tensor:
        if state is None:
            return torch.empty(shape)
        dtype = files.dtype(name, state)
        flat = torch.empty(math.prod(shape), dtype=torch.float32 if dtype.is_floating_point else dtype)
        files.fill(name, state, 0, flat)
        return flat.reshape(shape)

    @contextlib.contextmanager
    def _open(self) -> Iterator[_RankFiles]:
        with contextlib.ExitStack() as stack:
            try:
                files = _RankFiles(self.path, self.manifest, stack)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from error
            yield files

    def _check(self, files: _RankFiles, wanted: Iterable[Fragment]) -> None:
        """Compare names and shapes first, so that a wrong model is named as such before a tensor is touched."""
        different: dict[str, str] = {}
        for fragment in wanted:
            shape = files.shapes.get(fragment.name)
            if shape is None:
                different[fragment.name] = f"{fragment.name} is not in it"
            elif shape != fragment.shape:
                different[fragment.name] = f"{fragment.name} is {shape} there and {fragment.shape} here"
            elif fragment.tensor.numel() and not files.pieces.get((fragment.name, fragment.state)):
                raise self._no_state(files, fragment.state, fragment.name)
        if different:
            more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
            first = "; ".join(list(different.values())[:_NAMED])
            raise CheckpointError(
                f"{self.path} is a checkpoint of another model ({first}{more}): use the config it was trained with, "
                "or a new run folder"
            )

    def _no_state(self, files: _RankFiles, state: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} holds no state {state!r} of {name} (it holds {', '.join(sorted(files.states))}): "
            "switch that state off in the config, or use a checkpoint that has it"
        )


def verify(folder: Path) -> Manifest:
    """Check manifest, sizes and hashes of a folder.

    Raises:
        CheckpointError: with every fault found.
    """
    manifest = read_manifest(folder)
    faults = size_faults(folder, manifest) or hash_faults(folder, manifest.files)
    if faults:
        raise CheckpointError(f"{folder} does not verify: {'; '.join(faults)}")
    return manifest


def list_checkpoints(root: Path, hashes: bool = False) -> list[Entry]:
    """Return every folder named like a checkpoint, newest first.

    Args:
        root: the `checkpoints` folder of a run.
        hashes: also read all bytes; otherwise only manifests and sizes are checked.
    """
    entries = []
    for folder in layout.step_folders(root):
        manifest: Manifest | None = None
        fault: str | None = None
        try:
            manifest = verify(folder) if hashes else read_manifest(folder)
            fault = "; ".join(size_faults(folder, manifest)) or None
        except CheckpointError as error:
            fault = str(error)
        entries.append(Entry(folder, manifest, fault))
    return entries


def open_checkpoint(path: Path, best_by: CheckpointConfig | None = None) -> Checkpoint:
    """Open and verify a checkpoint that a user points to.

    Args:
        path: a step folder, a `checkpoints` folder, or a run folder.
        best_by: in a folder of several, take the best by this metric; otherwise the newest. What does not
            verify is passed over either way.

    Raises:
        CheckpointError: there is none there, or none verifies; all reasons are named.
    """
    if layout.step_of(path) is not None or (path / layout.MANIFEST).exists():
        return Checkpoint(path, verify(path))
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    skipped = []
    for entry in _in_order(list_checkpoints(root), best_by):
        try:
            return Checkpoint(entry.path, verify(entry.path))
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"no checkpoint in {root} verifies: {'; '.join(skipped)}")
    raise CheckpointError(f"{path} holds no checkpoint: name a run folder or one of its step folders")


def _in_order(entries: list[Entry], best_by: CheckpointConfig | None) -> list[Entry]:
    if best_by is None:
        return entries
    by_step = {e.manifest.step: e for e in entries if e.manifest is not None}
    ranked = best_first((Candidate(s, metrics=m.metrics) for s, e in by_step.items() if (m := e.manifest)), best_by)
    first = [by_step[c.step] for c in ranked]
    return first + [e for e in entries if e not in first]
