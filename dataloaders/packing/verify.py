"""Reading data whole: is every byte still what was packed, and does every image decode?

Opening checks sizes and reading checks samples, which is enough to train safely; this is for a copy just made, or
for a disk one doubts. Each damaged thing is named, and the search continues to the end.

    shard      the file is missing, or has another size or sha256 than the index says
    read       the storage does not deliver a sample's bytes
    checksum   a sample's bytes are not those that were packed
    decode     an image, mask or boxes are not whole
    size       an image has other sides than the index says
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.beton.reader import BetonDataset
from dataloaders.helpers import begin_helper, helper_context, lean_start
from dataloaders.packing.finding import open_container, parted
from dataloaders.packing.intake import check
from dataloaders.pixels.decode import UndecodableError
from dataloaders.pixels.depth import MAX_PIXELS
from dataloaders.source import DamagedSampleError, Source
from dataloaders.sources.foreign import find_shards
from dataloaders.sources.index import INDEX_NAME, read_index
from dataloaders.sources.shards import ShardDataset
from dataloaders.storage.base import UnreadableError
from dataloaders.tokens import TOKENS_NAME, open_token_split
from setformer_dist.core.errors import ConfigError, DataError, TransientError

# Samples of one job: a second or so of decoding.
_CHUNK = 1000


@dataclass(frozen=True)
class Damage:
    """One damaged thing.

    Attributes:
        shard: the file it is in; "" where that is not known.
        key: of the sample; "" for a whole file.
        kind: see the top of the file.
        detail: what is wrong, in words.
    """

    shard: str
    key: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Verified:
    """What was read, and what of it is damaged, in the order of the samples.

    Attributes:
        path: as it was named.
        shards: files whose digest was compared.
        samples: samples that were looked at.
        decoded: whether they were decoded too.
        damaged: empty if all is whole.
    """

    path: str
    shards: int
    samples: int
    decoded: bool
    damaged: list[Damage]


@dataclass(frozen=True)
class _Job:
    """Shard `shard`'s digest, or samples first to end - 1."""

    shard: int = -1
    first: int = 0
    end: int = 0
    progress: int = 0


