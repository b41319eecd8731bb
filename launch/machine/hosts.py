"""`setformer doctor --hosts`: whether the ranks of a run can start on several hosts, and meet."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.hosts.channel import Opener
from launch.hosts.check import check_alike, check_slots, code_faults, folder_faults
from launch.hosts.facts import facts
from launch.hosts.link import Link, RemoteHost, ask, close_all, greeted
from launch.hosts.meeting import arrange
from launch.hosts.names import HostSpec
from launch.hosts.reach import PROBE_BYTES, PROBE_MARK, PROBE_MODULE, opener, travelling
from launch.machine.doctor import Finding
from launch.ranks.attempt import kill_all
from setformer_dist.core.errors import LaunchError

_CONNECT_S = 30.0
_SKEW_S = 2.0  # between clocks, beyond which times in ledgers and logs mislead
_SHARED_ADVISED = 1 << 28  # bytes in /dev/shm for the readers of a rank
_BULK = 32 << 20  # bytes that are sent to measure a way
_PROBE_S = 180.0


def survey(
    specs: Sequence[HostSpec],
    via: str | None,
    run_folder: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    reach: Opener | None = None,
) -> list[Finding]:
    """Look at all hosts at once; takes some seconds. Nothing stays there.

    Args:
        specs: hosts and their ranks.
        via: how they are reached.
        run_folder: where runs are to be kept.
        config: of a run that is to start there.
        overrides: of the run config.
        imports: its `run.imports`.
        reach: opens a channel to a host; by default as `via` says.
    """
    begun = time.monotonic()
    links, findings = [], []
    for spec in specs:
        try:
            links.append(Link(spec.name, (reach or opener(via))(spec.name), _CONNECT_S))
        except LaunchError as error:
            return [Finding(spec.name, "cannot be reached", "problem", str(error))]
    try:
        greeted(links, _CONNECT_S)
        here, took = facts(), time.monotonic() - begun
        for spec, link in zip(specs, links, strict=True):
            findings += _host(spec, link, here, took)
        there = [(spec, link) for spec, link in zip(specs, links, strict=True) if link.lost is None]
        if there:
            findings += _together([link for _, link in there], run_folder)
            findings += _own_code([link for _, link in there], imports)
        if not any(finding.status == "problem" for finding in findings):
            findings += _probed(there, run_folder, config, overrides)
    finally:
        close_all(links)
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
    for fault in folder_faults(links, run_folder).values():
        findings.append(Finding("run folder", "is not shared", "problem", fault))
    if not findings and len(links) > 1:
        findings.append(Finding("run folder", f"{run_folder.absolute()} is one and the same on all hosts"))
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


def _own_code(links: Sequence[Link], imports: Sequence[str]) -> list[Finding]:
    """Return whether the packages that the run imports are the same on all hosts."""
    if not imports:
        return []
    faults = code_faults(links, imports)
    if not faults:
        return [Finding("run.imports", f"{', '.join(imports)}: the same code on all hosts")]
    return [Finding(name, "is not like this host", "problem", fault) for name, fault in faults.items()]


def _probed(
    there: Sequence[tuple[HostSpec, Link]], run_folder: Path, config: Path | None, overrides: Sequence[str]
) -> list[Finding]:
    """Start one rank on each host, which reduce together and look at the run's data."""
    links = [link for _, link in there]
    words = [str(sum(spec.slots for spec, _ in there)), *([str(config.absolute()), *overrides] if config else [])]
    printed: list[str] = []
    hosts = [RemoteHost(link, range(at, at + 1), lambda _: None, lambda _, text: printed.append(text))
             for at, link in enumerate(links)]  # fmt: skip
    meeting = arrange(links)
    logs = Path(tempfile.mkdtemp(prefix=".doctor-", dir=run_folder))
    try:
        begun = [host.begin(words, meeting.variables(at, len(links), 1), travelling(()), logs, False, PROBE_MODULE)
                 for at, host in enumerate(hosts)]  # fmt: skip
        for link, answer in zip(links, ask(links, begun, _CONNECT_S), strict=True):
            if "error" in answer:
                return [Finding(link.name, "no rank starts", "problem", answer["error"])]
        limit = time.monotonic() + _PROBE_S
        while any(m.ended_at is None for h in hosts for m in h.members) and time.monotonic() < limit:
            for host in hosts:
                host.poll()
            if any(host.lost for host in hosts):
                break
            time.sleep(0.02)
        kill_all(hosts)
        return _read(there, hosts, "".join(printed))
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def _read(there: Sequence[tuple[HostSpec, Link]], hosts: Sequence[RemoteHost], printed: str) -> list[Finding]:
    """Return what the ranks have found."""
    line = next((line for line in printed.splitlines() if line.startswith(PROBE_MARK)), None)
    if line is None:
        failed = [m for h in hosts for m in h.members if m.code]
        member = failed[0] if failed else hosts[0].members[0]
        said = member.said() or next(reversed(printed.splitlines()), "") or f"nothing within {_PROBE_S:.0f} s"
        return [Finding(member.host, "ranks cannot reduce together", "problem", said)]
    said = json.loads(line.removeprefix(PROBE_MARK))
    views, seconds = said["ranks"], said["all_reduce_s"]
    rate = PROBE_BYTES / seconds / 1e6
    findings = []
    if len(hosts) > 1:
        findings.append(Finding("all-reduce", f"{PROBE_BYTES >> 20} MiB over {len(hosts)} hosts take "
                                              f"{1e3 * seconds:.1f} ms, {rate:,.0f} MB/s"))  # fmt: skip
    for (spec, link), view in zip(there, views, strict=True):
        findings.append(Finding(spec.name, f"computes on {view['device']}"))
        if "fault" in view:
            findings.append(Finding(spec.name, "cannot train this run", "problem", view["fault"]))
        elif "facts" in view:
            findings += _same_run(spec, view["facts"], views[0].get("facts", {}))
            findings += _room(spec, link, views[0])
    return findings


def _same_run(spec: HostSpec, facts: dict[str, str], first: dict[str, str]) -> list[Finding]:
    """Return whether a host sees the data and the run config of the first one."""
    other = [what for what in first if facts.get(what) != first[what]]
    if not other:
        return [Finding(spec.name, "sees the run config and the data of the first host")]
    return [
        Finding(
            spec.name, f"has another {what}", "problem", f"{facts.get(what)} there, {first[what]} on the first host"
        )
        for what in other
    ]


def _room(spec: HostSpec, link: Link, first: Mapping[str, int]) -> list[Finding]:
    """Return whether a host has the memory for its ranks."""
    need, memory = spec.slots * first.get("rank_bytes", 0), link.facts["memory"]
    if link.facts["gpus"] or not need:
        return []
    text = f"{need / 2**30:.1f} GiB predicted for {spec.slots} ranks of {memory / 2**30:.0f} GiB"
    if need < memory:
        return [Finding(spec.name, text)]
    return [Finding(spec.name, text, "problem", "lower batch.micro, raise zero.stage, or give fewer slots")]
