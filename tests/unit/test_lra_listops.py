"""ListOps: trees are evaluated right, and the generated task has the published statistics."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.lra.generating import accepted_samples
from dataloaders.lra.listops import CLOSE, OPERATORS, ListOpsConfig, chunk_maker, from_text, to_text
from dataloaders.lra.stats import PUBLISHED_LISTOPS, Statistic, statistics
from dataloaders.lra.tasks import Preparation, prepare, task_named
from setformer_dist.core.errors import ConfigError

SMALL = ListOpsConfig(max_depth=5, max_args=4, operator_share=0.5, longer_than=5, shorter_than=100)


def evaluate(tokens: list[int]) -> int:
    """Evaluate a tree by a stack, one token after the other."""
    stack: list[Any] = []
    for token in tokens:
        if token < 10:
            stack.append(token)
        elif token < CLOSE:
            stack.append(OPERATORS[token - 10])
        else:
            arguments = []
            while isinstance(stack[-1], int):
                arguments.append(stack.pop())
            operator = stack.pop()
            results = {"MIN": min, "MAX": max, "MED": lambda a: int(np.median(a)), "SM": lambda a: sum(a) % 10}
            stack.append(int(results[operator](arguments)))
    (value,) = stack
    return int(value)


def test_labels_are_the_values_of_the_trees() -> None:
    for config in (SMALL, ListOpsConfig()):
        chunk = chunk_maker(config, seed=3)(0, 600)
        ends = np.cumsum(chunk.lengths)
        assert len(ends) > 20
        for start, end, label in zip(ends - chunk.lengths, ends, chunk.labels, strict=True):
            assert evaluate(chunk.tokens[start:end].tolist()) == label
            assert config.longer_than < end - start < config.shorter_than


def test_trees_keep_to_depth_and_arguments() -> None:
    chunk = chunk_maker(SMALL, seed=0)(0, 2000)
    depth = np.cumsum(np.where(chunk.tokens == CLOSE, -1, np.where(chunk.tokens >= 10, 1, 0)))
    assert depth.max() == SMALL.max_depth - 1  # the deepest level has digits alone
    assert depth[-1] == 0
    assert depth.min() == 0


def test_a_tree_is_a_function_of_seed_and_candidate() -> None:
    make = chunk_maker(SMALL, seed=1)
    whole, part = make(0, 300), make(100, 50)
    within = (whole.candidates >= 100) & (whole.candidates < 150)
    assert np.array_equal(whole.candidates[within], part.candidates)
    assert np.array_equal(whole.labels[within], part.labels)
    starts = np.cumsum(whole.lengths) - whole.lengths
    taken = [whole.tokens[s : s + n] for s, n in zip(starts[within], whole.lengths[within], strict=True)]
    assert np.array_equal(np.concatenate(taken), part.tokens)
    assert not np.array_equal(make(0, 300).tokens, chunk_maker(SMALL, seed=2)(0, 300).tokens)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_depend_on_neither_processes_nor_chunks(workers: int, tmp_path: Path) -> None:
    task = replace(task_named("listops", short=True), counts=(300, 40, 30))
    splits = prepare(task, tmp_path, Preparation(workers=workers))
    one_by_one = accepted_samples(chunk_maker(task.generated, 0), 64, 0)  # type: ignore[arg-type]
    for split in splits.values():
        for index in range(split.num_samples):
            sample = next(one_by_one)
            assert np.array_equal(split.raw(index)[0], sample.tokens)
            assert split.labels(np.array([index])).item() == sample.label


def test_no_sample_comes_twice() -> None:
    tiny = ListOpsConfig(max_depth=2, max_args=2, operator_share=1.0, longer_than=3, shorter_than=5)
    stream = accepted_samples(chunk_maker(tiny, seed=0), 50, 0)
    seen = [to_text(next(stream).tokens) for _ in range(350)]  # of 4 operators x 100 pairs of digits
    assert len(set(seen)) == 350


def test_text_and_tokens() -> None:
    text = "( ( [MAX 2 ) [MED 1 5 8 9 ] ] )"
    assert to_text(from_text(text)) == "[MAX 2 [MED 1 5 8 9 ] ]"
    assert evaluate(from_text(text).tolist()) == 6  # the median of 1 5 8 9 is 6.5, of which the integer part counts
    with pytest.raises(ConfigError, match=r"no token '\[AVG'"):
        from_text("[AVG 1 2 ]")


@pytest.mark.parametrize("fields", [{"max_depth": 1}, {"operator_share": 0.0}, {"longer_than": 2000}])
def test_parameters_that_allow_no_tree(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ListOpsConfig(**fields)


SAMPLES = 6000


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Statistic]:
    task = replace(task_named("listops"), counts=(SAMPLES - 200, 100, 100))
    splits = prepare(task, tmp_path_factory.mktemp("listops"), Preparation())
    return {row.name: row for row in statistics(splits.values(), published=True)}


def share_tolerance(share: float, counted: float, decimals: int = 3) -> float:
    """Four standard errors of a share, those of the published one (20,000 samples) included, and its rounding."""
    return 4 * math.sqrt(share * (1 - share) * (1 / counted + 1 / 20_000)) + 0.5 * 10**-decimals


def test_published_shares(full: dict[str, Statistic]) -> None:
    shares = [name for name in PUBLISHED_LISTOPS if name.startswith("share of label")]
    assert len(shares) == 10
    for name in [*shares, "majority class", "best label of the root operator"]:
        published = PUBLISHED_LISTOPS[name]
        assert full[name].value == pytest.approx(published, abs=share_tolerance(published, SAMPLES)), name
    candidates = SAMPLES / full["acceptance"].value
    tolerance = 4 * math.sqrt(0.083 * 0.917 * (1 / candidates + 0.083 / 20_000)) + 0.0005
    assert full["acceptance"].value == pytest.approx(0.083, abs=tolerance)


def test_published_lengths(full: dict[str, Statistic]) -> None:
    # Lengths lie between 500 and 2000 with quartiles 706 and 1315: a deviation of at most 430, and at a quantile q of
    # density f an error of sqrt(q (1 - q) / N) / f, where f is at least 1 / 2000 (about 1 / 1200 at the upper one).
    several = math.sqrt(1 / SAMPLES + 1 / 20_000)
    assert full["mean length"].value == pytest.approx(1039, abs=4 * 430 * several + 0.5)
    assert full["median length"].value == pytest.approx(961, abs=4 * 0.5 * 1300 * several + 0.5)
    assert full["lower quartile of length"].value == pytest.approx(706, abs=4 * 0.433 * 800 * several + 0.5)
    assert full["upper quartile of length"].value == pytest.approx(1315, abs=4 * 0.433 * 1900 * several + 0.5)


def test_published_depth(full: dict[str, Statistic]) -> None:
    # "Always 9" of 20,000: rarer than 1 in 5,000 or so may well be seen here.
    assert full["depth, most"].value == 9
    assert full["depth, least"].value >= 8
