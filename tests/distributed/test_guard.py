"""A step whose loss is infinite, in whole runs on two ranks: left out, or gone back before and passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.testing.commands import DEMO, SHORT
from launch.testing.ranks import RanksFailedError, run_ranks
from setformer_dist.core.files import write_json
from setformer_dist.core.ledger import read_events
from tests.distributed import guard_workers

BAD = 12


def overrides(digits: Path, out: Path, mode: str, stage: int, dtype: str) -> list[str]:
    own = [f"data.root={digits}", f"run.out={out}", f"guard.nonfinite={mode}", "run.log_every=4"]
    return [*SHORT, *own, f"zero.stage={stage}", f"precision.dtype={dtype}"]


def guard_rows(out: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (out / "demo" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "guard"]


def run(
    digits: Path, out: Path, mode: str, stage: int, dtype: str, steps: list[int], *more: str
) -> list[dict[str, object]]:
    words = [*overrides(digits, out, mode, stage, dtype), *more]
    return run_ranks(guard_workers.run_poisoned, 2, DEMO, words, steps)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (2, "bf16"),
        *(
            pytest.param(s, d, marks=pytest.mark.drill)
            for s, d in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"))
        ),
    ],
)
def test_skip_leaves_the_update_out(digits: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    found = run(digits, tmp_path, "skip", stage, dtype, [BAD])
    assert [r["step"] for r in found] == [22, 22]
    assert all(r["finite"] for r in found)
    (row,) = guard_rows(tmp_path)
    assert (row["step"], row["why"], row["action"]) == (BAD, "nonfinite", "skip")
    assert len(set(row["sample_ids"])) == 64  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.drill) for stage in (1, 2, 3))])
def test_an_infinite_loss_with_finite_gradients_leaves_the_update_out(digits: Path, tmp_path: Path, stage: int) -> None:
    short = ("~schedule.epochs", "schedule.steps=8", "~schedule.warmup_epochs", "batch.micro=16")
    left = {
        losses: run_ranks(
            guard_workers.run_poisoned, 2, DEMO,
            [*overrides(digits, tmp_path / str(losses), "skip", stage, "fp32"), *short], [5], None, losses,
        )
        for losses in (False, True)
    }  # fmt: skip
    assert [(row["step"], row["action"]) for row in guard_rows(tmp_path / "True")] == [(5, "skip")]
    assert [r["weights"] for r in left[True]] == [r["weights"] for r in left[False]]  # bit by bit


def test_rollback_is_a_run_that_never_took_the_step(digits: Path, tmp_path: Path) -> None:
    short = ("~schedule.epochs", "schedule.steps=14", "~schedule.warmup_epochs")
    found = run(digits, tmp_path / "poisoned", "rollback", 2, "bf16", [BAD], *short)
    (row,) = guard_rows(tmp_path / "poisoned")
    assert (row["step"], row["action"]) == (BAD, "rollback")
    (tmp_path / "without" / "demo").mkdir(parents=True)
    write_json(tmp_path / "without" / "demo" / "guard.json", {"passed_over": [BAD]})
    without = run(digits, tmp_path / "without", "rollback", 2, "bf16", [], *short)
    assert [r["weights"] for r in found] == [r["weights"] for r in without]  # bit by bit
    whole = run(digits, tmp_path / "whole", "rollback", 2, "bf16", [], *short)
    assert [r["weights"] for r in found] != [r["weights"] for r in whole]


def test_a_rollback_at_the_evaluation_that_ends_a_run_goes_on(digits: Path, tmp_path: Path) -> None:
    """The bad step is found as the early end is saved: the run goes back, comes to the evaluation again, ends there."""
    own = ("~schedule.epochs", "schedule.steps=12", "~schedule.warmup_epochs", "run.log_every=12", "optim.lr=1e-12",
           "schedule.min_lr=0", "eval.every_steps=4", "eval.patience=1", "checkpoint.every_steps=3")  # fmt: skip
    found = run(digits, tmp_path, "rollback", 2, "fp32", [7], *own)
    assert [r["step"] for r in found] == [8, 8]
    (rewound,) = [event for event in read_events(tmp_path / "demo") if event["event"] == "rewound"]
    assert (rewound["step"], rewound["reached"]) == (6, 8)


# Where all ranks die in the second rollback: a part of the trainer, its method, before or after which call of it.
DEATHS = {
    "nowhere": None,
    "before the bad checkpoint is put aside": ("store", "newest_before", "before", 1),
    "after it was": ("store", "newest_before", "after", 1),
    "before the step gone back to is kept": ("guard", "went_back", "before", 3),  # the first is of `resume`
}


@pytest.mark.drill
@pytest.mark.parametrize(
    "death",
    [
        "after it was",
        *(pytest.param(death, marks=pytest.mark.drill) for death in DEATHS if death != "after it was"),
    ],
)
def test_an_incident_that_soon_returns_goes_one_checkpoint_further_back(
    digits: Path, tmp_path: Path, death: str
) -> None:
    bad = [7, 8]
    short = ("~schedule.epochs", "schedule.steps=10", "~schedule.warmup_epochs", "checkpoint.every_steps=3")
    short = (*short, "batch.global_size=16")
    words = [*overrides(digits, tmp_path / "poisoned", "rollback", 1, "fp32"), *short]
    if DEATHS[death] is not None:
        with pytest.raises(RanksFailedError):
            run_ranks(guard_workers.run_poisoned, 2, DEMO, words, bad, DEATHS[death])
    found = run_ranks(guard_workers.run_poisoned, 2, DEMO, words, bad)
    kept = json.loads((tmp_path / "poisoned" / "demo" / "guard.json").read_text())
    assert (kept["passed_over"], kept["skipped"]) == (bad, [])
    assert [(t["step"], t["below"], t["back_to"]) for t in kept["troubles"]] == [(7, None, 6), (8, 6, 3)]
    assert [len(set(t["sample_ids"])) for t in kept["troubles"]] == [16, 16]
    rewound = [event for event in read_events(tmp_path / "poisoned" / "demo") if event["event"] == "rewound"]
    assert [event["bad"] for event in rewound] == kept["troubles"][: 2 if death == "nowhere" else 1]
    aside = tmp_path / "poisoned" / "demo" / "checkpoints" / "aside"
    assert [p.name.rpartition("-")[0] for p in aside.iterdir() if p.is_dir()] == ["superseded-step-00000006"]
    (tmp_path / "without" / "demo").mkdir(parents=True)
    write_json(tmp_path / "without" / "demo" / "guard.json", {"passed_over": bad})
    words = [*overrides(digits, tmp_path / "without", "rollback", 1, "fp32"), *short]
    without = run_ranks(guard_workers.run_poisoned, 2, DEMO, words, [])
    assert [r["weights"] for r in found] == [r["weights"] for r in without]  # bit by bit


def test_stop_is_the_default_and_keeps_the_checkpoint_from_before(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=f"not finite at step {BAD}"):
        run(digits, tmp_path, "stop", 2, "bf16", [BAD])
    saved = sorted(p.name for p in (tmp_path / "demo" / "checkpoints").iterdir() if p.name.startswith("step-"))
    assert saved[-1] == "step-00000010"


def test_more_bad_steps_than_the_limit_end_the_run(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="after 5 tolerated bad steps"):
        run(digits, tmp_path, "skip", 1, "bf16", list(range(6, 22)))
