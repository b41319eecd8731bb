"""Stop signals of a supervisor: collected instead of died of, and what wakes its loop."""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

# What asks a run to save and stop; job schedulers warn with SIGUSR1 (Slurm: --signal=USR1@120).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TICK_S = 0.5  # longest time between two looks at the ranks; signals wake the loop at once
# A scheduler signals every process of a job, and we hand on what we get: repeats this soon after are the same request.
_REPEAT_S = 2.0
_MOMENT_S = 0.005


class Pause:
    """A pause between two looks at all hosts: as long as the look took, where there are thousands of them."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def sleep(self, at_most: float = math.inf) -> None:
        """Sleep as long as was worked since the last sleep, and a moment at least."""
        worked = time.monotonic() - self._since
        time.sleep(min(at_most, max(_MOMENT_S, worked)))
        self._since = time.monotonic()


@dataclass
class Received:
    """Stop signals in order of arrival, and the pipe on which any signal wakes the loop."""

    wake: socket.socket | None
    show_life: Callable[[], None] = lambda: None
    stop: list[int] = field(default_factory=list)
    first_at: float = 0.0
    forced: bool = False  # a second wish came, which does not wait for a checkpoint

    def note(self, number: int) -> None:
        """Take a stop signal."""
        now = time.monotonic()
        if not self.stop:
            self.first_at = now
        elif number == signal.SIGINT or now - self.first_at > _REPEAT_S:
            self.forced = True
        self.stop.append(number)

    def wait(self, seconds: float, readable: Sequence[int] = ()) -> None:
        """Sleep, but wake up at any signal or where a descriptor has something to read, and show life before."""
        self.show_life()
        news = select.poll()  # select ends at 1,024 descriptors
        for descriptor in readable:
            news.register(descriptor, select.POLLIN)
        if self.wake is None:
            news.poll(1e3 * min(seconds, 0.05))
            return
        news.register(self.wake.fileno(), select.POLLIN)
        if any(descriptor == self.wake.fileno() for descriptor, _ in news.poll(1e3 * seconds)):
            self.wake.recv(4096)

    def wait_for_stop(self, seconds: float) -> None:
        """Sleep until a stop signal comes."""
        limit = time.monotonic() + seconds
        while not self.stop and (left := limit - time.monotonic()) > 0:
            self.wait(min(left, TICK_S))


@contextlib.contextmanager
def stop_signals(show_life: Callable[[], None] = lambda: None) -> Iterator[Received]:
    """Collect stop signals instead of dying of them. Only the main thread can; elsewhere the loop polls.

    Args:
        show_life: called at least once in `TICK_S` seconds while a caller waits for signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Received(None, show_life)
        return
    wake, wake_write = socket.socketpair()
    wake.setblocking(False)
    wake_write.setblocking(False)
    received = Received(wake, show_life)

    def note(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            received.note(number)

    # What is ignored stays ignored: nohup ignores SIGHUP, a shell in the background SIGINT.
    mine = [s for s in (*STOP_SIGNALS, signal.SIGCHLD) if s == signal.SIGCHLD or _heeded(s)]
    before: dict[int, Any] = {number: signal.signal(number, note) for number in mine}
    fd_before = signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        wake.close()
        wake_write.close()


def _heeded(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN
