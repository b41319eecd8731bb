"""benchmarks.gpu: results are kept after every task, a task is cut at its time, and is tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu
from benchmarks.step_profile import kind_of
from launch.testing.commands import ROOT, assert_gone


def done(running: gpu.Running) -> bool:
    """Return whether a task gets done, when it or its time is over."""
    while not running.over():
        time.sleep(0.02)
    return running.finish()


def test_a_task_is_kept_cut_and_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys, time, pathlib\n"
        "rows = [{'a': 1.5, 'kinds': {'b': 2}}]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'machine': 'here', 'rows': rows}))\n"
        "print('said', flush=True)\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    results = gpu.Results(tmp_path / "out")
    task = gpu.Task("1 tried", (), ())
    assert not done(gpu.Running(task, ("program", "{json}", "60"), results, 2.0, environment))
    assert not gpu.Results(tmp_path / "out").done(task)
    assert results.found["1 tried"]["rc"] == 124
    cut = (tmp_path / "out" / "gpu.md").read_text()
    assert "| 1.5 | 2 |" in cut
    assert "cut off after" in cut
    assert done(gpu.Running(task, ("program", "{json}", "0"), results, 60.0, environment))
    again = gpu.Results(tmp_path / "out")
    assert again.done(task)
    assert "| 1.5 | 2 |" in (tmp_path / "out" / "gpu.md").read_text()
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["1 tried"]["output"] == "said\n"


def test_trainings_stand_side_by_side(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "out")
    for net, seed, top1, finished in (("set", 0, 0.95, True), ("set", 1, 0.96, True), ("swin", 0, 0.9, True),
                                      ("cast", 0, 0.5, False)):  # fmt: skip
        folder = tmp_path / "out" / "runs" / f"gpu-{net}-{seed}"
        folder.mkdir(parents=True)
        summary = {"name": folder.name, "steps": 9, "finished": finished, "images_per_s": 7.0,
                   "evaluation": {"top1": top1 - 0.01, "ema_top1": top1, "loss": 1.0}}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        task = gpu.Task(f"6 cifar10 {net} {seed}", (), (), run=folder.name)
        assert done(gpu.Running(task, ("this",), results, 60.0, dict(os.environ)))
    table = (tmp_path / "out" / "gpu.md").read_text().split("## 6 cifar10, top-1 in percent")[1]
    assert "| set | 95.00 | 96.00 | 95.50 |" in table
    assert "| swin | 90.00 |  | 90.00 |" in table
    assert "cast" not in table


def test_tasks_have_names_of_their_own() -> None:
    names = [task.name for task in gpu.tasks()]
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: name[0])


def test_kinds_of_kernels() -> None:
    for ours in ("forward", "backward_round", "references_backward", "gradients"):
        assert kind_of(ours) == "SeT attention"
    assert kind_of("void cutlass::Kernel2<gemm>") == "product"
    assert kind_of("triton_per_fused_native_layer_norm_convolution_3") == "fused by the compiler"


def test_nothing_is_left_of_a_task_that_is_cut_off(tmp_path: Path) -> None:
    """What runs in a session of its own, as ranks do, would use the device beside the next task."""
    (tmp_path / "program.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    said, environment = tmp_path / "pid", {**os.environ, "PYTHONPATH": str(tmp_path)}
    running = gpu.Running(gpu.Task("1 tried", (), ()), ("program", str(said)), gpu.Results(tmp_path), 60.0, environment)
    while not said.exists() or not said.read_text():
        time.sleep(0.02)
    assert not running.finish()
    assert_gone([int(said.read_text())])


def test_tasks_that_need_not_be_alone_run_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\ntime.sleep(0.5)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    results = gpu.Results(tmp_path)
    running: list[str] = []
    most: list[list[str]] = []

    class Watched(gpu.Running):
        def finish(self) -> bool:
            running.remove(self.task.name)
            return super().finish()

    def start(task: gpu.Task, words: Sequence[str]) -> gpu.Running | None:
        running.append(task.name)
        most.append(list(running))
        return Watched(task, words, results, 60.0, environment)

    asked = [(gpu.Task(name, (), (), alone=name == "c"), ("program",)) for name in "abcd"]
    assert gpu.run(asked, start, jobs=2)
    assert most == [["a"], ["a", "b"], ["c"], ["d"]]
    assert all(results.done(task) for task, _ in asked)


# Packages of the extra "dev" that a machine with PyTorch and the usual scientific packages does not have.
UNUSUAL = ("moto", "ray", "fastapi", "flask", "optuna", "mlflow", "wandb", "webdataset", "playwright", "psycopg",
           "sqlalchemy", "openslide", "ot", "imagecodecs", "s3fs", "cmaes", "plotly")  # fmt: skip


def test_cases_of_kernels_need_no_unusual_package(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({UNUSUAL}))\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), *sys.path)))
    tasks = [task.words for task in gpu.tasks() if task.words[0] == "pytest"]
    files = [words[-1] for words in tasks]
    assert len(files) > 2
    words = [sys.executable, "-m", *tasks[0][:-1], *files, "-n", "0", "--collect-only"]
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
