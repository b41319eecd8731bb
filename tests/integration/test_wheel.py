"""Wheel and sdist work outside the checkout: configs, templates and C++ sources are inside."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, SHORT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "source"  # a build leaves folders where it builds
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    # As `python -m build` does, without an environment of its own: that would fetch setuptools.
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=copy, check=True, timeout=200, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(sdist)]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=200)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (made,) = built.glob("*.whl")
    return made


@pytest.mark.drill
def test_the_sdist_holds_what_builds_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "setformer_dist/ops/csrc/set_attention.cpp"} <= names


@pytest.mark.drill
def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "configs/runs/demo.toml", "configs/lra/listops.toml", "setformer_dist/report/report.html.j2",
        "setformer_dist/ops/csrc/set_attention.cpp", "setformer_dist/py.typed", "launch/py.typed",
    ):  # fmt: skip
        assert needed in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "setformer", "setformer_dist", "dataloaders", "checkpoints", "launch", "configs",
    }  # fmt: skip
    assert "setformer/py.typed" in names
    for license_file in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f"licenses/{license_file}") for name in names)


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
    program = "import setformer; trained = setformer.load('runs/demo'); print(len(trained.classes), setformer.__file__)"
    used = subprocess.run([sys.executable, "-P", "-c", program], cwd=place, env=environment, capture_output=True,
                          text=True, timeout=300, check=True)  # fmt: skip
    assert used.stdout.splitlines()[-1].startswith(f"10 {site}")  # DeepSpeed warns on standard output
