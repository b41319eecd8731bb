"""One rank's part of a run, from its config to a trainer that continues where the newest checkpoint is.

`launch.entry` runs it to its end; the library (`setformer.Training`) hands it to a user's program. Both begin and end
here, so that what is computed does not depend on who starts it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from checkpoints.identity import digest_json
from dataloaders.config import DataConfig
from dataloaders.order.order import CURSOR_FORMAT, ORDER_ID
from dataloaders.sources.index import INDEX_FORMAT, durable_write
from dataloaders.tokens import TOKENIZER_NAME, TokenSplit
from launch.ranks.environment import usable_cores
from launch.ranks.lock import held
from launch.ranks.logs import log_file
from launch.record.attempts import Recorder
from launch.record.checkout import codes_of
from launch.record.machine import machine_facts
from launch.run.compose import Splits, check_device, compose, open_splits
from launch.run.config import ResolvedRun, RunConfig, check_folder, permitted_changes, resolve
from launch.run.inputs import check_evaluated, inputs_of
from launch.run.memory import check_evaluation_fits, check_images_fit, keep_within_budget
from launch.run.objective import build_for, check_parts
from launch.run.outcome import finish
from launch.run.own_code import bring
from launch.run.own_model import OwnModel, build_own, check_unchanged
from launch.run.repeat import data_differs
from setformer_dist import __version__
from setformer_dist.core import ledger
from setformer_dist.core.callback import Callback
from setformer_dist.core.errors import LaunchError, TransientError
from setformer_dist.core.files import write_json, write_state
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.secrets import RedactingFormatter
from setformer_dist.core.task import Task
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.run_state import Outcome
from setformer_dist.engine.trainer import Trainer
from setformer_dist.models.build import check_name, freeze
from setformer_dist.tasks.build import build_task

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A run on this rank, ready to train.

    Attributes:
        run: the config on this number of ranks.
        splits: the run's data.
        task: what it learns.
        model: the module, as DeepSpeed has changed it.
        trainer: at the step of the newest checkpoint.
        outcome: how training ended; set by who trains, and rank 0 writes summary and report by it at the end.
    """

    run: ResolvedRun
    splits: Splits
    task: Task
    model: nn.Module
    trainer: Trainer
    outcome: Outcome | None = None


