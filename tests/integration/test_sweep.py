"""Sweeps on a real Ray cluster of this machine: killed, continued, stopped early, cloned, promoted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.sweep.journal import read_events
from launch.sweep.page import load_sweep
from launch.sweep.state import Book
from launch.testing.commands import DEMO, Process, alive, children, losses, setformer, start

SET = """
[set]
data = {{ root = "{data}" }}
schedule = {{ epochs = {epochs}, warmup_epochs = 0.2 }}
eval = {{ every_steps = {every}, every_epochs = 0 }}
checkpoint = {{ every_steps = 5 }}
run = {{ log_every = 1 }}
"""


def write_page(folder: Path, data: Path, text: str, epochs: int = 1, every: int = 6) -> Path:
    head = f'[sweep]\nname = "s"\nout = "{folder}"\nbase = "{DEMO}"\n'
    path = folder / "page.toml"
    path.write_text(head + SET.format(data=data, epochs=epochs, every=every) + text)
    return path


def wait_for(process: Process, found: Callable[[], Any], timeout: float = 240) -> Any:
    limit = time.monotonic() + timeout
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)
    return value


def kill(process: Process) -> None:
    """Kill a driver with SIGKILL, and wait until nothing is left of Ray and of the trials."""
    left = {pid: words_of(pid) for pid in children(process.pid)}
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    limit = time.monotonic() + 30
    while found := {pid: words for pid, words in left.items() if alive(pid)}:
        assert time.monotonic() < limit, f"left behind: {found}"
        time.sleep(0.1)


def words_of(pid: int) -> list[str]:
    """Return the command line of a process, none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == kind]


def checkpoints(folder: Path, trial: int) -> list[Path]:
    return list((folder / "trials" / f"trial-{trial:04d}" / "checkpoints").glob("step-*/manifest.json"))


def running_trials(folder: Path) -> list[Path]:
    """Return the folders of the trials that a sweep started and that have not ended."""
    over = {event["trial"] for event in events_of(folder, "ended")}
    running = {event["trial"] for event in events_of(folder, "started")} - over
    return [folder / "trials" / f"trial-{number:04d}" for number in sorted(running)]


def supervisor_of(trials: list[Path], process: Process) -> int | None:
    """Return the process that supervises one of some trials; None while none does (a trial starts after its event)."""
    pages = {str(trial / "trial.json") for trial in trials}
    for pid in children(process.pid):
        words = words_of(pid)
        if "launch.cli" in words and pages & set(words):
            return pid
    return None


SMALL = """
[space]
"optim.lr" = { loguniform = [1e-4, 1e-2] }
[budget]
trials = 2
[search]
name = "random"
"""


@pytest.mark.drill
def test_a_sweep_whose_driver_is_killed_goes_on_as_if_it_was_not(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, SMALL)
    folder = tmp_path / "s"
    process = start("sweep", str(page))
    wait_for(process, lambda: checkpoints(folder, 0) and checkpoints(folder, 1))
    second = setformer("sweep", str(page))
    assert second.code == 5
    assert [line for line in second.error_lines if "another driver runs the sweep in" in line]
    kill(process)

    changed = setformer("sweep", str(page), "search.startup=3")
    assert changed.code == 2
    assert "search.startup was 10 and is 3" in changed.err

    continued = setformer("sweep", str(page), timeout=400)
    assert continued.code == 0, continued.err
    assert "Recommended: trial" in continued.out
    book = Book(load_sweep(page))
    for number in range(2):
        book.take({"event": "asked", "trial": number})
    assert [event["point"] for event in events_of(folder, "asked")] == [trial.point for trial in book.trials]
    assert {event["state"] for event in events_of(folder, "ended")} == {"done"}
    ledger = (folder / "trials" / "trial-0000" / "ledger.jsonl").read_text()
    assert '"step": 5' in ledger  # it went on from there

    # What ran beside it, and the kill, changed nothing: the losses are those of a plain run of its config.
    trial = folder / "trials" / "trial-0000"
    plain = setformer("train", str(trial / "trial.json"), f"run.out={tmp_path}", "run.name=plain")
    assert plain.code == 0, plain.err
    assert losses(trial) == losses(tmp_path / "plain")

    # Finished trials are not run again.
    before = len(read_events(folder))
    again = setformer("sweep", str(page))
    assert again.code == 0, again.err
    assert [event["event"] for event in read_events(folder)[before:]] == []
    shown = json.loads(setformer("sweep", "show", str(folder), "--json").out)
    values = [trial["value"] for trial in shown["trials"]]
    assert values == sorted(values, reverse=True)
    listed = setformer("sweep", "ls", str(tmp_path))
    assert "2 complete" in listed.out
    assert (folder / "results.csv").read_text().count("\n") == 3
    assert "<script src" not in (folder / "report.html").read_text()


def test_more_ranks_than_the_machine_has_are_refused_with_what_fits(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, SMALL)
    refused = setformer("sweep", str(page), "budget.ranks=64", "budget.cpus_per_rank=1")
    assert refused.code == 5
    (line,) = refused.error_lines
    assert "64 ranks of a trial take 64 cores of one node" in line
    assert "budget.ranks of at most" in line
    assert not events_of(tmp_path / "s", "asked")


HALVING = """
[space]
"optim.lr" = { loguniform = [1e-5, 1e-2] }
"model.drop_path" = { grid = [0.0, 0.05, 0.1] }
[budget]
trials = 12
[search]
startup = 4
[scheduler]
name = "asha"
reduction = 2
"""


