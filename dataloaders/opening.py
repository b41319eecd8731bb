"""The one place that detects the container: from the names of a config to samples by number.

    train            folder with index.json           packed split
                     folder of .tar files             external WebDataset shards
                     folder of class folders          ImageFolder
    train.beton                                       FFCV's
    train-{0000..0146}.tar, train-*.tar, a::b         external shards

all of them below `data.root`: a local folder, or, but for class folders, a URL. Shards of a URL are read by ranges;
through `data.cache`, where that is set, or through memory (`data.access = "sequential"`), they are fetched whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from dataloaders.beton.reader import BetonDataset, open_beton
from dataloaders.beton.sidecar import sidecar_path
from dataloaders.config import DataConfig
from dataloaders.source import Source
from dataloaders.sources.classes import UNLABELLED
from dataloaders.sources.files import LARGEST_TABLE, read_whole
from dataloaders.sources.foreign import Shards, find_shards, open_foreign
from dataloaders.sources.image_folder import open_image_folder
from dataloaders.sources.index import (
    ARRAYS_NAME,
    INDEX_NAME,
    Index,
    durable_write,
    largest_arrays,
    read_index,
    read_table,
)
from dataloaders.sources.kinds import kind_of
from dataloaders.sources.shards import ShardDataset, check_shards, open_split
from dataloaders.storage.base import (
    DeniedError,
    LocalFolder,
    MissingError,
    NoRangesError,
    Storage,
    UnreadableError,
    WholeStorage,
    read_blocks,
    read_small,
)
from dataloaders.storage.cache import CachedStorage, Known, ShardCache, locked
from dataloaders.storage.homes import own_folder, user_cache
from dataloaders.storage.memory import SequentialStorage
from dataloaders.storage.remote import is_url, join_url, open_storage
from setformer_dist.core.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_GIB = 1 << 30


def open_source(root: str, name: str, config: DataConfig) -> Source:
    """Open a split, whatever holds it.

    Args:
        root: folder or URL; `data.root`, or that of an entry of a mixture.
        name: of the split below it, `data.train` or `data.val`; may itself be a URL or an absolute path.
        config: how to fetch and keep (`access`, `cache`, `cache_gib`, `read_timeout`, `order`).

    Raises:
        DataError: there is no such split, it is damaged, or storage does not deliver.
        ConfigError: the cache is too small for the order of samples.
    """
    is_val = name == config.val
    if is_url(name):
        root, name = name, ""
    if not is_url(root) and (path := Path(root) / name).is_dir():  # also one with the marks of a pattern in its name
        return _open_folder(path, is_val, config)
    if _is_pattern(name or root):
        root, name = (root, name) if name else (root.rpartition("/")[0], root.rpartition("/")[2])
        return _open_shards(find_shards(root, name, config.read_timeout, config.skip_bad), is_val, config)
    if is_url(root) and not root.startswith("file://"):
        return _open_url(join_url(root, name), is_val, config)
    path = Path(root.removeprefix("file://")) / name
    if path.suffix == ".beton":
        return open_beton(path)
    return _open_folder(path, is_val, config)


def check_mixture_room(sources: Sequence[Source], config: DataConfig) -> None:
    """Check that the cache holds what the sets of a mixture need at a time, all together.

    Raises:
        ConfigError: it does not.
    """
    needed = 0
    for source in sources:
        if isinstance(source, ShardDataset) and isinstance(source.storage, WholeStorage):
            needed += sum(_needed((shard.size for shard in source.index.shards), False, config))
        elif isinstance(source, BetonDataset) and config.cache and source.path.parent == _shard_folder(config):
            needed += source.table.file_size
    if needed > config.cache_gib * _GIB:
        raise ConfigError(
            f"data.cache_gib = {config.cache_gib:g} does not hold the files ({needed / _GIB:.3g} GiB) that the sets "
            f"of data.mixture draw samples from at a time, all together: raise it, or {_repair(config)}"
        )


def index_home(config: DataConfig) -> Path:
    """Return the folder for indexes that cannot be next to their shards."""
    return Path(config.cache) if config.cache else user_cache()


def _is_pattern(name: str) -> bool:
    """Return whether a name means shards one by one."""
    last = name.rpartition("/")[2].partition("?")[0] if is_url(name) else name
    return "::" in last or any(sign in last for sign in "*?[{") or last.endswith(".tar")


def _open_folder(path: Path, is_val: bool, config: DataConfig) -> Source:
    if (path / INDEX_NAME).exists() or not path.is_dir():
        if config.access == "random" or not path.is_dir():
            return open_split(path)
        index = read_index(path)
        check_shards(LocalFolder(path), index.shards)
        return ShardDataset(_delivered(LocalFolder(path), _known(index), is_val, config), index)
    kind, passed = kind_of(path)
    if kind != "shards" and not config.labels:
        return open_image_folder(path, index_home(config), config.read_timeout, labels=False)
    if kind == "shards":
        if passed:
            _log.warning("%s: skipped %s", path, passed.line())
        return _open_shards(find_shards(str(path), "*.tar", config.read_timeout, config.skip_bad), is_val, config)
    if kind == "images":
        return open_image_folder(path, index_home(config), config.read_timeout, config.allow_empty_classes)
    return open_split(path)  # which says what is there instead


def _open_shards(shards: Shards, is_val: bool, config: DataConfig) -> ShardDataset:
    known = {
        name: Known(facts.size, version=facts.version) for name, facts in zip(shards.names, shards.facts, strict=True)
    }
    storage = _delivered(shards.storage, known, is_val, config)
    held = dataclasses.replace(shards, storage=storage, labels=config.labels)
    found = open_foreign(held, index_home(config), config.read_timeout)
    if config.labels and found.classes == (UNLABELLED,):
        raise DataError(f"the shards in {shards.storage.name} have no labels, and data.labels = true asks for them")
    return found


def _open_url(url: str, is_val: bool, config: DataConfig) -> Source:
    """Open what lies behind a URL: a .beton file, a packed split, or, where files can be listed, a folder of tars."""
    if PurePosixPath(url.partition("?")[0]).suffix == ".beton":
        return _fetched_beton(url, config)
    storage = open_storage(url, config.read_timeout)
    try:
        index = _remote_index(storage, config)
    except (MissingError, DeniedError) as error:
        try:
            shards = find_shards(url, "*.tar", config.read_timeout, config.skip_bad)
        except DataError:
            raise DataError(
                f"{error}; {storage.name} is no packed split: name external shards as "
                "train-{0000..0146}.tar, or pack the data with `setformer data pack`"
            ) from None
        return _open_shards(shards, is_val, config)
    check_shards(storage, index.shards)
    return ShardDataset(_delivered(storage, _known(index), is_val, config), index)


def _known(index: Index) -> dict[str, Known]:
    return {shard.name: Known(shard.size, shard.sha256) for shard in index.shards}


def _delivered(storage: Storage, known: dict[str, Known], is_val: bool, config: DataConfig) -> Storage:
    """Return a storage by the way that the config wants bytes to come."""
    local = isinstance(storage, LocalFolder)
    if config.cache and not local:
        _check_room((one.size for one in known.values()), is_val, config)
        return CachedStorage(storage, ShardCache(_shard_folder(config), config.cache_gib, config.read_timeout), known)
    if config.access == "sequential":
        _check_room((one.size for one in known.values()), is_val, config)
        return SequentialStorage(storage, known, config.cache_gib, config.read_timeout)
    if not local:
        _check_ranges(storage, known)
    return storage


def _shard_folder(config: DataConfig) -> Path:
    return Path(config.cache) / "shards"


def _check_room(sizes: Iterable[int], is_val: bool, config: DataConfig) -> None:
    """Refuse a cache that cannot hold what the order of samples needs at a time: each read would fetch a shard.

    Evaluation goes through the shards one after the other, and needs no more than one.
    """
    needed = _needed(sizes, is_val, config)
    if sum(needed) <= config.cache_gib * _GIB:
        return
    raise ConfigError(
        f"data.cache_gib = {config.cache_gib:g} does not hold the {len(needed)} shards ({sum(needed) / _GIB:.3g} GiB) "
        f'that data.order = "{config.order}" draws samples from at a time: raise it, or {_repair(config)}'
    )


def _needed(sizes: Iterable[int], is_val: bool, config: DataConfig) -> list[int]:
    """Return the bytes of the shards that the order of samples needs at a time, were they the largest."""
    largest = sorted((max(size, 0) for size in sizes), reverse=True)
    return largest[: 1 if is_val else config.block_shards if config.order == "block" else len(largest)]


def _repair(config: DataConfig) -> str:
    return "lower data.block_shards" if config.order == "block" else 'set data.order = "block"'


def _check_ranges(storage: Storage, known: dict[str, Known]) -> None:
    """Find out at once whether ranges can be read, and not at the first sample."""
    name = next(iter(known))
    try:
        storage.read(name, max(known[name].size - 1, 0), 1)
    except NoRangesError:
        raise
    except UnreadableError as error:
        raise DataError(f"{error}; ranges of shards are read from {storage.name}") from None


def _remote_index(storage: Storage, config: DataConfig) -> Index:
    """Return the index of a packed split behind a URL; its files are kept in a local folder.

    The copy is believed only if its `index.json` is the one just fetched, which has the sha256 of the arrays.
    """
    timeout = config.read_timeout
    data = read_small(storage, INDEX_NAME, LARGEST_TABLE, timeout)
    name = hashlib.sha256(storage.name.encode() + data).hexdigest()[:32]
    target = own_folder([index_home(config) / "indexes"], storage.name) / name
    for last in (False, True):
        _keep(storage, data, target, config)
        try:
            if read_whole(target / INDEX_NAME, LARGEST_TABLE, follow=False) == data:
                return read_index(target)
            _log.warning("the copy of the index of %s in %s is out of date and is fetched again", storage.name, target)
        except (DataError, OSError) as error:
            if last:
                raise DataError(str(error)) from None
        shutil.rmtree(target, ignore_errors=True)
    raise DataError(
        f"the copy of the index of {storage.name} in {target} is changed by another process: set data.cache"
    )


def _fetched_beton(url: str, config: DataConfig) -> BetonDataset:
    """Open a local copy of a .beton file, and of its sidecar if there is one; both stay in the cache while it is."""
    base, mark, query = url.partition("?")
    folder, _, name = base.rpartition("/")
    storage = open_storage(folder + mark + query, config.read_timeout)
    found = {name: storage.facts(name)}
    if not config.cache:
        raise ConfigError(f"{storage.shown(name)} is read from a local copy: set data.cache to a folder for it")
    sidecar = sidecar_path(Path(name)).name
    with contextlib.suppress(MissingError, DeniedError):  # a file that FFCV wrote has none
        found[sidecar] = storage.facts(sidecar)
    words = (storage.shown(name), *(f"{facts.size} {facts.version}" for facts in found.values()))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    cache = ShardCache(_shard_folder(config), config.cache_gib, config.read_timeout)
    with contextlib.ExitStack() as held:
        for one, facts in found.items():
            held.callback(os.close, cache.hold(storage, one, cache.folder / f"{digest}-{one}", Known(facts.size)))
        dataset = open_beton(cache.folder / f"{digest}-{name}")
        weakref.finalize(dataset, held.pop_all().close)
    return dataset


def _keep(storage: Storage, table: bytes, target: Path, config: DataConfig) -> None:
    """Have both files of an index in a local folder, which appears whole: `index.json` as given, the arrays fetched."""
    timeout = config.read_timeout
    lock, work = target.with_name(f".{target.name}.lock"), target.with_name(f".{target.name}.partial")
    with locked(lock, timeout, lambda: _sizes(work)) as got:
        if not got:
            raise DataError(
                f"files of {storage.name} are being fetched by another process, from which nothing came for "
                f"{timeout:g} s: end that process, or raise data.read_timeout"
            )
        if target.is_dir() and not target.is_symlink():
            return
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
            work.mkdir()
            durable_write(work / INDEX_NAME, table)
            limit = min(largest_arrays(read_table(work)), int(config.cache_gib * _GIB))
            durable_write(work / ARRAYS_NAME, read_blocks(storage, ARRAYS_NAME, limit, timeout))
            work.rename(target)
        except OSError as error:
            raise DataError(
                f"{target.parent} cannot be written ({error.strerror}): free the disk, or set data.cache"
            ) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)  # where it is still there, its room is wanted


def _sizes(folder: Path) -> list[tuple[str, int]]:
    try:
        return [(entry.name, entry.stat().st_size) for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []
