"""SeT attention under its public name; the code is in ops/set/."""

from setformer_dist.ops.set.attention import (
    Implementation,
    IntTuple,
    SetAttentionConfig,
    choose_implementation,
    marginal_error,
    set_attention,
)

__all__ = [
    "Implementation",
    "IntTuple",
    "SetAttentionConfig",
    "choose_implementation",
    "marginal_error",
    "set_attention",
]
