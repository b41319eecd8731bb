"""All that is to be measured on a GPU, in order of worth, in tasks of at most nine minutes that can be resumed.

    python -m benchmarks.gpu --out OUT                 run what is not done yet, in order
    python -m benchmarks.gpu --out OUT --list          what is done
    python -m benchmarks.gpu --out OUT --only models   tasks with this in their names
    python -m benchmarks.gpu --out OUT --minutes 9     begin no task, and end the running one, after so long
    python -m benchmarks.gpu --out OUT --jobs 5        so many side by side of those that measure no time or memory
    python -m benchmarks.gpu --device cpu --small      every task in a tiny form on a CPU, to try this program itself

After every task OUT has gpu.json with all results and gpu.md with their tables. A task that failed or was cut off is
tried again; --again runs those that are done. docs/gpu.md says what each measures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe
from launch.examples.demo import prepare_data
from launch.ranks.processes import die_with_parent
from launch.testing.commands import children
from setformer_dist.core.files import write_json, write_text

_GRACE_S = 20.0
_KEPT, _TOLD = 20_000, 3000  # characters of a task's output in gpu.json, and in gpu.md where it has no rows or failed


@dataclasses.dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: step and what is measured.
        words: after `python -m`; `{json}` is where its JSON goes.
        small: the same in a tiny form.
        needs: a path without which it cannot run; "" for none.
        run: the name of the training that it is, below OUT/runs; "" for none.
        alone: it measures time or memory, so nothing may run beside it.
    """

    name: str
    words: tuple[str, ...]
    small: tuple[str, ...]
    needs: str = ""
    run: str = ""
    alone: bool = True


def _task(name: str, words: str, small: str, needs: str = "", run: str = "", alone: bool = True) -> Task:
    return Task(name, tuple(words.split()), tuple(small.split()), needs, run, alone)


def _check(name: str, words: str, small: str) -> Task:
    return _task(name, words, small, alone=False)


SIZES = {
    "tiny": "setformer_tiny swin_tiny_patch4_window7_224 convnext_tiny",
    "small": "setformer_small swin_small_patch4_window7_224 convnext_small",
    "base": "setformer_base swin_base_patch4_window7_224 convnext_base",
}
_OUT = "--out {json}"
_NANO = "--models setformer_nano --size 32 --batch 2 --budget 0.1"
_CIFAR = "data/cifar10"
_NETS = {
    "set": ("cifar10", ""), "swin": ("cifar10_peer", ""), "softmax": ("cifar10", "model.args.attention=softmax"),
    "soft": ("cifar10", "model.args.attention=soft"), "cast": ("cifar10", "model.args.attention=cast"),
}  # fmt: skip


