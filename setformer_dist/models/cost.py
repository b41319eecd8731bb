"""Parameters and multiply-adds of a SeTformer as closed formulas of its config, without building it.

A multiply-add is one product that is added to a sum: matrix products, convolutions, and the matrix-vector products
of the Sinkhorn rounds. Exponentials, norms, activations and the position filter are left out, as in the tables of
the papers. The tests hold these formulas against the parameters and the counted operations of the running model.

Letters: C = channels of a stage, n = tokens, m = references, k = anchors, d = channels of a head, h = heads.
"""

from __future__ import annotations

from setformer_dist.models.setformer import SetformerConfig
from setformer_dist.ops.set_attention import SetAttentionConfig


def parameters(config: SetformerConfig) -> int:
    """Return the number of parameters."""
    first, half = config.embed_dim, config.embed_dim // 2
    total = (9 * config.in_chans + 1) * half + (9 * half + 1) * first + 2 * first  # stem
    for i, (width, depth, heads) in enumerate(zip(config.widths, config.depths, config.num_heads, strict=True)):
        if i:
            total += 9 * width * (width // 2) + 2 * width  # downsampling convolution without bias, norm
        total += depth * _block_parameters(width, heads, config.attn.of_stage(i), config)
    last = config.widths[-1]
    return total + 2 * last + (last + 1) * config.num_classes


def _block_parameters(width: int, heads: int, attn: SetAttentionConfig, config: SetformerConfig) -> int:
    hidden = int(width * config.mlp_ratio)
    features = heads * _feature_width(width // heads, attn)
    maps = (width + 1) * width + (features + 1) * width
    references = attn.reference_sets * attn.references_of(0) * features
    anchors = features * (width // heads) if attn.kernel == "nystrom" else 0
    mlp = (width + 1) * hidden + (hidden + 1) * width
    scales = 0 if config.layer_scale is None else 2 * width
    return maps + references + anchors + mlp + scales + 4 * width  # two norms


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
        attention = _attention_multiply_adds(grid[0] * grid[1], dim, heads, config.attn.of_stage(i))
        mlp = 2 * grid[0] * grid[1] * dim * int(dim * config.mlp_ratio)
        total += depth * (attention + mlp)
    return total + config.widths[-1] * config.num_classes


def _attention_multiply_adds(n: int, width: int, heads: int, attn: SetAttentionConfig) -> int:
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


def _feature_width(d: int, attn: SetAttentionConfig) -> int:
    return attn.anchors or d


def _strided(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the output sides of a 3x3 convolution of padding 1: divided by the stride, rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)
