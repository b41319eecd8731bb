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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from checkpoints.reader import open_checkpoint
from dataloaders.packing.pack import PackOptions, pack_image_folder
from launch.drill.faults import CHECKPOINT_EVERY, FAULTS, DrillRun, FaultInjector
from launch.drill.mounts import keep_mounts_private
from launch.examples.demo import write_digits
from setformer_dist.core.errors import DrillError
from setformer_dist.core.terminal import open_table

_DISK_MIB = 192
_STATES = ("param", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it.

    Attributes:
        kind: see `launch.drill.faults`.
        detail: on what.
        reached: steps done when it came.
        resumed: step that the run resumed from.
        floor: step that it had to resume from at least: the newest complete checkpoint's.
        seconds: until the next step.
    """

    kind: str
    detail: str
    reached: int
    resumed: int
    floor: int
    seconds: float

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


def run_drill(
    out: Path, faults: int, seed: int, ranks: int, epochs: int, console: Console, json_file: Path | None = None
) -> None:
    """Make faults until there were enough, and print what came of them.

    Args:
        out: folder for all of it; what an earlier drill left there is removed.
        faults: how many.
        seed: of the faults.
        ranks: of the run.
        epochs: of each run; when one has come to its end and faults are left, another begins.
        console: for the table.
        json_file: where the table goes as JSON.

    Raises:
        DrillError: something was lost, or a fault was not recovered from.
    """
    _empty(out)
    data = _digits(out)
    draw = random.Random(seed)
    made: list[Fault] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with small_disk(out / "disk") as mounted, Progress(*columns, console=console, transient=True) as progress:
        kinds = [kind for kind in FAULTS if mounted or kind != "full disk"]
        if not mounted:
            console.print("no small disk can be mounted here (that needs root), so there are no full-disk faults")
        bar = progress.add_task("reference run", total=faults)
        reference = _reference(out, data, ranks, epochs)
        runs = 0

        def advance() -> None:
            progress.advance(bar, 1)
            _write(out / "drill.json", made)

        while len(made) < faults:
            progress.update(bar, description=f"run {runs + 1}")
            folder = out / "disk" / f"run-{runs}"
            folder.mkdir()
            run = DrillRun(folder, data, ranks, seed=0, epochs=epochs)
            injector = FaultInjector(run, draw, out / "disk" if mounted else None)
            try:
                _one_run(injector, kinds, made, faults, advance)
                _same_as(reference, run)
            except DrillError as error:
                run.end()
                shutil.copytree(folder, out / "failed")  # the small disk goes
                raise DrillError(
                    f"{error}\nfault {len(made) + 1} of seed {seed}; the run is kept in {out / 'failed'}"
                ) from None
            finally:
                run.end()
            shutil.rmtree(folder)
            runs += 1
    _show(made, runs, epochs, console)
    if json_file is not None:
        _write(json_file, made)
    bad = [f for f in made if not f.recovered]
    if bad:
        raise DrillError(f"{len(bad)} of {len(made)} faults lost more steps than allowed, the first: {bad[0]}")


def _empty(out: Path) -> None:
    """Make the drill's folder, without what an earlier drill left there.

    Raises:
        DrillError: the folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "drill.json").exists():
        raise DrillError(f"{out} is not empty and does not belong to a drill: name another folder")
    if (out / "disk").is_mount():  # of a drill that was killed
        subprocess.run(["umount", str(out / "disk")], check=False)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "drill.json").write_text("{}")


def _write(path: Path, made: list[Fault]) -> None:
    path.write_text(json.dumps([asdict(f) | {"lost": f.lost, "recovered": f.recovered} for f in made], indent=1))


def _digits(out: Path) -> Path:
    write_digits(out / "data" / "images")
    for split in ("train", "val"):
        pack_image_folder(out / "data" / "images" / split, out / "data" / split, PackOptions())
    return out / "data"


