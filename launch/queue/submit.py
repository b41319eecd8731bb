"""Put a job into the queue: its config is checked by the code that the run itself uses, and kept as it is now."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from launch.queue import schema as db
from launch.queue import sweeps
from launch.queue.config import QueueConfig
from launch.queue.nodes import local_slots
from launch.queue.store import Store, event
from launch.run.config import RunConfig, check_folder, continued, load_run, resolve, shipped
from setformer_dist.core import config as base
from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.words import counted

_LONGEST_NAME, _LONGEST_USER = 255, 100  # characters; no run.name is longer


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        config: path of the run config, or the name of a shipped one; or the whole run config as nested tables.
        overrides: such as optim.lr=1e-3.
        ranks: "N", or "MIN:MAX".
        nodes: number of nodes, with `per_node`.
        per_node: ranks of each node.
        priority: higher goes first.
        user: who pays for it; by default who submits it.
        name: shown in lists; by default the run's.
        max_retries: failures of its own after which it is tried again.
        limit: "90", "30m", "4h" or "2d"; None for turns.
        after: jobs that must be done before.
        held: wait for `setformer queue release`.
        sweep: the config is a sweep's.
        directory: in which the job runs, and to which its relative paths belong; by default the present one.
    """

    config: Path | Mapping[str, object]
    overrides: Sequence[str] = ()
    ranks: str | None = None
    nodes: int | None = None
    per_node: int | None = None
    priority: int = 0
    user: str | None = None
    name: str | None = None
    max_retries: int = 0
    limit: str | None = None
    after: Sequence[int] = ()
    held: bool = False
    sweep: bool = False
    directory: Path | None = None


@dataclass(frozen=True)
class _Job:
    """What a request comes to.

    Attributes:
        kind: "run" or "sweep".
        config: what is kept, JSON.
        name: of the run or sweep.
        folder: of it.
        sizes: numbers of ranks, or of slots of a sweep.
    """

    kind: str
    config: str
    name: str
    folder: Path
    sizes: list[int]


def submit(store: Store, config: QueueConfig, request: Request) -> int:
    """Check a request and write it down; return the number of the job.

    Raises:
        ConfigError: the config cannot be run, or not on so many ranks.
        LaunchError: the request cannot be met by this queue.
    """
    job = _sweep(config, request) if request.sweep else _run(request)
    user = request.user or user_here()
    for option, text, most in (("--name", request.name or job.name, _LONGEST_NAME), ("--user", user, _LONGEST_USER)):
        check_text(option, text, most)
    limit_s = None if request.limit is None else seconds_of(request.limit)
    _check_user(config, user, request.priority, limit_s)
    sizes, folder = job.sizes, str(job.folder.absolute())
    _check_fits(sizes, request.per_node, _nodes(store, config), config.user(user).quota)
    directory = str(request.directory or Path.cwd())
    now = time.time()
    with store.write() as connection:
        _check_after(connection, request.after)
        _check_alone(connection, folder, request.after)
        row = sa.insert(db.jobs).values(
            kind=job.kind, name=request.name or job.name, user=user, priority=request.priority, state="waiting",
            submitted=now, config=job.config, directory=directory, folder=folder, sizes=sizes,
            per_node=request.per_node, limit_s=limit_s, max_retries=request.max_retries, after=list(request.after),
            held=request.held, waiting_since=now,
        )  # fmt: skip
        key = connection.execute(row).inserted_primary_key
        assert key is not None
        number = int(key[0])
        event(connection, "submitted", number, user=user, sizes=sizes, priority=request.priority)
    return number


def user_here() -> str:
    """Return the name of the user of this process.

    Raises:
        LaunchError: the machine has none for it, as in a container with any user id.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise LaunchError(f"user id {os.getuid()} has no name on this machine: name yourself with --user") from None


def check_text(option: str, text: str, most: int) -> None:
    """Refuse a text that lists cannot show or a database cannot hold.

    Raises:
        LaunchError: it is longer than `most` characters, or has NUL or a half character in it.
    """
    if len(text) > most:
        raise LaunchError(f"{option} has {len(text):,} characters: {most} at most")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise LaunchError(f"{option} {text} is not valid text: leave out NUL and what is not UTF-8")


def _run(request: Request) -> _Job:
    run = continued(_run_of(request))
    sizes = _sizes(run, request)
    check_folder(resolve(run, sizes[0]))
    return _Job("run", json.dumps(run.model_dump(mode="json")), run.run.name, run.folder, sizes)


def _sweep(config: QueueConfig, request: Request) -> _Job:
    if not isinstance(request.config, Path):
        raise LaunchError("a sweep is submitted where its config lies, not through the page")
    sweep, kept = sweeps.read(request.config, request.overrides)
    low, high = _range(request.ranks or str(sweeps.slots_of_trial(sweep)))
    sizes = list(range(low, high + 1))
    sweeps.check(sweep, config.cluster, sizes, request.per_node)
    return _Job("sweep", kept, sweep.config.sweep.name, sweep.folder, sizes)


def _run_of(request: Request) -> RunConfig:
    """Return the run config of a request, with its folder below the directory that the request names.

    Raises:
        ConfigError: it cannot be run.
        LaunchError: the directory is none.
    """
    if isinstance(request.config, Path):
        run = load_run(shipped(request.config), request.overrides)
    else:
        run = base.load(RunConfig, None, request.overrides, request.config)
    if request.directory is None:
        return run
    if not request.directory.is_absolute() or not request.directory.is_dir():
        raise LaunchError(
            f"{request.directory} is no folder on the machine of the queue's server: name one by its whole path"
        )
    return run.model_copy(update={"run": run.run.model_copy(update={"out": str(request.directory / run.run.out)})})


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as 90, 30m, 4h or 2d.

    Raises:
        LaunchError: it is none.
    """
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    number = text[:-1] if unit else text
    try:
        found = float(number) * (unit or 1)
    except ValueError:
        found = 0.0
    if not 1 <= found < 2**31:
        raise LaunchError(f"--time-limit {text} is no time: write 90 (seconds), 30m, 4h or 2d")
    return found


