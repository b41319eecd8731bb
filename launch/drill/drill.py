"""`setformer drill`: a real small training under random faults, and whether anything was lost.

    reference   one run without faults
    drill       the same run, again and again, with a fault every few seconds, until enough faults were made:
                after each the run must resume from at most one checkpoint interval before, and at its end all
                losses, the samples of every step and the final weights must equal the reference's, bit by bit

Faults are drawn from a seed: what kind, when, on which rank, which byte of which file. The run is the user's own
command line in processes of its own; nothing in it knows of the drill.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dataloaders.packing.pack import PackOptions, pack_image_folder
from launch.drill.compare import same_as
from launch.drill.faults import FAULTS, FaultInjector
from launch.drill.host_faults import HOST_FAULTS, HostFaultInjector, crew_of
from launch.drill.mounts import keep_mounts_private
from launch.drill.namespaces import Cluster, why_impossible
from launch.drill.run import CHECKPOINT_EVERY, DrillRun
from launch.examples.demo import write_digits
from setformer_dist.core.errors import DrillError
from setformer_dist.core.terminal import open_table

_DISK_MIB = 192


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it.

    Attributes:
        kind: see `launch.drill.faults` and `launch.drill.host_faults`.
        detail: on what.
        reached: steps done when it came.
        resumed: step that the run resumed from.
        floor: step that it had to resume from at least: the newest complete checkpoint's.
        seconds: from the fault to the next optimizer step.
        noticed: seconds from the fault to the end of the attempt, where a supervisor saw it.
    """

    kind: str
    detail: str
    reached: int
    resumed: int
    floor: int
    seconds: float
    noticed: float | None = None

    @property
    def lost(self) -> int:
        """Steps computed again."""
        return max(0, self.reached - self.resumed)

    @property
    def recovered(self) -> bool:
        """Whether the run resumed from the newest complete checkpoint or later."""
        return self.resumed >= self.floor


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs at a folder, for this process and those it starts; yields False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = False
    with contextlib.suppress(OSError):
        if not keep_mounts_private():  # the mount would outlive a drill that is killed
            raise PermissionError
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "setformer-drill", str(folder)],
            check=False,
            capture_output=True,
        )
        mounted = done.returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            _unmount(folder)


def _unmount(folder: Path) -> None:
    for _ in range(20):
        if subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.5)  # the last process of a run that was ended is still leaving
    subprocess.run(["umount", str(folder)], check=False)  # says why


class AnyInjector(Protocol):
    """What makes faults in a run."""

    run: DrillRun
    draw: random.Random

    def mend(self) -> None:
        """Mend what stays broken after a fault, once the run continues."""


@dataclass(frozen=True)
class Scene:
    """Where the runs of a drill take place.

    Attributes:
        crew: words of the command that say where ranks run.
        folder: for the runs.
        injector: makes what makes the faults in a run.
        kinds: the faults: each takes an injector, and returns what it hit and the earliest step from which the run may
            resume.
        harmless: kinds that a run may survive without starting again.
    """

    crew: Sequence[str]
    folder: Path
    injector: Callable[[DrillRun], AnyInjector]
    kinds: Mapping[str, Callable[[Any], tuple[str, int]]]
    harmless: frozenset[str] = frozenset()


@contextlib.contextmanager
def _one_machine(out: Path, ranks: int, draw: random.Random, console: Console) -> Iterator[Scene]:
    with small_disk(out / "disk") as mounted:
        if not mounted:
            console.print("no small disk can be mounted here (that needs root), so there are no full-disk faults")
        kinds = {name: act for name, act in FAULTS.items() if mounted or name != "full disk"}
        disk = out / "disk"
        yield Scene(
            ("--ranks", str(ranks)), disk, lambda run: FaultInjector(run, draw, disk if mounted else None), kinds
        )


@contextlib.contextmanager
def _several_hosts(out: Path, hosts: int, draw: random.Random) -> Iterator[Scene]:
    with Cluster(hosts) as cluster:
        (out / "disk").mkdir()
        acts = {name: act for name, (act, _) in HOST_FAULTS.items()}
        harmless = frozenset(name for name, (_, survives) in HOST_FAULTS.items() if survives)
        yield Scene(crew_of(cluster), out / "disk", lambda run: HostFaultInjector(run, draw, cluster), acts, harmless)


def run_drill(
    out: Path,
    faults: int,
    seed: int,
    ranks: int,
    epochs: int,
    console: Console,
    *,
    hosts: int = 0,
    json_file: Path | None = None,
) -> None:
    """Make faults until there were enough, and print what came of them.

    Args:
        out: folder for all of it; what an earlier drill left there is removed.
        faults: how many.
        seed: of the faults.
        ranks: of the run, on one machine.
        epochs: of each run; when one has come to its end and faults are left, another begins.
        console: for the table.
        hosts: network namespaces with an sshd each, of which all but one train, with one rank each; 0 is one machine.
        json_file: where the table goes as JSON.

    Raises:
        DrillError: something was lost, or a fault was not recovered from, or there can be no hosts here.
    """
    data = _prepared(out, hosts)
    draw, made = random.Random(seed), list[Fault]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    place = _several_hosts(out, hosts, draw) if hosts else _one_machine(out, ranks, draw, console)
    with place as scene, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reference run", total=faults)
        reference = _reference(out, data, ["--ranks", str(hosts - 1 if hosts else ranks)], epochs)
        runs = 0

        def advance() -> None:
            progress.advance(bar, 1)
            _write(out / "drill.json", made)

        while len(made) < faults:
            progress.update(bar, description=f"run {runs + 1}")
            run = DrillRun(scene.folder / f"run-{runs}", data, scene.crew, epochs)
            try:
                _one_run(scene.injector(run), scene, made, faults, advance)
                same_as(reference, run)
            except DrillError as error:
                run.end()
                shutil.copytree(run.out, out / "failed")  # the small disk goes
                where = f"fault {len(made) + 1} of seed {seed}; the run is kept in {out / 'failed'}"
                raise DrillError(f"{error}\n  {where}") from None
            finally:
                run.end()
            shutil.rmtree(run.out)
            runs += 1
    _show(made, runs, epochs, console)
    if json_file is not None:
        _write(json_file, made)
    bad = [f for f in made if not f.recovered]
    if bad:
        raise DrillError(f"{len(bad)} of {len(made)} faults lost more steps than allowed, the first: {bad[0]}")


