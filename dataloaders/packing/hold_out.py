"""Holding out: one source becomes a training set and a validation set.

The rule. Each class puts its samples in the order of SHA-256(seed, name), and the first round(share x n) of its n are
held out: at least one and not all, so that both sets have every class; the only sample of a class trains. So a
sample's place depends on the seed, its name and those of its class, and on nothing else: not on machine, moment or
order of files, nor on other classes. Where one sample of a class comes or goes, at most one other of the class changes
sides: an exact share and samples that never move cannot be had together.

The name is the path from the class folder on, the same for a directory and a tar of it; of samples without class
folders the path within the source; of a container's samples their key.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataloaders.packing.finding import FoundOrigin, find_origin
from dataloaders.packing.origins import Origin, Raw
from dataloaders.packing.overlap import overlap
from dataloaders.packing.pack import (
    SCRATCH,
    PackOptions,
    PackResult,
    check_rejects,
    explained,
    finish,
    is_ours,
    is_work,
    write_shards,
)
from dataloaders.pixels.decode import UndecodableError
from dataloaders.sources.index import read_table
from dataloaders.sources.shards import open_split
from dataloaders.storage.whole_folder import check_destination, commit_folder, commit_folders, work_folder, work_name
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.words import counted


@dataclass(frozen=True)
class HoldOut:
    """Which samples are held out.

    Attributes:
        share: of each class, above 0 and below 1.
        seed: another one holds out others.

    Raises:
        ConfigError: a number is out of range.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"--hold-out {self.share:g}: a share is above 0 and below 1, such as 0.1")
        if self.seed < 0:
            raise ConfigError("--hold-out-seed must be at least 0")


def pack_held_out(
    source: Path | str,
    training: Path,
    validation: Path,
    how: HoldOut,
    options: PackOptions | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[PackResult, PackResult]:
    """Pack a source into two splits with the same classes; as `dataloaders.packing.pack.pack_image_folder`.

    Neither gets its name before both are whole. Where a kill came between the two names, the next packing gives the
    validation set its own.

    Args:
        source: what to pack.
        training: folder for what is not held out; must not exist, or be empty, unless `options.force`.
        validation: likewise for what is.
        how: which samples are held out.
        options: how to pack.
        on_start: called with the number of images, once.
        on_progress: called with the number of images done since the last call.

    Returns:
        What was packed for training, and for validation.

    Raises:
        ConfigError: options that cannot be, or one folder within the other.
        DataError: as `pack_image_folder`, or nothing can be held out; or the sets were whole but for a name.
    """
    options = options or PackOptions()
    training, validation = (Path(os.path.abspath(folder)) for folder in (training, validation))  # noqa: PTH100
    if training == validation or training in validation.parents or validation in training.parents:
        raise ConfigError(
            f"--hold-out needs two folders, neither within the other, such as packed/train and packed/val: {training} "
            f"and {validation} are not"
        )
    folders = training, validation
    _name_what_was_whole(training, validation, options.force)
    for folder in folders:
        check_destination(folder, options.force, is_ours)
    with (
        work_folder(training, keep=is_work) as work,
        work_folder(validation, keep=is_work) as held_work,
        explained(*folders),
    ):
        scratch = work / SCRATCH
        scratch.mkdir()
        found = find_origin(source, options.wanted(), scratch)
        try:
            results = _written(found, source, (work, held_work), how, options, on_start, on_progress)
        finally:
            found.origin.close()
        commit_folders((work, training), (held_work, validation))
    trained, held = results
    return trained, replace(held, notes=[*held.notes, *_twins(training, validation)])


def _written(
    found: FoundOrigin,
    source: Path | str,
    works: tuple[Path, Path],
    how: HoldOut,
    options: PackOptions,
    on_start: Callable[[int], None],
    on_progress: Callable[[int], None],
) -> tuple[PackResult, PackResult]:
    """Write both splits into their work folders."""
    parts = _divided(found, source, how)
    total = found.origin.num_samples
    on_start(total)
    written = [write_shards(part, work, options, on_progress) for part, work in zip(parts, works, strict=True)]
    check_rejects([reject for split in written for reject in split.rejected], options, total)  # of both sets at once
    for split in written:
        check_rejects(split.rejected, options, split.found.origin.num_samples)
    top = max(split.top_class for split in written)
    said: dict[str, object] = {"share": how.share, "seed": how.seed}
    trained = finish(written[0], top, {"hold_out": said})
    return trained, finish(written[1], top, {"hold_out": {**said, "training": trained.index.fingerprint}})


def _name_what_was_whole(training: Path, validation: Path, force: bool) -> None:
    """Give the validation set its name where a kill let only the training set have one: it says which that is."""
    try:
        said = read_table(work_name(validation))["options"].get("hold_out", {})
        if said.get("training") != read_table(training)["fingerprint"]:
            return
    except DataError:  # one of the two is not there, or not whole
        return
    with work_folder(validation, keep=lambda work, name: True) as work:
        commit_folder(work, validation)
    if not force:
        raise DataError(
            f"an earlier packing was stopped when both sets were whole and one had no name: {training} and "
            f"{validation} are complete now; replace them with --force"
        )


def is_held_out(samples: Iterable[tuple[int, str]], how: HoldOut) -> npt.NDArray[np.bool_]:
    """Return for each sample whether it is held out, (N,); see the top of this file.

    Args:
        samples: label and name of each.
        how: which are held out.
    """
    begin = hashlib.sha256(b"%d\0" % how.seed)

    def word(name: str) -> int:
        digest = begin.copy()
        digest.update(name.encode(errors="surrogateescape"))
        return int.from_bytes(digest.digest()[:8], "big")

    table = np.fromiter(((label, word(name)) for label, name in samples), [("label", np.int64), ("word", np.uint64)])
    if not len(table):
        return np.zeros(0, bool)
    order = np.lexsort((table["word"], table["label"]))  # by class, and by word within it
    counts = np.bincount(table["label"])
    place = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
    wanted = np.floor(how.share * counts + 0.5).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), np.maximum(counts - 1, 0))
    held = np.empty(len(table), bool)
    held[order] = place < np.repeat(wanted, counts)
    return held


