"""The composition root: every part of a run is built here, in plain sight, and handed to the trainer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from checkpoints.beside import Names
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.objects import Objects
from checkpoints.reader import Checkpoint
from checkpoints.spread_manager import SpreadManager
from dataloaders.config import TokenConfig
from dataloaders.tokens import TOKENIZER_NAME
from launch.run.compiled import compile_for
from launch.run.config import ResolvedRun, RunConfig
from launch.run.distill import with_teacher
from launch.run.identity import identity_of, shapes_of
from launch.run.initial_weights import FirstWeights, tokenizer_of
from launch.run.inputs import Split, check_splits, evaluation_micro, inputs_of
from launch.run.objective import averaged_of, classified_by_model, prepare_for, vocabulary_of
from launch.run.own_model import agreed_buffers
from launch.run.periodic_probe import probe_of
from launch.run.refit_by_ray import ByRay
from launch.run.sequence import check_sequence, decode_own_rows, split_model, with_rows
from launch.run.store import RunStore
from setformer_dist.callbacks.build import build_callbacks
from setformer_dist.core.batch import TrainStream
from setformer_dist.core.callback import Callback
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.ledger import LEDGER, LOCK_FILE
from setformer_dist.core.task import Task
from setformer_dist.engine.comm import CommMeter, TorchCollectives
from setformer_dist.engine.components import Components, Costs
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize, supported_dtypes
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.evaluate import Watch
from setformer_dist.engine.events import Callbacks
from setformer_dist.engine.guard import GUARD_COPY, GUARD_FILE, Guard
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.metrics import RunRecord, peak_flops
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.protocol import Engine
from setformer_dist.engine.refitter import InJob
from setformer_dist.engine.refresh import Refresh
from setformer_dist.engine.run_state import Best
from setformer_dist.engine.trainer import Trainer
from setformer_dist.engine.zero import check_precision
from setformer_dist.models.measure import multiply_adds_of
from setformer_dist.models.reference_sets import (
    freeze_sets,
    reference_layers,
    set_attentions,
    watched_marginals,
    watched_tokens,
)
from setformer_dist.ops.refit import Layer
from setformer_dist.tasks.build import check_metric


@dataclass(frozen=True)
class Splits:
    """The packed data of a run."""

    train: Split
    val: Split


def open_splits(run: ResolvedRun) -> Splits:
    """Open training and validation data and check that they have the same classes.

    Raises:
        DataError: a folder is missing, empty or damaged, or the class maps differ.
    """
    data = run.config.data
    inputs = inputs_of(data)
    splits = Splits(inputs.open_train(), inputs.open(data.root, data.val))
    check_splits(splits.train, splits.val)
    return splits


def check_device(run: ResolvedRun) -> None:
    """Refuse a precision that this device does not compute.

    Raises:
        ConfigError: with the reason.
    """
    accelerator = get_accelerator()
    check_precision(run.config.precision, run.config.zero, supported_dtypes(), accelerator.device_name())


def compose(
    run: ResolvedRun,
    splits: Splits,
    task: Task,
    model: nn.Module,
    comm: TorchCollectives,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Build a run on this rank around a model fresh from its seed; `callbacks` come after the config's. Collective."""
    c = run.config
    named = [*build_callbacks(c.logging, c.run.callbacks, c.run.callback_args), *callbacks]
    ranks, plan, place = comm.ranks, run.plan, comm.ranks.sharing_data(run.plan.sequence)
    watch = watch_of(run, model)
    layers = refreshed_layers(run, model)
    check_metric(task, c.checkpoint.best_metric, c.checkpoint.best_mode, c.further_metrics)
    device = torch.device(get_accelerator().current_device_name())
    inputs = inputs_of(c.data)
    check_sequence(c, task, model)
    for split in (splits.train, splits.val):
        decode_own_rows(c, split, model, ranks)
    stream = inputs.train_stream(splits.train, c.run.seed, place, plan)
    validation = inputs.eval_stream(splits.val, place, evaluation_micro(c.data, plan))
    schedule_steps = c.schedule.total_steps(stream.steps_per_epoch)
    costs = costs_of(run, splits, model)
    input_spec = inputs.spec(splits.train)
    identity = identity_of(run, model, splits.train.classes, input_spec)
    best, copies_s = Best(c.checkpoint.best_metric, c.checkpoint.best_mode), 60 * c.checkpoint.mirror_minutes
    first_weights = first_weights_of(run, task, model, comm, tokenizer_of(input_spec))
    buffers = agreed_buffers(model, c, comm)
    dtype, classes = DTYPES[c.precision.dtype], len(splits.train.classes)
    averaged = averaged_of(task, model, device, dtype)
    prepare = prepare_for(c, task, classes, device, dtype, stream.steps_per_epoch, averaged, vocabulary_of(input_spec))
    task, prepare, taught_by = with_teacher(run, task, prepare, input_spec, device, comm)
    prepare = with_rows(prepare, model, split_model(c, model, ranks))
    heartbeat = Heartbeat.from_env()
    leaves = compile_for(run, model, ranks, device.type, functools.partial(heartbeat.beat, "forward"))
    engine = initialize(model, c.optim, run.deepspeed_json(), leaves)
    master = MasterState(engine)
    ema = Ema(master, c.ema) if c.ema.decay else None
    meter = CommMeter()
    meter.install()

    components = Components(
        engine=engine,
        master=master,
        ema=ema,
        plan=plan,
        stream=stream,
        validation=validation,
        task=task,
        prepare=prepare,
        schedule=Schedule(engine.optimizer, c.schedule, stream.steps_per_epoch),
        store=store_of(run, identity, splits, comm, stream, master, schedule_steps, taught_by, buffers),
        comm=comm,
        meter=meter,
        record=RunRecord(c.folder, ranks.is_main),
        costs=costs,
        guard=Guard(c.guard, c.folder, comm, scaled=c.precision.dtype == "fp16"),
        heartbeat=heartbeat,
        callbacks=Callbacks(named, c.folder, run.as_json(), ranks.is_main),
        watch=watch,
        first_weights=first_weights,
        refresh=refresh_of(run, layers, engine, master, ema, comm, heartbeat, schedule_steps),
        averaged=averaged,
        probe=probe_of(run, splits.train, splits.val, engine, comm, stream.steps_per_epoch),
    )
    return Trainer(
        components, c.eval, best, schedule_steps, c.run.log_every, c.run.seed, c.run.record_samples, copies_s
    )


