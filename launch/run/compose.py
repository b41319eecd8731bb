"""The composition root: every part of a run is built here, in plain sight, and handed to the trainer."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from checkpoints.identity import Identity, digest_json, digest_shapes
from checkpoints.manager import CheckpointManager
from checkpoints.reader import Checkpoint
from dataloaders.order.order import counts_samples
from launch.run.config import ResolvedRun
from launch.run.distill import KEY as TEACHER
from launch.run.distill import check_one_teacher, check_same_teacher, digest_of, distilled, teacher_of
from launch.run.imported import is_imported, loadable, trainer_state
from launch.run.initial_weights import FirstWeights
from launch.run.inputs import Split, check_splits, inputs_of
from setformer_dist.callbacks.build import build_callbacks
from setformer_dist.core.callback import Callback
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.revisions import unnamed
from setformer_dist.core.store import SavedState, Snapshot
from setformer_dist.core.task import Task
from setformer_dist.engine.comm import CommMeter, TorchCollectives
from setformer_dist.engine.components import Components, Costs
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize, supported_dtypes
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.evaluate import Watch
from setformer_dist.engine.events import Callbacks
from setformer_dist.engine.guard import Guard
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.metrics import RunRecord, peak_flops
from setformer_dist.engine.optim import Schedule
from setformer_dist.engine.run_state import Best, check_trainer
from setformer_dist.engine.trainer import Trainer
from setformer_dist.engine.zero import check_precision
from setformer_dist.models.attention import set_attentions, watched_marginals
from setformer_dist.models.measure import multiply_adds_of
from setformer_dist.tasks.build import check_metric

VERSIONS_OF = ("setformer_dist", "torch", "deepspeed", "timm", "safetensors")


@dataclass(frozen=True)
class Splits:
    """The packed data of a run."""

    train: Split
    val: Split


def open_splits(run: ResolvedRun) -> Splits:
    """Open training and validation data and check that they speak of the same classes.

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


