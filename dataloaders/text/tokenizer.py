"""A tokenizer in the format of Hugging Face's library (tokenizer.json), and the ids that batches have.

The file is data: it names normalisers and splitters that the library has, and no code. Batches have ids of their own
(`setformer_dist.core.text_ids`): special tokens first, then all other tokens in the tokenizer's order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dataloaders.sources.files import LARGEST_TABLE, read_whole
from dataloaders.tokens import TOKENIZER_NAME
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.text_ids import CLS, FIRST, MASK, SEP

# Names that tokenizers have for special tokens: those of BERT's, and those of RoBERTa's.
_NAMES = {CLS: ("[CLS]", "<s>"), SEP: ("[SEP]", "</s>"), MASK: ("[MASK]", "<mask>")}
_PADDING = ("[PAD]", "<pad>")
_UNKNOWN = ("[UNK]", "<unk>")

_MOST = 65_535 - FIRST  # as ids are stored in two bytes
_FEWEST = 64
_OF_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)  # no faults of a tokenizer
_LARGEST_ID = 1 << 24  # bounds memory


class TextTokenizer:
    """Makes ids of texts, and texts of ids.

    Attributes:
        data: the file's bytes.
        vocabulary: number of ids in batches, padding included.
    """

    def __init__(self, data: bytes, place: str) -> None:
        """Read a tokenizer.

        Args:
            data: of tokenizer.json.
            place: where it lies, for messages.

        Raises:
            DataError: it is no tokenizer, or lacks the mask, the start or the end of a text, or has too many tokens.
        """
        self.data, self._place = data, place
        self._tokenizer = _read(data, place)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that holds "[MASK]" means these six characters
        special = {id_here: self._special(names, place) for id_here, names in _NAMES.items()}
        there = self._tokenizer.get_vocab(with_added_tokens=True)
        left_out = {*special.values(), *(there[name] for name in _PADDING if name in there)}
        others = sorted(set(there.values()) - left_out)
        if not others or len(others) > _MOST:
            raise DataError(f"{place} has {len(others):,} tokens: between 1 and {_MOST:,} can be packed")
        if max(others) > _LARGEST_ID:
            raise DataError(f"{place} has token {max(others):,}: ids up to {_LARGEST_ID:,} can be read")
        self._ids = np.full(max(there.values()) + 1, -1, np.int64)
        self._ids[others] = np.arange(FIRST, FIRST + len(others))
        self._theirs = np.array([0, *(special[i] for i in sorted(special)), *others], np.int64)
        self.vocabulary = FIRST + len(others)
        unknown = [int(self._ids[there[name]]) for name in _UNKNOWN if name in there]
        self._unknown = unknown[0] if unknown else -1

    def _special(self, names: Sequence[str], place: str) -> int:
        found = (self._tokenizer.token_to_id(name) for name in names)
        for token in found:
            if token is not None:
                return int(token)
        raise DataError(
            f"{place} has no token {' or '.join(names)}: only tokenizers of masked language models, such as BERT's, "
            "have the special tokens that are needed; train one with `setformer text tokenizer`"
        )

    @property
    def sha256(self) -> str:
        """Identity of the tokenizer."""
        return hashlib.sha256(self.data).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Return the ids of each text as batches have them, without special tokens."""
        with _faults_as("{place} cannot encode a text ({said}): repair it, or take another tokenizer", self._place):
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._of_text(self._ids[np.array(one.ids, np.int64)]) for one in found]

    def _of_text(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return ids without special ones, which models of whole words find in a text that has their names."""
        ids = np.where(ids < 0, self._unknown, ids)
        return ids[ids >= 0]

    def unknown(self, ids: npt.NDArray[np.int64]) -> int:
        """Return how many ids stand for what the tokenizer does not know."""
        return int((ids == self._unknown).sum())

    def decode(self, ids: npt.NDArray[np.int64]) -> str:
        """Return the text of ids, special tokens by their names."""
        theirs = self._theirs[ids[ids > 0]].tolist()
        return str(self._tokenizer.decode(theirs, skip_special_tokens=False))

    def token(self, number: int) -> str:
        """Return the token of an id, as the tokenizer writes it."""
        return str(self._tokenizer.id_to_token(int(self._theirs[number])))


@contextlib.contextmanager
def _faults_as(message: str, place: str) -> Iterator[None]:
    """Raise a DataError with a message for any error of the library within: its panics are no Exceptions."""
    try:
        with _silent():
            yield
    except BaseException as error:
        if isinstance(error, _OF_OURS):
            raise
        raise DataError(message.format(place=place, said=" ".join(str(error).split())[:120])) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep from the terminal what the library's panics write to file descriptor 2, beside what they raise."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read(data: bytes, place: str) -> Tokenizer:
    message = (
        "{place} is not a tokenizer.json that can be read ({said}): name one that `setformer text tokenizer` or "
        "Hugging Face's libraries wrote"
    )
    with _faults_as(message, place):
        return Tokenizer.from_str(data.decode())


def read_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer from a file, or from a folder that holds tokenizer.json.

    Raises:
        DataError: there is none, or it is none that can be used.
    """
    path = path / TOKENIZER_NAME if path.is_dir() else path
    try:
        return TextTokenizer(read_whole(path, LARGEST_TABLE), str(path))
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read ({error.strerror}): name a tokenizer.json") from None


def train_tokenizer(texts: Iterator[str], size: int, lowercase: bool) -> TextTokenizer:
    """Return a tokenizer with the most frequent parts of words (WordPiece, as BERT's).

    The library breaks ties in no fixed order, so two trainings give two tokenizers: keep the file.

    Args:
        texts: what it is trained on.
        size: tokens, special ones included.
        lowercase: make all letters small, and take accents away.

    Raises:
        ConfigError: the size is impossible.
        DataError: there is no text.
    """
    if not _FEWEST <= size <= _MOST:
        raise ConfigError(f"--vocabulary {size} must be between {_FEWEST} and {_MOST:,}")
    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNKNOWN[0]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [_PADDING[0], _UNKNOWN[0], *(names[0] for names in _NAMES.values())]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= len(special):
        raise DataError("the texts have no word: there is nothing to make a tokenizer of")
    return TextTokenizer(tokenizer.to_str().encode(), "the new tokenizer")
