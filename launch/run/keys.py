"""Every key of a run config with type, default, unit and meaning: for `setformer config` and for docs/keys.md.

Types, bounds and defaults come from the config tables, meanings from their docstrings. `python -m launch.run.keys FILE`
writes the page; `make docs` calls it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.run.config import RunConfig
from setformer_dist.core.config import inner_models, suggested_key
from setformer_dist.core.continuing import Permitted
from setformer_dist.core.errors import ConfigError

_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "table", type(None): "none"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))

_STEPS, _EPOCHS, _SAMPLES, _PIXELS, _SECONDS, _MINUTES = "optimizer steps", "epochs", "samples", "pixels", "s", "min"
_SHARE, _PROBABILITY, _FACTOR = "share", "probability", "factor"

# Of every key that holds numbers; "" for mere counts and names.
UNITS = {
    "run.seed": "", "run.log_every": _STEPS, "run.threads": "threads", "run.timeout_minutes": _MINUTES,
    "model.drop_path": _PROBABILITY,
    "data.cache_gib": "GiB", "data.read_timeout": _SECONDS, "data.block_shards": "shards",
    "data.mixture[].weight": "relative weight", "data.image_size": _PIXELS, "data.resolutions[].epoch": "epoch",
    "data.resolutions[].step": "optimizer step", "data.resolutions[].image_size": _PIXELS,
    "data.resolutions[].ramp_to": _PIXELS, "data.resolutions[].random_to": _PIXELS,
    "data.resolutions[].multiple": _PIXELS, "data.resolutions[].scale": "share of the area",
    "data.aspect_buckets": "width / height", "data.bucket_multiple": _PIXELS, "data.eval_crop": _SHARE,
    "data.mean": "share of the full range", "data.std": "share of the full range", "data.workers": "processes",
    "data.max_pixels": _PIXELS,
    "data.threads": "threads", "data.prefetch": "micro batches", "data.max_bad_share": _SHARE,
    "data.augment.pad": _PIXELS, "data.augment.scale": "share of the area", "data.augment.ratio": "width / height",
    "data.augment.scale_jitter": "factor of a side", "data.eval_longest": _PIXELS,
    "data.augment.randaugment_ops": "operations per image", "data.augment.randaugment_magnitude": "steps of 30",
    "data.augment.color_jitter": "relative change", "data.augment.erasing": _PROBABILITY,
    "data.augment.vflip": _PROBABILITY,
    "data.augment.mixup": "alpha", "data.augment.cutmix": "alpha", "data.augment.mix_prob": _PROBABILITY,
    "data.augment.mix_off_epoch": "epoch", "data.augment.mix_off_step": "optimizer step",
    "data.augment.mix_group": _SAMPLES, "data.augment.repeats": "copies", "data.augment.smoothing": _SHARE,
    "data.length": "tokens",
    "data.smoothing": _SHARE,
    "batch.global_size": _SAMPLES, "batch.micro": _SAMPLES, "batch.max_micro": _SAMPLES,
    "batch.micro_pixels": _PIXELS,
    "schedule.epochs": _EPOCHS, "schedule.steps": _STEPS, "schedule.warmup_epochs": _EPOCHS,
    "schedule.warmup_steps": _STEPS, "schedule.warmup_lr": "learning rate", "schedule.min_lr": "learning rate",
    "optim.lr": "learning rate", "optim.weight_decay": "1 / (learning rate × step)", "optim.betas": _FACTOR,
    "optim.eps": "gradient", "optim.clip_norm": "norm of the gradient", "optim.layer_decay": _FACTOR,
    "precision.loss_scale": _FACTOR, "zero.stage": "", "zero.bucket_mib": "MiB", "ema.decay": _FACTOR,
    "parallel.sequence": "ranks", "compile.limit_s": _SECONDS,
    "refresh.every": _STEPS, "refresh.at_steps": _STEPS, "refresh.sample_steps": _STEPS, "refresh.samples": "tokens",
    "refresh.iterations": "rounds", "refresh.delay": _STEPS, "refresh.wait_s": _SECONDS,
    "eval.every_epochs": _EPOCHS, "eval.probe.every_epochs": _EPOCHS, "eval.probe.labels": _SHARE,
    "eval.probe.neighbours": "samples", "eval.every_steps": _STEPS, "eval.patience": "evaluations",
    "checkpoint.every_steps": _STEPS, "checkpoint.keep_last": "checkpoints", "checkpoint.keep_every": _STEPS,
    "checkpoint.keep_best": "checkpoints", "checkpoint.max_in_flight": "checkpoints",
    "checkpoint.write_timeout_minutes": _MINUTES, "checkpoint.mirror_minutes": _MINUTES, "checkpoint.replicas": "hosts",
    "restart.limit": "restarts", "restart.window_minutes": _MINUTES, "restart.backoff_s": _SECONDS,
    "restart.backoff_max_s": _SECONDS, "restart.same_step": "failures", "restart.hang_after_s": _SECONDS,
    "restart.start_after_s": _SECONDS, "restart.save_after_s": _SECONDS,
    "logging.prometheus": "TCP port",
    "launch.silence_s": _SECONDS, "launch.connect_s": _SECONDS, "launch.min_hosts": "hosts",
    "launch.max_hosts": "hosts", "launch.retry_s": _SECONDS,
    "schedule.power": "exponent", "schedule.drop_epochs": _EPOCHS, "schedule.drop_steps": _STEPS,
    "schedule.drop_factor": _FACTOR, "schedule.decay_epochs": _EPOCHS, "schedule.decay_steps": _STEPS,
    "optim.momentum": _FACTOR, "data.image_width": _PIXELS,
    "distill.share": _SHARE, "distill.temperature": "",
    "guard.spike": "median losses", "guard.window": _STEPS, "guard.limit": _STEPS,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        key: dotted; `[]` stands for each entry of a list of tables.
        of: the kind of data that has it, "images" or "tokens"; "" for both.
        type: with its bounds.
        default: as TOML has it; "required" where there is none, "none" where it is left out.
        unit: "" for what has none.
        resume: "free" where it may change when a run resumes, "fixed" where it may not, else the entry of
            checkpoint.allow_changes that permits it.
        meaning: one or more sentences.
    """

    key: str
    of: str
    type: str
    default: str
    unit: str
    resume: str
    meaning: str


