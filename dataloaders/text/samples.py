"""The tokens of a sample: start, a text, its end, and of a pair the second text and its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dataloaders.tokens import TokenSample
from setformer_dist.core.text_ids import CLS, SEP

Ids = npt.NDArray[np.int64]


def sample_of(*texts: Ids) -> Ids:
    """Return the ids of a sample of one text or two."""
    pieces = [np.array([CLS]), *(piece for text in texts for piece in (text, np.array([SEP])))]
    return np.concatenate(pieces).astype(np.int64)


def cut_to(texts: Sequence[Ids], length: int) -> tuple[Ids, ...]:
    """Return texts whose sample has at most `length` tokens: the longer one of a pair loses its end first."""
    room = length - 1 - len(texts)
    if len(texts) == 1:
        return (texts[0][:room],)
    # Each may fill half of the room, and what the other leaves of it.
    first = min(len(texts[0]), max(room - len(texts[1]), room - room // 2))
    return texts[0][:first], texts[1][: room - first]


def packed(*texts: Ids) -> TokenSample:
    """Return a sample as it is packed: on disk a token is what it is in a batch, less one (`dataloaders.tokens`)."""
    return TokenSample(((sample_of(*texts) - 1).astype(np.uint16),))
