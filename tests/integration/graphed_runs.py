"""Runs whose graphs have the memory of CUDA graphs, for test_graphed.py: `python -m tests.integration.graphed_runs`.

Words: DATA OUT, and keys of the config. Prints what happened in that memory, and whether the losses are those of the
same graphs without it, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import unittest.mock
from pathlib import Path

import torch

import setformer
from launch.testing.commands import SHORT, losses
from setformer_dist.engine import compiled
from tests.graph_memory import graph_memory

LENGTH = ("~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=8", "eval.every_steps=2",
          "checkpoint.every_steps=4", "batch.global_size=16", "batch.micro=8", "model.drop_path=0.3")  # fmt: skip


def run(data: str, out: str, name: str, keys: list[str]) -> list[int]:
    """Train in two pieces, and return how many graphs were there at the end of each."""
    torch._dynamo.reset()
    at = {"data": {"root": Path(data)}, "run": {"out": out, "name": name}}
    config = setformer.load_config("demo", *SHORT, *LENGTH, "compile.cudagraphs=true", *keys, **at)
    seen = []
    with setformer.Training(config) as training:
        for steps in (5, 3):
            training.train(steps=steps)
            seen.append(compiled.BACKEND.memory.recorded if name == "graphs" else 0)  # type: ignore[attr-defined]
    return seen


def main(data: str, out: str, *keys: str) -> None:
    """Run with that memory and without."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch("launch.run.compiled.check_compile"))  # there is no GPU
        with graph_memory() as memory:
            seen = run(data, out, "graphs", list(keys))
        stack.enter_context(unittest.mock.patch.object(compiled, "BACKEND", "aot_eager"))
        run(data, out, "plain", list(keys))
    found, expected = (losses(Path(out) / name) for name in ("graphs", "plain"))
    print(json.dumps({"same": found == expected, "losses": len(found), "seen": seen, "moved": memory.moved}))


if __name__ == "__main__":
    main(*sys.argv[1:])
