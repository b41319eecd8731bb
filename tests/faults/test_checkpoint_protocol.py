"""A fault at every step of the commit protocol leaves the old checkpoint or the new one, never a mixture."""

from __future__ import annotations

import pytest

from checkpoints.testing.commit_faults import Case, cases, run_case


def name(case: Case) -> str:
    return f"{case.number}-rank{case.rank}-{case.what}-{case.fault.kind}".replace(" ", "_")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.drill] if at % 3 else []) for at, case in enumerate(cases())],
    ids=name,
)
def test_a_fault_leaves_the_old_checkpoint_or_the_new_one(tmp_path, case):
    found = run_case(tmp_path, case)
    assert found.step in case.found, found
    assert found.whole, found
    assert found.next_saved, found
    assert "the fault did not happen" not in found.told
    assert "failed before the fault" not in found.told
    expected = {"killed": {"killed"}, "slow": {"saved"}}.get(case.fault.kind)
    if expected is not None:
        assert found.told[case.rank] in expected
    elif case.number < 17:  # an error is raised on both ranks
        assert all(text.startswith(("CheckpointError: could not", "StorageError: could not")) for text in found.told), (
            found.told
        )
    else:  # what could not be deleted costs space alone
        assert found.told == ("saved", "saved")


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.fault.kind in ("exception", "killed")][::3], ids=name
)
def test_a_synchronous_save_follows_the_same_protocol(tmp_path, case):
    found = run_case(tmp_path, case, asynchronous=False)
    assert (found.step in case.found, found.whole, found.next_saved) == (True, True, True), found
