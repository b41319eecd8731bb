"""queue.toml while a server runs: read again when its content has changed. A broken one changes nothing.

queue.toml.used    in the queue's folder: the last content that a scheduler used. Commands go by it while queue.toml is
                   broken, as the scheduler does
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from launch.queue.config import FILE, QueueConfig, load
from setformer_dist.core import config as base
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import read_plain, replacing
from setformer_dist.core.secrets import redacted

USED = f"{FILE}.used"
_STEADY_S = 0.5  # an editor may write in pieces: only what has stood so long is read


class Settings:
    """The settings of a queue's folder.

    Attributes:
        config: that is in force.
        fault: why queue.toml is not, in one sentence; "" where it is.
    """

    def __init__(self, folder: Path, config: QueueConfig | None = None) -> None:
        """Read the settings.

        Args:
            folder: of the queue.
            config: what was read already; otherwise a broken file is borne if a scheduler has used an earlier one.

        Raises:
            ConfigError: it is broken, and no scheduler has used an earlier one.
        """
        self._folder = folder
        self._content = self._coming = _content(folder)
        self._since = 0.0
        self.fault = ""
        if config is not None:
            self.config = config
            return
        try:
            self.config = load(folder)
        except ConfigError as error:
            if not (folder / USED).exists():
                raise
            self.config = base.load(QueueConfig, folder / USED)
            self.fault = _not_used(error)

    def look(self) -> bool:
        """Read the file again if its content has changed; return whether `config` or `fault` has."""
        found, now = _content(self._folder), time.monotonic()
        if found == self._content:
            self._coming = found
            return False
        if found != self._coming:
            self._coming, self._since = found, now
        if now - self._since < _STEADY_S:
            return False
        self._content = found
        before = (self.config, self.fault)
        try:
            if found is None:
                raise ConfigError(f"{self._folder / FILE} is gone")
            config = load(self._folder)
            if config.database != self.config.database:
                raise ConfigError(f"{self._folder / FILE} names another database, which needs a new `queue serve`")
            self.config, self.fault = config, ""
        except ConfigError as error:
            self.fault = _not_used(error)
        return before != (self.config, self.fault)

    def keep(self) -> None:
        """Keep the content that is used, for commands that come while the file is broken."""
        path = self._folder / FILE
        with contextlib.suppress(OSError):
            if self._content is None:
                (self._folder / USED).unlink(missing_ok=True)
            elif not self.fault:
                with replacing(self._folder / USED) as aside:
                    aside.touch(0o600)  # it may hold a password
                    shutil.copy(path, aside)


def _content(folder: Path) -> bytes | None:
    try:
        return read_plain(folder / FILE)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"# {error.strerror}".encode()


def _not_used(error: ConfigError) -> str:
    return f"{redacted(str(error))}; the settings before it stay in force"
