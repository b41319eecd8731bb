"""`setformer runs`: what runs there are, how far they came, and where their time went."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.history import ran
from launch.ranks.holder import look
from launch.shown import cell
from setformer_dist.core import ledger, strictjson
from setformer_dist.core.errors import DataError
from setformer_dist.core.files import lines_of
from setformer_dist.core.metric import by_class, is_of_class, title_of_classes
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import counted, plain
from setformer_dist.report.rows import METRICS, Row, RunRecord, finite, read_run

_MEANING = {
    "training": "forward, backward, optimizer, communication",
    "data": "waiting for samples",
    "checkpoint": "saving",
    "evaluation": "scoring the validation split",
    "refresh": "refreshing references",
    "start": "from the first start of the ranks to the first step",
    "restart": "from a failure to the next step",
    "lost": "computed, and computed again after a failure",
    "finish": "last checkpoint, report",
}
_FAILURES_SHOWN = 10


def run_folders(root: Path) -> list[Path]:
    """Return the folders of runs below `root`, or `root` itself if it is one, newest last.

    Raises:
        DataError: there is none.
    """
    if (root / "config.json").is_file() or (root / ledger.LEDGER).is_file():
        return [root]
    found = _times_of_runs(root) if root.is_dir() else {}
    if not found:
        raise DataError(f"{root} holds no run: name a run's folder, or the folder of runs (run.out, by default runs)")
    return sorted(found, key=lambda folder: found[folder])


def _times_of_runs(root: Path) -> dict[Path, float]:
    """Return when each run below a folder began; one that ended before its first step has a ledger alone."""
    names = (ledger.LEDGER, "config.json")  # the latter counts where there are both
    return {path.parent: path.stat().st_mtime for name in names for path in root.glob(f"*/{name}")}


def list_runs(root: Path, console: Console) -> None:
    """Print one line per run.

    Raises:
        DataError: there is none.
    """
    table = open_table("run", "state", "step", "best", "loss", "goodput", "attempts", box=None)
    for folder in run_folders(root):
        try:
            run = read_run(folder)
        except DataError as error:  # one damaged run must not hide the others
            table.add_row(cell(folder), cell(error, "red"))
            continue
        account = ledger.account(ledger.read_events(folder))
        best = run.summary.get("best")
        value = finite(best.get("value")) if isinstance(best, dict) else None
        loss = finite(run.train[-1].get("loss")) if run.train else None
        table.add_row(
            cell(folder),
            cell(state_of(folder)),
            str(_step_of(run, account)),
            cell(f"{best['metric']} {value:.4f}") if isinstance(best, dict) and value is not None else "",
            f"{loss:.4f}" if loss is not None else "",
            f"{account.goodput:.1%}" if account.total else "",
            str(account.attempts),
        )
    console.print(table)


def state_of(folder: Path) -> str:
    """Return "running", "killed", "done", "stopped", or how the last attempt failed, as the ledger says."""
    events = [e for e in ledger.read_events(folder) if e["event"] in ("attempt", "began", "spent", "ended")]
    if not events:
        return "unknown"
    last = events[-1]
    if last["event"] != "ended":
        holder, _ = look(folder)
        lives = holder.lives() if holder is not None else None
        if lives is None:
            return "running or killed" if holder is None else f"running on {holder.host}, or killed"
        return "running" if lives else "killed"
    return str(last.get("why")) if last.get("final") else "restarting"


def show_run(folder: Path, console: Console, as_json: bool = False) -> None:
    """Print what a run did, who ran it, where its time went, and what went wrong.

    Raises:
        DataError: there is no such run.
    """
    (folder,) = run_folders(folder)[-1:]
    run, events = read_run(folder), ledger.read_events(folder)
    account = ledger.account(events)
    guarded = guard_rows(folder)
    slow = stragglers(run.train)
    if as_json:
        print(json.dumps(_as_json(folder, run, account, guarded, slow), indent=2))
        return
    state = f": {state_of(folder)}, step {_step_of(run, account):,}"
    console.print(cell(folder, "bold"), cell(state), sep="", highlight=False)
    evaluation = run.summary.get("evaluation")
    if isinstance(evaluation, dict) and evaluation:
        scores = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if not is_of_class(name))
        console.print(cell(f"last evaluation: {shown}"))
        if classes := by_class(scores):
            shown = ", ".join(f"{name} {value:.4f}" for name, value in classes.items())
            console.print(cell(f"{title_of_classes(scores)}: {shown}"))
    if account.total:
        console.print(_time_table(account))
    for line in (*ran.lines(folder), *_problems(account, guarded, slow)):
        console.print(plain(line), markup=False, highlight=False, soft_wrap=True)


def _step_of(run: RunRecord, account: ledger.Account) -> int:
    """Return the step that a run is at: not every step is logged, but the ledger has the last before every end."""
    return account.step or max((int(row["step"]) for row in (*run.train, *run.evals)), default=0)


def _time_table(account: ledger.Account) -> Table:
    table = open_table(
        "", "seconds", "share", "", box=None, title=f"goodput {account.goodput:.1%}", title_justify="left"
    )
    for kind, seconds in ledger.kinds_by_size(account):
        table.add_row(kind, f"{seconds:,.1f}", f"{seconds / account.total:.1%}", _MEANING[kind])
    table.add_row("all", f"{account.total:,.1f}", "100.0%", counted(account.attempts, "attempt"))
    return table


def _problems(account: ledger.Account, guarded: list[Row], slow: Counter[tuple[int, str]]) -> Iterable[str]:
    if account.failures:
        yield f"{counted(len(account.failures), 'failure')}, {counted(account.steps_lost, 'step')} computed again:"
        for at, how, step in account.failures[-_FAILURES_SHOWN:]:
            yield f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}  {how} at step {step}"
    for row in guarded:
        listed = row.get("sample_ids")
        ids = ", ".join(map(str, listed[:8] if isinstance(listed, list) else ()))
        below = f" below step {row['below']}" if row.get("below") is not None else ""
        number, loss, why, action = (row.get(key) for key in ("step", "loss", "why", "action"))
        yield f"bad step {number}: loss {loss}, {why}, {action}{below}; samples {ids} …"
    for (rank, phase), times in slow.most_common(3):
        yield f"rank {rank} was the slowest in {phase} in {times} of the logged lines"


def stragglers(rows: Iterable[Row]) -> Counter[tuple[int, str]]:
    """Count (rank, phase) over the logged lines that name a rank which the others waited for."""
    named = (row.get("straggler") for row in rows)
    return Counter(
        (s["rank"], str(s.get("phase"))) for s in named if isinstance(s, dict) and type(s.get("rank")) is int
    )


def guard_rows(folder: Path) -> list[Row]:
    """Return the guard's lines of a run."""
    found: list[Row] = []
    for line in lines_of(folder / METRICS):
        if b'"guard"' not in line:
            continue
        try:
            row = strictjson.parse(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "guard":
            found.append(row)
    return found


def _as_json(
    folder: Path, run: RunRecord, account: ledger.Account, guarded: list[Row], slow: Counter[tuple[int, str]]
) -> dict[str, object]:
    return {
        "folder": str(folder),
        "state": state_of(folder),
        "step": _step_of(run, account),
        "summary": dict(run.summary),
        "goodput": account.goodput,
        "seconds": account.seconds,
        "attempts": account.attempts,
        "failures": [{"time": at, "how": how, "step": step} for at, how, step in account.failures],
        "steps_lost": account.steps_lost,
        "guard": [dict(row) for row in guarded],
        "attempt_records": ran.as_json(folder),
        "stragglers": [{"rank": r, "phase": p, "lines": n} for (r, p), n in slow.most_common()],
    }
