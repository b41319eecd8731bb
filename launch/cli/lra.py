"""`setformer lra`: Long Range Arena, from the data to the table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from launch.ranks.environment import has_gpu
from setformer_dist.core.terminal import open_console, open_table


class TaskFirst(TyperGroup):
    """Makes `setformer lra listops` an abbreviation of `setformer lra run listops`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `run` before a first argument that is not a command."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


_HELP = """Train and compare attentions on Long Range Arena: `setformer lra TASK`.

TASK is one of listops, text, retrieval, image, pathfinder, pathx. ListOps and Pathfinder are generated, the others
are read from their public files.

Examples:

  setformer lra prepare listops --short

  setformer lra listops --short --attention all --ranks 2

  setformer lra prepare image --source cifar10/

  setformer lra image --attention set,softmax --ranks 8 optim.lr=2e-4

  setformer lra stats listops
"""

app = typer.Typer(help=_HELP, no_args_is_help=True, cls=TaskFirst)

TaskName = Annotated[
    str,
    typer.Argument(metavar="TASK", help="listops, text, retrieval, image, pathfinder or pathx.", show_default=False),
]
Root = Annotated[Path, typer.Option(help="Folder of the prepared tasks.")]
Short = Annotated[bool, typer.Option("--short", help="The shortened task, for CPUs.")]
_ROOT = Path("data/lra")


_RUN_HELP = """Train the encoder with one attention after the other; print accuracy, speed and memory as a table.

Run the same command again to resume stopped runs; finished ones are kept.

Examples:

  setformer lra listops --short --attention all --ranks 2

  setformer lra pathfinder --attention set,softmax --ranks 8 batch.max_micro=64
"""


@app.command(help=_RUN_HELP)
def run(
    task: TaskName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides of the task's config, for all runs.", show_default=False),
    ] = None,
    attention: Annotated[str, typer.Option(help="all, or some of set,soft,soft_norm,cast,softmax.")] = "all",
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Processes on this machine.", min=1)] = 1,
    short: Short = False,
    root: Root = _ROOT,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/lra"),
) -> None:
    """Train the encoder with one attention after the other; print accuracy, speed and memory as a table."""
    if not has_gpu(os.environ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches for devices and logs it
    from dataloaders.lra import tasks
    from launch.examples import lra

    chosen = tasks.task_named(task, short)
    comparison = lra.Comparison(chosen, lra.kinds_named(attention), root, out, ranks, tuple(overrides or []))
    code = lra.compare(comparison, open_console())
    if code:
        raise typer.Exit(code)


_PREPARE_HELP = """Generate a task, or read it from its public files, and pack its splits.

Examples:

  setformer lra prepare listops

  setformer lra prepare text --source aclImdb

  setformer lra prepare pathx --workers 16 --root /data/lra

Existing data are kept if they are the same. To replace data of another seed or other parameters, use --force.
"""


@app.command(help=_PREPARE_HELP)
def prepare(
    task: TaskName,
    source: Annotated[Path | None, typer.Option(help="Folder of the public files, for tasks that are read.")] = None,
    root: Root = _ROOT,
    short: Short = False,
    seed: Annotated[int, typer.Option(help="Seed for generating or shuffling.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0 works in this one. Same data.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Make it again, even if it exists.")] = False,
) -> None:
    """Generate a task, or read it from its public files, and pack its splits."""
    from dataloaders.lra import tasks

    chosen = tasks.task_named(task, short)
    how = tasks.Preparation(source=source, seed=seed, workers=workers, force=force)
    console = open_console()
    made: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(chosen.title, total=None)

        def begin(split: str, total: int | None) -> None:
            made.append(split)
            progress.reset(bar, total=total, description=f"{chosen.title}, {split}")

        splits = tasks.prepare(
            chosen,
            root,
            how,
            on_start=begin,
            on_sample=lambda: progress.advance(bar),
        )
    sizes = ", ".join(f"{name} {split.num_samples:,}" for name, split in splits.items())
    state = "is" if made else "was already"
    console.print(f"{chosen.title} {state} in {root / chosen.folder}: {sizes}", highlight=False, soft_wrap=True)


_STATS_HELP = """Print the statistics of a prepared task, for ListOps next to the published ones.

Example:

  setformer lra stats listops
"""


@app.command(help=_STATS_HELP)
def stats(task: TaskName, root: Root = _ROOT, short: Short = False) -> None:
    """Print the statistics of a prepared task, for ListOps next to the published ones."""
    from dataloaders.lra import stats as figures
    from dataloaders.lra import tasks

    chosen = tasks.task_named(task, short)
    found = figures.statistics(
        tasks.open_task(chosen, root).values(), published=chosen.name == "listops" and not chosen.short
    )
    table = open_table("figure", "here", "published", title=chosen.title)
    for row in found:
        table.add_row(row.name, f"{row.value:,.4g}", "" if row.published is None else f"{row.published:,.4g}")
    open_console().print(table)
