"""The commit protocol under faults: what is found after each fault at each step, in a real save by two processes.

    python -m benchmarks.commit_faults [--all]

One line per step and operation (with --all, per fault): in how many of the faults the old checkpoint was found, the
new one, or anything else (which must not happen). Exit code 1 if a mixture, a wrong one or none was found, or if the
run could not save again afterwards. Writes JSON.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.measure import write as write_json
from checkpoints.testing.commit_faults import Case, Found, cases, run_case


def right(case: Case, found: Found) -> bool:
    """Return whether a fault left what it may leave."""
    return found.step in case.found and found.whole and found.next_saved


def main() -> None:
    """Run all cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="one line per fault")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/commit_faults.json"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    console = Console(width=150)
    answers: list[tuple[Case, Found]] = []
    for case in track(cases(), "faults", console=Console(stderr=True), transient=True):
        with tempfile.TemporaryDirectory() as folder:
            answers.append((case, run_case(Path(folder), case)))
    table = Table("step", "rank", "operation", "faults", "old found", "new found", "neither", "saved again")
    groups: dict[tuple[int, int, str, str], list[tuple[Case, Found]]] = {}
    for case, found in answers:
        key = (case.number, case.rank, case.what, case.fault.kind if arguments.all else "")
        groups.setdefault(key, []).append((case, found))
    for (number, rank, what, _), group in groups.items():
        good = [found for case, found in group if found.whole]
        table.add_row(
            str(number), str(rank), what, ", ".join(case.fault.kind for case, _ in group),
            str(sum(found.step == 1 for found in good)), str(sum(found.step == 2 for found in good)),
            str(len(group) - sum(found.step in (1, 2) for found in good)),
            str(sum(found.next_saved for _, found in group)),
        )  # fmt: skip
    wrong = [case for case, found in answers if not right(case, found)]
    table.title = f"{len(answers)} faults, {len(wrong)} with a wrong outcome; {describe()}"
    console.print(table)
    rows = [{"case": {**vars(c), "fault": vars(c.fault)}, "found": vars(f), "right": right(c, f)} for c, f in answers]
    write_json(arguments.out, {"machine": describe(), "rows": rows})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
