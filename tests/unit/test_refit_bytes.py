"""Problems and solutions of new sets as bytes, and a service's answers of them, without Ray."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import safetensors.torch
import torch

from launch.ray.fits import Fits
from setformer_dist.ops.refit import Problem, figures, refit
from setformer_dist.ops.refit_bytes import problem_bytes, problem_of, solution_of, solved
from setformer_dist.ops.reservoir import Sample
from tests.unit.test_refresh import NYSTROM, PLAIN
from tests.unit.test_refresh import problem_of as made


def new_sets(problem: Problem) -> list[str]:
    return [layer.parameter(kind) for layer in problem.layers for kind in layer.shapes]


@pytest.mark.parametrize("config", [PLAIN, NYSTROM])
def test_a_solution_by_bytes_is_that_of_the_problem(config: Any) -> None:
    problem = made(config, start="kmeans++")
    data = problem_bytes(problem, threads=2)
    there, threads = problem_of(data)
    assert threads == 2
    assert problem_bytes(there, 2) == data
    for f in dataclasses.fields(problem):
        if f.name not in ("samples", "present"):
            assert getattr(there, f.name) == getattr(problem, f.name)
    assert sorted(there.present) == sorted(new_sets(problem))
    before = torch.get_num_threads()
    new, found = solution_of(solved(problem_bytes(problem, threads=1)), problem)
    assert torch.get_num_threads() == before
    torch.set_num_threads(1)
    expected = refit(problem)
    assert found == figures(problem, expected)
    torch.set_num_threads(before)
    assert sorted(new) == sorted(expected)
    assert all(torch.equal(new[name], expected[name]) for name in new)


def test_every_part_of_a_problem_counts() -> None:
    problem = made(PLAIN)
    tokens = {**problem.samples, "0": Sample(problem.samples["0"].keys_r, problem.samples["0"].tokens_rc * 1.0)}
    same = dataclasses.replace(problem, samples=tokens)
    assert problem_bytes(same, 1) == problem_bytes(problem, 1)
    tokens["0"].tokens_rc[3, 2] += 1e-6
    others = [
        problem_bytes(problem, 2),
        problem_bytes(same, 1),
        *(
            problem_bytes(made(PLAIN, **change), 1)
            for change in ({"start": "kmeans++"}, {"iterations": 9}, {"rows": 99})
        ),
        problem_bytes(dataclasses.replace(problem, seed=1), 1),
    ]
    assert len({problem_bytes(problem, 1), *others}) == 7


def test_the_service_keeps_its_last_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    solving = []
    monkeypatch.setattr("launch.ray.fits.solved", lambda data: solving.append(data) or solved(data))
    fits = Fits()
    problems = [problem_bytes(made(PLAIN, iterations=n), 1) for n in range(1, 19)]
    first = fits.fit(problems[0])
    assert fits.fit(problems[0]) == first == solved(problems[0])
    assert solving == problems[:1]
    for problem in problems[1:]:
        fits.fit(problem)
    assert fits.fit(problems[17]) == solved(problems[17])
    assert len(solving) == 18
    assert fits.fit(problems[0]) == first
    assert len(solving) == 19  # 16 are kept


@pytest.mark.parametrize("data", [b"", b"x" * 40, safetensors.torch.save({"a": torch.zeros(2)})])
def test_what_is_no_problem_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        problem_of(data)
    with pytest.raises(ValueError, match="is damaged"):
        solution_of(data, made(PLAIN))


def test_what_is_no_solution_of_a_problem_is_refused() -> None:
    problem = made(PLAIN)
    good, _ = solution_of(solved(problem_bytes(problem, 1)), problem)
    header = {"refit": json.dumps({"figures": {}})}

    def answer(tensors: dict[str, torch.Tensor], header: dict[str, str] = header) -> bytes:
        return safetensors.torch.save(tensors, metadata=header)

    assert sorted(solution_of(answer(good), problem)[0]) == sorted(good)
    name = min(good)
    for tensors, said in (
        ({n: t for n, t in good.items() if n != name}, "has not the sets of the problem"),
        ({**good, "other": torch.zeros(1)}, "has not the sets of the problem"),
        ({**good, name: good[name][:1].clone()}, "has not the sets of the problem"),
        ({**good, name: good[name].double()}, "no finite fp32 numbers"),
        ({**good, name: good[name] * torch.nan}, "no finite fp32 numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            solution_of(answer(tensors), problem)
    with pytest.raises(ValueError, match="has no figures"):
        solution_of(answer(good, {"refit": "{}"}), problem)
    with pytest.raises(ValueError, match="is no problem of new sets"):
        problem_of(answer(good))
