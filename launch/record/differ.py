"""What differs between two attempts: of one run, or of a run and of the one that it repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from launch.record.attempts import Record

_SHORT = 12  # characters of a digest or a commit
# Facts of a machine that can change results or speed, with their words.
_FACTS = {"python": "Python", "system": "system", "kernel": "kernel", "cpu": "CPU", "cores": "cores", "gpus": "GPUs",
          "driver": "GPU driver"}  # fmt: skip
_PASSING = ("SLURM_",)  # variables that are another job's each time


def differing(then: Record, now: Record) -> list[str]:
    """Return one line for each thing that differs: "torch: 2.10.0 then, 2.11.1 now"."""
    return [f"{what}: {before} then, {after} now" for what, before, after in _all(then, now) if before != after]


def _all(then: Record, now: Record) -> Iterator[tuple[str, str, str]]:
    a, b = then.first_machine, now.first_machine
    ours, theirs = _table(a, "versions"), _table(b, "versions")
    for name in {**ours, **theirs}:
        yield name, str(ours.get(name, "none")), str(theirs.get(name, "none"))
    yield "code of setformer_dist", _code(then.code, a), _code(now.code, b)
    for name in {**then.imports, **now.imports}:
        yield f"code of {name}", checkout_words(then.imports.get(name)), checkout_words(now.imports.get(name))
    for key, word in _FACTS.items():
        if key in a and key in b:
            yield word, _said(a[key]), _said(b[key])
    yield "ranks", str(then.ranks), str(now.ranks)
    yield "hosts", ", ".join(then.hosts), ", ".join(now.hosts)
    yield from _variables(then, now)


def _variables(then: Record, now: Record) -> Iterator[tuple[str, str, str]]:
    for name in sorted({*then.environment, *now.environment}):
        if not name.startswith(_PASSING):
            yield name, _value(then.environment, name), _value(now.environment, name)


def _value(environment: Mapping[str, str | None], name: str) -> str:
    value = environment.get(name, "not set")
    return "a value that is not written" if value is None else value


def _table(facts: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = facts.get(key)
    return value if isinstance(value, Mapping) else {}


def _said(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _code(state: Mapping[str, object] | None, machine: Mapping[str, object]) -> str:
    digest = f"files {machine.get('code')}"
    return f"{checkout_words(state)}, {digest}" if state else digest


def checkout_words(state: Mapping[str, object] | None) -> str:
    """Return a git state in words."""
    if not state:
        return "no git state"
    if "fault" in state:
        return f"no git state ({state['fault']})"
    commit = str(state.get("commit") or "no commit")[:_SHORT]
    branch = f" on {state['branch']}" if state.get("branch") else ""
    dirty = f", with changes {str(state['diff'])[:_SHORT]}" if state.get("diff") else ""
    return f"commit {commit}{branch}{dirty}"
