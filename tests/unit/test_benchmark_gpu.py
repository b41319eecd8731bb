"""benchmarks.gpu: results are kept after every task, a task is cut at its time, and is tried again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks import gpu
from benchmarks.step_profile import kind_of


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
    assert not gpu.run(task, ("program", "{json}", "60"), results, 2.0, environment)
    assert not gpu.Results(tmp_path / "out").done(task)
    assert results.found["1 tried"]["rc"] == 124
    assert gpu.run(task, ("program", "{json}", "0"), results, 60.0, environment)
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
        assert gpu.run(task, ("this",), results, 60.0, dict(os.environ))
    table = (tmp_path / "out" / "gpu.md").read_text().split("## 6 cifar10, top-1 in percent")[1]
    assert "| set | 95.00 | 96.00 | 95.50 |" in table
    assert "| swin | 90.00 |  | 90.00 |" in table
    assert "cast" not in table


def test_tasks_have_names_of_their_own() -> None:
    names = [task.name for task in gpu.tasks()]
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: name[0])


def test_kinds_of_kernels() -> None:
    assert kind_of("forward") == "SeT attention"
    assert kind_of("void cutlass::Kernel2<gemm>") == "product"
    assert kind_of("triton_poi_fused_add_3") == "fused by the compiler"
