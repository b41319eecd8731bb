"""`setformer queue`: a queue for a cluster that several people share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import ConfigPath, Overrides
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.terminal import open_console

if TYPE_CHECKING:
    from launch.queue.config import QueueConfig
    from launch.queue.store import Store

_HELP = """Share a machine or a cluster: jobs wait in a queue, and start, stop and resume by priority and fair share.

Needs the extra: pip install 'setformer_dist[queue]'. docs/queue.md explains it.

Examples:

  setformer queue submit demo data.root=runs/demo-data --ranks 2

  setformer queue ls
"""

app = typer.Typer(help=_HELP, no_args_is_help=True)

QueueOption = Annotated[
    Path | None,
    typer.Option("--queue", help="The queue's folder; by default SETFORMER_QUEUE, or your own.", show_default=False),
]
JobNumber = Annotated[int, typer.Argument(metavar="JOB", help="Number of the job.", show_default=False, min=1)]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _open(queue: Path | None) -> tuple[Path, QueueConfig, Store]:
    """Return the queue's folder, its config and its database.

    Raises:
        LaunchError: the extra is not installed, or the database cannot be used.
    """
    for name in ("sqlalchemy", "psycopg"):
        if importlib.util.find_spec(name) is None:
            raise LaunchError(f"the queue needs the package {name}: pip install 'setformer_dist[queue]'")
    from launch.queue import config as settings
    from launch.queue.serve import open_store

    folder = settings.folder_of(queue)
    config = settings.load(folder)
    return folder, config, open_store(folder, config)


@app.command()
def serve(
    queue: QueueOption = None,
    until_idle: Annotated[
        float | None, typer.Option(help="End after this many seconds without a job.", min=0, show_default=False)
    ] = None,
) -> None:
    """Run the scheduler; a second one stands by. If it ends, jobs continue, and the next scheduler adopts them.

    Example: setformer queue serve
    """
    folder, config, store = _open(queue)
    store.close()
    from launch.queue.serve import serve as run

    if code := run(folder, config, until_idle):
        raise typer.Exit(code)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", "-n", help="Ranks, or MIN:MAX for a job that may change its size.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes, with --ranks-per-node.", min=1, show_default=False)] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of each node.", min=1, show_default=False)] = None,
    priority: Annotated[int, typer.Option(help="A job of higher priority goes first, and may stop others.")] = 0,
    user: Annotated[
        str | None, typer.Option(help="User whose fair share the job counts for; by default you.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name shown in lists; by default run.name.", show_default=False)
    ] = None,
    max_retries: Annotated[int, typer.Option(help="Retries after the job's own errors.", min=0)] = 0,
    time_limit: Annotated[
        str | None,
        typer.Option(help="Longest total run time, such as 90, 30m, 4h or 2d; then the job stops.", show_default=False),
    ] = None,
    after: Annotated[
        list[int] | None, typer.Option(help="Start only when this job is done.", show_default=False)
    ] = None,
    held: Annotated[bool, typer.Option("--hold", help="Wait for `setformer queue release`.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="CONFIG is a sweep config; --ranks slots are for its trials.")
    ] = False,
    queue: QueueOption = None,
) -> None:
    """Check a run config and put it into the queue; start a server on this machine if none runs.

    Examples:

        setformer queue submit demo data.root=runs/demo-data --ranks 1:2

        setformer queue submit imagenet_base --nodes 4 --ranks-per-node 8 --priority 5 --time-limit 2d

        setformer queue submit digits --sweep set.data.root=runs/demo-data --ranks 2
    """
    from launch.queue.serve import ensure_server
    from launch.queue.submit import Request
    from launch.queue.submit import submit as put

    folder, settings, store = _open(queue)
    request = Request(
        config, overrides or (), ranks, nodes, ranks_per_node, priority, user, name, max_retries, time_limit,
        after or (), held, sweep,
    )  # fmt: skip
    number = put(store, settings, request)
    print(f"job {number}")
    if line := ensure_server(folder, store):
        print(line, file=sys.stderr)


@app.command("ls")
def ls(
    everything: Annotated[bool, typer.Option("--all", help="List jobs that have ended, too.")] = False,
    as_json: JsonOption = False,
    queue: QueueOption = None,
) -> None:
    """List jobs: where each runs, or why it waits and when it should start.

    Example: setformer queue ls --all
    """
    _, _, store = _open(queue)
    from launch.queue import show as pages

    pages.ls(store, open_console(), everything, as_json)


@app.command()
def show(job: JobNumber, as_json: JsonOption = False, queue: QueueOption = None) -> None:
    """Show a job with its attempts and events.

    Example: setformer queue show 1
    """
    _, _, store = _open(queue)
    from launch.queue import show as pages

    pages.show(store, job, open_console(), as_json)


@app.command()
def logs(
    job: JobNumber,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the output until the job has ended.")] = False,
    queue: QueueOption = None,
) -> None:
    """Print a job's output.

    Example: setformer queue logs 1
    """
    _, _, store = _open(queue)
    from launch.queue import show as pages

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    pages.logs(store, job, follow, write)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show them once, then stop.")] = False, queue: QueueOption = None
) -> None:
    """Show nodes and jobs, and refresh every second.

    Example: setformer queue top --once
    """
    _, _, store = _open(queue)
    from launch.queue import show as pages

    pages.top(store, open_console(), once)


@app.command()
def events(
    since: Annotated[int, typer.Option(help="Only events after this number.", min=0)] = 0, queue: QueueOption = None
) -> None:
    """Print the queue's events as JSON lines.

    Example: setformer queue events
    """
    _, _, store = _open(queue)
    from launch.queue import show as pages

    pages.events(store, since, sys.stdout.write)


@app.command()
def cancel(job: JobNumber, queue: QueueOption = None) -> None:
    """Cancel a job; if it runs, it saves first.

    Example: setformer queue cancel 1
    """
    _, _, store = _open(queue)
    from launch.queue import wishes

    print(f"job {job} {wishes.cancel(store, job)}")


@app.command()
def hold(job: JobNumber, queue: QueueOption = None) -> None:
    """Keep a job from starting; if it runs, it saves and stops.

    Example: setformer queue hold 1
    """
    _, _, store = _open(queue)
    from launch.queue import wishes

    print(f"job {job} {wishes.hold(store, job)}")


@app.command()
def release(job: JobNumber, queue: QueueOption = None) -> None:
    """Let a held job start; let a job that failed, was cancelled or reached its time limit continue.

    Example: setformer queue release 1
    """
    folder, _, store = _open(queue)
    from launch.queue import wishes
    from launch.queue.serve import ensure_server

    print(f"job {job} {wishes.release(store, job)}")
    if line := ensure_server(folder, store):
        print(line, file=sys.stderr)


@app.command()
def move(
    job: JobNumber,
    priority: Annotated[int, typer.Option(help="New priority.", show_default=False)],
    queue: QueueOption = None,
) -> None:
    """Change a job's priority.

    Example: setformer queue move 1 --priority 5
    """
    _, settings, store = _open(queue)
    from launch.queue import wishes

    print(f"job {job} {wishes.move(store, settings, job, priority)}")


@app.command()
def drain(
    node: NodeName,
    why: Annotated[str, typer.Option(help="Reason, shown to all users.")] = "by hand",
    queue: QueueOption = None,
) -> None:
    """Start no new job on a node; running jobs continue.

    Example: setformer queue drain node3 --why "new memory"
    """
    _, _, store = _open(queue)
    from launch.queue import wishes

    wishes.drain(store, node, why)
    print(f"no job starts on {node}")


@app.command()
def undrain(node: NodeName, queue: QueueOption = None) -> None:
    """Let jobs start on a node again.

    Example: setformer queue undrain node3
    """
    _, _, store = _open(queue)
    from launch.queue import wishes

    wishes.drain(store, node, None)
    print(f"jobs may start on {node}")


@app.command()
def backup(
    path: Annotated[Path, typer.Argument(help="File to write.", show_default=False)], queue: QueueOption = None
) -> None:
    """Write a copy of the queue's SQLite database while it is in use.

    Example: setformer queue backup queue-copy.db
    """
    _, _, store = _open(queue)
    store.backup(path)
    print(f"wrote {path}")


@app.command()
def check(queue: QueueOption = None) -> None:
    """Check the queue's database; the exit code is non-zero if something is wrong.

    Example: setformer queue check
    """
    _, _, store = _open(queue)
    faults = store.check()
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(LaunchError.exit_code)
    print("the database is whole")
