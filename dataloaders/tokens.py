"""Packed token sequences: a split on disk, its samples by number, and the streams that training reads.

    train/
      part-00000.safetensors   tokens (flat), lengths (k, s), labels (k,)   of at most PART_TOKENS tokens
      part-00001.safetensors
      tokenizer.json           of texts: what made the tokens
      tokens.json              written last: classes, vocabulary, length, parts with sha256, fingerprint

A sample is s sequences (one, or two that are compared). On disk a token is its raw value; in a batch it is that plus
one, so that 0 is padding and nothing else, and models derive their masks from it. Every file is compared with its
sha256 when a split is opened; nothing here unpickles.

The order of samples and the cursor are those of the image streams (`dataloaders.order.order`). Reading is a copy from
memory, so it happens in the training process.

Letters: m = micro batch, s = sequences of a sample, n = length to which they are padded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch

from dataloaders.config import TokenConfig
from dataloaders.order.order import Cut, FullOrder, SetPlan, cursor_at, step_of_cursor
from dataloaders.reading.streams import evaluation_requests, train_requests
from dataloaders.sources.files import LARGEST_TABLE, is_plain_name, open_regular, parse_json, read_whole
from dataloaders.sources.index import durable_write, fingerprint_of
from dataloaders.storage.whole_folder import check_destination, commit_folder, work_folder
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.transfer import on_device

TOKENS_FORMAT = 1
TOKENS_NAME = "tokens.json"
TOKENIZER_NAME = "tokenizer.json"

# Facts that older files do not have, and what they mean then.
_LATER = {"tokenizer": "", "numbers": False, "pairs": False}

# A part is written when it holds so many tokens: bounds the memory of packing.
PART_TOKENS = 1 << 26

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TokenSample:
    """One sample to be packed: s arrays of raw token values, and its label, or its number for regression."""

    sequences: tuple[Tokens, ...]
    label: int = 0
    number: float | None = None


@dataclass(frozen=True)
class TokenFacts:
    """What all samples of a split share.

    Attributes:
        task: what the data are, for people and messages.
        classes: class names; a label is a position in it.
        vocabulary: number of token ids, padding included: largest raw value + 2.
        length: most tokens of a sequence; longer ones are cut when packed.
        sequences: s.
        full: every sequence has exactly `length` tokens, so that there is no padding.
        tokenizer: sha256 of the tokenizer that lies beside texts; "" for tokens that are no parts of texts.
        numbers: samples have numbers, for regression.
        pairs: samples are pairs of texts, one after the other in one sequence.
    """

    task: str
    classes: tuple[str, ...]
    vocabulary: int
    length: int
    sequences: int = 1
    full: bool = False
    tokenizer: str = ""
    numbers: bool = False
    pairs: bool = False

    @property
    def labelled(self) -> bool:
        """Whether samples have classes."""
        return bool(self.classes)


# ------------------------------------------------------------------------------------------------------- writing


def write_token_split(
    destination: Path,
    facts: TokenFacts,
    samples: Iterable[TokenSample],
    options: Callable[[], dict[str, object]] = dict,
    force: bool = False,
    part_tokens: int = PART_TOKENS,
    tokenizer: bytes = b"",
) -> TokenSplit:
    """Pack a split; it appears whole or not at all.

    Args:
        destination: its folder; new or empty, unless `force`.
        facts: what the samples share.
        samples: in their final order; read once.
        options: how the samples were made, JSON-able, for people; asked when all of them have been read.
        force: replace a packed split.
        part_tokens: tokens at which a part is written.
        tokenizer: of texts, the file that made the tokens.

    Raises:
        DataError: the destination is in use or cannot be written, there is no sample, or one does not fit the facts.
    """
    destination = destination.absolute()
    check_destination(destination, force, _is_ours)
    with work_folder(destination) as work:
        try:
            parts = list(_write_parts(work, facts, samples, part_tokens))
            if not parts:
                raise DataError(f"there is no sample for {destination}: nothing was packed")
            if tokenizer:
                durable_write(work / TOKENIZER_NAME, tokenizer)
            table: dict[str, Any] = {
                "format": TOKENS_FORMAT,
                **_written(facts),
                "samples": sum(part["samples"] for part in parts),
                "parts": parts,
                "options": options(),
            }
            table["fingerprint"] = fingerprint_of(table)
            durable_write(work / TOKENS_NAME, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
            commit_folder(work, destination)
        except OSError as error:  # a full disk, above all
            raise DataError(f"packing into {destination} failed, nothing was kept: {error}") from None
    return open_token_split(destination)


def _written(facts: TokenFacts) -> dict[str, object]:
    """Return the facts as tokens.json has them: those of texts only for texts, as fingerprints are older than they."""
    later = {name: value for name, value in vars(facts).items() if name in _LATER and value}
    return {**{k: v for k, v in vars(facts).items() if k not in _LATER}, "classes": list(facts.classes), **later}


def _is_ours(name: str) -> bool:
    return name in (TOKENS_NAME, TOKENIZER_NAME) or re.fullmatch(r"part-\d{5}\.safetensors", name) is not None


def _write_parts(
    work: Path, facts: TokenFacts, samples: Iterable[TokenSample], part_tokens: int
) -> Iterator[dict[str, object]]:
    """Write part after part; yield what the index says of each."""
    held: list[TokenSample] = []
    tokens = number = 0
    for sample in samples:
        fitted = _fitted(sample, facts)
        held.append(fitted)
        tokens += sum(map(len, fitted.sequences))
        if tokens >= part_tokens:
            yield _write_part(work, number, facts, held)
            held, tokens, number = [], 0, number + 1
    if held:
        yield _write_part(work, number, facts, held)


def _fitted(sample: TokenSample, facts: TokenFacts) -> TokenSample:
    """Return the sample with its sequences cut; refuse one that does not fit."""
    cut = tuple(tokens[: facts.length] for tokens in sample.sequences)
    sound = (
        len(cut) == facts.sequences
        and all(len(tokens) and int(tokens.max()) + 2 <= facts.vocabulary for tokens in cut)
        and (not facts.full or all(len(tokens) == facts.length for tokens in cut))
        and 0 <= sample.label < max(1, len(facts.classes))
        and (sample.number is not None) == facts.numbers
    )
    if not sound:
        wanted = f"of {facts.length} tokens" if facts.full else "of at least one token"
        raise DataError(
            f"a sample of label {sample.label} with sequences of {[len(t) for t in sample.sequences]} tokens does not "
            f"fit {facts.task}: {facts.sequences} sequence(s) {wanted}, "
            f"raw tokens below {facts.vocabulary - 1}, labels below {len(facts.classes)}"
        )
    return dataclasses.replace(sample, sequences=cut)


def _write_part(work: Path, number: int, facts: TokenFacts, samples: list[TokenSample]) -> dict[str, object]:
    name = f"part-{number:05d}.safetensors"
    dtype = np.uint8 if facts.vocabulary <= 257 else np.uint16
    data = safetensors.numpy.save(
        {
            "tokens": np.concatenate([tokens for s in samples for tokens in s.sequences]).astype(dtype),
            "lengths": np.array([[len(tokens) for tokens in s.sequences] for s in samples], np.int32),
            "labels": np.array([s.label for s in samples], np.int64),
            **({"numbers": np.array([s.number for s in samples], np.float32)} if facts.numbers else {}),
        }
    )
    durable_write(work / name, data)
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "samples": len(samples)}


# ------------------------------------------------------------------------------------------------------- reading


class TokenSplit:
    """A split's samples by number; tokens stay in the page cache, shared by all processes of a machine.

    Attributes:
        folder: of the split.
        facts: what all samples share.
        options: how it was packed, for people.
    """

    def __init__(self, folder: Path, table: dict[str, Any]) -> None:
        """Open the verified parts; call `open_token_split` instead."""
        self.folder = folder
        read = {**_LATER, **table}
        fields = {field.name: read[field.name] for field in dataclasses.fields(TokenFacts)}
        self.facts = TokenFacts(**{**fields, "classes": tuple(table["classes"])})
        self.options: dict[str, Any] = table["options"]
        self._fingerprint = str(table["fingerprint"])
        files: list[Any] = [safetensors.safe_open(folder / part["name"], framework="np") for part in table["parts"]]
        self._tokens = [file.get_slice("tokens") for file in files]
        lengths = [file.get_tensor("lengths") for file in files]
        self._part_of = np.repeat(np.arange(len(files)), [len(part) for part in lengths])
        self._lengths: npt.NDArray[np.int64] = np.concatenate(lengths).astype(np.int64)
        self._starts = np.concatenate([_starts(part) for part in lengths])
        self._labels: npt.NDArray[np.int64] = np.concatenate([file.get_tensor("labels") for file in files])
        self._numbers: npt.NDArray[np.float32] | None = None
        if self.facts.numbers:
            self._numbers = np.concatenate([file.get_tensor("numbers") for file in files])

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return len(self._labels)

    @property
    def tokenizer(self) -> bytes | None:
        """The file of the tokenizer that made the tokens; None for tokens that are no parts of texts."""
        return read_whole(self.folder / TOKENIZER_NAME, LARGEST_TABLE) if self.facts.tokenizer else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it."""
        return self.facts.classes

    @property
    def fingerprint(self) -> str:
        """Identity of the split: changes when any token, label or place changes."""
        return self._fingerprint

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every sequence, (N, s)."""
        return self._lengths

    def labels(self, samples: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the labels of samples, (k,) int64; 0 where the number is -1 (filling)."""
        return torch.from_numpy(np.where(samples >= 0, self._labels[samples], 0))

    def numbers(self, samples: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """Return the numbers of samples, (k,) float32, 0 for filling; None for data without."""
        if self._numbers is None:
            return None
        return torch.from_numpy(np.where(samples >= 0, self._numbers[samples], np.float32(0)))

    def raw(self, sample: int) -> tuple[Tokens, ...]:
        """Return a sample's sequences of raw tokens."""
        part = self._tokens[self._part_of[sample]]
        spans = zip(self._starts[sample].tolist(), self._lengths[sample].tolist(), strict=True)
        return tuple(part[start : start + length] for start, length in spans)

    def batch(self, samples: npt.NDArray[np.int64], length: int) -> torch.Tensor:
        """Return token ids (k, n), or (k, s, n) with s > 1: int32, padded with 0 to n = `length` and cut there.

        A filling (sample number -1) is one token long, so that no model ever sees a sequence of nothing.
        """
        ids = np.zeros((len(samples), self.facts.sequences, length), np.int32)
        for row, sample in zip(ids, samples.tolist(), strict=True):
            if sample < 0:
                row[:, 0] = 1
                continue
            for place, tokens in zip(row, self.raw(sample), strict=True):
                kept = tokens[:length]
                np.add(kept, 1, out=place[: len(kept)], dtype=np.int32)
        return torch.from_numpy(ids if self.facts.sequences > 1 else ids[:, 0])


def _starts(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return where each sequence of a part begins, in the shape of `lengths`."""
    flat = lengths.reshape(-1).astype(np.int64)
    return (np.cumsum(flat) - flat).reshape(lengths.shape)


def open_token_split(folder: Path) -> TokenSplit:
    """Open a packed split and compare every file with its hash.

    Raises:
        DataError: the folder is no packed token split, or it is damaged or of another version.
    """
    path = folder / TOKENS_NAME
    try:
        table = parse_json(read_whole(path, LARGEST_TABLE))
        version, said = table["format"], table["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not folder.exists() else f"has no {TOKENS_NAME}, so it is no packed token split"
        raise DataError(
            f"token folder {folder} {what}: set data.root, or make it with `setformer text pack` or "
            "`setformer lra prepare TASK`"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_repair(folder)}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: {_repair(folder)}") from None
    if version != TOKENS_FORMAT:
        raise DataError(f"{path} has format {version!r}, this version reads {TOKENS_FORMAT}: {_repair(folder)}")
    if fingerprint_of(table) != said:
        raise DataError(f"{path} does not agree with its own fingerprint, so it was damaged: {_repair(folder)}")
    try:
        for part in table["parts"]:
            if not is_plain_name(part["name"]):
                raise ValueError(f"a part is {part['name']!r}, which is no plain name")
            _check_hash(folder / part["name"], part["sha256"])
        if table.get("tokenizer"):
            _check_hash(folder / TOKENIZER_NAME, table["tokenizer"])
        return TokenSplit(folder, table)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} does not describe a token split ({error}): {_repair(folder)}") from None


def _check_hash(path: Path, expected: str) -> None:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_repair(path.parent)}") from None
    if found != expected:
        raise DataError(f"{path} does not have the sha256 that {TOKENS_NAME} says: {_repair(path.parent)}")


def _repair(folder: Path) -> str:
    return f"restore the file or make {folder} again with --force"


# ------------------------------------------------------------------------------------------------------- streams


# Lengths of trimmed batches are multiples of this, so that there are few of them.
_TRIMMED_TO = 16


def _lengths_of(split: TokenSplit, config: TokenConfig) -> Callable[[npt.NDArray[np.int64]], int]:
    """Return what says to which length the batch of some samples is padded."""
    whole = batch_length(split, config)

    def trimmed(samples: npt.NDArray[np.int64]) -> int:
        there = samples[samples >= 0]
        longest = int(split.lengths[there].max()) if len(there) else 1
        return min(whole, -(-longest // _TRIMMED_TO) * _TRIMMED_TO)

    return trimmed if config.trim else lambda samples: whole


def batch_length(split: TokenSplit, config: TokenConfig) -> int:
    """Return n, to which batches are padded: the config's, else the split's.

    Raises:
        ConfigError: the config wants more than the split has.
    """
    if config.length > split.facts.length:
        raise ConfigError(
            f"data.length = {config.length} is more than the {split.facts.length} tokens that {split.folder} was "
            "packed with: set it to that or less, or to 0 for all"
        )
    return config.length or split.facts.length


class TokenTrainStream:
    """Endless training samples of one rank (`TrainStream`).

    Args:
        split: the packed split.
        config: of the data.
        seed: of the run.
        ranks: this process's place.
        global_batch: B, samples of all ranks in one optimizer step.
        micro_batch: m, samples of this rank in one accumulation step.

    Raises:
        ConfigError: the batch sizes or the length do not fit the data.
    """

    def __init__(
        self,
        split: TokenSplit,
        config: TokenConfig,
        seed: int,
        ranks: RankInfo,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        self._split = split
        self._seed = seed
        self._length = _lengths_of(split, config)
        self._cut = Cut(global_batch, micro_batch, ranks.rank, ranks.world_size)
        self._plan = SetPlan(FullOrder(split.num_samples, seed), global_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, equal on all ranks."""
        return self._plan.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        """Identity of the data set."""
        return self._split.fingerprint

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Yield `accumulation` micro batches per optimizer step, endlessly, from `first_step` on."""
        for request in train_requests(self._plan, self._cut, first_step):
            yield MicroBatch(
                inputs=self._split.batch(request.samples, self._length(request.samples)),
                labels=self._split.labels(request.samples),
                numbers=self._split.numbers(request.samples),
                weights=torch.ones(len(request.samples)),
                sample_ids=torch.from_numpy(request.samples),
                step=request.step,
            )

    def state(self, next_step: int) -> dict[str, Any]:
        """Return the cursor before an optimizer step, JSON-able and equal on all ranks."""
        return cursor_at(self._plan, self._seed, self.fingerprint, next_step).to_json()

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the optimizer step to resume from.

        Raises:
            DataError: the cursor is of other data, order, seed or global batch.
        """
        return step_of_cursor(state, self._plan, self._seed, self.fingerprint)

    def close(self) -> None:
        """Do nothing: there are no reader processes."""


class TokenEvalStream:
    """Each sample of a split exactly once over all ranks (`EvalStream`).

    Args:
        split: the packed split.
        config: of the data.
        ranks: this process's place.
        micro_batch: samples of this rank in one step, at least 1.

    Raises:
        ConfigError: the micro batch or the length is impossible.
    """

    def __init__(self, split: TokenSplit, config: TokenConfig, ranks: RankInfo, micro_batch: int) -> None:
        if micro_batch < 1:
            raise ConfigError(f"micro batch {micro_batch} must be at least 1")
        self._split = split
        self._ranks = ranks
        self._length = _lengths_of(split, config)
        self._micro_batch = micro_batch

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return self._split.num_samples

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's share; the same number of micro batches on all ranks, filling has weight 0, id -1."""
        for request in evaluation_requests(self.num_samples, self._ranks, self._micro_batch):
            samples = np.full(self._micro_batch, -1, np.int64)
            samples[: len(request.samples)] = request.samples
            yield MicroBatch(
                inputs=self._split.batch(samples, self._length(samples)),
                labels=self._split.labels(samples),
                numbers=self._split.numbers(samples),
                weights=torch.from_numpy((samples >= 0).astype(np.float32)),
                sample_ids=torch.from_numpy(samples),
            )

    def close(self) -> None:
        """Do nothing: there are no reader processes."""


class TokenPrepare:
    """From a micro batch on the CPU to token ids and targets on the device.

    Args:
        config: gives label smoothing.
        num_classes: C.
        device: where to.
    """

    def __init__(self, config: TokenConfig, num_classes: int, device: torch.device | str) -> None:
        self._num_classes = num_classes
        self._device = torch.device(device)
        self._smoothing = config.smoothing

    def __call__(self, batch: MicroBatch, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids (m, n) or (m, s, n) int32 and targets (m, C) float32, rows summing to 1."""
        if not self._num_classes:
            return on_device(batch.inputs, self._device), torch.zeros(len(batch.labels), 0, device=self._device)
        smoothing = self._smoothing if train else 0.0
        rest = smoothing / self._num_classes
        targets = torch.full((len(batch.labels), self._num_classes), rest, device=self._device)
        labels = on_device(batch.labels, self._device).view(-1, 1)
        return on_device(batch.inputs, self._device), targets.scatter_(1, labels, 1.0 - smoothing + rest)
