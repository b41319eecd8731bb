"""Which keys of a config may change between a run and its continuation: stated at each key, read here.

    seed: int = 0                                            must stay
    threads: Annotated[int, FREE] = 0                        may change: what is computed does not depend on it
    global_size: Annotated[int, Permitted("global_batch")]   may change where the config permits it by that name

The position in the data (`dataloaders.order.order.Cursor`) is marked in the same way, by `Agreed` and `Position`.

A mark on a field that holds a table counts for the whole table, but for keys with a mark of their own. A key that the
run's config.json does not name is newer than the run, and means its default; one that this version does not know is
newer than this version. In a list of tables, a key that a run does not name means none.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from setformer_dist.core.config import all_keys


@dataclass(frozen=True)
class Permitted:
    """Mark of a key that may change in a continuation.

    Attributes:
        by: the entry of checkpoint.allow_changes that permits it; None where nothing need be said.
    """

    by: str | None = None


FREE = Permitted()


@dataclass(frozen=True)
class Agreed:
    """Mark of a field of a stream's cursor that must be the same in the run that resumes.

        seed: Annotated[int, Agreed("set the run's seed back")]

    Attributes:
        repair: for the user, where it is not the same.
        by: the entry of checkpoint.allow_changes that permits a difference; None where nothing does.
    """

    repair: str
    by: str | None = None


@dataclass(frozen=True)
class Position:
    """Mark of a field of a cursor that says where the stream is: it differs from step to step."""


def agreements(cursor: type) -> dict[str, Agreed]:
    """Return the fields of a cursor's class that must agree, in order, with their rules."""
    hints = typing.get_type_hints(cursor, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, Agreed)}


@dataclass(frozen=True)
class Difference:
    """A key that may not change, and did.

    Attributes:
        key: its dotted name.
        there: the value of the run that would be continued.
        here: the value of the continuation.
        by: the entry of checkpoint.allow_changes that would permit it; None where nothing does.
    """

    key: str
    there: Any
    here: object
    by: str | None = None


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested tables as one level of dotted keys."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def must_stay(config: pydantic.BaseModel, permitted: Collection[str] = ()) -> dict[str, Any]:
    """Return the keys that a continuation must share, dotted, with their values as JSON.

    Args:
        config: of the run.
        permitted: names that the config permits (checkpoint.allow_changes).
    """
    marks = dict(_marks(config))
    return {
        key: value for key, value in flatten(config.model_dump(mode="json")).items() if _stays(key, marks, permitted)
    }


def differences(
    there: Mapping[str, object], here: pydantic.BaseModel, permitted: Collection[str] = ()
) -> list[Difference]:
    """Return what differs, of the keys that must stay, between the config of a run's folder and a run's.

    Args:
        there: the folder's config, of this version or an older one, without what is no config.
        here: the config of the run that would continue.
        permitted: as `must_stay`.
    """
    marks, found = dict(_marks(here)), flatten(there)
    defaults = {key: value for key, value in flatten(_defaults(here)).items() if not _named(key, found)}
    theirs = {key: value for key, value in {**defaults, **found}.items() if _stays(key, marks, permitted)}
    ours = must_stay(here, permitted)
    keys = sorted(key for key in {*theirs, *ours} if not _alike(theirs.get(key), ours.get(key)))
    return [Difference(key, theirs.get(key), ours.get(key), _permits(key, marks)) for key in keys]


def _alike(there: object, here: object) -> bool:
    """Return whether two values are the same; in tables of a list, a key that is missing there means none."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return all(map(_alike, there, here))
    if isinstance(there, dict) and isinstance(here, dict):
        return all(_alike(there.get(key), here.get(key)) for key in {*there, *here})
    return there == here


def unknown_keys(there: Mapping[str, object], model: type[pydantic.BaseModel]) -> list[str]:
    """Return the dotted keys of a folder's config that this version does not know: a later one wrote them."""
    known = set(all_keys(model))
    return [
        key for key in flatten(there) if not any(part in known for part in _beginnings(key)) and not _named(key, known)
    ]


def _beginnings(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _named(key: str, keys: Collection[str]) -> bool:
    """Return whether keys name this one, or keys below it."""
    return key in keys or any(other.startswith(f"{key}.") for other in keys)


def _stays(key: str, marks: Mapping[str, Permitted], permitted: Collection[str]) -> bool:
    marked = _mark_of(key, marks)
    return marked is None or not (marked.by is None or marked.by in permitted)


def _permits(key: str, marks: Mapping[str, Permitted]) -> str | None:
    marked = _mark_of(key, marks)
    return marked.by if marked is not None else None


def _mark_of(key: str, marks: Mapping[str, Permitted]) -> Permitted | None:
    """Return the mark that counts for a key: its own, or that of the nearest table around it."""
    return next((marks[beginning] for beginning in reversed(_beginnings(key)) if beginning in marks), None)


def _marks(config: pydantic.BaseModel, prefix: str = "") -> Iterator[tuple[str, Permitted]]:
    """Yield the dotted keys that have a mark, of the kinds of tables that this config has."""
    for name, field in type(config).model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Permitted):
                yield f"{prefix}{name}", mark
        value = getattr(config, name)
        if isinstance(value, pydantic.BaseModel):
            yield from _marks(value, f"{prefix}{name}.")


def _defaults(config: pydantic.BaseModel) -> dict[str, object]:
    """Return the defaults of all keys that have one, as JSON, of the kinds of tables that this config has."""
    table: dict[str, Any] = type(config).model_construct().model_dump(mode="json", warnings=False)
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, pydantic.BaseModel):
            table[name] = _defaults(value)
    return table
