"""What must hold on all hosts before anything starts: the same code, libraries and page, one shared run folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.hosts.link import Link, ask
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


def check_slots(link: Link, slots: int) -> None:
    """Check that a host has no more ranks than devices, where it has devices.

    Raises:
        LaunchError: naming the host.
    """
    devices = link.facts["gpus"]
    if devices and slots > devices:
        raise LaunchError(f"host {link.name} has {devices} devices, but {slots} ranks are requested: give fewer slots")


def check_folder_is_shared(
    links: Sequence[Link], folder: Path, page: Path | None = None, own_disks: bool = False
) -> None:
    """Check that every host sees one and the same run folder, and this machine's page.

    Each host makes a file there, and each must see those of all others.

    Args:
        links: to the hosts.
        folder: of the run.
        page: of the run.
        own_disks: the folder is another one on each host (checkpoint.replicas), and must only be writable.

    Raises:
        LaunchError: naming the host.
    """
    prefix = f"{_MARK}{secrets.token_hex(6)}-"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}{at}" for at in range(len(links))]
    look = [
        {"do": "look", "folder": str(folder), "prefix": prefix, "name": name, "page": str(page) if page else None}
        for name in names
    ]
    try:
        mine = None
        for link, answer in zip(links, ask(links, look, _LIMIT_S), strict=True):
            if "error" in answer:
                raise LaunchError(f"host {link.name}: {answer['error']}")
            mine = mine or answer["page"]
            if answer["page"] != mine:
                raise LaunchError(f"host {link.name} has another {page} than host {links[0].name}: copy it there")
        if own_disks:
            return
        limit = time.monotonic() + _SEEN_WITHIN_S
        while True:
            answers = ask(links, look, _LIMIT_S)
            short = [link for link, a in zip(links, answers, strict=True) if set(a.get("seen", ())) < set(names)]
            if not short:
                return
            if time.monotonic() > limit:
                raise LaunchError(
                    f"run folder {folder.absolute()} of host {short[0].name} is not that of the others: put it on a "
                    "file system that all hosts share (run.out), or set checkpoint.replicas"
                )
            time.sleep(0.2)
    finally:
        ask(links, [{"do": "forget", "folder": str(folder), "prefix": prefix}] * len(links), _LIMIT_S)
