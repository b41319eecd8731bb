"""Where the time of a training step goes: kernels by kind, gaps between them, and the host; memory; FLOP utilisation.

    python -m benchmarks.step_profile [--models setformer_tiny …] [--compile off blocks model …] [--size 224]

"blocks+graphs" and "model+graphs" are compiled with CUDA graphs, for a GPU. "graphs" is how many were recorded, and
"skips" how often torch left a part out, whose reasons it writes to the terminal.

Forward, cross entropy, backward and a fused AdamW step, bf16 on a GPU and fp32 on a CPU. "busy" is the time in which
kernels ran, "gaps" what is left of the step, "host" how long Python and launches take until the last kernel is queued
(on a GPU that is not waited for). Kinds are told by the names of kernels. On a CPU operators stand for kernels.
"""

from __future__ import annotations

import argparse
import collections
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import setformer_dist.models  # noqa: F401  (registers the models)
from benchmarks.machine import describe
from benchmarks.measure import DEVICE, peak_bytes, seconds, wait, write
from setformer_dist.core.boxes import detection_loss
from setformer_dist.core.pixel_maps import pixel_loss
from setformer_dist.engine.compiled import blocks_of, compile_model
from setformer_dist.engine.config import CompileConfig
from setformer_dist.engine.cuda_graphs import recorded, skips
from setformer_dist.engine.metrics import peak_flops
from setformer_dist.models.detector import Detector
from setformer_dist.models.measure import multiply_adds_of
from setformer_dist.models.recompute import set_recompute
from setformer_dist.models.segmenter import Segmenter
from setformer_dist.ops import block

DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
# What the names of our Triton kernels begin with.
OURS = ("forward", "backward", "references_backward", "gradients")
# Kind of a kernel by the first of these that its name holds; a fused one's names all that it does.
KINDS = (
    ("SeT attention", ("setformer", "setattention")),
    ("fused by the compiler", ("triton_", "graph_", "cpp_fused")),
    ("SDPA", ("flash", "fmha", "scaled_dot", "cudnn_generated")),
    ("convolution", ("conv", "implicit", "wgrad", "dgrad")),
    ("product", ("gemm", "matmul", "addmm", "cutlass", "nvjet", "aten::mm", "aten::bmm", "xmma")),
    ("norm", ("norm",)),
    ("optimizer", ("adam", "multi_tensor")),
    ("sum", ("reduce", "sum")),
    ("copy", ("memcpy", "memset", "copy", "cat")),
)
PROFILED = 5  # steps
MODES = ("off", "blocks", "model", "blocks+graphs", "model+graphs")


def kind_of(name: str) -> str:
    """Return what a kernel does, by its name."""
    lower = name.lower()
    if lower.startswith(OURS):
        return KINDS[0][0]
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), "elementwise and other")


@dataclass(frozen=True)
class Learnt:
    """What a model learns: a class of 1000; or with `segment` or `detect` so many classes of pixels or objects."""

    segment: int = 0
    detect: int = 0


def model_of(name: str, size: int, what: Learnt) -> torch.nn.Module:
    """Return a classifier, or UPerNet or RetinaNet around it."""
    fixed = {"img_size": size} if name.startswith("swin") else {}
    if not (what.segment or what.detect):
        return timm.create_model(name, num_classes=1000, **fixed)  # type: ignore[no-any-return]
    encoder = timm.create_model(name, num_classes=0, **fixed)
    if what.detect:
        return Detector(encoder, name, what.detect, 256)
    return Segmenter(encoder, name, what.segment, 512, auxiliary=True)


