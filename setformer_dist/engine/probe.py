"""How much frozen features know of classes: a linear classifier and the nearest neighbours, both deterministic.

k = training samples, q = samples scored, c = features, C = classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Of the exponential weights of neighbours (Z. Wu et al. 2018).
_TEMPERATURE = 0.07

_ROUNDS = 200
_AT_ONCE = 1024  # samples scored at a time, so that the k x q similarities never exist together


class ProbeCancelledError(Exception):
    """A probe was asked to give up."""


def linear_top1(
    train: torch.Tensor,
    labels: torch.Tensor,
    scored: torch.Tensor,
    wanted: torch.Tensor,
    decay: float = 1e-3,
    cancelled: Callable[[], bool] = lambda: False,
) -> float:
    """Return the top-1 accuracy of a logistic regression on standardised features, from 0 to 1.

    Fitted in fp64 from zero weights by torch's L-BFGS.

    Args:
        train: (k, c) features.
        labels: (k,) int64.
        scored: (q, c) features.
        wanted: (q,) int64.
        decay: half the factor of the squared weights in the mean loss.
        cancelled: asked in every round.

    Raises:
        ProbeCancelledError: it has answered yes.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp_min(1e-6)
    x, y = (train.double() - mean) / std, (scored.double() - mean) / std
    classes = int(max(labels.max(), wanted.max())) + 1
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ROUNDS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        if cancelled():
            raise ProbeCancelledError
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float((F.linear(y, weight, bias).argmax(1) == wanted).double().mean())


@torch.no_grad()
def neighbours_top1(
    train: torch.Tensor,
    labels: torch.Tensor,
    scored: torch.Tensor,
    wanted: torch.Tensor,
    neighbours: int = 20,
    cancelled: Callable[[], bool] = lambda: False,
) -> float:
    """Return the top-1 accuracy of a vote of the nearest training samples by cosine, from 0 to 1.

    Arguments and errors as of `linear_top1`; each of the `neighbours` votes with weight exp(cosine / 0.07).
    """
    x = F.normalize(train.double(), dim=1)
    classes, right = int(max(labels.max(), wanted.max())) + 1, 0
    for first in range(0, len(scored), _AT_ONCE):
        if cancelled():
            raise ProbeCancelledError
        part = F.normalize(scored[first : first + _AT_ONCE].double(), dim=1)
        near = (part @ x.T).topk(min(neighbours, len(x)), dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[near.indices], (near.values / _TEMPERATURE).exp())
        right += int((votes.argmax(1) == wanted[first : first + _AT_ONCE]).sum())
    return right / len(scored)
