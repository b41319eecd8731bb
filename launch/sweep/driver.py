"""The driver of a sweep: it asks for points, starts runs, judges their evaluations, stops them, and goes on.

    journal --> state --+--> what is to run --> actors (Ray) --> run folders
                        ^                                            |
                        +------------- events <--- evaluations, ends-+

Every event is in the journal before the driver acts on it, and every decision follows from the journal, so a driver
that is killed at any instant is continued by the next one. Runs that were interrupted resume from their checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from launch.hosts.names import HostSpec
from launch.ranks.signals import Received
from launch.sweep.actors import Actors, Key, Need, check_room
from launch.sweep.journal import Event, Journal
from launch.sweep.page import Sweep
from launch.sweep.progress import Progress, ProgressReader
from launch.sweep.state import DONE, FAILED, PRUNED, REPLACED, WAITING, Book, Trial
from launch.sweep.trial import LOG, Command, hand_over, no_room, why_ended, words_of, write_config
from setformer_dist.core.errors import LaunchError, RankFailedError, TransientError
from setformer_dist.core.words import counted

STOP_FILE = "stop"
_DONE = "done"
_TICK_S, _STOPPING_TICK_S = 0.5, 0.1
_ROOM_EVERY_S = 5.0
_KILL_AFTER_S = 0.5  # beyond budget.stop_s
_WAIT_EVERY_S = 2.0


@dataclass
class Running:
    """A run that has been started.

    Attributes:
        since: when, of a monotonic clock.
        reader: of its folder.
        progress: as last read.
        first_share: of the run's length that an earlier start had done; None before it is known.
        stopped_at: when it was asked to end; None while it was not.
    """

    since: float
    reader: ProgressReader
    progress: Progress = field(default_factory=Progress)
    first_share: float | None = None
    stopped_at: float | None = None


def may_ask(sweep: Sweep, book: Book) -> bool:
    """Return whether the searcher is to be asked for another point; clones are not asked for."""
    config = sweep.config
    limit = min(config.budget.trials, config.scheduler.population if config.scheduler.name == "pbt" else math.inf)
    return len(book.trials) < limit and not book.exhausted


def remains(sweep: Sweep, book: Book) -> bool:
    """Return whether something is to be run."""
    return may_ask(sweep, book) or any(not trial.over for trial in book.trials)


class Driver:
    """Runs a sweep to its end.

    Args:
        sweep: to run.
        journal: of its folder, which this process holds.
        received: stop signals.
        say: prints a line for the user.
        show: called after each look with the state and the runs.
        cluster_lost: says that the cluster is gone; None while it answers.
        folder_lost: says that the sweep's folder is gone, or another driver's; None while it is this one's.
        nodes: addresses, and the ranks that trials may have of each; none for the whole cluster.
    """

    def __init__(
        self,
        sweep: Sweep,
        journal: Journal,
        received: Received,
        say: Callable[[str], None],
        show: Callable[[Book, dict[Key, Running]], None] = lambda book, running: None,
        cluster_lost: Callable[[], str | None] = lambda: None,
        folder_lost: Callable[[], str | None] = lambda: None,
        nodes: Sequence[HostSpec] = (),
    ) -> None:
        self._sweep, self._budget = sweep, sweep.config.budget
        self._journal, self._received = journal, received
        self._say, self._show = say, show
        self._cluster_lost, self._folder_lost = cluster_lost, folder_lost
        self.book = Book(sweep)
        for event in list(journal.events):
            self.book.take(dict(event))
        self._need = Need.of(self._budget)
        self._actors = Actors(self._need, nodes)
        self.running: dict[Key, Running] = {}
        self._deaths: dict[Key, int] = {}
        self._ended: list[Trial] = []
        self._room, self._room_at = 0, -_ROOM_EVERY_S
        self._since = time.monotonic()
        self._hours_before = self.book.hours

    def run(self, wait: bool = False) -> int:
        """Work until the budget is used up, a stop is asked for, or too many trials have failed.

        Args:
            wait: for nodes, where trials do not fit.

        Returns:
            0, or 128 + the stop signal.

        Raises:
            LaunchError: trials do not fit.
            RankFailedError: too many have failed.
            TransientError: the cluster or the folder is gone, or the journal cannot be written.
        """
        if not remains(self._sweep, self.book):
            self._check_any_left()
            return 0
        if not self._wait_for_room(wait):
            return self._code()
        if not self.book.begun:
            self._write({"event": "began", "optuna": metadata.version("optuna")})
        self._write({"event": "opened"})
        try:
            why = self._work()
        except BaseException:
            for key in list(self.running):
                self._actors.release(key)
            raise
        self._write({"event": "over", "why": why})
        if why != _DONE and not self._received.stop:
            self._say(f"the sweep ends: {why}")
        if why == _DONE:
            self._check_any_left()
        return self._code()

    def _code(self) -> int:
        return 128 + self._received.stop[0] if self._received.stop else 0

    def _wait_for_room(self, wait: bool) -> bool:
        members = self._sweep.config.scheduler.population if self._sweep.config.scheduler.name == "pbt" else 1
        told = False
        while self._asked_to_stop() is None:
            try:
                check_room(self._budget, members, self._actors.nodes())
                return True
            except LaunchError as error:
                if not wait:
                    raise
                if not told:
                    self._say(f"waiting for nodes: {error}")
                told = True
            self._received.wait_for_stop(_WAIT_EVERY_S)
        return False

    def _work(self) -> str:
        while True:
            if (fault := self._cluster_lost()) is not None:
                self.running.clear()  # nothing of them can be reached; they end with their nodes
                raise TransientError(fault)
            if (fault := self._folder_lost()) is not None:
                raise TransientError(fault)
            why = self._why_to_stop()
            if why is None:
                self._look()
                self._act()
                self._check_failures()
                self._start_what_fits()
                if not remains(self._sweep, self.book):
                    return _DONE
            self._show(self.book, self.running)
            if why is not None:
                self._stop_all()
                return why
            stopping = any(run.stopped_at is not None for run in self.running.values())
            self._received.wait(_STOPPING_TICK_S if stopping else _TICK_S)

    def _asked_to_stop(self) -> str | None:
        if self._received.stop:
            return "stopped"
        return "stopped by `setformer sweep stop`" if (self._sweep.folder / STOP_FILE).exists() else None

    def _why_to_stop(self) -> str | None:
        if (asked := self._asked_to_stop()) is not None:
            return asked
        hours = self._hours_before + (time.monotonic() - self._since) / 3600
        if self._budget.hours and hours >= self._budget.hours:
            return f"budget.hours = {self._budget.hours:g} are used up"
        return None

    def _write(self, event: Event) -> Event:
        """Take an event and write it, before anything is done about it."""
        taken = self.book.take({**event, "time": time.time()})
        self._journal.append(taken)
        return taken

    # What the runs do.

    def _look(self) -> None:
        for key, running in list(self.running.items()):
            running.progress = running.reader.read()
            if running.first_share is None:
                running.first_share = running.progress.share or 0.0
            self._report(key, running.progress)
        for key, code in list(self._actors.ended()):
            self._take_end(key, code)

    def _report(self, key: Key, progress: Progress) -> None:
        trial = self.book.trials[key[0]]
        for step, value in progress.evals if key[1] == 0 else ():
            if trial.stop or trial.clone_of is not None:
                return
            if not trial.reports or step > trial.reports[-1][0]:
                self._write({"event": "reported", "trial": trial.number, "step": step, "value": value})

    def _take_end(self, key: Key, code: int | str | None) -> None:
        running = self.running.pop(key)
        progress = running.progress = running.reader.read()
        self._report(key, progress)
        trial = self.book.trials[key[0]]
        folder = self._sweep.run_folder(*key)
        if code == 0:
            value, why = progress.reached(self._sweep.metric, self._sweep.mode, self._sweep.config.sweep.value)
            self._end(key, DONE if value is not None else FAILED, value, why, running)
        elif trial.stop or trial.clone_of is not None:
            self._end_stopped(trial, running)
        elif isinstance(code, str):
            self._end(key, FAILED, None, code, running)
        elif code is None or code < 0 or code >= 128:  # killed, or told to stop by someone else
            self._deaths[key] = self._deaths.get(key, 0) + 1
            if self._deaths[key] > self._budget.restarts:
                why = f"its process or its node died {self._deaths[key]} times (budget.restarts)"
                self._end(key, FAILED, None, why, running)
            else:
                self._say(f"trial {key[0]}: its process or its node died; it resumes from its newest checkpoint")
        else:
            self._fail(key, why_ended(folder / LOG, code), running)

    def _fail(self, key: Key, why: str, running: Running) -> None:
        if no_room(self._sweep.folder, why):
            self._stop_all()
            raise TransientError(
                f"trial {key[0]} found no room on a disk: {why}; make room, and start the sweep again, which continues "
                "it"
            )
        self._end(key, FAILED, None, why, running)

    def _end(self, key: Key, state: str, value: float | None, why: str, running: Running | None) -> None:
        seconds = time.monotonic() - running.since if running is not None else 0.0
        reports = self.book.trials[key[0]].reports
        step = running.progress.step if running is not None else reports[-1][0] if reports else 0
        event: Event = {"event": "ended", "trial": key[0], "seed": key[1], "state": state, "value": value,
                        "step": step, "seconds": seconds}  # fmt: skip
        if running is not None and running.stopped_at is not None:
            event["stop_seconds"] = time.monotonic() - running.stopped_at
        self._write({**event, **({"why": why} if why else {})})
        trial = self.book.trials[key[0]]
        if trial.over:
            self._ended.append(trial)
        shown = f" {self._sweep.metric} {value:.4f}" if value is not None else f" {why}" if why else ""
        self._say(f"trial {key[0]}{f', seed {key[1]}' if key[1] else ''}: {state}{shown}")

    def _end_stopped(self, trial: Trial, running: Running | None) -> None:
        state = REPLACED if self.book.clone_for(trial) is not None else PRUNED
        seed = next((at for at, run in enumerate(trial.runs) if run.state == WAITING), 0)
        self._end((trial.number, seed), state, None, "", running)

    # What is decided about them.

    def _act(self) -> None:
        now = time.monotonic()
        for trial in self.book.trials:
            if trial.over:
                continue
            if trial.clone_of is not None and not trial.stop:
                self._clone(trial)
            if not trial.stop:
                continue
            keys = [key for key in self.running if key[0] == trial.number]
            if not keys:
                self._end_stopped(trial, None)
            for key in keys:
                running = self.running[key]
                if running.stopped_at is None:
                    running.stopped_at = now
                    self._actors.stop(key)
                elif now - running.stopped_at > self._budget.stop_s + _KILL_AFTER_S:
                    self._kill(key)

    def _kill(self, key: Key) -> None:
        self._actors.release(key)
        running = self.running.pop(key)
        self._end_stopped(self.book.trials[key[0]], running)

    def _clone(self, trial: Trial) -> None:
        """Make the clone that replaces a trial, of the newest checkpoint of another."""
        assert trial.clone_of is not None
        source, number = self.book.trials[trial.clone_of], len(self.book.trials)
        step, why = None, f"budget.trials = {self._budget.trials} are used up"
        if number < self._budget.trials:
            step = hand_over(self._sweep.run_folder(source.number, 0), self._sweep.run_folder(number, 0))
            why = f"trial {source.number} has no checkpoint yet"
        if step is not None and self._reader(source).read().ends_at(step):
            shutil.rmtree(self._sweep.run_folder(number, 0), ignore_errors=True)
            step, why = None, f"trial {source.number} has done all its steps"
        if step is None:
            self._write({"event": "kept", "trial": trial.number, "why": why})
            return
        self._write({"event": "cloned", "trial": number, "point": self.book.explored(source), "source": source.number,
                     "step": step, "replaces": trial.number})  # fmt: skip
        self._say(
            f"trial {trial.number} is replaced by trial {number}, a clone of trial {source.number} at step {step}"
        )

    # What is started.

    def _waiting(self) -> list[Key]:
        """Return the runs that are to be started: seeds of points that were not stopped, and what was interrupted."""
        found = []
        for trial in self.book.trials:
            if trial.over or trial.stop or trial.clone_of is not None:
                continue
            for seed, run in enumerate(trial.runs):
                ready = seed == 0 or trial.runs[0].state == DONE
                if run.state == WAITING and ready and (trial.number, seed) not in self.running:
                    found.append((trial.number, seed))
        return found

    def _start_what_fits(self) -> None:
        if time.monotonic() - self._room_at > _ROOM_EVERY_S:
            self._room, self._room_at = self._need.times_on(self._actors.nodes()), time.monotonic()
        slots = min(self._room, self._budget.parallel or self._room) - len(self.running)
        for key in self._waiting()[: max(0, slots)]:
            self._start(key)
            slots -= 1
        while slots > 0 and may_ask(self._sweep, self.book):
            self._write({"event": "asked", "trial": len(self.book.trials)})
            self._start((len(self.book.trials) - 1, 0))
            slots -= 1

    def _start(self, key: Key) -> None:
        trial, seed = self.book.trials[key[0]], key[1]
        config = self._sweep.run_config(trial.point, seed, self._sweep.run_name(*key))
        path = write_config(config)
        self._write({"event": "started", "trial": key[0], "seed": seed})
        words = words_of(path, self._budget.ranks, self._budget.stop_s)
        log = str(config.folder / LOG)
        command = Command(
            words, self._budget.threads, self._budget.gpus_per_rank > 0, str(Path(log).absolute()), str(Path.cwd())
        )
        self._actors.start(key, command)
        self.running[key] = Running(time.monotonic(), self._reader(trial, seed))

    def _reader(self, trial: Trial, seed: int = 0) -> ProgressReader:
        config = self._sweep.run_config(trial.point, seed, self._sweep.run_name(trial.number, seed))
        length = config.schedule.epochs, config.schedule.steps
        return ProgressReader(config.folder, self._sweep.metric, length)

    # The end.

    def _check_failures(self) -> None:
        failed = [trial for trial in self._ended if trial.state == FAILED]
        if len(self._ended) < self._budget.failed_least or len(failed) < self._budget.failed_share * len(self._ended):
            return
        why = next((run.why for run in failed[-1].runs if run.why), "")
        message = (
            f"{len(failed)} of {counted(len(self._ended), 'trial')} failed (budget.failed_share = "
            f"{self._budget.failed_share:g}), the last one: {why}"
        )
        self._stop_all()
        self._write({"event": "over", "why": message})
        raise RankFailedError(message)

    def _check_any_left(self) -> None:
        """Raise RankFailedError where each trial of a sweep that is over has failed."""
        if self.book.trials and all(trial.state == FAILED for trial in self.book.trials):
            count = counted(len(self.book.trials), "trial")
            raise RankFailedError(f"the sweep is over: of {count} each one failed, the last one: {self._last_reason()}")

    def _last_reason(self) -> str:
        reasons = [run.why for trial in self.book.trials if trial.state == FAILED for run in trial.runs if run.why]
        return reasons[-1] if reasons else ""

    def _stop_all(self) -> None:
        """Have all runs save and end; a run that ends well meanwhile counts."""
        for key, running in self.running.items():
            running.stopped_at = running.stopped_at or time.monotonic()
            self._actors.stop(key)
        limit = time.monotonic() + self._budget.stop_s + _KILL_AFTER_S
        while self.running and time.monotonic() < limit and not self._received.forced:
            for key, code in list(self._actors.ended()):
                if code == 0:
                    self._take_end(key, code)
                else:
                    self.running.pop(key)
            with contextlib.suppress(OSError):
                self._received.wait(0.1)
        for key in list(self.running):
            self._actors.release(key)
            self.running.pop(key)
