"""The time line of a run: its attempts on their hosts, faults and saves, from the ledger.

Time without ranks, between a stop and the next start by hand, is left out: an axis over a weekend shows nothing.
"""

from __future__ import annotations

import bisect
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from setformer_dist.core.ledger import WELL
from setformer_dist.core.words import counted
from setformer_dist.report import figures

_HERE = "this machine"
_ROWS = 12  # of hosts; those that took part in every attempt share one where there are more
_MARKS = 600  # along the axis; marks that are closer to each other than one of so many parts look like one
_INCHES = (13.0, 0.9, 0.26)  # width; height without hosts; and of each host
_UNITS = ((172_800, 86_400, "days"), (7_200, 3_600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
_BAR, _SAVE, _FAULT = figures.SERIES[0], figures.SERIES[1], figures.SERIES[4]


@dataclass(frozen=True)
class Span:
    """One attempt.

    Attributes:
        number: from 1, over all starts of the run.
        start: Unix time at which the ranks were started.
        began: when the first step came, None where none did.
        end: when it ended, or the last event's time.
        hosts: names; none for one machine.
        ranks: in all; 0 where that is not known.
        first: step that it began with, None as `began`.
        last: step that it came to, as far as the ledger says.
        how: as the ledger's "why"; "" where the ledger has no end.
        final: whether no further attempt followed by itself.
    """

    number: int
    start: float
    began: float | None = None
    end: float = 0.0
    hosts: tuple[str, ...] = ()
    ranks: int = 0
    first: int | None = None
    last: int | None = None
    how: str = ""
    final: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return bool(self.how) and self.how not in WELL


@dataclass
class Timeline:
    """What happened when.

    Attributes:
        attempts: in order.
        saves: (time, step) of checkpoints that were complete.
        rollbacks: times at which the guard went back.
    """

    attempts: list[Span] = field(default_factory=list)
    saves: list[tuple[float, int]] = field(default_factory=list)
    rollbacks: list[float] = field(default_factory=list)

    def finish(self, step: object) -> None:
        """Call the last attempt done, as the run is: its own report is written before the last word of the ledger.

        Args:
            step: the run's last one; a run that goes on beyond it is not done.
        """
        last = self.attempts[-1] if self.attempts else None
        if last is not None and not last.how and last.last is not None and last.last == step:
            self.attempts[-1] = replace(last, how="done", final=True)

    def clock(self, at: float) -> float:
        """Return seconds of the run until a time, without the time between a stop and the next start."""
        index = bisect.bisect_right(self._sessions, at, key=lambda session: session[0]) - 1
        if index < 0:
            return 0.0
        first, last, past = self._sessions[index]
        return past + min(at, last) - first

    @property
    def seconds(self) -> float:
        """All of the run's time."""
        return sum(last - first for first, last, _ in self._sessions)

    @property
    def pauses(self) -> list[float]:
        """Seconds of the run at which it was stopped and started again later."""
        ends = [last for _, last, _ in self._sessions]
        return [self.clock(last) for last in ends[:-1]]

    @functools.cached_property
    def _sessions(self) -> list[tuple[float, float, float]]:
        """Start and end of each time that the run was going on, and its seconds before; the attempts are complete."""
        found: list[tuple[float, float, float]] = []
        begins = True
        for span in self.attempts:
            if begins:
                past = found[-1][2] + found[-1][1] - found[-1][0] if found else 0.0
                found.append((span.start, span.end, past))
            else:
                first, last, past = found[-1]
                found[-1] = (first, max(span.end, last), past)
            begins = span.final
        return found


def timeline_of(events: Iterable[Mapping[str, Any]]) -> Timeline:
    """Return the time line of a run's events, as `ledger.read_events` returns them."""
    line = Timeline()
    spans = line.attempts
    for event in events:
        kind, at = event["event"], float(event["time"])
        running = bool(spans) and not spans[-1].how
        if kind == "attempt" or (kind == "began" and (not running or spans[-1].began is not None)):
            if running:  # nobody wrote its end
                spans[-1] = replace(spans[-1], how="killed", final=True)
            hosts = event.get("hosts")
            names = tuple(map(str, hosts)) if isinstance(hosts, list) else ()
            spans.append(Span(len(spans) + 1, at, end=at, hosts=names, ranks=_number(event.get("ranks")) or 0))
        if not spans:
            continue
        span = replace(spans[-1], end=max(spans[-1].end, at), last=_number(event.get("step")) or spans[-1].last)
        if kind == "began":
            span = replace(span, began=at, first=_number(event.get("step")))
        elif kind == "ended" and not span.how:
            span = replace(span, how=str(event.get("why")), final=bool(event.get("final")))
        elif kind == "saved":
            line.saves.append((at, _number(event.get("step")) or 0))
        elif kind == "rewound":
            line.rollbacks.append(at)
        if not spans[-1].how:
            spans[-1] = span
    return line


def _number(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def lead(line: Timeline) -> str:
    """Return the sentence above the figure."""
    faults = sum(span.failed for span in line.attempts)
    parts = [counted(len(line.attempts), "attempt"), counted(faults, "fault"), counted(len(line.saves), "save")]
    if line.rollbacks:
        parts.append(counted(len(line.rollbacks), "rollback"))
    left_out = "; a dashed line is a stop and a later start, whose time between is left out" if line.pauses else ""
    return f"{', '.join(parts)}. Pale: from the start of the ranks to their first step{left_out}."


def rows(line: Timeline) -> list[list[str]]:
    """Return the table of attempts: number, start, length, where, steps, end."""
    found = []
    for span in line.attempts:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(span.start))
        where = ", ".join(span.hosts) if len(span.hosts) <= 4 else counted(len(span.hosts), "host")
        ranks = counted(span.ranks, "rank") if span.ranks else ""
        steps = "" if span.first is None else f"{span.first:,} to {max(span.last or 0, span.first):,}"
        place = f"{ranks} on {where}" if where and ranks else where or ranks
        found.append(
            [str(span.number), when, f"{span.end - span.start:,.0f} s", place, steps, span.how or "no end yet"]
        )
    return found


def figure(line: Timeline) -> str:
    """Draw the time line; "" for a run without attempts."""
    if not line.attempts or line.seconds <= 0:
        return ""
    _, divisor, unit = next(u for u in _UNITS if line.seconds >= u[0])
    lanes = _lanes(line)
    with mpl.rc_context(figures.STYLE):
        drawn = Figure(figsize=(_INCHES[0], _INCHES[1] + _INCHES[2] * (len(lanes) + 2)), layout="constrained")
        drawn.patch.set_alpha(0)
        axes = drawn.add_subplot()
        axes.patch.set_alpha(0)
        for at, (_, spans) in enumerate(lanes):
            for alpha, bars in _bars(line, spans, divisor):
                axes.broken_barh(bars, (-at - 0.36, 0.72), facecolors=_BAR, alpha=alpha, linewidth=0)
        for height, colour, mark, times in (
            (2, _FAULT, "x", [span.end for span in line.attempts if span.failed]),
            (1, _SAVE, "|", [at for at, _ in line.saves]),
        ):
            at_x = _apart([line.clock(at) / divisor for at in times], line.seconds / divisor / _MARKS)
            axes.plot(at_x, [height] * len(at_x), mark, color=colour, ms=6, mew=1.4)
        for pause in line.pauses:
            axes.axvline(pause / divisor, color=figures.INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        names = ["faults", "saves", *(_shown(name) for name, _ in lanes)]
        axes.set_yticks([2, 1, *(-at for at in range(len(lanes)))], names, parse_math=False)
        axes.set_ylim(-len(lanes) + 0.4, 2.6)
        axes.set_xlim(0, line.seconds / divisor)
        axes.tick_params(length=3)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{unit} of the run")
        return figures.svg(drawn, "timeline", f"time line over {line.seconds / divisor:.3g} {unit}: {lead(line)}")


def _lanes(line: Timeline) -> list[tuple[str, list[Span]]]:
    """Return the rows of bars: each host, those with the fewest attempts by themselves where there are many."""
    hosts: dict[str, list[Span]] = {}
    for span in line.attempts:
        for host in span.hosts or (_HERE,):
            hosts.setdefault(host, []).append(span)
    if len(hosts) <= _ROWS:
        return list(hosts.items())
    rare = sorted(hosts, key=lambda host: len(hosts[host]))[: _ROWS - 1]
    alone = {host: spans for host, spans in hosts.items() if host in rare and len(spans) < len(line.attempts)}
    others = [host for host in hosts if host not in alone]
    together = [span for span in line.attempts if any(host in others for host in span.hosts or (_HERE,))]
    return [(f"{len(others)} {'other ' if alone else ''}hosts", together), *alone.items()]


def _shown(name: str) -> str:
    """Return a host's name as an axis can show it, whoever wrote the ledger."""
    return "".join(c if c.isprintable() else "?" for c in name[:40])


def _bars(line: Timeline, spans: Sequence[Span], divisor: float) -> Iterable[tuple[float, list[tuple[float, float]]]]:
    """Yield (alpha, bars as (start, width)): training, of neighbours in two shades; and the starts, pale."""
    shades: dict[float, list[tuple[float, float]]] = {0.3: [], 0.95: [], 0.7: []}
    for span in spans:
        start, end = line.clock(span.start), line.clock(span.end)
        began = end if span.began is None else line.clock(span.began)
        shades[0.3].append((start / divisor, (began - start) / divisor))
        if end > began:
            shades[0.95 if span.number % 2 else 0.7].append((began / divisor, (end - began) / divisor))
    return shades.items()


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Return places of marks without those that would lie on the one before."""
    found: list[float] = []
    for place in sorted(places):
        if not found or place - found[-1] >= least:
            found.append(place)
    return found
