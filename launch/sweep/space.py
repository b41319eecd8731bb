"""The search space of a sweep: parameters, conditions, and points.

A point holds the values of the parameters that are active in it, by dotted key of the run config. A parameter with
`when` is active where the other parameters have one of the values that it names.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pydantic

from setformer_dist.core import config as base
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.errors import ConfigError

Point: TypeAlias = dict[str, Any]

KINDS = ("choice", "uniform", "loguniform", "int", "grid")
_LARGEST_GRID = 100_000
_LARGEST_SPAN = 2**53  # Optuna counts in floats
_Integers: TypeAlias = tuple[int, int]  # a field of that name hides the type
_Place: TypeAlias = int | None


class Parameter(FrozenConfig):
    """One parameter; exactly one of the kinds is given.

    Attributes:
        choice: values of any kind, without an order.
        uniform: lowest and highest number.
        loguniform: the same, drawn evenly on the scale of logarithms.
        int: lowest and highest integer, both included.
        step: distance of two integers of `int`.
        grid: numbers in rising order.
        when: by key of another parameter, the values with which this one is active.
    """

    choice: tuple[Any, ...] | None = pydantic.Field(default=None, strict=False)
    uniform: tuple[float, float] | None = pydantic.Field(default=None, strict=False)
    loguniform: tuple[float, float] | None = pydantic.Field(default=None, strict=False)
    int: _Integers | None = pydantic.Field(default=None, strict=False)
    step: pydantic.PositiveInt = 1
    grid: tuple[float, ...] | None = pydantic.Field(default=None, strict=False)
    when: dict[str, list[Any]] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}" + (f", not {' and '.join(given)}" if given else ""))
        values = getattr(self, given[0])
        if not values:
            raise ValueError(f"{given[0]} is empty")
        if given[0] in ("uniform", "loguniform", "int") and values[0] > values[1]:
            raise ValueError(f"{given[0]} = {list(values)} is empty: its lowest value is above its highest")
        if given[0] == "int" and values[1] - values[0] > _LARGEST_SPAN:
            raise ValueError(f"int = {list(values)} spans more than 2**53: bring its ends closer")
        if given[0] == "loguniform" and values[0] <= 0:
            raise ValueError(f"loguniform = {list(values)} must begin above 0")
        if given[0] == "grid" and any(a >= b for a, b in itertools.pairwise(values)):
            raise ValueError(f"grid = {list(values)} must rise")
        _refuse_dates(given[0], values)
        if given[0] == "choice" and len({identity(value) for value in values}) < len(values):
            raise ValueError(f"choice = {list(values)} names a value twice")
        for key, wanted in self.when.items():
            _refuse_dates(f"when {key}", wanted)
        if self.step != 1 and given[0] != "int":
            raise ValueError("step is of int")
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> Sequence[Any] | None:
        """All values, None where it is continuous; integers are counted out only where they are asked for."""
        if self.int is not None:
            return range(self.int[0], self.int[1] + 1, self.step)
        return self.choice if self.choice is not None else self.grid

    def place(self, value: object) -> _Place:
        """Return the place of a value among the values; None where it is none of them."""
        values = self.values
        if isinstance(values, range):
            value = _plain_numbers(value)
            return values.index(value) if type(value) is type(values.start) and value in values else None
        return next((at for at, known in enumerate(values or ()) if identity(known) == identity(value)), None)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest number of a continuous parameter."""
        found = self.uniform or self.loguniform
        assert found is not None
        return found

    @property
    def first(self) -> Any:
        """Some value of it."""
        return self.values[0] if self.values is not None else self.bounds[0]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at which a config is most likely to be impossible: the ends of numbers, and every choice."""
        if self.choice is not None:
            return self.choice
        return (self.values[0], self.values[-1]) if self.values is not None else self.bounds


def label(value: object) -> str:
    """Return a text that stands for a value."""
    return json.dumps(value, sort_keys=True)


def identity(value: object) -> str:
    """Return a text that two values share where a run config takes them for the same: 1 and 1.0, but not true."""
    return label(_plain_numbers(value))


def _plain_numbers(value: object) -> object:
    """Return a value with its whole numbers as integers, in lists and tables as well."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain_numbers(inner) for key, inner in value.items()}
    return [_plain_numbers(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _refuse_dates(name: str, values: Sequence[Any]) -> None:
    """Refuse values that a config names, where one is of a kind that no run config takes, such as a date.

    Raises:
        ValueError: one is.
    """
    try:
        label(list(values))
    except TypeError:
        raise ValueError(f"{name} has a date or a time, which no key takes: put it in quotes, or take it out") from None


def parameters(table: Mapping[str, object], source: str, prefix: str = "") -> dict[str, Parameter]:
    """Read `[space]`; `"optim.lr"` and the table `[space.optim]` mean the same.

    Raises:
        ConfigError: naming the parameter.
    """
    found: dict[str, Parameter] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not set(value) & set(KINDS) and _tables(value):
            here = parameters(value, source, f"{key}.")
        elif isinstance(value, Mapping):
            known = {inner: part for inner, part in value.items() if part is not None}
            here = {key: base.build(Parameter, known, f'{source}: space."{key}"')}
        else:
            raise ConfigError(
                f'{source}: space."{key}" = {value!r} is no parameter: say {{ choice = [{_shown(value)}, …] }}'
            )
        if twice := [other for other in here if other in found]:
            raise ConfigError(f'{source}: space."{twice[0]}" is given twice, as a key and in a table: take one out')
        found |= here
    return found


def _shown(value: object) -> str:
    try:
        return label(value)
    except TypeError:  # a date
        return json.dumps(str(value))


def _tables(value: Mapping[str, object]) -> bool:
    return all(isinstance(inner, Mapping) for inner in value.values()) and "when" not in value


def check_space(space: Mapping[str, Parameter], searcher: str) -> None:
    """Check the conditions, and whether the searcher can take the space.

    Raises:
        ValueError: with the repair.
    """
    seen: set[str] = set()
    for key, parameter in space.items():
        for other, wanted in parameter.when.items():
            if other not in space:
                raise ValueError(f'space."{key}": when names {other}, which is no parameter of the space')
            if other not in seen:
                raise ValueError(f'space."{key}": when names {other}, which must stand before it')
            if space[other].values is None:
                raise ValueError(f'space."{key}": when names {other}, whose values are not countable')
            odd = [value for value in wanted if space[other].place(value) is None]
            if odd or not wanted:
                raise ValueError(
                    f'space."{key}" can never be active: {other} is never {odd[0]!r}'
                    if odd
                    else f'space."{key}" can never be active: when names no value of {other}'
                )
        if searcher == "grid" and parameter.values is None:
            raise ValueError(
                f'space."{key}" is {parameter.kind}, which a grid cannot count out: give grid, choice or int'
            )
        seen.add(key)
    for key in space:
        inner = [other for other in space if other.startswith(f"{key}.")]
        if inner:
            raise ValueError(f'space."{key}" contains space."{inner[0]}": one of them must go')
    reachable = {key for point in extremes(space) for key in point}
    if hidden := [key for key in space if key not in reachable]:
        raise ValueError(f'space."{hidden[0]}" can never be active: its conditions exclude each other')


def active(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> Point:
    """Return the point of some values, without the parameters that are not active in it."""
    point: Point = {}
    for key, parameter in space.items():
        if key in values and is_active(parameter, point):
            point[key] = values[key]
    return point


def is_active(parameter: Parameter, point: Point) -> bool:
    """Return whether a parameter is active, given those before it."""
    return all(
        other in point and identity(point[other]) in {identity(value) for value in wanted}
        for other, wanted in parameter.when.items()
    )


def extremes(space: Mapping[str, Parameter]) -> Iterator[Point]:
    """Yield points that between them have both ends, or every choice, of every parameter that can be active."""
    for key, parameter in space.items():
        for value in parameter.ends:
            values = {other: p.first for other, p in space.items()}
            values[key] = value
            _fulfil(space, key, values)
            yield active(space, values)


def _fulfil(space: Mapping[str, Parameter], key: str, values: dict[str, Any]) -> None:
    """Give the parameters on which one depends a value with which it is active."""
    for other, wanted in space[key].when.items():
        values[other] = wanted[0]
        _fulfil(space, other, values)


def grid(space: Mapping[str, Parameter]) -> list[Point]:
    """Return every point of a countable space, each once.

    Raises:
        ConfigError: there are too many.
    """
    points: list[Point] = [{}]
    for key, parameter in space.items():
        assert parameter.values is not None
        longer: list[Point] = []
        for point in points:
            here = is_active(parameter, point)
            if len(longer) + (len(parameter.values) if here else 1) > _LARGEST_GRID:
                raise ConfigError(f"the grid of the space has more than {_LARGEST_GRID:,} points: take values out")
            longer += [{**point, key: value} for value in parameter.values] if here else [point]
        points = longer
    return points
