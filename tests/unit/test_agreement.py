"""Ranks that would see different samples are refused at the start, before one of them can wait for ever."""

from pathlib import Path

import pytest

from launch.run.compose import open_splits
from launch.run.config import load_run, resolve
from launch.run.session import check_agreement, facts_of
from launch.testing.commands import DEMO
from setformer_dist.core.errors import LaunchError
from setformer_dist.testing.threads import run_on_threads


def agree(pages_of_ranks: list[tuple[str, ...]]) -> None:
    runs = [resolve(load_run(Path(DEMO), overrides), len(pages_of_ranks)) for overrides in pages_of_ranks]
    splits = [open_splits(run) for run in runs]
    run_on_threads(
        len(runs), lambda comm: check_agreement(runs[comm.ranks.rank], splits[comm.ranks.rank], comm), timeout_s=20
    )


def test_ranks_that_agree_continue(digits: Path) -> None:
    agree([(f"data.root={digits}",)] * 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.seed=9", r"ranks 1, 2, 3 have another seed than rank 0 \(9, not 0\)"),
        ("batch.global_size=48", r"ranks 1, 2, 3 have another global batch than rank 0 \(48, not 64\)"),
        ("data.train=val", "ranks 1, 2, 3 have another training data than rank 0"),
        ("data.val=train", "ranks 1, 2, 3 have another validation data than rank 0"),
        ("data.epoch_end=wrap", "ranks 1, 2, 3 have another config than rank 0"),
    ],
)
def test_what_differs_is_named_with_its_ranks(digits: Path, override: str, said: str) -> None:
    root = f"data.root={digits}"
    with pytest.raises(LaunchError, match=said + r".*same run config, overrides, data and version"):
        agree([(root,), *[(root, override)] * 3])


def test_another_version_is_named(digits: Path) -> None:
    run = resolve(load_run(Path(DEMO), [f"data.root={digits}"]), 1)
    facts = facts_of(run, open_splits(run))
    assert set(facts) == {
        "version",
        "rule of samples",
        "seed",
        "global batch",
        "training data",
        "validation data",
        "config",
    }
    assert "feistel-1" in facts["rule of samples"]
