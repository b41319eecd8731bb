"""Problems and solutions of `refit.py` as bytes, for processes that solve them elsewhere: safetensors, no pickle.

    problem     tensors keys/LAYER, tokens/LAYER and present/PARAMETER; all else as JSON in the header
    solution    the new sets by the names of their parameters; what they do (`refit.figures`) as JSON in the header

Equal problems are equal bytes, so that their digest names them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from setformer_dist.ops.refit import Layer, Problem, figures, refit
from setformer_dist.ops.reservoir import Sample
from setformer_dist.ops.set.attention import SetAttentionConfig

Figures = dict[str, dict[str, float]]
_HEADER = "refit"  # one key alone: the header's order is not defined


def problem_bytes(problem: Problem, threads: int) -> bytes:
    """Return a problem on the CPU as bytes.

    Args:
        problem: to be solved.
        threads: to compute it with: products of matrices may round otherwise with others.
    """
    names = [layer.parameter(kind) for layer in problem.layers for kind in layer.shapes]
    tensors = {f"present/{name}": problem.present[name] for name in names}
    for name, sample in problem.samples.items():
        tensors |= {f"keys/{name}": sample.keys_r, f"tokens/{name}": sample.tokens_rc}
    layers = [
        {**{f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}, "config": layer.config.model_dump(),
         "shapes": dict(layer.shapes)}
        for layer in problem.layers
    ]  # fmt: skip
    kept = {name: getattr(problem, name) for name in ("sets", "start", "iterations", "seed")}
    return _saved(tensors, {**kept, "layers": layers, "threads": threads})


def problem_of(data: bytes) -> tuple[Problem, int]:
    """Return the problem and the threads that `problem_bytes` was given.

    Raises:
        ValueError: these are no such bytes.
    """
    tensors, header = _loaded(data)
    try:
        layers = tuple(
            Layer(
                name=str(one["name"]),
                heads=int(one["heads"]),
                width=int(one["width"]),
                config=SetAttentionConfig.model_validate_json(json.dumps(one["config"])),
                shapes={kind: tuple(shape) for kind, shape in one["shapes"].items()},
            )
            for one in header["layers"]
        )
        samples = {one.name: Sample(tensors[f"keys/{one.name}"], tensors[f"tokens/{one.name}"]) for one in layers}
        present = {
            one.parameter(kind): tensors[f"present/{one.parameter(kind)}"] for one in layers for kind in one.shapes
        }
        sets = tuple(header["sets"])
        problem = Problem(layers, samples, present, sets, header["start"], header["iterations"], header["seed"])
        return problem, int(header["threads"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"is no problem of new sets ({type(error).__name__}: {error})") from None


def solved(data: bytes) -> bytes:
    """Return the solution of a problem, computed by this process alone with as many threads as it asks for."""
    problem, threads = problem_of(data)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        new = refit(problem)
        return _saved(new, {"figures": figures(problem, new)})
    finally:
        torch.set_num_threads(before)


def solution_of(data: bytes, problem: Problem) -> tuple[dict[str, torch.Tensor], Figures]:
    """Return the new sets of a problem, by the names of their parameters, and what they do.

    Raises:
        ValueError: it is no solution of this problem.
    """
    new, header = _loaded(data)
    shapes = {layer.parameter(kind): layer.shapes[kind] for layer, kind in problem.asked(*problem.sets)}
    if {name: tuple(vectors.shape) for name, vectors in new.items()} != shapes:
        raise ValueError("has not the sets of the problem")
    for name, vectors in new.items():
        if vectors.dtype != torch.float32 or not bool(vectors.isfinite().all()):
            raise ValueError(f"has values in {name} that are no finite fp32 numbers")
    found = header.get("figures")
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise ValueError("has no figures")
    return new, found


def _saved(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True)
    return save({name: t.contiguous() for name, t in tensors.items()}, metadata={_HEADER: text})


def _loaded(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
        return load(data), dict(header)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"is damaged ({type(error).__name__}: {error})") from None
