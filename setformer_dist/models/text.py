"""Encoders of texts, with any attention, and the model that learns them by hidden tokens.

    ids --embed + learned positions + part of a pair--> depth x ( x + attention(norm(x)),  x + mlp(norm(x)) ) --norm-->

Blocks and dropout are those of Long Range Arena's encoder (sequence.py). Every token sees all others, and through the
reference sets those that come later, so texts are understood and not generated.

A SeT layer hands a token what the references gathered, which knows little of the order of neighbours. `local` adds a
convolution over the line of tokens before each attention; 0 is the attention alone.

Letters: b = texts, n = tokens, c = channels, K = hidden tokens.
"""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from setformer_dist.core.config import merge
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.text_ids import PAD, SEP, most_hidden
from setformer_dist.models.attention import AttentionConfig
from setformer_dist.models.encoded import Encoded
from setformer_dist.models.layers import refuse_tracers
from setformer_dist.models.sequence import Block, Embedding, SequenceConfig, SequenceEncoder, mean_of_valid

OF_TEXTS = "text_"  # what the names of these models begin with
_PARTS = 2  # texts of a pair


class TextConfig(SequenceConfig):
    """Shape of an encoder of texts; every field is a keyword of its entry points.

    Attributes:
        length: most tokens of a text; fewer may come.
        read_out: what the classifier reads: the "mean" over valid tokens, or the "first" token.
        local: tokens that a convolution before each attention spans, an odd number; 0 for none.
        pairs: whether the data are pairs of texts; the model is the same.
    """

    num_classes: int = pydantic.Field(default=2, ge=0)
    sequences: Literal[1] = 1
    read_out: Literal["mean", "first"] = "mean"
    local: int = pydantic.Field(default=0, ge=0)
    pairs: bool = False

    @pydantic.model_validator(mode="after")
    def _centred(self) -> TextConfig:
        if self.local and self.local % 2 == 0:
            raise ValueError(f"local = {self.local} has no token in its middle: use an odd number, or 0 for none")
        if self.attention.kind == "cast" and not self.attention.cast.size:
            raise ValueError(
                "attention.cast.size = 0 makes the size of clusters of the padded length, so that a result depends on "
                "padding: set it, such as to 32"
            )
        return self


class TextBlock(Block):
    """A block whose attention reads tokens that know their neighbours, where the config says so."""

    def __init__(self, index: int, config: TextConfig) -> None:
        """Build block `index`, counted from 0."""
        super().__init__(index, config)
        self.local = Local(config.dim, config.local) if config.local else None

    def attended(self, x_znc: torch.Tensor, mask_zn: torch.Tensor | None) -> torch.Tensor:
        """(z, n, c) normed tokens -> (z, n, c)."""
        if self.local is not None:
            x_znc = x_znc + self.local(x_znc, mask_zn)
        return super().attended(x_znc, mask_zn)


