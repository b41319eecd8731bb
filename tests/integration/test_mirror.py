"""Copies of checkpoints in an object store: a real S3 server on loopback, real runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from launch.testing.commands import losses, setformer, start, train_words, wait_for
from tests.unit.s3 import KEY, S3, SECRET


def copied(s3: S3) -> list[int]:
    """Return the steps of all copies that have a manifest."""
    return sorted(int(m[1]) for key in s3.objects() if (m := re.search(r"/step-(\d+)-[0-9a-f]{8}/manifest.json$", key)))


def events(run: Path, name: str) -> list[dict[str, object]]:
    lines = (run / "ledger.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


@pytest.mark.drill
def test_a_run_whose_disk_is_lost_goes_on_from_its_copies(digits: Path, tmp_path: Path, s3: S3) -> None:
    words = [f"checkpoint.mirror={s3.url}", "checkpoint.keep_last=2"]
    whole = setformer(*train_words(digits, tmp_path / "whole"))
    assert whole.code == 0, whole.err
    process = start(*train_words(digits, tmp_path / "first", *words))
    wait_for(tmp_path / "first" / "demo" / "checkpoints" / "step-00000010", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    last = max(step for _, step in losses(tmp_path / "first" / "demo"))
    assert copied(s3)[-1] == last, err
    shutil.rmtree(tmp_path / "first")

    again = setformer(*train_words(digits, tmp_path / "first", *words))
    assert again.code == 0, again.err
    run = tmp_path / "first" / "demo"
    assert f"checkpoint {last} was fetched from {s3.url}/demo" in again.err
    assert f"resumed at step {last}" in again.err
    there, mine = losses(tmp_path / "whole" / "demo"), losses(run)
    assert mine == {key: value for key, value in there.items() if key[1] > last}
    assert copied(s3)[-1] == 22
    assert len(copied(s3)) <= 3  # two newest and the best
    assert [event["step"] for event in events(run, "copied")][-1] == 22
    assert not [key for key in s3.objects() if "done" in key or "probe" in key]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert not any(secret.encode() in path.read_bytes() for secret in (KEY, SECRET)), path
    assert not any(secret in text for secret in (KEY, SECRET) for text in (out, err, again.out, again.err))
