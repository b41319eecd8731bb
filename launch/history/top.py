"""`setformer runs top`: what every rank of a run is doing, while it runs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table

from launch.history.show import run_folders, state_of
from launch.shown import cell
from setformer_dist.core import live, strictjson
from setformer_dist.core.errors import DataError
from setformer_dist.core.files import read_plain
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import counted

_STALE_S = 15.0  # after which a look is no news
_EVERY_S = 1.0
_SLOW_S = 5.0  # of silence, beyond which a rank is shown as behind


def top(folder: Path, console: Console, once: bool) -> None:
    """Show all ranks, again and again until the run ends or Ctrl-C.

    Args:
        folder: of the run.
        console: where to.
        once: show one table, and end.

    Raises:
        DataError: there is no such run, or it does not run.
    """
    (folder,) = run_folders(folder)[-1:]
    seen = _seen(folder)
    if once or not console.is_terminal:
        console.print(_picture(folder, seen))
        return
    screen = Screen(_picture(folder, seen), console=console, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), screen:
        while True:
            time.sleep(_EVERY_S)
            try:
                seen = _seen(folder)
            except DataError:
                return
            screen.update(_picture(folder, seen), refresh=True)


def _seen(folder: Path) -> live.Live:
    seen = live.read(folder)
    if seen is None or time.time() - seen.time > _STALE_S:
        raise DataError(
            f"{folder} is not running under a supervisor ({state_of(folder)}): see setformer runs show {folder}"
        )
    return seen


def _picture(folder: Path, seen: live.Live) -> Group:
    batch = _global_batch(folder)
    speed = ""
    if seen.steps_per_s is not None:
        speed = f", {seen.steps_per_s:.2f} steps/s" + (f", {seen.steps_per_s * batch:,.0f} samples/s" if batch else "")
    step = max(rank.step for rank in seen.ranks)
    hosts = len({rank.host for rank in seen.ranks})
    where = f" on {counted(hosts, 'host')}" if hosts > 1 else ""
    head = f"{folder}: step {max(step, 0):,}{speed}, {counted(len(seen.ranks), 'rank')}{where}"
    return Group(cell(head, "bold"), _table(seen))


def _table(seen: live.Live) -> Table:
    table = open_table("rank", "host", "step", "phase", "data wait", "device use", "memory", "last sign", "", box=None)
    for rank in seen.ranks:
        memory = f"{rank.memory_mib:,.0f} MiB" if rank.memory_mib is not None else ""
        table.add_row(
            str(rank.rank),
            cell(rank.host or "here"),
            str(rank.step) if rank.step >= 0 else "",
            cell(rank.phase),
            f"{rank.waiting:.0%}",
            _use(rank),
            memory,
            f"{rank.silent_s:.1f} s ago",
            cell(_behind(rank, seen.ranks), "yellow"),
        )
    return table


def _use(rank: live.LiveRank) -> str:
    """Return how busy a rank's device is: its GPU, or the cores that it and its readers keep busy."""
    if rank.gpu is not None:
        return f"{rank.gpu:.0%} of GPU"
    return f"{rank.cores:.1f} cores" if rank.cores is not None else ""


def _behind(rank: live.LiveRank, ranks: Sequence[live.LiveRank]) -> str:
    """Say why the others may be waiting for a rank."""
    if rank.phase == "ended":
        return ""
    if rank.step < max(other.step for other in ranks):
        return f"behind, in {rank.phase}"
    if rank.silent_s > _SLOW_S and rank.phase != "start":
        return f"silent in {rank.phase}"
    usual = statistics.median(other.waiting for other in ranks)
    return "waits for data" if rank.waiting > max(0.2, 2 * usual) else ""


def _global_batch(folder: Path) -> int:
    try:
        config = strictjson.parse(read_plain(folder / "config.json"))
        return int(config["batch"]["global_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
