"""The small encoder of Long Range Arena, with any attention: what changes between two runs is the attention alone.

    ids --embed + learned positions--> depth x ( x + attention(norm(x)),  x + mlp(norm(x)) ) --norm--> mean --> head

Two layers, width 64, 2 heads of 32 channels, a hidden layer of 128, dropout 0.1, mean over the valid tokens, learned
positions: the protocol of Nyströmformer (Xiong et al., AAAI 2021) and Skyformer (Chen et al., NeurIPS 2021). Id 0 is
padding and nothing else; masks are made from it here. Samples of two sequences (Retrieval) are encoded by the same
weights and compared by [a, b, a * b, a - b] (Tay et al., ICLR 2021).

Attention sees a line of tokens, not the grid of an image, as the benchmark wants it: SeT filters positions along the
line, SOFT pools its landmarks over segments, CAST clusters tokens wherever they are.

Letters: b = samples, s = sequences of a sample, z = b * s, n = tokens, c = channels.
"""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from timm.models import register_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setformer_dist.core.config import FrozenConfig, build, merge
from setformer_dist.core.errors import ConfigError
from setformer_dist.models.attention import AttentionConfig, make_attention
from setformer_dist.models.layers import DropPath, Untraceable, drop_path_rates, refuse_tracers, scale_branch

# Places of dropout in a block: after the attention, after the hidden layer, after the MLP.
_DROPOUTS = 3

_GAMMA = -1640531527  # 0x9E3779B9, 2^32 over the golden ratio, as a signed number


class SequenceConfig(FrozenConfig):
    """Shape of an encoder; every field is a keyword of `timm.create_model("lra_encoder")`.

    Attributes:
        vocabulary: ids, padding included.
        length: n, tokens of a padded sequence.
        sequences: s, sequences of a sample.
        padded: whether sequences can be shorter than n; without it no mask is made.
        dim: channels.
        depth: blocks.
        num_heads: heads the channels are split over.
        mlp_ratio: hidden width of the MLP over its input width.
        dropout: of embeddings, attention outputs and both layers of the MLP.
        drop_path_rate: share of samples that skip a branch in the last block; earlier blocks rise to it linearly.
        num_classes: classes.
        tokenizer: sha256 of the tokenizer whose ids these are; "" for ids of no texts. Weights of another do not fit.
        attention: which one, and its choices.
    """

    vocabulary: int = pydantic.Field(ge=2)
    length: int = pydantic.Field(ge=1)
    sequences: Literal[1, 2] = 1
    padded: bool = True
    dim: int = pydantic.Field(default=64, ge=1)
    depth: int = pydantic.Field(default=2, ge=1)
    num_heads: int = pydantic.Field(default=2, ge=1)
    mlp_ratio: float = pydantic.Field(default=2.0, gt=0)
    dropout: float = pydantic.Field(default=0.1, ge=0, lt=1)
    drop_path_rate: float = pydantic.Field(default=0.0, ge=0, lt=1)
    num_classes: int = pydantic.Field(default=10, ge=1)
    tokenizer: str = ""
    attention: AttentionConfig

    @pydantic.model_validator(mode="after")
    def _possible(self) -> SequenceConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} do not divide dim = {self.dim}: use a divisor")
        if self.attention.kind == "set" and self.attention.attn.position_filter == "separable":
            raise ValueError(
                "attention.attn.position_filter = 'separable' needs the grid of an image, and these are sequences: "
                "use 'linear' or 'none'"
            )
        if self.attention.kind in ("soft", "soft_norm") and self.attention.soft.sampling == "conv":
            raise ValueError(
                "attention.soft.sampling = 'conv' needs the grid of an image, and these are sequences: use 'pool'"
            )
        self.attention.check_stages(1, on_grid=False)
        return self


def keyed_dropout(x_znc: torch.Tensor, keys_z: torch.Tensor | None, place: int, rate: float) -> torch.Tensor:
    """Zero elements with probability `rate` and scale the others by 1 / (1 - rate).

    With keys, what is dropped is a function of (key, place, element) alone: it depends neither on which rank holds the
    sample, nor on the micro batch, nor on recomputation. Mixed by the finaliser of MurmurHash3 in 32 bits, which is
    also faster on CPUs than torch's own dropout.

    Args:
        x_znc: any float dtype.
        keys_z: (z,) int64, or None for torch's generator.
        place: which dropout of the model this is, so that no two drop the same.
        rate: in [0, 1).
    """
    if rate == 0:
        return x_znc
    if keys_z is None:
        return F.dropout(x_znc, rate)
    with torch.no_grad():
        key_z = keys_z + place * 0x9E3779B97F4B  # 48 bits, so that no place overflows
        start = (key_z ^ (key_z >> 32)).to(torch.int32)
        element = torch.arange(x_znc[0].numel(), dtype=torch.int32, device=x_znc.device)
        h = element * _GAMMA + start.view(-1, 1)
        # A logical shift is an arithmetic one with the copies of the sign masked off.
        h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
        h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
        h = h ^ ((h >> 16) & 0xFFFF)
        keep = ((h & 0xFFFFFF) >= round(rate * 2**24)).view_as(x_znc).to(x_znc.dtype) / (1.0 - rate)
    return x_znc * keep


