"""Metrics in TensorBoard's format: tags "train/…", "eval/…" and "guard/…" in <run>/tensorboard/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from setformer_dist.core.callback import Callback, RunEnd, RunStart, scalars


class TensorBoard(Callback):
    """Writes event files; metrics.jsonl holds the same figures."""

    name = "tensorboard"
    essential = False

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._board: SummaryWriter | None = None

    def on_run_start(self, run: RunStart) -> None:
        """Note the folder; it is opened with the first figure."""
        self._folder = run.folder / "tensorboard"

    def on_metrics(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the figures of training."""
        self._write("train", step, metrics)

    def on_evaluation_end(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write the figures of an evaluation."""
        self._write("eval", step, metrics)

    def on_refresh(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write what a refresh of the reference sets did."""
        self._write("refresh", step, metrics)

    def on_bad_step(self, step: int, values: Mapping[str, object]) -> None:
        """Write what the guard saw."""
        self._write("guard", step, values)

    def on_run_end(self, end: RunEnd) -> None:
        """Flush and close."""
        self._close()

    def on_exception(self, error: BaseException) -> None:
        """Flush and close."""
        self._close()

    def _write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        assert self._folder is not None  # on_run_start came first
        board = self._board = self._board or SummaryWriter(str(self._folder))
        for name, value in scalars(values):
            board.add_scalar(f"{kind}/{name}", value, step)

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()