def costs_of(run: ResolvedRun, splits: Splits, model: nn.Module) -> Costs:
    """Return what a sample costs, for the throughput metrics."""
    inputs, peak = inputs_of(run.config.data), peak_flops(device_label())
    shape, dtype = inputs.shape(splits.train), inputs.dtype or torch.float32
    tokens, of_tokens = inputs.tokens(model, splits.train), isinstance(run.config.data, TokenConfig)
    if isinstance(run.config.data, TokenConfig) and run.config.data.trim:
        shape = (*shape[:-1], tokens // math.prod(shape[:-1]))
    return Costs(
        tokens=tokens,
        multiply_adds=0 if peak is None else multiply_adds_of(model, shape, dtype),  # counting takes a second
        peak_flops=peak,
        samples="samples" if of_tokens else "images",
    )


def store_of(
    run: ResolvedRun,
    identity: Identity,
    splits: Splits,
    comm: TorchCollectives,
    stream: TrainStream,
    master: MasterState,
    total_steps: int,
    taught_by: str | None,
    buffers: str | None,
) -> RunStore:
    """Return the checkpoints of the run, with the checks of what it may resume from."""
    config = run.config
    averaged = ["ema"] if config.ema.decay else []
    return RunStore(
        manager_of(config, comm),
        run,
        identity,
        splits.train.classes,
        inputs_of(config.data).spec(splits.train),
        stream.state,
        total_steps,
        comm.ranks.is_main,
        check_place=stream.check_state,
        holds=functools.partial(
            Checkpoint.check_holds,
            shapes=master.shapes,
            states=("param", *master.states, *averaged),
            fixed=master.fixed_shapes,
            fixed_states=("param", *averaged),
        ),
        teacher=taught_by,
        fixed=master.fixed_shapes,
        buffers=buffers,
    )


# What rank 0 writes into a run's folder and a resume needs, or whoever looks at the run.
BESIDE = Names(
    whole=(GUARD_FILE, GUARD_COPY, "config.json", "deepspeed.json", TOKENIZER_NAME),
    grown=("metrics.jsonl", "samples.jsonl", LEDGER),
    kept=(LEDGER, LOCK_FILE),
)


def manager_of(config: RunConfig, comm: TorchCollectives) -> CheckpointManager:
    """Return what saves and finds checkpoints: on storage that all hosts share, or on a disk of each host."""
    kept, root = config.checkpoint, config.folder / "checkpoints"
    objects = Objects(f"{kept.mirror.rstrip('/')}/{config.run.name}") if kept.mirror else None
    if not kept.replicas:
        return CheckpointManager(root, comm, kept, objects=objects)
    background = TorchCollectives(comm.ranks, kept.write_timeout_minutes, own=True)
    return SpreadManager(root, comm, background, kept, objects=objects, beside=BESIDE)


def first_weights_of(
    run: ResolvedRun, task: Task, model: nn.Module, comm: TorchCollectives, tokenizer: str
) -> FirstWeights | None:
    """Return what fills a new run's model with `model.weights`, None where the config names none."""
    config = run.config.model
    if config.weights is None:
        return None
    buffers = frozenset(name for name, _ in model.named_buffers())
    arguments = inputs_of(run.config.data).model_arguments(config, classified_by_model(task))
    return FirstWeights(config, shapes_of(model), buffers, comm, arguments, tokenizer=tokenizer)


def watch_of(run: ResolvedRun, model: nn.Module) -> Watch | None:
    """Return what collects the marginal errors of evaluations, None where they are not asked for.

    Raises:
        ConfigError: they are, of a model that has none.
    """
    if not run.config.eval.marginal_error:
        return None
    if not set_attentions(model):
        raise ConfigError(
            f"eval.marginal_error = true, but {run.config.model.name} has no SeT attention in this config, and only "
            "its plans have marginals: remove the key, or use a model with attention.kind = 'set'"
        )
    return functools.partial(watched_marginals, model)


def refreshed_layers(run: ResolvedRun, model: nn.Module) -> tuple[Layer, ...]:
    """Return the layers whose sets are refreshed or frozen, of a model that is not cut by ZeRO yet; freeze these.

    Raises:
        ConfigError: the model has nothing of what [refresh] names.
    """
    config = run.config.refresh
    if not config.on and config.learn:
        return ()
    layers = reference_layers(model)
    if not layers:
        raise ConfigError(
            f"[refresh] sets reference sets, but {run.config.model.name} has no SeT attention in this config: remove "
            "the table, or use a model with attention.kind = 'set'"
        )
    if not any(kind in layer.shapes for layer in layers for kind in config.sets):
        there = ", ".join(dict.fromkeys(kind for layer in layers for kind in layer.shapes))
        raise ConfigError(f"refresh.sets = {list(config.sets)}, and this model has none of them: it has {there}")
    kept = [f"{layer.name}.{kind}" for layer in layers for kind in config.sets if kind in layer.shapes]
    if still := [name for name in kept if not model.get_parameter(name).requires_grad]:
        raise ConfigError(
            f"[refresh] sets {still[0]}, which does not train (model.freeze, requires_grad): remove the table, or "
            "freeze less"
        )
    if not config.learn:
        freeze_sets(model, config.sets)
    return layers


def refresh_of(
    run: ResolvedRun,
    layers: tuple[Layer, ...],
    engine: Engine,
    master: MasterState,
    ema: Ema | None,
    comm: TorchCollectives,
    heartbeat: Heartbeat,
    total_steps: int,
) -> Refresh | None:
    """Return what sets the reference sets by K-means, None where the config wants no refresh."""
    c = run.config
    if not c.refresh.on:
        return None
    return Refresh(
        c.refresh,
        layers,
        functools.partial(watched_tokens, engine.module),
        master,
        ema,
        comm,
        run.plan,
        ByRay(c.refresh, comm, heartbeat) if c.refresh.by == "ray" else InJob(comm.ranks, engine.device),
        c.run.seed,
        total_steps,
    )


def device_label() -> str:
    """Return the device's name: the GPU's model, or "cpu"."""
    if get_accelerator().device_name() == "cuda":
        return str(torch.cuda.get_device_name())
    return str(get_accelerator().device_name())
