"""Callbacks get events in their order; what an exception in one does; the loggers, with the real packages."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from launch.run.config import load_run
from launch.testing.commands import DEMO
from setformer_dist.callbacks import build, optional
from setformer_dist.callbacks.build import build_callbacks, register_callback
from setformer_dist.callbacks.mlflow import Mlflow
from setformer_dist.callbacks.tensorboard import TensorBoard
from setformer_dist.callbacks.wandb import Wandb
from setformer_dist.core.callback import Callback, RunEnd, RunStart, scalars
from setformer_dist.core.errors import ConfigError, TrainingError, TransientError
from setformer_dist.core.logging_config import LoggingConfig, MlflowConfig, WandbConfig
from setformer_dist.engine.events import Callbacks

FIGURES = {"loss": 0.5, "seconds": {"data": 0.25}, "lr": None, "text": "no number"}


class Recorder(Callback):
    """Notes what it hears."""

    def __init__(
        self, log: list[Any], name: str = "recorder", fails_at: str = "", error: Exception | None = None
    ) -> None:
        self.name = name
        self._log = log
        self._fails_at = fails_at
        self._error = error or RuntimeError("broken")

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):

            def note(*values: Any) -> None:
                self._log.append((self.name, name))
                if name == self._fails_at:
                    raise self._error

            return note
        return super().__getattribute__(name)


def called(callbacks: list[Callback], folder: Path, is_main: bool = True) -> Callbacks:
    return Callbacks(callbacks, folder, {"run": {"name": "x"}}, is_main)


def begin(callbacks: Callbacks) -> list[str]:
    said: list[str] = []
    callbacks.start(0, 8, None, said.append)
    return said


def test_each_event_reaches_all_in_order(tmp_path: Path) -> None:
    log: list[Any] = []
    callbacks = called([Recorder(log, "a"), Recorder(log, "b")], tmp_path)
    begin(callbacks)
    callbacks.step_end(1)
    assert log == [("a", "on_run_start"), ("b", "on_run_start"), ("a", "on_step_end"), ("b", "on_step_end")]


def test_other_ranks_call_only_what_wants_every_rank(tmp_path: Path) -> None:
    log: list[Any] = []
    everywhere = Recorder(log, "everywhere")
    everywhere.every_rank = True
    begin(called([Recorder(log, "main"), everywhere], tmp_path, is_main=False))
    assert log == [("everywhere", "on_run_start")]


@pytest.mark.parametrize(
    ("raised", "ends_with"), [(KeyError("x"), TrainingError), (TransientError("no answer"), TransientError)]
)
def test_an_exception_ends_the_run_and_names_callback_event_and_step(
    tmp_path: Path, raised: Exception, ends_with: type[Exception]
) -> None:
    log: list[Any] = []
    callbacks = called([Recorder(log, "a", "on_step_end", raised), Recorder(log, "b")], tmp_path)
    begin(callbacks)
    with pytest.raises(ends_with, match=r"callback 'a' failed in on_step_end at step 3 \((KeyError|TransientError): "):
        callbacks.step_end(3)
    callbacks.exception(raised)  # the one that failed hears no more
    assert log[-1] == ("b", "on_exception")
    assert ("a", "on_exception") not in log


def test_an_exception_where_it_is_not_essential_costs_a_warning(tmp_path: Path) -> None:
    log: list[Any] = []
    logger = Recorder(log, "logger", "on_step_end")
    logger.essential = False
    callbacks = called([logger, Recorder(log, "b")], tmp_path)
    said = begin(callbacks)
    callbacks.step_end(1)
    callbacks.step_end(2)
    assert said == [
        "warning: callback 'logger' failed in on_step_end at step 1 (RuntimeError: broken); "
        "the run continues without it"
    ]
    assert [entry for entry in log if entry[1] == "on_step_end"] == [
        ("logger", "on_step_end"),
        ("b", "on_step_end"),
        ("b", "on_step_end"),
    ]


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two callbacks are named 'recorder'"):
        called([Recorder([]), Recorder([])], tmp_path)


def test_an_event_that_there_is_not_is_refused(tmp_path: Path) -> None:
    class Mistyped(Callback):
        def on_evaluation_ended(self, step: int) -> None: ...

    with pytest.raises(ConfigError, match=r"'Mistyped' handles on_evaluation_ended, .*did you mean on_eval"):
        called([Mistyped()], tmp_path)


class Counter(Callback):
    """Counts steps over interruptions."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, step: int) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class Unwritable(Callback):
    def state(self) -> dict[str, Any]:
        return {"handle": object()}


def test_state_goes_into_the_checkpoint_and_comes_back(tmp_path: Path) -> None:
    counter = Counter()
    assert counter.name == "Counter"
    callbacks = called([TensorBoard(), counter], tmp_path)
    callbacks.step_end(1)
    state = callbacks.state()
    assert state == {"Counter": {"count": 1}}
    callbacks.step_end(2)
    callbacks.load_state(state)
    assert counter.count == 1
    callbacks.load_state({})  # a checkpoint from before the callback
    assert counter.count == 1
    with pytest.raises(TrainingError, match=r"'Unwritable' failed in state \(TypeError"):
        called([Unwritable()], tmp_path).state()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    monkeypatch.setattr(build, "_CALLBACKS", {})
    return register_callback


