"""The config of a run: one TOML file, and what follows from it once the ranks and the data are known.

run.toml  + overrides -> RunConfig (frozen; what the user said)
RunConfig + ranks     -> DeepSpeed's JSON, batch plan
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from checkpoints.config import CheckpointConfig
from dataloaders.config import AnyDataConfig, DataConfig
from launch.hosts.config import LaunchConfig
from launch.ranks.restarts import RestartConfig
from setformer_dist.core import config as base
from setformer_dist.core import revisions
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.continuing import FREE, Difference, Permitted, differences, must_stay, unknown_keys
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import read_state
from setformer_dist.core.logging_config import LoggingConfig
from setformer_dist.core.metric import AVERAGED, METRICS_OF, PROBE_METRICS, Metric, check_best, metric_named
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.secrets import redacted_json
from setformer_dist.core.task_config import TaskConfig
from setformer_dist.engine.batch_plan import BatchPlan, solve
from setformer_dist.engine.config import (
    BatchConfig,
    CompileConfig,
    DistillConfig,
    EmaConfig,
    EvalConfig,
    GuardConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RefreshConfig,
    ScheduleConfig,
    ZeroConfig,
)
from setformer_dist.engine.zero import deepspeed_config, overlaps, reduced_here

_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"

_WHOLE = {"segmentation", "detection"}  # tasks that are evaluated on whole images
_CENTRED = set(METRICS_OF) - _WHOLE

_LONGEST_NAME = 255  # bytes of a folder's name, on every file system that we know


class RunTable(FrozenConfig):
    """Who the run is.

    Attributes:
        name: name of the run folder below `out`.
        out: folder that holds all runs.
        seed: seed of weights, sample order, augmentation and all other random draws.
        log_every: optimizer steps between two lines of metrics.jsonl.
        threads: compute threads per rank; 0 divides this machine's cores among its ranks. On CPUs, the number of
            threads changes the order of additions, so losses with different numbers agree to rounding only.
        timeout_minutes: how long a rank waits for the others before it gives up.
        imports: your own modules, which every rank imports first. Python looks for them among the installed packages
            and in the working directory. They register models with timm, tasks, callbacks or augmentations. Commands
            that read a checkpoint need --import as well.
        callbacks: names of registered callbacks, in the order in which they are called.
        callback_args: arguments of a callback, in the table run.callback_args.NAME.
        record_samples: write the sample ids of every optimizer step to samples.jsonl, to check the sample order.
    """

    name: Annotated[str, FREE]
    out: Annotated[str, FREE] = "runs"
    seed: int = pydantic.Field(default=0, ge=0)
    log_every: Annotated[int, FREE] = pydantic.Field(default=10, gt=0)
    threads: Annotated[int, FREE] = pydantic.Field(default=0, ge=0)
    timeout_minutes: Annotated[float, FREE] = pydantic.Field(default=10.0, gt=0)
    record_samples: Annotated[bool, FREE] = False
    imports: Annotated[tuple[str, ...], FREE, pydantic.Field(strict=False)] = ()
    callbacks: Annotated[tuple[str, ...], FREE, pydantic.Field(strict=False)] = ()
    callback_args: Annotated[dict[str, dict[str, Any]], FREE] = pydantic.Field(default_factory=dict)

    @pydantic.field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}", value):
            raise ValueError(
                f"must be a folder name of at most {_LONGEST_NAME} letters, digits, dots, dashes and underscores"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _of_callbacks(self) -> RunTable:
        for name in self.callback_args:
            if name not in self.callbacks:
                raise ValueError(f"callback_args.{name}: run.callbacks does not name {name!r}")
        return self

    @pydantic.field_validator("out")
    @classmethod
    def _path(cls, value: str) -> str:
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(value).parts):
            raise ValueError(f"must be the path of a folder; no name in it may exceed {_LONGEST_NAME} bytes")
        return value


class RunConfig(FrozenConfig):
    """One run, as its config file says it.

    Attributes:
        deepspeed: DeepSpeed's own keys, passed through; those that this package sets itself are refused.
    """

    SYNONYMS: ClassVar[Mapping[str, str]] = {
        "pretrained": "model.weights",
        "checkpoint_path": "model.weights",
        "init_from": "model.weights",
        "learning_rate": "optim.lr",
        "base_lr": "optim.lr",
        "lr_rate": "optim.lr",
        "wd": "optim.weight_decay",
        "img_size": "data.image_size",
        "input_size": "data.image_size",
        "resolution": "data.image_size",
        "batch_size": "batch.global_size",
        "global_batch_size": "batch.global_size",
        "train_batch_size": "batch.global_size",
        "micro_batch_size": "batch.micro",
        "train_micro_batch_size_per_gpu": "batch.micro",
        "num_epochs": "schedule.epochs",
        "max_epochs": "schedule.epochs",
        "max_steps": "schedule.steps",
        "num_workers": "data.workers",
        "data_path": "data.root",
        "data_dir": "data.root",
        "output_dir": "run.out",
        "save_dir": "run.out",
        "gradient_clipping": "optim.clip_norm",
        "clip_grad": "optim.clip_norm",
        "max_grad_norm": "optim.clip_norm",
        "label_smoothing": "data.augment.smoothing",
        "drop_path_rate": "model.drop_path",
        "grad_checkpointing": "model.activation_checkpointing",
        "model_ema_decay": "ema.decay",
        "zero_stage": "zero.stage",
        "sequence_parallel_size": "parallel.sequence",
        "context_parallel_size": "parallel.sequence",
        "save_interval": "checkpoint.every_steps",
        "resume": "the same command resumes the run, by run.name",
        "ckpt_path": "the same command resumes the run, by run.name; model.weights begins a new run",
        "resume_from_checkpoint": "the same command resumes the run, by run.name",
        "num_classes": "the number of classes comes from the data",
        "nb_classes": "the number of classes comes from the data",
        "accelerator": "the device is detected; `setformer doctor` says which",
        "devices": "ranks are given by --ranks",
        "gpus": "ranks are given by --ranks",
        "nproc_per_node": "ranks are given by --ranks",
        "accumulate_grad_batches": "accumulation follows from batch.global_size, batch.micro and --ranks",
        "grad_accum_steps": "accumulation follows from batch.global_size, batch.micro and --ranks",
        "gradient_accumulation_steps": "accumulation follows from batch.global_size, batch.micro and --ranks",
        "gradient_clip_val": "optim.clip_norm",
        "amp": "precision.dtype",
        "torch_compile": "compile.mode",
        "torchcompile": "compile.mode",
        "fp16": "precision.dtype",
        "bf16": "precision.dtype",
        "opt": "optim.name",
        "optimizer": "optim.name",
        "sched": "schedule.name",
        "lr_scheduler": "schedule.name",
        "model_ema": "ema.decay",
        "drop_path": "model.drop_path",
        "drop": "dropout is an argument of the model: model.args.drop_rate",
        "drop_rate": "dropout is an argument of the model: model.args.drop_rate",
        "dropout": "dropout is an argument of the model: model.args.drop_rate",
        "crop_pct": "data.eval_crop",
        "val_split": "data.val",
        "train_split": "data.train",
        "output": "run.out",
        "experiment": "run.name",
        "log_interval": "run.log_every",
        "max_norm": "optim.clip_norm",
        "auto_augment": "RandAugment is data.augment.randaugment_ops, other policies are data.augment.policy",
        "aa": "RandAugment is data.augment.randaugment_ops, other policies are data.augment.policy",
        "trivial_augment": 'set data.augment.policy = "trivialaugment"',
        "three_augment": 'set data.augment.policy = "3augment"',
        "reprob": "data.augment.erasing",
        "smoothing": "data.augment.smoothing",
        "hflip": "data.augment.flip",
        "vflip": "data.augment.vflip",
        "bce_loss": 'set task.args.loss = "binary_cross_entropy"',
        "aug_repeats": "data.augment.repeats",
        "repeated_aug": "data.augment.repeats",
        "mixup_prob": "data.augment.mix_prob",
        "mixup_off_epoch": "data.augment.mix_off_epoch",
        "mixup_alpha": "data.augment.mixup",
        "cutmix_alpha": "data.augment.cutmix",
        "train_interpolation": "data.interpolation",
        "initial_checkpoint": "model.weights",
        "teacher_model": "distill.teacher",
        "kd_alpha": "distill.share",
        "kd_temperature": "distill.temperature",
        "amp_dtype": "precision.dtype",
        "opt_betas": "optim.betas",
        "opt_eps": "optim.eps",
        "momentum": "optim.momentum",
        "eval_metric": "checkpoint.best_metric",
        "checkpoint_hist": "checkpoint.keep_last",
        "save_total_limit": "checkpoint.keep_last",
        "save_steps": "checkpoint.every_steps",
        "eval_steps": "eval.every_steps",
        "check_val_every_n_epoch": "eval.every_epochs",
        "val_check_interval": "eval.every_steps",
        "log_every_n_steps": "run.log_every",
        "logging_steps": "run.log_every",
        "default_root_dir": "run.out",
        "num_train_epochs": "schedule.epochs",
        "per_device_train_batch_size": "batch.micro",
        "dataloader_num_workers": "data.workers",
        "dataset": "data.root",
        "dataset_path": "data.root",
        "train_dir": "data.train",
        "val_dir": "data.val",
        "strategy": "zero.stage",
        "lr_scheduler_type": "schedule.name",
        "deterministic": "every run is deterministic, by run.seed",
        "local_rank": "ranks are given by --ranks",
        "device": "the device is detected; `setformer doctor` says which",
        "lr_base": "the learning rate is not scaled with the batch: set optim.lr",
        "schedule": "schedule.name",
        "scheduler": "schedule.name",
        "lr_schedule": "schedule.name",
        "log_wandb": "logging.wandb.project",
        "wandb_project": "logging.wandb.project",
        "patience_epochs": "eval.patience",
        "patience": "eval.patience",
        "early_stopping": "eval.patience",
        "early_stopping_patience": "eval.patience",
        "freeze": "model.freeze",
        "freeze_layers": "model.freeze",
        "max_duration": "schedule.epochs",
        "save_folder": "run.out",
        "load_path": "model.weights",
        "num_nodes": "hosts are given by --hosts or --hostfile",
    }

    run: RunTable
    task: TaskConfig = TaskConfig()
    model: ModelConfig
    data: Annotated[AnyDataConfig, Permitted("data")]
    batch: BatchConfig
    schedule: Annotated[ScheduleConfig, Permitted("schedule")]
    optim: OptimConfig = OptimConfig()
    distill: DistillConfig = DistillConfig()
    precision: PrecisionConfig = PrecisionConfig()
    zero: Annotated[ZeroConfig, FREE] = ZeroConfig()
    parallel: Annotated[ParallelConfig, FREE] = ParallelConfig()
    compile: Annotated[CompileConfig, FREE] = CompileConfig()
    ema: EmaConfig = EmaConfig()
    refresh: RefreshConfig = RefreshConfig()
    eval: Annotated[EvalConfig, FREE] = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, FREE] = CheckpointConfig()
    restart: Annotated[RestartConfig, FREE] = RestartConfig()
    launch: Annotated[LaunchConfig, FREE] = LaunchConfig()
    guard: GuardConfig = GuardConfig()
    logging: Annotated[LoggingConfig, FREE] = LoggingConfig()
    deepspeed: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _metric_of_the_task(cls, table: Any) -> Any:
        """Fill in which metric is the best one, and which way, as the task has it."""
        if not isinstance(table, dict) or not isinstance(checkpoint := table.get("checkpoint", {}), dict):
            return table
        task = table.get("task", {})
        name = task.get("name", "classification") if isinstance(task, dict) else None
        metrics = METRICS_OF.get(name, ()) if isinstance(name, str) else ()
        if not metrics:
            return table
        metrics = (*metrics, *PROBE_METRICS)
        chosen = checkpoint.get("best_metric", metrics[0].name)
        metric = metric_named(metrics, chosen) if isinstance(chosen, str) else None
        mode = {"best_mode": metric.mode} if metric else {}
        return {**table, "checkpoint": {"best_metric": chosen, **mode, **checkpoint}}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _view_of_the_task(cls, table: Any) -> Any:
        """Fill in which tasks are evaluated on whole images."""
        if not (isinstance(table, dict) and isinstance(data := table.get("data"), dict)) or "kind" in data:
            return table
        task = table.get("task", {})
        if not isinstance(task, dict) or task.get("name") not in _WHOLE:
            return table
        return {**table, "data": {"eval_view": "whole", **data}}

    @pydantic.model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if isinstance(self.data, DataConfig) and self.data.eval_view == "whole" and self.task.name in _CENTRED:
            raise ValueError(
                f'data.eval_view = "whole" shows images of any shape, and task {self.task.name} is scored on images of '
                'one: set it to "centre"'
            )
        check_best(self.metrics, self.checkpoint.best_metric, self.checkpoint.best_mode, self.task.name)
        if self.ema.decay == 0 and self.checkpoint.best_metric.startswith("ema_"):
            raise ValueError(
                f"checkpoint.best_metric = {self.checkpoint.best_metric!r} needs averaged weights: set ema.decay"
            )
        self._check_patience()
        self._check_probe()
        self._check_compile()
        if (parts := self.parallel.sequence) > 1:
            if not isinstance(self.data, DataConfig):
                raise ValueError(
                    f"parallel.sequence = {parts} cuts images by rows, and [data] has token sequences: set it to 1"
                )
            if self.eval.marginal_error:
                raise ValueError(
                    f"eval.marginal_error looks at plans of whole images, and parallel.sequence = {parts} cuts them by "
                    "rows: set one of them back"
                )
        return self

    def _check_compile(self) -> None:
        how = self.compile
        if how.mode == "off":
            return
        if self.parallel.sequence > 1:
            raise ValueError(
                f'compile.mode = "{how.mode}": blocks exchange sums within their forward pass with parallel.sequence = '
                f'{self.parallel.sequence}, which no graph holds: set compile.mode = "off", or parallel.sequence = 1'
            )
        if self.zero.stage == 3 and (how.mode == "model" or how.cudagraphs):
            key = 'compile.mode = "model"' if how.mode == "model" else "compile.cudagraphs = true"
            raise ValueError(
                f"{key} does not go with zero.stage = 3, which gathers weights block by block, each time into other "
                'memory: set compile.mode = "blocks" without cudagraphs, or a lower zero.stage'
            )
        policies = (self.model.policy,) if isinstance(self.model.policy, str) else self.model.policy
        asked = self.precision, self.zero, self.deepspeed
        if how.cudagraphs and overlaps(*asked) and not reduced_here(*asked):
            raise ValueError(
                "compile.cudagraphs = true: zero.overlap_comm = true reads gradients beside the backward pass, whose "
                "graphs take their memory again without waiting, where DeepSpeed reduces them: with zero.offload, with "
                'a [deepspeed] table, and with precision.grad_accum = "fp32" under zero.stage = 1: set '
                'zero.overlap_comm = "auto"'
            )
        if how.cudagraphs and "offload" in policies:
            raise ValueError(
                'compile.cudagraphs = true: model.recompute = "offload" reads inputs of blocks beside the forward pass,'
                ' whose graphs take their memory again without waiting: set model.recompute = "block", or '
                "compile.cudagraphs = false"
            )
        if how.mode == "model" and "offload" in policies:
            raise ValueError(
                'compile.mode = "model": model.recompute = "offload" copies the inputs of blocks between graphs: set '
                'compile.mode = "blocks", or model.recompute = "block"'
            )
        if 0 < self.restart.start_after_s <= how.limit_s:
            raise ValueError(
                f"compile.limit_s = {how.limit_s:g} s must be below restart.start_after_s = "
                f"{self.restart.start_after_s:g} s, after which a rank without a step counts as hung"
            )

    def _check_patience(self) -> None:
        every = self.eval
        if every.patience and not (every.every_epochs or every.every_steps or every.probe.every_epochs):
            raise ValueError(
                "eval.patience counts evaluations, and there is none before the end of the run: set eval.every_epochs "
                "or eval.every_steps"
            )

    def _check_probe(self) -> None:
        if not self.eval.probe.every_epochs:
            return
        if not isinstance(self.data, DataConfig):
            raise ValueError("eval.probe scores features of images, and [data] has token sequences: remove eval.probe")
        if self.parallel.sequence > 1:
            raise ValueError(
                f"eval.probe takes whole images, and parallel.sequence = {self.parallel.sequence} cuts them by rows: "
                "set one of them back"
            )
        if not self.data.labels and self.eval.probe.data is None:
            raise ValueError(
                "eval.probe learns from labels, and data.labels = false says that there are none: name labelled data "
                "in eval.probe.data"
            )
        best = self.checkpoint.best_metric
        if self.ema.decay and best in [metric.name for metric in PROBE_METRICS]:
            raise ValueError(
                f"checkpoint.best_metric = {best!r}: with ema.decay the averaged weights are probed: use "
                f"{AVERAGED + best!r}"
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What evaluations of the run report; none where the task is not ours."""
        metrics = METRICS_OF.get(self.task.name, ())
        return (*metrics, *self.further_metrics) if metrics else metrics

    @property
    def further_metrics(self) -> tuple[Metric, ...]:
        """What evaluations of the run report besides the task's."""
        return PROBE_METRICS if self.eval.probe.every_epochs else ()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.out) / self.run.name


