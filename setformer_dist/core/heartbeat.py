"""A rank's sign of life: what it does and since when, for its supervisor to see at any instant, also when it hangs.

The supervisor makes one unnamed file per rank and hands its descriptor down; both map it. A beat is one store of a
few bytes: no system call, nothing on any disk, nothing left behind when a process is killed.

    supervisor   Pulse() -> fileno() -> SETFORMER_HEARTBEAT_FD of the rank;  read() -> Beat
    rank         Heartbeat.from_env();  beat("forward")
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from dataclasses import dataclass

from setformer_dist.core.phases import START as START
from setformer_dist.core.phases import Section

FD_VARIABLE = "SETFORMER_HEARTBEAT_FD"

# Beats so far, optimizer step, seconds of the monotonic clock (one for all processes of a host), stop signal, phase.
_RECORD = struct.Struct("<qqdq16s")


@dataclass(frozen=True)
class Beat:
    """What a rank did last.

    Attributes:
        count: beats so far; a rank that is behind the others has fewer.
        step: optimizer step it is at; -1 before the first.
        phase: `phases.START`, or the section that its clock is in.
        age: seconds since.
        stop: the signal that asked this rank to stop, 0 for none.
    """

    count: int
    step: int
    phase: str
    age: float
    stop: int = 0


class Heartbeat:
    """The rank's side. Without a supervisor it beats into private memory."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._count = 0
        self.step = -1
        self.stop = 0
        self.warm = False  # set once a whole step is done: before, things are built and compiled

    @classmethod
    def from_env(cls) -> Heartbeat:
        """Return the heartbeat that this process's supervisor watches, if there is one."""
        descriptor = os.environ.get(FD_VARIABLE)
        if descriptor is None:
            return cls(mmap.mmap(-1, mmap.PAGESIZE))
        return cls(mmap.mmap(int(descriptor), mmap.PAGESIZE))

    def beat(self, phase: Section) -> None:
        """Say that this phase begins; until the first step is done all of it is "start"."""
        self._count += 1
        shown = phase if self.warm else START
        _RECORD.pack_into(self._memory, 0, self._count, self.step, time.monotonic(), self.stop, shown.encode()[:16])


class Pulse:
    """The supervisor's side of one rank."""

    def __init__(self) -> None:
        # Memory without a name where there is such a thing: a full disk then stops no run from starting.
        made = os.memfd_create("heartbeat") if hasattr(os, "memfd_create") else -1
        self._file = os.fdopen(made, "w+b") if made >= 0 else tempfile.TemporaryFile()  # noqa: SIM115
        self._file.truncate(mmap.PAGESIZE)
        self._memory = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)
        _RECORD.pack_into(self._memory, 0, 0, -1, time.monotonic(), 0, START.encode())

    def fileno(self) -> int:
        """Return the descriptor to hand down."""
        return self._file.fileno()

    def read(self) -> Beat:
        """Return the last beat."""
        count, step, at, stop, phase = _RECORD.unpack_from(self._memory)
        return Beat(count, step, phase.rstrip(b"\0").decode(errors="replace"), time.monotonic() - at, stop)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
        self._file.close()
