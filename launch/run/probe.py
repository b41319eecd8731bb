"""What `setformer doctor --hosts` has every host run, one rank each: do they reduce together, and see the same data?

    python -m launch.run.probe RANKS [CONFIG [KEY=VALUE ...]]     under RANK and WORLD_SIZE, as launch.entry

RANKS is how many the run itself would have. Rank 0 prints one line of JSON that begins with `PROBE_MARK`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launch.hosts.reach import PROBE_BYTES, PROBE_MARK
from launch.ranks.orphans import use_scratch
from launch.run.compose import open_splits
from launch.run.config import load_run, resolve
from launch.run.dry_run import rank_bytes
from launch.run.session import facts_of
from setformer_dist.core.errors import SetformerError
from setformer_dist.core.exits import leave
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed

_ROUNDS = 5
_LIMIT_MINUTES = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Probe from one rank; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    use_scratch()
    quiet_deepspeed()
    ranks = RankInfo.from_env()
    try:
        connect(ranks, timeout_minutes=_LIMIT_MINUTES)
        comm = TorchCollectives(ranks)
        seconds = _all_reduce()
        views = comm.gather_json(_view(words, ranks))
    except SetformerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if ranks.is_main:
        print(PROBE_MARK + json.dumps({"all_reduce_s": seconds, "ranks": views}), flush=True)
    comm.barrier()
    return 0


def _all_reduce() -> float:
    """Return the median seconds of an all-reduce."""
    values = torch.ones(PROBE_BYTES // 4, device=get_accelerator().current_device_name())
    seconds = []
    for _ in range(_ROUNDS + 1):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(values)
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _view(words: Sequence[str], ranks: RankInfo) -> dict[str, object]:
    """Return what this host sees: its device, and of a run its data and what it needs; `fault` where that fails."""
    view: dict[str, object] = {"device": _device()}
    count, *config = words
    if not config:
        return view
    try:
        run = resolve(load_run(Path(config[0]), config[1:]), int(count))
        view["facts"] = facts_of(run, open_splits(run))
        if ranks.is_main:
            view["rank_bytes"] = rank_bytes(run)
    except SetformerError as error:
        view["fault"] = str(error)
    return view


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {torch.cuda.mem_get_info()[1] >> 30} GiB"


if __name__ == "__main__":
    leave(main())
