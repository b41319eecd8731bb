"""All that is to be measured on a GPU, in order of worth, in tasks of at most nine minutes that can be resumed.

    python -m benchmarks.gpu --out OUT                 run what is not done yet, in order
    python -m benchmarks.gpu --out OUT --list          what is done
    python -m benchmarks.gpu --out OUT --only models   tasks with this in their names
    python -m benchmarks.gpu --out OUT --minutes 9     begin no task, and end the running one, after so long
    python -m benchmarks.gpu --device cpu --small      every task in a tiny form on a CPU, to try this program itself

After every task OUT has gpu.json with all results and gpu.md with their tables. A task that failed or was cut off is
tried again; --again runs those that are done. docs/gpu.md says what each measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from launch.ranks.processes import die_with_parent
from setformer_dist.core.files import write_json, write_text

LONGEST_S = 540.0
_GRACE_S = 20.0
_TOLD = 3000  # characters of a task's output that are kept


@dataclasses.dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: step and what is measured.
        words: after `python -m`; `{json}` is where its JSON goes.
        small: the same in a tiny form.
        needs: a path without which it cannot run; "" for none.
        run: the name of the training that it is, below OUT/runs; "" for none.
    """

    name: str
    words: tuple[str, ...]
    small: tuple[str, ...]
    needs: str = ""
    run: str = ""


def _task(name: str, words: str, small: str, needs: str = "", run: str = "") -> Task:
    return Task(name, tuple(words.split()), tuple(small.split()), needs, run)


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
    stages, profiled = f"benchmarks.stages {_OUT} --ranks 1 --steps 20", f"benchmarks.step_profile {_OUT}"
    found = [
        _task("1 kernels", "pytest -q -p no:cacheprovider tests/numerics/set_triton_cases.py",
              "pytest -q -p no:cacheprovider tests/numerics/test_set_triton.py --collect-only"),
        _task("1 kernels split", "pytest -q -p no:cacheprovider tests/numerics/set_split_triton_cases.py",
              "pytest -q -p no:cacheprovider tests/numerics/test_set_triton.py --collect-only"),
        _task("1 resume", f"{stages} --dtypes bf16 --stages 2", f"{stages} --dtypes fp32 --stages 2"),
        _task("1 resume compiled", f"{stages} --dtypes bf16 --stages 2 --set compile.mode=blocks",
              f"{stages} --dtypes fp32 --stages 0"),
        _task("1 resume graphs", f"{stages} --dtypes bf16 --stages 0 2 --set compile.mode=blocks"
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
    found += [cifar10(net, seed) for seed in (0, 1, 2) for net in _NETS]
    found += [
        _task("7 bf16", f"{stages} --dtypes bf16 --stages 0 1 2 3", f"{stages} --dtypes fp32 --stages 1"),
        _task("7 fp16", f"{stages} --dtypes fp16 --stages 0 1 2 3", f"{stages} --dtypes fp32 --stages 1"),
        _task("7 offload", f"{stages} --dtypes bf16 --stages 3 --set zero.offload=all",
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
    return _task(f"6 cifar10 {net} {seed}", run, f"{run} {short} run.threads=1", _CIFAR, name)


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
    """Return a task's result in Markdown: its rows as a table, or the end of what it said."""
    head = f"## {name}\n\n`{entry['command']}`: exit code {entry['rc']} after {entry['seconds']:.0f} s\n"
    measured = entry.get("json") or {}
    rows = [row for row in measured.get("rows", []) if isinstance(row, dict)]
    if not rows:
        return f"{head}\n```\n{entry['output'][-800:]}\n```\n"
    flat = [
        {key: value for key, value in row.items() if not isinstance(value, list)}
        | {f"{kind} ms": ms for kind, ms in row.get("kinds", {}).items()}
        for row in rows
    ]
    columns = [key for key in dict.fromkeys(key for row in flat for key in row) if key != "kinds"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in flat]
    return f"{head}\n{measured.get('machine', '')}\n\n" + "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run(task: Task, words: Sequence[str], results: Results, limit_s: float, environment: dict[str, str]) -> bool:
    """Run a task within its time, keep its result, and return whether it is done."""
    measured = results.folder / f"{task.name.replace(' ', '-')}.part.json"
    measured.unlink(missing_ok=True)
    filled = [word.replace("{json}", str(measured)).replace("{out}", str(results.folder)) for word in words]
    command = [sys.executable, "-m", *filled]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=die_with_parent(),
    )  # fmt: skip
    interrupted = False
    try:
        output, _ = process.communicate(timeout=limit_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        os.killpg(process.pid, signal.SIGTERM)  # a run saves a checkpoint and ends
        try:
            output, _ = process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        output += f"\ncut off after {time.monotonic() - began:.0f} s\n"
        code = 124
    else:
        code = process.returncode
    result: dict[str, Any] = {
        "command": " ".join(["python -m", *words]),
        "rc": code,
        "seconds": round(time.monotonic() - began, 1),
        "output": output[-_TOLD:],
    }
    if measured.exists():
        result["json"] = json.loads(measured.read_text())
        measured.unlink()
    elif task.run and (summary := results.folder / "runs" / task.run / "summary.json").exists():
        result["json"] = {"machine": describe(), "rows": [_of_run(json.loads(summary.read_text()))]}
    results.add(task, result)
    if interrupted:
        raise KeyboardInterrupt
    return code == 0


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
    parser.add_argument("--again", action="store_true", help="also tasks that are done")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny forms, whose figures mean nothing")
    arguments = parser.parse_args()
    results = Results(arguments.out.absolute())
    end = time.monotonic() + 60 * arguments.minutes
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if arguments.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    failed = False
    for task in tasks():
        if arguments.only and not any(word in task.name for word in arguments.only):
            continue
        missing = bool(task.needs) and not Path(task.needs).exists()
        if arguments.list or missing or (results.done(task) and not arguments.again):
            state = "done" if results.done(task) else f"needs {task.needs}" if missing else "to do"
            print(f"{task.name}: {state}", flush=True)
            continue
        left = end - time.monotonic()
        if left < _GRACE_S:
            print(f"{task.name}: no time left", flush=True)
            continue
        words = task.small if arguments.small else task.words
        good = run(task, words, results, min(LONGEST_S, left), environment)
        failed |= not good
        entry = results.found[task.name]
        print(f"{task.name}: exit code {entry['rc']} after {entry['seconds']:.0f} s", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