class Block(nn.Module):
    """Attention and MLP, each on a normed input and added to it."""

    def __init__(self, index: int, config: SequenceConfig) -> None:
        """Build block `index`, counted from 0."""
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.dropout = config.dropout
        self.first_place = 1 + _DROPOUTS * index
        self.norm1 = nn.LayerNorm(dim)
        self.attn = make_attention(config.attention, dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(
        self,
        x_znc: torch.Tensor,
        mask_zn: torch.Tensor | None,
        keys_z: torch.Tensor | None,
        keep_2z: torch.Tensor | None,
    ) -> torch.Tensor:
        """(z, n, c) -> (z, n, c); keys of dropout and factors of drop path as arguments, for recomputation."""
        y = self._drop(self.attended(self.norm1(x_znc), mask_zn), keys_z, 0)
        x_znc = x_znc + scale_branch(y, keep_2z, 0)
        y = self._drop(F.gelu(self.fc1(self.norm2(x_znc))), keys_z, 1)
        y = self._drop(self.fc2(y), keys_z, 2)
        return x_znc + scale_branch(y, keep_2z, 1)

    def attended(self, x_znc: torch.Tensor, mask_zn: torch.Tensor | None) -> torch.Tensor:
        """(z, n, c) normed tokens -> (z, n, c)."""
        y: torch.Tensor = self.attn(x_znc, mask_bn=mask_zn)
        return y

    def _drop(self, x_znc: torch.Tensor, keys_z: torch.Tensor | None, place: int) -> torch.Tensor:
        return keyed_dropout(x_znc, keys_z, self.first_place + place, self.dropout if self.training else 0.0)


class TokenTable(nn.Embedding):
    """A vector per id, and the products of other vectors with all of them.

    Both are forward passes of this module, so that ZeRO-3 gathers the table for either.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape -> (..., c); floating (..., c) -> logits (..., vocabulary)."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Embedding(nn.Module):
    """A vector per id, and a learned one per place."""

    def __init__(self, config: SequenceConfig) -> None:
        """Build for the vocabulary and the length."""
        super().__init__()
        self.dropout = config.dropout
        self.token = TokenTable(config.vocabulary, config.dim)
        self.position = nn.Parameter(torch.empty(config.length, config.dim))
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, ids_zn: torch.Tensor, keys_z: torch.Tensor | None) -> torch.Tensor:
        """(z, n) ids -> (z, n, c)."""
        x_znc = self.token(ids_zn) + self.position[: ids_zn.shape[1]]
        return self.dropped(x_znc, keys_z)

    def dropped(self, x_znc: torch.Tensor, keys_z: torch.Tensor | None) -> torch.Tensor:
        """(z, n, c) -> (z, n, c), some of it zero in training."""
        return keyed_dropout(x_znc, keys_z, 0, self.dropout if self.training else 0.0)


def mean_of_valid(x_znc: torch.Tensor, mask_zn: torch.Tensor | None) -> torch.Tensor:
    """(z, n, c) -> (z, c), the mean over valid tokens, or over all."""
    if mask_zn is None:
        mean_zc: torch.Tensor = x_znc.mean(1)
        return mean_zc
    weight_zn1 = mask_zn.unsqueeze(2).to(x_znc.dtype)
    # Counted in fp32: bf16 has no odd numbers above 256.
    count_z1 = mask_zn.sum(1, keepdim=True, dtype=torch.float32).clamp_min(1.0)
    mean_zc = (x_znc * weight_zn1).sum(1, dtype=torch.float32) / count_z1
    return mean_zc.to(x_znc.dtype)


class SequenceEncoder(Untraceable, nn.Module):
    """Classifier of one sequence, or of two that are compared.

    Attributes:
        config_type: what its fields are.
        block_type: of its layers.
        embedding_type: of its first layer.
    """

    config_type: type[SequenceConfig] = SequenceConfig
    block_type: type[Block] = Block
    embedding_type: type[Embedding] = Embedding

    def __init__(self, **fields: object) -> None:
        """Build from the fields of SequenceConfig.

        Raises:
            ConfigError: a field is unknown, missing, of the wrong type, or the combination is impossible.
        """
        super().__init__()
        config = build(self.config_type, fields, "model")
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = config.dim
        self.embedding = self.embedding_type(config)
        self.blocks = nn.ModuleList(self.block_type(i, config) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = self.make_head(config)
        self.drop_path = DropPath(drop_path_rates([config.depth], config.drop_path_rate))
        self.sample_keys: torch.Tensor | None = None
        self.grad_checkpointing = False

    def make_head(self, config: SequenceConfig) -> nn.Module:
        """Return the classifier."""
        width = config.dim if config.sequences == 1 else 4 * config.dim
        hidden = int(config.dim * config.mlp_ratio)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, config.num_classes))

    def set_sample_keys(self, keys: torch.Tensor | None) -> None:
        """Make dropout and drop path a function of these keys for the coming forward passes; None goes back.

        Args:
            keys: (b,) int64, one per sample of the next batch.
        """
        self.sample_keys = keys

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that must not decay: all but the weights of linear layers."""
        linear = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return {name for name, _ in self.named_parameters()} - linear

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        return {"stem": r"^embedding", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward_features(self, ids_zn: torch.Tensor, keys_z: torch.Tensor | None = None) -> torch.Tensor:
        """(z, n) ids -> (z, c) means of the normed tokens, over the valid ones."""
        return mean_of_valid(*self.forward_tokens(ids_zn, keys_z))

    def forward_tokens(
        self, ids_zn: torch.Tensor, keys_z: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(z, n) ids -> (z, n, c) normed tokens, and which of them are valid, (z, n); None for all."""
        mask_zn = ids_zn > 0 if self.config.padded else None
        x_znc = self.embedding(ids_zn, keys_z)
        self.drop_path.keys = keys_z
        keep = self.drop_path(x_znc.shape[0], x_znc.device, x_znc.dtype)
        for i, block in enumerate(self.blocks):
            keep_2z = None if keep is None else keep[2 * i : 2 * i + 2]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_znc = checkpoint(block, x_znc, mask_zn, keys_z, keep_2z, use_reentrant=False)
            else:
                x_znc = block(x_znc, mask_zn, keys_z, keep_2z)
        return self.norm(x_znc), mask_zn

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(b, n), or (b, 2, n) with two sequences, integer ids -> (b, num_classes).

        Raises:
            ConfigError: the ids are of another shape.
        """
        refuse_tracers(ids)
        s, n = self.config.sequences, self.config.length
        wanted = (n,) if s == 1 else (s, n)
        if tuple(ids.shape[1:]) != wanted:
            raise ConfigError(
                f"token ids of shape {tuple(ids.shape)} do not fit an encoder of {s} sequence(s) of {n} tokens: "
                f"give (b, {', '.join(map(str, wanted))})"
            )
        y_zc = self.forward_features(ids.reshape(len(ids) * s, n), self.keys_of(s))
        if s == 1:
            return self.head(y_zc)  # type: ignore[no-any-return]
        a, b = y_zc.view(len(ids), 2, self.config.dim).unbind(1)
        return self.head(torch.cat([a, b, a * b, a - b], 1))  # type: ignore[no-any-return]

    def keys_of(self, sequences: int) -> torch.Tensor | None:
        """Return one key per sequence for dropout, or None where there is nothing to drop or no key."""
        keys = self.sample_keys
        if keys is None or not self.training:
            return None
        device = self.embedding.position.device
        return (keys.to(device)[:, None] + torch.arange(sequences, device=device) * _GAMMA).reshape(-1)


# -------------------------------------------------------------------------------------------------- entry point

# For sequences of about a thousand tokens; the configs of each task say what differs.
_SHAPE = {
    "attention": {
        "attn": {"references": 32, "position_filter": "linear", "tau": 0.25},
        "soft": {"landmarks": 32, "ridge": 0.01},
        "cast": {"clusters": 16, "size": 64},
    }
}


@register_model  # type: ignore[untyped-decorator]
def lra_encoder(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **overrides: object,
) -> nn.Module:
    """Long Range Arena's encoder; `vocabulary` and `length` must be given.

    What timm says of pretrained weights has no meaning here: there are none, and its builder is for images.

    Raises:
        ConfigError: pretrained weights are asked for, or a field is impossible.
    """
    if pretrained:
        raise ConfigError("lra_encoder has no pretrained weights: leave pretrained out")
    attention = overrides.get("attention")
    if isinstance(attention, AttentionConfig):
        overrides["attention"] = attention.model_dump(exclude_unset=True)
    return SequenceEncoder(**merge(_SHAPE, overrides))
