"""What CUDA graphs ask of a training, by torch's trees of them (`torch._inductor.cudagraph_trees`).

A graph writes its results to the same memory each time. Torch lets the graphs of a micro batch take the memory of the
last one's results as soon as it is told that a micro batch begins, and does not say so once graphs are replayed. So
what lives longer is brought to memory of its own: what leaves the model, such as a loss, by a copy, and gradients
before the next micro batch adds to them. Autograd takes a backward graph's results for gradients as they are, and
DeepSpeed's stages 0 and 1 keep them from micro batch to micro batch.

Inputs that are weights or other attributes of modules must not move: a graph is recorded again for every new address,
without a limit. ZeRO-3 moves weights, and is refused; keys of samples have one place for each size (`step.py`).
"""

from __future__ import annotations

import importlib
import itertools
import logging
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from setformer_dist.core.words import counted

log = logging.getLogger(__name__)

# Where torch says what it leaves out of CUDA graphs, and why.
TORCHS_LOG = "torch._inductor.cudagraph_utils.__cudagraphs"
_SHOWN = 400  # characters of that
# Forward passes after which all parts of a step are recorded: the first warms up, the second records.
_SETTLED = 4


def fit(model: nn.Module) -> None:
    """Have a model's forward passes begin micro batches, and what must live longer lie in memory of its own.

    Args:
        model: whose graphs they are; a copy of it begins nothing, so that it may compute in between.
    """
    passes, known = itertools.count(1), 0

    def begin(module: nn.Module, _: object) -> None:
        nonlocal known
        if module is model:
            own_gradients(model)
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            known = _tell_recorded(next(passes), known)

    _tell_skips()
    model.register_forward_pre_hook(begin)
    model.register_forward_hook(_own_outputs)


@torch.no_grad()
def own_gradients(model: nn.Module) -> None:
    """Bring gradients that wait for those of further micro batches to memory of their own."""
    found = {p: p.grad for p in model.parameters() if p.grad is not None}
    if not found:
        return
    own = [torch.empty_like(gradient) for gradient in found.values()]
    torch._foreach_copy_(own, list(found.values()))
    for p, gradient in zip(found, own, strict=True):
        p.grad = gradient


def _own_outputs(_: nn.Module, inputs: object, outputs: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, outputs)


class _Skips(logging.Handler):
    """Hands on, once each, what torch says of parts that it launches kernel by kernel all the same."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write it to the log of the run."""
        said = " ".join(record.getMessage().split())[:_SHOWN]
        if said not in self._said:
            self._said.add(said)
            log.warning("compile.cudagraphs = true: a part computes without CUDA graphs: torch is %s", said)


def _tell_skips() -> None:
    """Write to the log what torch leaves out of CUDA graphs from now on, each reason once."""
    torchs = logging.getLogger(TORCHS_LOG)
    for handler in [h for h in torchs.handlers if isinstance(h, _Skips)]:
        torchs.removeHandler(handler)
    torchs.addHandler(_Skips())


def _tell_recorded(passes: int, known: int) -> int:
    """Write to the log how many graphs there are where that has changed, less and less often; return how many."""
    if passes < _SETTLED or passes & (passes - 1):
        return known
    found = recorded()
    if not found and passes == _SETTLED:
        log.warning("compile.cudagraphs = true: no CUDA graph was recorded in %d forward passes", passes)
    elif found != known:
        log.info("%s recorded in %d forward passes", counted(found, "CUDA graph"), passes)
    return found


def recorded() -> int:
    """Return how many CUDA graphs the trees of this rank's device hold: one for each place of a graph in a step."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    trees: Any = importlib.import_module("torch._inductor.cudagraph_trees")
    manager = trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(1 + root.num_descendants() for root in manager.get_roots())


def skips() -> int:
    """Return how often torch has left a part out of CUDA graphs, in this process."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