def all_run_keys() -> list[Key]:
    """Return every key of a run config, in the order of the tables."""
    return list(_walk(RunConfig, "", "", "fixed"))


def _walk(model: type[pydantic.BaseModel], prefix: str, of: str, above: str) -> Iterator[Key]:
    meanings = attributes_of(model)
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        rule = next((mark.by or "free" for mark in field.metadata if isinstance(mark, Permitted)), above)
        entries = _entries(field.annotation)
        if not entries and (inner := inner_models(field.annotation)):
            for tag, kind in inner.items():
                yield from _walk(kind, f"{path}.", tag or of, rule)
            continue
        yield Key(path, of, _type(field), _default(field), UNITS.get(path, ""), rule, meanings.get(name, ""))
        for entry in entries:
            yield from _walk(entry, f"{path}[].", of, rule)


def _entries(annotation: object) -> list[type[pydantic.BaseModel]]:
    """Return the tables that a list of tables holds."""
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    return [kind for kind in inner if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]


def attributes_of(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """Return what a table's docstring says under "Attributes:", by key."""
    section = (inspect.getdoc(model) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    found = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    texts = {name: " ".join(text.split()) for name, text in zip(found[::2], found[1::2], strict=True)}
    return {name: f"{text[0].upper()}{text[1:]}" for name, text in texts.items()}


def _type(field: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(mark, name):g}" for mark in field.metadata for name, sign in _BOUNDS
              if isinstance(getattr(mark, name, None), int | float)]  # fmt: skip
    return ", ".join([_named(field.annotation), *bounds])


def _named(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _named(inner[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(part) for part in inner if part is not type(None))
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of {_named(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}: {_named(inner[0])}"
    kind = origin or annotation
    return _PLAIN.get(kind) or ("tables" if issubclass(kind, pydantic.BaseModel) else kind.__name__)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def keys_named(name: str) -> list[Key]:
    """Return the key of a name, those of a table, or those whose last part it is; all for "".

    Raises:
        ConfigError: there is none, with the nearest one.
    """
    keys = all_run_keys()
    name = name.strip().strip(".")
    found = [key for key in keys if not name or key.key == name or key.key.startswith((f"{name}.", f"{name}["))]
    found = found or [key for key in keys if key.key.rsplit(".", 1)[-1] == name]
    if not found:  # nobody writes "[]"
        found = [key for key in keys if key.key.replace("[]", "") == name]
    if not found:
        raise ConfigError(f"there is no key {name!r} in a run config{suggested_key(RunConfig, name)}")
    return found


def as_markdown() -> str:
    """Return docs/keys.md."""
    parts = [_HEAD]
    for table, keys in _by_table(all_run_keys()).items():
        names = ("key", "type", "default", "unit", "resume", "meaning")
        parts.append(f"\n## {table}\n\n| {' | '.join(names)} |\n|{' --- |' * len(names)}\n")
        parts += [_row(key) for key in keys]
    return "".join(parts)


_HEAD = """# Every key of a run config

Written by `make docs` from the config tables: do not edit it. `setformer config KEY` prints the same.

Set a key in its table of the run config (`[optim]`, then `lr = 1e-3`), or on the command line (`optim.lr=1e-3`). A key
without a default is required in its table. A default of `none` means that the key is left out.

"Resume" says whether a key may change when a run resumes: `free` keys may, `fixed` keys may not. For the others, it
names the entry of `checkpoint.allow_changes` that permits a change.
"""


def _by_table(keys: list[Key]) -> dict[str, list[Key]]:
    tables: dict[str, list[Key]] = {}
    for key in keys:
        table = key.key.replace("[]", "").rpartition(".")[0] or key.key
        tables.setdefault(f"{table}, {key.of}" if key.of else table, []).append(key)
    return tables


def _row(key: Key) -> str:
    cells = (f"`{key.key}`", key.type, f"`{key.default}`", key.unit, key.resume, key.meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_markdown(), encoding="utf-8")
