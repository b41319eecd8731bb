"""The tables of the queue's database, and the steps from each older schema to the present one.

All steps run in one transaction: an interrupted migration leaves the old schema. A newer schema is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from setformer_dist.core.errors import LaunchError

METADATA = sa.MetaData()
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

schema = sa.Table("queue_schema", METADATA, sa.Column("version", sa.Integer, primary_key=True))

# One row. Whoever writes as the scheduler adds 1 to `beat` where `term` is its own, in the same transaction.
lease = sa.Table(
    "queue_lease",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("term", sa.BigInteger, nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
)

jobs = sa.Table(
    "queue_jobs",
    METADATA,
    sa.Column("id", _ID, primary_key=True, autoincrement=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("user", sa.Text, nullable=False),
    sa.Column("submitted", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, server_default="run"),  # or "sweep"
    sa.Column("config", sa.Text, nullable=False),  # the whole config as JSON: what was submitted counts
    sa.Column("directory", sa.Text, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("sizes", sa.JSON, nullable=False),
    sa.Column("per_node", sa.Integer),
    sa.Column("limit_s", sa.Float),
    sa.Column("max_retries", sa.Integer, nullable=False),
    sa.Column("after", sa.JSON, nullable=False),
    # What users wish; they alone write it.
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("held", sa.Boolean, nullable=False, default=False),
    sa.Column("cancelled", sa.Boolean, nullable=False, default=False),
    # What the scheduler knows; it alone writes it, but for `release` of a job that has ended.
    sa.Column("state", sa.Text, nullable=False),  # waiting, running, stopping, or one of ENDED
    sa.Column("waiting_since", sa.Float, nullable=False),
    sa.Column("eligible_at", sa.Float, nullable=False, default=0.0),
    sa.Column("used_s", sa.Float, nullable=False, default=0.0),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("own_failures", sa.Integer, nullable=False, default=0),
    sa.Column("failures_in_row", sa.Integer, nullable=False, default=0),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("place", sa.Integer),  # in the order of the last decision, from 1
    sa.Column("expected", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Index("queue_jobs_state", "state"),
    sa.Index("queue_jobs_folder", "folder"),
)

attempts = sa.Table(
    "queue_attempts",
    METADATA,
    sa.Column("job", _ID, sa.ForeignKey("queue_jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),  # running, stopping, ended
    sa.Column("placement", sa.JSON, nullable=False),
    sa.Column("devices", sa.JSON),
    sa.Column("ranks", sa.Integer, nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("boosted", sa.Boolean, nullable=False, default=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("stop_why", sa.Text),
    sa.Column("stop_at", sa.Float),
    sa.Column("then_on", sa.JSON, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("code", sa.Integer),
    sa.Column("how", sa.Text),
    sa.Index("queue_attempts_state", "state"),
)

nodes = sa.Table(
    "queue_nodes",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("slots", sa.Integer, nullable=False),
    sa.Column("up", sa.Boolean, nullable=False),
    sa.Column("drained", sa.Text),  # why; users and the scheduler write it
    sa.Column("vacate", sa.Boolean, nullable=False, server_default=sa.false()),  # its jobs go elsewhere; users write it
    sa.Column("failures", sa.Float, nullable=False, default=0.0),
    sa.Column("failed_at", sa.Float, nullable=False, default=0.0),
)

use = sa.Table(
    "queue_use",
    METADATA,
    sa.Column("user", sa.Text, primary_key=True),
    sa.Column("slot_s", sa.Float, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

events = sa.Table(
    "queue_events",
    METADATA,
    sa.Column("id", _ID, primary_key=True, autoincrement=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("job", _ID),
    sa.Column("data", sa.JSON, nullable=False),
)

ENDED = ("done", "failed", "cancelled", "over limit")


def _first(connection: sa.Connection) -> None:
    METADATA.create_all(connection)
    connection.execute(sa.insert(lease).values(id=1, term=0, beat=0, holder=""))


def _kinds(connection: sa.Connection) -> None:
    """Sweeps came in, and jobs that leave a drained node: what was there before are runs, and stay."""
    if "kind" not in {column["name"] for column in sa.inspect(connection).get_columns(jobs.name)}:  # not a new database
        connection.execute(sa.text(f"ALTER TABLE {jobs.name} ADD COLUMN kind TEXT NOT NULL DEFAULT 'run'"))
        connection.execute(sa.text(f"ALTER TABLE {nodes.name} ADD COLUMN vacate BOOLEAN NOT NULL DEFAULT FALSE"))


# The step at index v makes version v + 1 of version v. Steps are never changed, only added. The first makes a new
# database's tables as they are now, so every other one leaves alone what is there already.
STEPS: tuple[Callable[[sa.Connection], None], ...] = (_first, _kinds)


def migrate(connection: sa.Connection, steps: tuple[Callable[[sa.Connection], None], ...] = STEPS) -> None:
    """Bring a database to the present schema; in a transaction that the caller commits.

    Raises:
        LaunchError: its schema is newer than this version of setformer_dist knows.
    """
    version = version_of(connection)
    if version > len(steps):
        raise LaunchError(
            f"the queue's database has schema {version}, and this version of setformer_dist knows {len(steps)}: "
            "install the version that has written it, or restore a backup"
        )
    for step in steps[version:]:
        step(connection)
    if version < len(steps):
        METADATA.create_all(connection, tables=[schema])
        connection.execute(sa.delete(schema))
        connection.execute(sa.insert(schema).values(version=len(steps)))


def version_of(connection: sa.Connection) -> int:
    """Return the version of a database's schema; 0 where it has none."""
    if not sa.inspect(connection).has_table(schema.name):
        return 0
    return int(connection.execute(sa.select(sa.func.max(schema.c.version))).scalar() or 0)
