"""ListOps (Nangia & Bowman 2018) at the sizes of Long Range Arena: nested MIN, MAX, MED and SM of digits.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

A node above the deepest level is an operator with probability 1/4, else a digit; an operator takes 2 to 10 arguments.
Trees of more than 500 and fewer than 2000 tokens are kept. Many trees are made at once, level by level: every node
draws from a key that is a function of (seed, candidate, path from the root), so a tree depends on nothing else.

    level 1 … 10, top down     operators, digits, numbers of arguments
    bottom up                  sizes and values
    top down                   place of each node's first token
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from dataloaders.lra.generating import Chunk, MakeChunk
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.seeding import Purpose, sample_keys

OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE = 14  # raw token values: 0-9 digits, 10-13 operators in the order of OPERATORS, 14 the closing bracket
TOKENS = 15
CLASSES = tuple(str(digit) for digit in range(10))

# Trees of one chunk: about 113 nodes each, so some 60 MiB while they are made.
CHUNK = 8192


@dataclass(frozen=True)
class ListOpsConfig:
    """The published parameters (google-research/long-range-arena, data/listops.py).

    Attributes:
        max_depth: deepest level a node can be on; the root is on level 1.
        max_args: most arguments of an operator; the least is 2.
        operator_share: probability that a node above the deepest level is an operator.
        longer_than: trees of so many tokens or fewer are dropped.
        shorter_than: trees of so many tokens or more are dropped.

    Raises:
        ConfigError: no tree can satisfy the parameters.
    """

    max_depth: int = 10
    max_args: int = 10
    operator_share: float = 0.25
    longer_than: int = 500
    shorter_than: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_args < 2 or not 0 < self.operator_share <= 1:
            raise ConfigError(
                f"ListOps with max_depth {self.max_depth}, max_args {self.max_args} and operator_share "
                f"{self.operator_share} has no operators: take at least 2, 2, and a share in (0, 1]"
            )
        if self.shorter_than - self.longer_than < 2 or self.shorter_than < 5:
            raise ConfigError(
                f"ListOps keeps trees longer than {self.longer_than} and shorter than {self.shorter_than} tokens: "
                "leave room for at least one length of 4 or more"
            )

    def as_json(self) -> dict[str, object]:
        """Return the parameters as a JSON-able table."""
        return asdict(self)


def chunk_maker(config: ListOpsConfig, seed: int) -> MakeChunk:
    """Return the function that makes chunks of candidates of this seed."""
    return functools.partial(_make, config, seed)


def _make(config: ListOpsConfig, seed: int, first: int, count: int) -> Chunk:
    candidates = np.arange(first, first + count, dtype=np.int64)
    levels = _draw(config, seed, candidates)
    sizes, values = _evaluate(levels)
    kept = (sizes[0] > config.longer_than) & (sizes[0] < config.shorter_than)
    tokens = _write(levels, sizes, kept)
    return Chunk(tokens, sizes[0][kept], values[0][kept], candidates[kept])


@dataclass(frozen=True)
class _Level:
    """The nodes of one level of all trees, in order of tree and place.

    Attributes:
        operator: (k,) 0-3, or -1 for a digit.
        digit: (k,) 0-9, of no meaning for an operator.
        arity: (k,) arguments, 0 for a digit; those of the level's operators follow one another on the next level.
    """

    operator: npt.NDArray[np.int64]
    digit: npt.NDArray[np.int64]
    arity: npt.NDArray[np.int64]


def _draw(config: ListOpsConfig, seed: int, candidates: npt.NDArray[np.int64]) -> list[_Level]:
    """Draw the trees top down, each level's nodes at once."""
    levels: list[_Level] = []
    ids = candidates.astype(np.uint64)
    for depth in range(1, config.max_depth + 1):
        words = sample_keys(Purpose.LISTOPS, seed, depth, ids).view(np.uint64)
        # Different bits of a word decide different things: 24 the kind, 20 the number, 2 the operator.
        is_operator = (words >> np.uint64(40)) < np.uint64(round(config.operator_share * 2**24))
        if depth == config.max_depth:
            is_operator[:] = False
        number = ((words >> np.uint64(20)) & np.uint64(0xFFFFF)).astype(np.int64)
        arity = np.where(is_operator, 2 + (number * (config.max_args - 1) >> 20), 0)
        operator = np.where(is_operator, (words & np.uint64(3)).astype(np.int64), -1)
        levels.append(_Level(operator, number * 10 >> 20, arity))
        parents = np.repeat(words, arity)
        ids = parents + _places(arity).astype(np.uint64)
    return levels


