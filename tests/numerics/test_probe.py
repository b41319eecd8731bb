"""The probes against scikit-learn's, and giving them up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

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


@pytest.mark.parametrize("probe", [linear_top1, neighbours_top1])
def test_a_probe_can_be_given_up(probe):
    with pytest.raises(ProbeCancelledError):
        probe(*clouds(20, 0), *clouds(20, 1), cancelled=lambda: True)
