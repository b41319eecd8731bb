"""`setformer runs report`: the report of a run in any state.

It stands alone because it draws: torch and matplotlib take seconds, which `runs show` and `runs top` do without.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from launch.history.show import run_folders
from setformer_dist.core.words import plain
from setformer_dist.report.html import write_report


def report(folder: Path, console: Console) -> None:
    """Write report.html of a run in any state; the pictures of its last report need its data and stay out.

    Raises:
        DataError: there is no such run.
    """
    (folder,) = run_folders(folder)[-1:]
    write_report(folder, folder / "report.html", [])
    console.print(plain(folder / "report.html"), markup=False, highlight=False, soft_wrap=True)
