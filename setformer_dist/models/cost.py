"""Parameters and multiply-adds of a SeTformer as closed formulas of its config, without building it.

A multiply-add is one product that is added to a sum: matrix products, convolutions, the matrix-vector products of the
Sinkhorn rounds, the Newton-Raphson rounds of SOFT. Exponentials, norms, sorting, activations and the position filter
are left out, as in the tables of the papers. The tests hold these formulas against the parameters and the counted
operations of the running model.

Letters: C = channels of a stage, n = tokens, m = references or landmarks, k = anchors, d = channels of a head,
h = heads.
"""

from __future__ import annotations

import math

from setformer_dist.models.attention import AttentionConfig, CastAttentionConfig, SoftAttentionConfig
from setformer_dist.models.setformer import SetformerConfig
from setformer_dist.ops.set.attention import SetAttentionConfig

Grid = tuple[int, int]


def parameters(config: SetformerConfig) -> int:
    """Return the number of parameters."""
    first, half = config.embed_dim, config.embed_dim // 2
    total = (9 * config.in_chans + 1) * half + (9 * half + 1) * first + 2 * first  # stem
    for i, (width, depth, heads) in enumerate(zip(config.widths, config.depths, config.num_heads, strict=True)):
        if i:
            total += 9 * width * (width // 2) + 2 * width  # downsampling convolution without bias, norm
        attention = _attention_parameters(width, heads, i, config.attention_config)
        hidden = int(width * config.mlp_ratio)
        mlp = (width + 1) * hidden + (hidden + 1) * width
        scales = 0 if config.layer_scale is None else 2 * width
        total += depth * (attention + mlp + scales + 4 * width)  # two norms
    last = config.widths[-1]
    return total + 2 * last + (last + 1) * config.num_classes


def _attention_parameters(width: int, heads: int, stage: int, attention: AttentionConfig) -> int:
    if attention.kind == "set":
        return _set_parameters(width, heads, attention.attn.of_stage(stage))
    if attention.kind == "cast":
        return _cast_parameters(width, attention.cast.of_stage(stage))
    if attention.kind == "softmax":
        return 4 * (width + 1) * width
    return _soft_parameters(width, heads, attention.soft.of_stage(stage))


def _set_parameters(width: int, heads: int, attn: SetAttentionConfig) -> int:
    features = heads * _feature_width(width // heads, attn)
    maps = (width + 1) * width + (features + 1) * width
    references = attn.reference_sets * attn.references_of(0) * features
    anchors = features * (width // heads) if attn.kernel == "nystrom" else 0
    return maps + references + anchors


def _soft_parameters(width: int, heads: int, soft: SoftAttentionConfig) -> int:
    d, stride, side = width // heads, _number(soft.conv_stride), _number(soft.value_conv)
    landmarks = d * d * stride**2 + 2 * d if soft.sampling == "conv" else 0
    return 3 * (width + 1) * width + landmarks + heads * side**2


def _cast_parameters(width: int, cast: CastAttentionConfig) -> int:
    return 4 * (width + 1) * width + _number(cast.clusters) * width + (width + 1) * cast.gate


def multiply_adds(config: SetformerConfig, height: int, width: int) -> int:
    """Return the multiply-adds of the forward pass of one image.

    Args:
        config: the model's.
        height: of the image, in pixels; any number.
        width: likewise.
    """
    grid = (height, width)
    total = 0
    channels = [config.in_chans, config.embed_dim // 2, config.embed_dim]
    for stride, before, after in zip(config.stem_strides, channels, channels[1:], strict=False):
        grid = _strided(grid, stride)
        total += 9 * before * after * grid[0] * grid[1]
    for i, (dim, depth, heads) in enumerate(zip(config.widths, config.depths, config.num_heads, strict=True)):
        if i:
            grid = _strided(grid, 2)
            total += 9 * dim * (dim // 2) * grid[0] * grid[1]
        attention = _attention_multiply_adds(grid, dim, heads, i, config.attention_config)
        mlp = 2 * grid[0] * grid[1] * dim * int(dim * config.mlp_ratio)
        total += depth * (attention + mlp)
    return total + config.widths[-1] * config.num_classes


def _attention_multiply_adds(grid: Grid, width: int, heads: int, stage: int, attention: AttentionConfig) -> int:
    n = grid[0] * grid[1]
    if attention.kind == "set":
        return _set_multiply_adds(n, width, heads, attention.attn.of_stage(stage))
    if attention.kind == "cast":
        return _cast_multiply_adds(n, width, attention.cast.of_stage(stage))
    if attention.kind == "softmax":
        return 4 * n * width**2 + 2 * n**2 * width
    return _soft_multiply_adds(grid, width, heads, attention.soft.of_stage(stage), attention.kind == "soft_norm")


def _set_multiply_adds(n: int, width: int, heads: int, attn: SetAttentionConfig) -> int:
    d, m = width // heads, attn.references_of(0)
    k = _feature_width(d, attn)
    maps = n * width * width + n * heads * k * width
    # Similarity with each set, gathering, scattering: all n * m * k per head.
    transport = (attn.reference_sets + 2) * n * m * heads * k
    # A round multiplies by the n x m kernel twice (or does as many sums of exponentials).
    rounds = 2 * attn.iterations * n * m * heads
    # Kernel with the anchors, times the root; anchors with themselves, and the two products of the root.
    nystrom = heads * (n * k * d + n * k * k + k * k * d + k**3) if attn.kernel == "nystrom" else 0
    return maps + transport + attn.reference_sets * rounds + nystrom


def _soft_multiply_adds(grid: Grid, width: int, heads: int, soft: SoftAttentionConfig, normalise: bool) -> int:
    n, side = grid[0] * grid[1], math.isqrt(_number(soft.landmarks))
    pooled, sampling = grid, 0
    if soft.sampling == "conv":
        stride = _number(soft.conv_stride)
        pooled = (-(-grid[0] // stride), -(-grid[1] // stride))
        sampling = pooled[0] * pooled[1] * stride**2 * (width // heads) * width
    cells = (min(side, pooled[0]), min(side, pooled[1]))
    m = cells[0] * cells[1]
    sampling += cells[0] * pooled[0] * pooled[1] * width + cells[0] * cells[1] * pooled[1] * width
    # Kernel with the landmarks, values to landmarks and back; kernel among the landmarks, inverse times values.
    products = 3 * n * m * width + 2 * m * m * width
    inverse = (2 * soft.iterations + normalise) * m**3 * heads
    return 3 * n * width**2 + sampling + products + inverse + n * _number(soft.value_conv) ** 2 * width


def _cast_multiply_adds(n: int, width: int, cast: CastAttentionConfig) -> int:
    clusters, size = _number(cast.clusters), cast.size_for(n)
    maps = 4 * n * width**2 + n * width * cast.gate
    # Affinities as query and as key, combination; attention inside; summaries.
    return maps + 3 * n * clusters * width + 2 * clusters * size**2 * width + clusters * size * width


def _number(choice: int | tuple[int, ...]) -> int:
    """Return a choice of one stage, which `of_stage` has made a number."""
    assert isinstance(choice, int)
    return choice


def _feature_width(d: int, attn: SetAttentionConfig) -> int:
    return attn.anchors or d


def _strided(grid: Grid, stride: int) -> Grid:
    """Return the output sides of a 3x3 convolution of padding 1: divided by the stride, rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)
