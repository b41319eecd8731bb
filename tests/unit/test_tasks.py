"""Tasks: their losses against the formulas, their figures against counting, and which weights are better."""

from __future__ import annotations

import math

import pytest
import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import METRICS_OF, better_weights, headline, metric_named
from setformer_dist.core.task_config import TaskConfig
from setformer_dist.tasks.build import build_task, check_metric, register_task
from setformer_dist.tasks.classification import Classification
from setformer_dist.tasks.distilled import Distilled, Taught, TeachingPrepare
from setformer_dist.tasks.multilabel import MultiLabel

CLASSES = ("cat", "cat+dog", "dog", "none")


def batch_of(labels, weights=None):
    count = len(labels)
    weights = torch.ones(count) if weights is None else torch.tensor(weights)
    return MicroBatch(torch.zeros(count, 1), torch.tensor(labels), weights, torch.arange(count))


def figures(task, outputs, batches):
    sums = sum(
        task.sums(o, b, torch.zeros(len(o), len(CLASSES))).double() for o, b in zip(outputs, batches, strict=True)
    )
    return task.figures(sums.tolist(), sum(float(b.weights.sum()) for b in batches))


def test_multilabel_has_one_output_per_label_and_its_figures_are_counted():
    task = MultiLabel({}, CLASSES)
    assert task.outputs == ("cat", "dog")
    logits = torch.tensor([[5.0, -5.0], [5.0, -5.0], [-5.0, 5.0], [5.0, -5.0], [9.0, 9.0]])
    found = figures(task, [logits[:2], logits[2:]], [batch_of([0, 1]), batch_of([2, 3, 0], [1.0, 1.0, 0.0])])
    hits, predicted, present = 3, 4, 4  # the last sample is padding
    assert found["f1"] == pytest.approx(2 * hits / (predicted + present))
    assert found["exact"] == pytest.approx(2 / 4)
    small, large = math.log1p(math.exp(-5)), math.log1p(math.exp(5))
    assert found["loss"] == pytest.approx((2 * small + (small + large) + 2 * small + (large + small)) / 2 / 4, rel=1e-5)


def test_multilabel_loss_is_binary_cross_entropy_of_soft_labels():
    task, rng = MultiLabel({}, CLASSES), torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, generator=rng, dtype=torch.float64).float().requires_grad_()
    targets = torch.rand(6, 4, generator=rng).softmax(dim=1)
    cat, dog = targets[:, 0] + targets[:, 1], targets[:, 1] + targets[:, 2]
    p = logits.double().sigmoid()
    wanted = torch.stack([cat, dog], dim=1).double()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    torch.testing.assert_close(task.loss(logits, targets).double(), expected, rtol=1e-6, atol=0)


def test_multilabel_reads_its_own_table():
    assert MultiLabel({"separator": "|", "none": "-"}, ("a|b", "-", "a+b")).outputs == ("a", "a+b", "b")
    with pytest.raises(ConfigError, match=r"task\.args: unknown key 'seperator': did you mean separator"):
        MultiLabel({"seperator": "|"}, CLASSES)
    with pytest.raises(ConfigError, match=r"\(none …\) name no label but 'none'"):
        MultiLabel({}, ("none",))
    with pytest.raises(ConfigError, match=r"name an empty label: join labels by '\+'"):
        MultiLabel({}, ("cat", "cat+"))
    with pytest.raises(ConfigError, match=r"unknown key 'separator'"):
        Classification({"separator": "|"}, CLASSES)


def test_figures_do_not_depend_on_how_a_split_is_cut():
    rng = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(12, 4, generator=rng), torch.randint(0, 4, (12,), generator=rng).tolist()
    for task, outputs in ((Classification({}, CLASSES), logits), (MultiLabel({}, CLASSES), logits[:, :2])):
        whole = figures(task, [outputs], [batch_of(labels)])
        cut = figures(task, [outputs[:5], outputs[5:]], [batch_of(labels[:5]), batch_of(labels[5:])])
        assert whole == pytest.approx(cut, rel=1e-6)
        assert set(whole) == {metric.name for metric in task.metrics}


@pytest.mark.parametrize(
    ("scores", "metric", "mode", "better"),
    [
        ({"top1": 0.5, "ema_top1": 0.6}, "top1", "max", "ema"),
        ({"top1": 0.6, "ema_top1": 0.6}, "ema_top1", "max", "plain"),
        ({"loss": 0.5, "ema_loss": 0.4, "top1": 0.9, "ema_top1": 0.1}, "loss", "min", "ema"),
        ({"loss": 0.5, "ema_loss": 0.6}, "ema_loss", "min", "plain"),
        ({}, "top1", "max", "plain"),
        ({"f1": 0.5}, "f1", "max", "plain"),
    ],
)
def test_which_weights_are_better(scores, metric, mode, better):
    assert better_weights(scores, metric, mode) == better


def test_metrics_are_named_and_shown():
    metrics = METRICS_OF["classification"]
    assert headline(metrics, {"top1": 0.5, "top5": 1.0, "loss": 1.25}) == "top-1 50.00%, loss 1.2500"
    assert metric_named(metrics, "ema_top5") == metric_named(metrics, "top5")
    assert metric_named(metrics, "f1") is None


