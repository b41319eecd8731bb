"""The tables of a run config that the engine reads; nothing here imports torch, so a typo is reported at once."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import pydantic

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.continuing import FREE, Permitted
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import Weights
from setformer_dist.core.model_config import SetKind

# The solutions are divisors, and to find those of any number that TOML can write would take longer than training.
LARGEST_GLOBAL_BATCH = 2**31 - 1

# A loss spike is judged only after this many losses: training may start unsteadily.
SPIKE_NEEDS = 20


class BatchConfig(FrozenConfig):
    """How many samples make an optimizer step, and how many of them a rank computes at once.

    Attributes:
        global_size: samples per optimizer step over all ranks; a resumed run must keep it.
        micro: samples per rank and accumulation step; "auto" takes the largest possible size up to max_micro.
        max_micro: largest micro batch that "auto" may choose; memory limits it.
        micro_pixels: largest number of pixels in a rank's micro batch (height x width x samples; with
            parallel.sequence, only the rank's own rows count). If data.resolutions or data.aspect_buckets make images
            larger, micro batches have fewer samples, and a step accumulates more of them. If not set, all micro batches
            have the same number of samples.
    """

    global_size: Annotated[int, Permitted("global_batch")] = pydantic.Field(gt=0, le=LARGEST_GLOBAL_BATCH)
    micro: Annotated[int | Literal["auto"], FREE] = "auto"
    max_micro: Annotated[int, FREE] = pydantic.Field(default=128, gt=0)
    micro_pixels: Annotated[int | None, FREE] = pydantic.Field(default=None, gt=0)

    @pydantic.field_validator("micro")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value <= 0:
            raise ValueError('must be a positive number of samples, or "auto"')
        return value


# Which schedule a key is of, where it is not of all.
_SCHEDULE_KEYS = {
    "power": "polynomial",
    "drop_epochs": "step",
    "drop_steps": "step",
    "drop_factor": "step",
    "decay_epochs": "wsd",
    "decay_steps": "wsd",
}


class ScheduleConfig(FrozenConfig):
    """The learning rate: linear warm-up, then what `name` says. Give epochs or steps, not both.

    Attributes:
        name: curve after the warm-up: "cosine" (Loshchilov & Hutter 2017), "linear", "polynomial", "step" (drops at
            regular intervals), "constant", or "wsd" (constant, then a linear decay at the end; Hu et al. 2024).
        epochs: length of the run in epochs.
        steps: length of the run in optimizer steps.
        warmup_epochs: length of the warm-up in epochs of the run.
        warmup_steps: length of the warm-up in optimizer steps.
        warmup_lr: learning rate at step 0.
        min_lr: learning rate at the end; not used by "step" and "constant".
        power: exponent of "polynomial": the rate falls as (1 - t)^power from its peak to min_lr.
        drop_epochs: epochs between two drops of "step", counted from the end of the warm-up.
        drop_steps: the same in optimizer steps.
        drop_factor: factor of the learning rate at each drop of "step".
        decay_epochs: length of the final decay of "wsd" in epochs.
        decay_steps: the same in optimizer steps.
    """

    name: Literal["cosine", "linear", "polynomial", "step", "constant", "wsd"] = "cosine"
    epochs: int | None = pydantic.Field(default=None, gt=0)
    steps: int | None = pydantic.Field(default=None, gt=0)
    warmup_epochs: float | None = pydantic.Field(default=None, ge=0, le=1e9)
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    warmup_lr: float = pydantic.Field(default=1e-6, ge=0)
    min_lr: float = pydantic.Field(default=5e-6, ge=0)
    power: float = pydantic.Field(default=2.0, gt=0)
    drop_epochs: float | None = pydantic.Field(default=None, gt=0, le=1e9)
    drop_steps: int | None = pydantic.Field(default=None, gt=0)
    drop_factor: float = pydantic.Field(default=0.1, gt=0, le=1)
    decay_epochs: float | None = pydantic.Field(default=None, gt=0, le=1e9)
    decay_steps: int | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> ScheduleConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("schedule: give epochs or steps, the length of the run")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                "schedule: give either epochs or steps, not both (on the command line, ~schedule.epochs or "
                "~schedule.steps removes one)"
            )
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError(
                "schedule: give warmup_epochs or warmup_steps, not both (on the command line, ~schedule.warmup_epochs "
                "or ~schedule.warmup_steps removes one)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _of_this_schedule(self) -> ScheduleConfig:
        for key, name in _SCHEDULE_KEYS.items():
            default = type(self).model_fields[key].default
            if self.name != name and getattr(self, key) != default:
                raise ValueError(
                    f'schedule.{key} belongs to schedule.name = "{name}", but the name is "{self.name}": remove the key'
                )
        for name, part in {"step": "drop", "wsd": "decay"}.items():
            given = [getattr(self, f"{part}_{unit}") is not None for unit in ("epochs", "steps")]
            if self.name == name and sum(given) != 1:
                raise ValueError(f'schedule: name = "{name}" needs {part}_epochs or {part}_steps, one of them')
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in optimizer steps."""
        return self.steps if self.steps is not None else int(self.epochs or 0) * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Return the length of the warm-up in optimizer steps.

        Raises:
            ConfigError: the warm-up is as long as the run.
        """
        if self.warmup_steps is not None:
            steps, unit = self.warmup_steps, "steps"
        else:
            steps, unit = round((self.warmup_epochs or 0) * steps_per_epoch), "epochs"
        total = self.total_steps(steps_per_epoch)
        if steps >= total:
            raise ConfigError(
                f"schedule: a warm-up of {steps} steps does not fit into a run of {total} steps: lower "
                f"schedule.warmup_{unit}, or make the run longer (schedule.epochs or schedule.steps)"
            )
        return steps

    def drop_every(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps between two drops of "step", at least 1."""
        return self.drop_steps or max(1, round((self.drop_epochs or 0) * steps_per_epoch))

    def decay(self, steps_per_epoch: int) -> int:
        """Return the length of the decay that ends "wsd", in optimizer steps, at least 1.

        Raises:
            ConfigError: warm-up and decay together are longer than the run.
        """
        steps = self.decay_steps or max(1, round((self.decay_epochs or 0) * steps_per_epoch))
        total, warmup = self.total_steps(steps_per_epoch), self.warmup(steps_per_epoch)
        if warmup + steps > total:
            raise ConfigError(
                f"schedule: a warm-up of {warmup} steps and a decay of {steps} steps do not fit into a run of {total} "
                "steps: shorten one of them"
            )
        return steps


