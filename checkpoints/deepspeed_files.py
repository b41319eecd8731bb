"""DeepSpeed's own checkpoint directories: read those that `save_checkpoint` wrote, write one that its tools read.

Those files are pickles. They are read with torch's restricted unpickler, which makes tensors and plain values and
calls nothing else; the few classes of DeepSpeed's that its files name are replaced by one that does nothing. Only a
file that names others (a client_state with objects in it) needs `trust_pickle`, which lets the file run any code. This
is the one place of the project that opens a pickle, and only a command that asks for an import comes here.

    <tag>/mp_rank_00_model_states.pt                         stages 0 to 2: weights, shapes, counters
    <tag>/zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3, one per rank
    <tag>/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   stages 1 to 3: rank R's fp32 masters and Adam states
    latest                                                   the newest tag
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from setformer_dist.core.errors import CheckpointError

_LONGEST_TAG = 256
_OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")
# Classes that DeepSpeed's files name and of which nothing is needed.
_INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)


@dataclass(frozen=True)
class Imported:
    """What a DeepSpeed directory holds.

    Attributes:
        stage: ZeRO stage that wrote it.
        world_size: data-parallel ranks that wrote it.
        steps: optimizer steps done.
        updates: of these, steps that Adam made; fp16 skips those whose gradients overflow.
        states: state ("param", and where they are known "exp_avg", "exp_avg_sq") to parameter name to fp32 tensor.
    """

    stage: int
    world_size: int
    steps: int
    updates: int
    states: Mapping[str, Mapping[str, torch.Tensor]]


class _Inert:
    """Stands for an object of which nothing is needed."""

    def __init__(self, *args: object) -> None:
        del args

    def __setstate__(self, state: object) -> None:
        del state


def tag_folder(path: Path) -> Path:
    """Return the folder of a tag: the path itself, or what `latest` in it names.

    Raises:
        CheckpointError: there is no such folder, or `latest` leads elsewhere.
    """
    if list(path.glob("*_model_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        raise CheckpointError(
            f"{path} was not written by DeepSpeed's save_checkpoint: it holds neither *_model_states.pt nor latest"
        )
    tag = latest.read_text()[:1000].strip()
    folder = path / tag
    if not 0 < len(tag) < _LONGEST_TAG or not tag.isprintable() or Path(tag).name != tag or not folder.is_dir():
        raise CheckpointError(f"{latest} names {tag!r}, which is no folder next to it")
    return folder


def read(path: Path, trust_pickle: bool = False) -> Imported:
    """Read a directory that DeepSpeed's `save_checkpoint` wrote under any ZeRO stage on any number of ranks.

    Stage 0 does not name the parameters of its optimizer states, so that these are left out there.

    Args:
        path: the directory, or one tag's folder in it.
        trust_pickle: let files that hold other objects than tensors and plain values run what code they name.

    Raises:
        CheckpointError: files are missing, damaged, of another kind, or need `trust_pickle`.
    """
    folder = tag_folder(path)
    models = _by_rank(folder, "model_states.pt")
    if not models:
        raise CheckpointError(f"{folder} holds no *_model_states.pt")
    model = _load(models[0], trust_pickle)
    optimizers = _by_rank(folder, "optim_states.pt")
    try:
        steps, world_size = int(model["global_steps"]), int(model["dp_world_size"])
        updates = steps - int(model["skipped_steps"])
        if not (0 <= updates <= steps < 2**63 and world_size > 0):
            raise ValueError(f"{updates} updates in {steps} steps on {world_size} ranks")
        if not optimizers:
            if model["param_shapes"] is not None:  # which stage 0 does not note
                raise CheckpointError(
                    f"{folder} was written under ZeRO 1 to 3 and lacks all *_optim_states.pt, which hold the fp32 "
                    "weights: copy them too"
                )
            skip = set(model["buffer_names"])
            weights = {name: value.float() for name, value in model["module"].items() if name not in skip}
            _check_names(weights)
            return Imported(0, world_size, steps, updates, {"param": weights})
        if len(optimizers) != world_size:
            raise CheckpointError(
                f"{folder} holds the optimizer states of {len(optimizers)} ranks, of {world_size} that wrote it"
            )
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        ranks = [_load(path, trust_pickle)["optimizer_state_dict"] for path in optimizers]
        stage = 3 if "fp32_flat_groups" in ranks[0] else 2
        flat = [_flat3(rank) for rank in ranks] if stage == 3 else [_flat12(rank) for rank in ranks]
        gather = _gather3 if stage == 3 else _gather12
        paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        if any(padding < 0 for group in paddings for padding in group):
            raise ValueError("a padding is negative")
        states = {state: dict(gather([rank[state] for rank in flat], shapes, paddings)) for state in flat[0]}
        fixed = _fixed3([model, *(_load(path, trust_pickle) for path in models[1:])]) if stage == 3 else _fixed12(model)
        states["param"] = {**fixed, **states["param"]}
        _check_names(states["param"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is not laid out as DeepSpeed 0.19 does: {error!r}") from error
    return Imported(stage, world_size, steps, updates, states)


def _check_names(weights: Mapping[Any, torch.Tensor]) -> None:
    """Refuse what is no parameter's name, before it becomes the name of a fragment.

    Raises:
        ValueError: naming the first, or there is none.
    """
    odd = [name for name in weights if not isinstance(name, str) or not name.isprintable() or not name]
    if odd or not weights:
        raise ValueError(f"{odd[0]!r} is no name of a parameter" if odd else "it holds no parameter")


def _by_rank(folder: Path, ending: str) -> list[Path]:
    """Return files by the number of the rank in their names."""
    found = []
    for path in folder.glob(f"*{ending}"):
        match = re.fullmatch(rf"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_{re.escape(ending)}", path.name)
        if match is None:
            raise CheckpointError(f"{path} is of model-parallel training, which cannot be imported")
        found.append((int(match[1] or 0), path))
    return [path for _, path in sorted(found)]


def _load(path: Path, trust_pickle: bool) -> dict[str, Any]:
    try:
        if trust_pickle:
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        else:
            with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
                value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"objects of {named[1]}" if named else "more than tensors and plain values"
        raise CheckpointError(f"{path} holds {what}: --trust-pickle reads it, but then it can run any code") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read: {first}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a file of DeepSpeed's save_checkpoint")
    return value


_Groups = list[torch.Tensor]
_Shapes = list[dict[str, tuple[int, ...]]]


def _flat12(rank: dict[str, Any]) -> dict[str, _Groups]:
    """Return one rank's part of each parameter group, for each state."""
    masters = rank["single_partition_of_fp32_groups"]
    adam = rank["base_optimizer_state"]["state"]
    return {"param": list(masters), **_adam_states(adam, len(masters))}


