"""`setformer runs`: looking at runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setformer_dist.core.terminal import open_console

app = typer.Typer(help="Look at runs: how far, how well, and where their time went.", no_args_is_help=True)


@app.command("ls")
def ls(
    root: Annotated[Path, typer.Argument(help="The folder of runs, or one run's.")] = Path("runs"),
) -> None:
    """List runs with state, step, best metric and goodput.

    Example: setformer runs ls runs
    """
    from launch.history import show

    show.list_runs(root, open_console())


@app.command("report")
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]) -> None:
    """Write the report of a run (report.html in its folder), at any time: while it runs, stopped, or done.

    Example:
        setformer runs report runs/demo
    """
    from launch.history import page

    page.report(folder, open_console())


@app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where the time of a run went, who ran it, its failures, its bad steps and its slowest ranks.

    Examples:
        setformer runs show runs/demo

        setformer runs show runs/demo --json
    """
    from launch.history import show

    show.show_run(folder, open_console(), as_json)


@app.command("top")
def top(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
) -> None:
    """Show what every rank of a running run does: host, step, phase, data wait, device use, memory, last sign.

    Example:
        setformer runs top runs/demo
    """
    from launch.history import top as live

    live.top(folder, open_console(), once)