def tasks() -> list[Task]:
    """Return all tasks, the most worth first."""
    cases = "pytest -p no:cacheprovider -n 8 -rf --tb=short tests/numerics"  # compiling takes most of the time
    stages, profiled = f"benchmarks.stages {_OUT} --ranks 1 --steps 20", f"benchmarks.step_profile {_OUT}"
    found = [
        _check("1 ahead", f"benchmarks.ahead {_OUT}", f"benchmarks.ahead {_OUT} --processes 1 --only 49"),
        _check("1 kernels", f"{cases}/set_triton_cases.py",
               "pytest -p no:cacheprovider tests/numerics/test_set_triton.py --collect-only"),
        _check("1 kernels block", f"{cases}/block_cases.py",
               "pytest -p no:cacheprovider tests/numerics/test_block.py --collect-only"),
        _check("1 kernels split", f"{cases}/set_split_triton_cases.py",
               "pytest -p no:cacheprovider tests/numerics/test_set_triton.py --collect-only"),
        _check("1 resume", f"{stages} --dtypes bf16 --stages 2", f"{stages} --dtypes fp32 --stages 2"),
        _check("1 resume compiled", f"{stages} --dtypes bf16 --stages 2 --set compile.mode=blocks",
               f"{stages} --dtypes fp32 --stages 0"),
        _check("1 resume graphs", f"{stages} --dtypes bf16 --stages 0 2 --set compile.mode=blocks"
               " compile.cudagraphs=true batch.micro=32 eval.every_steps=7", f"{stages} --dtypes fp32 --stages 0"),
    ]  # fmt: skip
    for size, models in SIZES.items():
        for mode in ("off", "blocks"):
            found.append(
                _task(f"2 models {size} {mode}", f"{profiled} --models {models} --compile {mode}",
                      f"{profiled} {_NANO} --compile off")
            )  # fmt: skip
        if size == "tiny":
            found.append(
                _task("2 models tiny graphs", f"{profiled} --models {models} --compile blocks+graphs model+graphs",
                      f"{profiled} {_NANO} --compile off")
            )  # fmt: skip
    found += [
        _task("2 models one by one", f"{profiled} --models setformer_tiny setformer_base --one-by-one",
              f"{profiled} {_NANO} --one-by-one"),
        _task("2 models tiny model", f"{profiled} --models {SIZES['tiny']} --compile model",
              f"{profiled} {_NANO}"),
        _task("3 attention", f"benchmarks.attention {_OUT} --quadratic 50176 --tokens 49 196 784 3136 12544 50176",
              f"benchmarks.attention {_OUT} --tokens 49 196 --quadratic 196 --operators SDPA --threads 1"),
        _task("4 memory", f"{profiled} --models {SIZES['tiny']} --recompute none block",
              f"{profiled} {_NANO} --recompute none block"),
        _task("4 memory policies",
              f"{profiled} --models setformer_tiny setformer_base --recompute none cheap mlp block",
              f"{profiled} {_NANO} --recompute cheap"),
    ]  # fmt: skip
    for side, batch in ((384, 64), (768, 16)):
        for mode in ("off", "blocks"):
            found.append(
                _task(f"5 images {side} {mode}",
                      f"{profiled} --models {SIZES['tiny']} --size {side} --batch {batch} --compile {mode}",
                      f"{profiled} {_NANO}")
            )  # fmt: skip
    for mode in ("off", "blocks"):
        found.append(
            _task(f"5 segmentation {mode}",
                  f"{profiled} --models {SIZES['tiny']} --size 512 --batch 16 --segment 150 --compile {mode}",
                  f"{profiled} {_NANO} --segment 5")
        )  # fmt: skip
    found.append(
        _task("5 detection", f"{profiled} --models {SIZES['tiny']} --size 800 --batch 8 --detect 80",
              f"{profiled} {_NANO} --detect 5")
    )  # fmt: skip
    found += [cifar10(net, seed) for seed in (0, 1, 2) for net in _NETS]
    found += [
        _check("7 bf16", f"{stages} --dtypes bf16 --stages 0 1 2 3", f"{stages} --dtypes fp32 --stages 1"),
        _check("7 fp16", f"{stages} --dtypes fp16 --stages 0 1 2 3", f"{stages} --dtypes fp32 --stages 1"),
        _check("7 offload", f"{stages} --dtypes bf16 --stages 3 --set zero.offload=all",
               f"{stages} --dtypes fp32 --stages 3 --set zero.offload=all"),
        _task("7 update", f"benchmarks.update {_OUT}",
              f"benchmarks.update {_OUT} --model setformer_nano --dtype fp32 --stages 0 2"),
        _task("7 transfer", f"benchmarks.transfer {_OUT}",
              f"benchmarks.transfer {_OUT} --batch 2 --size 32 --repeats 3"),
        _task("7 engine", f"benchmarks.engine {_OUT} --ranks 1 --dtype bf16 --set model.name=setformer_tiny ~model.args"
              " data.image_size=224 data.augment.crop=resized batch.global_size=128",
              f"benchmarks.engine {_OUT} --ranks 1 --blocks 2 --stages 0"),
        _task("7 checkpoint", f"benchmarks.checkpoint {_OUT} --sizes large", f"benchmarks.checkpoint {_OUT} --repeats 1"
              " --sizes small"),
        _task("7 loader", "benchmarks.loader --json {json} --only ours bare",
              "benchmarks.loader --json {json} --only bare --seconds 0.2", "../shared/data/imagenet_sample.tar.gz"),
    ]  # fmt: skip
    return found