class Local(nn.Module):
    """A depth-wise convolution over a line of tokens."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_znc: torch.Tensor, mask_zn: torch.Tensor | None) -> torch.Tensor:
        """(z, n, c) -> (z, n, c); padding is read as zeros."""
        if mask_zn is not None:
            x_znc = x_znc * mask_zn.unsqueeze(2).to(x_znc.dtype)
        width, n = len(self.weight), x_znc.shape[1]
        # By shifts and sums: the gradients of torch's convolutions on GPUs may differ from run to run.
        padded = F.pad(x_znc, (0, 0, width // 2, width // 2))
        return torch.stack([padded[:, k : k + n] * self.weight[k] for k in range(width)]).sum(0)


class TextEmbedding(Embedding):
    """A vector per id, a learned one per place, and one per part of a pair."""

    def __init__(self, config: SequenceConfig) -> None:
        """Build for the vocabulary and the length."""
        super().__init__(config)
        # Zeros: masked language modelling shows one part alone, so the second begins as the first.
        self.part = nn.Parameter(torch.zeros(_PARTS, config.dim))

    def forward(self, ids_zn: torch.Tensor, keys_z: torch.Tensor | None) -> torch.Tensor:
        """(z, n) ids -> (z, n, c)."""
        ends = ids_zn == SEP
        # A text ends with its separator, which still belongs to it.
        second = ((ends.cumsum(1) - ends.to(torch.int64)) > 0) & (ids_zn != PAD)
        part = self.part[0] + second.unsqueeze(2).to(self.part.dtype) * (self.part[1] - self.part[0])
        return self.dropped(self.token(ids_zn) + self.position[: ids_zn.shape[1]] + part, keys_z)


class TextEncoder(SequenceEncoder):
    """Encoder of texts, with a classifier or without.

    Attributes:
        config: its shape.
    """

    config: TextConfig
    config_type = TextConfig
    block_type = TextBlock
    embedding_type = TextEmbedding
    feature_info: tuple[object, ...] = ()  # no maps

    def make_head(self, config: SequenceConfig) -> nn.Module:
        """Return the classifier; without classes there is none."""
        if not config.num_classes:
            return nn.Identity()
        head = nn.Linear(config.dim, config.num_classes)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_features(self, ids_zn: torch.Tensor, keys_z: torch.Tensor | None = None) -> torch.Tensor:
        """(b, n) ids -> (b, c), what the classifier reads."""
        x_znc, mask_zn = self.forward_tokens(ids_zn, keys_z)
        return x_znc[:, 0] if self.config.read_out == "first" else mean_of_valid(x_znc, mask_zn)

    def forward_head(self, x_bc: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(b, c) -> (b, num_classes), or with `pre_logits` what comes before the classifier."""
        return x_bc if pre_logits else self.head(x_bc)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(b, n) integer ids -> (b, num_classes), or (b, c) without classes.

        Raises:
            ConfigError: the ids are of another shape.
        """
        refuse_tracers(ids)
        self.check_ids(ids)
        return self.forward_head(self.forward_features(ids, self.keys_of(1)))

    def check_ids(self, ids: torch.Tensor) -> None:
        """Refuse ids that are no texts of at most `length` tokens; raises ConfigError."""
        if ids.dim() != 2 or not 0 < ids.shape[1] <= self.config.length:
            raise ConfigError(
                f"token ids of shape {tuple(ids.shape)} do not fit an encoder of texts of {self.config.length} tokens: "
                "give (b, n) with n up to that, or set model.args.length"
            )


class TokenDecoder(nn.Module):
    """Names tokens, by a table of them that it is given."""

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, x_bkc: torch.Tensor, table: nn.Module) -> torch.Tensor:
        """(b, K, c) -> logits (b, K, vocabulary)."""
        logits: torch.Tensor = table(self.norm(F.gelu(self.transform(x_bkc)))) + self.bias
        return logits


class MaskedLanguageModel(Encoded):
    """An encoder of texts, and a head that names hidden tokens by the encoder's own table of them.

    Attributes:
        encoder: without a classifier.
    """

    encoder: TextEncoder

    def __init__(self, encoder: nn.Module, ratio: float, eval_ratio: float) -> None:
        """Build around an encoder.

        Args:
            encoder: of texts.
            ratio: share of a text's tokens that is hidden in training.
            eval_ratio: the same in evaluation.

        Raises:
            ConfigError: the encoder is another model, or has a classifier.
        """
        if not isinstance(encoder, TextEncoder):
            raise ConfigError("task mlm trains encoders of texts: set model.name to text_mini, text_small or text_base")
        if encoder.num_classes:
            raise ConfigError("task mlm has no classes: leave model.args.num_classes out")
        super().__init__(encoder)
        self.ratio, self.eval_ratio = ratio, eval_ratio
        self.decoder = TokenDecoder(encoder.config.dim, encoder.config.vocabulary)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return timm's patterns that order the parameters by depth, for layer decay."""
        return {
            "stem": r"^encoder\.embedding",
            "blocks": [
                (r"^encoder\.blocks\.(\d+)", None),
                (r"^encoder\.norm|^decoder", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.set_grad_checkpointing(enable)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(b, 2, n) integers, ids and in the first K columns which tokens are asked for -> logits (b, K, vocabulary).

        Of (b, n) ids the first K tokens are asked for, to count operations.
        """
        ids = inputs[:, 0] if inputs.dim() == 3 else inputs
        self.encoder.check_ids(ids)
        most = most_hidden(ids.shape[1], self.ratio if self.training else self.eval_ratio)
        x_bnc, _ = self.encoder.forward_tokens(ids, self.encoder.keys_of(1))
        if inputs.dim() == 3:
            places = inputs[:, 1, :most].long().unsqueeze(2).expand(-1, -1, x_bnc.shape[2])
            x_bkc = x_bnc.gather(1, places)
        else:
            x_bkc = x_bnc[:, :most]
        logits: torch.Tensor = self.decoder(x_bkc, self.encoder.embedding.token)
        return logits


# -------------------------------------------------------------------------------------------------- entry points

# There are no pretrained weights; the name says what fine-tuning draws again.
default_cfgs = generate_default_cfgs(
    {name: {"classifier": "head"} for name in ("text_mini.untrained", "text_small.untrained", "text_base.untrained")}
)

_SHAPE = {
    "dropout": 0.1,
    "mlp_ratio": 4.0,
    "attention": {
        "attn": {"references": 32, "position_filter": "linear", "tau": 0.25},
        "soft": {"landmarks": 32, "ridge": 0.01},
        "cast": {"clusters": 8, "size": 32},
    },
}


def _encoder(shape: dict[str, int], name: str, pretrained: bool, overrides: dict[str, object]) -> nn.Module:
    if pretrained:
        raise ConfigError(f"{name} has no pretrained weights: leave pretrained out")
    attention = overrides.get("attention")
    if isinstance(attention, AttentionConfig):
        overrides["attention"] = attention.model_dump(exclude_unset=True)
    return TextEncoder(**merge({**_SHAPE, **shape}, overrides))


@register_model  # type: ignore[untyped-decorator]
def text_mini(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **overrides: object,
) -> nn.Module:
    """4 layers of 256 channels (as BERT-Mini); `vocabulary` and `length` must be given; raises ConfigError."""
    return _encoder({"dim": 256, "depth": 4, "num_heads": 4}, "text_mini", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def text_small(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **overrides: object,
) -> nn.Module:
    """4 layers of 512 channels (as BERT-Small); `vocabulary` and `length` must be given; raises ConfigError."""
    return _encoder({"dim": 512, "depth": 4, "num_heads": 8}, "text_small", pretrained, overrides)


@register_model  # type: ignore[untyped-decorator]
def text_base(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **overrides: object,
) -> nn.Module:
    """12 layers of 768 channels (as BERT-Base); `vocabulary` and `length` must be given; raises ConfigError."""
    return _encoder({"dim": 768, "depth": 12, "num_heads": 12}, "text_base", pretrained, overrides)
