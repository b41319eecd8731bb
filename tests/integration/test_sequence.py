"""Runs whose images lie on several ranks by rows: the losses of one rank, kills, other groups, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launch.testing.commands import losses, setformer, start, train_words, wait_for
from tests.integration.test_bad_input import assert_one_sentence

# A refresh of the references at step 9 samples tokens on both sides of the second kill.
REFRESH = ("refresh.at_steps=[9]", "refresh.sample_steps=3", "refresh.samples=256")
OWN = ("run.record_samples=true", "checkpoint.every_steps=4", "eval.every_steps=11", *REFRESH)


def samples(run: Path) -> dict[int, list[int]]:
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return {row["step"]: row["ids"] for row in rows}


def refreshed(run: Path) -> dict[str, float]:
    """Return the figures of the run's last refresh, of both sets, by name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row = [row for row in rows if row["kind"] == "refresh"][-1]
    sets = {kind: values for kind, values in row.items() if isinstance(values, dict)}
    assert sets.keys() == {"references", "return_references"}
    return {f"{kind}.{name}": value for kind, values in sets.items() for name, value in values.items()}


def figures(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == "eval"}


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with whole images."""
    out = tmp_path_factory.mktemp("whole")
    ended = setformer(*train_words(digits, out, *OWN, ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


def assert_alike(run: Path, whole: Path) -> None:
    """Compare samples, losses and evaluations."""
    assert samples(run) == samples(whole)
    ours, theirs = losses(run), losses(whole)
    assert ours.keys() == theirs.keys()
    for place, (loss, _) in theirs.items():
        assert ours[place][0] == pytest.approx(loss, rel=1e-5), place
    for step, row in figures(whole).items():
        assert figures(run)[step]["samples"] == row["samples"]
        for name in ("loss", "ema_loss"):
            assert figures(run)[step][name] == pytest.approx(row[name], rel=1e-4)


@pytest.mark.drill
def test_killed_with_two_ranks_an_image_and_resumed_with_one_and_the_other_way(
    digits: Path, tmp_path: Path, whole: Path
) -> None:
    """ZeRO-3 with groups of two, killed; then one rank of whole images, killed; then groups of two under ZeRO-1."""
    turns = (
        (2, ("parallel.sequence=2", "zero.stage=3"), 4, signal.SIGKILL),
        (1, ("zero.stage=0",), 8, signal.SIGTERM),
        (2, ("parallel.sequence=2", "zero.stage=1", "zero.offload=optimizer"), None, None),
    )
    for ranks, other, until, how in turns:
        process = start(*train_words(digits, tmp_path, *OWN, *other, ranks=ranks))
        if how is not None:
            wait_for(tmp_path / "demo" / "checkpoints" / f"step-{until:08d}" / "manifest.json", process)
            process.send_signal(how)
        _, err = process.communicate(timeout=300)
        assert (process.returncode == 0) == (how is None), err
    assert_alike(tmp_path / "demo", whole)
    assert refreshed(tmp_path / "demo") == pytest.approx(refreshed(whole), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "ranks", "part"),
    [
        (
            ("parallel.sequence=2", "data.image_size=24", "data.augment.crop=resized"),
            2,
            "24 rows cannot be cut into 2 equal parts for this model",
        ),
        (("parallel.sequence=2",), 1, "1 rank cannot be cut into groups of 2"),
    ],
)
def test_what_cannot_be_cut_is_said_before_training_and_by_a_dry_run(
    digits: Path, tmp_path: Path, overrides: tuple[str, ...], ranks: int, part: str
) -> None:
    for more in ((), ("--dry-run",)):
        ended = setformer(*train_words(digits, tmp_path, *overrides, ranks=ranks), *more)
        assert_one_sentence(ended, 2, part)
        assert not (tmp_path / "demo").exists()


def test_a_dry_run_tells_the_groups(digits: Path, tmp_path: Path) -> None:
    ended = setformer(*train_words(digits, tmp_path, "parallel.sequence=2", "batch.micro=32"), "--dry-run")
    assert ended.code == 0, ended.err
    assert "64 = 32 per group × 2 accumulated × 1 groups of 2 ranks that share each image" in " ".join(
        ended.out.split()
    )
