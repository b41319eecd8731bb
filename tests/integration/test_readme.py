"""The README's commands for one's own images, pasted into a shell's folder as they stand."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, setformer

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "PYTHONPATH": str(ROOT)}  # as torchrun does
SHORTER = ["schedule.epochs=1", "schedule.warmup_epochs=0.0", "run.threads=1"]


def lines_of(heading: str) -> list[str]:
    text = (ROOT / "README.md").read_text().partition(heading)[2]
    block = re.search(r"```\n(.*?)```", text, re.S)
    assert block is not None
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]


@pytest.mark.drill
def test_the_commands_for_own_images_run_as_pasted(digits: Path, tmp_path: Path) -> None:
    for digit in "01":
        shutil.copytree(digits / "images" / "train" / digit, tmp_path / "photos" / digit)
    for name in ("some.jpg", "other.jpg"):
        shutil.copy(next((digits / "images" / "val" / "3").iterdir()), tmp_path / name)
    (tmp_path / "configs").mkdir()  # a folder of the user's own, of a name that we have too
    ran = []
    for line in (*lines_of("## Your own images"), *lines_of("Afterwards:")):
        words = shlex.split(line)
        if not words or words[0] != "setformer":
            continue
        extra = SHORTER if words[1] == "train" else []
        ended = setformer(*words[1:], *extra, cwd=tmp_path)
        assert ended.code == 0, (line, ended.err)
        ran.append(words[1])
    assert ran == ["data", "train", "train", "eval", "predict", "ckpt", "runs"]
    assert (tmp_path / "runs" / "photos" / "report.html").exists()


def test_versions_and_other_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = setformer("--version")
    assert (ended.code, ended.out.split()[0]) == (0, "setformer_dist")
    monkeypatch.setattr("launch.testing.commands.environment", lambda: {**os.environ, **LAUNCHED})
    ended = setformer("train", "demo")
    assert (ended.code, len(ended.error_lines)) == (5, 1), ended.err
    assert "--ranks 4" in ended.err
