"""`setformer train --dry-run`: what a run would be and cost, checked as far as a run checks before its first step.

It opens the data, builds the model, makes the streams of rank 0, compares the run's folder and opens the
weights that a new run begins with. What would end the run ends it with the same error and exit code; memory alone is
only compared, since the run may be for another machine. Where the data are not there yet it says all that can be said
without them first.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from torch import nn

from checkpoints.errors import DamagedError
from checkpoints.identity import Identity
from checkpoints.reader import Checkpoint, list_checkpoints
from dataloaders.config import DataConfig
from dataloaders.packing.overlap import overlap
from dataloaders.tokens import TokenSplit
from launch.ranks.lock import check_free
from launch.run.compiled import check_compiled
from launch.run.compose import Splits, check_device, open_splits, refreshed_layers, watch_of
from launch.run.config import ResolvedRun, RunConfig, check_folder
from launch.run.distill import teacher_of
from launch.run.identity import identity_of, shapes_of
from launch.run.imported import is_imported
from launch.run.initial_weights import FirstWeights, tokenizer_of
from launch.run.inputs import Split, check_evaluated, evaluation_micro, images_of, inputs_of, shapes_of_images
from launch.run.memory import (
    check_evaluation_fits,
    check_images_fit,
    keep_within_budget,
    largest_batch,
    memory_of_machine,
    predicted,
)
from launch.run.objective import assumed_classes, build_assumed, build_for, check_parts, classified_by_model
from launch.run.own_code import bring
from launch.run.periodic_probe import probed_data
from launch.run.sequence import check_sequence
from launch.run.store import continued_cursor
from setformer_dist.callbacks.build import build_callbacks
from setformer_dist.core.batch import TrainStream
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.secrets import redacted, redacted_json
from setformer_dist.core.terminal import open_table, print_heading
from setformer_dist.core.words import counted
from setformer_dist.engine.optim import OPTIMIZERS
from setformer_dist.engine.refresh import check_possible
from setformer_dist.engine.run_state import check_within
from setformer_dist.models.build import check_name, freeze
from setformer_dist.models.measure import checkpoint_bytes, fixed_parameters, multiply_adds_of, parameters
from setformer_dist.tasks.build import build_task, check_metric

_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a key of TOML without quotes


@dataclass(frozen=True)
class _Known:
    """The model of a run on its data.

    Attributes:
        model: with weights from the seed.
        shape: of one sample.
        dtype: of its elements, None for the model's own.
        rows: of the table, (what, value).
        val: what evaluation reads; None where the data are not there.
    """

    model: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    rows: tuple[tuple[str, str], ...]
    val: Split | None = None


class Costs(TypedDict):
    """Predicted costs on one rank; memory in bytes."""

    parameters: int
    fixed_parameters: int
    multiply_adds: float
    memory: dict[str, int]


def predict_costs(run: ResolvedRun, known: _Known) -> Costs:
    """Return predicted costs on one rank: counts and bytes."""
    model, memory = known.model, predicted(run, known.model, known.shape, known.dtype)
    return {
        "parameters": parameters(model),
        "fixed_parameters": fixed_parameters(model),
        "multiply_adds": multiply_adds_of(model, known.shape, known.dtype or torch.float32),
        "memory": {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "masters_and_optimizer": memory.masters,
            "activations": memory.activations,
            "gradients_and_activations_at_once": memory.working,
            "total": memory.total,
            "host": memory.host,
        },
    }


def _examine(run: ResolvedRun) -> _Known:
    """Do all that a run does before it starts DeepSpeed, as rank 0 of its ranks.

    Raises:
        SetformerError: as the run would.
    """
    c = run.config
    inputs = inputs_of(c.data)
    splits = open_splits(run)
    classes = splits.train.classes
    task = build_task(c.task, classes)
    check_metric(task, c.checkpoint.best_metric, c.checkpoint.best_mode, c.further_metrics)
    check_parts(task, (splits.train, splits.val))
    model = build_for(c, task, inputs.spec(splits.train))
    check_evaluated(model, c.model.name, c.data, splits.val)
    freeze(model, c.model.freeze)
    check_folder(run)
    watch_of(run, model)
    check_sequence(run.config, task, model)
    probed_data(run, model, splits.train, splits.val)
    check_compiled(run, model, get_accelerator().device_name())
    layers = refreshed_layers(run, model)
    teacher = teacher_of(run, task, inputs.spec(splits.train))
    ranks = RankInfo(rank=0, world_size=run.plan.world_size, local_rank=0, local_world_size=run.plan.world_size)
    place = ranks.sharing_data(run.plan.sequence)
    with contextlib.ExitStack() as stack:
        stream = inputs.train_stream(splits.train, c.run.seed, place, run.plan)
        stack.callback(stream.close)
        validation = inputs.eval_stream(splits.val, place, evaluation_micro(c.data, run.plan))
        stack.callback(validation.close)
        per_epoch = stream.steps_per_epoch
        identity = identity_of(run, model, classes, inputs.spec(splits.train))
        resumed = _resumed(run, identity, stream)
    warmup = c.schedule.warmup(per_epoch)
    check_possible(c.refresh, layers, c.schedule.total_steps(per_epoch))
    rows = [
        ("data", f"{splits.train.num_samples:,} training and {splits.val.num_samples:,} validation samples"
         + (f" of {counted(len(classes), 'class', 'classes')}" if classes else "")),
        ("steps", f"{c.schedule.total_steps(per_epoch):,} of which {warmup:,} warm up; {per_epoch:,} per epoch"),
    ]  # fmt: skip
    rows += _mixing(c, per_epoch)
    rows += _shared_samples(splits)
    if c.schedule.name == "wsd":
        rows.append(("decay", f"over the last {c.schedule.decay(per_epoch):,} steps"))
    if teacher is not None:
        order = "" if teacher.named else "; it names no classes, and its outputs are taken in the order of the data's"
        rows.append(("teacher", f"{teacher.place}, {teacher.config.model.name}, {teacher.weights} weights{order}"))
    rows += (
        [("begins", resumed)]
        if resumed
        else _beginning(run, model, classified_by_model(task), tokenizer_of(inputs.spec(splits.train)))
    )
    rows += _recomputed(run, model, inputs.shape(splits.train), inputs.dtype)
    return _Known(model, inputs.shape(splits.train), inputs.dtype, tuple(rows), splits.val)


def _mixing(config: RunConfig, steps_per_epoch: int) -> list[tuple[str, str]]:
    """Say in which steps mixup and cutmix are on, where they end."""
    if not isinstance(config.data, DataConfig) or not config.data.augment.mixes:
        return []
    mixed, total = config.data.augment.mixed_steps(steps_per_epoch), config.schedule.total_steps(steps_per_epoch)
    if mixed is None:
        return []
    if mixed >= total:
        return [("mixing", f"in all steps: it would be off from step {mixed:,} on")]
    return [("mixing", f"in the first {mixed:,} steps, off in the last {total - mixed:,}")]


def _shared_samples(splits: Splits) -> list[tuple[str, str]]:
    """Say how many validation samples are trained on, where the data keep checksums of images."""
    if isinstance(splits.train, TokenSplit) or isinstance(splits.val, TokenSplit):
        return []
    found = overlap(images_of(splits.train), images_of(splits.val))
    if found is None or not found.samples:
        return []
    trained, validated = found.first
    shared = f"{found.samples:,} of {splits.val.num_samples:,} validation samples have the bytes of a training sample"
    return [("OVERLAP", f"{shared}; the first: {validated}, in training {trained}")]


def _recomputed(
    run: ResolvedRun, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None
) -> list[tuple[str, str]]:
    """Set what is recomputed as the run would, and say it where a budget chooses it; raises likewise."""
    chosen = keep_within_budget(run, model, shape, dtype)
    return [] if chosen is None else [("recomputed, by stage", chosen)]


def _resumed(run: ResolvedRun, identity: Identity, stream: TrainStream) -> str:
    """Say from which checkpoint the run would resume, "" if from none.

    Raises:
        CheckpointError: it is of another model, other classes or other data.
    """
    folder = run.config.folder / "checkpoints"
    whole = [entry for entry in list_checkpoints(folder) if entry.fault is None] if folder.is_dir() else []
    for newest, manifest in ((entry, entry.manifest) for entry in whole if entry.manifest is not None):
        found = Checkpoint(newest.path, manifest, {})
        try:
            imported = is_imported(found)
        except DamagedError:
            continue
        if not imported:
            found.identity.check_same_model(identity)
            allowed = run.config.checkpoint.allow_changes
            step = stream.check_state(continued_cursor(found.trainer["stream"], stream.state(0), allowed))
            check_within(step, run.config.schedule.total_steps(stream.steps_per_epoch), newest.path)
        return f"resumes from the newest checkpoint that verifies; the newest is step {manifest.step:,}"
    return ""


def _beginning(run: ResolvedRun, model: nn.Module, outputs: int, tokenizer: str) -> list[tuple[str, str]]:
    """Say from what a run without checkpoints would begin; raises as `FirstWeights.check`."""
    c = run.config
    if c.model.weights is not None:
        buffers = frozenset(name for name, _ in model.named_buffers())
        arguments = inputs_of(c.data).model_arguments(c.model, outputs)
        first = FirstWeights(c.model, shapes_of(model), buffers, Alone(), arguments, tokenizer=tokenizer)
        return [("begins", first.check())]
    return [("begins", f"from weights drawn from seed {c.run.seed}")]


def _assumed(run: ResolvedRun) -> _Known:
    """Return the model for images of so many classes, where the data are not there."""
    c = run.config
    assert isinstance(c.data, DataConfig)
    model = build_assumed(c)
    freeze(model, c.model.freeze)
    check_sequence(run.config, None, model)
    check_compiled(run, model, get_accelerator().device_name())
    shape = (c.data.bands, *c.data.shape)
    return _Known(model, shape, None, tuple(_recomputed(run, model, shape, None)))


def as_overrides(table: Mapping[str, object], before: str = "") -> Iterator[str]:
    """Yield one line for each key of nested tables, as an override and as TOML have it.

    An override cannot name a key with a dot, so a table with such a key is one value.
    """
    for key, value in table.items():
        if isinstance(value, dict) and value and all(map(_BARE.fullmatch, value)):
            yield from as_overrides(value, f"{before}{key}.")
        else:
            yield f"{before}{key} = {_toml(value)}"


def _toml(value: object) -> str:
    """Return a JSON-able value as TOML has it, which has no null: a key without a value is left out of a table."""
    if isinstance(value, dict):
        pairs = (f"{_toml_key(key)} = {_toml(inner)}" for key, inner in value.items() if inner is not None)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _toml_key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def dry_run(run: ResolvedRun, console: Console, local_ranks: int | None = None, full: bool = False) -> None:
    """Print the config and the predicted costs.

    Args:
        run: the run.
        console: where to print.
        local_ranks: those that this machine would have; None where others would train.
        full: print every key and DeepSpeed's JSON; otherwise the keys that differ from their defaults.

    Raises:
        SetformerError: as the run would before its first step, after all that can be said was printed.
    """
    bring(run.config.run.imports)
    build_callbacks(run.config.logging, run.config.run.callbacks, run.config.run.callback_args)
    check_name(run.config.model.name)
    check_device(run)
    missing: DataError | None = None
    try:
        known = _examine(run)
    except DataError as error:
        if not isinstance(run.config.data, DataConfig):
            raise
        known, missing = _assumed(run), error
    costs = predict_costs(run, known)
    if full:
        print_heading(console, "resolved config")
        console.print_json(json.dumps(run.as_json()))
        print_heading(console, "DeepSpeed config")
        console.print_json(json.dumps(run.deepspeed_json()))
    else:
        print_heading(console, "config, where it differs from the defaults (--full prints all of it)")
        changed = redacted_json(run.config.model_dump(mode="json", exclude_defaults=True))
        console.print("\n".join(as_overrides(changed)), highlight=False, markup=False, soft_wrap=True)
    print_heading(console, "predicted")
    if missing is not None:
        console.print(
            "The data do not exist or cannot be opened (the error at the end says why): "
            f"{assumed_classes(run.config)} classes are assumed, and the number of steps is unknown.",
            highlight=False,
        )
    table = open_table("", "", show_header=False, box=None)
    for row in (*_rows(run, known, costs), *_memory_rows(run, known, costs), *_disk_rows(run, costs)):
        table.add_row(*map(redacted, row))
    console.print(table, markup=False)
    if missing is not None:
        raise missing
    if local_ranks is not None:
        check_images_fit(run, known.model, known.shape, known.dtype, local_ranks)
        if known.val is not None:
            check_evaluation_fits(run, known.model, known.val, local_ranks)
    check_free(run.config.folder)
    _check_disk(run, costs)


def rank_bytes(run: ResolvedRun) -> int:
    """Return the predicted bytes of one rank's memory, that of its device included.

    Raises:
        SetformerError: as the run would, also where its checkpoints will not fit on the disk.
    """
    costs = predict_costs(run, _examine(run))
    _check_disk(run, costs)
    return int(costs["memory"]["total"] + costs["memory"]["host"])


def _rows(run: ResolvedRun, known: _Known, costs: Costs) -> list[tuple[str, str]]:
    per_sample = f"{costs['multiply_adds'] / 1e9:.3f} G per sample of {'×'.join(map(str, known.shape))}"
    fixed = costs["fixed_parameters"]
    more = f", and {fixed / 1e6:.2f} M that do not train" if fixed else ""
    return [
        ("model", run.config.model.name),
        *known.rows,
        ("parameters", f"{costs['parameters'] / 1e6:.2f} M{more}"),
        ("multiply-adds", per_sample),
        *_batch_rows(run),
    ]


def _batch_rows(run: ResolvedRun) -> list[tuple[str, str]]:
    """Return how a step's samples are shared, for each size of images where that makes a difference."""
    plan, data = run.plan, run.config.data
    who = f"{plan.groups} groups of {plan.sequence} ranks that share each image"
    whose, who = ("rank", f"{plan.world_size} ranks") if plan.sequence == 1 else ("group", who)

    def equation(micro: int) -> str:
        accumulation = plan.global_size // (micro * plan.groups)
        return f"{plan.global_size} = {micro} per {whose} × {accumulation} accumulated × {who}"

    if plan.micro_pixels is None or not isinstance(data, DataConfig):
        return [("batch", equation(plan.micro))]
    first_of = {plan.micro_at(shape): shape for shape in reversed(shapes_of_images(data))}  # its smallest images
    return [(f"batch from {h} x {w} on", equation(micro)) for micro, (h, w) in sorted(first_of.items(), reverse=True)]