def identity_of(run: ResolvedRun, model: nn.Module, classes: tuple[str, ...], told: dict[str, Any]) -> Identity:
    """Return what the run's checkpoints belong to; `told` is what the model was told about its inputs."""
    c = run.config
    return Identity(
        model=c.model.name,
        model_args=json.dumps({**unnamed(c.model.args), **told}, sort_keys=True),
        parameters=digest_shapes(shapes_of(model)),
        config_hash=run.identity_hash(),
        stage=c.zero.stage,
        world_size=run.plan.world_size,
        classes=digest_json(list(classes)),
        versions={name: importlib.metadata.version(name) for name in VERSIONS_OF},
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every parameter, sharded or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


# Which entries of the stream's cursor each of `checkpoint.allow_changes` lets differ.
_CURSOR_CHANGES = {"global_batch": "global_batch", "fingerprint": "data", "num_samples": "data"}


class RunStore:
    """The engine's CheckpointStore: a CheckpointManager that knows whose checkpoints it keeps.

    trainer.json also holds the config, the class names and what the model was told about its inputs, so that a
    checkpoint serves evaluation alone.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        run: ResolvedRun,
        identity: Identity,
        classes: tuple[str, ...],
        told: dict[str, Any],
        cursor_at: Callable[[int], dict[str, Any]],
        total_steps: int,
        is_main: bool,
        check_place: Callable[[dict[str, Any]], object],
        holds: Callable[[Checkpoint], object],
        teacher: str | None = None,
    ) -> None:
        self._teacher = teacher
        self._check_place = check_place
        self._holds = holds
        self._manager = manager
        self._cursor_at = cursor_at
        self._total_steps = total_steps
        self._is_main = is_main
        self._run = run
        self._identity = identity
        self._about = {"config": run.as_json(), "classes": list(classes), "inputs": told}
        if teacher is not None:
            self._about[TEACHER] = teacher

    def due(self, step: int) -> bool:
        """Return whether the config wants a checkpoint after this many steps."""
        return self._run.config.checkpoint.due(step)

    def save(self, snapshot: Snapshot, replace: bool = False) -> Path:
        """Begin a checkpoint; when this returns the fragments may change."""
        return self._manager.begin(self._described(snapshot), self._identity, replace)

    def save_renumbered(self, snapshot: Snapshot) -> Path:
        """Write the checkpoint from which on steps are counted in another way; durable when this returns."""
        return self._manager.save_renumbered(self._described(snapshot), self._identity)

    def _described(self, snapshot: Snapshot) -> Snapshot:
        return dataclasses.replace(snapshot, trainer={**snapshot.trainer, **self._about})

    def committed(self) -> Sequence[tuple[int, Path]]:
        """Return the steps and folders that became durable since the last call, on rank 0."""
        return self._manager.committed()

    def failed(self) -> bool:
        """Return whether a save has failed on this rank since the last `finish`."""
        return self._manager.failed()

    def finish(self, last: bool = False) -> None:
        """Wait until what was begun is durable; raise on all ranks if it failed on any."""
        self._manager.finish(last)

    def close(self) -> None:
        """Wait for this rank's own writing after an error."""
        self._manager.close()

    def newest(self) -> SavedState | None:
        """Return the newest checkpoint that verifies.

        Raises:
            CheckpointError: it is of another model, or was not written by a run.
        """
        return self._checked(self._manager.newest(self._accept))

    def newest_before(self, step: int, reason: str) -> SavedState | None:
        """Return the newest checkpoint below a step that verifies; put the others aside for good if there is one.

        Raises:
            CheckpointError: as `newest`.
        """
        return self._checked(self._manager.newest_before(step, reason, self._accept))

    def _accept(self, found: Checkpoint) -> None:
        """Check all that a continuation takes from a checkpoint, before one is chosen for all ranks.

        Raises:
            SetformerError: this run cannot go on from it.
        """
        imported = is_imported(found)
        self._checked(found, says=False)
        self._check_place(found.trainer["stream"])
        if not imported:
            self._holds(found)

    def _checked(self, found: Checkpoint | None, says: bool = True) -> Checkpoint | None:
        if found is None:
            return None
        if is_imported(found):
            says = says and self._is_main
            optimizer = self._run.config.optim.name
            state = trainer_state(found, self._identity, self._cursor_at, self._total_steps, says, optimizer)
            found.trainer.update(state)
            check_trainer(found.trainer, found.path)
            return found
        check_trainer(found.trainer, found.path)
        found.identity.check_same_model(self._identity)
        check_same_teacher(found.trainer, self._teacher, found.path)
        allowed = self._run.config.checkpoint.allow_changes
        found.trainer["stream"] = continued_cursor(found.trainer["stream"], self._cursor_at(0), allowed)
        return found

    def load(self, saved: SavedState, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments."""
        assert isinstance(saved, Checkpoint)  # what `newest` returned
        found = loadable(saved, fragments, self._run.config.optim.name) if is_imported(saved) else fragments
        self._manager.load(saved, found)


def continued_cursor(saved: dict[str, Any], here: dict[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    """Return a saved cursor of the stream with what may differ as it is in this run.

    Args:
        saved: the checkpoint's cursor.
        here: any cursor of this run's stream.
        allowed: `checkpoint.allow_changes`.

    Raises:
        CheckpointError: something differs that may not, or that would have samples lost or repeated.
    """
    for name, change in _CURSOR_CHANGES.items():
        ours, theirs = here.get(name), saved.get(name)
        if ours == theirs:
            continue
        if change not in allowed:
            raise CheckpointError(
                f"the checkpoint was written with {name} = {theirs!r}, this run has {ours!r}: set it back, or see "
                f"what checkpoint.allow_changes = [{change!r}] does to the order of samples"
            )
        if name == "global_batch":
            _check_new_batch(saved, here)
        saved = {**saved, name: ours}
    return saved


def _check_new_batch(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse another global batch where samples would be lost or repeated by it.

    Raises:
        CheckpointError: with the reason.
    """
    global_batch, theirs, consumed = here["global_batch"], saved.get("global_batch"), saved.get("samples_consumed")
    if not counts_samples(str(saved.get("order"))):
        raise CheckpointError(
            f"the checkpoint was written with global_batch = {theirs!r}, this run has {global_batch}, and with "
            "data.mixture, data.aspect_buckets or epoch_end = 'wrap' samples would be lost or repeated: set it back"
        )
    whole_steps = range(0, here["num_samples"] // global_batch * global_batch, global_batch)
    if consumed not in whole_steps:
        raise CheckpointError(
            f"the checkpoint was written after {consumed} samples of its epoch, where no step of global_batch = "
            f"{global_batch} begins: set it back to {theirs!r}"
        )


def compose(
    run: ResolvedRun,
    splits: Splits,
    task: Task,
    model: nn.Module,
    comm: TorchCollectives,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Build a run on this rank around a model fresh from its seed. Collective.

    `callbacks` hear the events of the run after those that its config names.
    """
    c = run.config
    named = build_callbacks(c.logging, c.run.callbacks, c.run.callback_args)
    heard = Callbacks([*named, *callbacks], c.folder, run.as_json(), comm.ranks.is_main)
    ranks, plan, classes = comm.ranks, run.plan, splits.train.classes
    watch = watch_of(run, model)
    check_metric(task, c.checkpoint.best_metric, c.checkpoint.best_mode)
    device = torch.device(get_accelerator().current_device_name())
    inputs = inputs_of(c.data)

    stream = inputs.train_stream(splits.train, c.run.seed, ranks, plan)
    validation = inputs.eval_stream(splits.val, ranks, plan.micro)
    schedule_steps = c.schedule.total_steps(stream.steps_per_epoch)

    costs = Costs(
        tokens=inputs.tokens(model, splits.train),
        multiply_adds=multiply_adds_of(model, inputs.shape(splits.train), inputs.dtype or torch.float32),
        peak_flops=peak_flops(device_label()),
    )
    told = inputs.told(splits.train)
    identity = identity_of(run, model, classes, told)
    first_weights: FirstWeights | None = None
    if c.model.weights is not None:
        buffers = frozenset(name for name, _ in model.named_buffers())
        arguments = inputs.model_arguments(c.model, len(task.outputs))
        first_weights = FirstWeights(c.model, shapes_of(model), buffers, comm, arguments)
    prepare = inputs.prepare(len(classes), device, DTYPES[c.precision.dtype])
    taught_by: str | None = None
    if (teacher := teacher_of(run, task, told)) is not None:
        taught_by = digest_of(teacher)
        check_one_teacher(taught_by, comm)
        task, prepare = distilled(run, task, prepare, teacher, device)
    engine = initialize(model, c.optim, run.deepspeed_json())
    master = MasterState(engine)
    meter = CommMeter()
    meter.install()

    manager = CheckpointManager(c.folder / "checkpoints", comm, c.checkpoint)
    states = ("param", *master.states, *(["ema"] if c.ema.decay else []))
    components = Components(
        engine=engine,
        master=master,
        ema=Ema(master, c.ema) if c.ema.decay else None,
        plan=plan,
        stream=stream,
        validation=validation,
        task=task,
        prepare=prepare,
        schedule=Schedule(engine.optimizer, c.schedule, stream.steps_per_epoch),
        store=RunStore(
            manager,
            run,
            identity,
            classes,
            told,
            stream.state,
            schedule_steps,
            ranks.is_main,
            check_place=stream.check_state,
            holds=functools.partial(Checkpoint.check_holds, shapes=master.shapes, states=states),
            teacher=taught_by,
        ),
        comm=comm,
        meter=meter,
        record=RunRecord(c.folder, ranks.is_main),
        costs=costs,
        guard=Guard(c.guard, c.folder, comm, scaled=c.precision.dtype == "fp16"),
        heartbeat=Heartbeat.from_env(),
        callbacks=heard,
        watch=watch,
        first_weights=first_weights,
    )
    best = Best(c.checkpoint.best_metric, c.checkpoint.best_mode)
    return Trainer(components, c.eval, best, schedule_steps, c.run.log_every, c.run.seed, c.run.record_samples)


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
            "its plans have marginals: leave the key out, or take a model with attention.kind = 'set'"
        )
    return functools.partial(watched_marginals, model)


def device_label() -> str:
    """Return the device's name: the GPU's model, or "cpu"."""
    if get_accelerator().device_name() == "cuda":
        return str(torch.cuda.get_device_name())
    return str(get_accelerator().device_name())
