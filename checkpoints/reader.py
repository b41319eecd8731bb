"""Reading a checkpoint: any ranges of any parameter, from whichever rank files hold them.

A reader never asks how many ranks wrote or under which ZeRO stage: the keys of the rank files say which
elements they hold, and that is enough to fill any other division of the same parameters. It reads the headers of
all rank files, and of their tensors just the bytes of the ranges asked for.

What is read is what was verified: `verified` notes of every file its inode, size and time of change while its
bytes were hashed, and a file that is another one, or was written to, when it is read or after, is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.digest import Seen, digest_of, read_small
from checkpoints.errors import DamagedError, DeletedError, StorageError
from checkpoints.identity import Identity
from checkpoints.manifest import Examined, Manifest, examine_files, read_manifest, size_faults
from checkpoints.policy import Candidate, State, best_first
from checkpoints.rankfile import Piece, RankFile, open_rank_file
from checkpoints.strictjson import parse
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import KEPT, Fragment
from setformer_dist.core.words import counted, plain

log = logging.getLogger(__name__)

T = TypeVar("T")
WEIGHTS = frozenset({"param", "ema"})  # states that a parameter has also where it does not train
_NAMED = 3  # parameters that an error message names before it only counts
MAX_TRAINER = 16 << 20  # bytes of trainer.json: a config, some ten thousand class names, the losses since a log line
_TRIES = 5  # to read what a run does not delete meanwhile
_SCRATCH = 4 << 20  # bytes read at a time where values must be converted


@dataclass(frozen=True)
class Skipped:
    """A skipped folder, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Entry:
    """A line of a listing.

    Attributes:
        path: the folder.
        manifest: where it could be read.
        fault: why it is not known to be sound, None where it is.
        damaged: the fault is damage; otherwise nothing is known of the bytes (unreadable, a later format, a link).
    """

    path: Path
    manifest: Manifest | None
    fault: str | None
    damaged: bool = False


