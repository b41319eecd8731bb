"""A probe of the features while a run trains: all ranks compute features, and rank 0 fits the classifiers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import nn

from dataloaders.config import DataConfig
from launch.run.config import ResolvedRun
from launch.run.features import Features, check_probed, features_of, pooled, with_labels
from launch.run.inputs import Split, evaluation_micro, inputs_of
from launch.run.objective import encoder_of
from setformer_dist.core.batch import EvalStream
from setformer_dist.core.errors import DataError, TrainingError
from setformer_dist.core.metric import PROBE_METRICS
from setformer_dist.core.task import Prepare
from setformer_dist.engine.comm import TorchCollectives
from setformer_dist.engine.deepspeed_engine import DTYPES
from setformer_dist.engine.probe import ProbeCancelledError, linear_top1, neighbours_top1
from setformer_dist.engine.protocol import Engine
from setformer_dist.models.layers import called_as

_SLICE_S = 0.25  # between two signs of life while rank 0 computes and the others wait


class PeriodicProbe:
    """`engine.evaluation.Probe` of a run's encoder.

    Args:
        engine: of the run.
        streams: open this rank's share of the labelled training samples, and of what is scored.
        prepare: makes images.
        comm: of all ranks.
        every: optimizer steps between two probes.
        neighbours: that vote.
    """

    def __init__(
        self,
        engine: Engine,
        streams: tuple[Callable[[], EvalStream], Callable[[], EvalStream]],
        prepare: Prepare,
        comm: TorchCollectives,
        every: int,
        neighbours: int,
    ) -> None:
        self._engine = engine
        self._streams = streams
        self._prepare = prepare
        self._comm = comm
        self._every = every
        self._neighbours = neighbours

    def due(self, step: int) -> bool:
        """Return whether the config wants a probe after so many steps."""
        return step % self._every == 0

    @torch.no_grad()
    def run(self, given_up: Callable[[], bool]) -> dict[str, float] | None:
        """Return the figures `PROBE_METRICS`, on all ranks, or None when given up. Collective.

        Args:
            given_up: asked again and again, the same answer on all ranks.
        """
        found: list[Features | None] = []
        for opened in self._streams:
            stream = opened()
            try:
                mine = features_of(self._compute, stream, self._prepare, given_up)
            finally:
                stream.close()
            if mine is None:
                return None
            found.append(self._gathered(mine))
        return self._fitted(found, given_up)

    def _compute(self, images: torch.Tensor) -> torch.Tensor:
        """Return pooled features; through the engine and both modules' own calls, so that ZeRO-3 gathers weights."""
        encoder = encoder_of(self._engine.module)
        with called_as(encoder, functools.partial(pooled, encoder)):
            if encoder is self._engine.module:
                return self._engine(images)  # type: ignore[no-any-return]
            with called_as(self._engine.module, lambda images: encoder(images)):
                return self._engine(images)  # type: ignore[no-any-return]

    def _gathered(self, mine: Features) -> Features | None:
        """Return the features of all ranks on rank 0, by sample id."""
        comm, (count, width) = self._comm, mine.values.shape
        counts = comm.gather_json(count)
        parts = {name: [value] for name, value in vars(mine).items()}
        for rank, there in enumerate(counts):
            if rank == 0 or not there or comm.ranks.rank not in (0, rank):  # a small split leaves ranks without samples
                continue
            for name, value in vars(mine).items():
                shape = (there, width) if value.ndim == 2 else (there,)
                if comm.ranks.rank == rank:
                    comm.send_bytes(bytearray(value.contiguous().numpy().tobytes()), 0)
                else:
                    data = bytearray(torch.Size(shape).numel() * value.element_size())
                    comm.receive_bytes(data, rank)
                    parts[name].append(torch.frombuffer(data, dtype=value.dtype).view(shape))
        if not comm.ranks.is_main:
            return None
        whole = Features(**{name: torch.cat(values) for name, values in parts.items()})
        order = whole.ids.argsort()
        return Features(whole.values[order], whole.labels[order], whole.ids[order])

    def _fitted(self, found: list[Features | None], given_up: Callable[[], bool]) -> dict[str, float] | None:
        fit = _Fit(found[0], found[1], self._neighbours) if found[0] is not None and found[1] is not None else None
        try:
            while True:
                if given_up():
                    return None
                word = self._comm.broadcast_json(fit.look(_SLICE_S) if fit is not None else None)
                if isinstance(word, str):
                    raise TrainingError(f"the probe (eval.probe) failed: {word}")
                if word is not None:
                    return dict(zip((metric.name for metric in PROBE_METRICS), word, strict=True))
        finally:
            if fit is not None:
                fit.cancel()


