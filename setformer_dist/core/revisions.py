"""What a config of an older version means: runs and checkpoints keep the function that they were trained with.

Some choices of a model came later than the first runs, and with another default than what those runs had done. A config
made since then names such a choice, default or not. So a run's config.json, or a checkpoint's config, that does not
name it is older, and means what was done then:

* `soft.query_scale`, until 2026-11-28 "after": the learned landmarks of SOFT (`soft.sampling = "conv"`, the default of
  soft_*) saw queries that were not yet divided by d^(1/4), unlike the authors' (`SoftAttentionConfig`);
* `attn.places`, until 2026-11-29 "edges": places of SeT's tokens and references moved against each other with the size
  of the image (`SetAttentionConfig`).

What does not say when it was made, an exported .safetensors file, is ambiguous: name the choice there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Args = Mapping[str, object]


@dataclass(frozen=True)
class Revision:
    """A choice that older configs do not name.

    Attributes:
        key: its path within `model.args`.
        old: what was done before there was a choice.
        new: the default since then.
        since: the day from which configs name it.
        was: what a run of the old one does, for a message.
        applies: whether it means something to a model of that name, with these arguments, the last of them being the
            table in which the key stands.
    """

    key: tuple[str, ...]
    old: str
    new: str
    since: str
    was: str
    applies: Callable[[str, Args, Args], bool]

    @property
    def shown(self) -> str:
        """Return the key as a config has it, without `model.args`."""
        return ".".join(self.key)

    def of(self, args: Args) -> str | None:
        """Return what arguments of a model say of it, None where they do not."""
        table = _table(args, self.key[:-1])
        value = None if table is None else table.get(self.key[-1])
        return value if isinstance(value, str) else None

    def missing(self, model: str, args: Args) -> bool:
        """Return whether arguments do not name it, though it means something."""
        table = _table(args, self.key[:-1])
        return table is not None and self.key[-1] not in table and self.applies(model, args, table)


def _table(args: Args, path: tuple[str, ...]) -> Args | None:
    """Return the table at a path, empty where there is none, None where something else is there."""
    for name in path:
        found = args.get(name, {})
        if not isinstance(found, Mapping):
            return None
        args = found
    return args


def _with(args: Args, path: tuple[str, ...], value: str | None) -> dict[str, object]:
    """Return arguments with a value at a path, or without that key and the tables that it leaves empty."""
    first, rest = path[0], path[1:]
    changed: object = value
    if rest:
        inner = args.get(first, {})
        changed = _with(inner if isinstance(inner, Mapping) else {}, rest, value) or None
    kept = {key: old for key, old in args.items() if key != first or changed is not None}
    return kept if changed is None else {**kept, first: changed}


def _soft_convolves(model: str, args: Args, soft: Args) -> bool:
    if model.startswith("soft_"):
        return bool(soft.get("sampling", "conv") == "conv")
    return args.get("attention") in ("soft", "soft_norm") and soft.get("sampling") == "conv"


def _images_have_places(model: str, args: Args, attn: Args) -> bool:
    is_set = model.startswith("setformer_") and args.get("attention", "set") == "set"
    return is_set and attn.get("position_filter") != "none"


def _sequences_have_places(model: str, args: Args, attn: Args) -> bool:
    attention = _table(args, ("attention",)) or {}
    is_set = model == "lra_encoder" and attention.get("kind", "set") == "set"
    return is_set and attn.get("position_filter") != "none"


_PLACES = ("edges", "centres", "2026-11-29", "places tokens at the edges of their cells")
_SCALE = ("after", "before", "2026-11-28", "samples SOFT's landmarks from undivided queries")

REVISIONS = (
    Revision(("soft", "query_scale"), *_SCALE, _soft_convolves),
    Revision(("attn", "places"), *_PLACES, _images_have_places),
    Revision(("attention", "attn", "places"), *_PLACES, _sequences_have_places),
)


def named(model: str, args: Args, *, old: bool = False) -> dict[str, object]:
    """Return the model's arguments with each choice in them that means something.

    Args:
        model: registered name.
        args: `model.args`; what is wrong in them stays as it is, for the model to refuse.
        old: what is meant where a choice is not named: what older versions did, or the default.
    """
    for revision in REVISIONS:
        if revision.missing(model, args):
            args = _with(args, revision.key, revision.old if old else revision.new)
    return dict(args)


def as_trained(table: Mapping[str, object]) -> dict[str, object]:
    """Return the `[model]` table of a run's or a checkpoint's config as it was meant when it was written.

    Args:
        table: of any version, as its JSON has it.
    """
    name, args = table.get("name"), table.get("args")
    if not isinstance(name, str) or not isinstance(args, Mapping):
        return dict(table)
    return {**table, "args": named(name, args, old=True)}


def unnamed(args: Args) -> dict[str, object]:
    """Return arguments as older checkpoints identify their model: without the old choices, which they did not know.

    Args:
        args: of a model whose config names its choices.
    """
    return _without(args, lambda revision: revision.old)


def without_defaults(args: Args) -> dict[str, object]:
    """Return arguments without the choices that have their default, which a config gets whoever wrote it.

    Args:
        args: of a model whose config names its choices.
    """
    return _without(args, lambda revision: revision.new)


def _without(args: Args, value: Callable[[Revision], str]) -> dict[str, object]:
    for revision in REVISIONS:
        if revision.of(args) == value(revision):
            args = _with(args, revision.key, None)
    return dict(args)


def with_old(args: Args, revision: Revision) -> dict[str, object]:
    """Return arguments with the old choice."""
    return _with(args, revision.key, revision.old)


def choices_of(table: Mapping[str, object]) -> dict[Revision, str]:
    """Return what a `[model]` table of any version means by each choice that it has."""
    args = as_trained(table).get("args")
    if not isinstance(args, Mapping):
        return {}
    return {revision: value for revision in REVISIONS if (value := revision.of(args)) is not None}
