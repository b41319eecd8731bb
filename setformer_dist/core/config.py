"""The base of all configs and the way from a TOML file to a frozen, checked value.

    run.toml --(extends: one other file)--> dict --(dotted overrides)--> pydantic model, frozen, no unknown keys

A wrong key, type or value becomes one ConfigError that names the place and the nearest known key.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import read_plain, read_state
from setformer_dist.core.strictjson import MAX_DEPTH, refuse_depth

LARGEST_CONFIG = 1 << 20  # bytes
_MOST_DOTS = 5_000  # of a line: a key of n parts costs tomllib 4 n² bytes
_SHORT = 200  # characters of a value that a message repeats whole

# Appended to a message that refuses a path.
HOME_NOT_EXPANDED = "~ is not expanded here: write the whole path, or $HOME on a command line (./~ is a folder named ~)"


class FrozenConfig(pydantic.BaseModel):
    """Frozen; unknown keys are errors; no silent conversion (a string is never read as a number); finite numbers.

    Attributes:
        SYNONYMS: what other programs call keys, in lower case without a table, with the dotted key here, or with a
            sentence where there is none; of the root.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )
    SYNONYMS: ClassVar[Mapping[str, str]] = {}


ConfigT = TypeVar("ConfigT", bound=pydantic.BaseModel)


def read_toml(path: Path) -> dict[str, object]:
    """Read a TOML file and the one it may extend (`extends = "other.toml"`, relative to the file).

    Raises:
        ConfigError: a file is missing or not TOML, or the extended file extends another.
    """
    table = _read_file(path)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    base = _read_file(path.parent / str(parent))
    if "extends" in base:
        raise ConfigError(f"{path}: extends {parent!r}, which itself extends another file: only one level is allowed")
    return merge(base, table)


def _read_file(path: Path) -> dict[str, object]:
    if path.suffix == ".json":
        return _read_config(path)
    if path.is_dir():
        raise ConfigError(f"config file {path} is a directory: name a .toml file in it")
    try:
        return _parse(read_plain(path, LARGEST_CONFIG))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        known = f"; configs there: {', '.join(near)}" if near else ""
        raise ConfigError(f"config file {path} does not exist{known}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}): name a plain file") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None


def _parse(data: bytes) -> dict[str, object]:
    """Read TOML text, in memory and depth that its length bounds.

    Raises:
        ValueError: it is not TOML, or nothing that anybody writes by hand.
    """
    if max(line.count(b".") for line in data.split(b"\n")) > _MOST_DOTS:
        raise ValueError(f"a line has more than {_MOST_DOTS:,} dots")
    try:
        table = tomllib.loads(data.decode("utf-8-sig"))  # editors of Windows begin with a mark
        refuse_depth(table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return table


def _read_config(path: Path) -> dict[str, object]:
    """Read the config.json of a run, or the repeated.json of one that repeats another, as a run config."""
    try:
        table, _ = read_state(path)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path} is damaged: {error}") from None
    return {key: value for key, value in table.items() if key != "resolved"}


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Return `base` with `over` laid on top, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def parse_override(text: str) -> dict[str, object]:
    """Read one dotted override, `optim.lr=1e-3`, into a nested table.

    The value is TOML (number, boolean, list, quoted string); what is not TOML is taken as a plain string.

    Raises:
        ConfigError: there is no `=` or no key.
    """
    if text.startswith("+"):
        raise ConfigError(
            f"override {_short(text)}: leave the + out, any key can be set: {_shortened(text.lstrip('+'))}"
        )
    key, sign, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"override {_short(text)} is not of the form table.key=value, such as optim.lr=1e-3")
    try:
        value: Any = tomllib.loads(f"value = {value_text}")["value"]
        refuse_depth(value)
    except RecursionError:
        raise ConfigError(f"override {_short(text)} is nested too deeply") from None
    except ValueError:  # no TOML, or a number of thousands of digits
        value = value_text
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"override {_short(text)}: a key has at most {MAX_DEPTH} parts")
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def apply_override(table: Mapping[str, object], text: str) -> dict[str, object]:
    """Lay one override on a table: `a.b=value` sets, `~a.b` removes a.b from the file's.

    Raises:
        ConfigError: not of either form, or nothing there to take away.
    """
    if not text.startswith("~"):
        return merge(table, parse_override(text))
    if (left := _without(table, text[1:])) is None:
        raise ConfigError(f"override {_short(text)}: the config does not set this key, so there is nothing to remove")
    return left


def _without(table: Mapping[str, object], key: str) -> dict[str, object] | None:
    """Return a table without a dotted key, None where it has none. A key may hold dots itself, as in a search space."""
    if key in table:
        return {name: value for name, value in table.items() if name != key}
    first, _, rest = key.partition(".")
    inner = table.get(first)
    if not rest or not isinstance(inner, Mapping) or (left := _without(inner, rest)) is None:
        return None
    return {**table, first: left}