class _RankFiles:
    """All rank files of a checkpoint, opened, and an index of what they hold."""

    def __init__(self, folder: Path, world_size: int, seen: Mapping[str, Seen], stack: contextlib.ExitStack) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[tuple[str, str], list[tuple[Piece, RankFile]]] = defaultdict(list)
        self._folder = folder
        self._files: list[RankFile] = []
        for rank in range(world_size):
            name = layout.rank_file(rank, world_size)
            file = stack.enter_context(open_rank_file(folder / name))
            if seen.get(name, file.seen) != file.seen:
                raise DamagedError(f"{name} is not the file that was verified")
            self._files.append(file)
            self._index(file)
        for (name, state), held in self.pieces.items():
            held.sort(key=lambda found: found[0].start)
            for (first, _), (second, _) in itertools.pairwise(held):
                if second.start < first.end:
                    raise DamagedError(f"{folder} holds elements of {state} of {name} twice")

    def _index(self, file: RankFile) -> None:
        for name, shape in file.shapes.items():
            if self.shapes.setdefault(name, shape) != shape:
                raise DamagedError(f"{self._folder}: rank files disagree about the shape of {name}")
        for piece in file.pieces:
            self.pieces[piece.name, piece.state].append((piece, file))

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if not name.startswith(KEPT)}

    @property
    def states(self) -> set[str]:
        return {state for name, state in self.pieces if not name.startswith(KEPT)}

    def fill(self, name: str, state: str, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + out.numel()) into `out`, on any device, of any dtype."""
        position, end = start, start + out.numel()
        for piece, file in self.pieces.get((name, state), ()):
            if piece.start <= position < piece.end:
                stop = min(end, piece.end)
                _read(file, piece, position, out[position - start : stop - start])
                position = stop
            if position >= end:
                return
        if position < end:
            raise CheckpointError(
                f"{self._folder} lacks elements {position} to {end} of {state} of {name}: it was written by a run "
                "that did not save all ranks; use another checkpoint"
            )

    def dtype(self, name: str, state: str) -> torch.dtype:
        return self.pieces[name, state][0][0].dtype

    def check_unchanged(self) -> None:
        for file in self._files:
            file.check_unchanged()


def _read(file: RankFile, piece: Piece, position: int, out: torch.Tensor) -> None:
    """Read elements from `position` on into `out`: straight to where it lies if it is what the file holds."""
    offset = piece.offset + (position - piece.start) * piece.dtype.itemsize
    if out.device.type == "cpu" and out.dtype == piece.dtype and out.is_contiguous():
        file.read_into(offset, out.view(torch.uint8).numpy().data)
        return
    step = _SCRATCH // piece.dtype.itemsize
    scratch = torch.empty(min(step, out.numel()), dtype=piece.dtype)
    for first in range(0, out.numel(), step):
        values = scratch[: min(step, out.numel() - first)]
        file.read_into(offset + first * piece.dtype.itemsize, values.view(torch.uint8).numpy().data)
        out[first : first + len(values)].copy_(values)


class Checkpoint:
    """A verified checkpoint folder. Made by `CheckpointManager.newest`, `verified` and `open_checkpoint`.

    Args:
        path: the folder.
        manifest: its manifest.
        seen: what each file was while it was verified.
    """

    def __init__(self, path: Path, manifest: Manifest, seen: Mapping[str, Seen]) -> None:
        self.path = path
        self.manifest = manifest
        self._seen = dict(seen)

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
        record = self.manifest.record(layout.TRAINER)
        try:
            with self._while_it_is_there():
                data = read_small(self.path / layout.TRAINER, MAX_TRAINER)
        except OSError as error:
            raise StorageError(f"{self.path / layout.TRAINER} cannot be read: {error}") from error
        # Hashed again, because these are the bytes that are parsed; format version 1 has another hash.
        if len(data) != record.size or digest_of(data, record.digest.partition(":")[0]) != record.digest:
            raise DamagedError(f"{self.path / layout.TRAINER} is not the file that was verified")
        value = parse(data, str(self.path / layout.TRAINER))
        if not isinstance(value, dict):
            raise DamagedError(f"{self.path / layout.TRAINER} is not an object")
        return value

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, from the headers alone."""
        with self._open() as files:
            return files.parameters

    def states(self) -> dict[str, int]:
        """Return the number of elements held of each state, from the headers alone."""
        counts: dict[str, int] = defaultdict(int)
        with self._open() as files:
            for (name, state), held in files.pieces.items():
                if name.startswith(KEPT):
                    continue
                counts[state] += sum(piece.end - piece.start for piece, _ in held)
        return dict(sorted(counts.items()))

    def check_holds(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        states: Sequence[str],
        fixed: Mapping[str, tuple[int, ...]] | None = None,
        fixed_states: Sequence[str] = (),
    ) -> None:
        """Check by the headers alone that a run with these parameters can be filled.

        Args:
            shapes: of every parameter that trains, by name.
            states: of each of them.
            fixed: shapes of those that do not train. An older checkpoint has none of them.
            fixed_states: of each of these.

        Raises:
            CheckpointError: a parameter has another shape, a state of it is missing in whole or in part, or there
                are parameters that the run does not have.
        """
        with self._open() as files:
            still = {name: shape for name, shape in (fixed or {}).items() if name in files.parameters}
            if more := sorted(files.parameters.keys() - shapes.keys() - still.keys()):
                raise CheckpointError(
                    f"{self.path} holds {counted(len(more), 'parameter')} that this model does not have, such as "
                    f"{more[0]!r}: use the config that it was trained with"
                )
            self._check_trained(files, shapes.keys(), still.keys())
            asked = [*((shapes, state) for state in states), *((still, state) for state in fixed_states)]
            nothing = [Fragment(n, state, 0, shape, torch.empty(0)) for of, state in asked for n, shape in of.items()]
            self._check(files, nothing)
            for fragment in nothing:
                numel = math.prod(fragment.shape)
                held = sum(
                    piece.end - piece.start for piece, _ in files.pieces.get((fragment.name, fragment.state), ())
                )
                if numel and not held:
                    raise self._no_state(files, fragment.state, fragment.name)
                if held < numel:
                    raise DamagedError(
                        f"{self.path} holds {held} of the {numel} elements of {fragment.state} of {fragment.name}"
                    )

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
            files.check_unchanged()

    def read_full(self, state: str = "param", fallback: str | None = None) -> dict[str, torch.Tensor]:
        """Assemble whole tensors on the CPU, in fp32 where they are floating point.

        Args:
            state: which state, "param" or "ema" for instance.
            fallback: state to take for parameters that lack the first, such as "param" when EMA is partial.

        Returns:
            Parameter name to tensor of the parameter's shape; without those that do not train where `state` is one of
            the optimizer, of which they have none.

        Raises:
            CheckpointError: a parameter has neither state, or a part of one is missing.
        """
        return dict(self.iterate_full(state, fallback))

    def iterate_full(self, state: str = "param", fallback: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what `read_full` returns, one parameter at a time."""
        with self._open() as files:
            for name, shape in files.parameters.items():
                chosen = next((s for s in (state, fallback) if s and files.pieces.get((name, s))), None)
                if chosen is None and 0 not in shape:
                    if state not in WEIGHTS and not any(
                        files.pieces.get((name, s)) for s in set(files.states) - WEIGHTS
                    ):
                        continue
                    raise self._no_state(files, state, name)
                yield name, self._assemble(files, name, chosen, shape)
            files.check_unchanged()

    def _assemble(self, files: _RankFiles, name: str, state: str | None, shape: tuple[int, ...]) -> torch.Tensor:
        if state is None:
            return torch.empty(shape)
        numel = math.prod(shape)
        held = sum(piece.end - piece.start for piece, _ in files.pieces[name, state])
        if held < numel:  # before as much is allocated as the header only speaks of
            first = 0
            for piece, _ in files.pieces[name, state]:
                first = piece.end if piece.start == first else first
            raise CheckpointError(
                f"{self.path} lacks elements {first} to {numel} of {state} of {name}: it was written by a run that "
                "did not save all ranks; use another checkpoint"
            )
        dtype = files.dtype(name, state)
        flat = torch.empty(numel, dtype=torch.float32 if dtype.is_floating_point else dtype)
        files.fill(name, state, 0, flat)
        return flat.reshape(shape)

    @contextlib.contextmanager
    def _open(self) -> Iterator[_RankFiles]:
        with self._while_it_is_there(), contextlib.ExitStack() as stack:
            try:
                files = _RankFiles(self.path, self.identity.world_size, self._seen, stack)
            except OSError as error:
                raise StorageError(f"{self.path} cannot be read: {error}") from error
            yield files

    @contextlib.contextmanager
    def _while_it_is_there(self) -> Iterator[None]:
        """Raise DeletedError in place of damage where the checkpoint was deleted; its manifest is deleted first."""
        try:
            yield
        except DamagedError:
            if (self.path / layout.MANIFEST).exists():
                raise
            raise DeletedError(
                f"{self.path} was deleted while it was read, as a run that trains deletes older checkpoints: try "
                "again, or stop the run first"
            ) from None

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

    def _check_trained(self, files: _RankFiles, trained: Iterable[str], fixed: Iterable[str]) -> None:
        """Check that what trains is what trained: by the states of an optimizer, if it keeps any here."""
        optimized = {name for name, state in files.pieces if state not in WEIGHTS and not name.startswith(KEPT)}
        if not optimized:
            return
        no_longer = [f"{name} trained there and does not here" for name in fixed if name in optimized]
        only_weights = {name for name, shape in files.parameters.items() if math.prod(shape)} - optimized
        not_yet = [f"{name} trains here and did not there" for name in trained if name in only_weights]
        if wrong := [*no_longer, *not_yet]:
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            raise CheckpointError(
                f"{self.path} is a checkpoint of another model ({'; '.join(wrong[:_NAMED])}{more}): train the same "
                "parameters (requires_grad), or begin a new run with its weights"
            )

    def _no_state(self, files: _RankFiles, state: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} holds no state {state!r} of {name} (it holds {', '.join(sorted(files.states))}): "
            "switch that state off in the config, or use a checkpoint that has it"
        )


def check_rank_files(folder: Path, world_size: int) -> None:
    """Check that the headers of all rank files fit their files and each other; reads headers only.

    Raises:
        DamagedError: they do not.
        StorageError: they cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            _RankFiles(folder, world_size, {}, stack)
        except OSError as error:
            raise StorageError(f"{folder} cannot be read: {error}") from error


def verified(folder: Path, workers: int = 1, advance: Callable[[int], None] | None = None) -> Checkpoint:
    """Check manifest, sizes and digests of a folder.

    Args:
        folder: of a checkpoint.
        workers: files read at the same time.
        advance: called with the number of bytes after each piece read, from any thread.

    Raises:
        CheckpointError: with every fault found; a DamagedError where it is the bytes that are wrong, a StorageError
            where they cannot be read.
    """
    manifest = read_manifest(folder)
    examined = Examined(faults=size_faults(folder, manifest))
    if not examined.faults:
        examined = examine_files(folder, manifest, manifest.files, workers, advance)
    if examined.faults:
        raise DamagedError(f"{folder} does not verify: {'; '.join(examined.faults)}")
    if examined.unread:
        raise StorageError(f"{folder} cannot be verified: {'; '.join(examined.unread)}")
    check_rank_files(folder, manifest.identity.world_size)
    return Checkpoint(folder, manifest, examined.seen)


def verify(folder: Path) -> Manifest:
    """Check manifest, sizes and digests of a folder and return the manifest; raises as `verified` does."""
    return verified(folder).manifest


def list_checkpoints(root: Path, hashes: bool = False) -> list[Entry]:
    """Return every folder named like a checkpoint, newest first.

    Args:
        root: the `checkpoints` folder of a run.
        hashes: also read all bytes; otherwise only manifests and sizes are checked.
    """
    entries = []
    for folder in layout.step_folders(root):
        manifest: Manifest | None = None
        try:
            if folder.is_symlink():
                raise CheckpointError(f"{folder} is a link, and links are not followed")
            manifest = read_manifest(folder)
            faults = size_faults(folder, manifest)
            if faults:
                raise DamagedError("; ".join(faults))
            if hashes:
                verified(folder)
        except CheckpointError as error:
            entries.append(Entry(folder, manifest, str(error), isinstance(error, DamagedError)))
        else:
            entries.append(Entry(folder, manifest, None))
    return entries


def candidates(entries: Iterable[Entry]) -> list[Candidate]:
    """Return what the retention policy needs to know of a listing."""
    found = []
    for entry in entries:
        step = layout.step_of(entry.path)
        assert step is not None
        state: State = "sound" if entry.fault is None else "damaged" if entry.damaged else "unknown"
        manifest = entry.manifest
        if manifest is None:
            found.append(Candidate(step, state))
        else:
            found.append(Candidate(step, state, manifest.metrics, manifest.tags))
    return found


def checkpoints_folder(path: Path) -> Path:
    """Return the `checkpoints` folder of a run, or the path itself where it is such a folder."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def open_checkpoint(path: Path, best_by: CheckpointConfig | None = None) -> Checkpoint:
    """Open and verify a checkpoint that a user points to.

    Args:
        path: a step folder, a `checkpoints` folder, or a run folder.
        best_by: in a folder of several, take the best by this metric; otherwise the newest. What does not
            verify is skipped either way, with a warning.

    Raises:
        CheckpointError: there is none there, or none verifies; all reasons are named.
    """
    if layout.step_of(path) is not None or (path / layout.MANIFEST).exists():
        return verified(path)
    root = checkpoints_folder(path)
    for _ in range(_TRIES):
        found, passed = _first_sound(_in_order(list_checkpoints(root), best_by))
        if not any(_deleted(entry) for entry, _ in passed):
            break
    skipped = [fault for _, fault in passed]
    if found is not None:
        for fault in skipped:  # the user takes the answer for one of the newest checkpoint
            log.warning("%s; %s is used instead", plain(fault), plain(found.path))
        return found
    if skipped:
        raise CheckpointError(f"no checkpoint in {root} verifies: {'; '.join(skipped)}")
    aside = len(layout.put_aside(root))
    more = f"; {aside} that did not verify are in {root / layout.ASIDE}" if aside else ""
    raise CheckpointError(f"{path} holds no checkpoint: name a run folder or one of its step folders{more}")


def read_kept(path: Path, read: Callable[[], T]) -> T:
    """Return what is read of a checkpoint; of another one where a run has deleted it meanwhile.

    Args:
        path: as `open_checkpoint` takes it. The folder of one step is tried once.
        read: opens a checkpoint there and reads it.

    Raises:
        CheckpointError: as `read` does.
    """
    for _ in range(_TRIES - 1 if layout.step_of(path) is None else 0):
        with contextlib.suppress(DeletedError):
            return read()
    return read()


def _first_sound(entries: list[Entry]) -> tuple[Checkpoint | None, list[tuple[Entry, str]]]:
    """Return the first checkpoint that verifies, and those before it with their faults."""
    passed: list[tuple[Entry, str]] = []
    for entry in entries:
        try:
            return verified(entry.path), passed
        except CheckpointError as error:
            passed.append((entry, str(error)))
    return None, passed


def _deleted(entry: Entry) -> bool:
    """Return whether a checkpoint was deleted after it was listed, as newer ones were saved."""
    return not (entry.path / layout.MANIFEST).exists() and (entry.fault is None or not entry.path.exists())


def _in_order(entries: list[Entry], best_by: CheckpointConfig | None) -> list[Entry]:
    if best_by is None:
        return entries
    by_step = {e.manifest.step: e for e in entries if e.manifest is not None}
    ranked = best_first((Candidate(s, metrics=m.metrics) for s, e in by_step.items() if (m := e.manifest)), best_by)
    first = [by_step[c.step] for c in ranked]
    return first + [e for e in entries if e not in first]
