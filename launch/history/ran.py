"""Who ran a run, as `setformer runs show` prints it: the last attempt, and what was another thing in the one before."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.record import attempts
from launch.record.attempts import FOLDER, Record
from launch.record.differ import checkout_words, differing
from setformer_dist.core.words import counted

_HOSTS_SHOWN = 16
_CHANGES_SHOWN = 10


def lines(folder: Path) -> Iterator[str]:
    """Yield what the records of a run say; nothing where it has none."""
    record = attempts.last(folder)
    if record is None:
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time))
    yield f"attempt {record.attempt}, {when}: {shlex.join(record.command)}"
    yield f"  in {record.directory}" + (f", repeats {record.repeats}" if record.repeats else "")
    yield from _hosts(record)
    versions = record.first_machine.get("versions")
    if isinstance(versions, Mapping):
        yield f"  versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"  code: {_state(folder, record.code)}, files {record.first_machine.get('code')}"
    for name, state in record.imports.items():
        yield f"  code of {name}: {_state(folder, state)}"
    yield from _environment(record)
    yield from _changes(folder, record)


def as_json(folder: Path) -> list[dict[str, Any]]:
    """Return all records of a run, oldest first."""
    found = (attempts.read(folder, number) for number in attempts.numbers(folder))
    return [record.model_dump() for record in found if record is not None]


def _hosts(record: Record) -> Iterator[str]:
    for at, (name, host) in enumerate(record.hosts.items()):
        if at == _HOSTS_SHOWN:
            yield f"  and {len(record.hosts) - at} more hosts"
            return
        own = f" ({host.host})" if host.host and host.host != name else ""
        yield f"  host {name}{own}: {counted(host.ranks, 'rank')}; {_machine(record.machine(name))}"
        yield from _other_code(record, name)


def _other_code(record: Record, host: str) -> Iterator[str]:
    """Yield the git states of a host's code that are not those of the supervisor's."""
    codes = record.machine(host).get("codes")
    for package, told in codes.items() if isinstance(codes, Mapping) else ():
        state = told.get("git") if isinstance(told, Mapping) else None
        there = checkout_words(state if isinstance(state, Mapping) else None)
        here = record.imports.get(package) if package else record.code
        if there != checkout_words(here):
            yield f"    code{f' of {package}' if package else ''} there: {there}"


def _machine(facts: Mapping[str, Any]) -> str:
    if not facts:
        return "nothing is known of its machine"
    gpus = facts.get("gpus")
    devices = f"{len(gpus)} x {gpus[0]}, driver {facts.get('driver')}" if isinstance(gpus, list) and gpus else "no GPU"
    return (
        f"{facts.get('system')}, kernel {facts.get('kernel')}, Python {facts.get('python')}, "
        f"{facts.get('cores')} cores of {facts.get('cpu')}, {facts.get('memory_gib')} GiB, {devices}"
    )


def _state(folder: Path, state: Mapping[str, Any] | None) -> str:
    words = checkout_words(state)
    diff = folder / FOLDER / f"{str(state.get('diff'))[:16]}.diff" if state else None
    return f"{words} ({diff})" if diff is not None and diff.is_file() else words


def _environment(record: Record) -> Iterator[str]:
    shown = [f"{name}={'(not written)' if v is None else v}" for name, v in record.environment.items()]
    if shown:
        yield f"  environment: {', '.join(shown)}"
    if record.launch_env:
        yield f"  launch.env: {', '.join(record.launch_env)} (values are not written)"


def _changes(folder: Path, record: Record) -> Iterator[str]:
    """Yield what changed with the last attempt that was not like the one before it."""
    for number in reversed([n for n in attempts.numbers(folder) if n < record.attempt]):
        before = attempts.read(folder, number)
        if before is None:
            continue
        if changed := differing(before, record):
            yield f"  changed since attempt {before.attempt}:"
            yield from (f"    {line}" for line in changed[:_CHANGES_SHOWN])
            if (more := len(changed) - _CHANGES_SHOWN) > 0:
                yield f"    and {more} more"
            return
        record = before
