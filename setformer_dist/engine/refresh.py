"""Reference sets set by K-means, as a phase of the run: what is sampled when, what is computed, and where it goes.

    sampled steps    each forward pass offers its tokens; those with the lowest keys stay, the same on all ranks
                     (`ops.reservoir`)
    after the last   new sets (`ops.refit`), written into masters, weights, states and average through the fragments of
                     `master.py`, so that every ZeRO stage and offload is alike; then evaluation and checkpoint

Which steps, which tokens, and what K-means makes of them are functions of the config, the seed and the features. So a
run that is killed anywhere and resumes, on any number of ranks, goes on as if nothing had been: the sample so far is
part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.fragments import KEPT, Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.seeding import Purpose, torch_seed
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import TensorSums, TorchCollectives
from setformer_dist.engine.config import RefreshConfig
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.ops.refit import Layer, Problem, figures, refit
from setformer_dist.ops.reservoir import Sample, lowest, token_keys, union

log = logging.getLogger(__name__)

Take = Callable[[str, torch.Tensor, torch.Tensor | None], None]
_MOMENTUM = ("exp_avg", "momentum_buffer")


class Refitter(Protocol):
    """Computes new sets from a problem, here and now or elsewhere meanwhile. Every method is collective."""

    def begin(self, step: int, problem: Problem) -> None:
        """Take a problem, the same on all ranks, for the refresh after `step` optimizer steps."""
        ...

    def finish(self, step: int) -> dict[str, torch.Tensor] | str:
        """Return the new sets, the same on all ranks, by the name of their parameters; or why there are none."""
        ...


class InJob:
    """The ranks of the run compute the new sets together, on their devices.

    Args:
        ranks: this process's place.
        device: of this rank.
    """

    def __init__(self, ranks: RankInfo, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._problem: Problem | None = None

    def begin(self, step: int, problem: Problem) -> None:
        """Keep the problem for `finish`."""
        self._problem = problem

    def finish(self, step: int) -> dict[str, torch.Tensor] | str:
        """Compute the new sets."""
        problem, self._problem = self._problem, None
        assert problem is not None
        here = problem.to(self._device)
        new = refit(here, TensorSums(), self._ranks.rank, self._ranks.world_size)
        return {name: vectors.cpu() for name, vectors in new.items()}


class Refresh:
    """The refreshes of a run on one rank.

    Args:
        config: of the refreshes.
        layers: the model's SeT attention layers.
        watched: opens a context in which forward passes offer their tokens.
        master: the weights and states.
        ema: their average.
        comm: of all ranks.
        plan: where each rank's samples stand in the global batch.
        refitter: computes the new sets.
        device: of this rank, for the figures.
        seed: of the run.
        total_steps: of the run.

    Raises:
        ConfigError: a refresh is due where the run has no step, or a set has more references than there are samples.
    """

    def __init__(
        self,
        config: RefreshConfig,
        layers: tuple[Layer, ...],
        watched: Callable[[Take], AbstractContextManager[None]],
        master: MasterState,
        ema: Ema | None,
        comm: TorchCollectives,
        plan: BatchPlan,
        refitter: Refitter,
        device: torch.device,
        seed: int,
        total_steps: int,
    ) -> None:
        self._config, self._layers, self._watched = config, layers, watched
        self._master, self._ema, self._comm, self._plan = master, ema, comm, plan
        self._refitter, self._device, self._seed, self._total_steps = refitter, device, seed, total_steps
        self._held: dict[str, Sample] = {}  # of all ranks, on the CPU, the same everywhere
        self._new: dict[str, Sample] = {}  # of this rank and this step, on its device
        self._widths = {layer.name: layer.heads * layer.width for layer in layers}
        check_possible(config, layers, total_steps)
        self._forget()

    # Sampling.

    def watching(self, step: int, index: int, batch: MicroBatch) -> AbstractContextManager[None]:
        """Return a context for the forward pass of a micro batch, the `index`-th of this rank's in step `step`."""
        if not self._config.samples_at(step, self._total_steps):
            return contextlib.nullcontext()
        ranks, m = self._comm.ranks, len(batch.sample_ids)
        group = ranks.rank // self._plan.sequence
        first = (index * self._plan.groups + group) * self._plan.micro
        keys = functools.cache(functools.partial(self._keys, step, torch.arange(first, first + m)))
        return self._watched(lambda name, x, mask: self._take(name, x, mask, keys))

    def _keys(self, step: int, places_m: torch.Tensor, b: int, n: int, device: torch.device) -> torch.Tensor:
        # Of ranks that share an image each is offered the tokens of its own part, in the order of the whole.
        part, whole = self._comm.ranks.rank % self._plan.sequence, n * self._plan.sequence
        keys = token_keys(torch_seed(Purpose.REFRESH, self._seed, step), places_m.to(device), b, whole)
        return keys[:, part * n : (part + 1) * n]

    @torch.no_grad()
    def _take(
        self, name: str, x_bhnd: torch.Tensor, mask_bn: torch.Tensor | None, keys: Callable[..., torch.Tensor]
    ) -> None:
        limit = self._config.samples
        bound = min(self._held[name].bound(limit), self._new[name].bound(limit) if name in self._new else _FREE)
        found = lowest(x_bhnd, keys(x_bhnd.shape[0], x_bhnd.shape[2], x_bhnd.device), mask_bn, bound, limit)
        self._new[name] = self._new[name].joined(found, limit) if name in self._new else found

    def after_update(self, step: int) -> None:
        """Bring together what all ranks sampled in optimizer step `step` (0-based). Collective."""
        if not self._config.samples_at(step, self._total_steps):
            return
        ranks, sums = self._comm.ranks, self._comm.tensors
        for name, held in self._held.items():
            new = self._new.get(name, Sample.empty(self._widths[name]))
            self._held[name] = union(held, new, self._config.samples, sums, ranks.rank, ranks.world_size)
        self._new.clear()

    # Refreshing.

    def due(self, step: int) -> bool:
        """Return whether there is a refresh after so many optimizer steps."""
        return self._config.due(step, self._total_steps)

    def apply(self, step: int) -> dict[str, Any]:
        """Set the sets, after so many optimizer steps. Collective.

        Returns:
            What was done, for metrics.jsonl; on rank 0 with the figures.
        """
        started = time.perf_counter()
        problem = Problem(
            layers=self._layers,
            samples=dict(self._held),
            present=self._present(),
            sets=self._config.sets,
            start=self._config.start,
            iterations=self._config.iterations,
            seed=torch_seed(Purpose.REFRESH, self._seed, step, -1),
        )
        self._forget()
        new: dict[str, torch.Tensor] | str = problem.too_few()
        if not new:
            self._refitter.begin(step, problem)
            new = self._refitter.finish(step)
        values: dict[str, Any] = {"samples": min(map(len, problem.samples.values()))}
        if isinstance(new, str):
            log.warning("no refresh of the references at step %d: %s", step, new)
            return {**values, "skipped": new}
        self._write(new, problem.present)
        if self._comm.ranks.is_main:
            values |= figures(problem.to(self._device), {n: vectors.to(self._device) for n, vectors in new.items()})
        return {**values, "seconds": time.perf_counter() - started}

    def _present(self) -> dict[str, torch.Tensor]:
        """Return all sets whole, from the ranks' fragments of the masters, on the CPU. Collective."""
        shapes = {layer.parameter(kind): shape for layer in self._layers for kind, shape in layer.shapes.items()}
        whole = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
        if self._comm.ranks.is_main or not self._master.replicated:
            for f in self._master.fragments("param"):
                if f.name in whole:
                    whole[f.name].view(-1)[f.start : f.end] = f.tensor.detach().cpu().view(torch.int32)
        # Of each element one rank has the bits, all others zero.
        bits = self._comm.tensors.sum(torch.cat([part.view(-1) for part in whole.values()]))
        parts = torch.split(bits, [part.numel() for part in whole.values()])
        return {name: part.view(torch.float32).view(shapes[name]) for name, part in zip(whole, parts, strict=True)}

    @torch.no_grad()
    def _write(self, new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> None:
        """Write new sets into all that holds something of them. Collective."""
        moved = {name: (vectors != old[name]).any(-1, keepdim=True) for name, vectors in new.items()}
        flat = {name: moved[name].expand_as(vectors).flatten() for name, vectors in new.items()}
        zeroed = {"momentum": _MOMENTUM, "all": tuple(self._master.states), "keep": ()}[self._config.optimizer]
        states = [state for state in self._master.states if state in zeroed]
        for f in self._master.fragments("param", *states):
            if f.name in new:
                _put(f, torch.zeros_like(new[f.name]) if f.state != "param" else new[f.name], flat[f.name])
        if self._ema is not None and self._config.ema == "follow":
            for f in self._ema.fragments():
                if f.name in new:
                    _put(f, new[f.name], flat[f.name])
        self._master.refresh()

    # Checkpoints.

    def _forget(self) -> None:
        self._held = {layer.name: Sample.empty(self._widths[layer.name]) for layer in self._layers}
        self._new = {}

    def state(self) -> dict[str, Any]:
        """Return what trainer.json holds of the sample: how many tokens of each layer; {} where there are none."""
        rows = {name: len(sample) for name, sample in self._held.items() if len(sample)}
        return {"rows": rows} if rows else {}

    def take_back(self, state: Mapping[str, Any], step: int) -> list[Fragment]:
        """Make room for the sample of a checkpoint; return what is to be filled.

        Args:
            state: what `state` returned.
            step: optimizer steps done, as this run counts them. Where another batch has moved the count to a place at
                which nothing is being sampled, the sample is dropped.

        Raises:
            CheckpointError: it is of another model or config.
        """
        self._forget()
        if not self._config.samples_at(step - 1, self._total_steps):
            return []
        for name, rows in state.get("rows", {}).items():
            if name not in self._widths or not 0 < rows <= self._config.samples:
                raise CheckpointError(
                    f"the checkpoint has a sample of {rows} tokens of {name!r}, which this run cannot have: use the "
                    "config that it was written with"
                )
            self._held[name] = Sample.empty(self._widths[name], rows)
        return self._fragments()

    def share(self) -> list[Fragment]:
        """Return this rank's part of the sample for a checkpoint: all of it where every rank holds all weights."""
        fragments = self._fragments()
        if self._master.replicated:
            return fragments
        rank, world_size = self._comm.ranks.rank, self._comm.ranks.world_size
        parts = []
        for f in fragments:
            first, last = (f.full_numel * at // world_size for at in (rank, rank + 1))
            parts.append(Fragment(f.name, f.state, first, f.shape, f.tensor[first:last]))
        return parts

    def _fragments(self) -> list[Fragment]:
        found = []
        for name, sample in self._held.items():
            for what, tensor in {"keys": sample.keys_r, "tokens": sample.tokens_rc}.items() if len(sample) else ():
                found.append(
                    Fragment(f"{KEPT}refresh/{what}/{name}", "sample", 0, tuple(tensor.shape), tensor.view(-1))
                )
        return found


_FREE = torch.iinfo(torch.int64).max


def _put(fragment: Fragment, whole: torch.Tensor, where: torch.Tensor) -> None:
    """Write the elements of a whole parameter that moved into a fragment of it."""
    device, part = fragment.tensor.device, slice(fragment.start, fragment.end)
    mine = torch.where(where[part].to(device), whole.view(-1)[part].to(device), fragment.tensor.detach())
    fragment.tensor.data.copy_(mine)


def check_possible(config: RefreshConfig, layers: tuple[Layer, ...], total_steps: int) -> None:
    """Refuse refreshes that this run cannot have.

    Raises:
        ConfigError: one is due where the run has no step, or a set has more references than there are samples.
    """
    if config.at_steps and config.at_steps[-1] >= total_steps:
        raise ConfigError(
            f"refresh.at_steps has {config.at_steps[-1]}, and the run has {total_steps} steps: a refresh comes before "
            "the last of them"
        )
    for layer in layers:
        for kind in config.sets:
            if kind in layer.shapes and layer.shapes[kind][1] > config.samples:
                raise ConfigError(
                    f"refresh.samples = {config.samples} tokens are fewer than the {layer.shapes[kind][1]} "
                    f"{kind.replace('_', ' ')} of {layer.name}: raise it to some hundred for each"
                )
