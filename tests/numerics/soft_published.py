"""SOFT and SOFT++ as their authors run them, from the weights of our model; `test_soft_published.py` compares both.

Written from scratch for this test, from the equations of the papers and the behaviour of the code at
github.com/fudan-zvg/SOFT (`models/softmax_free_transformer.py`, `SOFT/kernel/inverse.py`): images as (B, C, H, W),
distances pair by pair, one head at a time, no class of ours. Where that code differs from the papers it is followed:
the landmarks' convolution with its norm and GELU, the depthwise convolution of the values, 0.01 on the diagonal
(SOFT alone), and the step sizes, which are arguments because ours differ on purpose (`soft_attention._step_size`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

Weights = Mapping[str, torch.Tensor]
# From the matrices to be inverted with and without the ridge, (B, m, m) each, to alpha (B, 1, 1).
StepSize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROUNDS = 20
RIDGE = 0.01


def of_the_authors(normalise: bool) -> StepSize:
    """Return their step size: by the row sums before the ridge; SOFT++ takes those of a whole batch, and halves."""

    def plain(ridged: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return (1.8 / kernel.sum(-1).amax(-1) ** 2)[:, None, None]

    def halved(ridged: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        alpha = 2.0 / kernel.sum(-1).max() ** 2
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype)
        for _ in range(10):
            if (identity - kernel @ (alpha * kernel)).abs().sum(-2).max() <= 1.01:
                break
            alpha = alpha / 2
        return alpha.expand(len(kernel), 1, 1)

    return halved if normalise else plain


class Published:
    """A whole model; `logits` and `attention` are what the tests look at."""

    def __init__(
        self, weights: Weights, depths: tuple[int, ...], heads: tuple[int, ...], step_size: StepSize, *,
        normalise: bool, batch_statistics: bool,
    ) -> None:  # fmt: skip
        """Take our model's state_dict; `batch_statistics` as torch's training mode has it."""
        self.w, self.depths, self.heads = weights, depths, heads
        self.step_size, self.normalise, self.batch_statistics = step_size, normalise, batch_statistics

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        x = image
        for i, stride in enumerate((2, 1, 2)):
            x = self.conv_norm(x, f"stem.{i}", stride)
        for stage in range(len(self.depths)):
            if stage:
                x = self.conv_norm(x, f"stages.{stage}.downsample", 2)
            last = stage == len(self.depths) - 1
            position = self.w[f"stages.{stage}.position"]
            side = math.isqrt(position.shape[1] - last)
            grid = position[:, int(last) :].mT.reshape(1, -1, side, side)
            x = x + F.interpolate(grid, size=x.shape[2:], mode="bilinear", align_corners=False)
            if last:
                token = self.w[f"stages.{stage}.class_token"] + position[:, :1]
                return self.classify(torch.cat([token.expand(len(x), -1, -1), x.flatten(2).mT], 1), stage)
            for block in range(self.depths[stage]):
                x = self.soft_block(x, f"stages.{stage}.blocks.{block}", self.heads[stage])
        raise AssertionError("no last stage")

    def conv_norm(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        """3x3 convolution, batch norm, ReLU."""
        x = F.conv2d(x, self.w[f"{name}.conv.weight"], self.w[f"{name}.conv.bias"], stride=stride, padding=1)
        if self.batch_statistics:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, variance = self.w[f"{name}.norm.running_mean"], self.w[f"{name}.norm.running_var"]
        scale = self.w[f"{name}.norm.weight"] / (variance + 1e-5).sqrt()
        return F.relu((x - mean[:, None, None]) * scale[:, None, None] + self.w[f"{name}.norm.bias"][:, None, None])

    def soft_block(self, x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        """Attention and MLP, each added to its input and the sum normed; (B, C, H, W) -> (B, C, H, W)."""
        y = x.flatten(2).mT
        y = self.norm(y + self.linear(self.attention(x, f"{name}.attn", heads), f"{name}.attn.output"), f"{name}.norm1")
        inner = self.linear(y, f"{name}.mlp.fc1")
        inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return self.norm(y + self.linear(inner, f"{name}.mlp.fc2"), f"{name}.norm2").mT.reshape(x.shape)

    def attention(self, x: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        """What stands before the output map, (B, n, C)."""
        b, c, rows, columns = x.shape
        d = c // heads
        tokens = x.flatten(2).mT
        queries, values = (self.linear(tokens, f"{name}.{kind}").split(d, -1) for kind in ("query", "value"))
        kernel = self.w[f"{name}.value_conv.weight"]
        outputs = []
        for head, (query, value) in enumerate(zip(queries, values, strict=True)):
            query = query / d**0.25  # before anything else is made of it
            landmarks = F.conv2d(
                query.mT.reshape(b, d, rows, columns),
                self.w[f"{name}.landmark_conv.weight"],
                stride=self.w[f"{name}.landmark_conv.weight"].shape[-1],
            )
            landmarks = F.gelu(self.norm(landmarks.flatten(2).mT, f"{name}.landmark_norm"))
            near = _gaussian(query, landmarks)
            y = near @ (self.inverse(_gaussian(landmarks, landmarks)) @ (near.mT @ value))
            image = value.mT.reshape(b * d, 1, rows, columns)
            beside = F.conv2d(image, kernel[head : head + 1], padding=kernel.shape[-1] // 2)
            outputs.append(y + beside.reshape(b, d, -1).mT)
        return torch.cat(outputs, -1)

    def inverse(self, kernel: torch.Tensor) -> torch.Tensor:
        """Newton's rounds, and for SOFT++ the roots of the row sums on both sides."""
        ridge = 0.0 if self.normalise else RIDGE
        ridged = kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype)
        inverse = self.step_size(ridged, kernel) * ridged
        for _ in range(ROUNDS):
            inverse = inverse @ (2 * torch.eye(kernel.shape[-1], dtype=kernel.dtype) - ridged @ inverse)
        if self.normalise:
            roots = kernel.sum(-1).sqrt()
            inverse = inverse / roots[:, :, None] / roots[:, None, :]
        return inverse

    def classify(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """The blocks of softmax attention, the last norm, the class token's logits."""
        heads = self.heads[stage]
        for block in range(self.depths[stage]):
            name = f"stages.{stage}.blocks.{block}"
            normed = self.norm(x, f"{name}.norm1")
            parts = [y.split(x.shape[-1] // heads, -1) for y in self.linear(normed, f"{name}.attn.qkv").chunk(3, -1)]
            attended = [
                torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v for q, k, v in zip(*parts, strict=True)
            ]
            x = x + self.linear(torch.cat(attended, -1), f"{name}.attn.output")
            inner = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + self.linear(inner, f"{name}.mlp.fc2")
        return self.linear(self.norm(x, "norm")[:, 0], "head")

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The linear layer of that name."""
        return x @ self.w[f"{name}.weight"].mT + self.w[f"{name}.bias"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The layer norm of that name."""
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]


def _gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x - y|^2 / 2) of all pairs; (B, n, d) and (B, m, d) -> (B, n, m)."""
    return torch.exp((x[:, :, None] - y[:, None]).square().sum(-1) / -2)
