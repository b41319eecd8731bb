"""`setformer lra TASK`: the same small encoder with one attention after the other, and their figures side by side.

    runs/lra/listops/
      set/  soft/  soft_norm/ …   ordinary runs, each with its checkpoints, metrics and report
      set/test.json               the last weights on the test split
      results.json, results.png   all of them side by side

Every run is one call of the ordinary trainer on the task's config; config, seed and batch are the same for all, so
all see the same samples in the same order. A run that came to its end is not repeated; one that was stopped resumes.
The table holds every attention trained with the same config, overrides and data, those of earlier calls included.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from deepspeed.accelerator import get_accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from dataloaders.lra.stats import majority, root_operator_alone
from dataloaders.lra.tasks import Task, open_task
from dataloaders.tokens import TokenSplit
from launch.ranks.local import LocalCrew
from launch.ranks.supervise import run_supervised
from launch.record.attempts import Recorder
from launch.run.compose import device_label
from launch.run.config import ResolvedRun, check_folder, load_run, resolve
from launch.run.trained import evaluate_checkpoint, load_trained
from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.files import write_json
from setformer_dist.core.terminal import open_table
from setformer_dist.models.attention import AttentionKind

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "lra"
KINDS: tuple[str, ...] = get_args(AttentionKind)

# Samples scored at once on the test split.
_TEST_BATCH = 64
DATA_NAME = "data.json"


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        task: at its size.
        kinds: attentions, in this order.
        root: folder of prepared tasks.
        out: folder of the runs; one folder per task is made in it.
        ranks: processes.
        overrides: of the config, for all runs.
    """

    task: Task
    kinds: tuple[str, ...]
    root: Path
    out: Path
    ranks: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def config_path(self) -> Path:
        """The task's run config."""
        return CONFIGS / f"{self.task.folder}.toml"

    @property
    def folder(self) -> Path:
        """Folder of the task's runs."""
        return self.out / self.task.folder

    def words(self, kind: str) -> list[str]:
        """Return the arguments of a rank for one attention: config and overrides."""
        return [
            str(self.config_path),
            f"data.root={json.dumps(str(self.root / self.task.folder))}",
            f"run.out={json.dumps(str(self.folder))}",
            f"run.name={json.dumps(kind)}",
            f"model.args.attention.kind={json.dumps(kind)}",
            *self.overrides,
        ]

    def resolved(self, kind: str) -> ResolvedRun:
        """Return the run of one attention; raises ConfigError."""
        words = self.words(kind)
        return resolve(load_run(Path(words[0]), words[1:]), self.ranks)


@dataclass(frozen=True)
class Row:
    """The figures of one attention.

    Attributes:
        attention: its kind.
        accuracy: share of the test split, last weights.
        validation: share of the validation split at the end.
        steps: optimizer steps.
        steps_per_s: without evaluation and checkpoints.
        memory_mib: peak of a rank: of the device on GPUs, resident (with the interpreter and torch) on CPUs.
        parameters: of the model.
        seconds: of the whole run.
    """

    attention: str
    accuracy: float
    validation: float
    steps: int
    steps_per_s: float
    memory_mib: float
    parameters: int
    seconds: float


def kinds_named(text: str) -> tuple[str, ...]:
    """Return the attentions of `all` or of a comma-separated list.

    Raises:
        ConfigError: one is unknown; the nearest one is named.
    """
    if text.strip() == "all":
        return KINDS
    kinds = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--attention {text!r}: there is no {kind!r}: {nearest(kind, [*KINDS, 'all'])}")
    if not kinds:
        raise ConfigError(f"--attention {text!r} names none: give all, or some of {', '.join(KINDS)}")
    return kinds


