"""Models that a program gives as objects: a module, or a function that makes one.

A checkpoint of such a model has its weights and a name to show, but no code. So the caller passes the object again when
using the checkpoint (`setformer.load(path, model=...)`).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from launch.run.config import RunConfig
from launch.run.inputs import check_shapes, inputs_of
from setformer_dist.core import revisions
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.model_config import OWN_MODEL
from setformer_dist.core.task import Task
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.models.build import own_model
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.segmentation import Segmentation

# A module whose copy is trained, or a function of the number of outputs that makes one.
OwnModel = nn.Module | Callable[[int], nn.Module]

# Of trainer.json: a digest of the buffers, which are no part of a checkpoint.
BUFFERS = "buffers"

# Tasks whose loss takes one number for each output.
_BY_OUTPUT = ("classification", "multilabel", "sentences")


def named_own(config: RunConfig, own: OwnModel) -> RunConfig:
    """Return a run's config with the name under which its folder and checkpoints show a model of the user's own.

    Raises:
        ConfigError: it is neither module nor function; or the config says something of the model that only models built
            by name can follow.
    """
    if not isinstance(own, nn.Module) and not callable(own):
        raise ConfigError(
            f"model must be a torch.nn.Module or a function of the number of outputs, and is {own!r:.40}: a registered "
            "name belongs into model.name of the config"
        )
    model = config.model
    asked = {"args": revisions.without_defaults(model.args), "drop_path": model.drop_path, "weights": model.weights}
    if wrong := [f"model.{key}" for key, value in asked.items() if value]:
        words = ", ".join(f'"~{key}"' for key in wrong)
        applies, it = ("applies", "it") if len(wrong) == 1 else ("apply", "them")
        raise ConfigError(
            f"{' and '.join(wrong)} {applies} only to models that are built by name, and this run gets a model as an "
            f"object: remove {it}, from Python by load_config(..., {words})"
        )
    kind = type(own) if isinstance(own, nn.Module) else own
    name = getattr(kind, "__qualname__", type(kind).__qualname__)
    shown = model.model_copy(update={"name": f"{OWN_MODEL}{name}", "args": {}})
    return config.model_copy(update={"model": shown})


def made_own(own: OwnModel, config: RunConfig, outputs: int) -> nn.Module:
    """Return a model of a user's own: a copy of the module, or what the function makes, drawn from the run's seed.

    Raises:
        ConfigError: it cannot be made, is no module, or is one that cannot be trained over several ranks.
    """

    def make(count: int) -> nn.Module:
        if isinstance(own, nn.Module):
            return _copied(own)
        try:
            return own(count)
        except ConfigError:
            raise
        except Exception as error:
            name = config.model.name.removeprefix(OWN_MODEL)
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"model {name} cannot be made as {name}({count}): {why}: it takes the number of outputs"
            ) from error

    return own_model(make, config.model, outputs, config.run.seed)


def _copied(own: nn.Module) -> nn.Module:
    """Return a copy of a module.

    Raises:
        ConfigError: it keeps a tensor that autograd made: a weight made anew by each pass, or an output it remembers.
    """
    try:
        return copy.deepcopy(own)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"model {type(own).__qualname__} cannot be copied ({why}): pass a function of the number of outputs that "
            "makes it"
        ) from error


def build_own(own: OwnModel, config: RunConfig, shape: tuple[int, ...], task: Task) -> nn.Module:
    """Return `made_own`, tried on one sample.

    Args:
        own: the model.
        config: of the run.
        shape: of a sample as the model takes it, without the batch.
        task: what the run learns.

    Raises:
        ConfigError: also where the model does not take the run's samples, has another number of outputs, or changes
            its state.
    """
    inputs, outputs = inputs_of(config.data), len(task.outputs)
    model = made_own(own, config, outputs)
    name = config.model.name.removeprefix(OWN_MODEL)
    batch = torch.zeros(2, *shape, dtype=inputs.dtype or torch.float32)
    made = check_unchanged(model, name, batch)
    _check_made(made, name, config.task.name, outputs)
    check_shapes(model, name, config.data)
    return model


def _check_made(made: object, name: str, task: str, outputs: int) -> None:
    """Check what a model makes of one sample; raises ConfigError.

    By the config's name, as a task of the user's own, derived from one of these, may take outputs of any kind.
    """
    shape = tuple(made.shape) if isinstance(made, torch.Tensor) else ()
    if task in _BY_OUTPUT and shape != (1, outputs):
        needed = f"{(1, outputs)}"
    elif task == Segmentation.name and (len(shape) != 4 or shape[1] != outputs):
        needed = f"(1, {outputs}, rows, columns)"
    elif task == Detection.name and not _is_detected(made, outputs):
        needed = f"a tuple of logits (1, A, {outputs}), offsets (1, A, 4) and anchors (A, 5)"
    else:
        return
    got: object = shape if isinstance(made, torch.Tensor) else type(made).__name__
    raise ConfigError(
        f"model {name} makes {got} of one sample, and task {task} on this data needs {needed}: give it "
        f"{outputs} outputs, or pass a function of their number that makes the model"
    )


def _is_detected(made: object, outputs: int) -> bool:
    """Return whether these are outputs of a detector for one image (`core.boxes.Detected`)."""
    if not (isinstance(made, tuple) and len(made) == 3 and all(isinstance(part, torch.Tensor) for part in made)):
        return False
    a = len(made[2])
    return [tuple(part.shape) for part in made] == [(1, a, outputs), (1, a, 4), (a, 5)]


def check_unchanged(model: nn.Module, name: str, batch: torch.Tensor) -> Any:
    """Run a model in evaluation and in training mode, and refuse state that this changes: optimizers alone do.

    Ranks do not share what a forward pass writes. Checkpoints do not hold buffers, nor in low precision what is written
    into parameters, and ZeRO-3 forgets it. A model that sets itself up by its first batch would do so by this one.

    Args:
        model: in either mode; left in that of training.
        name: for messages.
        batch: two samples.

    Returns:
        The outputs for the first sample, in evaluation mode.

    Raises:
        ConfigError: it does not take the batch, or changes a parameter or a buffer of its state_dict.
    """
    before = _digests(model)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.no_grad():
                made = model.eval()(batch[:1].clone())
            # With gradients, as some change their state only then; without what a backward pass would need of memory.
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                model.train()(batch.clone())
                _run_with_others(model, batch.clone())
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"model {name} does not take a batch of shape {(1 + model.training, *batch.shape[1:])}: {why}"
            ) from error
    after = _digests(model)
    wrong = [where for where in {**before, **after} if before.get(where) != after.get(where)]
    parameters = dict(model.named_parameters())
    for where in wrong:
        if where in parameters:
            raise ConfigError(
                f"model {name} changes its parameter {where} in a forward pass, which neither ranks nor checkpoints "
                "share: set up weights where the model is made; what follows other weights (a momentum encoder) "
                "cannot be trained here"
            )
        if "running" in where or "num_batches_tracked" in where:
            raise ConfigError(
                f"model {name} keeps running statistics ({where} …), which neither ranks nor checkpoints share: choose "
                "layer or group norms, or keep these layers in evaluation mode (override train)"
            )
        raise ConfigError(
            f"model {name} changes its buffer {where} in a forward pass, which neither ranks nor checkpoints share: "
            "leave that out (such as spectral norms), or register the buffer with persistent=False if it may begin "
            "anew at each start"
        )
    return made


def _run_with_others(model: nn.Module, batch: torch.Tensor) -> None:
    """Run a model while what does not train has another sign, and give it back its own.

    A momentum encoder begins with the weights that it follows. Only while they differ, a pass shows that it moves.
    """
    fixed = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if not fixed:
        return
    for parameter in fixed:
        parameter.data.neg_()
    with contextlib.suppress(Exception):  # not every weight may be negative
        model(batch)
    for parameter in fixed:
        parameter.data.neg_()


def _saved_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers in a model's state_dict, by name."""
    saved = model.state_dict().keys()
    return sorted(((where, buffer) for where, buffer in model.named_buffers() if where in saved), key=lambda b: b[0])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    whole = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    data: memoryview = whole.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def _digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each parameter and of each buffer in the state_dict, by name."""
    named = itertools.chain(model.named_parameters(), _saved_buffers(model))
    return {where: xxhash.xxh3_128(_bytes_of(tensor)).hexdigest() for where, tensor in named}


def digest_of_buffers(model: nn.Module) -> str | None:
    """Return a sha256 of the buffers in a model's state_dict, by name; None where it has none."""
    found = _saved_buffers(model)
    digest = hashlib.sha256()
    for where, buffer in found:
        digest.update(f"{where} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        digest.update(_bytes_of(buffer))
    return digest.hexdigest() if found else None


def round_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's buffers the values with which its run computed: the run had them in its dtype."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(buffer.to(dtype))


def agreed_buffers(model: nn.Module, config: RunConfig, comm: TorchCollectives) -> str | None:
    """Return the digest of an own model's buffers, the same on all ranks; None of a model that is built by name.

    Raises:
        ConfigError: ranks have other buffers. Parameters are rank 0's.
    """
    if not config.model.name.startswith(OWN_MODEL):
        return None
    mine = digest_of_buffers(model)
    if len(set(comm.gather_json(mine))) > 1:
        raise ConfigError(
            f"the buffers of model {config.model.name.removeprefix(OWN_MODEL)} differ from rank to rank: pass a "
            "function that makes it (it draws from the run's seed), or call torch.manual_seed before you make the model"
        )
    return mine


def check_same_buffers(trainer: Mapping[str, object], mine: str | None, place: Path) -> None:
    """Refuse a model whose buffers are not those that a checkpoint was trained with; old checkpoints do not say.

    Raises:
        CheckpointError: they differ.
    """
    if trainer.get(BUFFERS, mine) != mine:
        raise CheckpointError(
            f"the buffers of the model that was passed are not those that checkpoint {place} was trained with (by a "
            "digest): pass the model with the buffers it had, or a function that draws them from the run's seed"
        )
