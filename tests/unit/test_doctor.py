"""The doctor: what it finds is so, and a mix of packages is refused with both places."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from launch.machine import doctor
from launch.machine.doctor import Finding, check_package_origins, diagnose, render
from setformer_dist.core.errors import LaunchError

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = "from launch.machine.doctor import check_package_origins; print(check_package_origins())"


def printed(findings):
    out = io.StringIO()
    return render(findings, Console(file=out, width=200)), out.getvalue()


def run_python(code, *path, cwd):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=False)


def test_this_machine_is_diagnosed_without_noise(tmp_path, capfd):
    findings = {f.topic: f for f in diagnose(tmp_path / "runs" / "not-yet")}
    assert not any(f.status == "problem" for f in findings.values())
    assert findings["accelerator"].value.startswith(("cpu", "cuda"))
    assert {"bf16", "fp16", "space in /dev/shm", "g++", "torch", "our packages"} <= set(findings)
    assert capfd.readouterr() == ("", "")
    code, text = printed(list(findings.values()))
    assert code == 0
    assert "A training run can start here." in text


def test_a_problem_makes_the_exit_code():
    code, text = printed(
        [Finding("a", "fine"), Finding("b", "half", "note", "maybe"), Finding("c", "bad [x]", "problem", "do")]
    )
    assert code == 1
    assert "1 problem" in text
    assert "bad [x]" in text
    assert printed([Finding("b", "half", "note")])[0] == 0


def test_a_missing_and_an_old_package_are_problems_with_a_repair():
    missing = doctor._required("no-such-distribution", "1.2")
    assert (missing.status, missing.repair) == ("problem", 'pip install "no-such-distribution>=1.2"')
    assert doctor._required("torch", "99.1").status == "problem"
    assert doctor._required("torch", "1.13.1").status == "ok"
    assert doctor._optional("no-such-distribution", "fun").status == "note"
    assert doctor._program("no-such-program", "fun").status == "note"


def test_bounds_are_those_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    bounds = dict(line.split(",")[0].split(">=") for line in project["dependencies"])
    assert {name: bounds[name] for name in doctor.REQUIRED} == dict(doctor.REQUIRED)


def test_little_space_is_a_problem(tmp_path):
    usage = namedtuple("Usage", "free")
    low = doctor._space(tmp_path, lambda _: usage(10 * 2**20))
    assert [f.status for f in low if f.topic.startswith("space in")] == ["problem", "note"]
    high = doctor._space(tmp_path, lambda _: usage(10**12))
    assert {f.status for f in high if f.topic.startswith("space in")} == {"ok"}


def test_a_run_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor._space(tmp_path / "file" / "run")
    assert any(f.status == "problem" and f.value == "not allowed" for f in found)


def test_buffers_that_deepspeed_left_are_counted(tmp_path):
    (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0").write_bytes(bytes(3 * 2**20))
    (finding,) = doctor._shared_leftovers(tmp_path)
    assert finding.value == "1 buffers of ended DeepSpeed jobs, 3 MiB"
    assert doctor._shared_leftovers(tmp_path / "none") == []


def test_our_packages_come_from_one_place():
    assert check_package_origins() == REPOSITORY


@pytest.mark.parametrize("name", ["checkpoints", "configs", "dataloaders"])
def test_a_mix_of_packages_is_refused_with_both_places(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    done = run_python(CHECK, tmp_path, REPOSITORY, cwd=tmp_path)
    assert done.returncode != 0
    assert f"package '{name}' comes from {tmp_path} but 'setformer_dist' from {REPOSITORY}" in done.stderr


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(LaunchError, match="'no_such_package' is not found next to"):
        check_package_origins(("setformer_dist", "no_such_package"))


def test_a_broken_deepspeed_is_a_problem_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = doctor._accelerator()
    assert finding.status == "problem"
    assert "libcudart.so.99: cannot open" in finding.value
