"""The figures of a run for Prometheus, by `prometheus_client`: an endpoint of the supervisor's, or a text file.

    logging.prometheus = 9400              http://127.0.0.1:9400/metrics
    logging.prometheus = "10.0.0.1:9400"   the same on the interface of that address
    logging.prometheus = "file"            runs/<run>/metrics.prom, for node_exporter's textfile collector

They come from what the supervisor knows of the ranks anyway, and from the lines that were added to metrics.jsonl and
ledger.jsonl since the last look. Nothing is computed but when somebody asks, or every ten seconds for the file; no rank
takes part in it. Its import costs 0.1 s, so the command line imports it for those who want it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from checkpoints.layout import MANIFEST, step_folders, step_of
from launch.ranks.attempt import FolderLostError
from setformer_dist import __version__
from setformer_dist.core import ledger, strictjson
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.files import open_plain
from setformer_dist.core.live import Live, LiveRank
from setformer_dist.core.logging_config import FILE, endpoint_of

TEXT_FILE = "metrics.prom"
_WRITE_EVERY_S = 10.0
_NO_SCORES = ("step", "samples", "left_out")  # of an evaluation's row
_LONGEST_LABEL = 200  # characters
_MOST = 16 << 20  # bytes of a record that one look reads; the next one goes on there


class Exposition(Collector):
    """Exposes a run as long as its context lasts.

    Args:
        folder: of the run.
        where: `logging.prometheus`.
        model: name of the run's model.

    Raises:
        LaunchError: the endpoint cannot be opened.
    """

    def __init__(self, folder: Path, where: int | str, model: str) -> None:
        self._folder = folder
        self._model = model
        self._here = socket.gethostname()
        self._figures = _Figures(folder)
        self._live: Live | None = None
        self._lock = threading.Lock()  # requests come in threads of their own
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._written_at: float | None = None
        self._server: WSGIServer | None = None
        self._file = folder / TEXT_FILE if where == FILE else None
        if self._file is None:
            self._server = _served(*endpoint_of(where), self._registry)

    def look(self, seen: Live) -> None:
        """Take note of what the ranks do; write the file, now and then."""
        self._live = seen
        now = time.monotonic()
        if self._file is not None and (self._written_at is None or now - self._written_at >= _WRITE_EVERY_S):
            self._written_at = now
            self._write()

    def _write(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # a full disk costs the figures and not the run
            write_to_textfile(str(self._file), self._registry)

    def __enter__(self) -> Exposition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live = None
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        elif self._written_at is not None and not isinstance(error, FolderLostError):
            self._write()  # that the run is not up

    def collect(self) -> Iterator[Metric]:
        """Yield all figures as they are now."""
        with self._lock:
            self._figures.update()
            found = [*self._of_run(), *self._of_ranks(self._live.ranks if self._live is not None else ())]
        yield from found

    def _of_run(self) -> Iterator[Metric]:
        f, live, run = self._figures, self._live, self._folder.name
        info = GaugeMetricFamily("setformer_run_info", "Run, model and version.", labels=("run", "model", "version"))
        info.add_metric((run, _label(self._model), __version__), 1)
        yield info
        ranks = live.ranks if live is not None else ()
        step = max((rank.step for rank in ranks), default=-1)
        gauges: list[tuple[str, str, float | None]] = [
            ("up", "Whether the supervisor has running ranks.", float(live is not None)),
            ("step", "Optimizer steps done.", max(step, f.step)),
            ("steps_per_second", "Optimizer steps per second lately.", live.steps_per_s if live is not None else None),
            ("images_per_second", "Samples per second of all ranks, at the last logged step.", f.images_per_s),
            ("loss", "Training loss at the last logged step.", f.loss),
            ("ranks", "Ranks of the present attempt.", len(ranks)),
            ("hosts", "Hosts of the present attempt.", len({rank.host for rank in ranks})),
        ]
        newest = _newest(self._folder)
        if newest is not None:
            gauges += [
                ("checkpoint_step", "Optimizer step of the newest checkpoint.", newest[0]),
                ("checkpoint_age_seconds", "Seconds since the newest checkpoint was complete.", newest[1]),
            ]
        for name, says, value in gauges:
            if value is not None:
                yield _one(GaugeMetricFamily(f"setformer_{name}", says, labels=("run",)), run, value)
        yield _one(CounterMetricFamily("setformer_attempts", "Starts of the ranks.", labels=("run",)), run, f.attempts)
        says = "Steps whose loss or gradient was not finite, or whose loss was a spike."
        yield _one(CounterMetricFamily("setformer_bad_steps", says, labels=("run",)), run, f.bad_steps)
        failures = CounterMetricFamily("setformer_failures", "Attempts that failed, by kind.", labels=("run", "how"))
        for how, times in sorted(f.failures.items()):
            failures.add_metric((run, _label(how)), times)
        yield failures
        scores = GaugeMetricFamily("setformer_evaluation", "Figures of the last evaluation.", labels=("run", "metric"))
        for name, value in f.evaluation.items():
            scores.add_metric((run, _label(name)), value)
        yield scores

    def _of_ranks(self, ranks: tuple[LiveRank, ...]) -> Iterator[Metric]:
        run, labels = self._folder.name, ("run", "rank", "host")
        rows: list[tuple[str, str, list[float | None]]] = [
            ("step", "Optimizer step that a rank is at.", [float(r.step) for r in ranks]),
            ("silence_seconds", "Seconds since a rank's last sign of life.", [r.silent_s for r in ranks]),
            ("data_wait_ratio", "Share of the last minute spent waiting for data.", [r.waiting for r in ranks]),
            ("memory_bytes", "Resident memory of a rank.",
             [None if r.memory_mib is None else r.memory_mib * 2**20 for r in ranks]),
            ("busy_cores", "Cores that a rank and its readers keep busy.", [r.cores for r in ranks]),
            ("gpu_busy_ratio", "Share of time in which a rank's GPU computed.", [r.gpu for r in ranks]),
        ]  # fmt: skip
        for name, says, values in rows:
            family = GaugeMetricFamily(f"setformer_rank_{name}", says, labels=labels)
            for rank, value in zip(ranks, values, strict=True):
                if value is not None:
                    family.add_metric((run, str(rank.rank), _label(rank.host or self._here)), value)
            yield family


def _label(text: str) -> str:
    """Return a text from a record as a label: short, and without half characters, which no exposition can hold."""
    return text[:_LONGEST_LABEL].encode("utf-8", "backslashreplace").decode()


def _one(family: GaugeMetricFamily | CounterMetricFamily, run: str, value: float) -> Metric:
    family.add_metric((run,), value)
    return family


def _served(address: str, port: int, registry: CollectorRegistry) -> WSGIServer:
    try:
        server, _ = start_http_server(port, address, registry)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise LaunchError(
            f"logging.prometheus: {address} port {port} cannot be used ({why}): give another port, or 'file'"
        ) from None
    return server


def _newest(folder: Path) -> tuple[int, float] | None:
    """Return step and age in seconds of the newest checkpoint, as far as names tell; None where there is none."""
    with contextlib.suppress(OSError):
        for step in step_folders(folder / "checkpoints"):
            if (manifest := step / MANIFEST).is_file():
                return step_of(step) or 0, max(0.0, time.time() - manifest.stat().st_mtime)
    return None


class _Figures:
    """What a run has written of itself, read as it grows."""

    def __init__(self, folder: Path) -> None:
        self._metrics, self._ledger = _Tail(folder / "metrics.jsonl"), _Tail(folder / ledger.LEDGER)
        self.step = 0
        self.loss: float | None = None
        self.images_per_s: float | None = None
        self.evaluation: dict[str, float] = {}
        self.attempts = self.bad_steps = 0
        self.failures: Counter[str] = Counter()

    def update(self) -> None:
        """Read what has been added."""
        for line in self._metrics.lines():
            with contextlib.suppress(ValueError):
                row = strictjson.parse(line)
                if isinstance(row, dict):
                    self._row(row)
        for line in self._ledger.lines():
            if (event := ledger.event_of(line)) is not None:
                self._event(event)

    def _row(self, row: dict[str, object]) -> None:
        kind = row.get("kind")
        numbers = {key: float(v) for key, v in row.items() if isinstance(v, int | float) and abs(v) < 2**1000}
        if kind == "train":
            self.step = int(numbers.get("step", self.step))
            self.loss, self.images_per_s = numbers.get("loss"), numbers.get("images_per_s")
        elif kind == "eval":
            self.evaluation = {
                key: value for key, value in numbers.items() if key not in ("step", "samples", "left_out")
            }
        elif kind == "guard":
            self.bad_steps += 1

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "attempt":
            self.attempts += 1
        elif event["event"] == "ended" and event.get("why") not in ledger.WELL:
            self.failures[str(event.get("why"))] += 1


class _Tail:
    """The lines of a record that were added since the last look; a line that is not whole yet waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def lines(self) -> list[bytes]:
        """Return new lines without their ends; none where the record cannot be read."""
        try:
            descriptor = open_plain(self._path, os.O_RDONLY)
        except OSError:
            return []
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size < self._at:  # another file of that name
                self._at = 0
            file.seek(self._at)
            text = file.read(_MOST)
        whole, end, _ = text.rpartition(b"\n")
        if not end and len(text) == _MOST:  # no line of ours
            self._at += _MOST
        self._at += len(whole) + len(end)
        return whole.split(b"\n") if end else []