def test_a_task_is_found_by_name_or_refused_with_the_nearest():
    assert build_task(TaskConfig(), CLASSES).outputs == CLASSES
    with pytest.raises(ConfigError, match=r"'multilable' is not a task: did you mean multilabel\?.*run\.imports"):
        build_task(TaskConfig(name="multilable"), CLASSES)
    register_task("multilabel", MultiLabel)
    with pytest.raises(ConfigError, match="registered twice"):
        register_task("multilabel", Classification)
    with pytest.raises(
        ConfigError, match=r"best_metric = 'top1' is not a metric of task multilabel: it has f1, exact, loss"
    ):
        check_metric(MultiLabel({}, CLASSES), "top1", "max")


def test_the_losses_are_their_formulas_with_weights_of_classes():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, generator=rng)
    targets = torch.rand(5, 4, generator=rng).softmax(dim=1)
    wanted, p = targets.double(), logits.double().sigmoid()
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0]).double()
    of_dog = {"class_weights": {"dog": 3.0}}
    entropy = -(wanted * weights * logits.double().log_softmax(dim=1)).sum(dim=1)
    binary = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
    right = p * wanted + (1 - p) * (1 - wanted)
    share = 0.3 * wanted + 0.7 * (1 - wanted)
    for args, expected in (
        (of_dog, entropy),
        ({"loss": "binary_cross_entropy", **of_dog}, (binary * weights).mean(dim=1)),
        ({"loss": "focal", "gamma": 1.5, "alpha": 0.3, **of_dog},
         (share * (1 - right) ** 1.5 * binary * weights).mean(dim=1)),
        ({"loss": "focal", "gamma": 0.0, "alpha": -1.0}, binary.mean(dim=1)),
    ):  # fmt: skip
        task = Classification(args, CLASSES)
        assert task.loss(logits, targets).item() == pytest.approx(expected.mean().item(), rel=1e-5), args


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "focal"])
def test_an_evaluation_has_the_loss_that_is_trained(loss):
    task = Classification({"loss": loss, "class_weights": {"dog": 3.0}}, CLASSES)
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), [0, 2, 2, 1, 3, 2]
    trained = task.loss(logits, torch.nn.functional.one_hot(torch.tensor(labels), 4).float()).item()
    found = figures(task, [logits[:4], logits[4:]], [batch_of(labels[:4]), batch_of(labels[4:])])
    assert found["loss"] == pytest.approx(trained, rel=1e-5)
    sure = task.confidences(logits)
    assert torch.allclose(sure.sum(dim=1), torch.ones(6)) == (loss == "cross_entropy")


def test_a_loss_without_arguments_has_the_bits_that_it_had():
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    targets = torch.rand(64, 4).softmax(dim=1)
    functional = torch.nn.functional
    assert torch.equal(Classification({}, CLASSES).loss(logits, targets), functional.cross_entropy(logits, targets))
    multi = MultiLabel({}, CLASSES)
    wanted = multi._soft(targets)
    outputs = logits[:, :2]
    expected = functional.binary_cross_entropy_with_logits(outputs, wanted)
    assert torch.equal(multi.loss(outputs, targets), expected)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"class_weights": {"dgo": 2.0}}, "class_weights: 'dgo' is no output: did you mean dog"),
        ({"class_weights": {"dog": 0.0}}, "class_weights"),
        ({"class_weights": {"dog": math.inf}}, "class_weights"),
        ({"gamma": 1.0}, r'task.args.gamma is of loss = "focal"'),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_arguments_of_a_loss_that_cannot_be_are_refused(args, said):
    with pytest.raises(ConfigError, match=said):
        Classification(args, CLASSES)
    with pytest.raises(ConfigError, match="loss"):
        MultiLabel({"loss": "cross_entropy"}, CLASSES)


def test_a_distilled_loss_is_shares_of_its_own_and_the_teachers():
    rng = torch.Generator().manual_seed(4)
    ours, theirs = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    targets = torch.rand(6, 4, generator=rng).softmax(dim=1)
    task = Classification({}, CLASSES)
    p, q = (theirs.double() / 3).softmax(dim=1), (ours.double() / 3).softmax(dim=1)
    distance = (p * (p.log() - q.log())).sum(dim=1).mean()
    expected = 0.75 * task.loss(ours, targets).double() + 0.25 * 9 * distance
    found = Distilled(task, 0.25, 3.0).loss(ours, Taught(targets, theirs))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    multi = MultiLabel({}, CLASSES)
    a, b = (theirs[:, :2].double() / 3).sigmoid(), (ours[:, :2].double() / 3).sigmoid()
    distance = -(a * b.log() + (1 - a) * (1 - b).log()).mean()
    expected = 0.75 * multi.loss(ours[:, :2], targets).double() + 0.25 * 9 * distance
    found = Distilled(multi, 0.25, 3.0).loss(ours[:, :2], Taught(targets, theirs[:, :2]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_sees_what_the_model_sees_and_only_in_training():
    batch, teacher = batch_of([0, 1]), torch.nn.Linear(3, 4)
    inputs, targets = torch.randn(2, 3), torch.zeros(2, 4)
    prepare = TeachingPrepare(lambda batch, train: (inputs, targets), teacher)
    seen, taught = prepare(batch, train=True)
    assert torch.equal(seen, inputs)
    assert torch.equal(taught.logits, teacher(inputs))
    assert not taught.logits.requires_grad
    assert prepare(batch, train=False)[1] is targets
