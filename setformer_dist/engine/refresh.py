"""Reference sets set by K-means, as a phase of the run: what is sampled when, what is computed, and where it goes.

    sampled steps    each forward pass offers its tokens; those with the lowest keys stay, the same on all ranks
                     (`ops.reservoir`)
    after the last   the sample and the present sets make a problem, which a `Refitter` solves
    `delay` later    new sets (`ops.refit`), written into masters, weights, states and average through the fragments of
                     `master.py`, so that every ZeRO stage and offload is alike; then evaluation and checkpoint

Which steps, which tokens, and what K-means makes of them are functions of the config, the seed and the features. So a
run that is killed anywhere and resumes, on any number of ranks, goes on as if nothing had been: the sample so far, or
the problem that is not applied yet, is part of the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.fragments import KEPT, Fragment
from setformer_dist.core.seeding import Purpose, torch_seed
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.config import RefreshConfig
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.refitter import Refitter, united
from setformer_dist.ops.refit import Layer, Problem
from setformer_dist.ops.reservoir import Sample, lowest, token_keys, union

log = logging.getLogger(__name__)

Take = Callable[[str, torch.Tensor, torch.Tensor | None], None]
_MOMENTUM = ("exp_avg", "momentum_buffer")


@dataclass(frozen=True)
class _Pending:
    """A problem whose solution is applied later.

    Attributes:
        step: optimizer steps done when it was made.
    """

    step: int
    problem: Problem


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
        seed: int,
        total_steps: int,
    ) -> None:
        self._config, self._layers, self._watched = config, layers, watched
        self._master, self._ema, self._comm, self._plan = master, ema, comm, plan
        self._refitter, self._seed, self._total_steps = refitter, seed, total_steps
        self._held: dict[str, Sample] = {}  # of all ranks, on the CPU, the same everywhere
        self._new: dict[str, Sample] = {}  # of this rank and this step, on its device
        self._pending: _Pending | None = None
        self._widths = {layer.name: layer.heads * layer.width for layer in layers}
        self._shapes = {layer.parameter(kind): shape for layer in layers for kind, shape in layer.shapes.items()}
        check_possible(config, layers, total_steps)
        self._forget()

    # Sampling.

    def watching(self, step: int, index: int, batch: MicroBatch) -> AbstractContextManager[None]:
        """Return a context for the forward pass of a micro batch, the `index`-th of this rank's in step `step`."""
        if not self.sampled(step):
            return contextlib.nullcontext()
        ranks, m = self._comm.ranks, len(batch.sample_ids)
        group = ranks.rank // self._plan.sequence
        first = (index * self._plan.groups + group) * m
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

    def sampled(self, step: int) -> bool:
        """Return whether tokens of optimizer step `step` (0-based) are sampled."""
        return self._config.samples_at(step, self._total_steps)

    def after_update(self, step: int) -> None:
        """Bring together what all ranks sampled in such a step. Collective."""
        ranks, sums = self._comm.ranks, self._comm.tensors
        for name, held in self._held.items():
            new = self._new.get(name, Sample.empty(self._widths[name]))
            self._held[name] = union(held, new, self._config.samples, sums, ranks.rank, ranks.world_size)
        self._new.clear()

    # Refreshing.

    def acts(self, step: int) -> bool:
        """Return whether a refresh begins or is applied after so many optimizer steps."""
        return self.due(step) or self._config.due(step, self._total_steps)

    def begin(self, step: int) -> None:
        """Have new sets computed, where a sample is complete after so many optimizer steps. Collective then."""
        if not self._config.due(step, self._total_steps):
            return
        self._pending = _Pending(step, self._problem(step, dict(self._held), self._present()))
        self._forget()
        self._refit()

    def _problem(self, step: int, samples: dict[str, Sample], present: dict[str, torch.Tensor]) -> Problem:
        return Problem(
            layers=self._layers,
            samples=samples,
            present=present,
            sets=self._config.sets,
            start=self._config.start,
            iterations=self._config.iterations,
            seed=torch_seed(Purpose.REFRESH, self._seed, step, -1),
        )

    def _refit(self) -> None:
        """Give the problem that is pending, if any, to the refitter."""
        if self._pending is not None and not self._pending.problem.too_few():
            self._refitter.begin(self._pending.step, self._pending.problem)

    def due(self, step: int) -> bool:
        """Return whether new sets are to be applied after so many optimizer steps."""
        return self._config.due(step - self._config.delay, self._total_steps)

    def apply(self, step: int) -> dict[str, Any]:
        """Set the sets, after so many optimizer steps. Collective.

        Returns:
            What was done, for metrics.jsonl; on rank 0 with the figures.
        """
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        if pending is None:  # the run has resumed under another count of steps
            return {"sampled": step - self._config.delay, "samples": 0, "skipped": "no sample of this refresh was kept"}
        problem = pending.problem
        values: dict[str, Any] = {"sampled": pending.step, "samples": min(map(len, problem.samples.values()))}
        why = problem.too_few()
        if not why:
            found = self._refitter.finish(pending.step)
            values |= {"by": found.by, **({"late": found.late} if found.late else {})}
            why = "" if found.sets is not None else found.late
        if why:
            log.warning("no refresh of the references at step %d: %s", step, why)
            return {**values, "skipped": why, "seconds": time.perf_counter() - started}
        assert found.sets is not None
        self._write(found.sets, problem.present)
        return {**values, **found.figures, "seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Let go of who computes."""
        self._refitter.close()

    def _present(self) -> dict[str, torch.Tensor]:
        """Return all sets whole, from the ranks' fragments of the masters, on the CPU. Collective."""
        whole = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in self._shapes.items()}
        if self._comm.ranks.is_main or not self._master.replicated:
            for f in self._master.fragments("param"):
                if f.name in whole:
                    whole[f.name].view(-1)[f.start : f.end] = f.tensor.detach().cpu().view(torch.int32)
        return united(whole, self._comm.tensors)

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
        """Return what trainer.json holds: how many tokens of each layer there are; {} where there are none.

        "pending" is the step of the sample that is not applied yet, and its tokens.
        """
        state: dict[str, Any] = {}
        if rows := _rows(self._held):
            state["rows"] = rows
        if self._pending is not None:
            state["pending"] = {"step": self._pending.step, "rows": _rows(self._pending.problem.samples)}
        return state

    def take_back(self, state: Mapping[str, Any], step: int) -> list[Fragment]:
        """Make room for the samples of a checkpoint; return what is to be filled before `go_on`.

        Args:
            state: what `state` returned.
            step: optimizer steps done, as this run counts them. Where another batch has moved the count to a place at
                which nothing is sampled or pending, that is dropped.

        Raises:
            CheckpointError: they are of another model or config.
        """
        self._forget()
        self._pending = None
        if self._config.samples_at(step - 1, self._total_steps):
            self._held |= self._room(state.get("rows", {}))
        made = state.get("pending", {"step": step})
        if made["step"] <= step < made["step"] + self._config.delay and self._config.due(
            made["step"], self._total_steps
        ):
            samples = {name: Sample.empty(width) for name, width in self._widths.items()} | self._room(made["rows"])
            present = {name: torch.zeros(shape) for name, shape in self._shapes.items()}
            self._pending = _Pending(made["step"], self._problem(made["step"], samples, present))
        return self._fragments()

    def _room(self, rows: Mapping[str, int]) -> dict[str, Sample]:
        for name, count in rows.items():
            if name not in self._widths or not 0 < count <= self._config.samples:
                raise CheckpointError(
                    f"the checkpoint has a sample of {count} tokens of {name!r}, which this run cannot have: use the "
                    "config that it was written with"
                )
        return {name: Sample.empty(self._widths[name], count) for name, count in rows.items()}

    def go_on(self) -> None:
        """Have the problem of a checkpoint solved, once all that `take_back` has made room for is filled."""
        self._refit()

    def share(self) -> list[Fragment]:
        """Return this rank's part of what a checkpoint holds: all of it where every rank holds all weights."""
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
        kept = _tensors(self._held)
        if self._pending is not None:
            problem = self._pending.problem
            kept |= {f"pending/{name}": tensor for name, tensor in _tensors(problem.samples).items()}
            kept |= {f"pending/present/{name}": vectors for name, vectors in problem.present.items()}
        return [Fragment(f"{KEPT}refresh/{name}", "sample", 0, tuple(t.shape), t.view(-1)) for name, t in kept.items()]


