"""Log files of the ranks, and what they said last."""

from __future__ import annotations

import os
import re
from pathlib import Path

LOG_DIR_VARIABLE = "SETFORMER_LOG_DIR"
_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b|\b(ERROR|CRITICAL|FATAL)\b|Segmentation fault")
_TAIL_BYTES = 64 * 1024


def log_file(log_dir: Path, rank: int) -> Path:
    """Return a rank's log file."""
    return log_dir / f"rank-{rank:05d}.log"


def last_lines(path: Path, start: int = 0, count: int = 12) -> list[str]:
    """Return the last lines of a log that are not empty, from byte `start` on; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


def last_error_line(path: Path, start: int = 0) -> str:
    """Return the last line of a log that looks like an error, or else its last line, or "".

    Args:
        path: log file.
        start: byte at which to begin, so that earlier starts do not speak.
    """
    lines = [line.strip() for line in last_lines(path, start, count=1000)]
    stated = [line for line in lines if line.startswith("error: ")]  # how our own ranks explain themselves
    errors = stated or [line for line in lines if _ERROR_LINE.search(line)]
    return (errors or lines or [""])[-1]