def loss_of(outputs: Any, batch: int, size: int, what: Learnt) -> torch.Tensor:
    """Return the loss of a task by labels of no meaning."""
    if what.segment:
        masks = (torch.arange(size, device=DEVICE) % what.segment).to(torch.uint8).expand(batch, size, size)
        return (pixel_loss(outputs[0], masks) + 0.4 * pixel_loss(outputs[1], masks)) / masks.numel()
    if what.detect:  # objects of all sizes in a row, 16 in an image
        ends = torch.arange(1, 17, device=DEVICE) * (size / 17)
        boxes = torch.stack([ends * 0.3, ends * 0.2, ends, ends, ends % what.detect // 1], dim=1)
        return detection_loss(outputs, boxes.expand(batch, 16, 5)).mean()
    return F.cross_entropy(outputs.float(), torch.arange(batch, device=DEVICE) % 1000)


def step_of(name: str, size: int, batch: int, mode: str, recompute: str, what: Learnt) -> tuple[Any, torch.nn.Module]:
    """Return a training step and its model."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # frees the memory of graphs, too
    torch._dynamo.utils.counters.clear()
    model = model_of(name, size, what).to(DEVICE, DTYPE).train()
    set_recompute(model, recompute, name)  # type: ignore[arg-type]
    compiled, _, graphs = mode.partition("+")
    config = CompileConfig(mode=compiled, cudagraphs=bool(graphs))  # type: ignore[arg-type]
    compile_model(model, config, processes=1 if DEVICE == "cpu" else 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=DTYPE)

    def train() -> None:
        loss_of(model(images), batch, size, what).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train, model


def profiled(train: Any) -> dict[str, float]:
    """Return milliseconds of a step by kind of kernel."""
    on_device = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as found:
        for _ in range(PROFILED):
            train()
        wait()
    kinds: dict[str, float] = collections.Counter()
    for event in found.key_averages():
        if on_device and ("CUDA" not in str(event.device_type) or event.is_user_annotation):
            continue  # an annotation, such as the optimizer's, spans kernels that are counted by themselves
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        kinds[kind_of(event.key)] += spent / 1e3 / PROFILED
    return {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda entry: -entry[1])}


def row(name: str, size: int, batch: int, mode: str, recompute: str, budget: float, what: Learnt) -> dict[str, Any]:
    """Measure one model."""
    gc.collect()  # of the last one, whose compiled blocks refer to themselves
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    train, model = step_of(name, size, batch, mode, recompute, what)
    began = time.perf_counter()
    train()
    wait()
    first = time.perf_counter() - began
    train()  # CUDA graphs are recorded in the second step
    took = seconds(train, budget, 20)
    wait()
    began = time.perf_counter()
    train()
    host = time.perf_counter() - began
    wait()
    memory = peak_bytes(train) if DEVICE == "cuda" else 0
    kinds = profiled(train)
    flops = 6 * multiply_adds_of(model_of(name, size, what), (3, size, size)) * batch / took
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE == "cuda" else None
    return {
        "model": name, "size": size, "batch": batch, "compile": mode, "recompute": recompute,
        "images/s": round(batch / took, 2), "step ms": round(1e3 * took, 2), "host ms": round(1e3 * host, 2),
        "busy ms": round(sum(kinds.values()), 2), "gaps ms": round(1e3 * took - sum(kinds.values()), 2),
        "MiB of a step": memory >> 20, "MFU": None if peak is None else round(flops / peak, 4),
        "first step s": round(first, 1), "graphs": recorded(), "skips": skips(), "blocks": len(blocks_of(model)),
        "kinds": kinds,
    }  # fmt: skip


def main() -> None:
    """Measure, write JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["setformer_tiny", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--compile", nargs="+", choices=MODES, default=["off"])
    parser.add_argument("--one-by-one", action="store_true", help="blocks by PyTorch's operators, without ops/block.py")
    parser.add_argument("--recompute", nargs="+", default=["none"], help="other models take none and block")
    parser.add_argument("--batch", type=int, default=4 if DEVICE == "cpu" else 256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--segment", type=int, default=0, metavar="CLASSES", help="UPerNet of so many classes")
    parser.add_argument("--detect", type=int, default=0, metavar="CLASSES", help="RetinaNet of so many classes")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for the time of a step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/step_profile.json"))
    arguments = parser.parse_args()
    block.WIDEST = 0 if arguments.one_by_one else block.WIDEST
    what = Learnt(arguments.segment, arguments.detect)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for mode in arguments.compile:
            for recompute in arguments.recompute:
                try:
                    rows.append(row(name, arguments.size, arguments.batch, mode, recompute, arguments.budget, what))
                except torch.OutOfMemoryError as error:
                    rows.append({"model": name, "compile": mode, "recompute": recompute, "failed": str(error)[:200]})
                print(rows[-1], flush=True)
                write(arguments.out, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
