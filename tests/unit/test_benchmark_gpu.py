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


def test_tasks_have_names_of_their_own() -> None:
    names = [task.name for task in gpu.tasks()]
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: name[0])


def test_kinds_of_kernels() -> None:
    assert kind_of("forward") == "SeT attention"
    assert kind_of("void cutlass::Kernel2<gemm>") == "product"
    assert kind_of("triton_poi_fused_add_3") == "fused by the compiler"
