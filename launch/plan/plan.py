"""`setformer plan`: a run config on numbers of devices, under every ZeRO stage, as tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.plan.goodput import Saving, best_interval, goodput
from launch.plan.hardware import DEVICES, GB
from launch.plan.rows import MOST_MICRO, Cluster, Row, rank_memory, recommended, row_of, saving_of, shared
from launch.plan.subject import Subject, subject_of
from launch.plan.traffic import seconds
from launch.run.config import RunConfig
from launch.run.own_code import bring
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import write_json
from setformer_dist.core.terminal import open_table, print_heading
from setformer_dist.models.build import check_name

STAGES = (0, 1, 2, 3)
_MOST = 1_000_000  # devices of a plan


def counts_of(text: str) -> list[int]:
    """Return the numbers of devices that `--gpus` names, ascending.

    Raises:
        ConfigError: it is no list of numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", part) and 1 <= int(part) <= _MOST for part in parts):
        raise ConfigError(f"--gpus {text!r}: give numbers from 1 to {_MOST:,}, separated by commas, such as 8,64,512")
    return sorted({int(part) for part in parts})


def device_named(name: str) -> str:
    """Return the name of a device of the table.

    Raises:
        ConfigError: there is none.
    """
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name!r}: give one of {', '.join(DEVICES)}")
    return name


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What failures do to a plan for one number of devices.

    Attributes:
        saving: of a checkpoint.
        failures_s: mean seconds between failures.
        interval_s: seconds of work between checkpoints.
        steps: the same in optimizer steps.
        goodput: share of the time that is progress.
        as_written: the same with the run's checkpoint.every_steps.
    """

    saving: Saving
    failures_s: float
    interval_s: float
    steps: int
    goodput: float
    as_written: float


def recovery_of(subject: Subject, cluster: Cluster, row: Row) -> Recovery:
    """Return the best checkpoint interval of a row and the share of the time that is left; no two writes overlap."""
    saving, failures = saving_of(subject, cluster, row.world_size), cluster.between_failures(row.world_size)
    interval = max(best_interval(saving.pause_s, failures), saving.write_s, row.step_s)
    steps = max(1, round(interval / row.step_s))
    written = subject.config.checkpoint.every_steps * row.step_s

    def share(seconds: float) -> float:
        return goodput(seconds, saving, failures, cluster.restart_s)

    return Recovery(saving, failures, interval, steps, share(interval), share(written))


def plan(
    config: RunConfig,
    counts: Sequence[int],
    cluster: Cluster,
    per_device: int | None,
    file: Path | None,
    console: Console,
) -> None:
    """Print the plan of a run config; write it as JSON where a file is given.

    Args:
        config: the run's.
        counts: numbers of devices.
        cluster: what they are.
        per_device: samples of a step for each device, instead of the run's global batch.
        file: for JSON.
        console: to print to.

    Raises:
        SetformerError: the model cannot be built, or no number of devices can run it under any stage.
    """
    bring(config.run.imports)
    check_name(config.model.name)
    subject = subject_of(config)
    rows = [
        row_of(with_batch(subject, count, per_device), cluster, stage, count) for count in counts for stage in STAGES
    ]
    if all(row.why_not for row in rows):
        raise ConfigError(rows[-1].why_not)
    best = {count: recommended([row for row in rows if row.world_size == count]) for count in counts}
    recoveries = {n: recovery_of(subject, cluster, row) for n, row in best.items() if row is not None}
    _print_subject(subject, cluster, console)
    _print_memory(subject, cluster, rows, console)
    _print_speed(rows, best, console)
    _print_recovery(subject, cluster, best, recoveries, console)
    for count in dict.fromkeys(row.world_size for row in rows if row.batch and best[row.world_size] is None):
        console.print(
            f"no stage fits on {count:,} GPUs: recompute activations, offload, or lower batch.max_micro",
            highlight=False,
            markup=False,
        )
    if file is not None:
        write_json(file, _as_json(subject, cluster, rows, best, recoveries))


def with_batch(subject: Subject, count: int, per_device: int | None) -> Subject:
    """Return the subject with a global batch that grows with the devices, where one per device is given."""
    if per_device is None:
        return subject
    batch = subject.config.batch.model_copy(update={"global_size": per_device * count})
    return dataclasses.replace(subject, config=subject.config.model_copy(update={"batch": batch}))


def _print_subject(subject: Subject, cluster: Cluster, console: Console) -> None:
    c, device = subject.config, cluster.device
    print_heading(console, "model and devices")
    table = open_table("", "", show_header=False, box=None)
    shape, fixed = "×".join(map(str, subject.shape)), sum(subject.model.fixed)
    more = f" and {fixed / 1e6:.2f} M that do not train" if fixed else ""
    rows = [
        ("model", f"{c.model.name}, {subject.model.count / 1e6:.2f} M parameters{more}, "
                  f"{subject.multiply_adds / 1e9:.3f} G multiply-adds per sample of {shape}"),
        ("references", f"{_size(subject.references * 4)} of the weights as fp32 (states and average in proportion)"),
        ("precision", f"{c.precision.dtype}, optimizer {c.optim.name}, "
                      f"activations {'recomputed' if c.model.recomputes_blocks else 'kept'}"),
        ("device", f"{device.name}: {device.memory / GB:.0f} GB, of which {_size(device.reserved)} are taken to be in "
                   f"use; kernels reach {device.reached_in(c.precision.dtype) / 1e12:.3g} TFLOP/s in training"),
        ("links", f"{device.inside.bandwidth / GB:g} GB/s per rank in nodes of {cluster.per_node}, "
                  f"{device.between.bandwidth / GB:g} GB/s between them"),
        ("figures from", device.sources),
        ("failures", f"one device fails every {cluster.device_hours:,.0f} hours (assumed), back after "
                     f"{cluster.restart_s:g} s; checkpoints go at {cluster.storage / GB:g} GB/s (assumed)"),
    ]  # fmt: skip
    rows += _shared_rows(subject, cluster)
    for row in rows + ([("assumed", subject.assumed)] if subject.assumed else []):
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)


def _shared_rows(subject: Subject, cluster: Cluster) -> list[tuple[str, str]]:
    """Return what ranks that share an image exchange for it, and how long that takes."""
    exchange, parts = subject.exchange, subject.parts
    if exchange is None:
        return []
    transfers = shared(subject, 1, 1)
    ms = {t.what: 1e3 * seconds(t, cluster.device, parts, cluster.per_node) for t in transfers}
    text = (
        f"{parts} ranks hold the rows of each; per micro batch and rank {exchange.sums} sums, of "
        f"{exchange.sum_bytes / 1e6:,.2f} MB for one image ({ms['sums']:,.2f} ms, "
        f"{1e3 * ms['sums'] / exchange.sums:,.0f} us each)"
    )
    if exchange.rows:
        size = f"{exchange.row_bytes / 1e6:,.2f} MB ({ms['rows']:,.2f} ms)"
        text += f", {exchange.rows} rows of tokens to a neighbour, {size}"
    if exchange.gathers:
        text += f", {exchange.gathers} gathers of keys, {exchange.gather_bytes / 1e6:,.2f} MB ({ms['keys']:,.2f} ms)"
    return [("shared images", text)]


def _print_memory(subject: Subject, cluster: Cluster, rows: Sequence[Row], console: Console) -> None:
    print_heading(console, "memory of a rank")
    table = open_table(
        "GPUs", "ZeRO", "weights", "gradients", "masters", "states", "average", "activations kept / recomputed",
        "at work", "total", "largest micro batch kept / recomputed",
    )  # fmt: skip
    for row in rows:
        if row.memory is None or row.batch is None:
            continue
        part = memory_parts(subject, row)
        kept = {k: rank_memory(subject, cluster.device, row.stage, row.batch, k).activations for k in subject.passes}
        table.add_row(
            f"{row.world_size:,}", str(row.stage),
            *(_size(part[name]) for name in ("weights", "gradients", "masters", "states", "average")),
            " / ".join(_size(kept[k]) if k in kept else "-" for k in (False, True)),
            _size(row.memory.working), _size(row.memory.total) + ("" if row.fits else ", does not fit"),
            " / ".join(_micro(dict(row.largest).get(k)) for k in (False, True)),
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)
    for line in impossible(rows):
        console.print(line, highlight=False, markup=False)
    console.print(
        "At work: the most that gradients, activations and reduction buckets take together; they are not all there at "
        "once. Total: weights, masters, states, average, and that.",
        highlight=False,
    )


def impossible(rows: Sequence[Row]) -> list[str]:
    """Return one line for each reason why some numbers of devices cannot run a config, with the stages it holds for."""
    lines = []
    for why in dict.fromkeys(row.why_not for row in rows if row.why_not):
        stages: dict[int, list[int]] = {}
        for row in rows:
            if row.why_not == why:
                stages.setdefault(row.world_size, []).append(row.stage)
        which = " and ".join(
            f"{count:,} GPUs" + ("" if len(of) == len(STAGES) else f" under ZeRO-{', '.join(map(str, of))}")
            for count, of in stages.items()
        )
        hint = " (--batch-per-gpu N plans one that grows with the GPUs)" if why.startswith("batch.global_size") else ""
        lines.append(f"not possible on {which}: {why}{hint}")
    return lines


def memory_parts(subject: Subject, row: Row) -> dict[str, int]:
    """Return the bytes of a row's memory with masters, states and average listed separately."""
    memory = row.memory
    assert memory is not None
    share = math.ceil(subject.model.count / (row.world_size if row.stage else 1)) if memory.masters else 0
    states, average = 4 * share * subject.states, 4 * (share + sum(subject.model.fixed)) * subject.ema
    return {
        "weights": memory.parameters,
        "gradients": memory.gradients,
        "masters": memory.masters - states - average,
        "states": states,
        "average": average,
        "activations": memory.activations,
        "working": memory.working,
        "total": memory.total,
        "host": memory.host,
    }


