"""torch.compile of a run's model, in place: `forward` becomes its compiled form, and no weight gets another name.

    [compile] mode = "blocks"    every block by itself; equal blocks of a stage share what was compiled for the first
    [compile] mode = "model"     the model's whole forward pass, in as few graphs as it can be written down in

Only `forward` is compiled. Hooks of the block itself stay outside: under ZeRO-3 each block is a leaf, whose weights
DeepSpeed's hooks gather before the graph runs and before its backward pass (`deepspeed_engine.initialize`).

A graph is compiled when a block first meets a shape, with its backward pass at once, so that what fails does so before
anything is computed. While tokens or marginal errors of a block are watched, it computes without the compiler.
"""

from __future__ import annotations

import copy
import importlib
import logging
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.words import counted
from setformer_dist.engine import cuda_graphs
from setformer_dist.engine.config import CompileConfig

log = logging.getLogger(__name__)

BACKEND = "inductor"
_CONFIGURED = ("_dynamo", "_functorch", "_inductor")
_SHOWN = 300  # characters of what a compiler says
_ALIGNMENT = 16  # bytes, of torch's compiler

# Training, evaluation, and either once more with what a block may be given besides (drop path, places of tokens).
_FORMS = 4


@dataclass
class Compilation:
    """What compiling has cost this rank so far, and whether it goes on.

    Attributes:
        config: of the run.
        beat: called after every graph, as a sign of life.
        evaluated: evaluation is compiled too, not training alone.
        graphs: compiled.
        seconds: that took, with the first calls.
        off: nothing is compiled any more, and what was compiled is not used: a compilation failed.
    """

    config: CompileConfig
    beat: Callable[[], None]
    evaluated: bool = True
    graphs: int = 0
    seconds: float = 0.0
    off: bool = False

    @property
    def shown(self) -> str:
        """The setting, for messages."""
        return f'compile.mode = "{self.config.mode}"'

    def made(self, name: str, inputs: Sequence[object], graphs: int, seconds: float, breaks: int) -> None:
        """Take note of new graphs of a module, and say what they cost.

        Raises:
            ConfigError: compiling has taken longer than the config allows, and it does not say to go on without.
        """
        self.graphs, self.seconds = self.graphs + graphs, self.seconds + seconds
        shape = next((" × ".join(map(str, x.shape)) for x in inputs if isinstance(x, torch.Tensor)), "")
        use = "training" if torch.is_grad_enabled() else "evaluation"
        broken = f", in {breaks + 1} pieces, which costs speed" if breaks else ""
        log.info(
            "compiled %s for %s of %s in %.1f s%s (%s in %.1f s so far)",
            name, use, shape, seconds, broken, counted(self.graphs, "graph"), self.seconds,
        )  # fmt: skip
        self.beat()
        if self.seconds > self.config.limit_s:
            self.give_up(
                f"compiling has taken {self.seconds:.0f} s, longer than compile.limit_s = {self.config.limit_s:g}, and "
                f"{counted(self.graphs, 'graph')} done so far: raise it"
            )

    def failed(self, name: str, error: BaseException) -> None:
        """Take note of a failure.

        Raises:
            ConfigError: with it, if the config does not say to go on without.
        """
        self.give_up(f"{name} cannot be compiled here ({_told(error)})")

    def give_up(self, reason: str) -> None:
        """Compute without the compiler from now on, or end, as the config says.

        Raises:
            ConfigError: it says to end.
        """
        self.off = True
        if not self.config.fallback:
            raise ConfigError(
                f'{self.shown}: {reason}; or set compile.fallback = true to go on without, or compile.mode = "off"'
            )
        log.warning("%s: %s; the run goes on without the compiler (compile.fallback)", self.shown, reason)


class Shared:
    """Compiled forwards, each for modules of one class whose weights lie alike.

    Torch's compiler loads weights whose addresses are multiples of 16 bytes in pieces of that size, and takes it that
    further modules have theirs likewise. ZeRO's stages 1 and 2 lay weights side by side, whatever their sizes.
    """

    def __init__(self, config: CompileConfig) -> None:
        self._backend, self._options = BACKEND, _options(config)
        self._made: dict[tuple[object, ...], Callable[..., Any]] = {}

    def of(self, module: nn.Module) -> Callable[..., Any]:
        """Return what computes a module's forward pass, given it and the arguments."""
        kind = type(module)
        lie = (tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (*module.parameters(), *module.buffers()))
        key = (kind, *lie)
        if key not in self._made:
            forward: Any = kind.forward
            if any(made[0] is kind for made in self._made):
                # Torch finds what it has compiled by the code object.
                code, names = forward.__code__.replace(), forward.__globals__
                own = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
                own.__kwdefaults__ = forward.__kwdefaults__
                forward = own
            self._made[key] = torch.compile(forward, backend=self._backend, dynamic=False, options=self._options)
        return self._made[key]


