"""Ranks that share images by rows, for test_sequence.py: a real DeepSpeed engine on a small SeTformer."""

from __future__ import annotations

import os
from typing import Any

import timm
import torch

import setformer_dist.models  # noqa: F401
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.comm import CommMeter, RowGroup, TorchCollectives, connect, disconnect
from setformer_dist.engine.config import BatchConfig, EmaConfig, OptimConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.deepspeed_engine import DTYPES, initialize
from setformer_dist.engine.ema import Ema
from setformer_dist.engine.master import MasterState
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.ops.parts import Rows
from setformer_dist.tasks.classification import soft_cross_entropy

GLOBAL, HEIGHT, WIDTH, CLASSES = 12, 48, 16, 10
OPTIM = OptimConfig(lr=1e-3, clip_norm=0.5)  # below every norm of the first steps: clipping is part of what is compared


def model_of(checkpointing: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "stem_strides": (2, 1), "drop_path_rate": 0.3}
    model = timm.create_model("setformer_nano", num_classes=CLASSES, attn={"references": 4}, **shape)
    model.set_grad_checkpointing(checkpointing)
    return model


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL, 3, HEIGHT, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (GLOBAL,), generator=generator)
    return images, torch.nn.functional.one_hot(labels, CLASSES).float()


class Trainee:
    """An engine whose model has this rank's rows of each image."""

    def __init__(self, sequence: int, stage: int, dtype: str, offload: str, checkpointing: bool) -> None:
        self.ranks = RankInfo.from_env()
        if not torch.distributed.is_initialized():
            connect(self.ranks, os.environ["SETFORMER_RENDEZVOUS"])
        self.comm = TorchCollectives(self.ranks)
        self.plan = solve(BatchConfig(global_size=GLOBAL, max_micro=6), self.ranks.world_size, sequence=sequence)
        zero = ZeroConfig(stage=stage, offload=offload, bucket_mib=1)
        json = deepspeed_config(PrecisionConfig(dtype=dtype), zero, self.plan, OPTIM.clip_norm, {})
        self.dtype = DTYPES[dtype]
        model = model_of(checkpointing)
        self.rows = Rows(RowGroup(self.ranks, sequence))
        if sequence > 1:
            model.split_rows(self.rows)
        self.engine = initialize(model, OPTIM, json)
        self.master = MasterState(self.engine)
        self.ema = Ema(self.master, EmaConfig(decay=0.9))

    def step(self, step: int) -> tuple[float, float]:
        """Run an optimizer step; return its loss and the norm of its gradient, -1 where DeepSpeed tells none."""
        images, targets = samples(step)
        group, total = self.ranks.rank // self.plan.sequence, 0.0
        model = self.engine.module
        for index in range(self.plan.accumulation):
            first = (index * self.plan.groups + group) * self.plan.micro
            mine = slice(first, first + self.plan.micro)
            model.set_sample_keys(torch.arange(first, first + self.plan.micro) + 1000 * step)
            own = model.image_rows(HEIGHT, self.rows.index, self.rows.count)
            loss = soft_cross_entropy(self.engine(images[mine, :, own].to(self.dtype)), targets[mine])
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        self.ema.update(step)
        mean = self.comm.sum([total])[0] / (self.plan.accumulation * self.plan.world_size)
        norm = self.engine.get_global_grad_norm()  # stage 0 has none in fp32
        return mean, -1.0 if norm is None else float(norm)


def runs_of(cases: list[list[Any]], steps: int) -> list[dict[str, list[float]]]:
    """Train each case, [sequence, stage, dtype, offload, checkpointing], one after the other in these processes."""
    found = []
    for case in cases:
        trainee = Trainee(*case)
        pairs = [trainee.step(k) for k in range(steps)]
        found.append({"losses": [loss for loss, _ in pairs], "norms": [norm for _, norm in pairs]})
    disconnect()
    return found


def exchanged() -> dict[str, Any]:
    """Return what sums and shifts over groups of two of four ranks give here, and whether the sum's time is metered."""
    ranks = RankInfo.from_env()
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    group = RowGroup(ranks, 2)
    mine = torch.tensor([float(ranks.rank), 1.0])
    meter = CommMeter()
    meter.install()
    total = group.sum(mine)
    meter.remove()
    found = {
        "sum": total.tolist(),
        "own": mine.tolist(),
        "above": group.shift(mine, down=True).tolist(),
        "below": group.shift(mine.bfloat16(), down=False).tolist(),
        "all": group.gather(mine.bfloat16()).tolist(),
        "metered": meter.seconds > 0,
    }
    disconnect()
    return found