@dataclass(frozen=True)
class ResolvedRun:
    """A run on a given number of ranks."""

    config: RunConfig
    plan: BatchPlan

    def deepspeed_json(self) -> dict[str, Any]:
        """Return DeepSpeed's own config."""
        c = self.config
        return deepspeed_config(c.precision, c.zero, self.plan, c.optim.clip_norm, c.deepspeed)

    def as_json(self) -> dict[str, Any]:
        """Return the whole config with every default and no secrets of URLs, and the solved batch arithmetic."""
        return {
            **redacted_json(self.config.model_dump(mode="json")),
            "resolved": {
                "world_size": self.plan.world_size,
                "micro_batch": self.plan.micro,
                "accumulation": self.plan.accumulation,
            },
        }

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that a continuation must share."""
        return dict(redacted_json(must_stay(self.config)))

    def identity_hash(self) -> str:
        """Return the hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def shipped(path: Path) -> Path:
    """Return a run config's path: as given if it exists, else the shipped one of that name or path below configs/.

    Raises:
        ConfigError: a plain name, which neither a file nor a shipped config has.
    """
    if path.exists() and not (path.is_dir() and len(path.parts) == 1):  # photos/ may be a folder here
        return path
    below = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for place in (_CONFIGS.joinpath(*below), _CONFIGS / "runs" / f"{path}.toml"):
        if place.is_file() and place.resolve().is_relative_to(_CONFIGS):
            return place
    if len(path.parts) == 1 and not path.suffix:
        names = sorted(place.stem for place in (_CONFIGS / "runs").glob("*.toml"))
        near = difflib.get_close_matches(path.name, names, n=1)
        known = f"did you mean {near[0]}?" if near else f"give a .toml file, or one of {', '.join(names)}"
        raise ConfigError(f"config file {path} does not exist, and no shipped config is named so: {known}")
    return path


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run config and its overrides.

    Raises:
        ConfigError: naming the file, the key and the repair.
    """
    return base.load(RunConfig, path, overrides)


def continued(config: RunConfig, warn: Callable[[str], None] = lambda line: None) -> RunConfig:
    """Return the config with what an older version meant where its folder holds a run of that version.

    Args:
        config: of a run that begins or resumes.
        warn: called with a line where an older version meant something else.
    """
    try:
        there, _ = read_state(config.folder / "config.json")
        table = there["model"]
        if not isinstance(table, dict):
            return config
        theirs = revisions.choices_of(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config  # no run is there, or a damaged one, of which `check_folder` speaks
    args: dict[str, object] = config.model.args
    for revision, ours in revisions.choices_of(config.model.model_dump()).items():
        if theirs.get(revision) == revision.old and ours == revision.new:
            args = revisions.with_old(args, revision)
            warn(
                f"the run in {config.folder} {revision.was}, as versions before {revision.since} did, and continues so "
                f"(model.args.{revision.shown} = {revision.old!r}): a run of another name takes "
                f"{revision.new!r}"
            )
    return config.model_copy(update={"model": config.model.model_copy(update={"args": args})})


def resolve(config: RunConfig, world_size: int) -> ResolvedRun:
    """Solve the batch arithmetic for a number of ranks.

    Raises:
        ConfigError: there is no solution.
    """
    return ResolvedRun(config, solve(config.batch, world_size, config.data.group, config.parallel.sequence))


def check_folder(run: ResolvedRun) -> None:
    """Refuse a run folder that holds a run of another config.

    Raises:
        ConfigError: naming the keys that differ.
    """
    there = _config_there(run.config.folder)
    if there is None:
        return
    differing = _shown(differences(there, run.config, run.config.checkpoint.allow_changes))
    if differing:
        shown = ", ".join(f"{d.key} is {d.there!r} there and {d.here!r} here" for d in differing[:4])
        more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
        permits = {d.by for d in differing}
        raise ConfigError(
            f"run folder {run.config.folder} holds a run of another config ({shown}{more}): "
            f"give this run another run.name, or move the folder away{_to_go_on(run.config, permits)}"
        )


def permitted_changes(run: ResolvedRun) -> list[Difference]:
    """Return what differs from the config in the run's folder, which `checkpoint.allow_changes` permits.

    Raises:
        ConfigError: as `check_folder`.
    """
    there = _config_there(run.config.folder)
    return [] if there is None else _shown(differences(there, run.config))


def _shown(found: Iterable[Difference]) -> list[Difference]:
    """Return differences with values that may be shown; credentials are not in a folder's config, and do not count."""
    shown = [dataclasses.replace(d, there=redacted_json(d.there), here=redacted_json(d.here)) for d in found]
    return [d for d in shown if d.there != d.here]


