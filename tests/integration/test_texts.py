"""Texts end to end: tokenizer, packing, hidden tokens, fine-tuning to classes and numbers, predictions, exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import setformer as library
from launch.run.scored_texts import scored_texts
from launch.run.trained import load_trained, open_named_split
from launch.testing.commands import losses, setformer

NOUNS = ("cat", "dog", "bird", "fish", "king", "queen", "child", "farmer")
VERBS = {"likes": "eats", "sees": "meets", "finds": "keeps", "calls": "helps"}
MODEL = (
    "model.args.dim=32", "model.args.depth=2", "model.args.num_heads=2", "model.args.attention.attn.references=8",
    "precision.dtype=fp32", "run.log_every=1", "run.threads=1", "checkpoint.every_steps=4",
)  # fmt: skip


def sentence(draw: np.random.Generator, good: bool) -> str:
    """Return a sentence whose verbs belong together, and that is good or bad."""
    first, second = draw.choice(NOUNS, 2)
    verb = str(draw.choice(list(VERBS)))
    how = "gladly" if good else "never"
    return f"the {first} {verb} the {second} and {how} {VERBS[verb]} it ."


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer, and packed: running text, sentences of two classes, pairs with a number."""
    place, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 24)):
        corpus = place / "corpus" / split
        corpus.mkdir(parents=True)
        for i in range(2):
            lines = [sentence(draw, bool(draw.integers(2))) for _ in range(4 * count)]
            (corpus / f"{i}.txt").write_text("\n".join(lines))
        rows = [(sentence(draw, good), "good" if good else "bad") for good in draw.integers(2, size=count).tolist()]
        (place / f"{split}.tsv").write_text("text\tlabel\n" + "".join(f"{s}\t{y}\n" for s, y in rows))
        kinds = draw.integers(2, size=(count, 2)).tolist()
        pairs = [(sentence(draw, a), sentence(draw, b), 2.5 * a + b) for a, b in kinds]
        (place / f"{split}.csv").write_text("a,b,score\n" + "".join(f"{a},{b},{s}\n" for a, b, s in pairs))
    words = str(place / "tokenizer.json")
    Path(words).write_bytes(whole_words())
    run("text", "pack", str(place / "corpus" / "train"), str(place / "c" / "train"), "--tokenizer", words,
        "--length", "32")  # fmt: skip
    asked = {"s": ("tsv", "--text", "text", "--label", "label"),
             "p": ("csv", "--text", "a", "--text", "b", "--number", "score")}  # fmt: skip
    for name, (suffix, *columns) in asked.items():
        run("text", "pack", str(place / f"train.{suffix}"), str(place / name / "train"), "--tokenizer", words,
            "--length", "32", *columns)  # fmt: skip
    for name, source in (("c", "corpus/val"), ("s", "val.tsv"), ("p", "val.csv")):
        run("text", "pack", str(place / source), str(place / name / "val"), "--like", str(place / name / "train"))
    return place


def whole_words() -> bytes:
    """Return a tokenizer of the sentences' words: those that are trained differ from training to training."""
    known = {"the", "and", "gladly", "never", "it", ".", *NOUNS, *VERBS, *VERBS.values()}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    table = {word: number for number, word in enumerate([*special, *sorted(known)])}
    made = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    return made.to_str().encode()


def run(*words: str, code: int = 0) -> str:
    """Run a command and return what it prints."""
    ended = setformer(*words)
    assert ended.code == code, ended.err
    return ended.out if not code else ended.err


def train(config: str, data: Path, out: Path, *words: str, ranks: int = 1, steps: int = 8) -> Path:
    """Train for some steps and return the run's folder."""
    schedule = ("~schedule.epochs", f"schedule.steps={steps}", "~schedule.warmup_epochs", "schedule.warmup_steps=2")
    run("train", config, f"data.root={data}", f"run.out={out}", "batch.global_size=16", *schedule, *MODEL, *words,
        "--ranks", str(ranks))  # fmt: skip
    return out / config


def lost(folder: Path) -> dict[tuple[str, int], float]:
    """Return the loss of each step and evaluation of a run."""
    return {which: loss for which, (loss, _) in losses(folder).items()}


@pytest.fixture(scope="module")
def pretrained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("mlm", texts / "c", tmp_path_factory.mktemp("runs"), "optim.lr=3e-3", steps=200)


