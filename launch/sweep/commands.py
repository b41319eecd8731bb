"""`setformer sweep`: run a sweep, show it, list sweeps, stop one."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from launch.hosts.names import HostSpec
from launch.ranks.holder import look
from launch.ranks.lock import Supervised, supervising
from launch.ranks.signals import stop_signals
from launch.ray.cluster import connected, own_cluster
from launch.shown import cell
from launch.sweep import report
from launch.sweep.actors import Key
from launch.sweep.driver import STOP_FILE, Driver, Running, remains
from launch.sweep.journal import Journal, read_events
from launch.sweep.page import SWEEP, Sweep, check_continued, read_sweep
from launch.sweep.state import Book, as_json, book_of
from launch.sweep.table import final_table, live_table, write_csv
from setformer_dist.core.errors import DataError, LaunchError, TransientError
from setformer_dist.core.files import write_state
from setformer_dist.core.secrets import redacted_json
from setformer_dist.core.terminal import bear_lost_streams, open_table
from setformer_dist.core.words import counted, plain

_STOP_S = 60.0
_HEAD_EVERY_S, _HEAD_S, _REFUSALS = 2.0, 2.0, 2
_LOCK_S = 3.0  # for a driver that is about to end


def run(sweep: Sweep, address: str | None, wait: bool, console: Console, nodes: Sequence[HostSpec] = ()) -> int:
    """Run a sweep, or continue it; return the exit code.

    Args:
        sweep: with its config.
        address: of a Ray cluster; None starts one on this machine.
        wait: for nodes, where trials do not fit.
        console: for the tables; lines about trials go to standard error.
        nodes: of the cluster, and the ranks that trials may have of each; none for all.

    Raises:
        SetformerError: it cannot run.
    """
    bear_lost_streams()
    check_continued(sweep)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(_held(sweep))
        (sweep.folder / STOP_FILE).unlink(missing_ok=True)  # of an earlier driver
        if not check_continued(sweep):  # by the holder of the folder
            _begin(sweep)
        journal = Journal(sweep.folder)
        stack.callback(journal.close)
        lost = _cluster(address, stack) if remains(sweep, book_of(sweep, journal.events)) else lambda: None
        received = stack.enter_context(stop_signals(held.show_life))
        say, show = stack.enter_context(_shown(sweep, console))
        driver = Driver(sweep, journal, received, say, show, lost, held.fault, nodes)
        try:
            code = driver.run(wait)
        except BaseException:
            with contextlib.suppress(OSError):  # its reason may be a full disk
                write_csv(sweep, driver.book)
            raise
    _conclude(sweep, driver.book, console)
    if code:
        print(f"stopped; the same command continues the sweep in {plain(sweep.folder)}", file=sys.stderr)
    return code


def _cluster(address: str | None, stack: contextlib.ExitStack) -> Callable[[], str | None]:
    """Be a driver of a cluster until the stack ends; return what says that it is gone."""
    if address is not None:
        return _Lost(stack.enter_context(connected(address)).address)
    print("starting Ray on this machine …", file=sys.stderr, flush=True)
    own = stack.enter_context(own_cluster())
    return _Lost(stack.enter_context(connected(own.address, own.environment)).address)


class _Lost:
    """Says that a cluster's head does not answer any more; Ray itself would end this process after a minute.

    Args:
        address: host:port of the head.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._at = address, (host, int(port))
        self._next, self._refused = 0.0, 0

    def __call__(self) -> str | None:
        """Return a sentence where it is gone."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _HEAD_EVERY_S
        try:
            socket.create_connection(self._at, timeout=_HEAD_S).close()
            self._refused = 0
        except OSError:
            self._refused += 1
        if self._refused < _REFUSALS:
            return None
        return f"the Ray cluster at {self._address} is gone: the same command continues the sweep on another one"


def _begin(sweep: Sweep) -> None:
    try:
        write_state(sweep.folder / SWEEP, redacted_json(sweep.as_json()))
    except OSError as error:
        raise TransientError(f"{sweep.folder / SWEEP} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _held(sweep: Sweep) -> Iterator[Supervised]:
    """Hold the sweep's folder; the caller shows life.

    Raises:
        LaunchError: another driver does.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(supervising(sweep.folder, _LOCK_S))
        except LaunchError:
            holder, _ = look(sweep.folder)
            who = f" ({holder.told()})" if holder is not None else ""
            raise LaunchError(
                f"another driver runs the sweep in {sweep.folder}{who}: wait for it, or stop it with "
                f"setformer sweep stop {sweep.folder}"
            ) from None
        held.show_life()
        yield held


_Show = Callable[[Book, dict[Key, Running]], None]