def _divided(found: FoundOrigin, source: Path | str, how: HoldOut) -> tuple[FoundOrigin, FoundOrigin]:
    """Return the samples for training and for validation."""
    held = is_held_out(found.origin.labelled_names(), how)
    if not held.any():
        raise DataError(
            f"--hold-out takes nothing of {source}: none of its classes has two images; add images, or pack it whole"
        )
    training = FoundOrigin(PartOrigin(found.origin, np.flatnonzero(~held)), found.notes, found.left_out)
    return training, FoundOrigin(PartOrigin(found.origin, np.flatnonzero(held)), [])


def _twins(training: Path, validation: Path) -> list[str]:
    """Return a note where images of the validation set have the bytes of one of the training set."""
    splits = open_split(training), open_split(validation)
    try:
        shared = overlap(*splits)
    finally:
        for split in splits:
            split.close()
    if shared is None or not shared.samples:
        return []
    have = counted(shared.samples, "validation image has", "validation images have")
    return [
        f"{have} the bytes of a training image (the first: {shared.first[1]}, {shared.first[0]}): the source holds "
        "them twice; remove one of each"
    ]


@dataclass
class PartOrigin:
    """Some samples of an origin, in their order there.

    Attributes:
        whole: the origin.
        chosen: (N,) rising numbers of the samples in it.
    """

    whole: Origin
    chosen: npt.NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return len(self.chosen)

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole, whether or not they have a sample here."""
        return self.whole.classes

    @property
    def parts(self) -> frozenset[str]:
        """Those of the whole."""
        return self.whole.parts

    def weights(self) -> Iterable[int]:
        """Return the bytes of each sample, as far as they are known beforehand."""
        is_chosen = np.zeros(self.whole.num_samples, bool)
        is_chosen[self.chosen] = True
        return itertools.compress(self.whole.weights(), is_chosen)

    def identity(self, first: int, end: int) -> str:
        """Return a digest of all that decides samples first to end - 1."""
        digest = hashlib.sha256(b"%d" % first)
        for begin, stop in self._runs(first, end):
            digest.update(self.whole.identity(begin, stop).encode())
        return digest.hexdigest()

    def name(self, number: int) -> str:
        """Return a sample's path or key."""
        return self.whole.name(int(self.chosen[number]))

    def labelled_names(self) -> Iterator[tuple[int, str]]:
        """Yield the label and the name of each sample."""
        is_chosen = np.zeros(self.whole.num_samples, bool)
        is_chosen[self.chosen] = True
        return itertools.compress(self.whole.labelled_names(), is_chosen)

    def samples(self, first: int, end: int) -> Iterator[Raw | tuple[str, UndecodableError]]:
        """Yield samples first to end - 1."""
        there = itertools.chain.from_iterable(self.whole.samples(*run) for run in self._runs(first, end))
        for number, sample in enumerate(there, first):
            yield replace(sample, number=number) if isinstance(sample, Raw) else sample

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches of the whole that samples first to end - 1 are, (begin, end) each."""
        chosen = self.chosen[first:end]
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1

    def close(self) -> None:
        """Close the whole."""
        self.whole.close()
