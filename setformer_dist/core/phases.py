"""What a rank does at an instant: the phases that its clock, its heartbeat, the ledger and the report name."""

from __future__ import annotations

from typing import Literal, get_args

# A phase of the clock; "other" is what no section covers.
Section = Literal[
    "data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation", "refresh", "other"
]
SECTIONS: tuple[Section, ...] = get_args(Section)

# Phases in which a rank computes by itself; in all others it may wait for the others.
BUSY: tuple[Section, ...] = ("data", "forward", "backward", "optimizer")

# Phases that run on the host and end with it, also where the device runs asynchronously.
ON_HOST: tuple[Section, ...] = ("data", "checkpoint", "evaluation", "refresh")

# What counts as progress in the ledger; every other phase is a kind of its own there.
TRAINING: frozenset[Section] = frozenset(("forward", "backward", "optimizer", "communication", "other"))

# What a heartbeat shows until the first step is done.
START = "start"
