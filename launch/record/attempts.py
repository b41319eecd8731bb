"""The records of a run's attempts: who ran it, with which code, on which hosts.

    runs/<run>/attempts/attempt-00001.json    one per start of the ranks; a state file with its digest
                        <digest>.diff         uncommitted changes of a repository that an attempt ran with

A record is written whole or not at all, and a run whose record cannot be written goes on. No secret is in it: variables
come from an allow-list (`machine.mattering`), of those that `launch.env` names only the names are written, and every
text goes through `setformer_dist.core.secrets`.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic

from launch.record.checkout import checkout_of, places_of
from launch.record.machine import machine_facts
from setformer_dist.core.files import read_state, replacing, write_state
from setformer_dist.core.secrets import redacted, redacted_json, redacted_words

log = logging.getLogger(__name__)

FOLDER = "attempts"
_NAME = re.compile(r"attempt-(\d{5,9})\.json")
_HOME = Path(__file__).resolve().parents[2]
_OF_A_HOST = ("host", "environment")  # of a machine's facts: what differs between hosts that are otherwise alike


class HostRecord(pydantic.BaseModel):
    """One host of an attempt.

    Attributes:
        ranks: on it.
        machine: index of its facts in `Record.machines`.
        host: as it calls itself.
        environment: variables that matter; None for a value that is not written.
    """

    ranks: int
    machine: int = pydantic.Field(ge=0)
    host: str = ""
    environment: dict[str, str | None] = {}


class Record(pydantic.BaseModel):
    """One attempt.

    Attributes:
        attempt: its number, from 1, over all starts of the run.
        time: Unix time of its beginning.
        command: words of the command line.
        directory: where it was called.
        ranks: in all.
        several: whether hosts were named; otherwise the ranks are the supervisor's machine's own.
        via: how hosts were reached, None for the default.
        hosts: by name, in order of rank.
        machines: facts of `machine.machine_facts`, each once; "codes" is `checkout.codes_of` where hosts were named.
        environment: of the supervisor, as `HostRecord.environment`.
        launch_env: names that `launch.env` lists.
        code: git state of this project's checkout; None where it is in none.
        imports: git state of each package of `run.imports`.
        repeats: the folder of the run that this one repeats.
    """

    attempt: int
    time: float = pydantic.Field(ge=0, lt=2.0**37)
    command: list[str]
    directory: str
    ranks: int
    several: bool
    via: str | None
    hosts: dict[str, HostRecord]
    machines: list[dict[str, object]]
    environment: dict[str, str | None]
    launch_env: list[str]
    code: dict[str, object] | None
    imports: dict[str, dict[str, object] | None]
    repeats: str | None

    def machine(self, host: str) -> Mapping[str, object]:
        """Return the facts of a host's machine; none where they are not known."""
        at = self.hosts[host].machine
        return self.machines[at] if at < len(self.machines) else {}

    @property
    def first_machine(self) -> Mapping[str, object]:
        """Facts of rank 0's machine."""
        return next((self.machine(host) for host in self.hosts), {})


@dataclass(frozen=True)
class Recorder:
    """Writes a record per attempt.

    Attributes:
        folder: of the run; it is there when `write` is called.
        imports: `run.imports`.
        env: `launch.env`.
        via: how hosts are reached, None for the default.
        repeats: folder of the run that this one repeats.
        first: called by `begin`.
    """

    folder: Path
    imports: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    via: str | None = None
    repeats: Path | None = None
    first: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Write what must be in the run's folder before anything starts; it is this process's by now."""
        self.first()

    def write(self, ranks: int, hosts: Mapping[str, tuple[int, Mapping[str, object]]]) -> None:
        """Write the record of an attempt that begins.

        Args:
            ranks: of the attempt.
            hosts: ranks and facts of the machine, by host; empty for this machine alone.
        """
        try:
            folder = self.folder / FOLDER
            folder.mkdir(exist_ok=True)
            record, diffs = self.made(ranks, hosts)
            for digest, text in diffs.items():
                _keep(folder / f"{digest[:16]}.diff", text)
            number = max(numbers(self.folder), default=0) + 1
            write_state(folder / f"attempt-{number:05d}.json", {**record.model_dump(), "attempt": number})
        except OSError as error:
            log.warning("the record of this attempt cannot be written: %s", error)

    def made(self, ranks: int, hosts: Mapping[str, tuple[int, Mapping[str, object]]]) -> tuple[Record, dict[str, str]]:
        """Return the record, and the texts of diffs by digest; arguments as `write`."""
        here = machine_facts()
        machines: list[dict[str, object]] = []
        told: dict[str, dict[str, object]] = {}
        for name, (count, facts) in (hosts or {str(here["host"]): (ranks, here)}).items():
            alike = {key: value for key, value in facts.items() if key not in _OF_A_HOST}
            if alike not in machines:
                machines.append(alike)
            own = {key: facts[key] for key in _OF_A_HOST if key in facts}
            told[name] = {"ranks": count, "machine": machines.index(alike), **own}
        states, diffs = self._code()
        record = {
            "attempt": 0,
            "time": time.time(),
            "command": redacted_words(sys.argv),
            "directory": str(Path.cwd()),
            "ranks": ranks,
            "several": bool(hosts),
            "via": redacted(self.via) if self.via else None,
            "hosts": told,
            "machines": machines,
            "environment": here["environment"],
            "launch_env": [entry.partition("=")[0] for entry in self.env],
            "code": states.pop(""),
            "imports": states,
            "repeats": str(self.repeats) if self.repeats is not None else None,
        }
        return Record.model_validate(redacted_json(record)), diffs

    def _code(self) -> tuple[dict[str, object], dict[str, str]]:
        """Return the git state of this project, under "", and of the user's packages; diffs by digest."""
        states: dict[str, object] = {}
        diffs: dict[str, str] = {}
        for name, place in {"": _HOME / "launch", **places_of(self.imports)}.items():
            found = checkout_of(place) if place is not None else None
            states[name] = found.state if found is not None else None
            if found is not None and found.diff is not None:
                diffs[str(found.state["diff"])] = found.diff
        return states, diffs


def _keep(path: Path, diff: str) -> None:
    """Write a diff, whole or not at all; one of its name is there already where its text is."""
    if path.exists():
        return
    with replacing(path) as aside:
        aside.write_bytes(diff.encode(errors="surrogateescape"))


def numbers(folder: Path) -> list[int]:
    """Return the numbers of a run's records, in order."""
    try:
        names = [path.name for path in (folder / FOLDER).iterdir()]
    except OSError:
        return []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def read(folder: Path, number: int) -> Record | None:
    """Return a record of a run, None where it is damaged or gone."""
    path = folder / FOLDER / f"attempt-{number:05d}.json"
    try:
        table, _ = read_state(path)
        return Record.model_validate(table)
    except (OSError, ValueError) as error:
        log.warning("%s is damaged and counts as missing: %s", path, str(error).splitlines()[0])
        return None


def last(folder: Path) -> Record | None:
    """Return the newest record of a run, None where there is none."""
    return next((found for number in reversed(numbers(folder)) if (found := read(folder, number)) is not None), None)
