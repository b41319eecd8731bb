"""`setformer doctor --hosts`: whether the ranks of a run can start on several hosts, and meet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from launch.hosts.check import check_alike, check_folder_is_shared, check_slots
from launch.hosts.facts import facts
from launch.hosts.link import Link, ask, greeted
from launch.hosts.meeting import arrange
from launch.hosts.names import HostSpec
from launch.hosts.reach import agent_command
from launch.machine.doctor import Finding
from setformer_dist.core.errors import LaunchError

_CONNECT_S = 30.0
_SKEW_S = 2.0  # between clocks, beyond which times in ledgers and logs mislead
_SHARED_ADVISED = 1 << 28  # bytes in /dev/shm for the readers of a rank
_BULK = 32 << 20  # bytes that are sent to measure a way


def survey(specs: Sequence[HostSpec], via: str | None, run_folder: Path) -> list[Finding]:
    """Look at all hosts at once; takes some seconds. Nothing stays there.

    Args:
        specs: hosts and their ranks.
        via: how they are reached.
        run_folder: where runs are to be kept.
    """
    begun = time.monotonic()
    links, findings = [], []
    for spec in specs:
        try:
            links.append(Link(spec.name, agent_command(spec.name, via), _CONNECT_S))
        except LaunchError as error:
            return [Finding(spec.name, "cannot be reached", "problem", str(error))]
    try:
        greeted(links, _CONNECT_S)
        here, took = facts(), time.monotonic() - begun
        for spec, link in zip(specs, links, strict=True):
            findings += _host(spec, link, here, took)
        there = [link for link in links if link.lost is None]
        if len(there) > 1:
            findings += _together(there, run_folder)
    finally:
        for link in links:
            link.close()
    return findings


def _host(spec: HostSpec, link: Link, here: dict[str, object], took: float) -> list[Finding]:
    if link.lost is not None:
        return [Finding(spec.name, "does not answer", "problem", link.lost)]
    said = link.facts
    ways = ", ".join(f"{name} {address}" for name, address in said["addresses"]) or "no network"
    devices = f"{said['gpus']} GPUs" if said["gpus"] else f"{said['cores']} cores"
    findings = [Finding(spec.name, f"answers; {devices}, {said['memory'] / 2**30:.0f} GiB, {ways}")]
    checks = ((check_alike, (link, here)), (check_slots, (link, spec.slots)))
    for check, arguments in checks:
        try:
            check(*arguments)
        except LaunchError as error:
            findings.append(Finding(spec.name, "is not like this host", "problem", str(error)))
    skew = abs(said["clock"] - here["clock"])
    if skew > _SKEW_S + took:
        findings.append(Finding(spec.name, f"its clock is {skew:.0f} s off", "note", "let NTP set the clocks"))
    if said["shared_memory_free"] < _SHARED_ADVISED * spec.slots:
        free = said["shared_memory_free"] / 2**20
        findings.append(Finding(spec.name, f"{free:.0f} MiB in /dev/shm", "note", "give it 256 MiB per rank"))
    return findings


def _together(links: Sequence[Link], run_folder: Path) -> list[Finding]:
    """Return whether the hosts share the run folder, where they meet, and how fast the ways are."""
    findings = []
    try:
        check_folder_is_shared(links, run_folder)
        findings.append(Finding("run folder", f"{run_folder.absolute()} is one and the same on all hosts"))
    except LaunchError as error:
        findings.append(Finding("run folder", "is not shared", "problem", str(error)))
    try:
        meeting = arrange(links)
    except LaunchError as error:
        return [*findings, Finding("network", "the hosts cannot meet", "problem", str(error))]
    findings.append(Finding("network", f"rank 0 is met at {meeting.address}, by {', '.join(meeting.interfaces)}"))
    request = {"do": "reach", "address": meeting.address, "port": meeting.port, "bulk": _BULK}
    for link in links[1:]:  # one after the other: each has the whole way
        [answer] = ask([link], [request], 60.0)
        if "error" in answer:
            findings.append(Finding(link.name, "its connection to rank 0 broke", "problem", answer["error"]))
            continue
        rate = answer["bulk_bytes"] / max(answer["bulk_seconds"], 1e-9) / 1e6
        findings.append(
            Finding(link.name, f"to rank 0: {1e3 * answer['seconds']:.1f} ms to connect, {rate:,.0f} MB/s one way")
        )
    return findings
