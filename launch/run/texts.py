"""What a trained model says of texts: classes, a number, or what stands in place of [MASK]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloaders.config import TokenConfig
from dataloaders.text.samples import Ids, cut_to, sample_of
from dataloaders.text.tokenizer import TextTokenizer, read_tokenizer
from dataloaders.tokens import TOKENIZER_NAME
from launch.run.initial_weights import tokenizer_of
from launch.run.objective import encoder_of
from launch.run.trained import Trained, is_of_pairs
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.text_ids import MASK, most_hidden
from setformer_dist.models.text import MaskedLanguageModel, TextEncoder
from setformer_dist.tasks.regression import Regression

_SHORTEST = 4  # tokens of a text and its ends

HOLE = "[MASK]"  # in a text, where a token is hidden


@dataclass(frozen=True)
class TextPrediction:
    """What a model says of one text, or of a pair.

    Attributes:
        texts: as they were given.
        classes: names of the most likely classes, best first.
        probabilities: of them.
        value: of a regression.
        fillings: for each hidden token the most likely ones, each with its probability.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    value: float | None = None
    fillings: tuple[tuple[tuple[str, float], ...], ...] = ()


def tokenizer_for(trained: Trained, given: Path | None) -> TextTokenizer:
    """Return the tokenizer of a model's texts.

    Args:
        trained: of a run whose folder holds it, or an exported model.
        given: the file, or a folder that holds it; None searches beside the model.

    Raises:
        ConfigError: the model is of no texts, its tokenizer is not found, or the given one is another.
        DataError: it cannot be read.
    """
    wanted = tokenizer_of(trained.inputs)
    if not isinstance(trained.config.data, TokenConfig) or not wanted:
        raise ConfigError(f"{trained.place} is not a model of texts: use `setformer predict` for models of images")
    places = [trained.place, *trained.place.absolute().parents[:2]] if given is None else [given]
    found = [place for place in places if given is not None or (place / TOKENIZER_NAME).is_file()]
    for place in found:
        tokenizer = read_tokenizer(place)
        if tokenizer.sha256 == wanted:
            return tokenizer
    what = f"{found[0]} is another tokenizer" if found else f"no {TOKENIZER_NAME} lies beside it"
    raise ConfigError(
        f"{trained.place} was trained on texts of tokenizer {wanted[:12]}, and {what}: name its data or "
        "its run's folder with --tokenizer"
    )


def predict_texts(
    trained: Trained, tokenizer: TextTokenizer, samples: Iterable[tuple[str, ...]], top: int
) -> Iterator[TextPrediction]:
    """Yield what a model says of texts, or of pairs of them, one after the other.

    Raises:
        DataError: a text is empty, or is no pair where the model judges pairs or the reverse, or has no hidden token
            where the model fills them, or too many.
    """
    given = list(samples)
    for number, texts in enumerate(given, 1):  # before the first is computed
        if not all(text.strip() for text in texts):
            raise DataError(f"text {number} is empty: give it some words")
        if not isinstance(trained.model, MaskedLanguageModel) and (len(texts) == 2) != is_of_pairs(trained):
            raise DataError(
                f"text {number} is alone, and this model judges pairs: give two texts (--pairs, a tab in files)"
                if is_of_pairs(trained)
                else f"text {number} is a pair, and this model judges single texts: leave the second out"
            )
        if isinstance(trained.model, MaskedLanguageModel) and not any(HOLE in text for text in texts):
            raise DataError(f"this model names hidden tokens, and text {number} has none: write {HOLE} for one")
    for texts in given:
        if isinstance(trained.model, MaskedLanguageModel):
            yield _filled(trained, trained.model, tokenizer, texts, top)
        else:
            yield _judged(trained, tokenizer, texts, top)


def _length(trained: Trained) -> int:
    """Return the most tokens of a text: of the data, and as the model takes them."""
    encoder, length = encoder_of(trained.model), trained.inputs.get("length")
    most = getattr(getattr(encoder, "config", None), "length", None)
    if not isinstance(length, int) or not isinstance(most, int) or length < _SHORTEST:
        raise ConfigError(f"{trained.place} does not say how long its texts are: train it again")
    return min(length, most)


@torch.no_grad()
def _judged(trained: Trained, tokenizer: TextTokenizer, texts: tuple[str, ...], top: int) -> TextPrediction:
    length = _length(trained)
    ids = sample_of(*cut_to(tokenizer.encode(texts), length))
    if not isinstance(trained.model, TextEncoder):  # which takes texts of any length
        ids = np.pad(ids, (0, length - len(ids)))
    outputs = trained.model(torch.from_numpy(ids.astype(np.int32)).unsqueeze(0))
    if isinstance(trained.task, Regression):
        return TextPrediction(texts, value=float(outputs[0, 0]))
    names = trained.task.outputs
    best = trained.task.confidences(outputs)[0].topk(min(top, len(names)))
    return TextPrediction(texts, tuple(names[i] for i in best.indices.tolist()), tuple(best.values.tolist()))


@torch.no_grad()
def _filled(
    trained: Trained, model: MaskedLanguageModel, tokenizer: TextTokenizer, texts: Sequence[str], top: int
) -> TextPrediction:
    length = _length(trained)
    whole = [_with_holes(tokenizer, text) for text in texts]
    ids = sample_of(*cut_to(whole, length))
    (holes,) = np.nonzero(ids == MASK)
    if lost := sum(int((part == MASK).sum()) for part in whole) - len(holes):
        raise DataError(
            f"{texts[0][:40]!r} … is longer than the {length} tokens that the model sees, which cuts off {lost} of its "
            f"{HOLE}: shorten it"
        )
    # The model answers for a share of a text's places, so a text with many holes is padded.
    while most_hidden(len(ids), model.eval_ratio) < len(holes):
        if len(ids) == length:
            most = most_hidden(length, model.eval_ratio)
            raise DataError(f"a text has {len(holes)} hidden tokens, and this model names up to {most}: hide fewer")
        ids = np.pad(ids, (0, min(len(ids), length - len(ids))))
    inputs = torch.zeros(1, 2, len(ids), dtype=torch.int32)
    inputs[0, 0] = torch.from_numpy(ids.astype(np.int32))
    inputs[0, 1, : len(holes)] = torch.from_numpy(holes.astype(np.int32))
    best = model(inputs)[0, : len(holes)].float().softmax(dim=1).topk(min(top, tokenizer.vocabulary))
    fillings = tuple(
        tuple((tokenizer.token(number), share) for number, share in zip(numbers, shares, strict=True))
        for numbers, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return TextPrediction(tuple(texts), fillings=fillings)


def _with_holes(tokenizer: TextTokenizer, text: str) -> Ids:
    first, *others = tokenizer.encode(text.split(HOLE))
    return np.concatenate([first, *(part for other in others for part in ([MASK], other))]).astype(np.int64)