def test_hidden_tokens_are_learnt_and_named(texts: Path, pretrained: Path) -> None:
    figures = json.loads((pretrained / "summary.json").read_text())["evaluation"]
    assert figures["loss"] < 2.6  # of 3.2 by the frequency of tokens alone
    assert figures["accuracy"] > 0.3
    said = run("text", "predict", str(pretrained), "[MASK] king sees [MASK] queen and never meets it .",
               "--top", "999", "--json")  # fmt: skip
    fillings = json.loads(said)["fillings"]
    assert [list(filling)[:1] for filling in fillings] == [["the"], ["the"]]
    assert fillings[0]["the"] > 0.5
    assert "has none: write [MASK]" in run("text", "predict", str(pretrained), "the king", code=3)
    assert "[CLS] the" in run("text", "show", str(texts / "c" / "val"), "--samples", "1")
    assert json.loads(run("eval", str(pretrained), "--json"))["metrics"]["loss"] == pytest.approx(figures["loss"], 1e-5)
    labelled = run("eval", str(pretrained), "--data", str(texts / "s"), "--json")  # whose classes do not matter
    assert json.loads(labelled)["metrics"]["loss"] < 4
    page = (pretrained / "report.html").read_text()
    assert "<h2>Texts</h2>" in page
    assert "[MASK]" in page
    assert "images" not in page[page.index("<main>") : page.index("<h2>Texts</h2>")]


def test_frozen_features_are_probed(texts: Path, pretrained: Path) -> None:
    said = run("probe", str(pretrained), "--data", str(texts / "s"))
    assert "on 24 samples of 2 classes, with the labels of 96" in said
    assert float(said.partition("linear ")[2].partition("%")[0]) > 90  # one of two words tells the classes apart
    assert "with the labels of 24" in run("probe", str(pretrained), "--data", str(texts / "s"), "--labels", "0.25")
    assert "name labelled data (--data" in run("probe", str(pretrained), code=3)


def test_the_report_shows_what_evaluation_scored(texts: Path, pretrained: Path, tmp_path: Path) -> None:
    tuned = train("sst2", texts / "s", tmp_path, "optim.lr=3e-3", steps=20)
    for folder, metric in ((pretrained, "accuracy"), (tuned, "top1")):
        trained = load_trained(folder / "checkpoints")
        split = open_named_split(trained, None, None)
        shown = scored_texts(trained, split, split.num_samples)
        pairs = [(one.truth, one.found.rsplit(" ", 1)[0]) for one in shown]
        if metric == "accuracy":
            pairs = [pair for one in shown for pair in zip(one.truth.split(", "), one.found.split(", "), strict=True)]
        figures = json.loads((folder / "summary.json").read_text())["evaluation"]
        assert np.mean([true == found for true, found in pairs]) == pytest.approx(figures[metric])


@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_does_not_depend_on_its_ranks(texts: Path, tmp_path: Path, zero: int) -> None:
    one = train("mlm", texts / "c", tmp_path / "one", "batch.micro=4")
    two = train("mlm", texts / "c", tmp_path / "two", f"zero.stage={zero}", ranks=2)
    assert lost(one) == pytest.approx(lost(two), rel=1e-5)
    assert len(lost(one)) == 9  # with that of the evaluation


def test_resume_is_bitwise_with_trimmed_batches_and_dropout(texts: Path, tmp_path: Path) -> None:
    whole = train("sst2", texts / "s", tmp_path / "whole", ranks=2)
    cut = train("sst2", texts / "s", tmp_path / "cut", ranks=2)
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    train("sst2", texts / "s", tmp_path / "cut", ranks=2)
    assert losses(cut) == losses(whole)