@pytest.mark.drill
def test_twelve_trials_killed_twice(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, HALVING, every=4)
    folder = tmp_path / "s"
    for ended in (2, 6):
        process = start("sweep", str(page))
        wait_for(process, lambda ended=ended: len(events_of(folder, "ended")) >= ended, 500)
        if ended == 6:  # a trial as well
            supervisor = wait_for(process, lambda process=process: supervisor_of(running_trials(folder), process))
            os.kill(supervisor, signal.SIGKILL)
            time.sleep(2)
        kill(process)
    finished = {event["trial"] for event in events_of(folder, "ended")}
    before = len(read_events(folder))
    done = setformer("sweep", str(page), timeout=900)
    assert done.code == 0, done.err
    after = read_events(folder)[before:]
    assert not finished & {event["trial"] for event in after if event["event"] == "started"}
    ends = events_of(folder, "ended")
    assert sorted(event["trial"] for event in ends) == list(range(12))
    assert {event["state"] for event in ends} == {"done", "pruned"}
    assert max(event.get("stop_seconds", 0) for event in ends) <= 5
    assert (folder / "report.html").stat().st_size > 1_000_000


POPULATION = """
[space]
"optim.lr" = { loguniform = [1e-5, 1e-2] }
[budget]
trials = 5
cpus_per_rank = 0.5
[search]
name = "random"
[scheduler]
name = "pbt"
population = 3
quantile = 0.34
"""


@pytest.mark.drill
def test_a_clone_goes_on_where_its_source_was(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, POPULATION, epochs=3, every=11)
    folder = tmp_path / "s"
    process = start("sweep", str(page))
    (clone, *_) = wait_for(process, lambda: events_of(folder, "cloned"), 400)
    kill(process)  # between the decision and the end of the member that it replaces, or shortly after
    done = setformer("sweep", str(page), timeout=600)
    assert done.code == 0, done.err
    states = {event["trial"]: event["state"] for event in events_of(folder, "ended")}
    assert states[clone["replaces"]] == "replaced"
    assert states[clone["trial"]] in ("done", "replaced")
    ours = losses(folder / "trials" / f"trial-{clone['trial']:04d}")
    theirs = losses(folder / "trials" / f"trial-{clone['source']:04d}")
    first = clone["step"] + 1
    assert min(step for kind, step in ours if kind == "train") == first
    # The loss of its first step is computed with the weights, the samples and the state of its source; the new rate
    # acts from the next one on.
    assert ours["train", first] == theirs["train", first]
    assert ours["train", first + 1] != theirs["train", first + 1]


@pytest.mark.drill
def test_a_winner_becomes_a_run_of_its_own(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, SMALL.replace("trials = 2", "trials = 1"))
    done = setformer("sweep", str(page), timeout=400)
    assert done.code == 0, done.err
    words = ("sweep", "promote", str(tmp_path / "s"), f"run.out={tmp_path}", "run.threads=1")
    trial = tmp_path / "s" / "trials" / "trial-0000"

    for same in ((), ("schedule.name=constant",)):
        nothing = setformer(*words, *same)
        assert nothing.code == 2
        assert "has ended, so its checkpoint has nothing left to do" in nothing.err
        assert not (tmp_path / "s-trial-0").exists()

    longer = setformer(*words, "--ranks", "2", "schedule.epochs=2", "run.name=longer")
    assert longer.code == 0, longer.err
    steps = [step for kind, step in losses(tmp_path / "longer") if kind == "train"]
    assert (min(steps), max(steps)) == (23, 44)
    assert "longer begins at step 22 of" in longer.err

    again = setformer(*words, "--from-start", "run.name=again")
    assert again.code == 0, again.err
    assert losses(tmp_path / "again") == losses(trial)
    assert setformer(*words, "--best", "2").code == 3


@pytest.mark.drill
def test_trials_that_fail_each_time_end_the_sweep_with_the_reason(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits / "nosuch", SMALL.replace("trials = 2", "trials = 9"))
    failed = setformer("sweep", str(page), timeout=400)
    assert failed.code == 6
    (line,) = failed.error_lines
    assert "3 of 3 trials failed (budget.failed_share = 0.5)" in line or "of 4 trials failed" in line
    assert "nosuch" in line
    assert len(events_of(tmp_path / "s", "asked")) <= 4


@pytest.mark.drill
def test_a_sweep_that_is_told_to_stop_saves_and_goes_on_later(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, SMALL)
    folder = tmp_path / "s"
    process = start("sweep", str(page))
    wait_for(process, lambda: events_of(folder, "reported"))
    stopped = setformer("sweep", "stop", str(folder))
    assert stopped.code == 0, stopped.err
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "nothing to recommend" in out
    saved = [losses(folder / "trials" / f"trial-000{n}") for n in range(2)]
    assert setformer("sweep", "stop", str(folder)).code == 5  # no driver runs it
    process = start("sweep", str(page))
    wait_for(process, lambda: len(events_of(folder, "started")) > 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    done = setformer("sweep", str(page), timeout=400)
    assert done.code == 0, done.err
    for number in range(2):
        now = losses(folder / "trials" / f"trial-000{number}")
        assert saved[number].items() <= now.items()


@pytest.mark.drill
def test_a_lost_head_ends_the_driver_with_a_sentence_and_nothing_is_left(digits: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path, digits, SMALL)
    folder = tmp_path / "s"
    process = start("sweep", str(page))
    wait_for(process, lambda: len(events_of(folder, "started")) == 2)
    left = {pid: words_of(pid) for pid in children(process.pid)}
    head = next(pid for pid, words in left.items() if "gcs_server" in words[0])
    os.kill(head, signal.SIGKILL)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 9, err
    assert "is gone: the same command continues the sweep" in err
    limit = time.monotonic() + 20
    while found := {pid: words for pid, words in left.items() if alive(pid)}:
        assert time.monotonic() < limit, f"left behind: {found}"
        time.sleep(0.1)
