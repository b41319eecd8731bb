"""A fault at every step of a copy to an object store leaves the old copy or the new one, never a mixture."""

from __future__ import annotations

import pytest
import s3fs  # noqa: F401 — before the ranks are forked, which would each import it

from checkpoints.testing.copy_faults import Case, cases, run_case


def name(case: Case) -> str:
    return f"{case.number}-rank{case.rank}-{case.what}-{case.fault.kind}".replace(" ", "_")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.drill] if at % 7 else []) for at, case in enumerate(cases())],
    ids=name,
)
def test_a_fault_leaves_the_old_copy_or_the_new_one(tmp_path, s3, case):
    found = run_case(tmp_path, f"{s3.url}/run", case)
    assert found.step == case.found, found
    assert found.whole, found
    assert found.next_copied, found
    assert "the fault did not happen" not in found.told
    assert "failed before the fault" not in "".join(found.told)
    if case.fault.kind == "killed":
        assert found.told[case.rank] == "killed"
    elif case.found == 2 and (case.number, case.fault.kind) != (8, "refused"):  # complete, and nobody could tell
        assert found.told[0].startswith("checkpoint 2 is copied to "), found
    else:
        assert found.told[0].startswith("warning: checkpoint 2 is not copied to "), found
        assert found.told[0].endswith("the newest copy is of step 1"), found
