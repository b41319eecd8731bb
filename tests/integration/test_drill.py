"""A short drill through the command line: faults in a real run, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.drill.namespaces import why_impossible
from launch.testing.commands import setformer

REASON = why_impossible()


@pytest.mark.drill
def test_a_short_drill_loses_nothing(tmp_path: Path) -> None:
    ended = setformer(
        *("drill", "--faults", "2", "--seed", "3", "--epochs", "3", "--out", str(tmp_path / "drill")),
        *("--json", str(tmp_path / "faults.json")),
    )
    assert ended.code == 0, ended.out + ended.err
    made = json.loads((tmp_path / "faults.json").read_text())
    assert len(made) == 2
    assert len({fault["kind"] for fault in made}) > 1
    assert all(fault["recovered"] for fault in made)
    assert "equal those of the run without faults, bit by bit" in " ".join(ended.out.split())


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.timeout(900)
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_short_drill_on_several_hosts_loses_nothing(tmp_path: Path) -> None:
    ended = setformer(
        *("drill", "--hosts", "3", "--faults", "2", "--seed", "3", "--epochs", "4", "--out", str(tmp_path / "drill")),
        *("--json", str(tmp_path / "faults.json")),
        timeout=800,
    )
    assert ended.code == 0, ended.out + ended.err
    made = json.loads((tmp_path / "faults.json").read_text())
    assert len(made) == 2
    assert all(fault["recovered"] for fault in made)
    assert "equal those of the run without faults, bit by bit" in " ".join(ended.out.split())


def test_a_folder_that_is_no_drill_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    ended = setformer("drill", "--out", str(tmp_path))
    assert ended.code == 8
    assert ended.error_lines == [f"error: {tmp_path} is not empty and does not belong to a drill: name another folder"]
    assert (tmp_path / "precious").read_text() == "mine"