_WHOLE = "needs whole parameters; ZeRO splits them into flat parts, so its steps would depend on the world size"
# Optimizers that people ask for and that cannot be had here, and why.
_REFUSED_OPTIMIZERS = {
    "lars": f"scales the gradient of each parameter by a norm of it, so it {_WHOLE}",
    "muon": f"orthogonalises whole matrices, so it {_WHOLE}",
    "shampoo": f"multiplies with roots of whole matrices, so it {_WHOLE}",
    "soap": f"rotates whole matrices, so it {_WHOLE}",
    "adafactor": f"keeps sums of rows and columns, so it {_WHOLE}",
    "adagrad": "is recreated by DeepSpeed without parameter groups, so weight decay and layer decay would be lost",
    "adan": "counts its steps per group, and DeepSpeed steps a group several times at stage 3",
    "laprop": "keeps sums of learning rates in addition to its states, and checkpoints do not contain them",
}
# Defaults of optimizers that differ from AdamW's, as their authors have them.
_OPTIMIZER_DEFAULTS: dict[str, dict[str, object]] = {
    "lion": {"betas": (0.9, 0.99)},
    "adopt": {"betas": (0.9, 0.9999), "eps": 1e-6},
    "lamb": {"eps": 1e-6},
}
_SGD_KEYS = ("momentum", "nesterov")


