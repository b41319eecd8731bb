"""What a model costs, measured on fake tensors: real operators, no memory, no arithmetic, a second or two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def multiply_adds(model: nn.Module, height: int, width: int) -> int:
    """Return the multiply-adds of one image's forward pass: matrix products and convolutions."""
    return multiply_adds_of(model, (3, height, width))


def multiply_adds_of(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return the multiply-adds of one sample's forward pass.

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
        parameters: weights the model computes with.
        gradients: as they accumulate.
        masters: fp32 masters (beside the weights, where these are of low precision), the optimizer's states, EMA.
        activations: kept for the backward pass of one micro batch.
        host: what offload keeps in host memory instead, and the fp32 gradients that Adam takes there.
    """

    parameters: int
    gradients: int
    masters: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.parameters + self.gradients + self.masters + self.activations


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
) -> Memory:
    """Predict a rank's memory under ZeRO (Rajbhandari et al. 2020, section 3).

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
    """
    count = parameters(model)

    def share(from_stage: int) -> int:
        return -(-count // world_size) if stage >= from_stage else count

    activations = _saved_bytes(model, dtype, batch, batch_dtype or dtype)
    weights, gradients = share(3) * dtype.itemsize, share(2) * grad_dtype.itemsize
    if offload == "none":
        master_bytes = 4 * states + 4 * ema + (4 if dtype != torch.float32 or stage in (1, 2) else 0)
        return Memory(weights, gradients, share(1) * master_bytes, activations)
    held = share(1) * (4 + 4 * states + 4 + 4 * ema)  # master, states, the gradient that is taken, average
    if stage == 3:  # gradients accumulate in host memory
        on_device = 0 if offload == "all" else weights
        return Memory(on_device, 0, 0, activations, held + gradients + weights - on_device)
    # Through a buffer of low precision the weights go back. Micro batches are added up in host memory, but for stage 1,
    # which waits for the last one, and for gradients that accumulate in fp32 beside weights of low precision.
    summed = accumulation > 1 and stage == 2 and grad_dtype == dtype
    host = held + share(1) * dtype.itemsize * (1 + summed)
    on_device = gradients if stage == 1 or grad_dtype != dtype else 0
    return Memory(weights, on_device, 0, activations, host)


def _saved_bytes(model: nn.Module, dtype: torch.dtype, batch: tuple[int, ...], batch_dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps from one forward pass, each storage once, weights left out."""
    mode = FakeTensorMode()
    fakes = _fake_weights(model, mode, dtype)
    weights = {fake.untyped_storage()._cdata for fake in fakes.values()}
    was_training = model.training
    model.train()
    with mode, _saved_storages() as kept:
        out = torch.func.functional_call(model, fakes, (torch.ones(batch, dtype=batch_dtype),))
        total = sum(size for key, (size, _) in kept.items() if key not in weights)
        del out
    model.train(was_training)
    return total


@contextmanager
def _saved_storages() -> Iterator[dict[int, tuple[int, torch.UntypedStorage]]]:
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