def test_an_export_cuts_texts_as_its_run_did(texts: Path, tmp_path: Path) -> None:
    cut = train("sst2", texts / "s", tmp_path, "data.length=8", "eval.every_epochs=1")
    run("ckpt", "export", str(cut), str(tmp_path / "exported"), "--weights", "plain")
    there = json.loads((cut / "summary.json").read_text())["evaluation"]
    here = json.loads(run("eval", str(tmp_path / "exported"), "--data", str(texts / "s"), "--json"))["metrics"]
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def test_fine_tuning_predictions_and_exports(texts: Path, pretrained: Path, tmp_path: Path) -> None:
    tuned = train("sst2", texts / "s", tmp_path, f"model.weights={pretrained}", "optim.lr=3e-3", steps=80)
    figures = json.loads((tuned / "summary.json").read_text())["evaluation"]
    assert figures["top1"] > 0.75
    good, bad = "the cat likes the dog and gladly eats it .", "the king sees the fish and never meets it ."
    said = run("text", "predict", str(tuned), good, bad, "--top", "1")
    assert [line.split(": ")[1].split()[0] for line in said.splitlines()] == ["good", "bad"]
    exported = tmp_path / "exported"
    run("ckpt", "export", str(tuned), str(exported))
    assert run("text", "predict", str(exported), good, bad, "--top", "1") == said
    scored = json.loads(run("eval", str(exported), "--data", str(texts / "s"), "--json"))["metrics"]
    assert scored["top1"] == pytest.approx(figures["top1"])
    found = library.predict_texts(library.load(exported), [good, bad], top=1)
    assert [one.classes for one in found] == [("good",), ("bad",)]
    lines = tmp_path / "lines.txt"
    lines.write_text(f"{good}\n\n{bad}\n")
    assert run("text", "predict", str(tuned), "--file", str(lines), "--top", "1") == said

    encoder = tmp_path / "encoder"
    run("ckpt", "export", str(pretrained), str(encoder))
    paired = train("stsb", texts / "p", tmp_path, f"model.weights={encoder}", "optim.lr=3e-3", steps=40)
    figures = json.loads((paired / "summary.json").read_text())["evaluation"]
    assert figures["pearson"] > 0.3
    value = json.loads(run("text", "predict", str(paired), "--pairs", good, good, "--json"))["value"]
    assert "text 1 is alone, and this model judges pairs" in run("text", "predict", str(paired), good, code=3)
    assert "this model judges single texts" in run("text", "predict", str(exported), "--pairs", good, bad, code=3)
    assert 0 < value < 4
    assert json.loads(run("eval", str(paired), "--json", "--batch", "5"))["metrics"]["spearman"] == pytest.approx(
        figures["spearman"], abs=1e-3
    )


def test_what_does_not_go_together(texts: Path, pretrained: Path, digits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    run("text", "tokenizer", str(texts / "corpus" / "val"), str(other), "--vocabulary", "90")
    for split in ("train", "val"):
        run("text", "pack", str(texts / f"{split}.tsv"), str(tmp_path / "o" / split), "--tokenizer", str(other),
            "--text", "text", "--label", "label", "--length", "32")  # fmt: skip
    begin = ("train", "sst2", f"run.out={tmp_path}", *MODEL)
    assert "learned tokens of tokenizer" in run(*begin, f"data.root={tmp_path / 'o'}", f"model.weights={pretrained}",
                                                code=4)  # fmt: skip
    assert "pack them with --label" in run(*begin, f"data.root={texts / 'p'}", code=2)
    assert "pack them with --number" in run(*begin, f"data.root={texts / 's'}", "task.name=regression", code=2)
    assert "and [data] has images" in run(
        "train",
        "demo",
        "task.name=mlm",
        "checkpoint.best_metric=loss",
        f"run.out={tmp_path}",
        f"data.root={digits}",
        code=2,
    )
    assert "is of tokenizer" in run("eval", str(pretrained), "--data", str(tmp_path / "o"), code=3)
    assert "name the column of the texts" in run("text", "pack", str(texts / "val.tsv"), str(tmp_path / "x"),
                                                 "--tokenizer", str(other), "--label", "label", code=2)  # fmt: skip
    assert "none: set it to text_mini" in run("train", "mlm", f"data.root={texts / 'c'}", "model.name=lra_encoder",
                                              "~model.args", f"run.out={tmp_path}", code=2)  # fmt: skip
    shorter = ("model.args.length=16", "data.length=16", f"data.root={texts / 's'}", f"model.weights={pretrained}")
    assert "set model.args.length = 32" in run(*begin, *shorter, code=4)
    assert "model.args.length = 16 is less" in run(*begin, f"data.root={texts / 's'}", "model.args.length=16", code=2)
    assert "what the data say" in run(*begin, f"data.root={texts / 's'}", "model.args.tokenizer=abc", code=2)
    said = run("text", "predict", str(pretrained), "the [MASK] .", "the king", code=3)
    assert "text 2 has none: write [MASK]" in said
    long = "the " * 99 + "[MASK]"
    assert "cuts off 1 of its [MASK]" in run("text", "predict", str(pretrained), long, code=3)
    assert "names up to 5" in run("text", "predict", str(pretrained), "[MASK] " * 9, code=3)
    assert "less than the" in run("train", "mlm", f"data.root={texts / 'c'}", "model.args.vocabulary=9",
                                  f"run.out={tmp_path}", code=2)  # fmt: skip
    assert "exists" in run("text", "tokenizer", str(texts / "corpus" / "val"), str(other), code=2)
