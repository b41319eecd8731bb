"""What evaluations report: names, directions, and which weights are better. No torch: a config is checked with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from setformer_dist.core.errors import ConfigError

Weights = Literal["plain", "ema", "auto"]
Mode = Literal["max", "min"]

# Before the name of a figure: of the averaged weights.
AVERAGED = "ema_"


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        name: as metrics.jsonl, checkpoints and checkpoint.best_metric have it.
        title: as people read it in a line.
        heading: as people read it above a figure, where that is longer.
        mode: whether a larger or a smaller value is better.
        share: whether it is a share, 0 to 1, shown in percent.
    """

    name: str
    title: str
    heading: str = ""
    mode: Mode = "max"
    share: bool = True

    @property
    def label(self) -> str:
        """The heading, or the title."""
        return self.heading or self.title

    def show(self, value: float) -> str:
        """Return a value as people read it."""
        return f"{value:.2%}" if self.share else f"{value:.4f}"


# Before the name of a class: its figure, besides the task's metrics.
IOU_OF = "iou_"
PRECISION_OF = "ap_of_"
FIGURES_OF_CLASSES = {IOU_OF: "IoU", PRECISION_OF: "AP"}

LOSS = Metric("loss", "loss", mode="min", share=False)

# Of the shipped tasks; the first of each decides which weights are better unless the config names another.
METRICS_OF: Mapping[str, tuple[Metric, ...]] = {
    "classification": (Metric("top1", "top-1", "top-1 accuracy"), Metric("top5", "top-5", "top-5 accuracy"), LOSS),
    "multilabel": (Metric("f1", "F1", "F1 over all labels"), Metric("exact", "exact match"), LOSS),
    "segmentation": (
        Metric("miou", "mIoU", "mean intersection over union"),
        Metric("pixel_accuracy", "pixel accuracy"),
        Metric("class_accuracy", "class accuracy", "accuracy, mean over classes"),
        LOSS,
    ),
    "detection": (
        Metric("ap", "AP", "average precision, IoU 0.5 to 0.95"),
        Metric("ap50", "AP50", "average precision, IoU 0.5"),
        Metric("ap75", "AP75", "average precision, IoU 0.75"),
        Metric("recall", "recall", "recall of 100 detections per image"),
        LOSS,
    ),
    "sentences": (
        Metric("top1", "accuracy"),
        Metric("f1", "F1"),
        Metric("mcc", "MCC", "Matthews' correlation", share=False),
        LOSS,
    ),
    "regression": (
        Metric("pearson", "Pearson", "Pearson correlation", share=False),
        Metric("spearman", "Spearman", "Spearman correlation", share=False),
        LOSS,
    ),
    "mlm": (LOSS, Metric("accuracy", "accuracy", "accuracy on hidden tokens")),
    "mae": (LOSS,),
    "simmim": (LOSS,),
}

# Of a probe during training (eval.probe), whatever the task.
PROBE_METRICS = (
    Metric("probe_linear", "linear probe", "accuracy of a linear probe"),
    Metric("probe_neighbours", "neighbours", "accuracy of nearest neighbours"),
)


def metric_named(metrics: Sequence[Metric], name: str) -> Metric | None:
    """Return the metric that a figure's name means, of the weights or of their average; None for none."""
    plain = name.removeprefix(AVERAGED)
    return next((metric for metric in metrics if metric.name == plain), None)


def mode_by_name(name: str) -> Mode:
    """Return which way a metric is better by its name alone: versions before there were tasks had shares and losses."""
    return "min" if name.endswith(LOSS.name) else "max"


def better_weights(scores: Mapping[str, float], best_metric: str, mode: Mode) -> Literal["plain", "ema"]:
    """Return whether the weights or their average scored better in an evaluation; without scores, the weights.

    Args:
        scores: figures by name, those of the average with `AVERAGED` before it.
        best_metric: name of the figure that counts, with or without `AVERAGED`.
        mode: whether a larger or a smaller value is better.
    """
    name, worst = best_metric.removeprefix(AVERAGED), -math.inf if mode == "max" else math.inf
    plain, averaged = scores.get(name, worst), scores.get(f"{AVERAGED}{name}", worst)
    return "ema" if (averaged > plain if mode == "max" else averaged < plain) else "plain"


def weights_named(text: str) -> Weights:
    """Return which weights `--weights` names.

    Raises:
        ConfigError: it names none.
    """
    known = {name: name for name in get_args(Weights)}
    if text not in known:
        raise ConfigError(f"--weights {text!r} is not one of {', '.join(known)}")
    chosen: Weights = known[text]
    return chosen


def headline(metrics: Sequence[Metric], figures: Mapping[str, float], everything: bool = False) -> str:
    """Return the first metric and the loss in one line, such as "top-1 83.33%, loss 0.9797"; or all of them."""
    chosen = metrics if everything else [metrics[0], *(m for m in metrics[1:] if m.name == LOSS.name)]
    return ", ".join(f"{m.title} {m.show(figures[m.name])}" for m in chosen if m.name in figures)


def is_of_class(name: str) -> bool:
    """Return whether a figure is of one class."""
    return name.removeprefix(AVERAGED).startswith(tuple(FIGURES_OF_CLASSES))


def title_of_classes(figures: Mapping[str, float]) -> str:
    """Return what the figures of classes are, such as "IoU"; "" for none."""
    return next((t for prefix, t in FIGURES_OF_CLASSES.items() if any(f.startswith(prefix) for f in figures)), "")


def by_class(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figure of each class, by its name, as far as those of an evaluation have them."""
    return {
        name.removeprefix(prefix): value
        for prefix in FIGURES_OF_CLASSES
        for name, value in figures.items()
        if name.startswith(prefix)
    }


def check_best(metrics: Sequence[Metric], name: str, mode: Mode, task: str) -> None:
    """Check checkpoint.best_metric and best_mode against a task; without metrics, nothing.

    Raises:
        ValueError: the task has no such metric, or its better values lie on the other side.
    """
    if not metrics:
        return
    metric = metric_named(metrics, name)
    if metric is None:
        known = ", ".join(m.name for m in metrics)
        raise ValueError(
            f"checkpoint.best_metric = {name!r} is not a metric of task {task}: it has {known}, and each with "
            f"{AVERAGED} before it for the averaged weights"
        )
    if metric.mode != mode:
        raise ValueError(
            f"checkpoint.best_mode = {mode!r} is wrong for {name}, whose best value is the {metric.mode}: remove it"
        )