def _print_speed(rows: Sequence[Row], best: dict[int, Row | None], console: Console) -> None:
    print_heading(console, "time of a step")
    table = open_table(
        "GPUs", "ZeRO", "global batch", "a rank sends", "compute ms", "traffic ms", "update ms", "step ms",
        "samples/s", "efficiency", "",
    )  # fmt: skip
    for row in rows:
        if row.batch is None:
            continue
        verdict = "recommended" if row is best[row.world_size] else "" if row.fits else "does not fit"
        b = row.batch
        batch = f"{b.global_size:,} = {b.micro} × {b.accumulation} × {b.groups:,}"
        table.add_row(
            f"{row.world_size:,}", str(row.stage), batch,
            _size(row.sent), *(f"{1e3 * s:,.1f}" for s in (row.compute_s, row.traffic_s, row.update_s, row.step_s)),
            f"{row.samples_per_s:,.4g}", f"{row.efficiency:.1%}", verdict,
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)


def _print_recovery(
    subject: Subject, cluster: Cluster, best: dict[int, Row | None], found: dict[int, Recovery], console: Console
) -> None:
    print_heading(console, "checkpoints and failures, with the recommended stage")
    table = open_table(
        "GPUs", "ZeRO", "checkpoint", "held up s", "written in s", "a failure every", "best interval",
        "goodput", f"every {subject.config.checkpoint.every_steps:,} steps",
    )  # fmt: skip
    for count, row in best.items():
        if row is None:
            continue
        r = found[count]
        table.add_row(
            f"{count:,}", str(row.stage), _size(r.saving.size), f"{r.saving.pause_s:.3f}", f"{r.saving.write_s:.2f}",
            f"{r.failures_s / 3600:,.1f} h", f"{r.steps:,} steps, {r.interval_s:,.0f} s", f"{r.goodput:.2%}",
            f"{r.as_written:.2%}",
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)