class CompiledForward:
    """A module's `forward`, compiled; as it was, while the module is watched or after a failure.

    Args:
        module: whose forward pass it is.
        name: of the module.
        shared: compiled forwards, which take the module and the arguments.
        compilation: of the whole model.
    """

    def __init__(self, module: nn.Module, name: str, shared: Shared, compilation: Compilation) -> None:
        self._module, self._name = module, name
        self._shared, self._compilation = shared, compilation
        self._compiled: Callable[..., Any] | None = None  # chosen at the first call, when weights lie where they stay
        self._eager = type(module).forward
        self._watchable: list[Any] | None = None  # found at the first call, when a copy is whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own `forward` returns, to rounding."""
        compilation = self._compilation
        if self._watchable is None:
            self._watchable = [inner for inner in self._module.modules() if hasattr(inner, "watched")]
        used = not compilation.off and (compilation.evaluated or self._module.training)
        if not used or any(module.watched for module in self._watchable):
            return self._eager(self._module, *args, **kwargs)
        if self._compiled is None:
            self._compiled = self._shared.of(self._module)
        graphs, breaks, began = *_counted(), time.perf_counter()
        try:
            result = self._compiled(self._module, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            compilation.failed(self._name, error)
            return self._eager(self._module, *args, **kwargs)
        more, broken = _counted()
        if more != graphs:
            took = time.perf_counter() - began
            compilation.made(self._name, args, more - graphs, took, broken - breaks)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        """Return the forward of the module's copy; what was compiled is shared, as no weights are in it."""
        module = copy.deepcopy(self._module, memo)
        return CompiledForward(module, self._name, self._shared, self._compilation)


def _counted() -> tuple[int, int]:
    """Return how many graphs this process has compiled, and how often one had to be cut in two."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], counters["graph_break"].total()


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of a model's blocks: modules whose class is named so (ours, timm's), the outermost."""
    return list(_blocks("", model))


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module).__name__.endswith("Block"):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _blocks(f"{name}.{child}" if name else child, inner)


def check_compile(config: CompileConfig, model: nn.Module, name: str, device: str) -> None:
    """Refuse what cannot be compiled, before anything is.

    Args:
        config: of the run.
        model: of the run.
        name: of the model, for messages.
        device: its type, such as "cpu" or "cuda".

    Raises:
        ConfigError: naming the key.
    """
    if config.mode == "blocks" and not blocks_of(model):
        raise ConfigError(
            f'compile.mode = "blocks": {name} has no block, a module whose class is named …Block: set compile.mode = '
            '"model" or "off"'
        )
    whole = [("the model", model)] if config.mode == "model" else []
    for shown, module in [*whole, *(blocks_of(model) if config.mode == "blocks" else [])]:
        if "forward" in vars(module):
            raise ConfigError(
                f'compile.mode = "{config.mode}": the forward of {shown} was set on the object itself, and is compiled '
                'only where its class has it: move it into the class, or set compile.mode = "off"'
            )
    if config.cudagraphs and device != "cuda":
        raise ConfigError(f"compile.cudagraphs = true needs an NVIDIA GPU, and the device here is {device}: remove it")


def compile_model(
    model: nn.Module,
    config: CompileConfig,
    sizes: int = 1,
    processes: int = 1,
    beat: Callable[[], None] = lambda: None,
    evaluated: bool = True,
) -> Compilation | None:
    """Have a model's blocks, or the model as a whole, compute by compiled graphs from now on; before DeepSpeed.

    Args:
        model: of the run; changed in place.
        config: as `check_compile` has taken it.
        sizes: of images or sequences that the run will have; each gets graphs of its own.
        processes: that compile side by side, where the device's compiler can.
        beat: see `Compilation`.
        evaluated: whether evaluation is compiled too; false where its images may have any size, each of which would
            get graphs of its own.

    Returns:
        What it costs; None where nothing is compiled.
    """
    if config.mode == "off":
        return None
    modules = [("the model", model)] if config.mode == "model" else blocks_of(model)
    _set_up(len(modules) * sizes * _FORMS, processes)
    compilation = Compilation(config, beat, evaluated)
    shared = Shared(config)
    for name, module in modules:
        module.forward = CompiledForward(module, name, shared, compilation)
    if config.cudagraphs:
        cuda_graphs.fit(model)
    return compilation


def _options(config: CompileConfig) -> dict[str, Any] | None:
    if BACKEND != "inductor":
        return None
    # Kernels are not chosen by timing where that changes sums, and random numbers are those of torch: the same run
    # has the same bits twice, and timm's stochastic depth drops what it drops without the compiler.
    known = importlib.import_module("torch._inductor.config")
    wanted = {"deterministic": True, "fallback_random": True}
    return {name: on for name, on in wanted.items() if hasattr(known, name)} | {"triton.cudagraphs": config.cudagraphs}


def _set_up(graphs: int, processes: int) -> None:
    """Set what the compiler has for the whole process: so many graphs of one piece of code, backward passes at once."""
    # Imported here, as it takes seconds of the start of every rank that compiles nothing.
    parts: tuple[Any, ...] = tuple(importlib.import_module(f"torch.{part}.config") for part in _CONFIGURED)
    dynamo, functorch, inductor = parts
    dynamo.recompile_limit = max(dynamo.recompile_limit, graphs)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, graphs)
    functorch.force_non_lazy_backward_lowering = True
    inductor.compile_threads = processes


def _told(error: BaseException) -> str:
    """Return what a compiler says, in one line."""
    inner = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    text = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return f"{type(inner).__name__}: {text[:_SHOWN]}"
