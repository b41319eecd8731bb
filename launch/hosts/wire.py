"""JSON lines between a supervisor and its agents, over pipes that may stop at any moment.

Neither end ever waits for the other: what cannot be written yet is kept, what has not come yet is not read. Lines that
are no message (the banner of a login, a warning of a shell) are kept apart, for whoever has to explain a failure.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections import deque
from typing import Any

Message = dict[str, Any]

ALIVE_S = 0.5  # how often each end shows life, until both know how long a silence may be
_SIGNS, _ALIVE_AT_MOST_S = 20, 3.0  # then so many within the longest silence; an agent that has not heard it bears 60 s
_MARK = "\x1esetformer "  # begins every message: a banner may well be JSON
_LONGEST = 1 << 20  # bytes of a line, and of what is kept for a peer that does not read
_CHUNK = 1 << 16
_AT_ONCE = 64  # chunks that one look takes: a peer that never stops must not hold up the others
_ALIVE = f'{_MARK}{{"alive": true}}'.encode()


def alive_s(silence_s: float) -> float:
    """Return how often an end shows life that may be silent for some seconds."""
    return max(ALIVE_S, min(silence_s / _SIGNS, _ALIVE_AT_MOST_S))


class Wire:
    """Both directions of one pipe.

    Attributes:
        alive_s: how often this end shows life.
        ended: nothing further comes.
        heard_at: when something came last, of the monotonic clock.
        strange: the last lines that were no message.
        broken: what came that no end of ours sends; None for nothing.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        for descriptor in (read, write):
            os.set_blocking(descriptor, False)
        self._came, self._kept = b"", b""
        self._sent_at = 0.0
        self.alive_s = ALIVE_S
        self.ended = False
        self.broken: str | None = None
        self.heard_at = time.monotonic()
        self.strange: deque[str] = deque(maxlen=20)

    def send(self, message: Message) -> None:
        """Send a message, or keep it until the pipe takes it.

        A peer that reads nothing is as good as lost, and is found by its silence: what is too much for it is dropped.
        """
        line = f"{_MARK}{json.dumps(message)}\n".encode()
        if len(self._kept) + len(line) <= _LONGEST:
            self._kept += line
        self._sent_at = time.monotonic()
        self.flush()

    def show_life(self) -> None:
        """Send an empty message where nothing else was sent for a while."""
        if time.monotonic() - self._sent_at > self.alive_s:
            self.send({"alive": True})
        elif self._kept:
            self.flush()

    def flush(self) -> None:
        """Write what is kept, as far as the pipe takes it."""
        while self._kept:
            try:
                written = os.write(self._write, self._kept)
            except BlockingIOError:
                return
            except OSError:
                self._kept = b""
                return
            self._kept = self._kept[written:]

    def receive(self) -> list[Message]:
        """Return the messages that have come, without waiting."""
        for _ in range(_AT_ONCE):
            if self.ended:
                break
            try:
                data = os.read(self._read, _CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.ended = True
                break
            self.heard_at = time.monotonic()
            self._came += data
        *lines, self._came = self._came.split(b"\n")
        if len(self._came) > _LONGEST:
            self._came = b""
            self.broken = f"a line of more than {_LONGEST >> 20} MiB"
        return [message for line in lines if (message := self._parse(line)) is not None]

    def unfinished(self) -> str:
        """Return the line that has begun and not ended, such as a prompt."""
        text = self._came.decode(errors="replace").strip()
        return "" if _MARK.strip() in text else text

    def hung_up(self) -> bool:
        """Return whether the peer has closed the pipe, without reading from it."""
        poll = select.poll()
        poll.register(self._read, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def silence(self) -> float:
        """Return the seconds since something came."""
        return time.monotonic() - self.heard_at

    def _parse(self, line: bytes) -> Message | None:
        if line == _ALIVE:  # thousands of them come in a second
            return None
        text = line.decode(errors="replace")
        _, mark, body = text.partition(_MARK)  # a shell may have left a prompt before it
        if not mark:
            if text.strip():
                self.strange.append(text.strip())
            return None
        try:
            message = json.loads(body)  # words.py checks what it holds; thousands of agents speak
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.broken = f"a message that cannot be read ({body.strip()[:40]!r})"
            return None
        return message