def _sizes(run: RunConfig, request: Request) -> list[int]:
    """Return the numbers of ranks that a job may run on.

    Raises:
        LaunchError: the options contradict each other.
        ConfigError: the run's batch cannot be shared by so many.
    """
    if (request.nodes is None) != (request.per_node is None):
        raise LaunchError("--nodes and --ranks-per-node belong together: give both, or --ranks alone")
    if request.nodes is not None and request.per_node is not None:
        if request.ranks is not None:
            raise LaunchError("--ranks and --nodes both say how many ranks: give only one of them")
        low = high = request.nodes * request.per_node
    else:
        low, high = _range(request.ranks or "1")
    if low == high:
        resolve(run, low)
        return [low]
    found = [ranks for ranks in range(low, high + 1) if _can_share(run, ranks)]
    if not found:
        raise ConfigError(
            f"batch.global_size = {run.batch.global_size} cannot be shared by any number of ranks from {low} to {high}:"
            " change the range, or the batch"
        )
    return found


def _range(text: str) -> tuple[int, int]:
    low, sign, high = text.partition(":")
    if not low.isascii() or not low.isdigit() or (sign and not (high.isascii() and high.isdigit())):
        raise LaunchError(
            f"--ranks {text} is no number of ranks: write N, or MIN:MAX for a job that may change its size"
        )
    first, last = int(low), int(high or low)
    if not 1 <= first <= last <= 1 << 16:
        raise LaunchError(f"--ranks {text}: from 1 to 65536, the smaller number first")
    return first, last


def _can_share(run: RunConfig, ranks: int) -> bool:
    try:
        resolve(run, ranks)
    except ConfigError:
        return False
    return True


def _nodes(store: Store, config: QueueConfig) -> list[int]:
    """Return the slots of all nodes that are known, up or not; none where a Ray cluster has not been seen yet."""
    if config.cluster.kind == "hosts":
        return list(config.cluster.nodes.values())
    if config.cluster.kind == "local":
        return [local_slots(config.cluster)]
    return [row["slots"] for row in store.rows(sa.select(db.nodes))]


def _check_fits(sizes: Sequence[int], per_node: int | None, slots: Sequence[int], quota: int | None) -> None:
    """Refuse what can never start, and say what would.

    Raises:
        LaunchError: as said.
    """
    if quota is not None and sizes[0] > quota:
        raise LaunchError(f"{counted(sizes[0], 'rank')} are more than your quota of {quota} at a time (queue.toml)")
    if not slots:
        return
    told = f"this cluster has {counted(len(slots), 'node')} with {counted(sum(slots), 'slot')}, {max(slots)} at most"
    if per_node is not None:
        wide = sum(width >= per_node for width in slots)
        if wide * per_node < sizes[0]:
            fit = (
                f"--nodes {wide} --ranks-per-node {per_node} would fit"
                if wide
                else f"--ranks-per-node {max(slots)} would fit"
            )
            raise LaunchError(
                f"{counted(sizes[0] // per_node, 'node')} with {counted(per_node, 'rank')} each do not fit: {told} on "
                f"one; {fit}"
            )
    elif sum(slots) < sizes[0]:
        raise LaunchError(f"{counted(sizes[0], 'rank')} do not fit: {told} on one; --ranks {sum(slots)} would fit")


def _check_user(config: QueueConfig, user: str, priority: int, limit_s: float | None) -> None:
    table = config.user(user)
    if priority > table.max_priority:
        raise LaunchError(
            f"--priority {priority} is more than {user} may give: {table.max_priority} at most (queue.toml)"
        )
    if table.max_hours is not None and limit_s is not None and limit_s > 3600 * table.max_hours:
        raise LaunchError(f"--time-limit is longer than {user} may ask for: {table.max_hours:g} h at most (queue.toml)")


def _check_after(connection: sa.Connection, after: Sequence[int]) -> None:
    for number in after:
        state = connection.execute(sa.select(db.jobs.c.state).where(db.jobs.c.id == number)).scalar()
        if state is None:
            raise LaunchError(f"--after {number}: the queue has no such job")
        if state in ("failed", "cancelled"):
            raise LaunchError(f"--after {number}: that job is {state}, so this one would wait for ever")


def _check_alone(connection: sa.Connection, folder: str, after: Sequence[int]) -> None:
    """Refuse a second job in one run folder, except one that begins when the first is done."""
    table = db.jobs
    query = sa.select(table.c.id).where(table.c.folder == folder, table.c.state.not_in(db.ENDED))
    others = [number for number in connection.execute(query).scalars() if number not in after]
    if others:
        raise LaunchError(
            f"job {others[0]} has the run folder {folder} already: give this one another run.name, or --after "
            f"{others[0]}"
        )