@contextlib.contextmanager
def _shown(sweep: Sweep, console: Console) -> Iterator[tuple[Callable[[str], None], _Show]]:
    """Yield what prints a line, and what shows the sweep: a live table on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield lambda line: print(plain(line), file=sys.stderr, flush=True), lambda book, running: None
        return
    with Live(console=console, auto_refresh=False) as screen:
        say = functools.partial(screen.console.print, highlight=False, markup=False)
        yield say, lambda book, running: screen.update(live_table(sweep, book, running), refresh=True)
        screen.update("", refresh=True)


def _conclude(sweep: Sweep, book: Book, console: Console) -> None:
    """Print the trials and what the sweep recommends; then write CSV and HTML page, which a full disk may prevent."""
    console.print(final_table(sweep, book))
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for line in report.recommendation(sweep, book):
        say(plain(line))
    write_csv(sweep, book)
    page = report.write(sweep, book)
    say(f"{page}  (open it in a browser)")


def dry_run(sweep: Sweep, console: Console, count: int = 8) -> None:
    """Print the trials that a sweep would begin with; nothing is written."""
    book = Book(sweep)
    pbt = sweep.config.scheduler.name == "pbt"
    limit = min(count, sweep.config.budget.trials, sweep.config.scheduler.population if pbt else count)
    table = open_table("trial", *sweep.config.space, box=None)
    while len(book.trials) < limit and not book.exhausted:
        book.take({"event": "asked", "trial": len(book.trials)})
        trial = book.trials[-1]
        table.add_row(str(trial.number), *(cell(json.dumps(trial.point.get(key, ""))) for key in sweep.config.space))
    console.print(table)
    budget = sweep.config.budget
    console.print(
        f"{counted(budget.trials, 'trial')} of {counted(budget.ranks, 'rank')} at most, {sweep.metric} ({sweep.mode}) "
        f"decides; later points depend on the results. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )


def show(folder: Path, console: Console, json_too: bool = False) -> None:
    """Print a sweep's trials and what it recommends, and write its CSV and HTML page.

    Raises:
        DataError: there is no sweep.
    """
    sweep = read_sweep(folder)
    book = book_of(sweep, read_events(folder))
    book.at_work = _state(folder).startswith("running")
    if json_too:
        print(json.dumps({"sweep": folder.name, "state": _state(folder), "metric": sweep.metric, "mode": sweep.mode,
                          "trials": [as_json(book, trial) for trial in book.in_order()]}, indent=2))  # fmt: skip
        return
    console.print(cell(f"{folder}: {_state(folder)}, {_counts(book)}"), highlight=False)
    _conclude(sweep, book, console)


def _counts(book: Book) -> str:
    counts = collections.Counter(map(book.state_of, book.trials))
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "no trial yet"


def _state(folder: Path) -> str:
    """Return "running", "killed", or how the last driver ended."""
    events = read_events(folder)
    if events and events[-1]["event"] == "over":
        return str(events[-1].get("why"))
    holder, _ = look(folder)
    if holder is None:
        return "killed" if events else "not begun"
    lives = holder.lives()
    return "killed" if lives is False else "running" if lives else f"running on {holder.host}, or killed"


def list_sweeps(root: Path, console: Console) -> None:
    """Print one line per sweep.

    Raises:
        DataError: there is none.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{SWEEP}")) if root.is_dir() else []
    if not folders:
        raise DataError(f"{root} holds no sweep: name the folder of sweeps (sweep.out, by default runs/sweeps)")
    table = open_table("sweep", "state", "trials", "metric", "best", "point", box=None)
    for folder in folders:
        try:
            sweep = read_sweep(folder)
            book = book_of(sweep, read_events(folder))
            state = _state(folder)
            book.at_work = state.startswith("running")
        except DataError as error:  # one damaged sweep must not hide the others
            table.add_row(cell(folder), cell(error, "red"))
            continue
        best = next(iter(book.ranked()), None)
        point = ", ".join(f"{key}={json.dumps(value)}" for key, value in best.point.items()) if best else ""
        value = f"{best.value:.4f}" if best is not None and best.value is not None else ""
        table.add_row(cell(folder), cell(state), cell(_counts(book)), cell(sweep.metric), value, cell(point))
    console.print(table)


def stop(folder: Path, console: Console) -> None:
    """Have the driver of a sweep stop: its runs save, and the same command continues later.

    Raises:
        DataError: there is no sweep.
        LaunchError: no driver runs it, or it does not stop.
    """
    read_sweep(folder)
    holder, _ = look(folder)
    if holder is None or holder.lives() is False:
        raise LaunchError(f"no driver runs the sweep in {folder} ({_state(folder)})")
    (folder / STOP_FILE).touch()
    limit = time.monotonic() + _STOP_S
    while time.monotonic() < limit:
        time.sleep(0.3)
        now, _ = look(folder)
        if now is None or now.lives() is False or now != holder:
            console.print(f"stopped; the same command continues the sweep in {folder}", highlight=False, markup=False)
            return
    raise LaunchError(f"the driver ({holder.told()}) did not stop within {_STOP_S:.0f} s: end that process")