class _Fit:
    """The classifiers of rank 0, computed in a thread, so that this rank and the others show that they live."""

    def __init__(self, train: Features, val: Features, neighbours: int) -> None:
        self._given = (train.values, train.labels, val.values, val.labels)
        self._neighbours = neighbours
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._found: list[float] | str = ""
        self._thread = threading.Thread(target=self._compute, name="probe", daemon=True)
        self._thread.start()

    def look(self, seconds: float) -> list[float] | str | None:
        """Wait for a while; return the accuracies, what failed, or None where nothing has come."""
        return self._found if self._done.wait(seconds) else None

    def cancel(self) -> None:
        """Have the thread end, and wait for it."""
        self._cancelled.set()
        self._thread.join()

    def _compute(self) -> None:
        try:
            linear = linear_top1(*self._given, cancelled=self._cancelled.is_set)
            near = neighbours_top1(*self._given, self._neighbours, cancelled=self._cancelled.is_set)
            self._found = [linear, near]
        except ProbeCancelledError:
            self._found = "it was given up"
        except Exception as error:  # noqa: BLE001  (any: all ranks wait for a word of this one)
            self._found = str(error) or type(error).__name__
        self._done.set()


def probed_data(run: ResolvedRun, model: nn.Module, train: Split, val: Split) -> tuple[DataConfig, Split, Split] | None:
    """Open and check what the probe of a run learns from; None where the config wants none. Arguments of `probe_of`.

    Returns:
        (config of the labelled data, training split, validation split)

    Raises:
        ConfigError: the model gives no features.
        DataError: the labelled data are missing or damaged, or have fewer than two classes.
    """
    config, data = run.config.eval.probe, run.config.data
    if not config.every_epochs:
        return None
    assert isinstance(data, DataConfig)  # checked with the config
    if config.data is not None:
        data = data.model_copy(update={"root": config.data, "labels": True, "mixture": ()})
        inputs = inputs_of(data)
        try:
            train, val = inputs.open(config.data, data.train), inputs.open(config.data, data.val)
        except DataError as error:
            raise DataError(f"eval.probe.data = {config.data!r}: {error}") from None
    check_probed(encoder_of(model), run.config.model.name, train, val)
    data, train = with_labels(data, train, config.labels, seed=0)
    return data, train, val


def probe_of(
    run: ResolvedRun, train: Split, val: Split, engine: Engine, comm: TorchCollectives, steps_per_epoch: int
) -> PeriodicProbe | None:
    """Return the probe of a run, None where the config wants none.

    Args:
        run: its config.
        train: the run's training split, whose labels are learnt where the config names no other data.
        val: its validation split.
        engine: of the run.
        comm: of all ranks.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        ConfigError: the model gives no features.
        DataError: the labelled data are missing or damaged, or have fewer than two classes.
    """
    found = probed_data(run, engine.module, train, val)
    if found is None:
        return None
    config, (data, train, val) = run.config.eval.probe, found
    inputs, micro = inputs_of(data), evaluation_micro(data, run.plan)
    streams = tuple(functools.partial(inputs.eval_stream, split, comm.ranks, micro) for split in (train, val))
    prepare = inputs.prepare(len(train.classes), engine.device, DTYPES[run.config.precision.dtype])
    every = config.every_epochs * steps_per_epoch
    return PeriodicProbe(engine, (streams[0], streams[1]), prepare, comm, every, config.neighbours)