def build(model: type[ConfigT], table: Mapping[str, object], source: str) -> ConfigT:
    """Validate a table.

    Raises:
        ConfigError: with every fault, each with its place and, for an unknown key, the nearest known one.
    """
    if (fault := next(_impossible(table), None)) is not None:
        raise ConfigError(f"{source}: {fault}")
    try:
        return model.model_validate(dict(table))
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {readable(error, model)}") from None


def _values(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of nested tables and lists with their values."""
    for key, value in table.items():
        if isinstance(value, list):
            value = {str(place): inner for place, inner in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _impossible(table: Mapping[str, object]) -> Iterator[str]:
    """Yield what no key takes: integers that do not fit 64 bits, text that is no path, name or word."""
    for key, value in _values(table):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{key}: an integer of a config has at most 64 bits, as TOML says"
        elif isinstance(value, str) and any(unicodedata.category(c) == "Cs" for c in value):
            yield f"{key} = {_short(value)}: it is no text in this locale: set LC_ALL=C.UTF-8, and not PYTHONUTF8=0"
        elif isinstance(value, str) and any(unicodedata.category(c) == "Cc" for c in value):
            yield f"{key} = {_short(value)}: text of a config has no control characters"


def load(
    model: type[ConfigT], path: Path | None, overrides: Iterable[str] = (), tables: Mapping[str, object] | None = None
) -> ConfigT:
    """Read a TOML file, lay overrides and then tables on top, validate.

    Args:
        model: of the config.
        path: of the file; None begins with nothing.
        overrides: such as optim.lr=1e-3.
        tables: nested, as TOML has them.

    Raises:
        ConfigError: naming the file, the key and the repair.
    """
    table = read_toml(path) if path is not None else {}
    for text in overrides:
        table = apply_override(table, text)
    table = merge(table, tables or {})
    source = str(path) if path is not None else "config"
    if (fault := next(_homes(table), None)) is not None:
        raise ConfigError(f"{source}: {fault}")
    return build(model, table, source)


def _homes(table: Mapping[str, object]) -> Iterator[str]:
    """Yield paths that begin with a ~, which no shell has expanded: a run is a function of what its config says."""
    for key, value in _values(table):
        if isinstance(value, str) and value.split("/")[0] == "~":
            yield f"{key} = {_short(value)}: {HOME_NOT_EXPANDED}"


# What begins pydantic's words on a value's type, and what it writes into a fault's place where a key has several.
_WISH = ": input should be "
_AS_A_LIST = ", on the command line "
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_TYPE_OF_SEVERAL = re.compile(r"int|float|bool|str|(literal|tuple|list|dict)\[.*\]")


def readable(error: pydantic.ValidationError, model: type[pydantic.BaseModel] | None = None) -> str:
    """Return pydantic's faults as one line; with the model, unknown keys get a suggestion."""
    said: list[str] = []
    for fault in error.errors():
        text = _explain(model or FrozenConfig, fault)
        value, _, wish = text.partition(_WISH)
        wish = wish.partition(_AS_A_LIST)[0] if said else wish  # of several types, the list may not be what was meant
        if wish and said and said[-1].startswith(value + _WISH):  # a key of several types: one fault for each
            said[-1] += f" or {wish}"
        else:
            said.append(text)
    return "; ".join(said)


def _explain(model: type[pydantic.BaseModel], fault: Any) -> str:
    keys, siblings = _place(model, fault["loc"])
    place = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        if len(keys) > 1 and any(f"{key}.".startswith(f"{place}.") for key in all_keys(model)):
            what = "table" if isinstance(fault["input"], dict) else "key"
            return f"unknown {what} {_short(place)}: only another kind of [{keys[0]}] has it"
        inner = _innermost(fault["input"]) if isinstance(fault["input"], dict) else None
        if inner is not None and (meant := meaning(model, inner)) is not None:  # a table of another program
            return f"unknown table {_short(place)} with {_short(inner)}: {_suggested(meant)}"
        return f"unknown key {_short(place)}{_nearest(model, keys, siblings)}"
    if fault["type"] == "missing":
        first = first_key(model, place)
        return f"table [{place}] is missing, with keys such as {first}" if first else f"key {place!r} is missing"
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if not place:
        return str(message)
    if fault["type"] == "value_error":
        named = message.startswith((f"{place}.", f"{place}:"))  # the message has the place already
        return message if named else f"{place}: {message}"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        value = fault["input"]
        first = first_key(model, place) or f"{place}.key"
        written = f"={value}" if isinstance(value, str) and len(value) <= _SHORT else ""
        return f"{place} is a table of keys, not {_short(value)}: name a key of it, such as {first}{written}"
    if fault["type"] in ("tuple_type", "list_type") and isinstance(fault["input"], str):
        return f"{place} = {_short(fault['input'])}{_WISH}a list{_AS_A_LIST}'{place}={_listed(fault['input'])}'"
    if isinstance(fault["input"], dict):
        return f"{place}: {message[0].lower()}{message[1:]}"
    return f"{place} = {_short(fault['input'])}: {message[0].lower()}{message[1:]}"


def _listed(text: str) -> str:
    """Return a text that was meant as a list, such as a,b or [a,b], as TOML has it."""
    parts = [part.strip(" '\"") for part in text.strip("[]() ").split(",")]
    return f"[{', '.join(part if _NUMBER.fullmatch(part) else json.dumps(part) for part in parts if part)}]"


def _short(value: object) -> str:
    """Return a value as it is written, without the middle of a long one."""
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:120]} … {text[-40:]} ({len(text)} characters)"