def _reference(out: Path, data: Path, ranks: int, epochs: int) -> DrillRun:
    folder = out / "reference"
    folder.mkdir()
    run = DrillRun(folder, data, ranks, seed=0, epochs=epochs)
    try:
        run.start()
        run.wait(lambda: run.code is not None)
        if run.code != 0:
            raise DrillError(f"the run without faults ended with exit code {run.code}:\n{run.said()}")
    finally:
        run.end()
    return run


def _one_run(
    injector: FaultInjector, kinds: list[str], made: list[Fault], faults: int, advance: Callable[[], None]
) -> None:
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
        made.append(_one_fault(injector, injector.draw.choice(kinds)))
        advance()
    ended = run.wait(lambda: run.code is not None)
    if not ended or run.code != 0:
        raise DrillError(f"a run did not finish (exit code {run.code}):\n{run.said()}")


def _one_fault(injector: FaultInjector, kind: str) -> Fault:
    """Make a fault and wait until the run resumes."""
    run = injector.run
    at, begun = time.monotonic(), run.began()
    reached = run.reached()
    detail, floor = FAULTS[kind](injector)
    came = run.wait(lambda: run.began() > begun or run.code == 0)
    if not came or (run.code not in (None, 0) and run.began() <= begun):
        raise DrillError(f"{kind} ({detail}) at step {reached}: the run did not resume:\n{run.said()}")
    steps, reached = _attempts(run)[begun:], _attempts(run)[begun - 1][1] if begun else 0
    resumed = steps[0][0] if steps else reached
    return Fault(kind, detail, reached, resumed, floor, time.monotonic() - at)


def _attempts(run: DrillRun) -> list[tuple[int, int]]:
    """Return (first step, steps done at the end) of each attempt that came to its first step."""
    found: list[tuple[int, int]] = []
    for event in run.events():
        if event["event"] == "began":
            found.append((int(event["step"]), int(event["step"])))
        elif event["event"] == "spent" and found:
            found[-1] = (found[-1][0], int(event["step"]))
    return found


def _same_as(reference: DrillRun, run: DrillRun) -> None:
    """Compare losses, samples and weights with the run without faults.

    Raises:
        DrillError: naming the first that differs.
    """
    for name, read in (("loss", _losses), ("samples", _samples)):
        ours, theirs = read(run.folder), read(reference.folder)
        differing = sorted(step for step in {*ours, *theirs} if ours.get(step) != theirs.get(step))
        if differing:
            step = differing[0]
            raise DrillError(
                f"the {name} of step {step} is {ours.get(step)!r} after faults and {theirs.get(step)!r} without"
            )
    one, other = (open_checkpoint(r.folder / "checkpoints") for r in (run, reference))
    if one.step != other.step:
        raise DrillError(f"the run ended at step {one.step} after faults and at {other.step} without")
    for state in _STATES:
        after, without = one.read_full(state), other.read_full(state)
        for key, value in without.items():
            if not torch.equal(after[key], value):
                raise DrillError(f"{state} of {key} differs from the run without faults")


def _losses(folder: Path) -> dict[int, float]:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row["kind"] == "train":
                found[row["step"]] = row["loss"]
    return found


def _samples(folder: Path) -> dict[int, list[int]]:
    found = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["step"]] = row["ids"]
    return found


def _show(made: list[Fault], runs: int, epochs: int, console: Console) -> None:
    by_kind: dict[str, list[Fault]] = defaultdict(list)
    for fault in made:
        by_kind[fault.kind].append(fault)
    table = open_table(
        "fault", "times", "recovered", "steps lost: mean", "most", "allowed", "seconds to resume: median", "most"
    )
    rows = [*sorted(by_kind.items()), ("all", made)]
    for kind, found in rows:
        seconds = [f.seconds for f in found]
        table.add_row(
            kind,
            str(len(found)),
            str(sum(f.recovered for f in found)),
            f"{statistics.mean(f.lost for f in found):.1f}",
            str(max(f.lost for f in found)),
            str(max(f.reached - f.floor for f in found)),
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
