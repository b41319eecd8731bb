"""torch.distributed behind the Collectives protocol, and the time that DeepSpeed's collectives take.

Control traffic (JSON values, wishes to stop, sums of metrics) has a gloo group of its own, so that it never
waits for a device. JSON instead of pickled objects: nothing that arrives can run code.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed.comm.comm as deepspeed_comm
import torch
import torch.distributed as dist
from deepspeed import init_distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__ as deepspeed_ops
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from setformer_dist.core.errors import LaunchError, TransientError
from setformer_dist.core.ranks import PORT_GIVEN_VARIABLE, RankInfo

log = logging.getLogger(__name__)

T = TypeVar("T")


def connect(ranks: RankInfo, init_method: str | None = None, timeout_minutes: float = 10.0) -> bool:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs. Return False, and do nothing, where this process has joined.

    DeepSpeed's shared-memory all-reduce is switched off before: it serves inference only, costs a compilation,
    and leaves 69 MB per rank in /dev/shm even after a clean exit.

    Raises:
        LaunchError: the port that the user named is taken.
        TransientError: the other ranks did not come within the time limit, or went away.
    """
    if dist.is_initialized():
        deepspeed_ops["deepspeed_shm_comm"] = False
        init_distributed(dist_init_required=False, verbose=False)  # DeepSpeed knows nothing of it yet under Ray Train
        return False
    devices = get_accelerator().device_count()
    if get_accelerator().device_name() != "cpu":
        if ranks.local_rank >= devices:
            raise LaunchError(
                f"{ranks.local_world_size} ranks on a host with {devices} devices: start at most {devices}"
            )
        get_accelerator().set_device(ranks.local_rank)
    deepspeed_ops["deepspeed_shm_comm"] = False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if init_method is None and os.environ.get("MASTER_PORT", "0") == "0" and ranks.world_size > 1:
        raise LaunchError("MASTER_PORT is not set, or 0: start the ranks with `setformer train` or `deepspeed`")
    limit = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            get_accelerator().communication_backend_name() if get_accelerator().is_available() else "gloo",
            init_method=init_method,
            store=None if init_method is not None else _meeting_place(ranks, limit),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=limit,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = init_method or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason or "address already in use" in reason.lower():
            taken = LaunchError if os.environ.get(PORT_GIVEN_VARIABLE, "1") == "1" else TransientError
            raise taken(f"port {place} is in use by another process: give a free one with --port") from None
        raise TransientError(
            f"rank {ranks.rank} could not join {ranks.world_size} ranks at {place}: {reason}"
        ) from None
    init_distributed(dist_init_required=False, verbose=False)
    return True


def _meeting_place(ranks: RankInfo, limit: timedelta) -> Store:
    """Return the store by which the ranks find each other, at MASTER_ADDR and MASTER_PORT.

    Rank 0 listens on the address that the others are given and on no other. torch's own would listen on all
    interfaces, and anyone who reaches it could read and change what the ranks exchange. A single rank listens nowhere.
    Under torchrun its agent listens there already, and every rank is a client.

    Raises:
        DistNetworkError: the address is taken, not of this host, or does not answer in time.
    """
    if ranks.world_size == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens there itself, for all its attempts
        shared = TCPStore(host, port, ranks.world_size, is_master=False, timeout=limit)
        return PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    if not ranks.is_main:
        return TCPStore(host, port, ranks.world_size, is_master=False, timeout=limit)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family, backlog=2048) as server:
            descriptor = os.dup(server.fileno())  # the store closes its own
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # an address that is translated on its way here
            log.warning("MASTER_ADDR %s is not an address of this host: rank 0 listens on all interfaces", host)
            return TCPStore(host, port, ranks.world_size, is_master=True, timeout=limit, wait_for_workers=False)
        taken = " (EADDRINUSE)" if error.errno == errno.EADDRINUSE else ""
        raise dist.DistNetworkError(f"{error}{taken}") from None
    return TCPStore(
        host, port, ranks.world_size, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=descriptor
    )


