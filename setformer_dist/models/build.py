"""A model from the `[model]` table: any name that timm knows, ours included."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence

import pydantic
import timm
import torch
from timm.layers.norm_act import FrozenBatchNorm2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parameter import is_lazy

import setformer_dist.models  # noqa: F401 — registers our models with timm
from setformer_dist.core.config import readable
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import OWN_MODEL, ModelConfig
from setformer_dist.core.seeding import Purpose, torch_seed
from setformer_dist.models.arguments import check_arguments
from setformer_dist.models.recompute import set_recompute

# What constructors of timm's models raise for values that do not go together; none of them checks its arguments first.
_IMPOSSIBLE = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def check_name(name: str) -> None:
    """Check that timm knows the architecture.

    Raises:
        ConfigError: with the nearest name that it knows; or saying that the model was given as an object.
    """
    if name.startswith(OWN_MODEL):
        raise ConfigError(
            f"its code ({name.removeprefix(OWN_MODEL)}) was given to the run as an object, and no file holds it: give "
            "it again from Python, setformer.load(PATH, model=...) or setformer.Training(config, model=...)"
        )
    if not timm.is_model(name):
        ours = [*timm.list_models("setformer_*"), *timm.list_models("soft_*"), *timm.list_models("text_*")]
        close = difflib.get_close_matches(name, [*ours, *timm.list_models()], n=1)
        hint = f": did you mean {close[0]}?" if close else "; `setformer models` lists ours"
        raise ConfigError(f"key 'model.name': no model {name!r}{hint}")


def timm_arguments(config: ModelConfig, num_classes: int, image_size: int | tuple[int, int]) -> dict[str, object]:
    """Return the arguments with which `timm.create_model` makes the architecture, besides what only training needs."""
    arguments = {"num_classes": num_classes, **config.args}
    if _fixes_input_size(config.name):
        arguments.setdefault("img_size", image_size)
    return arguments


def build_model(config: ModelConfig, num_classes: int, image_size: int | tuple[int, int], seed: int) -> nn.Module:
    """Return the model with weights drawn from the seed alone.

    Args:
        config: see `ModelConfig`.
        num_classes: classes of the data set.
        image_size: height and width, or one number for both; passed on as `img_size` to models that fix their input
            size; others take any size.
        seed: the run's.

    Raises:
        ConfigError: an argument is not the model's own or impossible.
    """
    torch.manual_seed(torch_seed(Purpose.INIT, seed))
    model = created(config, num_classes, image_size)
    if config.frozen_batch_norm:
        model = _with_frozen_norms(model, config.name)
    _refuse_running_statistics(model, config.name)
    _lay_out(model)
    set_recompute(model, config.policy, config.name)
    return model


def created(config: ModelConfig, num_classes: int, image_size: int | tuple[int, int]) -> nn.Module:
    """Return the model as timm makes it, with weights from torch's generator; arguments and errors of `build_model`."""
    check_name(config.name)
    check_arguments(config.name, config.args)
    arguments = {"drop_path_rate": config.drop_path, **timm_arguments(config, num_classes, image_size)}
    try:
        model: nn.Module = timm.create_model(config.name, **arguments)
    except pydantic.ValidationError as error:
        raise ConfigError(f"model.args of {config.name}: {readable(error)}") from None
    except _IMPOSSIBLE as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"model {config.name} cannot be built with model.args = {config.args}: {why}") from None
    return model


