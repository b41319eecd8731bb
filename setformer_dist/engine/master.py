"""Every ZeRO stage seen as fragments: for each parameter, the elements of master and states this rank holds.

    stage 0, fp32        the parameters themselves, whole on every rank
    stage 0, bf16/fp16   whole fp32 masters next to them (DeepSpeed's FP16_UnfusedOptimizer)
    stages 1 and 2       param._hp_mapping: an address within a flat partition per parameter group
    stage 3              each parameter's own partition; rank r holds [r·p, (r+1)·p), zero-padded at the end

With zero.offload the same tensors lie in host memory. Parameters that do not train are whole, on rank 0.

Checkpoints, the EMA, and later overwrites of references are loops over these. This file and offload.py are the
only ones that know how DeepSpeed lays out memory (written against 0.19.8).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.fragments import Fragment
from setformer_dist.engine.deepspeed_engine import ScalarsAsBytes
from setformer_dist.engine.lamb import Lamb, Part
from setformer_dist.engine.optim import kind_of
from setformer_dist.engine.protocol import Engine

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Layout(Protocol):
    def views(self, state: str) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        """Yield (parameter, start, live 1-D view of what this rank holds of `state`)."""
        ...

    def refresh(self) -> None:
        """Bring the parameters that compute up to date with the masters."""
        ...


class MasterState:
    """The fp32 masters and optimizer states of a DeepSpeed engine, as live fragments.

    Optimizer states exist from the start on (zeros at step 0), and DeepSpeed's dummy optimizer step at
    stage 0 in low precision, which would leave the optimizer one step ahead and the masters once decayed, is undone.

    Attributes:
        states: names of what the optimizer keeps per element.
        replicated: whether every rank holds all of it.
    """

    def __init__(self, engine: Engine) -> None:
        self._all = [(n, p, p.requires_grad) for n, p in engine.module.named_parameters()]
        self._names = {p: n for n, p, trains in self._all if trains}
        self._shapes = {p: tuple(getattr(p, "ds_shape", p.shape)) for p in self._names}
        optimizer = engine.optimizer
        self._scaler = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
        self._inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        kind = kind_of(self._inner)
        self.states = kind.states
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            _undo_dummy_step(optimizer)
        grouped = [p for group in self._inner.param_groups for p in group["params"]]
        masters = list(getattr(optimizer, "fp32_partitioned_groups_flat", grouped))
        self._create_states(masters, kind.counts)
        self._layout = _layout_of(engine)
        self.replicated = engine.zero_optimization_stage() == 0
        if isinstance(self._inner, Lamb) and not self.replicated:
            self._inner.divide(self._parts(masters), len(self._names), functools.partial(_summed, engine.device))
        self._fixed = _Fixed(engine, self.replicated)

    def fragments(self, *states: str) -> list[Fragment]:
        """Return all that this rank holds of the states ("param", and of `states`), as live views."""
        found = [
            Fragment(self._names[p], state, start, self._shapes[p], view)
            for state in states
            for p, start, view in self._layout.views(state)
            if view.numel()
        ]
        return [*found, *self._fixed.fragments()] if "param" in states else found

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every parameter that trains, by name."""
        return {name: self._shapes[p] for p, name in self._names.items()}

    @property
    def fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every parameter that does not train, by name. Its only state is "param"."""
        return self._fixed.shapes

    def check_trained(self) -> None:
        """Check that the same parameters train as in the beginning: ZeRO has divided those.

        Raises:
            ConfigError: the model or a callback has changed `requires_grad` of one since.
        """
        for name, parameter, trained in self._all:
            if parameter.requires_grad != trained:
                now, then = ("does not train now", "did") if trained else ("trains now", "did not")
                raise ConfigError(
                    f"parameter {name} {now}, and {then} when the run began: set requires_grad where the model is "
                    "made, and begin a new run to change it"
                )

    def refresh(self) -> None:
        """Bring the parameters that compute up to date after masters were written. Collective."""
        self._layout.refresh()
        self._fixed.refresh()

    @property
    def optimizer_steps(self) -> int:
        """Updates the optimizer has made; 0 of one that does not count them."""
        counted = [state["step"] for state in self._inner.state.values() if "step" in state]
        return int(counted[0].item()) if counted else 0

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def loss_scale(self) -> dict[str, float]:
        """Return the state of fp16's loss scaling; what a scaler lacks or has as None is left out."""
        held = {key: getattr(self._scaler, key, None) for key in _SCALER_STATE}
        return {key: value for key, value in held.items() if value is not None}

    def set_loss_scale(self, state: Mapping[str, float | None]) -> None:
        """Put back what `loss_scale` returned, perhaps under another stage, of which some scale and some do not.

        None is what earlier versions wrote for a static scaler's last overflow: it has none.
        """
        for key, value in state.items():
            if key in _SCALER_STATE and value is not None and hasattr(self._scaler, key):
                setattr(self._scaler, key, value)

    def _parts(self, masters: Iterable[torch.Tensor]) -> dict[torch.Tensor, list[Part]]:
        """Return which parts of parameters lie in each flat master."""
        found: dict[torch.Tensor, list[Part]] = {master: [] for master in masters}
        begins = sorted((master.data_ptr(), i) for i, master in enumerate(found) if master.numel())
        number, flat = {p: i for i, p in enumerate(self._names)}, list(found)
        for p, _, view in self._layout.views("param"):
            if view.numel():
                begin, at = begins[bisect.bisect(begins, (view.data_ptr(), len(flat))) - 1]
                part = Part(number[p], (view.data_ptr() - begin) // view.element_size(), view.numel())
                found[flat[at]].append(part)
        return found

    def _create_states(self, masters: Iterable[torch.Tensor], counts: bool) -> None:
        fused = bool(self._inner.defaults.get("fused"))  # then the count is next to the weights
        for p in masters:
            if p.numel() and not self._inner.state.get(p):
                step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
                zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in self.states}
                self._inner.state[p] = {**({"step": step} if counts else {}), **zeros}


