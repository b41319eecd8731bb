"""What a refresh samples, when, and what it makes of it: pieces on one process, against their definitions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.run.compose import refreshed_layers
from launch.run.config import load_run, resolve
from launch.testing.commands import DEMO
from setformer_dist.core.config import build
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.engine.config import RefreshConfig
from setformer_dist.engine.refresh import Refresh, check_possible
from setformer_dist.models.attention import SetAttention
from setformer_dist.models.build import build_model
from setformer_dist.models.reference_sets import freeze_sets, reference_layers, watched_tokens
from setformer_dist.ops.kmeans import Here
from setformer_dist.ops.refit import Problem, figures, matched, refit, with_lengths_of
from setformer_dist.ops.reservoir import Sample, lowest, token_keys, union
from setformer_dist.ops.set.attention import SetAttentionConfig


def tokens(b: int, n: int, seed: int = 0, h: int = 2, d: int = 3) -> torch.Tensor:
    return torch.randn(b, h, n, d, generator=torch.Generator().manual_seed(seed))


# Reservoir.


def test_all_tokens_of_a_step_have_keys_of_their_own() -> None:
    keys = token_keys(5, torch.arange(40), 80, 50)
    assert keys.unique().numel() == 80 * 50
    assert (keys != token_keys(6, torch.arange(40), 80, 50)).all()


def test_keys_do_not_depend_on_the_micro_batch() -> None:
    whole = token_keys(5, torch.arange(12), 24, 7)  # two sequences a sample
    parts = [token_keys(5, torch.arange(first, first + 4), 8, 7) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 11), max_size=8), st.integers(1, 12))
def test_a_sample_does_not_depend_on_how_the_batch_was_cut(limit: int, cuts: list[int], b: int) -> None:
    x = tokens(b, 5)
    x[0, 0, 2] = torch.nan
    mask = torch.rand(b, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    keys = token_keys(9, torch.arange(b), b, 5)
    whole = lowest(x, keys, mask, torch.iinfo(torch.int64).max, limit)
    good = [(int(keys[i, j]), x[i, :, j].flatten().tolist()) for i in range(b) for j in range(5)
            if mask[i, j] and bool(x[i, :, j].isfinite().all())]  # fmt: skip
    assert list(zip(whole.keys_r.tolist(), whole.tokens_rc.tolist(), strict=True)) == sorted(good)[:limit]
    held = Sample.empty(6)
    edges = sorted({0, b, *(cut for cut in cuts if cut < b)})
    for first, last in itertools.pairwise(edges):
        part = slice(first, last)
        found = lowest(x[part], keys[part], mask[part], held.bound(limit), limit)
        held = held.joined(found, limit)
    assert torch.equal(held.keys_r, whole.keys_r)
    assert torch.equal(held.tokens_rc, whole.tokens_rc)


def test_the_union_keeps_what_is_held_and_the_sign_of_zero() -> None:
    new = lowest(-0.0 * tokens(4, 5), token_keys(1, torch.arange(4), 4, 5), None, 2**62, 9)
    held = union(Sample.empty(6), new, 9, Here(), 0, 1)
    assert torch.signbit(held.tokens_rc).equal(torch.signbit(new.tokens_rc))
    later = lowest(tokens(4, 5), token_keys(2, torch.arange(4), 4, 5), None, 2**62, 9)
    both = union(held, later, 9, Here(), 0, 1)
    assert torch.equal(both.keys_r, held.joined(later, 9).keys_r)
    assert torch.equal(both.tokens_rc, held.joined(later, 9).tokens_rc)
    assert 0 < int(torch.isin(both.keys_r, held.keys_r).sum()) < 9
    assert len(union(Sample.empty(6), Sample.empty(6), 9, Here(), 0, 1)) == 0


# New sets.


def problem_of(config: SetAttentionConfig, rows: int = 120, **changes: Any) -> Problem:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([SetAttention(12, heads, config.of_stage(0)) for heads in (2, 3)])
    samples = {}
    for name, layer in layers.named_children():
        assert isinstance(layer, SetAttention)
        samples[name] = Sample(torch.arange(rows), torch.randn(rows, 12))
    present = {name: p.detach().clone() for name, p in layers.named_parameters()}
    values = {"sets": ("references", "return_references", "anchors"), "start": "references", "iterations": 10}
    return Problem(layers=reference_layers(layers), samples=samples, present=present, seed=0, **{**values, **changes})


PLAIN = SetAttentionConfig(references=4, kernel="similarity")
NYSTROM = SetAttentionConfig(references=4, kernel="nystrom", anchors=5)


@pytest.mark.parametrize("config", [PLAIN, NYSTROM])
def test_every_set_gets_new_vectors_of_the_old_lengths(config: SetAttentionConfig) -> None:
    problem = problem_of(config)
    new = refit(problem)
    kinds = ["references", "return_references", *(["anchors"] if config.anchors else [])]
    assert sorted(new) == sorted(f"{layer}.{kind}" for layer in "01" for kind in kinds)
    for name, vectors in new.items():
        old = problem.present[name]
        torch.testing.assert_close(vectors.norm(dim=-1), old.norm(dim=-1))
        assert not torch.equal(vectors, old)
    rows = figures(problem, new)
    for kind in kinds:
        assert rows[kind]["fit_after"] > rows[kind]["fit_before"]
        assert rows[kind]["movement_degrees"] > 1
        assert 0 < rows[kind]["perplexity_after"] <= 1
        assert rows[kind]["dead_after"] == 0
        assert ("marginal_error_before" in rows[kind]) is (kind != "anchors")


def test_only_the_sets_that_are_asked_for() -> None:
    assert sorted(refit(problem_of(NYSTROM, sets=("anchors",)))) == ["0.anchors", "1.anchors"]
    both = refit(problem_of(NYSTROM))
    alone = refit(problem_of(NYSTROM, sets=("references",)))
    assert not torch.equal(alone["0.references"], both["0.references"])  # the new anchors' features are others


def test_a_dead_reference_is_put_at_the_worst_fitted_token() -> None:
    problem = problem_of(PLAIN, sets=("references",))
    # All tokens lie near one direction but one; two references are near that direction, two point away from everything.
    x = torch.zeros(120, 2, 6)
    x[..., 0] = 1
    x[..., 1] = torch.linspace(-0.1, 0.1, 120).unsqueeze(1)
    x[7] = torch.tensor([0.8, 0, 0.6, 0, 0, 0])
    old = torch.zeros(2, 4, 6)
    old[:, 0, :2] = torch.tensor([1.0, 0.05])
    old[:, 1, :2] = torch.tensor([1.0, -0.05])
    old[:, 2:, 0] = -2
    samples = {**problem.samples, "0": Sample(torch.arange(120), x.flatten(1))}
    problem = problem_of(PLAIN, sets=("references",))
    problem = Problem(**{**vars(problem), "samples": samples, "present": {**problem.present, "0.references": old}})
    before = figures(Problem(**{**vars(problem), "layers": problem.layers[:1]}), {})["references"]
    assert before["dead_before"] == 0.5
    new = refit(problem)["0.references"]
    directions = new / new.norm(dim=-1, keepdim=True)
    assert float((directions @ torch.tensor([0.8, 0, 0.6, 0, 0, 0])).amax(1).min()) > 0.999
    after = figures(Problem(**{**vars(problem), "layers": problem.layers[:1]}), {"0.references": new})["references"]
    assert after["dead_after"] == 0
    torch.testing.assert_close(new.norm(dim=-1)[:, 2:], torch.full((2, 2), 2.0))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5))
def test_matching_undoes_a_permutation(order: list[int], seed: int) -> None:
    old = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed))
    near = old + 0.01 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(matched(near[:, list(order)], old), near)


def test_a_reference_without_length_gets_one() -> None:
    new = with_lengths_of(torch.tensor([[[0.0, 3.0]], [[4.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]]))
    assert new.tolist() == [[[0.0, 1.0]], [[2.0, 0.0]]]


def test_too_few_tokens_are_named() -> None:
    assert problem_of(PLAIN, rows=4).too_few() == ""
    assert problem_of(PLAIN, rows=3).too_few() == "0 has 3 sampled tokens for 4 references"


# Of the model.


def test_layers_and_their_tokens() -> None:
    model = timm.create_model("setformer_nano", num_classes=3, stem_strides=(2, 1))
    layers = reference_layers(model)
    names = dict(model.named_parameters())
    for layer in layers:
        for kind, shape in layer.shapes.items():
            assert tuple(names[layer.parameter(kind)].shape) == shape
    seen: dict[str, torch.Tensor] = {}
    with watched_tokens(model, lambda name, x, mask: seen.update({name: x})):
        model(torch.randn(2, 3, 16, 16))
    assert list(seen) == [layer.name for layer in layers]
    for layer in layers:
        assert tuple(seen[layer.name].shape[:2]) == (2, layer.heads)
        assert seen[layer.name].shape[-1] == layer.width
    seen.clear()
    model(torch.randn(2, 3, 16, 16))
    assert not seen


@pytest.mark.parametrize("implementation", ["auto", "reference", "torch"])
def test_frozen_sets_get_no_gradient_and_all_else_the_same(implementation: str) -> None:
    grads = []
    for frozen in (False, True):
        torch.manual_seed(0)
        layer = SetAttention(12, 2, SetAttentionConfig(references=4, implementation=implementation))
        if frozen:
            freeze_sets(layer, ("references", "return_references"))
        layer(torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(1)), (4, 4)).square().sum().backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    learned, frozen_ones = grads
    for name, grad in frozen_ones.items():
        if name in ("references", "return_references"):
            assert grad is None
            assert learned[name].abs().sum() > 0  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(grad, learned[name])


# When.


def test_steps_of_refreshes_and_samples() -> None:
    config = RefreshConfig(every=10, at_steps=(3,), sample_steps=4)
    assert [step for step in range(50) if config.due(step, 40)] == [3, 10, 20, 30]
    sampled = [step for step in range(50) if config.samples_at(step, 40)]
    assert sampled == [0, 1, 2, *range(6, 10), *range(16, 20), *range(26, 30)]
    later = RefreshConfig(every=10, at_steps=(4,), sample_steps=2, delay=3)
    assert [step for step in range(50) if later.due(step, 34)] == [4, 10, 20, 30]
    assert [step for step in range(50) if later.due(step, 33)] == [4, 10, 20]  # applied before the last step
    assert [step for step in range(50) if later.samples_at(step, 33)] == [2, 3, 8, 9, 18, 19]
    assert not RefreshConfig().on
    assert not any(RefreshConfig().samples_at(step, 100) for step in range(100))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"at_steps": [0]}, ["at_steps", "rising", "from 1 on"]),
        ({"at_steps": [5, 5]}, ["at_steps", "rising"]),
        ({"at_steps": [9, 5]}, ["at_steps", "rising"]),
        ({"every": -1}, ["every"]),
        ({"sets": []}, ["sets"]),
        ({"sets": ["references", "references"]}, ["sets", "twice"]),
        ({"sets": ["reference"]}, ["sets", "references"]),
        ({"iteration": 3}, ["iteration", "iterations"]),
        ({"every": 10, "delay": 10}, ["delay = 10", "10 steps between two refreshes"]),
        ({"every": 10, "at_steps": [23], "delay": 3}, ["delay = 3", "3 steps between"]),
        ({"every": 10, "at_steps": [27], "delay": 4}, ["delay = 4", "3 steps between"]),
        ({"at_steps": [3, 5], "delay": 2}, ["delay = 2", "2 steps between"]),
        ({"by": "Ray"}, ["by", "job", "ray"]),
    ],
)
def test_bad_tables_are_refused(table: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(RefreshConfig, table, "config")
    assert all(word in str(refused.value) for word in words), refused.value


VIT = ["model.name=vit_tiny_patch16_224", "~model.args"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["model.name=vit_tiny_patch16_224", "~model.args", "refresh.every=5"],
            ["no SeT attention", "remove the table"],
        ),
        (["model.args.attention=softmax", "refresh.learn=false"], ["no SeT attention", "attention.kind = 'set'"]),
        (["refresh.every=5", 'refresh.sets=["anchors"]'], ["refresh.sets = ['anchors']", "it has references"]),
    ],
)
def test_a_model_without_what_is_refreshed_is_refused(words: list[str], said: list[str]) -> None:
    run = resolve(load_run(Path(DEMO), words), 1)
    model = build_model(run.config.model, 10, 16, 0)
    with pytest.raises(ConfigError) as refused:
        refreshed_layers(run, model)
    assert all(word in str(refused.value) for word in said), refused.value


def test_a_run_too_short_for_a_refresh_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layers = problem_of(PLAIN).layers
    for config in (RefreshConfig(every=39), RefreshConfig(every=36, delay=3), RefreshConfig(every=50, at_steps=(3,))):
        check_possible(config, layers, 40)
    assert not caplog.messages
    for config in (RefreshConfig(every=40), RefreshConfig(every=37, delay=3)):
        check_possible(config, layers, 40)
    assert [message.partition(": ")[2] for message in caplog.messages] == ["it has no refresh"] * 2


def test_refreshes_that_no_run_can_have_are_refused() -> None:
    layers = problem_of(PLAIN).layers
    with pytest.raises(ConfigError, match=r"refresh\.at_steps has 40, and the run has 40 steps"):
        check_possible(RefreshConfig(at_steps=(3, 40)), layers, 40)
    with pytest.raises(ConfigError, match=r"refresh\.samples = 3 tokens are fewer than the 4 references of 0"):
        check_possible(RefreshConfig(every=5, samples=3), layers, 40)
    with pytest.raises(ConfigError, match=r"refresh\.at_steps has 37, 3 steps of delay come after it, and the run has"):
        check_possible(RefreshConfig(at_steps=(37,), delay=3), layers, 40)
    check_possible(RefreshConfig(at_steps=(39,), samples=4), layers, 40)
    check_possible(RefreshConfig(at_steps=(36,), delay=3), layers, 40)
    for possible in ({"every": 10, "at_steps": (20, 27), "delay": 2}, {"at_steps": (9,), "delay": 30}, {"delay": 9}):
        assert RefreshConfig(**possible).delay  # type: ignore[arg-type]


def test_nothing_is_asked_of_a_model_where_there_is_no_refresh() -> None:
    run = resolve(load_run(Path(DEMO), VIT), 1)
    assert refreshed_layers(run, torch.nn.Linear(2, 2)) == ()


class Given:
    """A refitter that remembers what it was given."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.problems: list[Problem] = []

    def begin(self, step: int, problem: Problem) -> None:
        self.steps.append(step)
        self.problems.append(problem)