@contextlib.contextmanager
def session(
    config: RunConfig,
    ranks: RankInfo,
    supervised: bool,
    own: OwnModel | None = None,
    stays: bool = False,
    callbacks: Sequence[Callback] = (),
    data: Splits | None = None,
) -> Iterator[Session]:
    """Build a run on this rank and take over its newest checkpoint. Collective.

    Args:
        config: of the run.
        ranks: this process's place.
        supervised: a supervisor holds its own lock of the run's folder.
        own: a model of the user's own, in place of the one that the config names.
        stays: leave the group of ranks when the process ends, not before: DeepSpeed keeps its groups, so that a second
            engine of the process would find those of the first.
        callbacks: called after those that the config names.
        data: in place of what the config's [data] names.

    Raises:
        SetformerError: the run cannot begin, or cannot resume from its checkpoint.
    """
    run = resolve(config, ranks.world_size)
    bring(config.run.imports)
    if own is None:
        check_name(config.model.name)
    check_device(run)
    splits = data or open_splits(run)
    task = build_task(config.task, splits.train.classes)
    check_parts(task, (splits.train, splits.val))
    model = _model(run, splits, task, own, ranks.local_world_size)
    torch.set_num_threads(config.run.threads or max(1, usable_cores() // ranks.local_world_size))
    check_folder(run)
    if connect(ranks, timeout_minutes=config.run.timeout_minutes) and stays:
        atexit.register(disconnect)
    with contextlib.ExitStack() as until_all_is_written:
        try:
            comm = TorchCollectives(ranks, config.run.timeout_minutes)
            check_agreement(run, splits, comm)
            trainer = compose(run, splits, task, model, comm, callbacks)
            until_all_is_written.enter_context(held(config.folder, comm, supervised=supervised))
            begun = Session(run, splits, task, model, trainer)
            if ranks.is_main and not supervised:
                until_all_is_written.push(functools.partial(_record_end, begun))
            trainer.resume()
            claim_folder(run, comm, splits)
            if not supervised:
                _record_start(run, comm)
                if config.logging.prometheus and ranks.is_main:
                    log.warning("logging.prometheus has no effect: its figures come from setformer train's supervisor")
            yield begun
        finally:
            if not stays:
                disconnect()
        if ranks.is_main and begun.outcome is not None:
            finish(run, splits, begun.outcome, own)


def _record_end(
    begun: Session, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Write into the ledger how training ended, as a supervisor would."""
    if not begun.trainer.began:
        return
    values: dict[str, Any] = {"why": "done", "step": begun.trainer.step, "final": True}
    if kind is not None:
        values |= {"why": "error", "message": f"{kind.__name__}: {error}"}
    elif begun.outcome is None or begun.outcome.signum is not None:
        values |= {"why": "stopped"}
    ledger.record(begun.run.config.folder, "ended", **values)


def _model(run: ResolvedRun, splits: Splits, task: Task, own: OwnModel | None, local_ranks: int) -> nn.Module:
    """Return the run's model, fresh from its seed; it recomputes what its budget of memory asks for."""
    config, inputs = run.config, inputs_of(run.config.data)
    shape = inputs.shape(splits.train)
    if own is not None:
        model = build_own(own, config, shape, task)
    else:
        model = build_for(config, task, inputs.spec(splits.train))
        if config.run.imports and not all(p.requires_grad for p in model.parameters()):  # perhaps the user's own code
            check_unchanged(model, config.model.name, torch.zeros(2, *shape, dtype=inputs.dtype or torch.float32))
    freeze(model, config.model.freeze)
    recomputed = keep_within_budget(run, model, shape, inputs.dtype)
    if recomputed is not None:
        log.info("recomputed, by stage: %s", recomputed)
    check_evaluated(model, config.model.name, config.data, splits.val)
    if own is None:
        check_evaluation_fits(run, model, splits.val, local_ranks)
    if own is None or (isinstance(config.data, DataConfig) and config.data.resolutions):
        check_images_fit(run, model, shape, inputs.dtype, local_ranks)  # not every own model runs without numbers
    return model


def check_agreement(run: ResolvedRun, splits: Splits, comm: TorchCollectives) -> None:
    """Check that all ranks run the same config on the same data, before one of them can wait for ever.

    Where a run resumes is checked as well, but by those who read it: one checkpoint is chosen for all
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
                "must see the same run config, overrides, data and version of setformer_dist"
            )


def facts_of(run: ResolvedRun, splits: Splits) -> dict[str, str]:
    """Return what the samples and the steps of a run follow from, by name."""
    return {
        "version": __version__,
        "rule of samples": f"{ORDER_ID}, cursor {CURSOR_FORMAT}, index {INDEX_FORMAT}",
        "seed": str(run.config.run.seed),
        "global batch": str(run.plan.global_size),
        "training data": splits.train.fingerprint[:16],
        "validation data": splits.val.fingerprint[:16],
        "config": digest_json(run.as_json())[:16],
    }


def claim_folder(run: ResolvedRun, comm: TorchCollectives, splits: Splits) -> None:
    """Rank 0 makes the run's folder and writes what is run there, and on which data."""
    folder = run.config.folder
    if comm.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        data = {"training": splits.train.fingerprint[:16], "validation": splits.val.fingerprint[:16]}
        for line in data_differs(folder, data):
            log.warning("%s", line)
        for change in permitted_changes(run):
            key, theirs, ours = change.key, change.there, change.here
            log.warning("%s was %r and is %r from here on (checkpoint.allow_changes)", key, theirs, ours)
            ledger.record(folder, "changed", key=key, there=theirs, here=ours)
        config = run.as_json()
        write_state(folder / "config.json", {**config, "resolved": {**config["resolved"], "data": data}})
        write_json(folder / "deepspeed.json", run.deepspeed_json())
        if isinstance(splits.train, TokenSplit) and (tokenizer := splits.train.tokenizer) is not None:
            durable_write(folder / TOKENIZER_NAME, tokenizer)  # predictions need it
    comm.barrier()


def _record_start(run: ResolvedRun, comm: TorchCollectives) -> None:
    """Write down who runs it, as a supervisor would. Collective.

    The first rank of each host tells of its machine.
    """
    ranks, c = comm.ranks, run.config
    mine: tuple[int, dict[str, Any]] | None = None
    if ranks.local_rank == 0:
        mine = (ranks.local_world_size, {**machine_facts(), "codes": codes_of(c.run.imports)})
    told = [entry for entry in comm.gather_json(mine) if entry is not None]
    if ranks.is_main:
        hosts: dict[str, tuple[int, dict[str, Any]]] = {}
        for count, facts in told:
            name = facts["host"] if facts["host"] not in hosts else f"{facts['host']} ({len(hosts)})"
            hosts[name] = (count, facts)
        Recorder(c.folder, c.run.imports, c.launch.env).write(ranks.world_size, hosts if len(hosts) > 1 else {})


def log_to_file(run: ResolvedRun, ranks: RankInfo) -> logging.Handler:
    """Send this process's log to the rank's file in the run's folder, and return what does so.

    Raises:
        TransientError: the file cannot be opened, for example since the disk is full.
    """
    folder = run.config.folder / "logs"
    path = log_file(folder, ranks.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")  # names may be no text
    except OSError as error:
        raise TransientError(
            f"the log {path} cannot be written ({error.strerror}): make room, or repair the folder"
        ) from None
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler
