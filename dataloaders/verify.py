"""Reading a packed split whole: does every byte on the disk still have the hash it was packed with?

Opening checks sizes and reading checks samples, which is enough to train safely; this is for a copy just made, or
for a disk one doubts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from dataloaders.shards import open_split
from setformer_dist.core.errors import DataError


def verify_split(
    folder: Path,
    on_start: Callable[[int], None] = lambda total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Compare every shard with its sha256 in the index.

    Args:
        folder: a packed split.
        on_start: told the bytes to read, once.
        on_progress: told the bytes read since the last call.

    Returns:
        The number of shards, all of them whole.

    Raises:
        DataError: naming every shard that differs, or as `open_split`.
    """
    index = open_split(folder).index
    on_start(sum(shard.size for shard in index.shards))
    damaged = []
    for shard in index.shards:
        sha256 = hashlib.sha256()
        try:
            with (folder / shard.name).open("rb") as file:
                while block := file.read(1 << 20):
                    sha256.update(block)
                    on_progress(len(block))
        except OSError as error:
            raise DataError(f"shard {folder / shard.name} cannot be read: {error.strerror}") from None
        if sha256.hexdigest() != shard.sha256:
            damaged.append(shard.name)
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(index.shards)} shards in {folder} do not have the sha256 they were packed "
            f"with: restore {', '.join(damaged)}, or pack the split again"
        )
    return len(index.shards)
