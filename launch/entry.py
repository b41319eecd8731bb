"""What each rank executes: `python -m launch.entry PAGE [KEY=VALUE ...]` under RANK and WORLD_SIZE.

`setformer train` starts it. DeepSpeed's own launcher starts it just as well:

    deepspeed --num_accelerators 2 --module launch.entry configs/runs/demo.toml data.root=...
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoints.identity import digest_json
from dataloaders.order.order import CURSOR_FORMAT, ORDER_ID
from dataloaders.sources.index import INDEX_FORMAT
from launch.machine.doctor import check_package_origins
from launch.ranks.environment import usable_cores
from launch.ranks.launchers import adopt
from launch.ranks.lock import held
from launch.ranks.logs import LOG_DIR_VARIABLE, log_file
from launch.ranks.orphans import use_scratch
from launch.run.compose import Splits, check_device, compose, open_splits
from launch.run.config import ResolvedRun, check_folder, continued, load_run, resolve
from launch.run.inputs import inputs_of
from launch.run.outcome import finish
from launch.run.own_code import bring
from setformer_dist.core.errors import LaunchError, PassingError, RankFailedError, SetformerError
from setformer_dist.core.exits import leave
from setformer_dist.core.files import write_json, write_state
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.secrets import RedactingFormatter, redact_tracebacks, redacted
from setformer_dist.core.shared_memory import NO_SHARED_MEMORY, is_no_room
from setformer_dist.core.stopping import exit_code_of
from setformer_dist.core.terminal import bear_lost_streams
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.deepspeed_engine import quiet_deepspeed
from setformer_dist.models.build import check_name
from setformer_dist.tasks.build import build_task

log = logging.getLogger(__name__)

_SHARED_NEEDED = 1 << 20  # bytes; with less, no reader's batch finds room
# What gloo and NCCL say when a peer is gone.
_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|NCCL.*(remote|abort|time)", re.I
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return its exit code (0, an error's, or 128 + the signal that stopped it)."""
    parser = argparse.ArgumentParser(prog="launch.entry", description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", help="the run's TOML page")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as optim.lr=1e-3")
    parser.add_argument("--local_rank", type=int, default=None, help="given by DeepSpeed's launcher")
    arguments = parser.parse_args(argv)
    if arguments.page is None:
        parser.error(
            "name the run's TOML page: python -m launch.entry PAGE [KEY=VALUE ...] runs one rank; "
            "`setformer train PAGE --ranks N` starts them all"
        )
    bear_lost_streams()
    use_scratch()
    redact_tracebacks()
    write_stacks_when_asked()
    try:
        adopt(os.environ)
        return run_rank(arguments.page, arguments.overrides)
    except SetformerError as error:
        if logging.getLogger().handlers:
            log.error("%s", error)
        # Rank 0 speaks to the user; of the others only the log file hears, and the supervisor quotes it.
        print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except (OSError, RuntimeError) as error:
        if (fault := no_shared_memory(error)) is not None:
            log.exception("no room in shared memory")
            log.error("%s", fault)  # last, as the supervisor quotes the last
            print(f"error: {fault}", file=sys.stderr, flush=True)
            return PassingError.exit_code
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
    """Let the supervisor have the stacks of all threads in this rank's log (SIGUSR2), also while the rank hangs."""
    folder, rank = os.environ.get(LOG_DIR_VARIABLE), os.environ.get("RANK")
    if folder is None or rank is None:
        return
    log = os.open(log_file(Path(folder), int(rank)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)


def run_rank(page: Path, overrides: Sequence[str]) -> int:
    """Build and run the training of one rank; return 0, or 128 + signal.

    Raises:
        SetformerError: whatever the user can repair.
    """
    ranks = RankInfo.from_env()
    quiet_deepspeed()
    check_package_origins()
    config = continued(load_run(page, overrides), tell=log.warning)
    run = resolve(config, ranks.world_size)
    bring(config.run.imports)
    check_name(config.model.name)
    check_device(run)
    splits = open_splits(run)
    inputs = inputs_of(config.data)
    classes, told = splits.train.classes, inputs.told(splits.train)
    task = build_task(config.task, classes)
    model = inputs.build_model(config.model, len(task.outputs), told, config.run.seed)
    torch.set_num_threads(config.run.threads or max(1, usable_cores() // ranks.local_world_size))
    check_folder(run)
    connect(ranks, timeout_minutes=config.run.timeout_minutes)
    with contextlib.ExitStack() as until_all_is_written:
        try:
            comm = TorchCollectives(ranks, config.run.timeout_minutes)
            check_agreement(run, splits, comm)
            trainer = compose(run, splits, task, model, comm)
            until_all_is_written.enter_context(held(run.config.folder, comm, supervised=LOG_DIR_VARIABLE in os.environ))
            trainer.resume()
            claim_folder(run, comm)
            log_to_file(run, ranks)
            outcome = trainer.run()
        finally:
            disconnect()
        if ranks.is_main:
            finish(run, splits, outcome)
    return 0 if outcome.signum is None else exit_code_of(outcome.signum)


def check_agreement(run: ResolvedRun, splits: Splits, comm: TorchCollectives) -> None:
    """Check that all ranks run the same config on the same data, before any of them can wait in vain.

    Where a run that resumes goes on is checked as well, but by those who read it: one checkpoint is chosen for all
    ranks, and each refuses a cursor that does not have the sha256 of its manifest.

    Raises:
        LaunchError: naming what differs, and on which ranks.
    """
    mine = facts_of(run, splits)
    views = comm.gather_json(mine)
    for what in mine:
        odd = [rank for rank, view in enumerate(views) if view.get(what) != views[0][what]]
        if odd:
            theirs, ours = views[odd[0]].get(what), views[0][what]
            raise LaunchError(
                f"ranks {', '.join(map(str, odd))} have another {what} than rank 0 ({theirs}, not {ours}): every host "
                "must see the same page, overrides, data and version of setformer_dist"
            )


def facts_of(run: ResolvedRun, splits: Splits) -> dict[str, str]:
    """Return what the samples and the steps of a run follow from, by name."""
    return {
        "version": importlib.metadata.version("setformer_dist"),
        "rule of samples": f"{ORDER_ID}, cursor {CURSOR_FORMAT}, index {INDEX_FORMAT}",
        "seed": str(run.config.run.seed),
        "global batch": str(run.plan.global_size),
        "training data": splits.train.fingerprint[:16],
        "validation data": splits.val.fingerprint[:16],
        "config": digest_json(run.as_json())[:16],
    }


def claim_folder(run: ResolvedRun, comm: TorchCollectives) -> None:
    """Rank 0 makes the run's folder and writes what is run there."""
    folder = run.config.folder
    if comm.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_state(folder / "config.json", run.as_json())
        write_json(folder / "deepspeed.json", run.deepspeed_json())
    comm.barrier()


def log_to_file(run: ResolvedRun, ranks: RankInfo) -> None:
    """Send this rank's log to its file in the run's folder."""
    folder = run.config.folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file(folder, ranks.rank))
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


if __name__ == "__main__":
    leave(main())
