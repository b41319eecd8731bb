"""A queue as its page shows it: nodes, jobs that run with records, wait, and have ended; some with hostile texts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import sqlalchemy as sa

from launch.queue import schema as db
from launch.queue.config import QueueConfig
from launch.queue.source import Local
from launch.queue.store import FILE, Store, event, url_of

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e\x1b[31mred"
TOKEN = "a-token-that-nobody-guesses-0123456789"


def job(store: Store, root: Path, name: str, state: str, **values: object) -> int:
    """Put a job into the database; return its number."""
    row: dict[str, object] = {
        "name": name, "user": "ada", "submitted": time.time() - 9000, "directory": str(root),
        "config": json.dumps({"run": {"name": name}, "data": {"root": "s3://key:secret@store/data"}}),
        "folder": str(root / "runs" / f"run-{time.monotonic_ns()}"), "sizes": [2], "max_retries": 0, "after": [],
        "priority": 0, "state": state, "waiting_since": time.time() - 3000,
    }  # fmt: skip
    with store.write() as connection:
        key = connection.execute(sa.insert(db.jobs).values(**{**row, **values})).inserted_primary_key
        assert key is not None
        event(connection, "submitted", int(key[0]), user="ada", sizes=[2], priority=0)
        return int(key[0])


def runs(store: Store, folder: Path, number: int, placement: list[list[object]], printed: bytes, steps: int) -> Path:
    """Let a job run, with a log and curves; return the folder of its attempt."""
    attempt = folder / "jobs" / f"{number:06d}" / "attempt-0001"
    attempt.mkdir(parents=True)
    (attempt / "output.log").write_bytes(printed)
    run = Path(str(store.job(number)["folder"]))
    run.mkdir(parents=True)
    wave = [0.15 * math.sin(k * 1.7 + number) * math.cos(k * 0.9) for k in range(steps)]
    lines = [
        {"kind": "train", "step": 10 * k, "loss": 2.4 * math.exp(-k / 40) + 0.35 + wave[k] / (1 + k / 30),
         "images_per_s": 1850 + 40 * wave[k], "lr": 1e-3}
        for k in range(1, steps)
    ]  # fmt: skip
    evals = [
        {"kind": "eval", "step": 10 * k, "loss": 2.3 * math.exp(-k / 38) + 0.4, "top1": 0.92 * (1 - math.exp(-k / 45))}
        for k in range(20, steps, 20)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *evals]))
    ranks = sum(int(str(count)) for _, count in placement)
    with store.write() as connection:
        values = {"job": number, "number": 1, "state": "running", "placement": placement, "ranks": ranks,
                  "started": time.time() - 2400, "folder": str(attempt), "then_on": []}  # fmt: skip
        connection.execute(sa.insert(db.attempts).values(**values))
        connection.execute(sa.update(db.jobs).where(db.jobs.c.id == number).values(state="running", attempts=1))
        event(connection, "started", number, attempt=1, placement=placement, waited=600.0)
    return attempt


def make(folder: Path, name: str = HOSTILE, **page: object) -> Local:
    """Make a queue in a folder; job 1 runs under a name."""
    config = QueueConfig.model_validate({"cluster": {"kind": "hosts", "nodes": {"node1": 8, "node2": 8}}, "page": page})
    store = Store(url_of(folder))
    nodes = [{"name": f"node{n}", "slots": 8, "up": n < 4, "drained": name if n == 3 else None} for n in range(1, 5)]
    with store.write() as connection:
        connection.execute(sa.insert(db.nodes), nodes)
        holder = json.dumps({"host": "head", "pid": 4711, "time": 0.0})
        connection.execute(sa.update(db.lease).values(holder=holder, term=3))
    first = job(store, folder, name, "waiting", user=name, limit_s=14400.0, sizes=[2, 4, 6, 8])
    printed = f"step 10 loss 2.31\n\x1b[1mbold\x1b[0m {name}\r\nhttps://me:pw@host/x?sig=1\n".encode() * 40
    runs(store, folder, first, [["node1", 6]], printed, 160)
    second = job(store, folder, "deit-small, no augmentation", "waiting", user="bob", priority=5)
    runs(store, folder, second, [["node2", 8], ["node1", 2]], b"started\n", 60)
    job(store, folder, name, "waiting", reason=name, expected=time.time() + 5400, place=1)
    job(store, folder, "ablation: softmax", "waiting", user="bob", reason="waits until it is released", held=True)
    with store.write() as connection:
        event(connection, "preempted", second, why="preempted", note=name)
    job(store, folder, name, "failed", reason=name, finished=time.time() - 500, used_s=260.0)
    return Local(store, config)


def copied(queue: Local, folder: Path) -> Local:
    """Copy a queue's database into a folder: each commit of a new one takes long on a slow disk."""
    queue.store.backup(folder / FILE)
    return Local(Store(url_of(folder)), queue.config)
