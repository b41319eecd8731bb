"""SIGTERM, Ctrl-C and SIGUSR1 as a request to stop: the loop ends a step or two later, all ranks at the same one."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from setformer_dist.core.heartbeat import Heartbeat
from setformer_dist.core.stopping import REPEAT_S, STOP_SIGNALS


class StopRequest:
    """Remembers the first stop signal while it is active; a second one kills, as users expect.

    In a thread that is not the main one (a training loop of Ray Train) no signal can be taken over: whoever has started
    the thread ends it.

    What counts as one, and when two are the same wish, is in `core.stopping`. SIGHUP is left alone where it is ignored
    (nohup).

    Args:
        heartbeat: shows the wish to the supervisor, whose grace begins with it.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        self._heartbeat = heartbeat
        self._at = 0.0
        self.signum: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        for signum in (s for s in STOP_SIGNALS if s not in ignored):
            self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is not None:
            if now - self._at < REPEAT_S:
                return
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum, self._at = signum, now
        if self._heartbeat is not None:
            self._heartbeat.stop = signum