def _as_json(
    subject: Subject,
    cluster: Cluster,
    rows: Sequence[Row],
    best: dict[int, Row | None],
    recoveries: dict[int, Recovery],
) -> dict[str, object]:
    def row_json(row: Row) -> dict[str, object]:
        known: dict[str, object] = {"gpus": row.world_size, "stage": row.stage}
        if row.batch is None:
            return {**known, "why_not": row.why_not}
        return {
            **known,
            "batch": dataclasses.asdict(row.batch),
            "memory": memory_parts(subject, row),
            "fits": row.fits,
            "largest_micro": {"recomputed" if key else "kept": value for key, value in row.largest},
            "transfers": [dataclasses.asdict(t) | {"sent": t.sent(row.world_size)} for t in row.transfers],
            "compute_s": row.compute_s,
            "traffic_s": row.traffic_s,
            "update_s": row.update_s,
            "step_s": row.step_s,
            "samples_per_s": row.samples_per_s,
            "efficiency": row.efficiency,
            "recommended": row is best[row.world_size],
        }

    return {
        "model": subject.config.model.name,
        "parameters": subject.model.count,
        "multiply_adds": subject.multiply_adds,
        "assumed": subject.assumed,
        "cluster": json.loads(json.dumps(dataclasses.asdict(cluster))),
        "rows": [row_json(row) for row in rows],
        "recovery": {str(count): dataclasses.asdict(found) for count, found in recoveries.items()},
    }


def _size(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _micro(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if value < MOST_MICRO else f"{MOST_MICRO:,} or more"
