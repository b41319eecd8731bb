"""Which tokens are hidden follows from a text and its key alone; special tokens never are."""

from __future__ import annotations

import numpy as np
import pytest

from setformer_dist.core.text_ids import CLS, FIRST, IGNORED, MASK, PAD, SEP, hidden_counts, hide_tokens, most_hidden

V = 200


def texts(count: int, length: int = 40) -> np.ndarray:
    """Texts of all lengths from none to the whole."""
    ids = np.random.default_rng(0).integers(FIRST, V, (count, length)).astype(np.int32)
    ids[:, 0] = CLS
    for row in range(count):
        end = 1 + row % (length - 1)
        ids[row, end], ids[row, end + 1 :] = SEP, PAD
    return ids


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.99])
def test_what_is_hidden(ratio: float) -> None:
    ids = texts(400)
    shown, places, targets = hide_tokens(ids, np.arange(400) * 7919, V, ratio)
    asked = targets != IGNORED
    assert places.shape == targets.shape == (400, most_hidden(40, ratio))
    np.testing.assert_array_equal(asked.sum(axis=1), hidden_counts(ids, ratio))
    np.testing.assert_array_equal(np.take_along_axis(ids, places, axis=1)[asked], targets[asked])
    assert (targets[asked] >= FIRST).all()
    hidden = np.zeros(ids.shape, bool)
    for row in range(400):
        hidden[row, places[row][asked[row]]] = True
    assert hidden.sum() == asked.sum()  # no place is asked for twice
    np.testing.assert_array_equal(shown[~hidden], ids[~hidden])
    counts = (ids >= FIRST).sum(axis=1)
    assert (hidden_counts(ids, ratio)[counts > 0] >= 1).all()
    assert not hidden_counts(ids, ratio)[counts == 0].any()


def test_what_stands_in_place_of_hidden_tokens() -> None:
    ids = np.full((4000, 20), 50, np.int32)
    shown, places, _ = hide_tokens(ids, np.arange(4000), V, 0.15)
    found = np.take_along_axis(shown, places, axis=1)
    assert (found == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (found == 50).mean() == pytest.approx(0.1 + 0.1 / (V - FIRST), abs=0.01)
    others = found[(found != MASK) & (found != 50)]
    assert others.min() == FIRST
    assert others.max() == V - 1
    # Every place is hidden as often.
    assert np.bincount(places.ravel(), minlength=20) == pytest.approx(np.full(20, 600), abs=120)


def test_neither_padding_nor_other_texts_change_what_is_hidden() -> None:
    ids, keys = texts(64), np.arange(64) * 31 + 5
    shown, places, targets = hide_tokens(ids, keys, V, 0.15)
    padded = np.pad(ids, ((0, 0), (0, 24)))
    for row in range(64):
        alone, where, what = hide_tokens(padded[row : row + 1], keys[row : row + 1], V, 0.15)
        kept = most_hidden(40, 0.15)
        np.testing.assert_array_equal(alone[0, :40], shown[row])
        np.testing.assert_array_equal(what[0, :kept], targets[row])
        np.testing.assert_array_equal(where[0, :kept], places[row])
        assert (what[0, kept:] == IGNORED).all()


def test_another_key_hides_others() -> None:
    ids = np.full((1, 100), 9, np.int32)
    first, again, other = (hide_tokens(ids, np.array([key]), V, 0.15)[1] for key in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