def compare(comparison: Comparison, console: Console) -> int:
    """Train what is not trained yet, print the table, write JSON and plot; return the exit code.

    Raises:
        SetformerError: a mistake that a user can repair: data that are not there, a config that is impossible.
    """
    splits = open_task(comparison.task, comparison.root)
    for kind in comparison.kinds:  # before the first run, not hours later
        check_folder(comparison.resolved(kind))
        check_data(comparison.folder / kind, splits)
        check_ranks(comparison.folder / kind, comparison.ranks)
    rows = []
    for kind in comparison.kinds:
        folder = comparison.folder / kind
        if not finished(folder):
            console.print(f"[bold]{comparison.task.title}[/], attention {kind}: {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / DATA_NAME, trained_on(splits))
            config = comparison.resolved(kind).config
            crew = LocalCrew(comparison.words(kind), comparison.ranks, warm=config.launch.warm)
            say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
            recorder = Recorder(folder, config.run.imports, config.launch.env)
            code = run_supervised(crew, folder, config.restart, say=say, recorder=recorder)
            if code:
                return code
        rows.append(row_of(folder, kind, splits["test"]))
    for kind in KINDS:
        if kind not in comparison.kinds and _trained_alike(comparison, kind, splits):
            rows.append(row_of(comparison.folder / kind, kind, splits["test"]))
    report(comparison, rows, splits["test"], console)
    return 0


def _trained_alike(comparison: Comparison, kind: str, splits: dict[str, TokenSplit]) -> bool:
    """Return whether an attention was trained to the end by the same config, overrides, ranks and data."""
    folder = comparison.folder / kind
    if not finished(folder):
        return False
    try:
        check_folder(comparison.resolved(kind))
        check_data(folder, splits)
        check_ranks(folder, comparison.ranks)
    except (ConfigError, DataError):
        return False
    return True


def trained_on(splits: dict[str, TokenSplit]) -> dict[str, str]:
    """Return the fingerprints of what a run trains on and is validated on."""
    return {name: splits[name].fingerprint for name in ("train", "val")}


def check_data(folder: Path, splits: dict[str, TokenSplit]) -> None:
    """Refuse a run that has begun on other data: its figures would not be comparable to these.

    Raises:
        DataError: naming the folder.
    """
    path = folder / DATA_NAME
    if path.exists() and json.loads(path.read_text()) != trained_on(splits):
        raise DataError(f"{folder} was begun on other data than are prepared now: remove it, or give another --out")


def check_ranks(folder: Path, ranks: int) -> None:
    """Refuse a run that ended on another number of ranks: its speed would not be comparable to that of these.

    Raises:
        ConfigError: naming the folder.
    """
    if finished(folder) and (there := json.loads((folder / "summary.json").read_text())["ranks"]) != ranks:
        raise ConfigError(f"{folder} was trained on {there} ranks, this is {ranks}: remove it, or give another --out")


def finished(folder: Path) -> bool:
    """Return whether a run came to its end."""
    path = folder / "summary.json"
    return path.exists() and bool(json.loads(path.read_text())["finished"])


def row_of(folder: Path, kind: str, test: TokenSplit) -> Row:
    """Return the figures of a finished run; the test split is scored once."""
    summary = json.loads((folder / "summary.json").read_text())
    train = [record for record in records(folder) if record["kind"] == "train"]
    return Row(
        attention=kind,
        accuracy=test_accuracy(folder, test),
        validation=summary["evaluation"]["top1"],
        steps=summary["steps"],
        steps_per_s=summary["images_per_s"] / summary["global_batch"],
        memory_mib=max(record["memory_mib"] for record in train),
        parameters=summary["parameters"],
        seconds=summary["seconds"],
    )


def test_accuracy(folder: Path, test: TokenSplit) -> float:
    """Return the share of the test split that the last weights get right, from test.json where it was found before."""
    path = folder / "test.json"
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    if path.exists():
        known = json.loads(path.read_text())
        if known["fingerprint"] == test.fingerprint and known["steps"] == steps:
            return float(known["top1"])
    trained = load_trained(folder, "plain")
    trained.model.to(get_accelerator().current_device_name())
    result = evaluate_checkpoint(trained, test, _TEST_BATCH)
    write_json(path, {"fingerprint": test.fingerprint, "steps": steps, **result.as_dict(), "samples": result.samples})
    return result.figures["top1"]


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, the last one of each kind and step, in order of steps."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave half a line
            record = json.loads(line)
            found[record["kind"], record["step"]] = record
    return sorted(found.values(), key=lambda record: record["step"])


def report(comparison: Comparison, rows: Iterable[Row], test: TokenSplit, console: Console) -> None:
    """Print the table, write results.json and results.png."""
    rows = list(rows)
    least, nested = majority(test), root_operator_alone(test)
    title = f"{comparison.task.title}, {test.num_samples} test samples; majority class {least:.1%}"
    if nested is not None:
        title += f", best label of the root operator {nested:.1%}"
    table = open_table(
        "attention", "test accuracy", "validation", "steps/s", "peak MiB", "parameters", "min", title=title
    )
    for row in rows:
        table.add_row(
            row.attention,
            f"{row.accuracy:.1%}",
            f"{row.validation:.1%}",
            f"{row.steps_per_s:.2f}",
            f"{row.memory_mib:.0f}",
            f"{row.parameters:,}",
            f"{row.seconds / 60:.1f}",
        )
    console.print(table)
    path = comparison.folder / "results.json"
    write_json(
        path,
        {
            "task": comparison.task.name,
            "short": comparison.task.short,
            "device": device_label(),
            "ranks": comparison.ranks,
            "overrides": list(comparison.overrides),
            "test_samples": test.num_samples,
            "test_fingerprint": test.fingerprint,
            "majority": least,
            "root_operator_alone": nested,
            "rows": [asdict(row) for row in rows],
        },
    )
    picture = path.with_suffix(".png")
    plot(comparison, rows, least, picture)
    console.print(f"written: {path}, {picture}", soft_wrap=True)


def plot(comparison: Comparison, rows: list[Row], least: float, picture: Path) -> None:
    """Draw validation accuracy against the step and against the time spent training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for row in rows:
        scored = [record for record in records(comparison.folder / row.attention) if record["kind"] == "eval"]
        steps, values = [r["step"] for r in scored], [100 * r["top1"] for r in scored]
        left.plot(steps, values, "o-", ms=3, label=row.attention)
        right.plot([step / row.steps_per_s / 60 for step in steps], values, "o-", ms=3, label=row.attention)
    left.set(xlabel="optimizer step", ylabel="validation accuracy, %", title=comparison.task.title)
    right.set(xlabel="minutes of training")
    for axes in (left, right):
        axes.axhline(100 * least, color="grey", lw=0.8, ls=":", label="majority class")
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(picture, dpi=110)