def own_model(make: Callable[[int], nn.Module], config: ModelConfig, outputs: int, seed: int) -> nn.Module:
    """Return a model of a user's own.

    Args:
        make: makes it for a number of outputs; what it draws from torch's generator follows from the seed.
        config: says whether activations are recomputed.
        outputs: of the task.
        seed: the run's.

    Raises:
        ConfigError: it is no module, has no parameters or such as cannot be sharded, or cannot recompute activations.
    """
    name = config.name.removeprefix(OWN_MODEL)
    torch.manual_seed(torch_seed(Purpose.INIT, seed))
    model = make(outputs)
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"model {name} is no torch.nn.Module with parameters that are trained")
    _refuse_odd_parameters(model, name)
    _lay_out(model.cpu())  # where its first batch is; DeepSpeed brings it to the rank's device
    if config.policy != "none":  # "none", the default, leaves what the model does by itself
        set_recompute(model, config.policy, name)
    return model


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Have parameters not train.

    Args:
        model: in training, before an engine has it.
        prefixes: of their names (`model.freeze`).

    Raises:
        ConfigError: a prefix is that of no parameter, or none is left that trains.
    """
    named = dict(model.named_parameters())
    for prefix in prefixes:
        found = [parameter for name, parameter in named.items() if name.startswith(prefix)]
        if not found:
            known = list(dict.fromkeys(name.split(".")[0] for name in named))
            raise ConfigError(
                f"model.freeze: no parameter's name begins with {prefix!r}; names begin with {', '.join(known)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"model.freeze = {list(prefixes)} leaves no parameter that trains: remove one of them")


def _lay_out(model: nn.Module) -> None:
    """Have parameters in fp32 and contiguous: masters are, and what DeepSpeed joins must be alike."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float().contiguous()


def _refuse_odd_parameters(model: nn.Module, name: str) -> None:
    """Refuse parameters that optimizers and ranks cannot share.

    Raises:
        ConfigError: naming the first of them, and what to do.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"model {name} is compiled by torch.jit: pass the module itself (compile.mode compiles it)")
    if any(isinstance(module, OptimizedModule) for module in model.modules()):
        raise ConfigError(
            f"model {name} is compiled by torch.compile: pass the module itself (compile.mode compiles it)"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConfigError(f"model {name} is wrapped in {type(model).__name__}: pass the module itself (its .module)")
    for where, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        if parameter.is_meta:
            raise ConfigError(f"model {name}: {where} is on the meta device, without values: make the model on the CPU")
    for where, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(
                f"model {name}: {where} has no size yet: give its layer sizes, or pass a batch through it"
            )
        if not parameter.numel():
            raise ConfigError(
                f"model {name}: {where} has no elements, so nothing of it can be shared out: leave it out"
            )
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"model {name}: {where} is {kind}, and optimizers take real numbers: make it a floating one "
                "(torch.view_as_real), or a buffer"
            )
    for where, module in model.named_modules():
        if getattr(module, "sparse", None) is True:
            raise ConfigError(
                f"model {name}: {where} has sparse gradients, which ranks cannot add up: set sparse=False"
            )


def _refuse_running_statistics(model: nn.Module, name: str) -> None:
    """Refuse state that training changes outside the parameters: ranks would not share it, nor checkpoints hold it.

    Raises:
        ConfigError: naming the first such buffer.
    """
    saved = set(model.state_dict())
    running = [n for n, b in model.named_buffers() if n in saved and b.is_floating_point() and "running" in n]
    if running:
        raise ConfigError(
            f"model {name} keeps running statistics ({running[0]} …), which neither ranks nor checkpoints share: "
            "choose a model with layer or group norms (soft_*: conv_norm = 'layer'), or fine-tune it with "
            "model.frozen_batch_norm = true"
        )


def _with_frozen_norms(model: nn.Module, name: str) -> nn.Module:
    """Return a model whose batch norms are constants: statistics, weights and biases as parameters that do not train.

    So masters, checkpoints and exports hold them as they hold other weights, by timm's names.

    Raises:
        ConfigError: there are none.
    """
    model = freeze_batch_norm_2d(model)
    frozen = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d | FrozenBatchNormAct2d)]
    if not frozen:
        raise ConfigError(f"model.frozen_batch_norm = true, and model {name} has no batch norms: remove the key")
    for module in frozen:
        for key, value in list(module.named_buffers(recurse=False)):
            delattr(module, key)
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
    return model


def _fixes_input_size(name: str) -> bool:
    """Whether timm marks the architecture as bound to its input size (ViT, Swin with absolute windows)."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(pretrained is not None and pretrained.fixed_input_size) or name.startswith(("swin", "vit"))