def test_a_pending_refresh_is_taken_back_whole() -> None:
    """From the checkpoints between sample and application alone, and given to whoever computes once it is filled."""
    problem, none, given = problem_of(PLAIN), cast(Any, None), Given()
    config = RefreshConfig(at_steps=(5,), samples=64, delay=3)
    state = {"pending": {"step": 5, "rows": {"0": 30, "1": 20}}}
    made = Refresh(config, problem.layers, none, none, none, none, none, cast(Any, given), seed=0, total_steps=20)
    for step in (4, 8, 9):
        assert made.take_back(state, step) == []
        assert made.state() == {}
    for step in (5, 6, 7):
        fragments = made.take_back(state, step)
        assert made.state() == state
        assert given.steps == []
    assert all(f.name.startswith("~refresh/pending/") for f in fragments)
    expected = {f"keys/{n}": (r,) for n, r in (("0", 30), ("1", 20))}
    expected |= {f"tokens/{n}": (r, 12) for n, r in (("0", 30), ("1", 20))}
    expected |= {f"present/{one.parameter(kind)}": one.shapes[kind] for one in problem.layers for kind in one.shapes}
    assert {f.name.removeprefix("~refresh/pending/"): f.shape for f in fragments} == expected
    for f in fragments:
        f.tensor.copy_(torch.arange(f.tensor.numel()))
    made.go_on()
    assert given.steps == [5]
    for name, vectors in given.problems[0].present.items():
        assert torch.equal(vectors.flatten(), torch.arange(vectors.numel()).float()), name
    assert int(given.problems[0].samples["1"].keys_r[-1]) == 19
    with pytest.raises(CheckpointError, match="which this run cannot have: use the config"):
        made.take_back({"pending": {"step": 5, "rows": {"0": 65}}}, 6)
    elsewhere = RefreshConfig(at_steps=(4,), samples=64, delay=3)  # another batch has moved the count of steps
    made = Refresh(elsewhere, problem.layers, none, none, none, none, none, cast(Any, given), seed=0, total_steps=20)
    assert made.take_back(state, 6) == []
    made.go_on()
    assert given.steps == [5]


def test_a_sample_that_this_run_cannot_have_is_refused() -> None:
    layers = problem_of(PLAIN).layers
    none: Any = None
    made = Refresh(
        RefreshConfig(at_steps=(5,), samples=64),
        layers,
        none,
        none,
        none,
        none,
        none,
        none,
        seed=0,
        total_steps=9,
    )
    assert [f.shape for f in made.take_back({"rows": {"0": 30}}, step=3)] == [(30,), (30, 12)]
    assert made.state() == {"rows": {"0": 30}}
    for rows in ({"2": 30}, {"0": 65}, {"0": 0}, {"0": -1}):
        with pytest.raises(CheckpointError, match="which this run cannot have: use the config"):
            made.take_back({"rows": rows}, step=3)
    assert made.take_back({"rows": {"0": 30}}, step=7) == []  # another batch has moved the count of steps
    assert made.take_back({}, step=3) == []
    assert made.state() == {}