def _innermost(table: Mapping[str, object]) -> str | None:
    """Return the first key of a table, or of the tables in it, that is no table; None if there is none."""
    for key, value in table.items():
        inner = _innermost(value) if isinstance(value, Mapping) else str(key)
        if inner is not None:
            return inner
    return None


def _of_others(model: type[pydantic.BaseModel], key: str) -> str | None:
    known: Mapping[str, str] = getattr(model, "SYNONYMS", {})
    return known.get(key.lower())


def meaning(model: type[pydantic.BaseModel], key: str) -> str | None:
    """Return what a key without its table means, a dotted key or a sentence; None if that is not known.

    It may be another program's, or one of ours that just one table has.
    """
    if (meant := _of_others(model, key)) is not None:
        return meant
    ours = [path for path in all_keys(model) if path.rsplit(".", 1)[-1] == key]
    return ours[0] if len(ours) == 1 else None


def first_key(model: type[pydantic.BaseModel], table: str) -> str | None:
    """Return the first dotted key of a table; None if there is no such table, or any key may be in it."""
    return next((key for key in all_keys(model) if key.startswith(f"{table}.")), None)


def _suggested(meant: str) -> str:
    return meant if " " in meant else f"did you mean {meant}?"


def suggested_key(model: type[pydantic.BaseModel], key: str) -> str:
    """Return what a dotted key that is not known may mean, as the end of a sentence."""
    keys, siblings = _place(model, tuple(key.split(".")))
    return _nearest(model, keys, siblings)


def _nearest(model: type[pydantic.BaseModel], keys: list[str], siblings: list[str]) -> str:
    """Suggest a known key: what it means elsewhere, else one like it among the siblings, then anywhere."""
    key = keys[-1]
    misspelt = difflib.get_close_matches(key, siblings, n=1, cutoff=0.8)
    meant = _of_others(model, key) if misspelt else meaning(model, key)
    if meant is not None:
        return f": {_suggested(meant)}"
    close = misspelt or difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if not close:  # "size" for image_size, "from_step" for step
        close = [name for name in siblings if set(name.split("_")) & set(key.split("_"))]
    if close:
        return f": did you mean {'.'.join([*keys[:-1], close[0]])}?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in all_keys(model) if path != ".".join(keys)}
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.6)
    if close:
        return f": did you mean {elsewhere[close[0]]}?"
    if not siblings:
        return ", and no table has keys there"
    return f": known keys here are {', '.join(sorted(siblings))}"


def _place(model: type[pydantic.BaseModel], loc: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """Return the keys that lead to a fault, and the known keys at the level of the last of them.

    Where a table is one of several kinds, pydantic puts the kind's tag into `loc`, which is no key of the config.
    """
    keys: list[str] = []
    siblings: list[str] = list(model.model_fields)
    known: dict[str, Any] = dict(model.model_fields)
    kinds: dict[str, type[pydantic.BaseModel]] = {}
    for part in map(str, loc):
        if keys and not known and _TYPE_OF_SEVERAL.fullmatch(part):
            continue
        if part in kinds and part not in known:
            known = dict(kinds[part].model_fields)
            continue
        keys.append(part)
        if part.isdecimal() and part not in known:
            continue  # a place in a list of tables, whose keys follow
        siblings = list(known)
        kinds = inner_models(known[part].annotation) if part in known else {}
        known = dict(kinds[""].model_fields) if "" in kinds else {}
    return keys, siblings


def inner_models(annotation: object) -> dict[str, type[pydantic.BaseModel]]:
    """Return the models that a field's type names, by their tag in a tagged union, "" for one without a tag."""
    found: dict[str, type[pydantic.BaseModel]] = {}
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        marks = getattr(candidate, "__metadata__", ())
        plain = candidate.__origin__ if marks else candidate
        if isinstance(plain, type) and issubclass(plain, pydantic.BaseModel):
            found[next((mark.tag for mark in marks if isinstance(mark, pydantic.Tag)), "")] = plain
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a suggestion for a word that is not known: "did you mean …?", or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def all_keys(model: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a config model, of every kind where a table is one of several."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = inner_models(field.annotation)
        path = f"{prefix}{name}"
        keys += [key for kind in inner.values() for key in all_keys(kind, f"{path}.")] if inner else [path]
    return list(dict.fromkeys(keys))
