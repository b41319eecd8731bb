"""Writes the report: reads a run folder, draws its curves, fills the template.

run_folder/metrics.jsonl, ledger.jsonl, config.json, summary.json + images  -->  one .html file
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
import torch
from markupsafe import Markup
from PIL import Image

from setformer_dist.core import ledger
from setformer_dist.core.files import replacing
from setformer_dist.core.metric import (
    AVERAGED,
    LOSS,
    METRICS_OF,
    PROBE_METRICS,
    Metric,
    by_class,
    is_of_class,
    title_of_classes,
)
from setformer_dist.core.words import plain_page
from setformer_dist.report import figures, refreshes, timeline
from setformer_dist.report.rows import Row, RunRecord, finite, read_run
from setformer_dist.report.timeline import Timeline, timeline_of

_TEMPLATE = "report.html.j2"
# Shown where a run has recorded them (eval.marginal_error).
_MARGINAL_COLUMNS = tuple(f"{prefix}marginal_error_{kind}" for prefix in ("", "ema_") for kind in ("max", "mean"))
# Headline figures in the order of the page: key in summary.json to label.
_TILES = {
    "images_per_s": "samples per second",
    "mfu": "model FLOP utilisation",
    "seconds": "time",
    "goodput": "goodput: share of all time that became training",
    "epochs": "epochs",
    "steps": "steps",
    "parameters": "parameters",
    "ranks": "ranks",
    "zero_stage": "ZeRO stage",
    "dtype": "number format",
    "global_batch": "samples per optimizer step",
}
_IN_LEAD = ("name", "model", "finished")
_SHARES = (
    "top1", "top5", "f1", "exact", "mfu", "share", "accuracy", "miou", "ap", "ap50", "ap75", "ap_small", "ap_medium",
    "ap_large", "recall", "goodput", "probe_linear", "probe_neighbours"
)  # fmt: skip
# What an evaluation's row holds besides the task's metrics.
_BESIDES = ("step", "samples", "left_out")
_MEGA, _KILO = 1e6, 1e3


@dataclass(frozen=True)
class ClassifiedImage:
    """An image and what the model said of it.

    Attributes:
        image: (3, H, W) uint8, RGB, on the CPU.
        true_class: its label's name.
        predicted_class: the most probable class's name.
        probability: of the predicted class, 0 to 1.
    """

    image: torch.Tensor
    true_class: str
    predicted_class: str
    probability: float


@dataclass(frozen=True)
class ReconstructedImage:
    """An image, what a model saw of it, and what the model made of that; each (3, H, W) uint8, RGB, on the CPU."""

    image: torch.Tensor
    seen: torch.Tensor
    reconstructed: torch.Tensor


@dataclass(frozen=True)
class AnnotatedImage:
    """An image, its mask or boxes laid over it, and the model's; each (3, H, W) uint8, RGB, on the CPU."""

    image: torch.Tensor
    truth: torch.Tensor
    predicted: torch.Tensor


@dataclass(frozen=True)
class Annotated:
    """Images with masks or boxes, and the colour (red, green, blue) in which these show each class."""

    what: Literal["masks", "boxes"]
    images: Sequence[AnnotatedImage] = ()
    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredText:
    """A text and what the model said of it.

    Attributes:
        text: as people read it.
        truth: its class, its number, or its hidden tokens.
        found: the same, as the model has it.
        right: whether both agree; None for a number.
    """

    text: str
    truth: str
    found: str
    right: bool | None = None


