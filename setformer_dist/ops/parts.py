"""One image on several ranks, cut by rows: what the ranks of a group exchange, as a protocol, and its gradients.

The ranks of a group hold equal parts of each image, rank 0 of the group the uppermost rows. They exchange sums, and
rows with their neighbours. The engine implements `Parts` over torch.distributed, tests by threads.

Every rank of a group computes the same loss from the same pooled features, and each differentiates its own copy. The
sum of all copies is what is differentiated, s times the loss for a group of s; so the gradient of a sum is the sum of
the gradients, and a mean over all ranks of the run is the gradient of the mean loss (docs/sequence_parallel.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from setformer_dist.core.errors import ConfigError


class Parts(Protocol):
    """A group of ranks that share each image; all of them call every method in the same order."""

    @property
    def index(self) -> int:
        """Which part this rank holds, counted from the top."""
        ...

    @property
    def count(self) -> int:
        """Parts of an image, s."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over the parts, the same bits on every rank, in a tensor of its own."""
        ...

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Give values to the part below (or above) and return those of the part above (or below), zeros at the edge."""
        ...

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of all parts, (count, *shape), in a tensor of its own."""
        ...


class Rows:
    """The parts as a model sees them: counts what is sent, and lets a recomputation take over the first pass's sums.

    Attributes:
        messages: sums and shifts that this rank took part in.
        bytes: size of what it put into sums; a shift counts apart.
        shifted: bytes of the rows it gave to neighbours.
        gathered: bytes of what it gave to all others.
    """

    def __init__(self, parts: Parts) -> None:
        """Wrap the group's exchange."""
        self._parts = parts
        self._first_pass: list[torch.Tensor] | None = None
        self._again: Iterator[torch.Tensor] | None = None
        self.index, self.count = parts.index, parts.count
        self.messages = self.bytes = self.shifted = self.gathered = 0

    @property
    def is_top(self) -> bool:
        """Whether nothing is above this part."""
        return self.index == 0

    @property
    def is_bottom(self) -> bool:
        """Whether nothing is below it."""
        return self.index == self.count - 1

    def own(self, size: int) -> slice:
        """Return this part's share of so many rows or tokens of the whole.

        Raises:
            ConfigError: the parts would not be equal.
        """
        if size % self.count:
            raise ConfigError(f"{size} rows or tokens cannot be cut into {self.count} equal parts")
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over the parts; not differentiable (`summed` is)."""
        if self._again is not None:
            return next(self._again)
        self.messages += 1
        self.bytes += values.nbytes
        total = self._parts.sum(values)
        if self._first_pass is not None:
            self._first_pass.append(total)
        return total

    def shift(self, values: torch.Tensor, down: bool) -> torch.Tensor:
        """Return the neighbour's values; not differentiable (`from_above` is)."""
        self.messages += 1
        self.shifted += values.nbytes
        return self._parts.shift(values, down)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of all parts, (count, *shape); not differentiable (`gathered` is).

        A recomputation gathers again, as what it gets is as large as the image.
        """
        self.messages += 1
        self.gathered += values.nbytes
        return self._parts.gather(values)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for torch's checkpoint: the first pass keeps its sums, its recomputation takes them over.

        So a recomputation exchanges nothing, unless it gathers. The sums of a block are a few kilobytes for each image.
        """
        kept: list[torch.Tensor] = []
        return self._keeping(kept), self._taking_over(kept)

    @contextlib.contextmanager
    def _keeping(self, kept: list[torch.Tensor]) -> Iterator[None]:
        self._first_pass = kept
        try:
            yield
        finally:
            self._first_pass = None

    @contextlib.contextmanager
    def _taking_over(self, kept: list[torch.Tensor]) -> Iterator[None]:
        self._again = iter(kept)
        try:
            yield
        finally:
            self._again = None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return rows.sum(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rows.sum(grad.contiguous()), None


class _FromAbove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return rows.shift(values, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rows.shift(grad.contiguous(), False), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return rows.gather(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        return ctx.rows.sum(wide.contiguous())[ctx.rows.index].to(grad.dtype), None


def gathered(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the values of all parts, (count, *shape); the gradient is the sum of what the parts have for this one."""
    every: torch.Tensor = _Gathered.apply(values.contiguous(), rows)
    return every


def summed(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the sums over the parts; the gradient is the sum of the parts' gradients."""
    total: torch.Tensor = _Summed.apply(values.contiguous(), rows)
    return total


def from_above(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return what the part above gives, zeros at the top; its gradient goes back to that part."""
    above: torch.Tensor = _FromAbove.apply(values.contiguous(), rows)
    return above


def mean_of_rows(x_bhwc: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the mean over the tokens of the whole image, (B, 1, 1, C), in the dtype of x; one message."""
    wide = x_bhwc.float() if x_bhwc.dtype in (torch.float16, torch.bfloat16) else x_bhwc
    return summed(wide.mean((1, 2), keepdim=True) / rows.count, rows).to(x_bhwc.dtype)