def verify(
    path: Path | str,
    workers: int = 0,
    decode: bool = True,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Verified:
    """Read a packed split, external shards, a .beton file, an image folder or a token split whole.

    Args:
        path: its folder, file, pattern or URL.
        workers: processes; 0 reads in this one.
        decode: decode every sample; else files with a sha256 are compared with it, and samples of others are read.
        on_start: called with the number of samples, once.
        on_progress: called with the number of samples done since the last call.

    Raises:
        ConfigError: `decode` is off, and there is no digest to compare anything with.
        DataError: there is no data of ours, or its index itself is damaged.
        TransientError: a process died.
    """
    if (Path(path) / TOKENS_NAME).is_file():
        return _verify_tokens(Path(path))
    source = _open(path)
    try:
        if not decode and not _has_digests(source):
            raise ConfigError(
                f"{path} has neither checksums nor digests, so without decoding there is nothing to verify: leave out "
                "--no-decode, or make checksums of shards and .beton files by `setformer data index`"
            )
        jobs = list(_jobs(source, decode))
        on_start(source.num_samples)
        results: dict[int, list[Damage]] = {}
        if workers:
            for number, damaged in _in_processes(path, jobs, min(workers, len(jobs)), decode):
                results[number] = damaged
                on_progress(jobs[number].progress)
        else:
            for number, job in enumerate(jobs):
                results[number] = _work(source, job, decode)
                on_progress(job.progress)
        shards = sum(job.shard >= 0 for job in jobs)
        damaged = [damage for number in range(len(jobs)) for damage in results[number]]
        return Verified(str(path), shards, source.num_samples, decode, damaged)
    finally:
        source.close()


def unreadable(path: Path | str, error: DataError) -> Verified:
    """Return what there is to say of data whose index itself is damaged.

    Raises:
        ConfigError: there is no index, so that was no data of ours.
    """
    if not _is_data(Path(path)):
        raise ConfigError(str(error)) from None
    return Verified(str(path), 0, 0, False, [Damage(str(path), "", "shard", str(error))])


def _is_data(path: Path) -> bool:
    """Return whether there is data of some kind at a path, damaged or not."""
    if path.is_file():
        return path.suffix == ".beton"
    if any((path / name).exists() for name in (INDEX_NAME, TOKENS_NAME)):
        return True
    try:
        return bool(find_shards(*parted(path), timeout=1.0).names)
    except DataError:
        return False


def verify_split(
    folder: Path,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Compare every shard of a packed split with its sha256.

    Returns:
        The number of shards, all of them whole.

    Raises:
        DataError: naming every shard that differs, or as `verify`.
    """
    found = verify(folder, decode=False, on_start=on_start, on_progress=on_progress)
    if found.damaged:
        names = ", ".join(damage.shard for damage in found.damaged)
        raise DataError(
            f"{len(found.damaged)} of {found.shards} shards in {folder} do not have the sha256 they were packed "
            f"with: restore {names}, or pack the split again"
        )
    return found.shards


def _open(path: Path | str) -> Source:
    """Open data without refusing it for a shard that is missing or cut short: that is what is to be found."""
    folder = Path(path)
    if (folder / INDEX_NAME).is_file():
        return ShardDataset(folder, read_index(folder), sleep=_no_wait)
    return open_container(path)


def _no_wait(seconds: float) -> None:
    """Try again at once: a read that fails here is damage to be named."""


def _jobs(source: Source, decode: bool) -> Iterator[_Job]:
    shards = source.shards
    number_of_shards = int(shards[-1]) + 1
    starts = np.searchsorted(shards, np.arange(number_of_shards + 1))
    for shard, (first, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        hashed = isinstance(source, ShardDataset) and bool(source.index.shards[shard].sha256)
        if hashed:
            yield _Job(shard=shard, progress=0 if decode else end - first)
        if decode or not hashed:
            for start in range(first, end, _CHUNK):
                stop = min(end, start + _CHUNK)
                yield _Job(first=start, end=stop, progress=stop - start)


def _has_digests(source: Source) -> bool:
    """Return whether anything was kept that bytes can be compared with."""
    if isinstance(source, ShardDataset):
        return "crc32" in source.index.columns or any(shard.sha256 for shard in source.index.shards)
    return isinstance(source, BetonDataset) and source.sidecar is not None


def _work(source: Source, job: _Job, decode: bool) -> list[Damage]:
    if job.shard >= 0:
        assert isinstance(source, ShardDataset)
        return _check_shard(source, job.shard)
    return [damage for sample in range(job.first, job.end) for damage in _check_sample(source, sample, decode)]


def _check_shard(source: ShardDataset, number: int) -> list[Damage]:
    facts = source.index.shards[number]
    sha256, size = hashlib.sha256(), 0
    try:
        for block in source.storage.blocks(facts.name):
            sha256.update(block)
            size += len(block)
    except UnreadableError as error:
        return [Damage(facts.name, "", "shard", f"it {error.what}")]
    if size != facts.size:
        return [Damage(facts.name, "", "shard", f"it has {size} bytes, {facts.size} when it was packed")]
    if sha256.hexdigest() != facts.sha256:
        return [Damage(facts.name, "", "shard", "it does not have the sha256 it was packed with")]
    return []


def _check_sample(source: Source, sample: int, decode: bool) -> Iterator[Damage]:
    try:
        stored = source.read(sample)
        if decode:
            found, said = check(stored, len(source.classes), _max_pixels(source)), source.size(sample)
            if found != said:
                detail = f"it is {found[1]}x{found[0]} pixels, the index says {said[1]}x{said[0]}"
                yield Damage(_shard_name(source, sample), source.key(sample), "size", detail)
    except DamagedSampleError as error:
        yield Damage(_shard_name(source, sample), source.key(sample), "checksum", str(error))
    except UndecodableError as error:
        yield Damage(_shard_name(source, sample), source.key(sample), "decode", str(error))
    except DataError as error:
        yield Damage(_shard_name(source, sample), source.key(sample), "read", str(error))


def _max_pixels(source: Source) -> int:
    """Return the limit with which a split was packed; that of all others is the usual one."""
    found = source.index.options.get("max_pixels") if isinstance(source, ShardDataset) else None
    return found if isinstance(found, int) else MAX_PIXELS


def _shard_name(source: Source, sample: int) -> str:
    if isinstance(source, ShardDataset):
        return source.index.shards[int(source.shards[sample])].name
    return source.name


def _in_processes(path: Path | str, jobs: list[_Job], workers: int, decode: bool) -> Iterator[tuple[int, list[Damage]]]:
    others = set(multiprocessing.active_children())
    with lean_start():
        pool = ProcessPoolExecutor(workers, helper_context(), _begin, (os.getpid(), path))
        futures = {pool.submit(_work_here, job, decode): number for number, job in enumerate(jobs)}
    helpers = set(multiprocessing.active_children()) - others
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise TransientError(
            f"a process that verified {path} died, perhaps because memory ran out: run it again with fewer --workers"
        ) from None
    except BaseException:  # Ctrl-C too
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# What a worker process opened when it began: reopening for each job would read the index as often.
_opened: list[Source] = []


def _begin(starter: int, path: Path | str) -> None:
    begin_helper(starter)
    _opened.append(_open(path))


def _work_here(job: _Job, decode: bool) -> list[Damage]:
    return _work(_opened[0], job, decode)


def _verify_tokens(folder: Path) -> Verified:
    try:
        split = open_token_split(folder)
    except DataError as error:
        return Verified(str(folder), 0, 0, False, [Damage(str(folder), "", "shard", str(error))])
    return Verified(str(folder), len(list(folder.glob("part-*.safetensors"))), split.num_samples, False, [])
