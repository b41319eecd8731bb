"""Long Range Arena through the command line: prepare, compare, repeat nothing, and say what is wrong in a sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataloaders.lra.tasks import NAMES, Preparation, prepare, task_named
from launch.examples.lra import KINDS, Comparison
from launch.run.inputs import inputs_of
from launch.run.trained import load_trained
from launch.testing.commands import Ended, losses, setformer, train_words
from setformer_dist.core.ranks import RankInfo
from setformer_dist.models.build import build_model
from setformer_dist.models.reference_sets import watched_marginals

FEW = ("schedule.steps=6", "schedule.warmup_steps=2", "run.log_every=1", "eval.every_steps=3", "batch.global_size=16")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short ListOps, with few samples."""
    folder = tmp_path_factory.mktemp("lra")
    prepare(replace(task_named("listops", short=True), counts=(200, 37, 45)), folder, Preparation())
    return folder


def assert_one_sentence(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.error_lines) == 1, ended.err
    for part in parts:
        assert part in ended.error_lines[0]


def compare(root: Path, out: Path, attention: str, *more: str, ranks: int = 1) -> Ended:
    words = ("lra", "listops", "--short", "--attention", attention, "--root", str(root), "--out", str(out))
    return setformer(*words, "--ranks", str(ranks), *FEW, *more)


@pytest.mark.drill
def test_attentions_side_by_side(root: Path, tmp_path: Path) -> None:
    ended = compare(root, tmp_path, "set,softmax", ranks=2)
    assert ended.code == 0, ended.err
    folder = tmp_path / "listops-short"
    results = json.loads((folder / "results.json").read_text())
    assert [row["attention"] for row in results["rows"]] == ["set", "softmax"]
    assert (folder / "results.png").stat().st_size > 10_000
    for row in results["rows"]:
        run = folder / row["attention"]
        test = json.loads((run / "test.json").read_text())
        assert row["accuracy"] == test["top1"]
        assert test["samples"] == results["test_samples"] == 45
        assert row["steps"] == 6
        assert row["steps_per_s"] > 0
        assert row["memory_mib"] > 50
        assert f"{row['accuracy']:.1%}" in ended.out
        assert row["attention"] in ended.out
        assert (run / "report.html").exists()
    # The second call repeats nothing and adds what is new.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    again = compare(root, tmp_path, "set,softmax,cast", ranks=2)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["set", "softmax", "cast"]
    assert rows[:2] == results["rows"]
    # Nor does it forget what is not asked for now.
    assert compare(root, tmp_path, "cast", ranks=2).code == 0
    kept = json.loads((folder / "results.json").read_text())["rows"]
    assert kept == [rows[2], rows[0], rows[1]]
    # One rank is another run: its row stands alone.
    shutil.copytree(folder, tmp_path / "alone" / "listops-short")
    shutil.rmtree(tmp_path / "alone" / "listops-short" / "set")
    assert compare(root, tmp_path / "alone", "set").code == 0
    alone = json.loads((tmp_path / "alone" / "listops-short" / "results.json").read_text())["rows"]
    assert [row["attention"] for row in alone] == ["set"]
    # Another config is another run, not these.
    assert_one_sentence(compare(root, tmp_path, "set", "optim.lr=0.1", ranks=2), 2, "optim.lr is 0.002 there")
    # So are other data: their figures must not stand next to these.
    task = replace(task_named("listops", short=True), counts=(200, 37, 45))
    prepare(task, tmp_path / "other", Preparation(seed=1))
    other = compare(tmp_path / "other", tmp_path, "set", ranks=2)
    assert_one_sentence(other, 3, "listops-short/set was begun on other data", "remove it, or give another --out")


