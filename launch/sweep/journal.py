"""The journal of a sweep: all that happened, in order, from which everything else is computed anew.

    runs/sweeps/NAME/journal.jsonl     one JSON object a line, appended and synced by the driver before it acts

    {"event": "began", "optuna": "5.0.0"}                               the first driver begins
    {"event": "opened", "time": t}                                      a driver goes on
    {"event": "asked", "trial": 3, "point": {"optim.lr": 0.001}}        the searcher's suggestion
    {"event": "cloned", "trial": 5, "point": {…}, "source": 2, "step": 88, "replaces": 4}
    {"event": "kept", "trial": 4, "why": "…"}                           there was no checkpoint to clone
    {"event": "started", "trial": 3, "seed": 0}                         its run is started, or goes on
    {"event": "reported", "trial": 3, "step": 44, "value": 0.81}        an evaluation of its first seed
    {"event": "ended", "trial": 3, "seed": 0, "state": "done", "value": 0.93, "step": 440, "seconds": 61.2}
    {"event": "over", "why": "…"}                                       the driver ends

Each line ends with "chain", the digest of the line without it and of the line before: a line that was changed, lost or
moved is found. A process that dies leaves at most one torn line, the last, which counts as not written. What a driver
decides is a function of the lines before (`launch.sweep.state`), so no decision is lost with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from setformer_dist.core import strictjson
from setformer_dist.core.errors import DataError, TransientError
from setformer_dist.core.files import LARGEST_RECORD, finite, open_plain, open_record

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
Event = dict[str, Any]
_CHAIN = re.compile(rb', "chain": "([0-9a-f]{16})"\}$')
_FIRST = "0" * 16


class Journal:
    """The journal, open for a driver that holds the sweep's folder.

    Args:
        folder: of the sweep; it is there.

    Raises:
        DataError: it is damaged.
        TransientError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.events, self._chain, sound = _read(self.path)
        try:
            self._descriptor = open_record(self.path)
            if os.fstat(self._descriptor).st_size > sound:
                log.warning("%s ends with a line that was not written whole: it is taken away", self.path)
                os.ftruncate(self._descriptor, sound)
        except OSError as error:
            raise TransientError(f"{self.path} cannot be written: {error.strerror}") from None

    def append(self, event: Event) -> None:
        """Write an event; it is durable when this returns.

        Raises:
            TransientError: there is no room, and what was not written whole is taken away; or the file was removed.
        """
        if not os.fstat(self._descriptor).st_nlink:
            raise TransientError(
                f"{self.path} was removed while the sweep was at work, and nothing of it can be continued without it: "
                "put it back from a copy, or give this sweep another sweep.name"
            )
        body = json.dumps(finite(event))
        chain = _link(self._chain, body.encode())
        line = f'{body[:-1]}, "chain": "{chain}"}}\n'.encode()
        size = os.fstat(self._descriptor).st_size
        try:
            if (written := os.write(self._descriptor, line)) < len(line):
                raise OSError(28, f"only {written} of {len(line)} bytes were written")
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise TransientError(
                f"{self.path} cannot be written ({error.strerror}): make room, and start the sweep again, which "
                "continues it"
            ) from None
        self._chain = chain
        self.events.append(event)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_events(folder: Path) -> list[Event]:
    """Return the events of a sweep, while a driver may append others; none where it has none.

    Raises:
        DataError: the journal is damaged.
    """
    return _read(folder / JOURNAL)[0]


def _link(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:16]


def _read(path: Path) -> tuple[list[Event], str, int]:
    """Return events, the chain's end, and how many bytes of the file they are."""
    try:
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            data = file.read(LARGEST_RECORD)
    except FileNotFoundError:
        return [], _FIRST, 0
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    events: list[Event] = []
    chain, sound = _FIRST, 0
    lines = data.split(b"\n")
    last = len(lines) - 2 if not lines[-1] else len(lines) - 1
    for at, line in enumerate(lines[:-1]):
        found = _event(line, chain)
        if found is None:
            if at == last:  # torn, though its end was written: its blocks came in another order
                break
            raise DataError(
                f"{path}, line {at + 1} is damaged or another one is missing before it: restore the file from a copy, "
                "or give this sweep another sweep.name"
            )
        event, chain = found
        events.append(event)
        sound += len(line) + 1
    return events, chain, sound


def _event(line: bytes, before: str) -> tuple[Event, str] | None:
    match = _CHAIN.search(line)
    if match is None:
        return None
    body = line[: match.start()] + b"}"
    chain = match[1].decode()
    if _link(before, body) != chain:
        return None
    try:
        event = strictjson.parse(body)
    except ValueError:
        return None
    return (event, chain) if isinstance(event, dict) and isinstance(event.get("event"), str) else None
