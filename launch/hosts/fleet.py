"""The hosts of a run over all its attempts: who is there, who is left out for a while, who comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints.layout import MANIFEST, step_folders
from launch.hosts.channel import Opener
from launch.hosts.check import check_alike, check_slots, code_faults, folder_faults
from launch.hosts.config import LaunchConfig
from launch.hosts.facts import facts
from launch.hosts.link import Link, RemoteHost, ask, close_all, greeted
from launch.hosts.meeting import Meeting, arrange
from launch.hosts.names import HostSpec
from launch.hosts.reach import opener, travelling
from launch.hosts.wire import ALIVE_S
from launch.ranks.attempt import Attempt, AttemptError, Watch, kill_all
from launch.ranks.logs import LOG_DIR_VARIABLE
from launch.ranks.signals import Received
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.ranks import PORT_GIVEN_VARIABLE

_START_S = 900.0  # imports from the storage of a busy cluster take their time; silence is found sooner
_BEATS_PER_S = 1024  # of all hosts together: what a supervisor hears with a small part of a core
_WELL = 10  # a host is as good as new once it was not lost for so many times as long as it was left out
_LONGEST_S = 3600.0


@dataclass
class _Absence:
    """For how long a host that was lost is left out, and why."""

    seconds: float = 0.0
    until: float = 0.0
    why: str = ""

    def lose(self, first: float) -> None:
        """Leave the host out for twice as long as the last time, or for `first` seconds where it was well since."""
        now = time.monotonic()
        well = now - self.until > _WELL * self.seconds
        self.seconds = first if well else min(2 * self.seconds, max(first, _LONGEST_S))
        self.until = now + self.seconds


@dataclass
class Fleet:
    """Starts the ranks of a run on several hosts; see `launch.ranks.supervise.Crew`.

    Attributes:
        specs: all hosts, in order of rank.
        args: of every rank; the first one is the run config.
        run_folder: of the run, on all hosts.
        config: the [launch] table.
        fits: whether a number of ranks can share the global batch.
        say: tells the user.
        reach: opens a channel to a host's agent, as `launch.hosts.reach.opener` says.
        port: at which rank 0 is met; by default a free one.
        grace_s: seconds that ranks have for a checkpoint after a stop signal.
        own_disks: the run's folder is another one on each host (checkpoint.replicas).
        imports: `run.imports`, the code of which must be alike on all hosts.
        soon_s: seconds until hosts are tried again where too few are left to train.
    """

    specs: Sequence[HostSpec]
    args: Sequence[str]
    run_folder: Path
    config: LaunchConfig
    fits: Callable[[int], bool]
    say: Callable[[str], None]
    reach: Opener = field(default_factory=lambda: opener(None))
    port: int | None = None
    grace_s: float = 60.0
    own_disks: bool = False
    imports: tuple[str, ...] = ()
    soon_s: float = 5.0
    _links: dict[str, Link] = field(default_factory=dict)
    _absences: dict[str, _Absence] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)
    _chosen: list[HostSpec] = field(default_factory=list)
    _coming: dict[str, tuple[Link, float]] = field(default_factory=dict)  # on trial again, since when
    _back: dict[str, Path | None] = field(default_factory=dict)  # hosts that answer again; the newest checkpoint then

    @property
    def ranks(self) -> int:
        """Ranks of the attempt that comes or runs."""
        return sum(spec.slots for spec in self._chosen or self.specs)

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts of the attempt that comes or runs."""
        return [spec.name for spec in self._chosen or self.specs]

    def machines(self) -> Mapping[str, tuple[int, Mapping[str, object]]]:
        """Return ranks, and what the host says of its machine, by host of the attempt that comes or runs."""
        return {s.name: (s.slots, self._links[s.name].facts.get("machine", {})) for s in self._chosen}

    def show_life(self) -> None:
        """Show all agents that somebody listens."""
        for link in (*self._links.values(), *(link for link, _ in self._coming.values())):
            link.show_life()

    def prepare(self, received: Received) -> None:
        """Connect to the hosts, check them, and choose those of the next attempt. Waits for `launch.min_hosts`.

        Raises:
            LaunchError: at the first start, a host does not answer or differs; later such a host is left out.
        """
        first = not self._checked
        told = False
        while True:
            self._connect(complete=first)
            present = [spec for spec in self.specs if spec.name in self._links]
            if self.config.max_hosts:
                present = present[: self.config.max_hosts]
            chosen = self._fitting(present)
            if chosen and len(chosen) >= self.config.min_hosts:
                self._chosen = chosen
                return
            if received.stop:
                self._chosen = []
                return
            if not told:
                told = True
                self.say(self._waiting(len(present)))
            received.wait_for_stop(1.0)

    def _waiting(self, present: int) -> str:
        """Return what is waited for, and why."""
        whys = [
            f"; {absence.why}" for name, absence in self._absences.items() if name not in self._links and absence.why
        ]
        return f"{present} of at least {self.config.min_hosts} hosts are there; waiting for the others{''.join(whys)}"

    def _connect(self, complete: bool) -> None:
        now = time.monotonic()
        for name, link in list(self._links.items()):
            link.poll()
            if link.lost is not None:
                self._leave_out(name, link.lost)
        missing = [
            spec for spec in self.specs
            if spec.name not in self._links and self._absences.get(spec.name, _Absence()).until <= now
        ]  # fmt: skip
        if not missing:
            return
        new = [self._taken_back(spec.name) or self._link(spec.name) for spec in missing]
        greeted(new, self.config.connect_s, self.show_life)
        faults = self._faults(new)
        if complete and faults:
            close_all(new)
            raise LaunchError(next(iter(faults.values())))
        for link in new:
            if link.name not in faults:
                self._links[link.name] = link
                self._warm(link)
        for link in new:
            if link.name not in faults:
                continue
            link.close()
            fault = faults[link.name]
            if link.name in self._checked and fault != self._absences.get(link.name, _Absence()).why:
                self.say(f"{fault}; the run continues without it and will try it again")
            self._leave_out(link.name, fault)
        self._checked.update(self._links)

    def _faults(self, new: Sequence[Link]) -> dict[str, str]:
        """Return why hosts that were asked cannot take part, by their names."""
        slots = {spec.name: spec.slots for spec in self.specs}
        here = facts()
        faults = {}
        for link in new:
            try:
                if link.lost is not None:
                    raise LaunchError(link.lost)
                check_alike(link, here)
                check_slots(link, slots[link.name])
            except LaunchError as error:
                faults[link.name] = str(error)
        faults |= code_faults([link for link in new if link.name not in faults], self.imports, self.show_life)
        sound = [*self._links.values(), *(link for link in new if link.name not in faults)]
        if len(sound) > 1:
            found = folder_faults(sound, self.run_folder, Path(self.args[0]), self.show_life, self.own_disks)
            faults |= {link.name: found[link.name] for link in new if link.name in found}
        return faults

    def _warm(self, link: Link) -> None:
        """Have a host import what ranks need, as it may be wanted at any moment."""
        if self.config.warm:
            link.send({"do": "warm", "env": travelling(self.config.env)})

    def _link(self, name: str) -> Link:
        return Link(name, self.reach(name), self.config.silence_s)

    def _taken_back(self, name: str) -> Link | None:
        """Return the link to a host that answers again."""
        self._back.pop(name, None)
        link, _ = self._coming.pop(name, (None, 0.0))
        return link

    def regroup(self) -> str | None:
        """Return why all ranks should start again: a host answers that was lost. Never waits."""
        now = time.monotonic()
        if self.config.take_back == "never" or (self.config.max_hosts and len(self._chosen) >= self.config.max_hosts):
            return None
        for name, absence in self._absences.items():
            if name not in self._links and name not in self._coming and absence.until <= now:
                self._coming[name] = (self._link(name), now)
        for name, (link, since) in list(self._coming.items()):
            link.poll()
            if link.lost is not None or (not link.facts and now - since > self.config.connect_s):
                link.close()
                self._taken_back(name)
                self._leave_out(name, link.lost or "")
            elif link.facts and name not in self._back:
                self._back[name] = self._newest()
                self._warm(link)
        for name, before in self._back.items():
            # Where disks are the hosts' own, this one may see no checkpoint; the ranks save one before they end.
            if self.own_disks or self.config.take_back == "at_once" or self._newest() != before:
                return f"host {name} is back"
        return None

    def _newest(self) -> Path | None:
        """Return the newest checkpoint, as far as names tell."""
        try:
            folders = step_folders(self.run_folder / "checkpoints")
        except OSError:
            return None
        return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)

    def _leave_out(self, name: str, why: str) -> None:
        """Leave a host out for a while that grows with each loss; not for long where too few are left to train."""
        absence = self._absences.setdefault(name, _Absence())
        absence.lose(self.config.retry_s)
        absence.why = why or absence.why
        link = self._links.pop(name, None)
        if link is not None:
            link.close()
        if sum(link.lost is None for link in self._links.values()) < self.config.min_hosts:
            for each in self._absences.values():
                each.until = min(each.until, time.monotonic() + self.soon_s)

    def _fitting(self, specs: Sequence[HostSpec]) -> list[HostSpec]:
        """Return the hosts with as many of their slots as can share the global batch, the last ones losing theirs."""
        total = sum(spec.slots for spec in specs)
        ranks = next((n for n in range(total, 0, -1) if self.fits(n)), 0)
        chosen = []
        for spec in specs:
            slots = min(spec.slots, ranks)
            ranks -= slots
            if slots:
                chosen.append(HostSpec(spec.name, slots))
        return chosen

    def attempt(self, log_dir: Path, watch: Watch) -> int:
        """Run all ranks once; see `launch.ranks.supervise.Crew.attempt`.

        Raises:
            LaunchError: the hosts cannot meet.
            AttemptError: as `launch.ranks.attempt.Attempt.supervise`.
        """
        links = [self._links[spec.name] for spec in self._chosen]
        try:
            meeting = arrange(links, self.port, self.show_life)
        except LaunchError as error:
            if any(link.lost for link in links):
                raise AttemptError(str(next(link.lost for link in links if link.lost)), "host", -1) from None
            raise error
        hosts = self._started(links, meeting, log_dir.absolute(), watch.received)
        attempt = Attempt(hosts, self.grace_s, watch, self.regroup)
        try:
            return attempt.supervise()
        finally:
            attempt.kill()

    def _started(self, links: Sequence[Link], meeting: Meeting, log_dir: Path, received: Received) -> list[RemoteHost]:
        own = {LOG_DIR_VARIABLE: str(log_dir), PORT_GIVEN_VARIABLE: str(int(self.port is not None))}
        env, warm = travelling(self.config.env), self.config.warm
        beat_s = max(ALIVE_S, len(links) / _BEATS_PER_S)
        hosts, begun, rank, world_size = [], [], 0, self.ranks
        for at, (spec, link) in enumerate(zip(self._chosen, links, strict=True)):
            host = RemoteHost(link, range(rank, rank + spec.slots), received.note)
            rank += spec.slots
            met = meeting.variables(at, world_size, spec.slots)
            begun.append(host.begin(self.args, {**own, **met}, env, log_dir, warm, beat_s=beat_s))
            hosts.append(host)
        for host, answer in zip(hosts, ask(links, begun, _START_S, self.show_life), strict=True):
            if "error" in answer:
                kill_all(hosts)
                how = "host" if host.lost else "error"
                raise AttemptError(answer["error"], how, -1)
            host.started(answer)
        return hosts

    def close(self) -> None:
        """End all agents and what they have started."""
        close_all([*self._links.values(), *(link for link, _ in self._coming.values())])
        self._links, self._coming = {}, {}