def test_tokens_through_the_ordinary_engine_resume_exactly(root: Path, tmp_path: Path) -> None:
    """Two ranks that resume from a checkpoint give the losses of an uninterrupted run, dropout included."""
    comparison = Comparison(task_named("listops", short=True), ("set",), root, tmp_path / "whole", 2, FEW)
    words = ["train", *comparison.words("set"), "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    words += ["model.args.dropout=0.1", "--ranks", "2"]
    whole = setformer(*words, f"run.out={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    run = tmp_path / "parted" / "set"
    shutil.copytree(tmp_path / "whole" / "set", run)
    # As after a kill at step 4: its checkpoint is the newest one.
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-00000004":
            for file in sorted(path.iterdir(), reverse=True):
                file.unlink()
            path.rmdir()
    (run / "metrics.jsonl").write_text("")
    second = setformer(*words, f"run.out={tmp_path / 'parted'}")
    assert second.code == 0, second.err
    after, before = losses(run), losses(tmp_path / "whole" / "set")
    assert {step for kind, step in after if kind == "train"} == {5, 6}
    assert after.items() <= before.items()
    # One rank adds in another order and drops the same: dropout knows the sample, not who holds it.
    alone = setformer(*words[:-1], "1", f"run.out={tmp_path / 'alone'}", "batch.max_micro=8")
    assert alone.code == 0, alone.err
    for key, value in losses(tmp_path / "alone" / "set").items():
        assert value[0] == pytest.approx(before[key][0], rel=1e-5), key
    # The checkpoint knows its model's input spec, so it serves evaluation alone.
    scored = setformer("eval", str(run), "--split", "test", "--batch", "16")
    assert scored.code == 0, scored.err
    assert "on 45 samples" in scored.out
    assert_one_sentence(setformer("predict", str(run), "photo.png"), 2, "is a model of token sequences")


@pytest.mark.parametrize(("stage", "dtype"), [(3, "fp32"), (0, "bf16")])
def test_the_marginal_error_of_the_plans_is_reported_when_asked(
    stage: int, dtype: str, root: Path, tmp_path: Path
) -> None:
    """37 samples on two ranks: filling does not count, and rank 1's larger errors reach rank 0's record."""
    words = Comparison(task_named("listops", short=True), ("set",), root, tmp_path, 2, FEW).words("set")
    more = ("eval.marginal_error=true", f"zero.stage={stage}", f"precision.dtype={dtype}", "ema.decay=0.5")
    ended = setformer("train", *words, *more, "--ranks", "2")
    assert ended.code == 0, ended.err
    run = tmp_path / "listops-short" / "set"
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["kind"], last["step"]) == ("eval", 6)
    assert "marginal_error_max" in (run / "report.html").read_text()
    assert b"eval/ema_marginal_error_mean" in next((run / "tensorboard").iterdir()).read_bytes()
    for weights, prefix in (("plain", ""), ("ema", "ema_")):
        trained = load_trained(run, weights)  # type: ignore[arg-type]
        inputs = inputs_of(trained.config.data)
        split = inputs.open(str(root / "listops-short"), "val")
        errors = []
        for rank in range(2):
            batch = next(iter(inputs.eval_stream(split, RankInfo(rank, 2), 8).micro_batches()))
            with watched_marginals(trained.model) as found, torch.no_grad():
                trained.model(batch.inputs)
            assert len(found) == 2  # layers
            errors += [e[batch.weights > 0] for e in found]
        every = torch.cat(errors)
        expected = [every.max().item(), every.mean().item()]
        assert expected[0] > expected[1] > 1e-5
        got = [last[f"{prefix}marginal_error_{kind}"] for kind in ("max", "mean")]
        assert got == pytest.approx(expected, rel=1e-3 if dtype == "fp32" else 0.2)


def test_without_plans_there_is_no_marginal_error(root: Path, tmp_path: Path) -> None:
    words = Comparison(task_named("listops", short=True), ("softmax",), root, tmp_path, 1, FEW).words("softmax")
    ended = setformer("train", *words, "eval.marginal_error=true", "--ranks", "1")
    assert_one_sentence(ended, 2, "lra_encoder has no SeT attention", "remove the key")


def test_dry_run_knows_sequences(root: Path) -> None:
    words = Comparison(task_named("listops", short=True), ("cast",), root, Path("runs"), 2).words("cast")
    ended = setformer("train", *words, "--ranks", "2", "--dry-run")
    assert ended.code == 0, ended.err
    assert "per sample of 64" in ended.out
    assert "lra_encoder" in ended.out
    assert "samples of 10 classes" in ended.out


def test_prepare_and_stats(tmp_path: Path) -> None:
    ended = setformer("lra", "prepare", "listops", "--short", "--root", str(tmp_path), "--workers", "2")
    assert ended.code == 0, ended.err
    assert "train 40,000, val 2,000, test 2,000" in ended.out
    again = setformer("lra", "prepare", "listops", "--short", "--root", str(tmp_path))
    assert again.code == 0, again.err
    assert "was already in" in again.out
    other = setformer("lra", "prepare", "listops", "--short", "--root", str(tmp_path), "--seed", "1")
    assert_one_sentence(other, 3, "with seed = 0 in train, not 1", "--force")
    ended = setformer("lra", "stats", "listops", "--short", "--root", str(tmp_path))
    assert ended.code == 0, ended.err
    assert "best label of the root operator" in ended.out
    assert "acceptance" in ended.out


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["listop"], 2, ["no Long Range Arena task 'listop': did you mean listops?"]),
        (["prepare", "pathfindr"], 2, ["did you mean pathfinder?"]),
        (["text", "--root", "nowhere"], 3, ["setformer lra prepare text --root nowhere", "--source", "aclImdb"]),
        (["stats", "pathx", "--short", "--root", "nowhere"], 3, ["setformer lra prepare pathx --short"]),
        (["prepare", "image", "--root", "nowhere"], 3, ["give --source, the folder of CIFAR-10's images"]),
        (["listops", "--attention", "softmx"], 2, ["there is no 'softmx': did you mean softmax?"]),
    ],
)
def test_mistakes(words: list[str], code: int, parts: list[str], tmp_path: Path) -> None:
    assert_one_sentence(setformer("lra", *words), code, *parts)


