"""`setformer queue`: a queue for a cluster that several people share."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import ConfigPath, Overrides
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.terminal import open_console

if TYPE_CHECKING:
    from launch.queue.settings import Settings
    from launch.queue.source import Source
    from launch.queue.store import Store

_HELP = """Share a machine or a cluster: jobs wait in a queue, and start, stop and resume by priority and fair share.

Needs the extra: pip install 'setformer_dist[queue]'. docs/queue.md explains it.

Examples:

  setformer queue submit demo data.root=runs/demo-data --ranks 2

  setformer queue ls
"""

app = typer.Typer(help=_HELP, no_args_is_help=True)

QueueOption = Annotated[
    str | None,
    typer.Option(
        "--queue", help="The queue's folder or the URL of its page; by default SETFORMER_QUEUE, or your own folder.",
        show_default=False,
    ),
]  # fmt: skip
FolderOption = Annotated[
    str | None,
    typer.Option("--queue", help="The queue's folder; by default SETFORMER_QUEUE, or your own.", show_default=False),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        help="File with the page's token; by default SETFORMER_QUEUE_TOKEN or SETFORMER_QUEUE_TOKEN_FILE. Without a "
        "token, the page is read-only and listens on loopback only.",
        show_default=False,
    ),
]
JobNumber = Annotated[int, typer.Argument(metavar="JOB", help="Number of the job.", show_default=False, min=1)]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _open(queue: str | None, strict: bool = False) -> tuple[Path, Settings, Store]:
    """Return the queue's folder, its settings and its database.

    Args:
        queue: as given.
        strict: refuse a broken queue.toml, also where a scheduler has used an earlier one.

    Raises:
        ConfigError: queue.toml is broken.
        LaunchError: the extra is not installed, or the database cannot be used.
    """
    _need("sqlalchemy", "psycopg")
    from launch.queue import config as files
    from launch.queue.serve import open_store
    from launch.queue.settings import Settings

    folder = files.folder_of(queue)
    settings = Settings(folder, files.load(folder) if strict else None)
    return folder, settings, open_store(folder, settings.config)


def _need(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LaunchError(f"the queue needs the package {name}: pip install 'setformer_dist[queue]'")


def _source(queue: str | None) -> tuple[Source, Callable[[], None]]:
    """Return the queue, by its folder or its server, and what starts a server for a folder where none runs.

    Raises:
        LaunchError: as `_open`, or the token cannot be used.
    """
    from launch.queue import config as settings

    if (url := settings.url_of_server(queue)) is not None:
        _need("sqlalchemy")
        from launch.queue import token
        from launch.queue.remote import Remote

        return Remote(url, token.find()), lambda: None
    folder, found, store = _open(queue)
    from launch.queue.serve import ensure_server
    from launch.queue.source import Local

    def ensure() -> None:
        if line := ensure_server(folder, store):
            print(line, file=sys.stderr)

    return Local(store, found.config, found), ensure


def _page(where: str, token_file: Path | None) -> tuple[socket.socket, str | None]:
    """Return the socket on which a page listens, and its token, which the environment has no longer.

    Raises:
        LaunchError: one of them cannot be used.
    """
    _need("fastapi", "uvicorn")
    from launch.queue import token
    from launch.queue.page import server

    found = token.find(token_file)
    listening = server.listen(where, found)
    token.forget()
    acts = "for those who have its token" if found is not None else "read-only"
    print(f"page: {server.address_of(listening)} ({acts})", file=sys.stderr)
    return listening, found


@app.command()
def serve(
    queue: FolderOption = None,
    page: Annotated[
        str | None,
        typer.Option(help="Also serve the queue's page: a port on 127.0.0.1, or ADDRESS:PORT.", show_default=False),
    ] = None,
    token_file: TokenFileOption = None,
    until_idle: Annotated[
        float | None, typer.Option(help="End after this many seconds without a job.", min=0, show_default=False)
    ] = None,
) -> None:
    """Run the scheduler; a second one stands by. If it ends, jobs continue, and the next scheduler adopts them.

    Examples:

        setformer queue serve

        setformer queue serve --page 8765
    """
    folder, settings, store = _open(queue, strict=True)
    store.close()
    from launch.queue import token
    from launch.queue.serve import serve as run

    child = None
    if page is not None:
        listening, found = _page(page, token_file)
        from launch.queue.page.server import Child

        child = Child(folder, listening, found)
    token.forget()
    if code := run(folder, settings.config, until_idle, child):
        raise typer.Exit(code)


@app.command()
def page(
    where: Annotated[
        str, typer.Argument(metavar="[ADDRESS:]PORT", help="Where the page listens; the default address is 127.0.0.1.")
    ] = "8765",
    token_file: TokenFileOption = None,
    queue: FolderOption = None,
) -> None:
    """Serve the queue's page, its JSON API and its metrics for Prometheus, without a scheduler.

    Example: setformer queue page 8765
    """
    folder, settings, store = _open(queue, strict=True)
    store.close()
    listening, found = _page(where, token_file)
    from launch.queue.page.server import run

    raise typer.Exit(run(folder, settings, listening, found))


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", "-n", help="Ranks, or MIN:MAX for a job that may change its size.", show_default=False),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes, with --ranks-per-node.", min=1, show_default=False)] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks on each node, with --nodes.", min=1, show_default=False)
    ] = None,
    priority: Annotated[int, typer.Option(help="A job of higher priority starts first, and may stop others.")] = 0,
    user: Annotated[
        str | None, typer.Option(help="User whose fair share pays for the job; by default you.", show_default=False)
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
        list[int] | None,
        typer.Option(help="Number of a job that must be done first; may be repeated.", show_default=False),
    ] = None,
    held: Annotated[bool, typer.Option("--hold", help="Wait for `setformer queue release`.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="CONFIG is a sweep config; --ranks is the slots that its trials share.")
    ] = False,
    queue: QueueOption = None,
) -> None:
    """Check a config and put it into the queue; start a server on this machine if none runs.

    Examples:

        setformer queue submit demo data.root=runs/demo-data --ranks 1:2

        setformer queue submit imagenet_base --nodes 4 --ranks-per-node 8 --priority 5 --time-limit 2d

        setformer queue submit digits --sweep set.data.root=runs/demo-data --ranks 2
    """
    from launch.queue.submit import Request

    source, ensure_server = _source(queue)
    request = Request(
        config, overrides or (), ranks, nodes, ranks_per_node, priority, user, name, max_retries, time_limit,
        after or (), held, sweep,
    )  # fmt: skip
    print(f"job {source.submit(request)}")
    if fault := source.fault():
        print(fault, file=sys.stderr)
    ensure_server()


@app.command("ls")
def ls(
    everything: Annotated[bool, typer.Option("--all", help="Also list jobs that have ended.")] = False,
    as_json: JsonOption = False,
    queue: QueueOption = None,
) -> None:
    """List jobs: where each runs, or why it waits and when it should start.

    Example: setformer queue ls --all
    """
    source, _ = _source(queue)
    from launch.queue import show as pages

    pages.ls(source, open_console(), everything, as_json)


@app.command()
def show(job: JobNumber, as_json: JsonOption = False, queue: QueueOption = None) -> None:
    """Show a job with its attempts and events.

    Example: setformer queue show 1
    """
    source, _ = _source(queue)
    from launch.queue import show as pages

    pages.show(source, job, open_console(), as_json)


@app.command()
def logs(
    job: JobNumber,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the output until the job has ended.")] = False,
    queue: QueueOption = None,
) -> None:
    """Print a job's output.

    Example: setformer queue logs 1
    """
    source, _ = _source(queue)
    from launch.queue import show as pages

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    pages.logs(source, job, follow, write)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show them once, then exit.")] = False, queue: QueueOption = None
) -> None:
    """Show nodes and jobs, and refresh every second.

    Example: setformer queue top --once
    """
    source, _ = _source(queue)
    from launch.queue import show as pages

    pages.top(source, open_console(), once)


@app.command()
def events(
    since: Annotated[int, typer.Option(help="Only events after this number.", min=0)] = 0, queue: QueueOption = None
) -> None:
    """Print the queue's events as JSON lines.

    Example: setformer queue events
    """
    source, _ = _source(queue)
    from launch.queue import show as pages

    pages.events(source, since, sys.stdout.write)


@app.command()
def cancel(job: JobNumber, queue: QueueOption = None) -> None:
    """Cancel a job; if it runs, it saves first.

    Example: setformer queue cancel 1
    """
    source, _ = _source(queue)
    print(f"job {job} {source.cancel(job)}")


@app.command()
def hold(job: JobNumber, queue: QueueOption = None) -> None:
    """Keep a job from starting; if it runs, it saves and stops.

    Example: setformer queue hold 1
    """
    source, _ = _source(queue)
    print(f"job {job} {source.hold(job)}")


@app.command()
def release(job: JobNumber, queue: QueueOption = None) -> None:
    """Let a held job start; let a job that failed, was cancelled or reached its time limit continue.

    Example: setformer queue release 1
    """
    source, ensure_server = _source(queue)
    print(f"job {job} {source.release(job)}")
    ensure_server()


@app.command()
def move(
    job: JobNumber,
    priority: Annotated[int, typer.Option(help="New priority.", show_default=False)],
    queue: QueueOption = None,
) -> None:
    """Change a job's priority.

    Example: setformer queue move 1 --priority 5
    """
    source, _ = _source(queue)
    print(f"job {job} {source.move(job, priority)}")


@app.command()
def drain(
    node: NodeName,
    why: Annotated[str, typer.Option(help="Reason, shown to all users.")] = "by hand",
    vacate: Annotated[
        bool, typer.Option("--vacate", help="Its running jobs also save, stop, and resume on other nodes.")
    ] = False,
    queue: QueueOption = None,
) -> None:
    """Start no new job on a node; running jobs continue.

    Examples:

        setformer queue drain node3 --why "new memory"

        setformer queue drain node3 --why "new memory" --vacate
    """
    source, _ = _source(queue)
    source.drain(node, why, vacate)
    print(f"no job starts on {node}" + (", and those that run there go elsewhere" if vacate else ""))


@app.command()
def undrain(node: NodeName, queue: QueueOption = None) -> None:
    """Let jobs start on a node again.

    Example: setformer queue undrain node3
    """
    source, _ = _source(queue)
    source.drain(node, None)
    print(f"jobs may start on {node}")


@app.command()
def backup(
    path: Annotated[Path, typer.Argument(help="File to write.", show_default=False)], queue: FolderOption = None
) -> None:
    """Write a copy of the queue's SQLite database while it is in use.

    Example: setformer queue backup queue-copy.db
    """
    _, _, store = _open(queue)
    store.backup(path)
    print(f"wrote {path}")


@app.command()
def check(queue: FolderOption = None) -> None:
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
