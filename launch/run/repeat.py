"""`setformer train --from RUN`: a new run with the config of another one, and what is not as it was then.

    runs/<new>/repeated.json    the config of the other run, which this run reads, and its data's fingerprints

The config is the one that the run's config.json holds: file and overrides as they were resolved then, every default
included. Credentials of URLs are not in it, and have to be given again.

A run folder may come from anybody. What its files name beyond values of this program (modules, commands, hosts,
addresses) is used only where the user says so: by `--trust`, or by giving it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.record import attempts
from launch.record.attempts import Record, Recorder
from launch.record.differ import differing
from launch.record.machine import machine_facts
from launch.run.config import RunConfig
from setformer_dist.core import config as base
from setformer_dist.core import ledger, revisions
from setformer_dist.core.continuing import flatten
from setformer_dist.core.errors import ConfigError, TransientError
from setformer_dist.core.files import read_state, write_state
from setformer_dist.core.logging_config import FILE, LOOPBACK, endpoint_of
from setformer_dist.core.secrets import redacted

REPEATED = "repeated.json"
REPEATS = "repeats"
CONFIG = "config.json"
_NO_CONFIG = ("resolved",)
# Keys that name code, or places that something is sent to; and texts of any key that are fetched or written elsewhere.
_OUTSIDE = (
    "run.imports", "launch.env", "deepspeed", "compile.cache", "logging.wandb.project", "logging.mlflow.experiment"
)  # fmt: skip
_PLACE = re.compile(r"://|::|^(?:hf[-_]hub|local-dir):")
_PROMETHEUS = "logging.prometheus"
_CLUSTER, _OWN_CLUSTER = "refresh.address", "auto"  # the user's token goes to the address
_SHOWN = 160  # characters of a value in an error


@dataclass(frozen=True)
class Repetition:
    """A run that repeats another one.

    Attributes:
        source: the other one's folder.
        path: of the config of the new run, which `write_config` writes.
        overrides: of the new run, its name among them.
        config: of the new run.
        world_size: ranks of the other one's last start.
        record: of the other one's last attempt that has one.
    """

    source: Path
    path: Path
    overrides: tuple[str, ...]
    config: RunConfig
    world_size: int
    record: Record | None
    _table: Mapping[str, Any]
    _resolved: Mapping[str, Any]

    def write_config(self) -> None:
        """Write the config of the new run, which every rank reads, into its folder, which is there.

        Raises:
            TransientError: it cannot be written.
        """
        try:
            write_state(self.path, {**self._table, "resolved": {**self._resolved, REPEATS: str(self.source)}})
        except OSError as error:
            raise TransientError(f"{self.path} cannot be written: {error.strerror}") from None

    def told(self, recorder: Recorder, ranks: int, hosts: Mapping[str, int]) -> list[str]:
        """Return lines that say what differs now from then, as far as it is known before data are opened.

        Args:
            recorder: of the new run.
            ranks: of the new run.
            hosts: ranks by host; empty for this machine alone. Of other machines no devices are known yet.
        """
        head, changed = f"repeating {self.source} as {self.config.folder}", _changed_in(self.source)
        if self.record is None:
            why = "it has no record of its versions and machines, so what differs now is not known"
            return [f"{head}: {why}", *changed]
        alike = {key: value for key, value in machine_facts().items() if key in ("versions", "code", "python")}
        now, _ = recorder.made(ranks, {name: (count, alike) for name, count in hosts.items()})
        lines = differing(self.record, now)
        if not lines:
            return [f"{head}: versions, code and machine are as they were then", *changed]
        return [f"{head}; not as it was then:", *(f"  {line}" for line in lines), *changed]


def repetition(source: Path, overrides: Sequence[str]) -> Repetition:
    """Return the run that repeats the one of a folder, with overrides laid on top.

    Without an override of run.name, it takes the first free name of the form NAME-2.

    Raises:
        ConfigError: there is no run in the folder, its config is damaged or of a later version, or an override is bad.
    """
    path = source / CONFIG
    try:
        state, _ = read_state(path)
    except FileNotFoundError:
        raise ConfigError(
            f"--from {source} is no run folder, as it holds no {CONFIG}: name one, as runs/demo"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from {source}: {path} is damaged ({error}): repeat the run from its config") from None
    resolved = state.get("resolved")
    resolved = resolved if isinstance(resolved, dict) else {}
    table = {key: value for key, value in state.items() if key not in _NO_CONFIG}
    model = table.get("model")
    if isinstance(model, dict):  # a config that an older version wrote means what it meant then
        table["model"] = revisions.as_trained(model)
    config = built(table, overrides, str(path))
    words = list(overrides)
    if config.folder.resolve() == source.resolve():
        words.append(f"run.name={_free_name(config)}")
        config = built(table, words, str(path))
    size = resolved.get("world_size")
    ranks = size if type(size) is int and size > 0 else 1
    path = config.folder / REPEATED
    return Repetition(source, path, tuple(words), config, ranks, attempts.last(source), table, resolved)


def check_trusted(repeated: Repetition, overrides: Sequence[str], hosts: Sequence[str], via: str | None) -> None:
    """Check that the other run's files name nothing which runs code, or is reached over a network.

    Args:
        repeated: of the other run.
        overrides: of the user: what they set is the user's word.
        hosts: that its record names and the new run would use.
        via: the command that its record names and the new run would use.

    Raises:
        ConfigError: it does; with all of it.
    """
    given = {text.partition("=")[0] for text in overrides}
    named = [
        f"{key} = {_short(value)}"
        for key, value in _outside(repeated.config)
        if not any(key == own or key.startswith(f"{own}.") for own in given)
    ]
    if hosts:
        named.append(f"hosts {_short(list(hosts))}")
    if via is not None:
        named.append(f"--via {_short(via)}")
    if named:
        raise ConfigError(
            f"--from {repeated.source}: its files name code, hosts or addresses, which are used only if you say so: "
            f"{'; '.join(named)}: read them, then add --trust, or give values of your own"
        )


def _changed_in(folder: Path) -> list[str]:
    """Return one line per key that a run changed on its way (checkpoint.allow_changes); its config has the last value.

    Args:
        folder: of the run.
    """
    try:
        events = [event for event in ledger.read_events(folder) if event["event"] == "changed"]
    except OSError:
        return []
    first: dict[str, object] = {}
    for event in events:
        first.setdefault(str(event.get("key")), event.get("there"))
    return [
        f"  {key} was {_short(was)} at first and changed on the way: here it is one value" for key, was in first.items()
    ]


def _outside(config: RunConfig) -> Iterator[tuple[str, object]]:
    """Yield key and value of what a config names outside of this program."""
    for key, value in flatten(config.model_dump(mode="json")).items():
        table = next((name for name in _OUTSIDE if key == name or key.startswith(f"{name}.")), None)
        if key == _PROMETHEUS:
            if value not in ("", FILE) and endpoint_of(str(value))[0] != LOOPBACK:
                yield key, value
        elif key == _CLUSTER:
            if value != _OWN_CLUSTER:
                yield key, value
        elif value not in (None, [], {}) and (table is not None or any(map(_PLACE.search, _texts(value)))):
            yield key, value


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a list, also of tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)


def _short(value: object) -> str:
    text = redacted(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def built(table: Mapping[str, Any], overrides: Sequence[str], source: str) -> RunConfig:
    """Return a config from a table and overrides.

    Raises:
        ConfigError: naming the key and the repair.
    """
    for text in overrides:
        table = base.apply_override(table, text)
    return base.build(RunConfig, table, source)


def _free_name(config: RunConfig) -> str:
    number = 2
    while (config.folder.parent / f"{config.run.name}-{number}").exists():
        number += 1
    return f"{config.run.name}-{number}"


def data_differs(folder: Path, now: Mapping[str, str]) -> list[str]:
    """Return one line per split whose data are not those of the run that this one repeats; none if it repeats none.

    Args:
        folder: of this run.
        now: fingerprints of its data, by split.
    """
    try:
        state, _ = read_state(folder / REPEATED)
        resolved = state["resolved"]
        if not isinstance(resolved, dict):
            return []
        source, then = resolved[REPEATS], resolved.get("data", {})
        found = [(split, then[split], now[split]) for split in now if split in then and then[split] != now[split]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [f"{split} data are not those of {source}: fingerprint {a} then, {b} now" for split, a, b in found]