def test_mistakes_in_the_config_stop_before_the_first_run(root: Path, tmp_path: Path) -> None:
    for override, part in (
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("data.image_size=32", "unknown key 'data.image_size'"),
        ("data.kind=words", "data: kind must be"),
    ):
        assert_one_sentence(compare(root, tmp_path, "set", override), 2, part)
    assert_one_sentence(compare(root, tmp_path, "set", "data.length=65"), 2, "data.length = 65 is more than the 64")
    assert_one_sentence(compare(root, tmp_path, "set", "model.args.attention.kind=sett"), 2, "sett")


def test_damaged_tokens_stop_the_run(tmp_path: Path) -> None:
    task = replace(task_named("listops", short=True), counts=(64, 16, 16))
    prepare(task, tmp_path, Preparation())
    part = tmp_path / "listops-short" / "train" / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 255
    part.write_bytes(data)
    assert_one_sentence(compare(tmp_path, tmp_path / "runs", "set"), 3, "part-00000.safetensors", "--force")


def test_images_and_tokens_are_distinguished(digits: Path, root: Path, tmp_path: Path) -> None:
    assert_one_sentence(setformer(*train_words(root / "listops-short", tmp_path, ranks=1)), 3, "setformer data pack")
    comparison = Comparison(task_named("listops", short=True), ("set",), digits, tmp_path, 1, FEW)
    words = ["train", *comparison.words("set"), f"data.root={digits}"]
    assert_one_sentence(setformer(*words), 3, "no packed token split", "setformer lra prepare")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("short", [False, True])
def test_every_config_builds_every_attention(name: str, short: bool, tmp_path: Path) -> None:
    """The shipped configs: within 10 % of the parameters of softmax attention, as the benchmark asks."""
    task = task_named(name, short)
    comparison = Comparison(task, KINDS, tmp_path, tmp_path)
    counts = {}
    for kind in KINDS:
        config = comparison.resolved(kind).config
        assert config.run.name == kind
        input_spec = {"vocabulary": 257, "length": 8, "sequences": task.facts.sequences, "padded": not task.facts.full}
        with torch.device("meta"):
            model = build_model(config.model.model_copy(update={"args": {**input_spec, **config.model.args}}), 10, 0, 0)
        counts[kind] = sum(p.numel() for p in model.parameters())
    rest = 257 * 64 + task.facts.length * 64  # embeddings, of which all have the same
    for kind, count in counts.items():
        assert count - 8 * 64 + rest <= 1.1 * (counts["softmax"] - 8 * 64 + rest), kind