def cifar10(net: str, seed: int) -> Task:
    """Return the training of one network with one seed; a run that was cut off goes on where it was."""
    config, more = _NETS[net]
    name = f"gpu-{net}-{seed}"
    run = (
        f"launch.cli train {config} --ranks 1 data.root={_CIFAR} run.name={name} run.seed={seed} "
        f"run.out={{out}}/runs batch.micro=auto checkpoint.every_steps=500 {more}"
    )
    short = "~schedule.epochs ~schedule.warmup_epochs schedule.steps=2 schedule.warmup_steps=1 batch.global_size=8"
    return _task(f"6 cifar10 {net} {seed}", run, f"{run} {short} run.threads=1", _CIFAR, name, alone=False)


class Results:
    """What is known so far, in two files that are whole at any instant."""

    def __init__(self, folder: Path) -> None:
        """Take up what an earlier call has left."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "gpu.json"
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, task: Task) -> bool:
        """Return whether a task has its result."""
        return self.found.get(task.name, {}).get("rc") == 0

    def add(self, task: Task, result: dict[str, Any]) -> None:
        """Write down a result."""
        self.found[task.name] = result
        write_json(self.folder / "gpu.json", self.found)
        sections = [section(name, entry) for name, entry in self.found.items()]
        write_text(self.folder / "gpu.md", "\n".join([*sections, together(self.found)]))


def section(name: str, entry: dict[str, Any]) -> str:
    """Return a task's result in Markdown: its rows as a table; the end of what it said, if it has none or failed."""
    head = f"## {name}\n\n`{entry['command']}`: exit code {entry['rc']} after {entry['seconds']:.0f} s\n"
    measured = entry.get("json") or {}
    rows = [row for row in measured.get("rows", []) if isinstance(row, dict)]
    said = f"\n```\n{entry['output'][-_TOLD:]}\n```\n"
    if not rows:
        return head + said
    flat = [
        {key: value for key, value in row.items() if not isinstance(value, list)}
        | {f"{kind} ms": ms for kind, ms in row.get("kinds", {}).items()}
        for row in rows
    ]
    columns = [key for key in dict.fromkeys(key for row in flat for key in row) if key != "kinds"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in flat]
    table = f"{head}\n{measured.get('machine', '')}\n\n" + "\n".join(lines) + "\n"
    return table + said if entry["rc"] else table


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class Running:
    """A task that runs.

    Args:
        task: which.
        words: after `python -m`, with `{json}` and `{out}` in them.
        results: where its result is kept.
        limit_s: seconds after which it is ended.
        environment: of its process.
    """

    def __init__(
        self, task: Task, words: Sequence[str], results: Results, limit_s: float, environment: dict[str, str]
    ) -> None:
        self.task, self._words, self._results = task, words, results
        self._measured = results.folder / f"{task.name.replace(' ', '-')}.part.json"
        self._measured.unlink(missing_ok=True)
        self._began = time.monotonic()
        self._end = self._began + limit_s
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the task runs
        filled = [word.replace("{json}", str(self._measured)).replace("{out}", str(results.folder)) for word in words]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *filled], env=environment, stdout=self._output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent(),
        )  # fmt: skip

    def over(self) -> bool:
        """Return whether it has ended, or its time has."""
        return self._process.poll() is not None or time.monotonic() > self._end

    def finish(self) -> bool:
        """End it if it still runs, keep its result, and return whether it is done."""
        cut_off = self._process.poll() is None
        if cut_off:
            self._stop()
        code = 124 if cut_off else self._process.returncode
        took = time.monotonic() - self._began
        self._output.seek(0)
        said = self._output.read() + (f"\ncut off after {took:.0f} s\n" if cut_off else "")
        self._output.close()
        command = " ".join(["python -m", *self._words])
        result: dict[str, Any] = {"command": command, "rc": code, "seconds": round(took, 1), "output": said[-_KEPT:]}
        summary = self._results.folder / "runs" / self.task.run / "summary.json"
        if self._measured.exists():
            result["json"] = json.loads(self._measured.read_text())
            self._measured.unlink()
        elif self.task.run and summary.exists():
            result["json"] = {"machine": describe(), "rows": [_of_run(json.loads(summary.read_text()))]}
        self._results.add(self.task, result)
        print(f"{self.task.name}: exit code {code} after {took:.0f} s", flush=True)
        return code == 0

    def _stop(self) -> None:
        """End it and all that it has started, which may have sessions of their own and would use the device."""
        family = children(self._process.pid)
        os.killpg(self._process.pid, signal.SIGTERM)  # a run saves a checkpoint and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        for pid in (self._process.pid, *family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def run(
    asked: Sequence[tuple[Task, Sequence[str]]], start: Callable[[Task, Sequence[str]], Running | None], jobs: int = 1
) -> bool:
    """Run tasks, given with their words, in order; return whether all are done.

    Args:
        asked: tasks and their words.
        start: starts one; None if there is no time left.
        jobs: how many run side by side of those that need not be alone.
    """
    waiting, running, good = list(asked), list[Running](), True
    try:
        while waiting or running:
            while waiting and _room(waiting[0][0], running, jobs):
                started = start(*waiting.pop(0))
                running += [] if started is None else [started]
            for one in [one for one in running if one.over()]:
                running.remove(one)
                good &= one.finish()
            time.sleep(0.05)
    finally:
        for one in running:
            one.finish()
    return good