def _prepared(out: Path, hosts: int) -> Path:
    """Remove what an earlier drill has left, and return packed data.

    Raises:
        DrillError: the folder is not a drill's, or there can be no hosts here.
    """
    if hosts and (reason := why_impossible()) is not None:
        raise DrillError(f"hosts cannot be made on this machine: {reason}")
    if out.exists() and any(out.iterdir()) and not (out / "drill.json").exists():
        raise DrillError(f"{out} is not empty and does not belong to a drill: name another folder")
    if (out / "disk").is_mount():  # of a drill that was killed
        subprocess.run(["umount", str(out / "disk")], check=False)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "drill.json").write_text("{}")
    return _digits(out)


def _write(path: Path, made: list[Fault]) -> None:
    path.write_text(json.dumps([asdict(f) | {"lost": f.lost, "recovered": f.recovered} for f in made], indent=1))


def _digits(out: Path) -> Path:
    write_digits(out / "data" / "images")
    for split in ("train", "val"):
        pack_image_folder(out / "data" / "images" / split, out / "data" / split, PackOptions())
    return out / "data"


def _reference(out: Path, data: Path, crew: Sequence[str], epochs: int) -> DrillRun:
    run = DrillRun(out / "reference", data, crew, epochs)
    try:
        run.start()
        run.wait(lambda: run.code is not None)
        if run.code != 0:
            raise DrillError(f"the run without faults ended with exit code {run.code}:\n  {run.said()}")
    finally:
        run.end()
    return run


def _one_run(injector: AnyInjector, scene: Scene, made: list[Fault], faults: int, advance: Callable[[], None]) -> None:
    """Run to the end, with faults on the way."""
    run = injector.run
    run.start()
    while True:
        # Mostly while it trains, now and then while it starts.
        if injector.draw.random() < 0.85:
            run.wait(lambda: run.trains() or run.code is not None)
        time.sleep(injector.draw.uniform(0, 2.5))
        if run.code is not None or len(made) >= faults:
            break
        made.append(_one_fault(injector, injector.draw.choice(list(scene.kinds)), scene))
        advance()
    ended = run.wait(lambda: run.code is not None)
    if not ended or run.code != 0:
        raise DrillError(f"a run did not finish (exit code {run.code}):\n  {run.said()}")


def _one_fault(injector: AnyInjector, kind: str, scene: Scene) -> Fault:
    """Make a fault and wait until the run goes on."""
    run = injector.run
    at, since, begun = time.monotonic(), time.time(), run.began()
    reached, logged = run.reached(), run.logged()
    detail, floor = scene.kinds[kind](injector)

    def resumed_() -> bool:
        return run.stepped(begun) or (kind in scene.harmless and run.began() == begun and run.logged() > logged)

    came = run.wait(lambda: resumed_() or run.code is not None)
    seconds = time.monotonic() - at
    injector.mend()
    if not came or (run.code not in (None, 0) and not resumed_()):
        raise DrillError(f"{kind} ({detail}) at step {reached}: the run did not resume:\n  {run.said()}")
    steps, reached = _attempts(run)[begun:], _attempts(run)[begun - 1][1] if begun else 0
    resumed = steps[0][0] if steps else reached
    return Fault(kind, detail, reached, resumed, floor, seconds, run.noticed(since))


def _attempts(run: DrillRun) -> list[tuple[int, int]]:
    """Return (first step, steps done at the end) of each attempt that came to its first step."""
    found: list[tuple[int, int]] = []
    for event in run.events():
        if event["event"] == "began":
            found.append((int(event["step"]), int(event["step"])))
        elif event["event"] == "spent" and found:
            found[-1] = (found[-1][0], int(event["step"]))
    return found


def _show(made: list[Fault], runs: int, epochs: int, console: Console) -> None:
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in made:
        by_kind[fault.kind].append(fault)
    table = open_table(
        *("fault", "times", "recovered", "steps lost: mean", "most", "allowed"),
        *("seconds to notice: median", "to the next step: median", "most"),
    )
    rows = [*sorted(by_kind.items()), ("all", made)]
    for kind, found in rows:
        seconds = [f.seconds for f in found]
        noticed = [f.noticed for f in found if f.noticed is not None]
        table.add_row(
            kind,
            str(len(found)),
            str(sum(f.recovered for f in found)),
            f"{statistics.mean(f.lost for f in found):.1f}",
            str(max(f.lost for f in found)),
            str(max(f.reached - f.floor for f in found)),
            f"{statistics.median(noticed):.1f}" if noticed else "",
            f"{statistics.median(seconds):.1f}",
            f"{max(seconds):.1f}",
            end_section=kind == rows[-2][0],
        )
    console.print(table)
    console.print(
        f"{runs} runs of {epochs} epochs, a checkpoint every {CHECKPOINT_EVERY} steps: losses, samples and final "
        "weights equal those of the run without faults, bit by bit",
        highlight=False,
    )
