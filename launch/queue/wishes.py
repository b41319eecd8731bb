"""What users change of jobs and nodes that are there: cancel, hold, release, move, drain. The scheduler obeys later."""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa

from launch.queue import schema as db
from launch.queue.config import QueueConfig
from launch.queue.store import MissingError, Store, event
from launch.queue.submit import check_text
from setformer_dist.core.errors import LaunchError

_LONGEST_WHY = 500  # characters


def cancel(store: Store, number: int) -> str:
    """Have a job end; return what happens."""
    state = _change(store, number, "cancel", cancelled=True)
    return "ends once it has saved" if state in ("running", "stopping") else "is cancelled"


def hold(store: Store, number: int) -> str:
    """Have a job wait until it is released; return what happens."""
    state = _change(store, number, "hold", held=True)
    return "stops once it has saved, and waits" if state in ("running", "stopping") else "waits until it is released"


def release(store: Store, number: int) -> str:
    """Let a held job start, or one that has ended go on from its newest checkpoint; return what happens.

    Raises:
        LaunchError: there is nothing to release.
    """
    row = store.job(number)
    if row["state"] in ("failed", "over limit", "cancelled"):
        values = {
            "state": "waiting", "held": False, "cancelled": False, "waiting_since": time.time(), "used_s": 0.0,
            "eligible_at": 0.0, "own_failures": 0, "failures_in_row": 0, "finished": None, "reason": "",
        }  # fmt: skip
        with store.write() as connection:
            table = db.jobs
            taken = sa.select(table.c.id).where(
                table.c.folder == row["folder"], table.c.id != number, table.c.state.not_in(db.ENDED)
            )
            if (other := connection.execute(taken).scalar()) is not None:
                raise LaunchError(f"job {other} has the run folder of job {number} by now: cancel that one first")
            connection.execute(
                sa.update(table).where(table.c.id == number, table.c.state == row["state"]).values(**values)
            )
            event(connection, "released", number, was=row["state"])
        return "waits again, and goes on from its newest checkpoint"
    if not row["held"]:
        raise LaunchError(f"job {number} is not held (it is {row['state']}), so there is nothing to release")
    # It has not waited for slots before: a job that is held for a day must not go before all others then.
    _change(store, number, "release", held=False, waiting_since=time.time())
    return "may start"


def move(store: Store, config: QueueConfig, number: int, priority: int) -> str:
    """Give a job another priority; return what happens.

    Raises:
        LaunchError: its user may not have it.
    """
    row = store.job(number)
    most = config.user(row["user"]).max_priority
    if priority > most:
        raise LaunchError(f"--priority {priority} is more than {row['user']} may give: {most} at most (queue.toml)")
    _change(store, number, "move", priority=priority)
    return f"has priority {priority}"


def drain(store: Store, name: str, why: str | None, vacate: bool = False) -> None:
    """Have no job start on a node, or let jobs start there again.

    Args:
        store: the database.
        name: of the node.
        why: None lets jobs start.
        vacate: jobs that run there save, stop, and wait to go on elsewhere.

    Raises:
        MissingError: there is no such node.
        LaunchError: the reason is too long, or no text.
    """
    if why is not None:
        check_text("--why", why, _LONGEST_WHY)
    with store.write() as connection:
        values: dict[str, object] = {"drained": why, "vacate": vacate and why is not None}
        if why is None:
            values["failures"] = 0.0
        changed = connection.execute(sa.update(db.nodes).where(db.nodes.c.name == name).values(**values))
        if not changed.rowcount:
            names = list(connection.execute(sa.select(db.nodes.c.name).order_by(db.nodes.c.name).limit(10)).scalars())
            known = (
                f"its nodes are {', '.join(names)}" if names else "it has seen none yet: start `setformer queue serve`"
            )
            raise MissingError(f"the queue has no node {name}: {known}")
        event(connection, "drained" if why is not None else "undrained", None, node=name, vacate=vacate)


def _change(store: Store, number: int, kind: str, **values: object) -> str:
    """Change a job that has not ended; return its state.

    Raises:
        LaunchError: there is none, or it has ended.
    """
    state = str(store.job(number)["state"])
    with store.write() as connection:
        table = db.jobs
        alive = (table.c.id == number, table.c.state.not_in(db.ENDED))
        if not connection.execute(sa.update(table).where(*alive).values(**values)).rowcount:
            raise LaunchError(f"job {number} has ended ({state}): there is nothing to {kind}")
        values.pop("waiting_since", None)
        event(connection, kind, number, **values)
    return state


def attempt_folders(store: Store, number: int) -> list[Path]:
    """Return the folders of a job's attempts, in order."""
    query = sa.select(db.attempts.c.folder).where(db.attempts.c.job == number).order_by(db.attempts.c.number)
    return [Path(row["folder"]) for row in store.rows(query)]
