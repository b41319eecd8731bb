"""Devices and links, as a small table; each figure names its source. A guess is called an assumption.

How fast kernels run is measured on one GPU (H100, docs/results.md: SeTformer-Tiny at 224², batch 128, bf16: 58 ms of
kernels in a step of 152 ms) and on CPUs. Those kernels reach 5 % of the peak of matrix products: memory and special
functions bound them. So other GPUs are scaled by memory bandwidth, which is an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GB = 10**9

# SeTformer-Tiny at 224², which all speeds were measured with: multiply-adds of an image, modules without submodules.
_TINY_MULTIPLY_ADDS = 3.551e9
_TINY_MODULES = 197
_IMAGES, _STEP_S, _KERNELS_S = 128, 0.152, 0.058  # H100, bf16, eager (docs/results.md, "A whole model")
_MEASURED = 6 * _TINY_MULTIPLY_ADDS * _IMAGES / _KERNELS_S  # FLOP/s that kernels reach in training
_LAUNCH_S = (_STEP_S - _KERNELS_S) / _TINY_MODULES  # seconds of a step that Python and launches take, per module
_H100_BANDWIDTH = 3350 * GB


@dataclass(frozen=True)
class Link:
    """A way between ranks.

    Attributes:
        bandwidth: bytes/s of one rank in one direction.
        latency: seconds of one hop.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    Attributes:
        name: as `--gpu` has it.
        memory: bytes.
        reserved: bytes of it that context, libraries and fragmentation take: assumption.
        bandwidth: bytes/s of its memory.
        peak: FLOP/s of dense matrix products, by dtype that it computes.
        reached: FLOP/s that kernels of a training step reach in 16 bits (in fp32 on a CPU).
        launch_s: seconds that each module of the model adds to a step besides its kernels.
        inside: link between ranks of a node.
        between: link between nodes, of one rank.
        buckets: whether buckets are set aside whole; a CPU gives memory as it is written to.
        sources: where the figures are from.
    """

    name: str
    memory: int
    reserved: int
    bandwidth: float
    peak: Mapping[str, float]
    reached: float
    launch_s: float
    inside: Link
    between: Link
    buckets: bool
    sources: str

    def reached_in(self, dtype: str) -> float:
        """Return the FLOP/s that kernels reach; twice the bytes take twice the time on a GPU (assumption)."""
        return self.reached / 2 if self.buckets and dtype == "fp32" else self.reached


def _gpu(
    name: str, memory: int, bandwidth: float, peak: Mapping[str, float], inside: Link, between: Link, sources: str
) -> Device:
    reached = _MEASURED * bandwidth / _H100_BANDWIDTH
    return Device(name, memory, 2 * 2**30, bandwidth, peak, reached, _LAUNCH_S, inside, between, True, sources)


DEVICES: dict[str, Device] = {
    "h100": _gpu(
        "h100", 80 * GB, _H100_BANDWIDTH, {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
        Link(450 * GB, 3e-6), Link(50 * GB, 8e-6),
        "NVIDIA H100 SXM data sheet; NVLink 4, 450 GB/s each way; one 400 Gb/s adapter per GPU (DGX H100); "
        "kernel time measured; latencies assumed",
    ),
    "a100": _gpu(
        "a100", 80 * GB, 2039 * GB, {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
        Link(300 * GB, 3e-6), Link(25 * GB, 8e-6),
        "NVIDIA A100 80GB SXM data sheet; NVLink 3, 300 GB/s each way; one 200 Gb/s adapter per GPU (DGX A100); "
        "kernel time scaled from H100 by memory bandwidth (assumed); latencies assumed",
    ),
    "v100": _gpu(
        "v100", 32 * GB, 900 * GB, {"fp16": 125e12, "fp32": 15.7e12},
        Link(150 * GB, 4e-6), Link(6.25 * GB, 10e-6),
        "NVIDIA V100 SXM2 32GB data sheet; NVLink 2, 150 GB/s each way; four 100 Gb/s adapters for eight GPUs (DGX-1); "
        "kernel time scaled from H100 by memory bandwidth (assumed); latencies assumed",
    ),
    "cpu": Device(
        "cpu", 8 * 2**30, 2**29, 30 * GB, {"bf16": 0.2e12, "fp32": 0.2e12},
        6 * _TINY_MULTIPLY_ADDS * 6.51, 0.0, Link(5 * GB, 30e-6), Link(1.25 * GB, 100e-6), False,
        "a rank on 2 cores of an AMD EPYC: 6.51 images/s of SeTformer-Tiny in training, 198 GFLOP/s of a product "
        "(docs/results.md); 8 GiB for each rank, gloo on one machine and 10 Gb/s between machines assumed",
    ),
}  # fmt: skip
