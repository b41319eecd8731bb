"""Tasks on texts: a loss over hidden tokens whatever the micro batches, and correlations whatever the order of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch.nn import functional as F

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.text_ids import CLS, FIRST, IGNORED, SEP, hidden_counts
from setformer_dist.tasks.masked_text import MaskedText, MaskedTextPrepare
from setformer_dist.tasks.regression import Regression
from setformer_dist.tasks.sentences import Sentences

V = 50


def batch(count: int, step: int = 0, **fields: Any) -> MicroBatch:
    ids = torch.randint(FIRST, V, (count, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[:, 0] = CLS
    for row in range(count):
        end = 4 + 3 * row % 20
        ids[row, end], ids[row, end + 1 :] = SEP, 0
    zeros = torch.zeros(count, dtype=torch.int64)
    given = {"weights": torch.ones(count), "sample_ids": torch.arange(count), **fields}
    return MicroBatch(inputs=ids, labels=zeros, step=step, **given)


def test_the_masked_loss_is_a_mean_over_hidden_tokens() -> None:
    task = MaskedText({"ratio": 0.3}, ())
    prepare = MaskedTextPrepare(task.config, torch.device("cpu"), V, seed=3, steps_per_epoch=10)
    whole = batch(8)
    inputs, targets = prepare(whole, train=True)
    assert inputs.shape == (8, 2, 24)
    assert task.count(whole) == float((targets != IGNORED).sum()) == hidden_counts(whole.inputs.numpy(), 0.3).sum()
    logits = torch.randn(*targets.shape, V)
    known = targets != IGNORED
    expected = F.cross_entropy(logits[known].double(), targets[known], reduction="sum")
    torch.testing.assert_close(task.loss(logits, targets).double(), expected, atol=1e-4, rtol=1e-6)
    parts = [task.loss(logits[i : i + 2], targets[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).sum(), task.loss(logits, targets))


def test_masks_follow_seed_epoch_and_sample() -> None:
    config = MaskedText({}, ()).config

    def masks(step: int, seed: int = 3, train: bool = True) -> torch.Tensor:
        prepare = MaskedTextPrepare(config, torch.device("cpu"), V, seed, steps_per_epoch=10)
        return prepare(batch(8, step), train=train)[0]

    torch.testing.assert_close(masks(0), masks(9))
    assert (masks(0) != masks(10)).any()
    assert (masks(0) != masks(0, seed=4)).any()
    torch.testing.assert_close(masks(0, train=False), masks(99, seed=5, train=False))


def test_filling_does_not_count() -> None:
    task = MaskedText({}, ())
    weights = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1])
    whole = batch(8, weights=weights)
    _, targets = MaskedTextPrepare(task.config, torch.device("cpu"), V, 0, 1)(whole, train=False)
    logits = torch.randn(*targets.shape, V)
    logits[0, 0, targets[0, 0]] = 99.0
    figures = task.figures(task.sums(logits, whole, targets).tolist(), 5)
    kept = targets[weights > 0]
    flat, known = logits[weights > 0].flatten(0, 1), kept.flatten() != IGNORED
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(flat[known], kept.flatten()[known])), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((flat.argmax(1) == kept.flatten())[known].float().mean()))
    assert figures["accuracy"] > 0
    with pytest.raises(ConfigError, match="fine-tune it"):
        task.confidences(logits)


def test_correlations_are_scipys_whatever_the_order() -> None:
    draw = np.random.default_rng(0)
    known = draw.integers(0, 6, 200).astype(float)  # with ties
    computed = known + draw.normal(0, 2, 200)
    task, rows = Regression({}, ()), torch.from_numpy(np.stack([known, computed], axis=1))
    figures = task.figures_of_rows(rows)
    assert figures["pearson"] == pytest.approx(scipy.stats.pearsonr(known, computed).statistic, abs=1e-12)
    assert figures["spearman"] == pytest.approx(scipy.stats.spearmanr(known, computed).statistic, abs=1e-12)
    for seed in range(5):
        assert task.figures_of_rows(rows[torch.randperm(200, generator=torch.Generator().manual_seed(seed))]) == figures
    constant = rows.clone()
    constant[:, 1] = 2.5
    nothing = {"pearson": 0.0, "spearman": 0.0}
    assert task.figures_of_rows(constant) == task.figures_of_rows(rows[:1]) == task.figures_of_rows(rows[:0]) == nothing


def test_a_regression_scores_what_counts() -> None:
    task = Regression({}, ())
    numbers = torch.tensor([1.0, 2, 3, 4])
    some = batch(4, numbers=numbers, weights=torch.tensor([1.0, 0, 1, 1]))
    outputs = torch.tensor([[1.5], [9.0], [3.0], [2.0]])
    assert float(task.loss(outputs, task.targets(some))) == pytest.approx((0.25 + 49 + 0 + 4) / 4)
    assert task.figures(task.sums(outputs, some, numbers).tolist(), 3)["loss"] == pytest.approx(4.25 / 3)
    assert task.rows(outputs, some).tolist() == [[1.0, 1.5], [3.0, 3.0], [4.0, 2.0]]
    with pytest.raises(DataError, match="--number"):
        task.targets(batch(4))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_figures_of_sentences_are_those_of_scikit_learn(classes: int) -> None:
    names = tuple("abcde"[:classes])
    task, draw = Sentences({}, names), np.random.default_rng(classes)
    logits = torch.from_numpy(draw.normal(size=(60, classes))).float()
    labels = torch.from_numpy(draw.integers(classes, size=60))
    weights = torch.from_numpy(draw.integers(2, size=60)).float()
    whole = batch(60, weights=weights)
    sums = torch.zeros(1 + 3 * classes, dtype=torch.float64)
    for part in torch.arange(60).split(7):
        one = MicroBatch(whole.inputs[part], labels[part], weights[part], part)
        sums += task.sums(logits[part], one, F.one_hot(labels[part], classes).float())
    figures = task.figures(sums.tolist(), float(weights.sum()))
    kept = weights > 0
    known, found = labels[kept].numpy(), logits[kept].argmax(1).numpy()
    f1 = f1_score(
        known, found, average="binary" if classes == 2 else "macro", labels=None if classes == 2 else range(classes)
    )
    assert figures["f1"] == pytest.approx(f1, abs=1e-12)
    assert figures["mcc"] == pytest.approx(matthews_corrcoef(known, found), abs=1e-12)
    assert figures["top1"] == pytest.approx((known == found).mean(), abs=1e-12)
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits[kept], labels[kept])), rel=1e-5)
    others = classes - 1
    constant = task.figures([0.0, 4.0, *[0.0] * others, 10.0, *[0.0] * others, 4.0, 6.0, *[0.0] * (others - 1)], 10.0)
    assert constant["mcc"] == 0.0
