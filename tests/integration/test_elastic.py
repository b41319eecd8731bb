"""A run that resumes with other ranks, ZeRO stage, offload and micro batch, in the middle of an epoch."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from launch.testing.commands import losses, setformer, start, train_words, wait_for


def samples(run: Path) -> dict[int, list[int]]:
    """Return the sample ids of every step, in the order of the stream; the last line of a step counts."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return {row["step"]: row["ids"] for row in rows}


def test_two_ranks_then_one_then_two_see_the_samples_of_an_uninterrupted_run(digits: Path, tmp_path: Path) -> None:
    own = ("precision.dtype=fp32", "run.record_samples=true", "checkpoint.every_steps=4")
    whole = setformer(*train_words(digits, tmp_path / "whole", *own))
    assert whole.code == 0, whole.err
    parts = (
        (2, ("zero.offload=optimizer",), 4),
        (1, ("zero.stage=0", "batch.micro=8"), 12),
        (2, ("zero.stage=3", "zero.offload=all"), None),
    )
    for ranks, other, until in parts:
        process = start(*train_words(digits, tmp_path / "parts", *own, *other, ranks=ranks))
        if until is not None:
            folder = tmp_path / "parts" / "demo" / "checkpoints" / f"step-{until:08d}"
            wait_for(folder / "manifest.json", process)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == (143 if until else 0), err
    one, other_run = tmp_path / "whole" / "demo", tmp_path / "parts" / "demo"
    assert samples(one) == samples(other_run)
    ids = [i for step in samples(one).values() for i in step]
    assert len(ids) == len(set(ids)) == 22 * 64  # each once in an epoch
    ours, theirs = losses(other_run), losses(one)
    assert ours.keys() == theirs.keys()
    for place, (loss, averaged) in theirs.items():
        assert ours[place][0] == pytest.approx(loss, rel=1e-4), place
        if averaged is not None:
            assert ours[place][1] == pytest.approx(averaged, rel=1e-4)


def test_repeated_samples_go_on_in_the_middle_of_an_epoch(digits: Path, tmp_path: Path) -> None:
    """Bit by bit on as many ranks, and on another number the same samples and copies."""
    own = ("precision.dtype=fp32", "run.record_samples=true", "checkpoint.every_steps=4", "data.augment.repeats=2",
           "data.augment.mixup=0.2", "model.drop_path=0.2")  # fmt: skip
    whole = setformer(*train_words(digits, tmp_path / "whole", *own))
    assert whole.code == 0, whole.err
    one = tmp_path / "whole" / "demo"
    for name, last in (("same", 2), ("other", 1)):
        process = start(*train_words(digits, tmp_path / name, *own))
        wait_for(tmp_path / name / "demo" / "checkpoints" / "step-00000008" / "manifest.json", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 143, err
        ended = setformer(*train_words(digits, tmp_path / name, *own, ranks=last))
        assert ended.code == 0, ended.err
        run = tmp_path / name / "demo"
        assert samples(run) == samples(one)
        assert losses(run).keys() == losses(one).keys()
        if last == 2:
            assert losses(run) == losses(one)
        for place, (loss, _) in losses(one).items():
            assert losses(run)[place][0] == pytest.approx(loss, rel=1e-4), place
    copies = [len(ids) - len(set(ids)) for ids in samples(one).values()]
    assert all(count == len(ids) // 2 for count, ids in zip(copies, samples(one).values(), strict=True))
