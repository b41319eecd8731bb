"""Storage that reads from end to end alone: shards pass through memory, each whole, and are read there.

For pipes, servers without byte ranges and object stores where a request is dear. Nothing is skipped within a shard,
but shards are: the order of samples and the index say which one comes next, so a resumption fetches no shard before
the one it stands in. `order = "block"` needs the shards of one block at a time; these must fit into `data.cache_gib`
of memory in every process that reads. Where `data.cache` is set, `sources.cache` keeps them on a disk instead,
once per host.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

from dataloaders.storage.base import FileFacts, Storage, UnreadableError
from dataloaders.storage.cache import Ahead, Known, fitting

_GIB = 1 << 30

# Seconds between looks at whether bytes come to a shard that another thread fetches.
_LOOK_S = 0.2


class SequentialStorage:
    """A storage whose shards are held in memory, those used longest ago giving way (`Storage`).

    Args:
        storage: where they come from; only read from end to end.
        known: what the index says of each shard.
        gib: GiB that shards may take in this process.
        timeout: seconds that one thread waits for another that fetches a shard, without any byte coming.

    Attributes:
        moved: changes whenever bytes come.
    """

    def __init__(self, storage: Storage, known: dict[str, Known], gib: float, timeout: float = 60.0) -> None:
        self._storage = storage
        self._known = known
        self._gib = gib
        self._timeout = timeout
        self.moved = 0
        self._again: set[str] = set()
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._coming: set[str] = set()
        self._changed = threading.Condition()
        self._ahead = Ahead(self._whole)

    @property
    def name(self) -> str:
        """The root of the shards."""
        return self._storage.name

    def shown(self, name: str) -> str:
        """Return a file's place at its origin."""
        return self._storage.shown(name)

    def facts(self, name: str) -> FileFacts:
        """Return what the origin says."""
        return self._storage.facts(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard, which is fetched whole where it is not in memory."""
        data = self._whole(name)[offset : offset + size]
        if len(data) != size:
            raise UnreadableError(
                self.shown(name), f"has {len(data)} of {size} bytes at offset {offset}: restore the file"
            )
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes from its origin."""
        return self._storage.blocks(name)

    def names(self, pattern: str) -> list[str]:
        """Return what the origin has."""
        return self._storage.names(pattern)

    def read_again(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes of a shard that is fetched once more, as those in memory proved damaged; but not twice."""
        with self._changed:
            if name not in self._again:
                self._again.add(name)
                self._bytes -= len(self._held.pop(name, b""))
        return self.read(name, offset, size)

    def expect(self, names: list[str], share: float = 1.0) -> None:
        """Fetch shards in the background, in this order: as many as that share of the memory holds."""
        self._ahead.expect(fitting(names, self._known, int(self._gib * _GIB * share)))

    def close(self) -> None:
        """Give up what is being fetched ahead; forget all shards."""
        self._ahead.close()
        with self._changed:
            self._held.clear()
            self._bytes = 0
        self._storage.close()

    def _whole(self, name: str) -> bytes:
        """Return a shard; of several threads that want it, one fetches it."""
        with self._changed:
            self._await(name)
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            self._coming.add(name)
        try:
            data = self._fetched(name)
            with self._changed:
                self._held[name] = data
                self._bytes += len(data)
                while self._bytes > self._gib * _GIB and len(self._held) > 1:
                    self._bytes -= len(self._held.popitem(last=False)[1])
            return data
        finally:
            with self._changed:
                self._coming.discard(name)
                self._changed.notify_all()

    def _await(self, name: str) -> None:
        """Wait, `_changed` being held, until no other thread fetches a shard: as long as bytes come."""
        seen, since = self.moved, time.monotonic()
        while name in self._coming:
            self._changed.wait(min(_LOOK_S, self._timeout))
            if self.moved != seen:
                seen, since = self.moved, time.monotonic()
            elif time.monotonic() - since >= self._timeout and name in self._coming:
                raise UnreadableError(
                    self.shown(name),
                    f"is being fetched, but nothing came for {self._timeout:g} s: check the storage, or raise "
                    "data.read_timeout",
                )

    def _fetched(self, name: str) -> bytes:
        known = self._known.get(name, Known(-1))
        if known.size > self._gib * _GIB:
            raise UnreadableError(
                self.shown(name),
                f"has {known.size / _GIB:.3g} GiB, memory is to hold no more than data.cache_gib = {self._gib:.3g}: "
                "raise it",
            )
        parts, sha256, got = [], hashlib.sha256(), 0
        most = known.size if known.size >= 0 else int(self._gib * _GIB)
        for block in self._storage.blocks(name):
            if threading.current_thread().name == Ahead.NAME and not self._ahead.wanted:
                raise UnreadableError(self.shown(name), "is no longer needed")
            self.moved += 1
            got += len(block)
            if got > most:
                raise UnreadableError(
                    self.shown(name),
                    f"has more than the {most} bytes that were announced or that data.cache_gib allows",
                )
            sha256.update(block)
            parts.append(block)
        data = b"".join(parts)
        if known.size not in (len(data), -1) or (known.sha256 and sha256.hexdigest() != known.sha256):
            raise UnreadableError(
                self.shown(name), f"is not what the index says ({len(data)} bytes, other sha256): restore the file"
            )
        return data

    def __reduce__(self) -> tuple[object, ...]:
        return SequentialStorage, (self._storage, self._known, self._gib, self._timeout)
