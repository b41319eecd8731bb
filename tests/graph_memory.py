"""CUDA graphs' memory on a CPU: a backend whose results die when torch's trees of CUDA graphs let them.

Follows `torch._inductor.cudagraph_trees`. Graphs that are called one after the other make a path of a tree. A graph
takes results of the path, weights and other attributes of modules where they lie; all else is copied. When a micro
batch begins, the path ends with the next call, and what is left of its results is overwritten: here all bits are set,
NaN in any floating dtype. Without that a path ends where nothing of it is alive. The first path with a graph runs
without recordings, to warm up. A graph is recorded again where an input that it takes where it lies has moved, and
where something lives that was dead when it was recorded.

A replay differs in one way: its results lie where they did before. Here each call makes new ones.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.multiprocessing.reductions import StorageWeakRef

from setformer_dist.engine import compiled


@dataclasses.dataclass
class Recording:
    """A graph at one place of the tree.

    Attributes:
        static: addresses of the inputs that must not move, by their number.
        managed: inputs that are results of the path: their number, and where in the path they were made.
        dead: results of the path that were dead when it was recorded.
    """

    static: dict[int, int]
    managed: dict[int, tuple[int, int]]
    dead: set[tuple[int, int]]
    children: dict[int, list[Recording]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))


class GraphMemory:
    """The tree, and what happened.

    Attributes:
        recorded: graphs, each place of the tree once and again where that was necessary.
        moved: recordings that were necessary because weights or other attributes of modules had moved.
        overwritten: results that were alive when their memory was given to the next micro batch.
    """

    def __init__(self) -> None:
        self.recorded = self.moved = self.overwritten = 0
        self._functions = 0
        self._roots: dict[int, list[Recording]] = collections.defaultdict(list)
        self._node: Recording | None = None
        self._path: list[list[StorageWeakRef | None]] = []
        self._begun = False
        self._warm: set[int] = set()
        self._warming = False

    def begin(self) -> None:
        """A micro batch begins."""
        self._begun = True

    def compiler(self, backward: bool) -> Callable[[torch.fx.GraphModule, Sequence[Any]], Any]:
        """Return what makes graphs of one kind."""

        def made(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            metadata = TracingContext.get().fw_metadata
            assert metadata is not None
            assert not any(info.mutates_data for info in metadata.input_info), "torch would leave this graph out"
            if backward:  # as in compile_fx: what the forward pass has saved
                names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
                static = [i for i, name in enumerate(names) if "tangents" not in name]
            else:
                static = list(metadata.static_input_indices or [])
            number, self._functions = self._functions, self._functions + 1
            function = make_boxed_func(module.forward)

            def run(boxed: list[Any]) -> Any:
                return self._run(number, function, boxed, static)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return made

    @torch.no_grad()
    def _run(self, number: int, function: Callable[[list[Any]], Any], boxed: list[Any], static: list[int]) -> Any:
        if self._begun:
            self._begun = False
            self._overwrite()
            self._end()
        elif self._path and not any(map(_alive, self._results())):
            self._end()
        inputs = list(boxed)
        boxed.clear()
        managed = {i: place for i, t in enumerate(inputs) if (place := self._place(t)) is not None}
        addresses = {i: inputs[i].data_ptr() for i in static if i not in managed and _is_tensor(inputs[i])}
        self._warming |= number not in self._warm
        self._warm.add(number)
        if not self._warming:
            self._node = self._at(number, addresses, managed)
        taken_as_they_are = {*static, *managed}
        kept = [t.clone() if _is_tensor(t) and i not in taken_as_they_are else t for i, t in enumerate(inputs)]
        fixed = {t.untyped_storage()._cdata for i, t in enumerate(inputs) if i in addresses}
        del inputs
        results = function(kept)
        fresh = [t if _is_tensor(t) and t.untyped_storage()._cdata not in fixed else None for t in results]
        self._path.append([
            None if t is None or self._place(t) is not None else StorageWeakRef(t.untyped_storage()) for t in fresh
        ])  # fmt: skip
        return results

    def _at(self, number: int, static: dict[int, int], managed: dict[int, tuple[int, int]]) -> Recording:
        """Return the recording for this call, which may be a new one."""
        known = (self._roots if self._node is None else self._node.children)[number]
        for one in known:
            if one.managed == managed and not any(self._lives(place) for place in one.dead) and one.static == static:
                return one
        self.moved += any(one.managed == managed and one.static != static for one in known)
        dead = {(i, j) for i, level in enumerate(self._path) for j, _ in enumerate(level) if not self._lives((i, j))}
        known.append(Recording(static, managed, dead))
        self.recorded += 1
        return known[-1]

    def _lives(self, place: tuple[int, int]) -> bool:
        return _alive(self._path[place[0]][place[1]])

    def _place(self, tensor: object) -> tuple[int, int] | None:
        """Return where in the path a tensor was made."""
        if not isinstance(tensor, torch.Tensor):
            return None
        storage = tensor.untyped_storage()._cdata
        for i, level in enumerate(self._path):
            for j, reference in enumerate(level):
                if reference is not None and reference.cdata == storage and not reference.expired():
                    return i, j
        return None

    def _results(self) -> Iterator[StorageWeakRef | None]:
        for level in self._path:
            yield from level

    def _overwrite(self) -> None:
        for reference in self._results():
            if reference is None or reference.expired():
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                storage.fill_(255)
                self.overwritten += 1

    def _end(self) -> None:
        self._node = None
        self._path = []
        self._warming = False


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _alive(reference: StorageWeakRef | None) -> bool:
    return reference is not None and not reference.expired()


@contextlib.contextmanager
def graph_memory() -> Iterator[GraphMemory]:
    """Let models that are compiled within compute by such graphs."""
    memory = GraphMemory()
    forward = memory.compiler(backward=False)
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=memory.compiler(backward=True),
        inference_compiler=forward,
        partition_fn=min_cut_rematerialization_partition,
    )
    backend.memory = memory  # type: ignore[attr-defined]
    with (
        unittest.mock.patch.object(compiled, "BACKEND", backend),
        unittest.mock.patch.object(torch.compiler, "cudagraph_mark_step_begin", memory.begin),
    ):
        yield memory