def disconnect() -> None:
    """Leave the group; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TorchCollectives:
    """The Exchange protocol over torch.distributed, on CPU tensors.

    Args:
        ranks: this process's place.
        timeout_minutes: how long a rank waits for the others.
        own: a group of its own, for a thread that runs beside others.
    """

    def __init__(self, ranks: RankInfo, timeout_minutes: float = 10.0, own: bool = False) -> None:
        self._ranks = ranks
        self._group: dist.ProcessGroup | None = None
        if (own and ranks.world_size > 1) or dist.get_backend() != "gloo":
            group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    @property
    def ranks(self) -> RankInfo:
        """This process's place."""
        return self._ranks

    @property
    def tensors(self) -> TensorSums:
        """Sums and maxima of tensors on the CPU."""
        return TensorSums(self._group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)

    def broadcast_json(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self._ranks.world_size == 1:
            return value
        text = json.dumps(value).encode() if self._ranks.is_main else b""
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0, group=self._group)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self._ranks.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0, group=self._group)
        received: T = json.loads(data.numpy().tobytes())
        return received

    def gather_json(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        if self._ranks.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        size = torch.tensor([len(text)])
        sizes = [torch.zeros_like(size) for _ in range(self._ranks.world_size)]
        dist.all_gather(sizes, size, group=self._group)
        data = torch.zeros(max(int(s) for s in sizes), dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = [torch.zeros_like(data) for _ in sizes]
        dist.all_gather(parts, data, group=self._group)
        return [json.loads(p[: int(s)].numpy().tobytes()) for p, s in zip(parts, sizes, strict=True)]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return the rows of all ranks, (r, columns) on the CPU, by rank, on rank 0; None on others.

        Args:
            rows: this rank's; of the same columns and dtype on all.
        """
        if self._ranks.world_size == 1:
            return rows
        count = torch.tensor([len(rows)])
        counts = [torch.zeros_like(count) for _ in range(self._ranks.world_size)]
        dist.all_gather(counts, count, group=self._group)
        if not self._ranks.is_main:
            if len(rows):
                dist.send(rows.contiguous(), 0, group=self._group)
            return None
        parts = [rows]
        for rank, of_rank in enumerate(counts[1:], start=1):
            part = rows.new_empty((int(of_rank), rows.shape[1]))
            if len(part):
                dist.recv(part, rank, group=self._group)
            parts.append(part)
        return torch.cat(parts)

    def send_bytes(self, data: bytearray, to: int) -> None:
        """Send bytes to a rank, which receives as many."""
        dist.send(torch.frombuffer(data, dtype=torch.uint8), to, group=self._group)

    def receive_bytes(self, data: bytearray, source: int) -> None:
        """Fill a buffer with what a rank sends."""
        dist.recv(torch.frombuffer(data, dtype=torch.uint8), source, group=self._group)

    def max(self, value: float) -> float:
        """Return the largest value of all ranks."""
        return self.max_later(value)()

    def max_later(self, value: float) -> Callable[[], float]:
        """Begin to find the largest value of all ranks; the call that is returned waits for it."""
        largest = torch.tensor([float(value)], dtype=torch.float64)
        work = None
        if self._ranks.world_size > 1:
            work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def found() -> float:
            if work is not None:
                work.wait()
            return float(largest)

        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, in fp64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self._ranks.world_size > 1:
            dist.all_reduce(total, group=self._group)
        return [float(v) for v in total]


class TensorSums:
    """`ops.kmeans.Across` over torch.distributed: sums and maxima of tensors over all ranks, element by element.

    Args:
        group: the ranks' group for tensors of this kind; None is that of the devices.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums, in a tensor of its own."""
        dist.all_reduce(values := values.clone(), group=self._group)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest values, in a tensor of its own."""
        dist.all_reduce(values := values.clone(), op=dist.ReduceOp.MAX, group=self._group)
        return values


class RowGroup:
    """`ops.parts.Parts` over torch.distributed: neighbouring ranks, each with a part of every image.

    Args:
        ranks: this process's place; every rank of the run makes its group at the same time.
        count: ranks of a group, a divisor of all.
        timeout_minutes: how long a rank waits for the others.
    """

    def __init__(self, ranks: RankInfo, count: int, timeout_minutes: float = 10.0) -> None:
        self.index, self.count = ranks.rank % count, count
        self._first = ranks.rank - self.index
        limit = timedelta(minutes=timeout_minutes)
        for first in range(0, ranks.world_size, count):
            group = dist.new_group(list(range(first, first + count)), timeout=limit)
            if first == self._first:
                assert isinstance(group, dist.ProcessGroup)
                self._group = group

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over the group, in a tensor of its own; DeepSpeed's call, so that `CommMeter` times it."""
        deepspeed_comm.all_reduce(values := values.clone(), group=self._group)
        return values

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Give values to the rank below (or above), return those of the one above (or below), zeros at the edge."""
        found = torch.zeros_like(values)
        to, source = (self.index + 1, self.index - 1) if down else (self.index - 1, self.index + 1)
        ends = [(dist.isend, values, to), (dist.irecv, found, source)]
        operations = [
            dist.P2POp(way, tensor, self._first + peer, self._group)
            for way, tensor, peer in ends
            if 0 <= peer < self.count
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return found

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of all ranks of the group, stacked."""
        found = [torch.empty_like(values) for _ in range(self.count)]
        deepspeed_comm.all_gather(found, values, group=self._group)
        return torch.stack(found)


class _TimedWork:
    """A running collective; waiting for it counts as communication."""

    def __init__(self, work: dist.Work, meter: CommMeter) -> None:
        self._work = work
        self._meter = meter

    def wait(self, *args: timedelta) -> bool:
        start = time.perf_counter()
        result = self._work.wait(*args)
        self._meter.seconds += time.perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class CommMeter:
    """Stands before DeepSpeed's communication backend and adds up the host's time in its collectives.

    On CPUs that is the whole cost; on GPUs, where collectives overlap with the computation, it is the time that
    the host waits for them.
    """

    TIMED = (
        "all_reduce",
        "all_reduce_coalesced",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "broadcast",
        "barrier",
    )

    def __init__(self) -> None:
        self.seconds = 0.0
        self._backend = deepspeed_comm.cdb

    def install(self) -> None:
        """Put the meter in place of the backend (DeepSpeed's one global, `deepspeed.comm.comm.cdb`)."""
        deepspeed_comm.cdb = self

    def remove(self) -> None:
        """Give the backend its place back; DeepSpeed's collectives are not measured any more."""
        if deepspeed_comm.cdb is self:
            deepspeed_comm.cdb = self._backend

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        if name not in self.TIMED:
            return attribute

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = attribute(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return _TimedWork(result, self) if hasattr(result, "wait") else result

        return timed