def _places(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 … c-1 for each c of `counts`, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _evaluate(levels: list[_Level]) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]:
    """Return the tokens and the value of every node, level by level."""
    sizes, values = [np.ones(len(levels[-1].digit), np.int64)], [levels[-1].digit]
    for level in reversed(levels[:-1]):
        size, value = np.ones(len(level.digit), np.int64), level.digit.copy()
        inner = level.arity > 0
        if inner.any():
            arity = level.arity[inner]
            starts = np.cumsum(arity) - arity
            size[inner] = 2 + np.add.reduceat(sizes[0], starts)
            value[inner] = _apply(level.operator[inner], values[0], starts, arity)
        sizes.insert(0, size)
        values.insert(0, value)
    return sizes, values


def _apply(
    operator: npt.NDArray[np.int64],
    arguments: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    arity: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the value of each operator; its `arity` arguments begin at `starts`."""
    node = np.repeat(np.arange(len(arity)), arity)
    ordered = arguments[np.lexsort((arguments, node))]
    upper, lower = ordered[starts + arity // 2], ordered[starts + (arity - 1) // 2]
    results = (
        ordered[starts],  # MIN
        ordered[starts + arity - 1],  # MAX
        (upper + lower) // 2,  # MED: the integer part of the median
        np.add.reduceat(arguments, starts) % 10,  # SM
    )
    return np.choose(operator, results)


def _write(
    levels: list[_Level], sizes: list[npt.NDArray[np.int64]], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Return the tokens of the kept trees, flat."""
    total = np.where(kept, sizes[0], 0)
    tokens = np.empty(int(total.sum()), np.uint8)
    place = np.where(kept, np.cumsum(total) - total, -1)  # of each node's first token; -1 in trees that are dropped
    for level, size, below in zip(levels, sizes, [*sizes[1:], np.empty(0, np.int64)], strict=True):
        there = place >= 0
        inner = there & (level.arity > 0)
        leaf = there & (level.arity == 0)
        tokens[place[leaf]] = level.digit[leaf]
        tokens[place[inner]] = 10 + level.operator[inner]
        tokens[place[inner] + size[inner] - 1] = CLOSE
        parent = np.repeat(place, level.arity)
        ends = np.cumsum(below)
        arity = level.arity[level.arity > 0]
        firsts = np.cumsum(arity) - arity
        before = (ends - below) - np.repeat((ends - below)[firsts], arity)  # tokens of the elder siblings
        place = np.where(parent >= 0, parent + 1 + before, -1)
    return tokens


def to_text(tokens: npt.NDArray[np.integer]) -> str:
    """Return raw tokens as the expression they stand for."""
    words = [*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]"]
    return " ".join(words[int(token)] for token in tokens)


def from_text(text: str) -> npt.NDArray[np.uint8]:
    """Return the raw tokens of an expression; round brackets, as in the published files, are dropped.

    Raises:
        ConfigError: a word is no digit, operator or closing bracket.
    """
    known = {**{str(d): d for d in range(10)}, **{f"[{n}": 10 + i for i, n in enumerate(OPERATORS)}, "]": CLOSE}
    words = text.replace("(", " ").replace(")", " ").split()
    unknown = next((word for word in words if word not in known), None)
    if unknown is not None:
        raise ConfigError(f"ListOps has no token {unknown!r}: it has {', '.join(known)}")
    return np.array([known[word] for word in words], np.uint8)
