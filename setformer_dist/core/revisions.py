"""What a config of an older version means: runs and checkpoints keep the function that they were trained with.

One choice so far. Until 2026-11-28 the learned landmarks of SOFT (`soft.sampling = "conv"`, the default of soft_*) saw
queries that were not yet divided by d^(1/4), unlike the authors' (`SoftAttentionConfig.query_scale`). A config made
since then names its scale, so a run's config.json or a checkpoint's config that does not name it is older and means
"after". What does not say when it was made, an exported .safetensors file, is ambiguous: name the scale there.
"""

from __future__ import annotations

from collections.abc import Mapping

OLD, NEW = "after", "before"
_TABLE, _KEY = "soft", "query_scale"


def named(model: str, args: Mapping[str, object], scale: str = NEW) -> dict[str, object]:
    """Return the model's arguments with `soft.query_scale` in them where it means something.

    Args:
        model: registered name.
        args: `model.args`; what is wrong in them stays as it is, for the model to refuse.
        scale: what is meant where it is not named.
    """
    soft = args.get(_TABLE, {})
    if not isinstance(soft, Mapping) or _KEY in soft or not _convolves(model, args, soft):
        return dict(args)
    return {**args, _TABLE: {**soft, _KEY: scale}}


def _convolves(model: str, args: Mapping[str, object], soft: Mapping[str, object]) -> bool:
    if model.startswith("soft_"):
        return bool(soft.get("sampling", "conv") == "conv")
    return args.get("attention") in ("soft", "soft_norm") and soft.get("sampling") == "conv"


def as_trained(table: Mapping[str, object]) -> dict[str, object]:
    """Return the `[model]` table of a run's or a checkpoint's config as it was meant when it was written.

    Args:
        table: of any version, as its JSON has it.
    """
    name, args = table.get("name"), table.get("args")
    if not isinstance(name, str) or not isinstance(args, Mapping):
        return dict(table)
    return {**table, "args": named(name, args, OLD)}


def unnamed(args: Mapping[str, object]) -> dict[str, object]:
    """Return arguments as older checkpoints identify their model: without the old scale, which they did not know.

    Args:
        args: of a model whose config names the scale.
    """
    soft = args.get(_TABLE)
    if not isinstance(soft, Mapping) or soft.get(_KEY) != OLD:
        return dict(args)
    rest = {key: value for key, value in soft.items() if key != _KEY}
    kept = {key: value for key, value in args.items() if key != _TABLE}
    return {**kept, _TABLE: rest} if rest else kept


def scale_of(table: Mapping[str, object]) -> str | None:
    """Return the scale of a `[model]` table, None where the model samples no landmarks by a convolution."""
    args = as_trained(table).get("args")
    soft = args.get(_TABLE) if isinstance(args, Mapping) else None
    scale = soft.get(_KEY) if isinstance(soft, Mapping) else None
    return scale if isinstance(scale, str) else None
