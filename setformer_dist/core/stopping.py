"""Signals that ask a run to save and stop, and the exit codes that say so."""

from __future__ import annotations

import signal

# Job schedulers send SIGUSR1 ahead of the end (Slurm: `--signal=USR1@120`), terminals SIGHUP when they go away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

# Schedulers signal every process of a job, and so does our supervisor: repeats within so many seconds are one wish.
REPEAT_S = 2.0


def exit_code_of(signum: int) -> int:
    """Return the exit code of what a signal stopped, as shells have it: 143 for SIGTERM."""
    return 128 + signum
