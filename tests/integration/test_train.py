"""The main job through the command line: it trains, resumes bit by bit, stops when asked, and is the same under
DeepSpeed's launcher."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.manifest import read_manifest
from launch.ranks.environment import choose_port
from launch.run.trained import evaluate_checkpoint, load_trained, open_named_split
from launch.testing.commands import (
    DEMO,
    ROOT,
    SHORT,
    alive,
    assert_gone,
    children,
    environment,
    kill_ranks,
    losses,
    setformer,
    start,
    train_words,
    wait_for,
)


@pytest.fixture(scope="module")
def whole_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's config for one epoch, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    ended = setformer(*train_words(digits, out))
    assert ended.code == 0, ended.err
    return out / "demo"


def test_class_folders_train_like_the_shards_packed_from_them(digits: Path, tmp_path: Path, whole_run: Path) -> None:
    ended = setformer(*train_words(digits / "images", tmp_path))
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "demo") == losses(whole_run)


def shm_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "deepspeed" in name or "torch_" in name}  # noqa: PTH208


def assert_nothing_shared_stays(before: set[str], timeout: float = 10) -> None:
    """Wait for the files of other tests, which run next to this one; those of a run that is over would stay."""
    deadline = time.monotonic() + timeout
    while left := shm_files() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 22
    assert 0.1 < summary["evaluation"]["top1"] <= 1.0
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["kind"] == "train" and r["step"] == 10)
    assert set(row["seconds"]) == {
        "data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation", "refresh", "other",
    }  # fmt: skip
    assert row["seconds"]["forward"] > 0
    assert row["seconds"]["communication"] > 0
    assert row["tokens_per_s"] == pytest.approx(row["images_per_s"] * 64)
    assert next(r for r in rows if r["kind"] == "eval")["samples"] == 360
    html = (whole_run / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert (whole_run / "logs" / "rank-00001.log").stat().st_size > 0
    assert list((whole_run / "tensorboard").iterdir())


def test_eval_and_predict_and_listing_of_a_run(whole_run: Path, digits: Path) -> None:
    scored = setformer("eval", str(whole_run), "--weights", "plain", "--data", str(digits))
    assert scored.code == 0, scored.err
    evaluation = json.loads((whole_run / "summary.json").read_text())["evaluation"]
    found = re.search(r"top-1 ([0-9.]+)%", scored.out)
    assert found is not None
    assert float(found[1]) / 100 == pytest.approx(evaluation["top1"], abs=0.01)
    assert "on 360 samples" in scored.out
    images = sorted((digits / "images" / "val").rglob("*.png"))[:3]
    predicted = setformer("predict", str(whole_run), *map(str, images), "--top", "2")
    assert predicted.code == 0, predicted.err
    assert [line.split(":")[0] for line in predicted.out.splitlines() if ".png:" in line] == [str(i) for i in images]
    listed = setformer("ckpt", "ls", str(whole_run), "--verify")
    assert listed.code == 0
    assert listed.out.count("verified") == 2  # keep_last of the config


def test_a_folder_of_images_and_the_figures_for_programs(whole_run: Path, digits: Path) -> None:
    threes = digits / "images" / "val" / "3"
    predicted = setformer("predict", str(whole_run), str(threes), "--top", "2", "--json")
    assert predicted.code == 0, predicted.err
    lines = [json.loads(line) for line in predicted.out.splitlines() if line.startswith("{")]
    assert [line["image"] for line in lines] == [str(image) for image in sorted(threes.iterdir())]
    assert all(len(line["classes"]) == 2 for line in lines)
    scored = setformer("eval", str(whole_run), "--weights", "plain", "--data", str(digits), "--json")
    (found,) = [json.loads(line) for line in scored.out.splitlines() if line.startswith("{")]
    assert found["checkpoint"] == str(whole_run / "checkpoints" / "step-00000022")
    assert found["weights"] == "plain"
    assert found["samples"] == 360
    assert found["metrics"].keys() >= {"top1", "top5", "loss"}


def test_an_evaluation_tells_how_far_it_is(whole_run: Path, digits: Path) -> None:
    trained = load_trained(whole_run, "plain")
    told: list[int] = []
    result = evaluate_checkpoint(trained, open_named_split(trained, str(digits), None), 128, told.append)
    assert result.samples == 360
    assert told == [128, 128, 104]


def test_the_best_checkpoint_is_taken_where_it_is_asked_for(digits: Path, tmp_path: Path) -> None:
    ended = setformer(*train_words(digits, tmp_path, ranks=1))
    assert ended.code == 0, ended.err
    run = tmp_path / "demo"
    folder = run / "checkpoints" / "step-00000020"
    surely_best = dataclasses.replace(read_manifest(folder), metrics={"top1": 1.0})
    (folder / "manifest.json").write_text(json.dumps(surely_best.to_json()))
    newest, best = setformer("eval", str(run)), setformer("eval", str(run), "--best")
    assert "step-00000022 (" in newest.out
    assert "step-00000020 (" in best.out, best.err
    exported = setformer("ckpt", "export", str(run), str(tmp_path / "best"), "--best")
    assert exported.code == 0, exported.err
    assert "step-00000020" in (tmp_path / "best" / "README.md").read_text()


def test_a_finished_run_started_again_says_so_and_changes_nothing(whole_run: Path, digits: Path) -> None:
    before = losses(whole_run)
    ended = setformer(*train_words(digits, whole_run.parent))
    assert ended.code == 0, ended.err
    assert "resumed at step 22" in ended.err
    assert "the run is done, and no step is left to train" in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("done: 22 steps, best top1 0.")
    assert last.endswith(f"report {whole_run / 'report.html'}")
    assert losses(whole_run) == before


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        ("bf16", 2),
        *(pytest.param(d, s, marks=pytest.mark.drill) for d in ("fp32", "bf16") for s in (0, 1, 2, 3)),
    ],
)
def test_killed_ranks_resume_bit_by_bit(digits: Path, tmp_path: Path, dtype: str, stage: int) -> None:
    overrides = (f"precision.dtype={dtype}", f"zero.stage={stage}")
    whole = setformer(*train_words(digits, tmp_path / "whole", *overrides))
    assert whole.code == 0, whole.err
    words = train_words(digits, tmp_path / "killed", *overrides)
    process = start(*words)
    wait_for(tmp_path / "killed" / "demo" / "checkpoints" / "step-00000010" / "manifest.json", process)
    pids = children(process.pid)
    kill_ranks(process)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "was ended by SIGKILL" in err
    assert "restarting from the newest checkpoint" in err
    assert "resumed at step" in err
    assert_gone(pids)
    assert losses(tmp_path / "killed" / "demo") == losses(tmp_path / "whole" / "demo")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_becomes_a_checkpoint_and_a_clean_exit(
    digits: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    shared = shm_files()
    process = start(*train_words(digits, tmp_path, "checkpoint.every_steps=1000", "schedule.epochs=50"))
    wait_for(tmp_path / "demo" / "metrics.jsonl", process)
    while not losses(tmp_path / "demo"):
        assert process.poll() is None
    pids = children(process.pid)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert_gone(pids)
    saved = sorted((tmp_path / "demo" / "checkpoints").iterdir())
    assert len(saved) == 1
    assert (saved[0] / "manifest.json").exists()
    last = max(step for kind, step in losses(tmp_path / "demo"))
    assert saved[0].name == f"step-{last:08d}"
    assert_nothing_shared_stays(shared)


@pytest.mark.drill
@pytest.mark.parametrize("stops", [1, 3])
def test_a_stop_between_two_metric_lines_and_before_an_evaluation_changes_no_line(
    digits: Path, tmp_path: Path, stops: int
) -> None:
    overrides = ("run.log_every=7", "eval.every_steps=8", "checkpoint.every_steps=1000")
    whole = setformer(*train_words(digits, tmp_path / "whole", *overrides, ranks=1))
    assert whole.code == 0, whole.err
    words = train_words(digits, tmp_path / "stopped", *overrides, ranks=1)
    metrics = tmp_path / "stopped" / "demo" / "metrics.jsonl"
    for _ in range(stops):
        before = metrics.stat().st_size if metrics.exists() else 0
        process = start(*words)
        wait_for(metrics, process)
        while metrics.stat().st_size == before:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # the steps after the line, or the evaluation, are cut short
        process.communicate(timeout=120)
        assert process.returncode == 143
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "stopped" / "demo") == losses(tmp_path / "whole" / "demo")


def test_a_killed_supervisor_takes_its_ranks_along(digits: Path, tmp_path: Path) -> None:
    process = start(*train_words(digits, tmp_path, "schedule.epochs=50"))
    wait_for(tmp_path / "demo" / "metrics.jsonl", process)
    pids = children(process.pid)
    assert len(pids) >= 2
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=30)
    assert_gone(pids)


@pytest.mark.drill
def test_deepspeeds_own_launcher_gives_the_same_losses(digits: Path, tmp_path: Path, whole_run: Path) -> None:
    shared = shm_files()
    words = [f"data.root={digits}", f"run.out={tmp_path}", *SHORT]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    done = subprocess.run(
        [
            launcher,
            "--num_accelerators",
            "2",
            "--master_port",
            str(choose_port(None)),
            "--module",
            "launch.entry",
            DEMO,
            *words,
        ],
        cwd=ROOT,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "demo") == losses(whole_run)
    assert_nothing_shared_stays(shared)


def test_one_rank_and_four_accumulations_give_the_losses_of_two_ranks(
    digits: Path, tmp_path: Path, whole_run: Path
) -> None:
    two = setformer(*train_words(digits, tmp_path / "two", "precision.dtype=fp32"))
    one = setformer(
        *train_words(digits, tmp_path / "one", "precision.dtype=fp32", "batch.micro=16", "zero.stage=0", ranks=1)
    )
    assert (two.code, one.code) == (0, 0), two.err + one.err
    first, second = losses(tmp_path / "two" / "demo"), losses(tmp_path / "one" / "demo")
    assert first.keys() == second.keys()
    for key, (loss, ema_loss) in first.items():
        assert second[key][0] == pytest.approx(loss, rel=2e-5), key
        if ema_loss is not None:
            assert second[key][1] == pytest.approx(ema_loss, rel=2e-5), key
