"""What each rank executes: `python -m launch.entry CONFIG [KEY=VALUE ...]` under RANK and WORLD_SIZE.

`setformer train` starts it. DeepSpeed's own launcher starts it just as well:

    deepspeed --num_accelerators 2 --module launch.entry configs/runs/demo.toml data.root=...
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until all is imported: a million objects that stay, looked through a dozen times (1 of 5 s)

from launch.machine.doctor import check_package_origins
from launch.ranks.launchers import adopt
from launch.ranks.lock import gone
from launch.ranks.logs import LOG_DIR_VARIABLE, log_file
from launch.ranks.orphans import use_scratch
from launch.run.config import continued, load_run
from launch.run.session import log_to_file, session
from setformer_dist.core.errors import RankFailedError, SetformerError, TransientError
from setformer_dist.core.exits import leave
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.secrets import redact_tracebacks, redacted
from setformer_dist.core.shared_memory import NO_SHARED_MEMORY, is_no_room, no_memory
from setformer_dist.core.stopping import exit_code_of
from setformer_dist.core.terminal import bear_lost_streams
from setformer_dist.core.words import plain_lines
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed

log = logging.getLogger(__name__)

_SHARED_NEEDED = 1 << 20  # bytes; with less, no reader's batch finds room
# What gloo and NCCL say when a peer is gone.
_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|NCCL.*(remote|abort|time)", re.I
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return its exit code (0, an error's, or 128 + the signal that stopped it)."""
    parser = argparse.ArgumentParser(prog="launch.entry", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="the run's TOML config")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as optim.lr=1e-3")
    parser.add_argument("--local_rank", type=int, default=None, help="given by DeepSpeed's launcher")
    arguments = parser.parse_args(argv)
    if arguments.config is None:
        parser.error(
            "name the run's TOML config: python -m launch.entry CONFIG [KEY=VALUE ...] runs one rank; "
            "`setformer train CONFIG --ranks N` starts them all"
        )
    if not gc.isenabled():
        gc.freeze()  # what was imported stays: no collection while training looks through it
        gc.enable()
    bear_lost_streams()
    use_scratch()
    redact_tracebacks()
    try:
        write_stacks_when_asked()
        adopt(os.environ)
        return run_rank(arguments.config, arguments.overrides)
    except SetformerError as error:
        if logging.getLogger().handlers:
            log.error("%s", error)
        # Rank 0 speaks to the user; of the others only the log file hears, and the supervisor quotes it.
        print(f"error: {plain_lines(redacted(str(error)))}", file=sys.stderr, flush=True)
        return error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        if (fault := no_memory(error)) is not None:
            log.exception("%s", fault)
            print(f"error: {redacted(fault)}", file=sys.stderr, flush=True)
            return 1  # nobody's mistake for sure: others may use the memory, so the supervisor tries again
        if (fault := no_shared_memory(error)) is not None:
            log.exception("no room in shared memory")
            log.error("%s", fault)  # last, as the supervisor quotes the last
            print(f"error: {fault}", file=sys.stderr, flush=True)
            return TransientError.exit_code
        if isinstance(error, OSError) or not _LOST_PEER.search(str(error)):
            log.exception("this rank failed")
            raise
        log.exception("this rank lost another one")
        if LOG_DIR_VARIABLE not in os.environ:  # no supervisor that names the rank to blame
            print("error: another rank is gone; its log says why", file=sys.stderr, flush=True)
        return RankFailedError.exit_code
    except Exception:
        log.exception("this rank failed")
        raise


def no_shared_memory(error: Exception, shared: Path = Path("/dev/shm")) -> str | None:
    """Return a sentence where an error comes of shared memory that is full, None for any other error.

    Args:
        error: of the system, or torch's, which is a RuntimeError with the system's words.
        shared: where processes share memory.
    """
    if not is_no_room(error):
        return None
    try:
        free = os.statvfs(shared)
    except OSError:
        return None
    if free.f_bavail * free.f_frsize > _SHARED_NEEDED and free.f_favail > 0:
        return None
    return NO_SHARED_MEMORY


def write_stacks_when_asked() -> None:
    """Let the supervisor have the stacks of all threads in this rank's log (SIGUSR2), also while the rank hangs.

    Raises:
        TransientError: the log cannot be written, or the run's folder is gone.
    """
    folder, rank = os.environ.get(LOG_DIR_VARIABLE), os.environ.get("RANK")
    if folder is None or rank is None:
        return
    path = log_file(Path(folder), int(rank))
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except FileNotFoundError:
        raise TransientError(gone(path.parent)) from None
    except OSError as error:
        raise TransientError(f"the rank's log {path} cannot be written ({error.strerror})") from None
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)


def run_rank(path: Path, overrides: Sequence[str]) -> int:
    """Build and run the training of one rank; return 0, or 128 + signal.

    Raises:
        SetformerError: a mistake that the user can repair.
    """
    ranks = RankInfo.from_env()
    quiet_deepspeed()
    check_package_origins()
    config = continued(load_run(path, overrides), warn=log.warning)
    with session(config, ranks, supervised=LOG_DIR_VARIABLE in os.environ) as begun:
        log_to_file(begun.run, ranks)  # as long as this process is
        outcome = begun.outcome = begun.trainer.run()
    return 0 if outcome.signum is None else exit_code_of(outcome.signum)


if __name__ == "__main__":
    leave(main())
