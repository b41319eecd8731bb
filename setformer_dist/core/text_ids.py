"""Token ids of texts in a batch, and which tokens masked language modelling hides, drawn from keys alone.

Whatever tokenizer made them, ids of special tokens are the same everywhere: padding, the start, the end of a part and
the mask come first, then the tokenizer's other tokens in its own order.

Letters: m = texts, n = tokens of a padded text, K = most hidden tokens of a text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from setformer_dist.core.splitmix import counted, mix64

PAD, CLS, SEP, MASK = range(4)
FIRST = 4  # of the tokens that texts are made of

IGNORED = -100  # the target of a place that hides nothing, as torch's losses have it

# Of the hidden tokens (J. Devlin et al. 2019): so many become MASK, so many any token, and the rest stay.
_MASKED, _RANDOM = 0.8, 0.1

_DRAWS = 3  # of a token: its place in the order of hiding, what becomes of it, and another token


def most_hidden(length: int, ratio: float) -> int:
    """Return K for texts padded to a length."""
    return max(1, round(length * ratio))


def hidden_counts(ids: npt.NDArray[np.int32], ratio: float) -> npt.NDArray[np.int64]:
    """Return how many tokens of each text are hidden, (m,): a share of its tokens, at least one where it has any.

    Args:
        ids: (m, n).
        ratio: the share.
    """
    tokens = (ids >= FIRST).sum(axis=1)
    counts: npt.NDArray[np.int64] = np.minimum(np.maximum(np.rint(tokens * ratio).astype(np.int64), 1), tokens)
    return counts


def hide_tokens(
    ids: npt.NDArray[np.int32], keys: npt.NDArray[np.int64], vocabulary: int, ratio: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hide tokens of texts: a function of each text, its key and the vocabulary, and nothing else.

    Args:
        ids: (m, n).
        keys: (m,), one per text.
        vocabulary: number of ids.
        ratio: share of a text's tokens that is hidden; special tokens never are.

    Returns:
        The texts with what stands in place of the hidden tokens, (m, n); where these are, (m, K), ascending, then
        zeros; and what they were, (m, K), then `IGNORED`.
    """
    n = ids.shape[1]
    most = most_hidden(n, ratio)
    words = mix64(counted(keys.view(np.uint64)[:, None], np.arange(_DRAWS * n, dtype=np.int64)))
    # By token, so that padding changes nothing.
    order, how, other = np.moveaxis(words.reshape(-1, n, _DRAWS), 2, 0)
    order = order >> np.uint64(1)
    # Words without their last bit are below this, so special tokens come last.
    order = np.where(ids >= FIRST, order, np.uint64(2**63))
    counts = hidden_counts(ids, ratio)
    rank = order.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    hidden = rank < counts[:, None]

    share = (how >> np.uint64(11)).astype(np.float64) / 2**53
    drawn = FIRST + (other % np.uint64(vocabulary - FIRST)).astype(np.int32)
    instead = np.where(share < _MASKED, np.int32(MASK), np.where(share < _MASKED + _RANDOM, drawn, ids))
    shown = np.where(hidden, instead, ids).astype(np.int32)

    places = np.argsort(~hidden, axis=1, kind="stable")[:, :most]
    valid = np.arange(most) < counts[:, None]
    targets = np.where(valid, np.take_along_axis(ids, places, axis=1), IGNORED).astype(np.int64)
    return shown, np.where(valid, places, 0), targets