def _memory_rows(run: ResolvedRun, known: _Known, costs: Costs) -> list[tuple[str, str]]:
    memory = dict(costs["memory"])
    host = memory.pop("host")
    micro, *largest = largest_batch(run, known.shape)
    rows = [] if (*largest,) == known.shape else [("largest micro batch", "×".join(map(str, (micro, *largest))))]
    rows += [(f"memory per rank: {n.replace('_', ' ')}", f"{v / 2**20:,.1f} MiB") for n, v in memory.items()]
    if host:
        rows.append(("host memory per rank, by offload", f"{host / 2**20:,.1f} MiB"))
    if not torch.cuda.is_available():
        need, there = (memory["total"] + host) * run.plan.world_size, memory_of_machine()
        verdict = "enough" if need < there else "NOT ENOUGH for all ranks on this machine"
        rows.append(("memory of this machine", f"{there / 2**30:,.1f} GiB: {verdict}"))
    return rows


def _disk_need(run: ResolvedRun, costs: Costs) -> tuple[int, int, int]:
    """Return (bytes of a checkpoint, most that are kept at a time, bytes free where they go)."""
    config = run.config.checkpoint
    kept = config.keep_last + config.keep_best + 1  # one more while it is written
    place = run.config.folder.absolute()
    while not place.exists():
        place = place.parent
    states = len(OPTIMIZERS[run.config.optim.name].states)
    one = checkpoint_bytes(costs["parameters"], costs["fixed_parameters"], states, run.config.ema.decay > 0)
    return one, kept, shutil.disk_usage(place).free


def _disk_rows(run: ResolvedRun, costs: Costs) -> list[tuple[str, str]]:
    one, kept, free = _disk_need(run, costs)
    forever = run.config.checkpoint.keep_every
    more = f", and one every {forever:,} steps for good" if forever else ""
    return [
        ("checkpoints", f"{one / 2**20:,.1f} MiB each, at most {kept} at a time{more}"),
        ("free disk", f"{free / 2**30:,.1f} GiB below {run.config.run.out}"),
    ]


def _check_disk(run: ResolvedRun, costs: Costs) -> None:
    """Refuse a run whose checkpoints will not fit.

    Raises:
        ConfigError: with the sizes.
    """
    one, kept, free = _disk_need(run, costs)
    if one * kept > free:
        raise ConfigError(
            f"the checkpoints of {run.config.folder} take up to {one * kept / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free: set run.out to another disk, or lower checkpoint.keep_last"
        )