def test_the_config_names_callbacks(registered: Callable[[str, Any], None]) -> None:
    registered("count", lambda args: Counter())
    registered("broken", lambda args: args["every"])
    found = build_callbacks(LoggingConfig(), ["count"], {})
    assert [callback.name for callback in found] == ["tensorboard", "count"]
    with pytest.raises(ConfigError, match="registered twice"):
        registered("count", Counter)
    with pytest.raises(ConfigError, match=r"names 'cuont'.*did you mean count\?.*run\.imports"):
        build_callbacks(LoggingConfig(), ["cuont"], {})
    with pytest.raises(ConfigError, match=r"'broken' cannot be made with run\.callback_args\.broken = {}: KeyError"):
        build_callbacks(LoggingConfig(), ["broken"], {})
    with pytest.raises(ConfigError, match="'broken' is a int, not a"):
        build_callbacks(LoggingConfig(tensorboard=False), ["broken"], {"broken": {"every": 3}})


def test_arguments_of_a_callback_that_is_not_named_are_refused() -> None:
    words = ["run.callback_args.alarm.every=3"]
    with pytest.raises(ConfigError, match=r"run\.callbacks does not name 'alarm'"):
        load_run(Path(DEMO), words)
    config = load_run(Path(DEMO), [*words, 'run.callbacks=["alarm"]'])
    assert config.run.callback_args == {"alarm": {"every": 3}}


def test_a_package_that_is_not_there_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"logging\.x needs the package 'no_such_logger'.*setformer_dist\[x\]"):
        optional.require("no_such_logger", "logging.x", "x")


def test_numbers_of_nested_figures() -> None:
    assert dict(scalars(FIGURES)) == {"loss": 0.5, "seconds/data": 0.25}


def log_a_run(callback: Callback, folder: Path, first: int) -> None:
    """Have a logger hear of two steps and an evaluation."""
    folder.mkdir(exist_ok=True)
    callbacks = called([callback], folder)
    assert not begin(callbacks)
    for step in (first, first + 1):
        callbacks.figures("on_metrics", step, FIGURES)
    callbacks.figures("on_evaluation_end", first + 1, {"top1": 0.75})
    callbacks.figures("on_bad_step", first + 1, {"loss": float("inf")})
    callbacks.figures("on_refresh", first + 1, {"references": {"dead_before": 0.5}})
    callbacks.end(RunEnd(first + 1, None, {}))


def test_tensorboard(tmp_path: Path) -> None:
    log_a_run(TensorBoard(), tmp_path, 1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/seconds/data")] == [(1, 0.25), (2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval/top1")] == [(2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("refresh/references/dead_before")] == [(2, 0.5)]


def test_tensorboard_leaves_nothing_of_a_run_without_figures(tmp_path: Path) -> None:
    callbacks = called([TensorBoard()], tmp_path)
    begin(callbacks)
    callbacks.end(RunEnd(0, 15, {}))
    assert not list(tmp_path.iterdir())


def test_wandb_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for first in (1, 3):
        log_a_run(Wandb(WandbConfig(project="digits", mode="offline")), tmp_path / "run", first)
        # W&B names the folder of a run by the second in which it begins, and loses the second one of the same name.
        time.sleep(1.1)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.stem for path in files}) == 1
    rows = [{item.key or "/".join(item.nested_key): item.value_json for item in row} for row in history(files)]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (str(step), "0.5") for step in (1, 2, 3, 4)
    ]
    assert [row["eval/top1"] for row in rows if "eval/top1" in row] == ["0.75", "0.75"]
    dead = "refresh/references/dead_before"
    assert [row[dead] for row in rows if dead in row] == ["0.5", "0.5"]


def history(files: list[Path]) -> list[Any]:
    """Return the logged rows of W&B's offline files."""
    found = []
    for path in files:
        for data in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.history.item:
                found.append(record.history.item)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of 32 KiB, each part of a record after crc, length, kind."""
    at, record = 7, b""  # behind W&B's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_mlflow_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a store that needs no database
    uri = (tmp_path / "store").as_uri()
    for first in (1, 3):
        log_a_run(Mlflow(MlflowConfig(experiment="digits", tracking_uri=uri)), tmp_path / "run", first)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params == {"run.name": "x"}
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(step, 0.5) for step in (1, 2, 3, 4)]
    assert found.data.metrics["eval/top1"] == 0.75
    assert found.data.metrics["refresh/references/dead_before"] == 0.5


def test_mlflow_takes_the_figures_of_classes_with_any_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    logger = Mlflow(MlflowConfig(experiment="scenes", tracking_uri=(tmp_path / "store").as_uri()))
    (tmp_path / "run").mkdir()
    logger.on_run_start(RunStart(tmp_path / "run", {}, 0, 1, None))
    names = [
        "sky",
        "a/b",
        "bed, sofa",
        "bed; sofa",
        "a//b",
        "a/",
        "../up",
        "\u010daj \U0001f680",
        "line\nbreak",
        "x" * 400,
    ]
    logger.on_evaluation_end(1, {f"iou_{name}": 0.5 for name in names})
    (found,) = client.search_runs([client.get_experiment_by_name("scenes").experiment_id])
    assert len(found.data.metrics) == len(names)
    assert {"eval/iou_sky", "eval/iou_a/b", "eval/iou_bed_2c_ sofa"} <= found.data.metrics.keys()
