"""SIGTERM, Ctrl-C and SIGUSR1 as a wish to stop: the loop ends a step or two later, all ranks at the same one."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from setformer_dist.core.heartbeat import Heartbeat


class StopRequest:
    """Remembers the first stop signal while it is active; a second one kills, as users expect.

    SIGUSR1 is what job schedulers send ahead of the end (Slurm: `--signal=USR1@120`). They signal every process of a
    job, and so does our supervisor: repeats within `REPEAT_S` seconds are the same wish. SIGHUP is one too unless it
    is ignored (nohup).

    Args:
        heartbeat: shows the wish to the supervisor, whose grace begins with it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    REPEAT_S = 2.0

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        self._heartbeat = heartbeat
        self._at = 0.0
        self.signum: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        for signum in (s for s in self.SIGNALS if s not in ignored):
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
            if now - self._at < self.REPEAT_S:
                return
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum, self._at = signum, now
        if self._heartbeat is not None:
            self._heartbeat.stop = signum
