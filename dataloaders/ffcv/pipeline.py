"""FFCV's thread, slots and compiled decoder, driven from outside: which samples, which crops, which are damaged.

Of FFCV's own parts these are used: `EpochIterator` (its thread and slots), `Graph` and `Compiler` (the pipeline, made
to machine code by numba), `imdecode` and `resize_crop` (libjpeg-turbo and OpenCV). Not used, with the reason in
`facts` of FFCV 1.0.2: `Loader` (a dict entry per sample, 0.7 GB and 3 s for ImageNet), its orders (they duplicate or
drop samples on several ranks), its decoders (crops from thread-local random numbers, the return code of the decoder
thrown away, so that a damaged sample shows the slot's last picture) and its memory managers.

    order of positions 0, 1, 2, …   a batch is a stretch of positions
    records[position]               where the image is, its crop, whether to mirror it: filled just before decoding,
                                    in FFCV's thread, by the `prepare` of the caller
    answer                          (m, H + 1, W, 3) uint8: one row more than the picture, whose first byte says
                                    whether it was decoded

FFCV compiles a pipeline of its own per process, so this module is imported only where `data.engine = "ffcv"`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from ffcv.fields import RGBImageField
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec

from setformer_dist.core.errors import ConfigError, DataError

# What the compiled decoder gets for a position. `size` 0 stands for a sample that must not be decoded.
RECORD = np.dtype(
    [
        ("place", "<u8"),
        ("size", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("raw", "<u4"),
        ("flip", "<u4"),
        ("top", "<u4"),
        ("left", "<u4"),
        ("crop_height", "<u4"),
        ("crop_width", "<u4"),
        ("upside_down", "<u4"),
    ]
)
_PLAN = np.dtype([("f0", RECORD)])  # FFCV names the columns of its records f0, f1, …

GOOD = 1
# How often a waiting consumer looks whether FFCV's thread is still alive, in seconds.
_LOOK = 0.2
# How long its end is waited for, in seconds.
_PATIENCE = 10.0

_SHAPE_LOCK = threading.Lock()


class _CropDecoder(Operation):  # type: ignore[misc]
    """Decode, crop, resize (OpenCV's area interpolation, as FFCV's own decoders), mirror."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        dtype = np.dtype("u1")
        shape = (self.shape[0] + 1, self.shape[1], 3)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        in_parallel = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)

        def decode(batch: Any, destination: Any, records: Any, storage: Any) -> Any:
            for place in in_parallel(len(batch)):
                record = records[batch[place]]
                rows = destination.shape[1] - 1
                status = destination[place, rows]
                status[0, 0] = 0
                if record["size"] == 0:
                    continue
                data = storage[0][record["place"] : record["place"] + record["size"]]
                height, width = int(record["height"]), int(record["width"])
                if record["raw"]:
                    pixels = data.reshape(height, width, 3)
                    failed = 0
                else:
                    # Per image and thread, not per slot and sample as in FFCV: libc keeps and reuses the block.
                    pixels = np.empty((height, width, 3), np.uint8)
                    failed = decode_jpeg(
                        data, pixels.reshape(-1), height, width, height, width, 0, 0, 1, 1, False, False
                    )
                if failed != 0:
                    continue
                top, left = record["top"], record["left"]
                picture = destination[place, :rows]
                resize(pixels, top, top + record["crop_height"], left, left + record["crop_width"], picture)
                if record["flip"]:
                    mirror(picture)
                if record["upside_down"]:
                    turn_over(picture)
                status[0, 0] = GOOD
            return destination[: len(batch)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def mirror(picture: Any) -> None:
    """Mirror (H, W, 3) pixels left to right, in place."""
    last = picture.shape[1] - 1
    for row in range(picture.shape[0]):
        for column in range((last + 1) // 2):
            for channel in range(3):
                kept = picture[row, column, channel]
                picture[row, column, channel] = picture[row, last - column, channel]
                picture[row, last - column, channel] = kept


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def turn_over(picture: Any) -> None:
    """Mirror (H, W, 3) pixels top to bottom, in place."""
    last = picture.shape[0] - 1
    for row in range((last + 1) // 2):
        for column in range(picture.shape[1]):
            for channel in range(3):
                kept = picture[row, column, channel]
                picture[row, column, channel] = picture[last - row, column, channel]
                picture[last - row, column, channel] = kept


class _Mapped:
    """The file in memory, and what is done before each batch (FFCV's memory manager and context in one)."""

    def __init__(self, path: str, prepare: Callable[[int], None]) -> None:
        self.state = (np.asarray(np.memmap(path, np.uint8, mode="r")),)
        self._prepare = prepare

    def schedule_epoch(self, batches: object) -> _Mapped:
        return self

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start_batch(self, batch: int) -> None:
        self._prepare(batch)


@dataclass
class _Reader:
    metadata: npt.NDArray[np.void]


class Pipeline:
    """FFCV's compiled pipeline; what FFCV calls a loader. One `Run` after the other takes batches from it.

    Args:
        path: the .beton file.
        batch_size: samples of a batch.
        threads: that decode; at most as many as the machine has.
        ahead: batches prepared ahead.
    """

    def __init__(self, path: str, batch_size: int, threads: int, ahead: int) -> None:
        self.path = path
        self.batch_size = batch_size
        self.batches_ahead = ahead
        self.num_workers = min(threads, numba.config.NUMBA_NUM_THREADS)
        self.reader = _Reader(np.zeros(1, _PLAN))
        self.traversal_order = None
        self.memory_manager: object = None
        self._decoder, self.graph, self.code = _compiled(self.num_workers > 1)

    def run(self, count: int, shape: tuple[int, int], prepare: Callable[[int, npt.NDArray[np.void]], None]) -> Run:
        """Begin to decode.

        Args:
            count: positions in all; a batch is the next `batch_size` of them.
            shape: (H, W) of the answers.
            prepare: called in FFCV's thread with a batch's number and its records, (m,) of `RECORD`, to fill.
        """
        plan = np.zeros(count, _PLAN)
        size = self.batch_size
        self.reader.metadata = plan
        self.memory_manager = _Mapped(self.path, lambda n: prepare(n, plan["f0"][n * size : (n + 1) * size]))
        with _SHAPE_LOCK:
            self._decoder.shape = shape  # which the slots, allocated in the next line, are made for
            return Run(self, count)


@functools.cache
def _compiled(parallel: bool) -> tuple[_CropDecoder, Graph, object]:
    """Return FFCV's pipeline; one for all of a process, since compiling takes a second."""
    _choose_threading()
    torch_threads = torch.get_num_threads()
    Compiler.set_num_threads(2 if parallel else 1)  # decides for what the code is compiled
    decoder = _CropDecoder((1, 1))
    spec = PipelineSpec("image", decoder=decoder, transforms=[])
    graph = Graph({"image": spec}, {"image": RGBImageField()}, {"image": 0}, np.zeros(1, _PLAN), None)
    code = graph.codegen_all(graph.collect_requirements()[1])
    torch.set_num_threads(torch_threads)
    return decoder, graph, code


def _choose_threading() -> None:
    """Have numba use TBB or OpenMP: its own "workqueue" ends the process when two pipelines run at once.

    Raises:
        ConfigError: neither is here, or the environment asks for the third.
    """
    asked = str(numba.config.THREADING_LAYER)
    if asked in ("default", "threadsafe"):
        numba.config.THREADING_LAYER = "threadsafe"
    elif asked not in ("tbb", "omp", "safe"):
        raise ConfigError(f'NUMBA_THREADING_LAYER = "{asked}" cannot run two pipelines at once: unset it, or say "omp"')
    try:
        numba.set_num_threads(1)  # loads the layer
    except ValueError as error:
        raise ConfigError(f'data.engine = "ffcv" needs TBB or OpenMP ({error}): install libgomp1 or libtbb12') from None


class Run:
    """Batches of one stretch of positions. Always to be closed."""

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        self._torch_threads = torch.get_num_threads()
        self._iterator = _Iterator(pipeline, np.arange(count, dtype=np.int64))

    def next(self, timeout: float) -> npt.NDArray[np.uint8]:
        """Return the next batch, (m, H + 1, W, 3) uint8; to be copied before the next call, as FFCV reuses its slots.

        Raises:
            DataError: FFCV's thread died or gave nothing within `timeout` seconds; an error of `prepare` as it is.
        """
        queue = self._iterator.output_queue
        end = time.monotonic() + timeout
        with queue.not_empty:
            while not queue.queue:
                if not self._iterator.is_alive():
                    raise self._iterator.error or DataError("FFCV's thread ended before its last batch")
                if time.monotonic() > end:
                    raise DataError(
                        f"FFCV gave no batch within {timeout:g} s: the storage stalls, or raise data.read_timeout"
                    )
                queue.not_empty.wait(_LOOK)
        (answer,) = next(self._iterator)
        if torch.get_num_threads() != self._torch_threads:
            torch.set_num_threads(self._torch_threads)  # FFCV's thread sets its own number for all of the process
        found: npt.NDArray[np.uint8] = answer
        return found

    def close(self) -> None:
        """End FFCV's thread, after the batch that it is at; a thread that hangs in a read is left behind (a daemon)."""
        self._iterator.close()
        self._iterator.iter_ixes = iter(())  # FFCV looks at its own flag only while its queue is full
        queue = self._iterator.output_queue
        end = time.monotonic() + _PATIENCE
        while self._iterator.is_alive() and time.monotonic() < end:
            with queue.mutex:
                queue.queue.clear()
                queue.not_full.notify()
            self._iterator.join(0.01)


class _Iterator(EpochIterator):  # type: ignore[misc]
    """FFCV's thread, which keeps what ended it."""

    def __init__(self, pipeline: Pipeline, order: npt.NDArray[np.int64]) -> None:
        self.error: BaseException | None = None
        super().__init__(pipeline, order)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # noqa: BLE001  (raised where the batch is waited for)
            self.error = error