def _flat3(rank: dict[str, Any]) -> dict[str, _Groups]:
    masters = rank["fp32_flat_groups"]
    adam = rank["optimizer_state_dict"]["state"]
    return {"param": list(masters), **_adam_states(adam, len(masters))}


def _adam_states(adam: dict[int, dict[str, torch.Tensor]], groups: int) -> dict[str, _Groups]:
    """Return the optimizer states that are there, group by group."""
    there = [state for state in _OPTIMIZER_STATES if state in adam.get(0, {})]
    return {state: [adam[g][state] for g in range(groups)] for state in there}


def _gather12(ranks: list[_Groups], shapes: _Shapes, paddings: list[list[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stages 1 and 2: a group is one flat tensor cut over the ranks, its parameters one after the other."""
    if any(len(rank) != len(shapes) for rank in ranks):
        raise ValueError(
            f"the ranks have {[len(rank) for rank in ranks]} groups of parameters, the shapes {len(shapes)}"
        )
    for g, group in enumerate(shapes):
        flat = torch.cat([rank[g].float() for rank in ranks])
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[g], strict=True):
            numel = math.prod(shape)
            yield name, flat[offset : offset + numel].reshape(shape)
            offset += numel + padding
        # DeepSpeed fills a group up to an even share for each rank.
        if not 0 <= flat.numel() - offset < 2 * len(ranks):
            raise ValueError(f"the flat vectors of group {g} have {flat.numel()} elements, its shapes {offset}")


def _gather3(ranks: list[_Groups], shapes: _Shapes, paddings: list[list[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stage 3: every parameter is cut over the ranks, and a rank's parts lie one after the other."""
    del paddings
    flat = [torch.cat([group.float() for group in rank]) for rank in ranks]
    offset = 0
    for group in shapes:
        for name, shape in group.items():
            numel = math.prod(shape)
            part = math.ceil(numel / len(ranks))
            yield name, torch.cat([rank[offset : offset + part] for rank in flat])[:numel].reshape(shape)
            offset += part
    if any(part.numel() != offset for part in flat):
        sizes = [part.numel() for part in flat]
        raise ValueError(f"the flat vectors have {sizes} elements, a rank's share of the shapes is {offset}")


def _fixed12(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what does not train: of the module's state, as it computes, what is no buffer and no second name."""
    others = {*model["buffer_names"], *(model.get("shared_params") or {})}
    trained = {name for group in model["param_shapes"] for name in group}
    return {name: value.float() for name, value in model["module"].items() if name not in others | trained}


def _fixed3(models: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The same of stage 3, where each is cut over the ranks."""
    parts = [model.get("frozen_param_fragments") or {} for model in models]
    return {
        name: torch.cat([part[name].float().reshape(-1) for part in parts])[: math.prod(shape)].reshape(tuple(shape))
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items()
    }


def write(
    folder: Path,
    steps: int,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    updates: int | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    version: str = "0.19.8",
) -> Path:
    """Write a directory as stage 2 on one rank would, which DeepSpeed's zero_to_fp32.py and load_checkpoint read.

    Args:
        folder: to make.
        steps: optimizer steps done.
        states: "param", and where there are "exp_avg" and "exp_avg_sq", of every parameter by name, in the order in
            which the optimizer that loads it has them: it cuts the flat vectors by its own shapes, without a name.
            Parameters that have "param" alone of several states do not train.
        updates: of the steps, those that Adam made; None for all.
        hyperparameters: of the one parameter group, such as lr, betas, eps and weight_decay.
        version: DeepSpeed's, noted in the files.

    Returns:
        The tag's folder.
    """
    tag = folder / f"global_step{steps}"
    tag.mkdir(parents=True)
    fixed = OrderedDict(
        (name, tensor) for name, tensor in states["param"].items() if any(name not in held for held in states.values())
    )
    shapes = OrderedDict((name, tensor.shape) for name, tensor in states["param"].items() if name not in fixed)
    flat = {
        state: torch.cat([tensors[name].float().reshape(-1) for name in shapes]) for state, tensors in states.items()
    }
    model: dict[str, object] = {
        "module": OrderedDict(states["param"]),
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in fixed.items()),
        "shared_params": {},
        "frozen_param_fragments": fixed,
        "global_steps": steps,
        "skipped_steps": 0 if updates is None else steps - updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": version,
    }
    done = float(steps if updates is None else updates)
    adam = {"step": torch.tensor(done), **{state: flat[state] for state in _OPTIMIZER_STATES if state in flat}}
    optimizer = {
        "base_optimizer_state": {"state": {0: adam}, "param_groups": [{**(hyperparameters or {}), "params": [0]}]},
        "single_partition_of_fp32_groups": [flat["param"]],
        "zero_stage": 2,
        "group_paddings": [0],
        "partition_count": [1],
        "ds_version": version,
    }
    torch.save(model, tag / "mp_rank_00_model_states.pt")
    torch.save(
        {"optimizer_state_dict": optimizer, "ds_version": version}, tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    (folder / "latest").write_text(tag.name)
    return tag