def _config_there(folder: Path) -> dict[str, object] | None:
    """Return the config of the run in a folder; None where there is none.

    Raises:
        ConfigError: it is damaged, or of a later version.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    try:
        there, _ = read_state(path)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): move the folder away, or give this run another run.name"
        ) from None
    if not isinstance(there, dict):
        raise ConfigError(f"{path} holds no config: move the folder away, or give this run another run.name")
    there = {key: value for key, value in there.items() if key not in ("resolved", "sha256")}
    if isinstance(model := there.get("model"), dict):
        there["model"] = revisions.as_trained(model)
    if newer := unknown_keys(there, RunConfig):
        raise ConfigError(
            f"{path} has the key {newer[0]!r}, which this version of setformer_dist does not know: a later version "
            "wrote it, and only that version can continue the run"
        )
    return there


def _to_go_on(config: RunConfig, permits: set[str | None]) -> str:
    """Return how the run in the folder may be used all the same, as the end of a sentence.

    Args:
        config: of the run that would continue.
        permits: for each key that differs, the entry of checkpoint.allow_changes that would let it change.
    """
    named = [name for name in permits if name is not None]
    if len(named) == len(permits):
        entries = json.dumps(sorted({*config.checkpoint.allow_changes, *named}))
        return f"; to continue with the change, set checkpoint.allow_changes = {entries} (docs/checkpoints.md)"
    return f"; to begin a new run with its weights, also set model.weights = {json.dumps(str(config.folder))}"
