"""Weights that a new run begins with, for fine-tuning: `model.weights = "PATH"`, `model.skip = ["head."]`.

PATH is a checkpoint of ours (a run's folder, its checkpoints, one step), verified before it is read, or a .safetensors
file as `setformer ckpt export` writes it. Only parameters are taken, by their names: the optimizer, the schedule, the
samples and the average begin anew, the average with these weights. A run that goes on from a checkpoint of its own
does not look at PATH any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.reader import Checkpoint, open_checkpoint
from setformer_dist.core.comm import Collectives
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.fragments import Fragment
from setformer_dist.models import revisions
from setformer_dist.models.build import ModelConfig

_NAMED = 3  # faults that an error names before it only counts


@dataclass(frozen=True)
class _Source:
    """Where weights come from.

    Attributes:
        name: for people.
        facts: what must be the same for all ranks; JSON-able.
        shapes: of all that is in it.
        fill: fills fragments of state "param".
        scale: of SOFT's queries (models/revisions.py); None where it means nothing or is not known.
    """

    name: str
    facts: list[object]
    shapes: Mapping[str, tuple[int, ...]]
    fill: Callable[[list[Fragment]], None]
    scale: str | None = None


@dataclass(frozen=True)
class FirstWeights:
    """Fills a model that is fresh from its seed; the same on all ranks.

    Attributes:
        config: with `weights`.
        shapes: of the model's parameters.
        buffers: names of the model's buffers, which exported files hold too: constants of the architecture.
        comm: all ranks must read the same.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    comm: Collectives

    def __call__(self, fragments: Iterable[Fragment]) -> str:
        """Fill the masters and their average as far as a rank holds them; say what was filled. Collective.

        Raises:
            ConfigError: there is nothing of the kind at the path, or `model.skip` names nothing.
            CheckpointError: it is damaged, or of another model.
        """
        source = _open(Path(self.config.weights or ""))
        if any(facts != source.facts for facts in self.comm.gather_json(source.facts)):
            raise CheckpointError(
                f"ranks found different weights at model.weights = {self.config.weights}: name one step's folder that "
                "all hosts share"
            )
        self._check_scale(source)
        left = self._left(source)
        filled = [f for f in fragments if f.state in ("param", "ema") and f.name not in left]
        source.fill([dataclasses.replace(f, state="param") for f in filled])
        rest = f"; left as drawn from the seed: {', '.join(sorted(left))}" if left else ""
        return f"begins with {source.name}: {len(self.shapes) - len(left)} of {len(self.shapes)} parameters{rest}"

    def _check_scale(self, source: _Source) -> None:
        ours = revisions.scale_of(self.config.model_dump())
        if None not in (ours, source.scale) and ours != source.scale:
            raise CheckpointError(
                f"model.weights = {self.config.weights}: these were trained with soft.query_scale = {source.scale!r}, "
                f'this run has {ours!r}, which is another function: set model.args.soft.query_scale = "{source.scale}"'
            )

    def _left(self, source: _Source) -> set[str]:
        """Return the parameters that are not taken over; refuse what neither fits nor is skipped."""
        skip = self.config.skip or ()
        for prefix in skip:
            if not any(name.startswith(prefix) for name in (*self.shapes, *source.shapes)):
                raise ConfigError(f"model.skip = {list(skip)}: no parameter's name begins with {prefix!r}")
        faults = {}
        for name, shape in self.shapes.items():
            there = source.shapes.get(name)
            if there is None:
                faults[name] = f"{name} is not in it"
            elif there != shape:
                faults[name] = f"{name} is {there} there and {shape} here"
        for name in source.shapes.keys() - self.shapes.keys() - self.buffers:
            faults[name] = f"{name} is not in this model"
        faults = {name: fault for name, fault in faults.items() if not name.startswith(skip)}
        if faults:
            raise CheckpointError(_refusal(source, faults))
        left = {name for name in self.shapes if name.startswith(skip)}
        if len(left) == len(self.shapes):
            raise ConfigError(f"model.skip = {list(skip)} leaves nothing to take from model.weights: drop both")
        return left


def _refusal(source: _Source, faults: Mapping[str, str]) -> str:
    first = "; ".join(list(faults.values())[:_NAMED])
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    modules = sorted({name.rpartition(".")[0] + "." if "." in name else name for name in faults})
    repair = "set model.name and model.args to those that they were trained with"
    if len(modules) <= _NAMED:
        repair += f", or begin these anew (model.skip = {modules})".replace("'", '"')
    return f"model.weights do not fit: {source.name}, are of another model ({first}{more}): {repair}"


def _open(path: Path) -> _Source:
    if path.is_dir():
        return _of_checkpoint(open_checkpoint(path))
    if not path.exists():
        raise ConfigError(f"model.weights = {path} does not exist: name a run's folder, or a .safetensors file")
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"model.weights = {path} is neither a checkpoint's folder nor a .safetensors file, and nothing else is "
            "read (pickles can run code): convert it first"
        )
    return _of_file(path)


def _of_checkpoint(checkpoint: Checkpoint) -> _Source:
    scores = checkpoint.trainer.get("run", {}).get("evaluation", {})
    better = scores.get("ema_top1", -1.0) > scores.get("top1", 0.0)  # as `ckpt export` chooses
    averaged = better and "ema" in checkpoint.states()

    def fill(fragments: list[Fragment]) -> None:
        state = "ema" if averaged else "param"
        checkpoint.load_into([dataclasses.replace(f, state=state) for f in fragments])

    kind = "the averaged weights" if averaged else "the weights"
    facts: list[object] = [record.digest for record in checkpoint.manifest.files]
    trained = checkpoint.trainer.get("config", {}).get("model", {})
    scale = revisions.scale_of(trained)
    return _Source(f"{kind} of {checkpoint.path}", facts, checkpoint.parameters(), fill, scale)


def _of_file(path: Path) -> _Source:
    def fill(fragments: list[Fragment]) -> None:
        with safe_open(path, "pt") as file:
            for fragment in fragments:
                whole: torch.Tensor = file.get_tensor(fragment.name)
                fragment.tensor.detach().copy_(whole.reshape(-1)[fragment.start : fragment.end])

    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.weights = {path} is no whole .safetensors file: {error}") from None
    return _Source(f"the weights of {path}", [path.stat().st_size, sorted(shapes)], shapes, fill)
