"""What a model costs, measured on fake tensors: real operators, no memory, no arithmetic, a second or two."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fixed_parameters(model: nn.Module) -> int:
    """Return the number of parameters that do not train."""
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def checkpoint_bytes(trained: int, fixed: int, states: int, ema: bool) -> int:
    """Return what a checkpoint takes: in fp32 all parameters, their average if there is one, and optimizer states.

    Args:
        trained: parameters that train.
        fixed: parameters that do not.
        states: what the optimizer keeps of each element that trains.
        ema: whether an average of the weights is kept.
    """
    return 4 * ((trained + fixed) * (1 + ema) + trained * states)


def multiply_adds_of(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return the multiply-adds of one sample's forward pass: matrix products and convolutions.

    Args:
        model: in fp32.
        shape: of the sample, without the batch.
        dtype: of the sample; integers are token ids.
    """
    mode = FakeTensorMode()
    weights = _fake_weights(model, mode, None)
    was_training = model.training
    model.eval()
    with mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, weights, (torch.ones(1, *shape, dtype=dtype),))
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


def refuses(model: nn.Module, shape: tuple[int, ...]) -> Exception | None:
    """Return the error by which a model refuses a sample of a shape; None if it takes it.

    It runs without numbers, so an image of any size costs no memory and a fraction of a second. What fails so may be
    an own model that looks at its numbers: only a real forward pass says no.
    """
    mode = FakeTensorMode()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                weights = _fake_weights(model, mode, None)
                with mode:
                    torch.func.functional_call(model, weights, (torch.zeros(1, *shape),))
            except Exception:  # noqa: BLE001 - of fake tensors, or the model's own
                model(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        return error
    finally:
        model.train(was_training)
    return None


def _fake_weights(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return fake tensors in place of all parameters and buffers, in `dtype` where one is given."""
    fakes = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        with mode:
            fakes[name] = torch.empty(tensor.shape, dtype=kind, requires_grad=tensor.requires_grad)
    return fakes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, on its device and, by offload, in host memory.

    Attributes:
        parameters: weights the model computes with; under ZeRO-3 the rank's part, and all that are gathered.
        gradients: as they accumulate between micro batches and ranks.
        masters: fp32 masters (besides the weights, where these are of low precision), the optimizer's states, EMA.
        activations: kept for the backward pass of one micro batch.
        working: the most that gradients, activations, and the buckets and copies by which gradients are reduced take
            together: they are not all alive at once.
        host: what zero.offload and model.recompute = "offload" keep in host memory instead, and the fp32 gradients
            that Adam takes there.
    """

    parameters: int
    gradients: int
    masters: int
    activations: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        """The most that is on the device at a time."""
        return self.parameters + self.masters + self.working


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch's forward and backward pass, measured on fake tensors.

    Attributes:
        kept: by autograd, at the end of the forward pass.
        peak: the most that is alive at a time besides the weights: activations, what operators work with, and the
            gradients of the weights as they come.
        added: the same without the gradients of the weights, which are there before and added to.
        host: inputs of blocks in host memory (host_memory.py).
    """

    kept: int
    peak: int
    added: int
    host: int = 0


def measure_activations(
    model: nn.Module, dtype: torch.dtype, batch: tuple[int, ...], batch_dtype: torch.dtype | None = None
) -> Activations:
    """Measure a training step's activations; see `predict_memory` for the arguments."""
    mode = FakeTensorMode()
    fakes = _fake_weights(model, mode, dtype)
    alive = _Alive(list(fakes.values()))
    for fake in fakes.values():
        if fake.requires_grad:
            fake.register_post_accumulate_grad_hook(alive.settle)  # type: ignore[no-untyped-call]
    was_training = model.training
    model.train()
    both = _ForwardBackward(model)
    inner = {f"model.{name}": fake for name, fake in fakes.items()}
    with mode, alive:
        kept = torch.func.functional_call(both, inner, (torch.ones(batch, dtype=batch_dtype or dtype), alive))
    model.train(was_training)
    return Activations(kept, alive.most, alive.most_unsettled, alive.host)


def measure_evaluation(model: nn.Module, dtype: torch.dtype, batch: tuple[int, ...]) -> int:
    """Return the bytes that are alive at most, besides the weights, in a forward pass without gradients.

    Args:
        model: of images.
        dtype: of weights and inputs.
        batch: shape of the inputs.
    """
    mode = FakeTensorMode()
    fakes = _fake_weights(model, mode, dtype)
    alive = _Alive(list(fakes.values()))
    was_training = model.training
    model.eval()
    with torch.no_grad(), mode, alive:
        torch.func.functional_call(model, fakes, (torch.ones(batch, dtype=dtype),))
    model.train(was_training)
    return alive.most


def predict_memory(
    model: nn.Module,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    stage: int,
    world_size: int,
    ema: bool,
    batch: tuple[int, ...],
    batch_dtype: torch.dtype | None = None,
    offload: str = "none",
    accumulation: int = 1,
    states: int = 2,
    bucket_bytes: int = 0,
) -> Memory:
    """Predict a rank's memory under ZeRO (Rajbhandari et al. 2020, section 3), as DeepSpeed 0.19 lays it out.

    Args:
        model: with its activation checkpointing set as in the run.
        dtype: of weights and activations.
        grad_dtype: of accumulated gradients.
        stage: ZeRO's.
        world_size: ranks that share.
        ema: whether an average of the weights is kept.
        batch: shape of a micro batch, such as (m, 3, height, width).
        batch_dtype: of the micro batch; None is that of the weights.
        offload: "none", "optimizer" or "all", as ZeRO-Offload lays them out in DeepSpeed.
        accumulation: micro batches of a step.
        states: what the optimizer keeps of each element, such as Adam's two averages.
        bucket_bytes: that the device sets aside for reduction buckets; 0 where memory is taken only as it is written
            to, as on a CPU.
    """
    passes = measure_activations(model, dtype, batch, batch_dtype)
    memory = memory_of(
        parameters(model),
        passes,
        dtype,
        grad_dtype,
        stage,
        world_size,
        ema,
        offload,
        accumulation,
        states,
        bucket_bytes,
    )
    memory = dataclasses.replace(memory, host=memory.host + passes.host)
    return with_fixed(memory, fixed_parameters(model), dtype, stage, world_size, ema, offload)


def memory_of(
    count: int,
    passes: Activations,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    stage: int,
    world_size: int,
    ema: bool,
    offload: str = "none",
    accumulation: int = 1,
    states: int = 2,
    bucket_bytes: int = 0,
) -> Memory:
    """Return the memory of a model of `count` parameters from its activations; see `predict_memory`."""

    def share(from_stage: int) -> int:
        return -(-count // world_size) if stage >= from_stage else count

    weights, gradients = share(3) * dtype.itemsize, share(2) * grad_dtype.itemsize
    gathered = count * dtype.itemsize if stage == 3 else 0
    working = _working(count, passes, dtype, grad_dtype, stage, share(1), accumulation, bucket_bytes)
    if offload == "none":
        master_bytes = 4 * states + 4 * ema + (4 if dtype != torch.float32 or stage else 0)
        return Memory(weights + gathered, gradients, share(1) * master_bytes, passes.kept, working)
    held = share(1) * (4 + 4 * states + 4 + 4 * ema)  # master, states, the gradient that is taken, average
    if stage == 3:  # gradients accumulate in host memory
        on_device = 0 if offload == "all" else weights
        host = held + gradients + weights - on_device
        return Memory(on_device + gathered, 0, 0, passes.kept, working, host)
    # Through a buffer of low precision the weights go back. Micro batches are added up in host memory, but for stage 1,
    # which waits for the last one, and for gradients that accumulate in fp32 besides weights of low precision.
    summed = accumulation > 1 and stage == 2 and grad_dtype == dtype
    host = held + share(1) * dtype.itemsize * (1 + summed)
    on_device = gradients if stage == 1 or grad_dtype != dtype else 0
    return Memory(weights, on_device, 0, passes.kept, working, host)


def with_fixed(
    memory: Memory, fixed: int, dtype: torch.dtype, stage: int, world_size: int, ema: bool, offload: str = "none"
) -> Memory:
    """Return a rank's memory with that of `fixed` parameters that do not train besides those that do.

    Rank 0 has the most: for checkpoints it keeps them in fp32, where the weights are of low precision or cut by ZeRO-3,
    and their average.
    """
    part = -(-fixed // world_size) * dtype.itemsize
    host = part if stage == 3 and offload == "all" else 0
    weights = part - host + fixed * dtype.itemsize if stage == 3 else fixed * dtype.itemsize
    copies = 4 * fixed * ((stage == 3 or dtype != torch.float32) + ema)
    return dataclasses.replace(
        memory, parameters=memory.parameters + weights, masters=memory.masters + copies, host=memory.host + host
    )


def _working(
    count: int,
    passes: Activations,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    stage: int,
    part: int,
    accumulation: int,
    bucket_bytes: int,
) -> int:
    """Return the most that activations and gradients take together (DeepSpeed 0.19.8, read and measured).

    Stage 0 keeps whole gradients, and writes into them again; stage 1 keeps them until the last micro batch; stages 2
    and 3 reduce those of each micro batch into a part, which is there all the time. A reduction takes whole gradients,
    and a flat copy of them.
    """
    fresh = count * dtype.itemsize
    whole = stage == 0 or (stage == 1 and accumulation > 1)
    summed = count * grad_dtype.itemsize if stage == 1 and grad_dtype != dtype else fresh
    backward = summed + passes.added if whole else passes.peak
    kept = part * grad_dtype.itemsize if stage else 0
    if stage == 3 and not bucket_bytes:  # its bucket stays, as far as it was ever filled
        kept += fresh
    update = count * 4 if stage == 0 and dtype != torch.float32 else fresh
    return max(backward, summed + update) + kept + bucket_bytes


class _ForwardBackward(nn.Module):
    """Both passes in one call: recomputed activations need the fake weights in the backward pass as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor, alive: _Alive) -> int:
        """Return what is alive between the passes."""
        own = getattr(self.model, "measured_loss", None)
        loss = self.model(batch).float().sum() if own is None else own(self.model(batch), batch)
        kept = alive.now
        loss.backward()
        return kept


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, each once, until they are freed.

    Attributes:
        now: bytes alive.
        most: the largest that `now` has been.
        most_unsettled: the same without gradients of weights that were whole by then.
        host: all that went to host memory.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.most_unsettled = self.host = self._settled = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def settle(self, weight: torch.Tensor) -> None:
        """Take note that the gradient of a weight is whole."""
        assert weight.grad is not None
        self._settled += weight.grad.untyped_storage().nbytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                self.host += leaf.numel() * leaf.itemsize
            elif isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
        self.most_unsettled = max(self.most_unsettled, self.now - self._settled)
