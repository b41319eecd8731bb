"""The wheel works outside the checkout: configs, templates and C++ sources are inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, SHORT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "source"  # a build leaves folders where it builds
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=200)
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.drill
def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "configs/runs/demo.toml", "configs/lra/listops.toml", "setformer_dist/report/report.html.j2",
        "setformer_dist/ops/csrc/set_attention.cpp", "setformer_dist/py.typed", "launch/py.typed",
    ):  # fmt: skip
        assert needed in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "setformer_dist", "dataloaders", "checkpoints", "launch", "configs",
    }  # fmt: skip
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.drill
def test_the_demo_trains_from_the_wheel(wheel: Path, digits: Path, tmp_path: Path) -> None:
    site, place = tmp_path / "site", tmp_path / "place"
    place.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, timeout=200)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = [sys.executable, "-P", "-m", "launch.cli"]
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import launch; print(launch.__file__)"],
        cwd=place, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    words = ["train", "demo", f"data.root={digits}", *SHORT]
    done = subprocess.run([*run, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / "demo" / "report.html").exists()
