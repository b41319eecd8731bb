"""A real PostgreSQL that listens on a socket in a temporary folder alone, and may be stopped and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []


class Postgres:
    """One server with one empty database.

    Attributes:
        url: of the database.
    """

    def __init__(self) -> None:
        if not _BINARIES:
            pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        self._user = "nobody" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        if self._user:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        subprocess.run(
            [_BINARIES[-1] / "initdb", "-D", self._folder / "data", "-U", "q", "-A", "trust", "--no-sync"],
            user=self._user, check=True, capture_output=True, cwd=self._folder, timeout=60,
        )  # fmt: skip
        self.url = f"postgresql+psycopg://q@/postgres?host={self._folder}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._server = subprocess.Popen(
            [_BINARIES[-1] / "postgres", "-D", self._folder / "data", "-k", self._folder, "-c", "listen_addresses="],
            user=self._user, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        limit = time.monotonic() + 60
        ready = [_BINARIES[-1] / "pg_isready", "-h", self._folder, "-U", "q"]
        while subprocess.run(ready, capture_output=True).returncode:
            assert time.monotonic() < limit
            time.sleep(0.1)

    def stop(self, immediately: bool = False) -> None:
        """Stop it: every connection ends, or it even crashes (as `pg_ctl stop -m immediate`)."""
        # SIGTERM would wait for every connection to end.
        self._server.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
        self._server.wait(30)

    def close(self) -> None:
        """Stop it and remove its folder."""
        if self._server.poll() is None:
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