class OptimConfig(FrozenConfig):
    """The optimizer.

    Attributes:
        name: "adamw" (Loshchilov & Hutter 2019), "adam", "nadamw", "adopt" (Taniguchi et al. 2024), "lamb" (You et al.
            2020, for large batches), "lion" (Chen et al. 2023) or "sgd".
        lr: peak learning rate at the configured global batch; it is not scaled with the batch.
        weight_decay: weight decay; not applied to norms, biases, references and other parameters that the model
            excludes. Decoupled from the gradient, except for "adam" and "sgd", which add it to the gradient as in
            PyTorch. "lamb" adds it to the update before it scales it.
        betas: decay rates of the averages of gradients and of their squares. Defaults: (0.9, 0.99) for "lion", (0.9,
            0.9999) for "adopt". Not used by "sgd".
        eps: constant in the denominator of an update; the default for "adopt" and "lamb" is 1e-6. Not used by "lion"
            and "sgd".
        momentum: momentum of "sgd".
        nesterov: use Nesterov momentum with "sgd".
        clip_norm: upper bound of the global gradient norm; 0 turns clipping off.
        layer_decay: factor of the learning rate from one layer group to the next, from the head down; 1 turns it off.
    """

    name: Literal["adamw", "adam", "nadamw", "adopt", "lamb", "lion", "sgd"] = "adamw"
    lr: Annotated[float, Permitted("schedule")] = pydantic.Field(default=1e-3, gt=0)
    weight_decay: float = pydantic.Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = pydantic.Field(default=1e-8, gt=0)
    momentum: float = pydantic.Field(default=0.9, gt=0, lt=1)
    nesterov: bool = False
    clip_norm: float = pydantic.Field(default=5.0, ge=0)
    layer_decay: float = pydantic.Field(default=1.0, gt=0, le=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _as_its_authors(cls, table: object) -> object:
        """Fill in the defaults of the optimizer that is named; refuse by name what cannot be had."""
        if not isinstance(table, dict) or not isinstance(name := table.get("name", "adamw"), str):
            return table
        if (reason := _REFUSED_OPTIMIZERS.get(name.lower())) is not None:
            raise ValueError(f'name = "{name}" is refused, because it {reason}: use "adamw", "lion" or "sgd"')
        return {**_OPTIMIZER_DEFAULTS.get(name, {}), **table}

    @pydantic.field_validator("betas", mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @pydantic.field_validator("betas")
    @classmethod
    def _in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must lie in [0, 1)")
        return value

    @pydantic.model_validator(mode="after")
    def _of_this_optimizer(self) -> OptimConfig:
        for key in _SGD_KEYS:
            if self.name != "sgd" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f'optim.{key} belongs to optim.name = "sgd", but the name is "{self.name}": remove the key'
                )
        return self


class DistillConfig(FrozenConfig):
    """Learning from a trained model as well (Hinton et al. 2015): loss = (1 - share) · own + share · teacher's.

    Attributes:
        teacher: run folder, checkpoint or exported model of the teacher, also one of timm's; "" is none. It may move,
            but a resumed run must use the same weights.
        weights: which weights of the teacher: "plain", "ema", or "auto" for those that scored better.
        share: weight of the teacher's term in the loss, above 0 and up to 1.
        temperature: divisor of both models' logits in the teacher's term. The term is multiplied by its square, so that
            gradients keep their size.
    """

    teacher: Annotated[str, FREE] = ""
    weights: Weights = "auto"
    share: float = pydantic.Field(default=0.5, gt=0, le=1)
    temperature: float = pydantic.Field(default=2.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _of_a_teacher(self) -> DistillConfig:
        if not self.teacher and any(
            getattr(self, name) != field.default for name, field in type(self).model_fields.items()
        ):
            raise ValueError("distill.teacher is missing: name the run folder or the checkpoint to learn from")
        return self


class PrecisionConfig(FrozenConfig):
    """Compute dtype of weights and activations; masters and optimizer states are fp32 always.

    Attributes:
        dtype: "fp32", "bf16" or "fp16" (with loss scaling; needs a device that supports it).
        grad_accum: dtype in which gradients are accumulated and communicated; "auto" is the compute dtype.
        loss_scale: fixed loss scale for fp16; 0 scales dynamically.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_accum: Literal["auto", "fp32"] = "auto"
    loss_scale: float = pydantic.Field(default=0.0, ge=0)


class CompileConfig(FrozenConfig):
    """The `[compile]` table: torch.compile of the model (docs/compile.md).

    Attributes:
        mode: what is compiled: "off" is nothing; "blocks" is each block, where equal blocks of a stage share what was
            compiled; "model" is the whole forward pass, which takes longer to compile and does not go with zero.stage =
            3. Losses agree with those of "off" to rounding, so a run that changes it is another one in its last bits.
        cudagraphs: replay launches from CUDA graphs; for NVIDIA GPUs, and not with zero.stage = 3 or
            model.recompute = "offload".
        cache: folder that keeps what was compiled, for the next start; by default one in the user's cache. It holds
            code that is run, so it must belong to the user and be closed to others.
        fallback: what happens when something cannot be compiled, or takes too long: with true the run goes on without
            the compiler and says so, with false it ends.
        limit_s: seconds that a rank may compile in all. Must be below restart.start_after_s.
    """

    mode: Literal["off", "blocks", "model"] = "off"
    cudagraphs: bool = False
    cache: str | None = None
    fallback: bool = False
    limit_s: float = pydantic.Field(default=1200.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _of_a_mode(self) -> CompileConfig:
        if self.mode == "off" and self.cudagraphs:
            raise ValueError('compile.cudagraphs needs something compiled: set compile.mode = "blocks" or "model"')
        return self


class ZeroConfig(FrozenConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020).

    Attributes:
        stage: 0 replicates; 1 shards optimizer states, 2 also gradients, 3 also parameters.
        overlap_comm: overlap the reduction of gradients with the backward pass. Stages 0 to 2 then reduce gradients in
            buckets of 25 MiB at most, each when it is complete. "auto" does so where this package reduces gradients
            itself: under stages 0 to 2, unless they are offloaded, a [deepspeed] table is given, or stage 1 keeps
            gradients in fp32 besides weights of low precision. Under stage 0 DeepSpeed itself overlaps nothing.
        bucket_mib: size of the reduction and gather buckets, as fp32; in low precision they are half as large.
        offload: what is kept and updated in host memory (ZeRO-Offload, Ren et al. 2021): "none"; "optimizer", that is
            master weights, optimizer states, EMA and their gradients (stages 1, 2, 3); or "all", also the weights,
            which are copied to the device when needed (stage 3). May change when a run resumes.
    """

    stage: Literal[0, 1, 2, 3] = 2
    overlap_comm: bool | Literal["auto"] = "auto"
    bucket_mib: int = pydantic.Field(default=256, gt=0)
    offload: Literal["none", "optimizer", "all"] = "none"

    @pydantic.model_validator(mode="after")
    def _offload_possible(self) -> ZeroConfig:
        if self.offload != "none" and self.stage == 0:
            raise ValueError(
                f"offload = {self.offload!r} needs stage = 1, 2 or 3, got stage = 0, where nothing is sharded: raise "
                'zero.stage, or set zero.offload = "none"'
            )
        if self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload = 'all' needs stage = 3, got stage = {self.stage}, where every rank computes with whole "
                'weights: set zero.stage = 3, or zero.offload = "optimizer"'
            )
        return self


class ParallelConfig(FrozenConfig):
    """The `[parallel]` table: how ranks share what one rank cannot hold (docs/sequence_parallel.md).

    Attributes:
        sequence: number of neighbouring ranks that share each image by rows; with 1, every rank has whole images. The
            global batch is micro × accumulation × ranks / sequence. Needs a SeTformer with attention = "set". May
            change when a run resumes.
    """

    sequence: int = pydantic.Field(default=1, ge=1)


class EmaConfig(FrozenConfig):
    """Average of the weights.

    Attributes:
        decay: decay rate of the averaged weights (EMA) per optimizer step; 0 turns the EMA off.
        warmup: let the decay rate grow as (1 + step) / (10 + step) up to `decay`, as in TensorFlow and timm.
    """

    decay: float = pydantic.Field(default=0.0, ge=0, lt=1)
    warmup: bool = True

    def decay_at(self, step: int) -> float:
        """Return the decay used after optimizer step `step` (0-based)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class ProbeConfig(FrozenConfig):
    """Scores of the features during training, as `setformer probe` has them: a linear classifier and the neighbours.

    Attributes:
        every_epochs: epochs between two probes; 0 turns them off. The end of the run then probes too. With averaged
            weights, these are probed.
        data: labelled data, with the names of splits that data.train and data.val have; by default data.root.
        labels: share of the training labels to use, per class; only their images are computed. A fixed choice.
        neighbours: number of nearest neighbours that vote.
    """

    every_epochs: int = pydantic.Field(default=0, ge=0)
    data: str | None = None
    labels: float = pydantic.Field(default=1.0, gt=0, le=1)
    neighbours: int = pydantic.Field(default=20, ge=1)


class EvalConfig(FrozenConfig):
    """Periodic evaluation.

    Attributes:
        every_epochs: epochs between two evaluations; 0 turns it off. The end of the run always evaluates.
        every_steps: optimizer steps between two further evaluations; 0 turns them off.
        patience: evaluations in a row without a new best value of `checkpoint.best_metric`, after which the run ends
            early; 0 never ends it. The same command continues the run with a larger value.
        marginal_error: also report the marginal error of the transport plans of SeT attention: the largest and the mean
            over blocks, heads and images of each rank's first micro batch. Needs a model with SeT attention.
        probe: scores of the features with the labels of data.
    """

    every_epochs: int = pydantic.Field(default=1, ge=0)
    every_steps: int = pydantic.Field(default=0, ge=0)
    patience: int = pydantic.Field(default=0, ge=0)
    marginal_error: bool = False
    probe: ProbeConfig = ProbeConfig()


class GuardConfig(FrozenConfig):
    """The `[guard]` table.

    Attributes:
        nonfinite: what happens when a loss or gradient is NaN or infinite: "stop", "skip" or "rollback". The update
            is left out in any case. In fp16 the loss scale falls and the run continues, regardless of this setting.
        spike: a loss above this multiple of the median of the last `window` losses is a spike and is rolled back; 0
            turns this off.
        window: number of losses in the median. Also: if an incident follows a rollback within this many steps, the
            next rollback goes to a checkpoint before that of the first.
        limit: largest number of bad steps tolerated in one run; one more ends it.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spike: float = pydantic.Field(default=0.0, ge=0.0)
    window: int = pydantic.Field(default=100, ge=SPIKE_NEEDS)
    limit: int = pydantic.Field(default=5, ge=1)

    @pydantic.field_validator("spike")
    @classmethod
    def _beyond_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be 0 (off) or above 1: it multiplies the median of the last losses")
        return value


class RefreshConfig(FrozenConfig):
    """The `[refresh]` table: SeT's sets set by K-means over sampled tokens, at fixed steps. Off unless told when.

    Attributes:
        every: optimizer steps between two refreshes; 0 turns them off. There is none at the last step.
        at_steps: further optimizer steps after which there is a refresh, such as one after a short warm-up.
        sample_steps: number of optimizer steps before a refresh in which tokens are sampled.
        samples: number of sampled tokens per block; all heads of a block use the same tokens.
        sets: sets that a refresh computes: "references" (gather), "return_references" (scatter), and "anchors" (of the
            Nyström kernel). Sets that the model does not have are ignored.
        start: initial centres of K-means: "references" are the present sets, "kmeans++" draws them from the tokens.
        iterations: maximum number of rounds of K-means.
        optimizer: what happens to the optimizer states of a moved reference. "momentum" sets the average of gradients
            to zero, because it points from the old position, and keeps the average of squares, which scales the steps.
            "all" sets both to zero. "keep" keeps both.
        ema: what happens to the averaged weights of a moved reference: "follow" sets them to the new value, "keep" lets
            them approach it.
        learn: whether the optimizer also trains the sets; with false, only K-means moves them.
        delay: optimizer steps from the last sampled step to the step after which the new sets are applied, as time for
            K-means; 0 applies them at once.
        by: who computes the new sets: "job", the ranks, at the step of application; or "ray", a service on a Ray
            cluster, during the steps of `delay`.
        address: address of the Ray cluster: HOST:PORT, or "auto" for the cluster on which the run trains or that runs
            on rank 0's host.
        wait_s: seconds that the ranks wait for a late service at the step of application.
        late: what the ranks do if the service has not answered by then: "compute" computes the sets on the CPUs of the
            ranks, with the same result; "keep" keeps the present sets.
    """

    every: int = pydantic.Field(default=0, ge=0)
    at_steps: tuple[int, ...] = pydantic.Field(default=(), strict=False)
    sample_steps: int = pydantic.Field(default=4, gt=0)
    samples: int = pydantic.Field(default=2048, gt=0, le=2**20)
    sets: tuple[SetKind, ...] = pydantic.Field(
        default=("references", "return_references", "anchors"), strict=False, min_length=1
    )
    start: Literal["references", "kmeans++"] = "references"
    iterations: int = pydantic.Field(default=10, gt=0)
    optimizer: Literal["momentum", "all", "keep"] = "momentum"
    ema: Literal["follow", "keep"] = "follow"
    learn: bool = True
    delay: int = pydantic.Field(default=0, ge=0)
    by: Annotated[Literal["job", "ray"], FREE] = "job"
    address: Annotated[str, FREE] = "auto"
    wait_s: Annotated[float, FREE] = pydantic.Field(default=10.0, ge=0, le=3600)
    late: Annotated[Literal["compute", "keep"], FREE] = "compute"

    @pydantic.field_validator("at_steps")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(step < 1 for step in value) or list(value) != sorted(set(value)):
            raise ValueError("must be rising numbers of optimizer steps, from 1 on: [500, 2000]")
        return value

    @pydantic.field_validator("sets")
    @classmethod
    def _each_once(cls, value: tuple[SetKind, ...]) -> tuple[SetKind, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a set twice: name each once")
        return value

    @pydantic.model_validator(mode="after")
    def _one_at_a_time(self) -> RefreshConfig:
        distance = min((last - first for first, last in itertools.pairwise(self.at_steps)), default=self.every)
        if self.every:
            beside = (min(step % self.every, -step % self.every) for step in self.at_steps if step % self.every)
            distance = min(self.every, distance, *beside)
        if self.delay and 0 < distance <= self.delay:
            raise ValueError(
                f"delay = {self.delay} is not shorter than the {distance} steps between two refreshes: a refresh is "
                "applied before the sample of the next one is complete"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether there is any refresh."""
        return bool(self.every or self.at_steps)

    def due(self, step: int, total_steps: int) -> bool:
        """Return whether a sample is complete after so many optimizer steps; it is applied before the run's last."""
        in_time = 0 < step < total_steps - self.delay
        return in_time and (step in self.at_steps or (self.every > 0 and step % self.every == 0))

    def samples_at(self, step: int, total_steps: int) -> bool:
        """Return whether tokens of an optimizer step (0-based) are sampled."""
        return any(self.due(after, total_steps) for after in range(step + 1, step + 1 + self.sample_steps))
