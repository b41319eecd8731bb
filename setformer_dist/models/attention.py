"""One interface for every attention: `module(x_bnc, grid, mask_bn) -> (b, n, c)`, for images and for sequences.

    set      optimal transport to m references and back                     ops/set/attention.py
    soft     Gaussian kernel through m landmarks                            ops/soft_attention.py
    soft_norm  the same with the symmetric normalisation of SOFT++
    cast     softmax inside clusters of tokens, summaries between them      ops/cast_attention.py
    softmax  every token with every other, cost n^2                         torch's scaled_dot_product_attention

`grid` names the token rows and columns of an image (n = rows * columns), None a sequence; `mask_bn` is True for valid
tokens, and the output of the others is whatever the output map makes of zero. A module knows neither n nor the
image's size when it is built.

Letters: b = images or sequences, n = tokens, c = channels, h = heads, d = channels of one head, m = references or
landmarks, k = anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pydantic
import torch
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import SetKind
from setformer_dist.ops.cast_attention import Assignment, cast_attention
from setformer_dist.ops.kernels import at_least_fp32
from setformer_dist.ops.parts import Rows, gathered
from setformer_dist.ops.set.attention import IntTuple, SetAttentionConfig, marginal_error, set_attention
from setformer_dist.ops.soft_attention import pool_grid, pool_sequence, soft_attention

AttentionKind = Literal["set", "soft", "soft_norm", "cast", "softmax"]
Grid = tuple[int, int]

# ------------------------------------------------------------------------------------------------ configuration


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _pick(value: int | tuple[int, ...], index: int) -> int:
    return value if isinstance(value, int) else value[index]


def _at_least(name: str, value: int | tuple[int, ...], least: int) -> None:
    for number in _each(value):
        if number < least:
            raise ValueError(f"{name} = {number} must be at least {least}")


class SoftAttentionConfig(FrozenConfig):
    """Choices of one SOFT attention layer (Lu et al. 2021). Fields of type `int | IntTuple` may differ by stage.

    Attributes:
        landmarks: m per head. On a grid m must be a square: sqrt(m) x sqrt(m) cells, fewer on smaller grids.
        sampling: "pool" averages queries over cells or segments (the paper's default); "conv" is a learned convolution
            per head whose kernel is its stride, then a norm and GELU (the authors' code, and the published sizes).
        conv_stride: side of that convolution, for images only. More than sqrt(m) outputs per axis are averaged, so
            that the cost stays linear on larger images; 8, 4, 2 in the three stages of the published models.
        value_conv: side of a depthwise convolution over heads that is added to the output, odd, for images only;
            0 for none. In the authors' code (9, 5, 3), not in the paper.
        query_scale: whether queries are divided by d^(1/4) "before" that convolution, so that its norm and GELU act on
            divided ones (the authors' code), or "after" it, in the kernel alone, which leaves landmarks d^(1/4) too
            short (what this project did until 2026-11-28, see core/revisions.py). A mean is the same both ways.
        iterations: Newton-Raphson rounds of the inverse.
        ridge: added to the diagonal of the landmarks' kernel; 0 in the paper, 0.01 in the authors' code.
    """

    landmarks: int | IntTuple = 49
    sampling: Literal["pool", "conv"] = "pool"
    conv_stride: int | IntTuple = 4
    value_conv: int | IntTuple = 0
    query_scale: Literal["before", "after"] = "before"
    iterations: int = pydantic.Field(default=20, ge=1)
    ridge: float = pydantic.Field(default=0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SoftAttentionConfig:
        for name, least in (("landmarks", 1), ("conv_stride", 1), ("value_conv", 0)):
            _at_least(name, getattr(self, name), least)
        for side in _each(self.value_conv):
            if side and side % 2 == 0:
                raise ValueError(f"value_conv = {side} must be odd, or 0 for none")
        return self

    def of_stage(self, index: int) -> SoftAttentionConfig:
        """Return the choices of one stage, counted from 0."""
        names = ("landmarks", "conv_stride", "value_conv")
        return self.model_copy(update={name: _pick(getattr(self, name), index) for name in names})


class CastAttentionConfig(FrozenConfig):
    """Choices of one CAST attention layer. Fields of type `int | IntTuple` may differ by stage.

    Attributes:
        clusters: N_c, one surrogate token per cluster and head; about sqrt(n) costs least.
        size: kappa, members of a cluster; 0 means n / N_c, rounded up, so that there is a place for every token.
        assignment: "top_k": each cluster takes its best tokens; "single": each token is in exactly one cluster.
        gate: learn for each token how much it is a query and how much a key, or weigh both alike.
    """

    clusters: int | IntTuple = 16
    size: int | IntTuple = 0
    assignment: Assignment = "top_k"
    gate: bool = True

    @pydantic.model_validator(mode="after")
    def _possible(self) -> CastAttentionConfig:
        _at_least("clusters", self.clusters, 1)
        _at_least("size", self.size, 0)
        return self

    def of_stage(self, index: int) -> CastAttentionConfig:
        """Return the choices of one stage, counted from 0."""
        return self.model_copy(update={name: _pick(getattr(self, name), index) for name in ("clusters", "size")})

    def size_for(self, n: int) -> int:
        """Return kappa for n tokens; `self` as `of_stage` returns it."""
        clusters, size = _pick(self.clusters, 0), _pick(self.size, 0)
        return min(size or -(-n // clusters), n)


class AttentionConfig(FrozenConfig):
    """Which attention, and the choices of each.

    Attributes:
        kind: see the top of the file.
        attn: SeT's choices.
        soft: SOFT's, for both of its kinds.
        cast: CAST's.
    """

    kind: AttentionKind = "set"
    attn: SetAttentionConfig = SetAttentionConfig()
    soft: SoftAttentionConfig = SoftAttentionConfig()
    cast: CastAttentionConfig = CastAttentionConfig()

    def check_stages(self, stages: int, *, on_grid: bool) -> None:
        """Check the choices of the kind in use against a model's stages.

        Raises:
            ValueError: a tuple is not as long as there are stages, or landmarks do not form a square grid.
        """
        tables: dict[AttentionKind, tuple[str, FrozenConfig]] = {
            "set": ("attn", self.attn),
            "soft": ("soft", self.soft),
            "soft_norm": ("soft", self.soft),
            "cast": ("cast", self.cast),
        }
        if self.kind not in tables:
            return
        table, choices = tables[self.kind]
        for name in type(choices).model_fields:
            value = getattr(choices, name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{table}.{name} {value} must be one number, or one for each of {stages} stages")
        if on_grid and table == "soft":
            for m in _each(self.soft.landmarks):
                square_side(m)


def square_side(m: int) -> int:
    """Return the side of a square grid of m landmarks.

    Raises:
        ValueError: m is not a square.
    """
    side = math.isqrt(m)
    if side * side != m:
        raise ValueError(
            f"soft.landmarks = {m} lie on a square grid of an image, and {m} is not a square: "
            f"use {side**2} or {(side + 1) ** 2}"
        )
    return side


# ------------------------------------------------------------------------------------------------------- modules


def make_attention(config: AttentionConfig, dim: int, num_heads: int, stage: int = 0) -> nn.Module:
    """Return the attention that the config names.

    Args:
        config: the kind and its choices.
        dim: channels.
        num_heads: heads the channels are split over.
        stage: which entry of choices that differ by stage, counted from 0.

    Returns:
        A module of `forward(x_bnc, grid=None, mask_bn=None) -> (b, n, c)`.

    Raises:
        ConfigError: the heads do not divide the channels.
    """
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"num_heads = {num_heads} does not divide dim = {dim}: use a divisor of {dim}")
    if config.kind == "set":
        return SetAttention(dim, num_heads, config.attn.of_stage(stage))
    if config.kind == "cast":
        return CastAttention(dim, num_heads, config.cast.of_stage(stage))
    if config.kind == "softmax":
        return SoftmaxAttention(dim, num_heads)
    return SoftAttention(dim, num_heads, config.soft.of_stage(stage), normalise=config.kind == "soft_norm")


def split_heads(x_bnc: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(b, n, c) -> (b, h, n, d), a view."""
    b, n, c = x_bnc.shape
    return x_bnc.view(b, n, num_heads, c // num_heads).transpose(1, 2)


def merge_heads(y_bhnd: torch.Tensor) -> torch.Tensor:
    """(b, h, n, d) -> (b, n, c)."""
    return y_bhnd.transpose(1, 2).flatten(2)


def project(y_bhnd: torch.Tensor, output: nn.Linear | None) -> torch.Tensor:
    """(b, h, n, d) -> (b, n, c), by the output map; without one (b, n, h d)."""
    y_bnc = merge_heads(y_bhnd)
    return y_bnc if output is None else output(y_bnc)


class SetAttention(nn.Module):
    """SeT attention: one input map (for similarity and values), transport per head, one output map.

    Attributes:
        references: (h, m, d) parameter, the set that gathers.
        return_references: (h, m, d) parameter, the set that scatters, or None with one set.
        anchors: (h, k, d) parameter of the Nyström map, or None.
        watcher: called with the marginal error of each forward pass, (b, h); None costs nothing (`watched_marginals`).
        taker: called with the tokens that a forward pass transports, (b, h, n, d), and its mask; None costs nothing
            (`watched_tokens`).
        frozen: sets that get no gradient (`freeze_sets`).
        rows: the group of ranks that share each image, None where this one has it whole; with a group, x holds this
            rank's tokens and grid is that of the whole image.
    """

    def __init__(self, dim: int, num_heads: int, config: SetAttentionConfig) -> None:
        """Build for `dim` channels split over `num_heads` heads; `config` as `of_stage` returns it."""
        super().__init__()
        self.num_heads = num_heads
        self.config = config
        self.watcher: Callable[[torch.Tensor], None] | None = None
        self.taker: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None
        self.frozen: frozenset[SetKind] = frozenset()
        self.rows: Rows | None = None
        width = dim // num_heads
        m, k = config.references_of(0), width
        self.anchors: nn.Parameter | None = None
        if config.kernel == "nystrom":
            k = config.anchors or width
            self.anchors = nn.Parameter(torch.empty(num_heads, k, width))
        self.input = nn.Linear(dim, dim)
        self.output = nn.Linear(num_heads * k, dim)
        self.references = nn.Parameter(torch.empty(num_heads, m, k))
        self.return_references: nn.Parameter | None = None
        if config.reference_sets == 2:
            self.return_references = nn.Parameter(torch.empty(num_heads, m, k))
        self.reset_references()

    def reset_references(self) -> None:
        """Draw references and anchors in random directions, of about unit length."""
        for vectors in self.sets().values():
            nn.init.normal_(vectors, std=vectors.shape[-1] ** -0.5)

    def forward(
        self,
        x_bnc: torch.Tensor,
        grid: Grid | None = None,
        mask_bn: torch.Tensor | None = None,
        positions_bna: torch.Tensor | None = None,
        mapped: bool = True,
    ) -> torch.Tensor:
        """(b, n, c) -> (b, n, c).

        Args:
            x_bnc: tokens.
            grid: rows and columns of an image's tokens, or None.
            mask_bn: True at valid tokens, or None.
            positions_bna: as in `set_attention`, for tokens that are no whole grid.
            mapped: apply the output map; otherwise whoever calls does, as ops/block.py.
        """
        x_bhnd = split_heads(self.input(x_bnc), self.num_heads)
        if self.watcher is not None:
            self.watcher(self._marginal_error(x_bhnd, mask_bn))
        if self.taker is not None:
            self.taker(x_bhnd, mask_bn)
        references = self._set("references")
        assert references is not None
        y_bhnd = set_attention(
            x_bhnd,
            references,
            self.config,
            return_references_hmd=self._set("return_references"),
            anchors_hkd=self._set("anchors"),
            grid=grid,
            mask_bn=mask_bn,
            positions_bna=positions_bna,
            rows=self.rows,
        )
        return project(y_bhnd, self.output if mapped else None)

    @property
    def watched(self) -> bool:
        """Whether somebody sees what it computes, which no compiled graph hands over."""
        return self.watcher is not None or self.taker is not None

    def sets(self) -> dict[SetKind, nn.Parameter]:
        """Return the sets that this layer has."""
        found: dict[SetKind, nn.Parameter | None] = {
            "references": self.references,
            "return_references": self.return_references,
            "anchors": self.anchors,
        }
        return {kind: vectors for kind, vectors in found.items() if vectors is not None}

    def _set(self, kind: SetKind) -> torch.Tensor | None:
        vectors: nn.Parameter | None = getattr(self, kind)
        return vectors.detach() if vectors is not None and kind in self.frozen else vectors

    def _marginal_error(self, x_bhnd: torch.Tensor, mask_bn: torch.Tensor | None) -> torch.Tensor:
        """Return (b, h), the larger of both sets' plans."""
        sets = [self.references, *([] if self.return_references is None else [self.return_references])]
        errors = [
            marginal_error(x_bhnd, references, self.config, anchors_hkd=self.anchors, mask_bn=mask_bn)
            for references in sets
        ]
        return torch.stack(errors).amax(0)


class SoftAttention(nn.Module):
    """SOFT attention: one map for queries and keys, one for values, landmarks per head, one output map.

    Attributes:
        landmark_conv: (d -> d) convolution whose kernel is its stride, shared by the heads, or None when pooling.
        landmark_norm: norm of what it returns, or None.
        value_conv: depthwise convolution over the heads, added to the output, or None.
    """

    def __init__(self, dim: int, num_heads: int, config: SoftAttentionConfig, *, normalise: bool = False) -> None:
        """Build for `dim` channels; `config` as `of_stage` returns it, `normalise` for SOFT++."""
        super().__init__()
        self.num_heads = num_heads
        self.config = config
        self.normalise = normalise
        self.landmarks = _pick(config.landmarks, 0)
        width, stride, side = dim // num_heads, _pick(config.conv_stride, 0), _pick(config.value_conv, 0)
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.landmark_conv: nn.Conv2d | None = None
        self.landmark_norm: nn.LayerNorm | None = None
        if config.sampling == "conv":
            self.landmark_conv = nn.Conv2d(width, width, stride, stride=stride, bias=False)
            self.landmark_norm = nn.LayerNorm(width)
        self.value_conv: nn.Conv2d | None = None
        if side:
            self.value_conv = nn.Conv2d(num_heads, num_heads, side, padding=side // 2, groups=num_heads, bias=False)

    def forward(
        self,
        x_bnc: torch.Tensor,
        grid: Grid | None = None,
        mask_bn: torch.Tensor | None = None,
        mapped: bool = True,
    ) -> torch.Tensor:
        """(b, n, c) -> (b, n, c).

        Raises:
            ConfigError: a convolution is configured, or not a square of landmarks, and the tokens do not suit it.
        """
        q_bhnd = split_heads(self.query(x_bnc), self.num_heads)
        v_bhnd = split_heads(self.value(x_bnc), self.num_heads)
        if mask_bn is not None:
            q_bhnd, v_bhnd = (y.masked_fill(~mask_bn[:, None, :, None], 0) for y in (q_bhnd, v_bhnd))
        landmarks_bhmd, landmark_mask_bm = self._landmarks(q_bhnd, grid, mask_bn)
        y_bhnd = soft_attention(
            q_bhnd,
            v_bhnd,
            landmarks_bhmd,
            mask_bn=mask_bn,
            landmark_mask_bm=landmark_mask_bm,
            iterations=self.config.iterations,
            ridge=self.config.ridge,
            normalise=self.normalise,
        )
        if self.value_conv is not None:
            y_bhnd = y_bhnd + self._value_conv(v_bhnd, self.value_conv, grid)
        if mask_bn is not None:
            y_bhnd = y_bhnd.masked_fill(~mask_bn[:, None, :, None], 0)
        return project(y_bhnd, self.output if mapped else None)

    def _landmarks(
        self, q_bhnd: torch.Tensor, grid: Grid | None, mask_bn: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.landmark_conv is None:
            if grid is None:
                return pool_sequence(q_bhnd, self.landmarks, mask_bn)
            return pool_grid(q_bhnd, grid, self._cells(), mask_bn)
        assert self.landmark_norm is not None
        before = self.config.query_scale == "before"
        divisor = q_bhnd.shape[-1] ** 0.25
        sampled_bhnd = q_bhnd / divisor if before else q_bhnd
        patches_bhpd, patch_grid, patch_mask_bp = self._patches(sampled_bhnd, self.landmark_conv, _need(grid), mask_bn)
        pooled_bhmd, landmark_mask_bm = pool_grid(patches_bhpd, patch_grid, self._cells(), patch_mask_bp)
        landmarks_bhmd = F.gelu(self.landmark_norm(pooled_bhmd.to(q_bhnd.dtype)))
        # The kernel divides queries and landmarks alike, so that these go back to the scale of undivided queries.
        return at_least_fp32(landmarks_bhmd) * divisor if before else landmarks_bhmd, landmark_mask_bm

    def _cells(self) -> Grid:
        try:
            side = square_side(self.landmarks)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return side, side

    @staticmethod
    def _patches(
        q_bhnd: torch.Tensor, conv: nn.Conv2d, grid: Grid, mask_bn: torch.Tensor | None
    ) -> tuple[torch.Tensor, Grid, torch.Tensor | None]:
        """Return one vector per patch of stride x stride tokens, zeros filling up the patches at the far sides."""
        b, h, _, d = q_bhnd.shape
        stride = conv.stride[0]
        below, right = -grid[0] % stride, -grid[1] % stride
        image_zdrc = F.pad(q_bhnd.reshape(b * h, *grid, d).permute(0, 3, 1, 2), (0, right, 0, below))
        patches_zdrc = conv(image_zdrc)
        patch_grid = (patches_zdrc.shape[-2], patches_zdrc.shape[-1])
        patch_mask_bp = None
        if mask_bn is not None:
            seen = F.pad(mask_bn.view(b, 1, *grid).to(torch.float32), (0, right, 0, below))
            patch_mask_bp = F.max_pool2d(seen, stride).flatten(1) > 0
        return patches_zdrc.flatten(2).mT.reshape(b, h, math.prod(patch_grid), d), patch_grid, patch_mask_bp

    @staticmethod
    def _value_conv(v_bhnd: torch.Tensor, conv: nn.Conv2d, grid: Grid | None) -> torch.Tensor:
        b, h, n, d = v_bhnd.shape
        image = v_bhnd.permute(0, 3, 1, 2).reshape(b * d, h, *_need(grid))
        y: torch.Tensor = conv(image)
        return y.view(b, d, h, n).permute(0, 2, 3, 1)


def _need(grid: Grid | None) -> Grid:
    if grid is None:
        raise ConfigError(
            "soft.sampling = 'conv' and soft.value_conv work on the grid of an image, but no grid was given: "
            "for sequences use soft.sampling = 'pool' and soft.value_conv = 0"
        )
    return grid


class CastAttention(nn.Module):
    """CAST attention: query, key and value map, surrogate tokens per head, a gate per token, one output map.

    On an image the clusters form among its flattened tokens, wherever they lie.

    Attributes:
        surrogates: (h, N_c, d) parameter.
    """

    def __init__(self, dim: int, num_heads: int, config: CastAttentionConfig) -> None:
        """Build for `dim` channels; `config` as `of_stage` returns it."""
        super().__init__()
        self.num_heads = num_heads
        self.config = config
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate: nn.Linear | None = nn.Linear(dim, 1) if config.gate else None
        self.output = nn.Linear(dim, dim)
        self.surrogates = nn.Parameter(torch.empty(num_heads, _pick(config.clusters, 0), dim // num_heads))
        nn.init.normal_(self.surrogates)  # as long as queries and keys of normed tokens

    def forward(
        self,
        x_bnc: torch.Tensor,
        grid: Grid | None = None,
        mask_bn: torch.Tensor | None = None,
        mapped: bool = True,
    ) -> torch.Tensor:
        """(b, n, c) -> (b, n, c); the grid has no meaning here."""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x_bnc).chunk(3, -1))
        y_bhnd = cast_attention(
            q,
            k,
            v,
            self.surrogates,
            size=self.config.size_for(x_bnc.shape[1]),
            assignment=self.config.assignment,
            gate_bn=None if self.gate is None else at_least_fp32(self.gate(x_bnc)).squeeze(-1),
            mask_bn=mask_bn,
        )
        return project(y_bhnd, self.output if mapped else None)


class SoftmaxAttention(nn.Module):
    """Ordinary multi-head attention (Vaswani et al. 2017) by torch's fastest kernel.

    Attributes:
        rows: the group of ranks that share each image, None where this one has it whole. Every rank then gathers the
            keys and values of all, so what they exchange grows with the image.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build for `dim` channels split over `num_heads` heads."""
        super().__init__()
        self.rows: Rows | None = None
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self,
        x_bnc: torch.Tensor,
        grid: Grid | None = None,
        mask_bn: torch.Tensor | None = None,
        mapped: bool = True,
    ) -> torch.Tensor:
        """(b, n, c) -> (b, n, c); the grid has no meaning here."""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x_bnc).chunk(3, -1))
        if self.rows is not None:
            k, v = gathered(torch.stack([k, v]), self.rows).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        if mask_bn is None:
            return project(F.scaled_dot_product_attention(q, k, v), self.output if mapped else None)
        # Without any valid token all are keys, so that there is something to sum over; the output is dropped.
        keys_b11n = (mask_bn | ~mask_bn.any(-1, keepdim=True))[:, None, None, :]
        hidden_b1n1 = ~mask_bn[:, None, :, None]
        # NaN in the padding must not reach a product with weight zero.
        q, k, v = (y.masked_fill(hidden_b1n1, 0) for y in (q, k, v))
        y_bhnd = F.scaled_dot_product_attention(q, k, v, attn_mask=keys_b11n).masked_fill(hidden_b1n1, 0)
        return project(y_bhnd, self.output if mapped else None)
