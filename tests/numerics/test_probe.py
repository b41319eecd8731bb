"""The probes against scikit-learn's, and giving them up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from launch.run.features import Features
from launch.run.periodic_probe import _Fit
from setformer_dist.engine.probe import ProbeCancelledError, linear_top1, neighbours_top1


def clouds(count, seed):
    """Return overlapping clouds of five classes in eight dimensions of very different scales."""
    draws = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(5, (count,), generator=draws)
    return (centres[labels] + torch.randn(count, 8, generator=draws)) * 10.0 ** torch.arange(-3, 5), labels


def test_the_linear_probe_is_scikit_learns_logistic_regression():
    (x, labels), (y, wanted) = clouds(400, 0), clouds(1000, 1)
    mean, std = x.double().mean(0), x.double().std(0)
    decay = 1e-3  # of ours: mean loss + decay |w|²; theirs: C * sum of losses + |w|² / 2
    theirs = LogisticRegression(C=1 / (2 * decay * len(x)), max_iter=2000, tol=1e-10)
    theirs.fit(((x - mean) / std).numpy(), labels.numpy())
    score = theirs.score(((y - mean) / std).numpy(), wanted.numpy())
    assert 0.5 < score < 0.99
    assert linear_top1(x, labels, y, wanted, decay) == pytest.approx(score, abs=0.002)


def test_the_vote_of_neighbours_is_that_of_a_plain_loop():
    (x, labels), (y, wanted) = clouds(300, 2), clouds(50, 3)
    right = 0
    for sample, label in zip(y.double().numpy(), wanted.tolist(), strict=True):
        given = x.double().numpy()
        cosine = given @ sample / np.linalg.norm(given, axis=1) / np.linalg.norm(sample)
        votes = np.zeros(5)
        for place in np.argsort(-cosine)[:7]:
            votes[labels[place]] += np.exp(cosine[place] / 0.07)
        right += int(votes.argmax() == label)
    assert neighbours_top1(x, labels, y, wanted, neighbours=7) == right / 50


def test_whatever_fails_in_the_fit_is_told_and_nobody_waits_for_ever():
    x, labels = clouds(20, 0)
    train = Features(x, labels, torch.arange(20))
    fit = _Fit(train, Features(x[:, :3], labels, torch.arange(20)), 5)
    assert isinstance(fit.look(30.0), str)
    fit.cancel()
    fit = _Fit(train, Features(x, labels[:0].new_full((20,), -1).float(), torch.arange(20)), 5)
    assert fit.look(30.0) is not None
    fit.cancel()


@pytest.mark.parametrize("probe", [linear_top1, neighbours_top1])
def test_a_probe_can_be_given_up(probe):
    with pytest.raises(ProbeCancelledError):
        probe(*clouds(20, 0), *clouds(20, 1), cancelled=lambda: True)
