"""Another task than classification, end to end; and one that lives outside the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.testing.commands import setformer, train_words

# Learns from labels which half of the digits an image is of; nothing of it is in the package.
OUTSIDE = """
import torch
import torch.nn.functional as F
from setformer_dist.core.metric import LOSS, Metric
from setformer_dist.tasks.build import register_task


class Halves:
    name = "halves"
    metrics = (Metric("right", "right half"), LOSS)
    outputs = ("high",)
    exclusive = False

    def __init__(self, args, classes):
        self.high = torch.tensor([float(int(name) >= 5) for name in classes])

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs.float()[:, 0], targets @ self.high.to(targets.device))

    def sums(self, outputs, batch, targets):
        logits, wanted = outputs.float().cpu()[:, 0], self.high[batch.labels]
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        right = ((logits > 0).float() == wanted).float()
        return torch.stack([(loss * batch.weights).sum(), (right * batch.weights).sum()])

    def figures(self, sums, count):
        return {"loss": sums[0] / count, "right": sums[1] / count}

    def confidences(self, outputs):
        return outputs.float().sigmoid()


register_task("halves", Halves)
"""


def test_multilabel_trains_resumes_and_predicts(digits: Path, tmp_path: Path) -> None:
    # Prime, even and small digits: sets of labels made of the digits' folders.
    for split in ("train", "val"):
        for digit in range(10):
            labels = [
                n
                for n, has in (("even", digit % 2 == 0), ("prime", digit in (2, 3, 5, 7)), ("small", digit < 5))
                if has
            ]
            folder = tmp_path / "data" / split / ("+".join(labels) or "none")
            folder.mkdir(parents=True, exist_ok=True)
            for image in sorted((digits / "images" / split / str(digit)).iterdir())[:40]:
                shutil.copy(image, folder / f"{digit}-{image.name}")
    words = train_words(tmp_path / "data", tmp_path / "runs", "task.name=multilabel", "schedule.epochs=8",
                        "eval.every_epochs=4", "ema.decay=0.9", "checkpoint.best_metric=ema_f1", ranks=1)  # fmt: skip
    ended = setformer(*words)
    assert ended.code == 0, ended.err
    assert "F1 " in ended.err
    run = tmp_path / "runs" / "demo"
    scores = json.loads((run / "summary.json").read_text())["evaluation"]
    assert {"f1", "exact", "loss", "ema_f1"} <= set(scores)
    assert max(scores["f1"], scores["ema_f1"]) > 0.75
    said = setformer("eval", str(run))
    assert said.code == 0, said.err
    assert "F1 " in said.out
    image = sorted((digits / "images" / "val" / "2").iterdir())[0]
    shown = setformer("predict", str(run), str(image), "--top", "3")
    assert shown.code == 0, shown.err
    assert all(label in shown.out for label in ("even", "prime", "small"))
    assert "F1 over all labels" in (run / "report.html").read_text()


def test_a_metric_of_another_task_is_refused_in_the_config(tmp_path: Path) -> None:
    ended = setformer("train", "demo", "task.name=multilabel", "checkpoint.best_metric=top1")
    assert ended.code == 2
    assert "checkpoint.best_metric = 'top1' is not a metric of task multilabel: it has f1, exact, loss" in ended.err


@pytest.mark.drill
def test_a_task_outside_the_package_trains(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(OUTSIDE)
    words = train_words(digits, tmp_path / "runs", "task.name=halves", "checkpoint.best_metric=right",
                        'run.imports=["my_tasks"]', "schedule.epochs=2", "eval.every_epochs=2", ranks=1)  # fmt: skip
    ended = setformer(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "right half" in ended.err
    run = tmp_path / "runs" / "demo"
    assert json.loads((run / "summary.json").read_text())["evaluation"]["right"] > 0.7
    refused = setformer("eval", str(run), cwd=tmp_path)  # a checkpoint's word alone imports nothing
    assert refused.code == 4
    assert "its run imported my_tasks; if you trust that code, add --import my_tasks" in refused.err
    scored = setformer("eval", str(run), "--import", "my_tasks", cwd=tmp_path)
    assert scored.code == 0, scored.err
    assert "right half" in scored.out
    missing = setformer("train", *words[1:], 'run.imports=["no_such_module"]', "run.name=other", cwd=tmp_path)
    assert missing.code == 2
    assert "module 'no_such_module'" in missing.err
