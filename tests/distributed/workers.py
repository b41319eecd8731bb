"""What the ranks of the distributed tests run; at module top level, so that spawned processes can import it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import deepspeed
import timm
import torch

from launch.run.compiled import whole_blocks
from setformer_dist.core.model_config import ModelConfig, Recompute
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine import compiled
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.config import BatchConfig, CompileConfig, EmaConfig, OptimConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.models.build import build_model
from setformer_dist.ops import block
from setformer_dist.tasks.classification import soft_cross_entropy

OPTIM = OptimConfig(lr=1e-3, clip_norm=1.0)


class Scaled(torch.nn.Module):
    """A layer times a weight without dimensions, as in NFNets, ReZero and CLIP."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.gain


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    model.head = Scaled(model.head)
    model.pos_embed.requires_grad_(False)
    return model


def samples(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return images, torch.nn.functional.one_hot(labels, 10).float()


class Trainee:
    """A DeepSpeed engine with fragments and EMA, on the samples above; connects this process if it is not yet."""

    def __init__(
        self,
        stage: int,
        dtype: str,
        grad_accum: str = "auto",
        micro: int = 4,
        model: ModelConfig | None = None,
        offload: str = "none",
        clip_norm: float = OPTIM.clip_norm,
        module: torch.nn.Module | None = None,
        deepspeed: dict[str, Any] | None = None,
        global_size: int = 16,
        leaves: Sequence[torch.nn.Module] = (),
        overlap: bool = False,
    ) -> None:
        self.ranks = RankInfo.from_env()
        if not torch.distributed.is_initialized():
            connect(self.ranks, os.environ["SETFORMER_RENDEZVOUS"])
        self.comm = TorchCollectives(self.ranks)
        self.plan = solve(BatchConfig(global_size=global_size, micro=micro), self.ranks.world_size)
        zero = ZeroConfig(stage=stage, offload=offload, bucket_mib=1, overlap_comm=overlap)
        json = deepspeed_config(
            PrecisionConfig(dtype=dtype, grad_accum=grad_accum), zero, self.plan, clip_norm, deepspeed or {}
        )
        self.dtype = DTYPES[dtype]
        if module is None:
            module = small_model() if model is None else build_model(model, 10, 16, 0)
        self.engine = initialize(module, OPTIM, json, leaves)
        self.master = MasterState(self.engine)
        self.ema = Ema(self.master, EmaConfig(decay=0.9))

    def step(self, step: int, factor: float = 1.0) -> float:
        """Run optimizer step `step`; the images of its last micro batch are multiplied by `factor`."""
        images, targets = samples(step, self.plan.global_size)
        images[-self.plan.micro * self.ranks.world_size :] *= factor
        total = 0.0
        for a in range(self.plan.accumulation):
            first = (a * self.ranks.world_size + self.ranks.rank) * self.plan.micro
            part = slice(first, first + self.plan.micro)
            loss = soft_cross_entropy(self.engine(images[part].to(self.dtype)), targets[part])
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        self.ema.update(step)
        return self.comm.sum([total])[0] / (self.plan.accumulation * self.plan.world_size)

    def held(self) -> list[Any]:
        return [*self.master.fragments("param", "exp_avg", "exp_avg_sq"), *self.ema.fragments()]


def checkpointed_losses(stage: int, recompute: Recompute) -> list[float]:
    """Three steps of a SeTformer with stochastic depth, with or without recomputed activations."""
    trainee = Trainee(
        stage,
        "fp32",
        model=ModelConfig(name="setformer_nano", drop_path=0.3, recompute=recompute),
    )
    losses = keyed_steps(trainee)
    disconnect()
    return losses


def compiled_losses(stage: int, mode: str) -> tuple[list[float], int, int]:
    """The same compiled; with the numbers of graphs, and of weights that ZeRO-3 left here after a forward pass."""
    compiled.BACKEND = "aot_eager"  # graphs and backward passes as always, without g++
    module = build_model(ModelConfig(name="setformer_nano", drop_path=0.3), 10, 16, 0)
    compilation = compiled.compile_model(module, CompileConfig(mode=mode))
    leaves = [inner for _, inner in compiled.blocks_of(module)] if mode == "blocks" else []
    nothing_stays = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    cut = {"zero_optimization": dict.fromkeys(nothing_stays, 0)} if stage == 3 else None
    trainee = Trainee(stage, "fp32", module=module, deepspeed=cut, leaves=leaves)
    losses = keyed_steps(trainee)
    left = sum(p.data.numel() for p in trainee.engine.module.parameters()) if stage == 3 else 0
    disconnect()
    return losses, compilation.graphs if compilation is not None else 0, left


def by_parts_losses(
    stage: int, by_parts: bool, recompute: Recompute, frozen: bool = False
) -> tuple[list[float], int, int]:
    """The same by ops/block.py, or not; with the blocks computed by it, and the weights left after a forward pass."""
    block.WIDEST = block.WIDEST if by_parts else 0
    calls = mock.patch.object(block, "leave", wraps=block.leave).start()
    module = build_model(ModelConfig(name="setformer_nano", drop_path=0.3, recompute=recompute), 10, 16, 0)
    module.stem.requires_grad_(not frozen)
    nothing_stays = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    cut = {"zero_optimization": dict.fromkeys(nothing_stays, 0)} if stage == 3 else None
    trainee = Trainee(stage, "fp32", module=module, deepspeed=cut, leaves=whole_blocks(module))
    losses = keyed_steps(trainee)
    left = sum(p.data.numel() for p in trainee.engine.module.parameters()) if stage == 3 else 0
    disconnect()
    return losses, calls.call_count, left


def graphed_losses(stage: int, dtype: str, overlap: bool) -> tuple[list[float], list[float], int]:
    """Losses of two micro batches a step with the memory of CUDA graphs and without; and how many inputs moved."""
    from tests.graph_memory import graph_memory  # noqa: PLC0415  # imports torch's compiler, which takes seconds

    found, moved = [], 0
    for with_memory in (True, False):
        with graph_memory() as memory:
            if not with_memory:
                compiled.BACKEND = "aot_eager"
            module = build_model(ModelConfig(name="setformer_nano", drop_path=0.3), 10, 16, 0)
            compiled.compile_model(module, CompileConfig(mode="blocks", cudagraphs=True))
            trainee = Trainee(stage, dtype, module=module, overlap=overlap)
            if stage:
                trainee.engine.optimizer.reduce_bucket_size = 10_000  # many in a backward pass
            found.append(keyed_steps(trainee))
            moved += memory.moved
        torch._dynamo.reset()
    disconnect()
    return found[0], found[1], moved


def keyed_steps(trainee: Trainee) -> list[float]:
    """Three steps, the drop path of each sample keyed."""
    losses = []
    for k in range(3):
        first = trainee.ranks.rank * trainee.plan.micro
        trainee.engine.module.set_sample_keys(torch.arange(first, first + trainee.plan.micro) + 1000 * k)
        losses.append(trainee.step(k))
    return losses


def cut_losses(recompute: Recompute) -> tuple[list[float], list[int]]:
    """The same under ZeRO-3 with small parameters cut, too; and the numbers of a set that were here after forwards."""
    nothing_stays = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    trainee = Trainee(
        3,
        "fp32",
        model=ModelConfig(name="setformer_nano", drop_path=0.3, recompute=recompute),
        deepspeed={"zero_optimization": dict.fromkeys(nothing_stays, 0)},
    )
    held: list[int] = []
    references = trainee.engine.module.stages[0].blocks[0].attn.references
    trainee.engine.module.register_forward_hook(lambda *_: held.append(references.numel()))
    losses = keyed_steps(trainee)
    disconnect()
    return losses, held


def losses_of(stage: int, dtype: str, grad_accum: str, steps: int) -> list[float]:
    trainee = Trainee(stage, dtype, grad_accum)
    losses = [trainee.step(k) for k in range(steps)]
    disconnect()
    return losses


def fixed_everywhere(stage: int, dtype: str) -> list[float]:
    """Write into the one parameter that does not train, where it is held; return its mean as the model has it."""
    trainee = Trainee(stage, dtype)
    weight = trainee.engine.module.pos_embed
    held = [f for f in trainee.master.fragments("param") if f.name == "pos_embed"]
    for fragment in held:
        fragment.tensor.fill_(trainee.ranks.rank + 3.0)
    trainee.master.refresh()
    trainee.step(0)
    with deepspeed.zero.GatheredParameters([weight], enabled=stage == 3):
        found = float(weight.float().mean())
    disconnect()
    return [found, float(len(held))]


def round_trip(stage: int, dtype: str, grad_accum: str) -> dict[str, Any]:
    trainee = Trainee(stage, dtype, grad_accum)
    found = round_trip_of(trainee)
    disconnect()
    return found


def round_trip_of(trainee: Trainee) -> dict[str, Any]:
    """Swap the average in and out, remember all fragments, run 3 steps, write the fragments back, run them again."""
    at_start = [[f.name, f.state, f.start, f.end, f.full_numel] for f in trainee.held()]
    before = [trainee.step(k) for k in range(3)]
    images, _ = samples(99, 8)
    trainee.engine.eval()
    with torch.no_grad():
        plain = trainee.engine(images.to(trainee.dtype)).float()
        with trainee.ema.swapped_in():
            averaged = trainee.engine(images.to(trainee.dtype)).float()
        again = trainee.engine(images.to(trainee.dtype)).float()
    trainee.engine.train()
    kept = [f.tensor.clone() for f in trainee.held()]
    steps = trainee.master.optimizer_steps
    first = [trainee.step(k) for k in range(3, 6)]
    for fragment, tensor in zip(trainee.held(), kept, strict=True):
        fragment.tensor.copy_(tensor)
    trainee.master.optimizer_steps = steps
    trainee.master.refresh()
    second = [trainee.step(k) for k in range(3, 6)]
    cover = trainee.comm.gather_json([[f.name, f.state, f.start, f.end, f.full_numel] for f in trainee.held()])
    return {
        "before": before,
        "first": first,
        "second": second,
        "steps": steps,
        "cover": cover,
        "same_at_start": at_start == cover[trainee.ranks.rank],
        "swap_restores": bool((plain == again).all()),
        "swap_changes": bool((plain != averaged).any()),
    }


def plain_pytorch(steps: int) -> list[float]:
    """The same training without DeepSpeed and without ranks."""
    model = small_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, OPTIM), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    losses = []
    for k in range(steps):
        images, targets = samples(k, 16)
        loss = soft_cross_entropy(model(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