def _rows(samples: Mapping[str, Sample]) -> dict[str, int]:
    return {name: len(sample) for name, sample in samples.items() if len(sample)}


def _tensors(samples: Mapping[str, Sample]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in _rows(samples):
        found |= {f"keys/{name}": samples[name].keys_r, f"tokens/{name}": samples[name].tokens_rc}
    return found


_FREE = torch.iinfo(torch.int64).max


def _put(fragment: Fragment, whole: torch.Tensor, where: torch.Tensor) -> None:
    """Write the elements of a whole parameter that moved into a fragment of it."""
    device, part = fragment.tensor.device, slice(fragment.start, fragment.end)
    mine = torch.where(where[part].to(device), whole.view(-1)[part].to(device), fragment.tensor.detach())
    fragment.tensor.data.copy_(mine)


def check_possible(config: RefreshConfig, layers: tuple[Layer, ...], total_steps: int) -> None:
    """Refuse refreshes that this run cannot have, and say where it has none.

    Raises:
        ConfigError: one is due where the run has no step, or a set has more references than there are samples.
    """
    if config.at_steps and config.at_steps[-1] + config.delay >= total_steps:
        later = f", {config.delay} steps of delay come after it" if config.delay else ""
        raise ConfigError(
            f"refresh.at_steps has {config.at_steps[-1]}{later}, and the run has {total_steps} steps: a refresh comes "
            "before the last of them"
        )
    if config.every and not config.at_steps and config.every + config.delay >= total_steps:
        log.warning(
            "refresh.every = %d is too long for a run of %d steps: it has no refresh", config.every, total_steps
        )  # no error: a config is often tried with fewer steps
    for layer in layers:
        for kind in config.sets:
            if kind in layer.shapes and layer.shapes[kind][1] > config.samples:
                raise ConfigError(
                    f"refresh.samples = {config.samples} tokens are fewer than the {layer.shapes[kind][1]} "
                    f"{kind.replace('_', ' ')} of {layer.name}: raise it to some hundred for each"
                )