def _room(task: Task, running: Sequence[Running], jobs: int) -> bool:
    return not running or (len(running) < jobs and not task.alone and not any(one.task.alone for one in running))


def _of_run(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a training's figures as a row."""
    figures = {f"{name} %": 100 * value for name, value in summary["evaluation"].items() if name.endswith("top1")}
    return {key: summary[key] for key in ("name", "steps", "finished", "images_per_s")} | figures


def together(found: dict[str, dict[str, Any]]) -> str:
    """Return the finished trainings side by side: a row for each network, a column for each seed; "" for none."""
    scores: dict[str, dict[str, float]] = {}
    for name, entry in found.items():
        for row in (entry.get("json") or {}).get("rows", []):
            if name.startswith("6 cifar10 ") and row.get("finished"):
                net, seed = name.split()[-2:]
                scores.setdefault(net, {})[seed] = max(value for key, value in row.items() if key.endswith("top1 %"))
    if not scores:
        return ""
    seeds = sorted({seed for of_net in scores.values() for seed in of_net})
    lines = [
        "| network | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|" + " --- |" * (len(seeds) + 2),
    ]
    for net, of_net in scores.items():
        cells = [f"{of_net[seed]:.2f}" if seed in of_net else "" for seed in seeds]
        lines.append(f"| {net} | " + " | ".join(cells) + f" | {statistics.mean(of_net.values()):.2f} |")
    return "## 6 cifar10, top-1 in percent\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for; exit code 1 if a task failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/gpu"))
    parser.add_argument("--list", action="store_true", help="show the tasks and what is done")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="tasks whose name holds one of these")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--longest", type=float, default=9.0, metavar="MINUTES", help="of one task")
    parser.add_argument("--jobs", type=int, default=1, help="tasks side by side, where they measure no time or memory")
    parser.add_argument("--again", action="store_true", help="also tasks that are done")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny forms, whose figures mean nothing")
    arguments = parser.parse_args()
    results = Results(arguments.out.absolute())
    end = time.monotonic() + 60 * arguments.minutes
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if arguments.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    asked = []
    for task in tasks():
        if arguments.only and not any(word in task.name for word in arguments.only):
            continue
        missing = bool(task.needs) and not Path(task.needs).exists()
        if arguments.list or missing or (results.done(task) and not arguments.again):
            state = "done" if results.done(task) else f"needs {task.needs}" if missing else "to do"
            print(f"{task.name}: {state}", flush=True)
            continue
        asked.append((task, task.small if arguments.small else task.words))

    def start(task: Task, words: Sequence[str]) -> Running | None:
        left = end - time.monotonic()
        if left < _GRACE_S:
            print(f"{task.name}: no time left", flush=True)
            return None
        return Running(task, words, results, min(60 * arguments.longest, left), environment)

    if arguments.jobs > 1:
        prepare_data(Path("runs/demo-data"), Console())  # which tasks side by side would else write at once
    sys.exit(int(not run(asked, start, arguments.jobs)))


if __name__ == "__main__":
    main()
