"""Which hosts train, and with how many ranks each: --hosts, a hostfile as DeepSpeed's, or a Slurm allocation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.ranks.slurm import hosts_of, tasks_of
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.files import read_plain

# What ssh could take for an option, and what a shell could take for a command, is no host's name.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*")
_LARGEST = 16 << 20  # bytes of a hostfile
_ADDRESS_6 = re.compile(r"\[?[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:%\w+)?\]?")
_MOST_SLOTS = 4096
_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\S+)(?:\s+.*)?")


@dataclass(frozen=True)
class HostSpec:
    """One host and how many ranks it may have.

    Attributes:
        name: as ssh knows it.
        slots: ranks on it.
    """

    name: str
    slots: int

    def __post_init__(self) -> None:
        if _ADDRESS_6.fullmatch(self.name):
            raise LaunchError(f"{self.name} is an IPv6 address: give it a name in ~/.ssh/config, and use that")
        if not _NAME.fullmatch(self.name):
            raise LaunchError(f"{self.name!r} is not a host name: use letters, digits, dots and dashes, or user@host")
        if self.slots < 1:
            raise LaunchError(f"host {self.name} has {self.slots} slots: give 1 or more, or leave it out")
        if self.slots > _MOST_SLOTS:
            raise LaunchError(f"host {self.name} has {self.slots} slots: give at most {_MOST_SLOTS}, one per device")


def parse_hosts(text: str, given: str = "--hosts") -> list[HostSpec]:
    """Read `a:8,b:8`; a host without a number has one rank.

    Args:
        text: see above.
        given: by what, for messages.

    Raises:
        LaunchError: naming what is wrong.
    """
    hosts = []
    for part in text.split(","):
        if _ADDRESS_6.fullmatch(part.strip()):
            HostSpec(part.strip(), 1)
        name, colon, slots = part.strip().partition(":")
        hosts.append(HostSpec(name, _number(slots, name) if colon else 1))
    return _distinct(hosts, given)


def read_hostfile(path: Path, include: str = "", exclude: str = "") -> list[HostSpec]:
    """Read DeepSpeed's hostfile, `HOST slots=N` on each line, and its --include and --exclude, `a@b:0,1`.

    Of a host with numbered slots only as many ranks are kept: which devices they take is their environment's business.

    Raises:
        LaunchError: naming the file, the line and what is wrong.
    """
    try:
        text = read_plain(path, _LARGEST).decode("utf-8-sig")
        lines = text.split("\n")  # as for DeepSpeed, no other character ends a line
    except (OSError, ValueError) as error:
        raise LaunchError(f"hostfile {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    hosts = []
    for number, raw in enumerate(lines, 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise LaunchError(f"{path}, line {number}: {line!r} is not of the form HOST slots=N")
        hosts.append(HostSpec(found[1], _number(found[2], found[1])))
    if not hosts:
        raise LaunchError(f"hostfile {path} names no host")
    if include and exclude:
        raise LaunchError("--include and --exclude exclude each other: give one of them")
    return _filtered(_distinct(hosts, str(path)), include or exclude, keep=bool(include))


def of_slurm(environ: Mapping[str, str]) -> list[HostSpec] | None:
    """Return the hosts of the Slurm allocation this process runs in, None outside of any.

    Raises:
        LaunchError: Slurm does not say which they are.
    """
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    names, per_node = hosts_of(nodes), environ.get("SLURM_TASKS_PER_NODE", "1")
    slots = tasks_of(per_node)
    if len(slots) != len(names):
        raise LaunchError(f"SLURM_TASKS_PER_NODE = {per_node!r} does not fit the {len(names)} hosts of the allocation")
    return [HostSpec(name, number) for name, number in zip(names, slots, strict=True)]


def _filtered(hosts: Sequence[HostSpec], text: str, keep: bool) -> list[HostSpec]:
    if not text:
        return list(hosts)
    known = {host.name: host.slots for host in hosts}
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, listed = part.strip().partition(":")
        if name not in known:
            raise LaunchError(
                f"{'--include' if keep else '--exclude'} names host {name!r}, which is not in the hostfile"
            )
        numbers = {_number(n, name) for n in listed.split(",")} if colon else set(range(known[name]))
        if beyond := [n for n in sorted(numbers) if not 0 <= n < known[name]]:
            raise LaunchError(f"host {name} has slots 0 to {known[name] - 1}, but {beyond[0]} is named")
        named.setdefault(name, set()).update(numbers)
    left = {
        name: len(named.get(name, ())) if keep else slots - len(named.get(name, ())) for name, slots in known.items()
    }
    chosen = [HostSpec(name, slots) for name, slots in left.items() if slots]
    if not chosen:
        raise LaunchError("--exclude leaves no host")
    return chosen


def _distinct(hosts: Sequence[HostSpec], where: str) -> list[HostSpec]:
    names = [host.name for host in hosts]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise LaunchError(f"{where} names host {twice} twice: name it once, with all its slots")
    return list(hosts)


def _number(text: str, host: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text.strip()):
        raise LaunchError(f"host {host}: {text[:40]!r} is not a number of slots")
    return int(text)
