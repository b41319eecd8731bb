"""Texts of a split with what is true of each and what a trained model says: a class, a number, or hidden tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import TokenConfig
from dataloaders.source import spread_evenly
from dataloaders.text.tokenizer import TextTokenizer
from dataloaders.tokens import TOKENIZER_NAME, TokenSplit, batch_length
from launch.run.inputs import Split
from launch.run.trained import Trained, data_for
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.text_ids import CLS, IGNORED, MASK, PAD, SEP
from setformer_dist.models.text import MaskedLanguageModel
from setformer_dist.report.html import ScoredText
from setformer_dist.tasks.regression import Regression

_LONGEST = 600  # characters of a text on a page


@torch.no_grad()
def scored_texts(trained: Trained, split: Split, count: int = 16) -> list[ScoredText]:
    """Return texts spread evenly over a split, scored as in evaluation; none if the data are no texts.

    Args:
        trained: the model.
        split: where the texts come from.
        count: most texts that are returned.
    """
    data = data_for(trained, split)
    if not (isinstance(data, TokenConfig) and isinstance(split, TokenSplit)) or split.tokenizer is None:
        return []
    tokenizer = TextTokenizer(split.tokenizer, str(split.folder / TOKENIZER_NAME))
    samples = np.array(spread_evenly(split.num_samples, count), np.int64)
    ids = split.batch(samples, batch_length(split, data))
    ones, numbers = torch.ones(len(samples)), split.numbers(samples)
    batch = MicroBatch(ids, split.labels(samples), ones, torch.from_numpy(samples), numbers=numbers)
    inputs, targets = trained.prepare()(batch, train=False)
    outputs = trained.model(inputs).float().cpu()
    inputs, targets = inputs.cpu(), targets.cpu()
    if isinstance(trained.model, MaskedLanguageModel):
        return [
            _named(tokenizer, given.numpy(), true.numpy(), found.numpy())
            for given, true, found in zip(inputs, targets, outputs.argmax(dim=2), strict=True)
        ]
    texts = [_readable(tokenizer, row) for row in ids.numpy()]
    if isinstance(trained.task, Regression):
        pairs = zip(texts, targets.tolist(), outputs[:, 0].tolist(), strict=True)
        return [ScoredText(text, f"{true:.3g}", f"{found:.3g}") for text, true, found in pairs]
    if not trained.task.exclusive:
        return []
    names, best = trained.task.outputs, trained.task.confidences(outputs).max(dim=1)
    return [
        ScoredText(text, names[true], f"{names[found]} {share:.0%}", true == found)
        for text, true, found, share in zip(
            texts, batch.labels.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _named(
    tokenizer: TextTokenizer, given: npt.NDArray[np.int32], true: npt.NDArray[np.int64], found: npt.NDArray[np.int64]
) -> ScoredText:
    """Return a text with [MASK] for every hidden token; what these were, and what the model names."""
    ids, hidden = given[0].copy(), true != IGNORED
    ids[given[1][: len(true)][hidden]] = MASK  # also where another token, or the same, stands in its place
    words = [", ".join(tokenizer.token(token) for token in tokens[hidden].tolist()) for tokens in (true, found)]
    return ScoredText(_readable(tokenizer, ids), words[0], words[1], bool((true == found)[hidden].all()))


def _readable(tokenizer: TextTokenizer, ids: npt.NDArray[np.int32]) -> str:
    """Return the text of ids without the tokens at its ends; a long one is cut."""
    kept = ids[(ids != PAD) & (ids != CLS)]
    text = tokenizer.decode((kept[:-1] if kept[-1] == SEP else kept).astype(np.int64))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
