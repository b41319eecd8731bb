"""What an agent may say, as the supervisor takes it: anything else is not from an agent of this project.

A prefix of `--via` may reach another program, an older version, or a broken one. Unknown keys are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from launch.hosts.wire import Message

_Text = pydantic.InstanceOf[str]  # not str: a path may hold bytes that are no UTF-8
_Whole = Annotated[int, pydantic.Strict(), pydantic.Field(gt=-(2**63), lt=2**63)]
_Yes = Annotated[bool, pydantic.Strict()]
_Number = Annotated[float, pydantic.Strict(), pydantic.Field(allow_inf_nan=False)]
_Rank = Annotated[int, pydantic.Strict(), pydantic.Field(ge=0, lt=2**20)]
_Signal = Annotated[int, pydantic.Strict(), pydantic.Field(gt=0, lt=65)]


class _Word(pydantic.BaseModel):
    """An answer of which nothing is read."""


class _Facts(_Word):
    code: _Text
    python: _Text
    libraries: dict[_Text, _Text | None]
    addresses: list[tuple[_Text, _Text]]
    cores: _Whole
    gpus: _Whole
    memory: _Whole
    shared_memory_free: _Whole
    clock: _Number
    machine: dict[_Text, Any]


# rank, count, step, phase, age, stop, suspended, memory, cores, gpu
_Beat = tuple[_Rank, _Whole, _Whole, _Text, _Number, _Whole, _Yes, _Number | None, _Number | None, _Number | None]


class _Beats(_Word):
    ranks: list[_Beat]


class _Ended(_Word):
    ranks: list[tuple[_Rank, _Whole, _Text, list[_Text]]]


class _Output(_Word):
    stream: Literal[1, 2]
    text: _Text


class _Asked(_Word):
    signal: _Signal


class _Killed(_Word):
    """Nothing is left."""


class _Error(_Word):
    error: _Text


class _StartedRank(_Word):
    rank: _Rank
    log: _Text
    pid: _Whole


class _Started(_Word):
    ranks: list[_StartedRank]


class _Heard(_Word):
    port: Annotated[int, pydantic.Strict(), pydantic.Field(gt=0, lt=2**16)]
    interface: _Text | None


class _Reached(_Word):
    address: _Text
    interface: _Text | None
    seconds: _Number
    bulk_bytes: _Whole = 0
    bulk_seconds: _Number = 0.0


class _Seen(_Word):
    seen: _Text
    config: _Text | None


class _Package(_Word):
    files: _Text | None
    git: dict[_Text, Any] | None


class _Code(_Word):
    packages: dict[_Text, _Package]


_KINDS: dict[str, type[_Word]] = {
    "facts": _Facts, "beats": _Beats, "ended": _Ended, "output": _Output, "asked": _Asked, "killed": _Killed,
}  # fmt: skip
_ANSWERS: dict[str, type[_Word]] = {
    "start": _Started, "listen": _Heard, "reach": _Reached, "look": _Seen, "code": _Code,
}  # fmt: skip


def fault_of(message: Message) -> str | None:
    """Return what is wrong with a message of an agent, None where it is sound."""
    kind = message.get("is")
    word = _KINDS.get(kind) if isinstance(kind, str) else None
    if kind == "answer":
        to = message.get("to")
        if not isinstance(to, str):
            return "an answer to nothing"
        word = _Error if "error" in message else _ANSWERS.get(to, _Word)
    if word is None:
        return f"a message of kind {str(kind)[:40]!r}"
    try:
        word.model_validate(message)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        return f"a message of kind {kind!r} with another {where!r}"
    return None
