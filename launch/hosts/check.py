"""What must hold on all hosts before a start: the same code, libraries and run config, one shared run folder."""

from __future__ import annotations

import collections
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.hosts.link import Link, ask
from launch.record.checkout import codes_of
from setformer_dist.core.errors import LaunchError

_LIMIT_S = 30.0
_SEEN_WITHIN_S = 10.0  # how long a network's file system may take to show a new name
_MARK = ".host-"


def check_alike(link: Link, here: dict[str, Any]) -> None:
    """Check that a host has this machine's code and libraries.

    Raises:
        LaunchError: naming the host and what differs.
    """
    theirs = link.facts
    for what, name in (("code", "other code of this project"), ("python", "another version of Python")):
        if theirs[what] != here[what]:
            raise LaunchError(
                f"host {link.name} has {name} ({theirs[what]} there, {here[what]} here): install the same version there"
            )
    for name, version in here["libraries"].items():
        if (found := theirs["libraries"].get(name)) != version:
            raise LaunchError(
                f"host {link.name} has {name} {found}, and this one {version}: install the same version there"
            )


def code_faults(
    links: Sequence[Link], imports: Sequence[str], meanwhile: Callable[[], object] = lambda: None
) -> dict[str, str]:
    """Find the hosts that have other code of the user's packages than this one; return a sentence for each.

    Of the others the state of their code becomes part of what is known of their machine (`codes`).

    Args:
        links: of the hosts.
        imports: `run.imports`.
        meanwhile: as in `launch.hosts.link.ask`.
    """
    faults, here = {}, codes_of(imports)
    for link, answer in zip(links, ask(links, [{"do": "code", "imports": list(imports)}] * len(links), _LIMIT_S,
                                       meanwhile), strict=True):  # fmt: skip
        if "error" in answer:
            faults[link.name] = answer["error"]
            continue
        packages = answer["packages"]
        link.facts["machine"]["codes"] = packages
        for name, mine in here.items():
            theirs = packages.get(name, {}).get("files")
            if mine["files"] is not None and theirs != mine["files"]:
                there = f"files {theirs}" if theirs is not None else "none of it"
                faults[link.name] = (
                    f"host {link.name} has other code of {name}, which run.imports names ({there} there, files "
                    f"{mine['files']} here): copy it there"
                )
    return faults


def check_slots(link: Link, slots: int) -> None:
    """Check that a host has no more ranks than devices, where it has devices.

    Raises:
        LaunchError: naming the host.
    """
    devices = link.facts["gpus"]
    if devices and slots > devices:
        raise LaunchError(f"host {link.name} has {devices} devices, but {slots} ranks are requested: give fewer slots")


def folder_faults(
    links: Sequence[Link],
    folder: Path,
    config: Path | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    own_disks: bool = False,
) -> dict[str, str]:
    """Find the hosts that do not share the run folder, or have another run config; return a sentence for each.

    Each host makes a file in the folder, and each must see those of all others. Where they see different ones, those
    of the largest group are right.

    Args:
        links: of the hosts.
        folder: of the run.
        config: the run config's file, where there is one.
        meanwhile: as in `launch.hosts.link.ask`.
        own_disks: the folder is another one on each host (checkpoint.replicas), and must only be writable.
    """
    prefix = f"{_MARK}{secrets.token_hex(6)}-"
    folder.mkdir(parents=True, exist_ok=True)
    marks = [{"folder": str(folder), "name": f"{prefix}{at}"} for at in range(len(links))]
    looks = [{"do": "look", "prefix": prefix, "config": str(config) if config else None, **mark} for mark in marks]
    limit = time.monotonic() + _SEEN_WITHIN_S
    try:
        while True:
            answers = ask(links, looks, _LIMIT_S, meanwhile)
            faults = {link.name: a["error"] for link, a in zip(links, answers, strict=True) if "error" in a}
            seen = {link: a["seen"] for link, a in zip(links, answers, strict=True) if link.name not in faults}
            groups = collections.Counter(seen.values())
            if own_disks or len(groups) <= 1 or time.monotonic() > limit:
                break
            time.sleep(0.2)  # a file system of a network may take a moment to show a new name
    finally:
        ask(links, [{"do": "forget", **mark} for mark in marks], _LIMIT_S, meanwhile)
    common_view = max(groups, key=lambda view: groups[view], default="")
    digests = {link: a.get("config") for link, a in zip(links, answers, strict=True)}
    first = next((link for link in links if link.name not in faults), links[0])
    for link, view in seen.items():
        if view != common_view and not own_disks:
            faults[link.name] = (
                f"run folder {folder.absolute()} of host {link.name} is not that of the others: put it on a file "
                "system that all hosts share (run.out), or set checkpoint.replicas"
            )
        elif digests[link] != digests[first]:
            faults[link.name] = f"host {link.name} has another {config} than host {first.name}: copy it there"
    return faults