def write_report(
    run_folder: Path,
    out: Path,
    samples: Sequence[ClassifiedImage] = (),
    reconstructed: Sequence[ReconstructedImage] = (),
    annotated: Annotated | None = None,
    texts: Sequence[ScoredText] = (),
) -> None:
    """Write one self-contained HTML file about a run; what the run did not record is left out.

    Args:
        run_folder: holds metrics.jsonl, ledger.jsonl, config.json and summary.json, as far as there are any.
        out: file to write, replaced in one move.
        samples: classified images to show, in this order.
        reconstructed: reconstructed images to show.
        annotated: images with masks or boxes to show.
        texts: texts to show.

    Raises:
        DataError: the run folder does not exist, or its config or summary is damaged.
    """
    run, line = read_run(run_folder), timeline_of(ledger.read_events(run_folder))
    if run.summary.get("finished") is True:
        line.finish(run.summary.get("steps"))
    text = render(run, samples, line, reconstructed, annotated, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as aside:
        aside.write_text(plain_page(text), encoding="utf-8")  # names of classes and files may be no text


def render(
    run: RunRecord,
    samples: Sequence[ClassifiedImage],
    line: Timeline,
    reconstructed: Sequence[ReconstructedImage] = (),
    annotated: Annotated | None = None,
    texts: Sequence[ScoredText] = (),
) -> str:
    """Return the page."""
    template = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    metrics = (*_metrics_of(run), *_probed(run))
    curves = [
        figures.loss_figure(run.train, run.evals),
        *(figures.metric_figure(run.evals, metric) for metric in (metrics[0], *_probed(run))),
        figures.rate_figure(run.train),
        figures.speed_figure(run.train),
    ]
    summary = _flat(run.summary)
    order = [m.name for m in sorted(metrics, key=lambda m: m.name != LOSS.name)]
    columns = [
        *order,
        *(f"{AVERAGED}{name}" for name in order),
        "samples",
        *(name for name in _MARGINAL_COLUMNS if any(name in row for row in run.evals)),
    ]
    return environment.from_string(template).render(
        name=run.name,
        lead=_lead(run),
        tiles=[{"label": label, "value": show(key, summary[key])} for key, label in _shown(summary, metrics)],
        figures=[Markup(curve) for curve in curves if curve],
        timeline_figure=Markup(timeline.figure(line)),
        timeline_lead=timeline.lead(line),
        attempts=timeline.rows(line),
        refresh_figures=[Markup(drawing) for drawing in refreshes.drawings(run.refreshes)],
        refresh_header=refreshes.header(),
        refreshes=refreshes.table(run.refreshes),
        split_figure=Markup(figures.split_figure(run.train)),
        split=_split_table(run.train),
        images=[_image(sample) for sample in samples],
        reconstructed=[_pngs(one) for one in reconstructed],
        annotated=[_pngs(one) for one in annotated.images] if annotated else [],
        what=annotated.what if annotated else "",
        texts=texts,
        classes=_classes(by_class(_scores(run)), annotated.colours if annotated else {}),
        of_classes=title_of_classes(_scores(run)),
        right=sum(sample.true_class == sample.predicted_class for sample in samples),
        evals=[_eval_row(row, columns) for row in run.evals],
        eval_columns=columns,
        facts=[
            {"label": key.replace("_", " "), "value": show(key, value)}
            for key, value in summary.items()
            if key not in dict(_tiles(metrics)) and key not in _IN_LEAD and not is_of_class(key)
        ],
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    )


def _lead(run: RunRecord) -> str:
    steps = [row["step"] for row in (*run.train, *run.evals)]
    if not steps:
        return "This run has recorded no step yet."
    model = run.summary.get("model", "SeTformer run")
    state = "interrupted at" if run.summary.get("finished") is False else "recorded up to"
    return f"{model}, {state} step {max(steps):,}, evaluated {len(run.evals)} times."


def _flat(summary: Mapping[str, object]) -> dict[str, object]:
    """Return the summary with its tables opened; the latest evaluation speaks for the run, so without prefix."""
    flat: dict[str, object] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            prefix = "" if key == "evaluation" else f"{key}_"
            flat |= {f"{prefix}{inner}": part for inner, part in value.items()}
        else:
            flat[key] = value
    return flat


def _shown(summary: Mapping[str, object], metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    return [(key, label) for key, label in _tiles(metrics) if summary.get(key) is not None]


def _tiles(metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    scored = [m for m in metrics if m.name != LOSS.name]
    own = [pair for m in scored for pair in ((m.name, m.label), (f"{AVERAGED}{m.name}", f"{m.label}, EMA"))]
    return [*own, *_TILES.items()]


def _metrics_of(run: RunRecord) -> tuple[Metric, ...]:
    """Return the metrics of the run's task; of one that is not ours, what its evaluations hold."""
    task = run.config.get("task") if isinstance(run.config, Mapping) else None
    name = task.get("name") if isinstance(task, Mapping) else "classification"  # all were, before there were tasks
    if isinstance(name, str) and name in METRICS_OF:
        return METRICS_OF[name]
    found = dict.fromkeys(
        key.removeprefix(AVERAGED) for row in run.evals for key in row if finite(row[key]) is not None
    )
    beside = (*_BESIDES, LOSS.name, *_MARGINAL_COLUMNS, *(metric.name for metric in PROBE_METRICS))
    other = [key for key in found if key not in beside]
    return (*(Metric(key, key, share=False) for key in other), LOSS)


def _probed(run: RunRecord) -> tuple[Metric, ...]:
    """Return the metrics of probes during training that its evaluations hold."""
    return tuple(m for m in PROBE_METRICS if any(m.name in row or f"{AVERAGED}{m.name}" in row for row in run.evals))


def show(key: str, value: object) -> str:
    """Return a figure as people read it: shares in percent, long times in hours, large counts with M."""
    number = finite(value)
    if number is None:
        return value if isinstance(value, str) else json.dumps(value)
    if key.endswith(_SHARES) and 0 <= number <= 1:
        return f"{100 * number:.2f} %"
    if key.endswith("seconds"):
        return _duration(number)
    if key == "parameters" and number >= _MEGA:
        return f"{number / _MEGA:.1f} M"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{number:,.0f}" if number >= _KILO else f"{number:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def _split_table(train: Sequence[Row]) -> list[dict[str, str]]:
    steps, parts = figures.split(train)
    means = {name: sum(values) / len(steps) for name, values in parts.items()} if steps else {}
    total = sum(means.values()) or 1.0
    return [
        {"name": name, "milliseconds": f"{1000 * mean:,.1f}", "share": f"{100 * mean / total:.1f} %"}
        for name, mean in means.items()
    ]


def _eval_row(row: Row, columns: Sequence[str]) -> list[str]:
    cells = [show(key, row[key]) if row.get(key) is not None else "" for key in columns]
    return [f"{row['step']:,}", *cells]


def _image(sample: ClassifiedImage) -> dict[str, object]:
    return {
        "source": _png(sample.image),
        "true_class": sample.true_class,
        "predicted_class": sample.predicted_class,
        "probability": f"{100 * sample.probability:.0f} %",
        "right": sample.true_class == sample.predicted_class,
    }


def _pngs(pictures: ReconstructedImage | AnnotatedImage) -> dict[str, str]:
    return {name: _png(part) for name, part in vars(pictures).items()}


def _classes(scores: Mapping[str, float], colours: Mapping[str, tuple[int, int, int]]) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "colour": "#{:02x}{:02x}{:02x}".format(*colours[name]) if name in colours else "transparent",
            "score": f"{scores[name]:.1%}" if name in scores else "not there",
        }
        for name in dict.fromkeys((*colours, *scores))
    ]


def _scores(run: RunRecord) -> dict[str, float]:
    """Return the figures of the last evaluation that are numbers."""
    row = run.evals[-1] if run.evals else {}
    return {name: number for name, value in row.items() if (number := finite(value)) is not None}


def _png(image: torch.Tensor) -> str:
    """Return an image, (3, H, W) uint8, as the source of an <img>."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