def _summed(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, where the tensor is. Collective."""
    moved = values.to(device)
    comm.all_reduce(moved)
    return moved.to(values.device)


def _undo_dummy_step(optimizer: FP16_UnfusedOptimizer) -> None:
    """Undo the zero-gradient step of initialize_optimizer_states: drop its states, take the masters again."""
    optimizer.optimizer.state.clear()
    optimizer.refresh_fp32_params()


def _layout_of(engine: Engine) -> _Layout:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _Stage3(engine)
    if stage in (1, 2):
        return _Stage12(engine)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return _Stage0LowPrecision(engine.optimizer)
    return _Stage0(engine)


class _Fixed:
    """Parameters that do not train. DeepSpeed keeps no masters of them; rank 0 does, and all ranks where each has all.

    They are part of what was trained: a checkpoint without them is worth nothing to who has lost them.
    """

    def __init__(self, engine: Engine, replicated: bool) -> None:
        found = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
        self._parameters: list[Any] = [p for _, p in found]
        self._sharded = any(hasattr(p, "ds_shape") for p in self._parameters)
        self._sent = not replicated
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in found}
        self._masters: list[torch.Tensor] = []
        with self._whole():
            if replicated or comm.get_rank() == 0:
                # In fp32 the weight itself, but for ZeRO-3, where it is whole within this block alone.
                weights = [p.data.clone() if self._sharded else p.data for p in self._parameters]
                self._masters = [weight.float() for weight in weights]

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, "param", 0, shape, master.view(-1))
            for (name, shape), master in zip(self.shapes.items(), self._masters, strict=bool(self._masters))
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        with self._whole():
            for p, master in zip(self._parameters, self._masters, strict=bool(self._masters)):
                p.data.copy_(master)
        if self._sent and not self._sharded:
            for p in self._parameters:
                comm.broadcast(p.data, 0)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Have ZeRO-3's parameters whole for a while; what rank 0 writes into them stays."""
        if not self._sharded:
            yield
            return
        with ScalarsAsBytes(), deepspeed.zero.GatheredParameters(self._parameters, modifier_rank=0):
            yield


class _Stage0:
    def __init__(self, engine: Engine) -> None:
        self._optimizer = engine.optimizer

    def views(self, state: str) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                tensor = p.data if state == "param" else self._optimizer.state[p][state]
                yield p, 0, tensor.view(-1)

    def refresh(self) -> None:
        """Nothing: the parameters are the masters."""


class _Stage0LowPrecision:
    def __init__(self, optimizer: FP16_UnfusedOptimizer) -> None:
        self._optimizer = optimizer

    def views(self, state: str) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        for low_group, master_group in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
            for low, master in zip(low_group, master_group, strict=True):
                tensor = master.data if state == "param" else self._optimizer.optimizer.state[master][state]
                yield low, 0, tensor.view(-1)

    def refresh(self) -> None:
        for low_group, master_group in zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True):
            for low, master in zip(low_group, master_group, strict=True):
                low.data.copy_(master.data)


class _Stage12:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer

    def views(self, state: str) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        for p in self._engine.module.parameters():
            mapping = getattr(p, "_hp_mapping", None)
            if mapping is None:  # this parameter lies wholly in other ranks' partitions
                continue
            flat = self._optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
            tensor = flat.data if state == "param" else self._optimizer.optimizer.state[flat][state]
            address = mapping.hp_fragment_address
            yield p, mapping.lp_fragment_address.start, tensor.narrow(0, address.start, address.numel)

    def refresh(self) -> None:
        self._optimizer.update_lp_params()


class _Stage3:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer

    def views(self, state: str) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        p: Any  # a parameter with what ZeRO-3 adds to it
        for p in self._engine.module.parameters():
            if not p.requires_grad:
                continue
            partition = p.ds_tensor.ds_numel
            start = self._optimizer._get_param_partition_rank(p) * partition
            real = max(0, min(partition, p.ds_numel - start))
            if not real:  # all padding here
                continue
            # Not safe_get_local_fp32_param: of a master in host memory it returns a copy on the device.
            key = None if state == "param" else state
            held, _ = self._optimizer._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=key)
            yield p, start, held.data.view(-1)[:real]

    def refresh(self) -> None:
        self._optimizer._partition_all_parameters()
        for sub_group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if self._optimizer.persistent_parameters:
            self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)
