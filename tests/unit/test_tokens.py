"""Packed tokens: what is written is read, damage is found, and the streams keep the order of the image streams."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloaders.config import TokenConfig
from dataloaders.order.order import epoch_order
from dataloaders.packing.text import TextOptions
from dataloaders.tokens import (
    TOKENS_NAME,
    TokenEvalStream,
    TokenFacts,
    TokenPrepare,
    TokenSample,
    TokenSplit,
    TokenTrainStream,
    open_token_split,
    write_token_split,
)
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo


class Interrupted(BaseException):
    """Stands for Ctrl-C, which must not be loose in the process that runs the tests."""


FACTS = TokenFacts("test", ("no", "yes", "perhaps"), 257, 20)
COUNT = 53


def made(seed: int = 0, count: int = COUNT, sequences: int = 1) -> list[TokenSample]:
    random = np.random.default_rng(seed)
    return [
        TokenSample(
            tuple(random.integers(0, 256, random.integers(1, 30)).astype(np.uint8) for _ in range(sequences)),
            int(random.integers(3)),
        )
        for _ in range(count)
    ]


@pytest.fixture
def split(tmp_path: Path) -> TokenSplit:
    return write_token_split(tmp_path / "train", FACTS, made(), lambda: {"seed": 7}, part_tokens=200)


def test_what_is_written_is_read(split: TokenSplit) -> None:
    assert len(list(split.folder.glob("part-*"))) > 2
    assert split.num_samples == COUNT
    assert split.options == {"seed": 7}
    for index, sample in enumerate(made()):
        assert np.array_equal(split.raw(index)[0], sample.sequences[0][:20])
        assert split.labels(np.array([index])).item() == sample.label
        ids = split.batch(np.array([index]), 20)
        kept = min(20, len(sample.sequences[0]))
        assert ids.shape == (1, 20)
        assert torch.equal(ids[0, :kept], torch.from_numpy(sample.sequences[0][:kept].astype(np.int32) + 1))
        assert ids[0, kept:].count_nonzero() == 0
        assert split.lengths[index] == kept


def test_large_vocabularies_are_kept(tmp_path: Path) -> None:
    facts = TokenFacts("test", ("a",), 5001, 4)
    split = write_token_split(tmp_path / "s", facts, [TokenSample((np.array([4999, 0, 300], np.uint16),), 0)])
    assert split.batch(np.array([0]), 4).tolist() == [[5000, 1, 301, 0]]


def test_pairs(tmp_path: Path) -> None:
    facts = TokenFacts("pairs", ("no", "yes", "perhaps"), 257, 20, sequences=2)
    split = write_token_split(tmp_path / "s", facts, made(1, 9, 2), part_tokens=60)
    ids = split.batch(np.arange(9), 20)
    assert ids.shape == (9, 2, 20)
    for row, sample in zip(ids, made(1, 9, 2), strict=True):
        for place, tokens in zip(row, sample.sequences, strict=True):
            assert place.count_nonzero() == min(20, len(tokens))
            assert place[0] == int(tokens[0]) + 1


def test_parts_do_not_change_the_samples_but_the_fingerprint_follows_content(tmp_path: Path, split: TokenSplit) -> None:
    whole = write_token_split(tmp_path / "whole", FACTS, made(), lambda: {"seed": 7})
    everything = np.arange(COUNT)
    assert torch.equal(whole.batch(everything, 20), split.batch(everything, 20))
    again = write_token_split(tmp_path / "again", FACTS, made(), lambda: {"seed": 7}, part_tokens=200)
    assert again.fingerprint == split.fingerprint
    other = made()
    other[-1] = TokenSample(other[-1].sequences, (other[-1].label + 1) % 3)
    assert write_token_split(tmp_path / "other", FACTS, other, part_tokens=200).fingerprint != split.fingerprint


@pytest.mark.parametrize(
    ("sample", "facts"),
    [
        (TokenSample((np.zeros(0, np.uint8),), 0), FACTS),
        (TokenSample((np.zeros(3, np.uint8),), 3), FACTS),
        (TokenSample((np.full(3, 255, np.uint8),), 0), TokenFacts("test", ("a",), 256, 20)),
        (TokenSample((np.zeros(3, np.uint8),) * 2, 0), FACTS),
        (TokenSample((np.zeros(3, np.uint8),), 0), TokenFacts("test", ("a",), 257, 4, full=True)),
    ],
)
def test_samples_that_do_not_fit_are_refused_and_nothing_is_left(
    sample: TokenSample, facts: TokenFacts, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="does not fit test"):
        write_token_split(tmp_path / "s", facts, [sample])
    assert list(tmp_path.iterdir()) == []


def test_no_sample_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        write_token_split(tmp_path / "s", FACTS, [])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_packing_leaves_nothing_and_keeps_the_old_split(tmp_path: Path, split: TokenSplit) -> None:
    def broken() -> Iterator[TokenSample]:
        yield from made(5, 20)
        raise Interrupted

    with pytest.raises(Interrupted):
        write_token_split(split.folder, FACTS, broken(), force=True, part_tokens=50)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert open_token_split(split.folder).fingerprint == split.fingerprint


def test_a_destination_in_use(tmp_path: Path, split: TokenSplit) -> None:
    with pytest.raises(DataError, match="--force"):
        write_token_split(split.folder, FACTS, made())
    write_token_split(split.folder, FACTS, made(3), force=True)
    (split.folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        write_token_split(split.folder, FACTS, made(), force=True)


@pytest.mark.parametrize("name", ["part-00000.safetensors", "part-00002.safetensors", TOKENS_NAME])
def test_every_damaged_byte_is_found(split: TokenSplit, name: str) -> None:
    path = split.folder / name
    data = bytearray(path.read_bytes())
    for place in (len(data) // 3, len(data) - 3):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            open_token_split(split.folder)
    path.write_bytes(data)
    open_token_split(split.folder)


def test_missing_and_foreign_folders(tmp_path: Path, split: TokenSplit) -> None:
    with pytest.raises(DataError, match=r"does not exist.*setformer lra prepare"):
        open_token_split(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no packed token split"):
        open_token_split(tmp_path)
    (split.folder / "part-00001.safetensors").unlink()
    with pytest.raises(DataError, match="part-00001"):
        open_token_split(split.folder)


def test_another_format_is_refused(split: TokenSplit) -> None:
    path = split.folder / TOKENS_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_token_split(split.folder)


# Streams.


def config(folder: Path, **fields: Any) -> TokenConfig:
    return TokenConfig(root=str(folder.parent), **fields)


Taken = list[tuple[list[int], torch.Tensor]]


def taken(split: TokenSplit, ranks: int, micro: int, first_step: int, steps: int) -> Taken:
    """Return (sample ids, tokens) of each global batch, put together from all ranks."""
    streams = [
        TokenTrainStream(split, config(split.folder), 3, RankInfo(rank, ranks, rank, ranks), 12, micro)
        for rank in range(ranks)
    ]
    accumulation = 12 // (micro * ranks)
    parts = [list(islice(stream.micro_batches(first_step), steps * accumulation)) for stream in streams]
    found = []
    for step in range(steps):
        batches = [rank[step * accumulation + a] for a in range(accumulation) for rank in parts]
        assert all(batch.step == first_step + step for batch in batches)
        ids = torch.cat([batch.sample_ids for batch in batches])
        assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels(ids.numpy()))
        found.append((ids.tolist(), torch.cat([batch.inputs for batch in batches])))
    return found


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_samples_are_those_of_the_order_on_any_number_of_ranks(split: TokenSplit, ranks: int, micro: int) -> None:
    steps_per_epoch = COUNT // 12
    for step, (ids, tokens) in enumerate(taken(split, ranks, micro, 0, 2 * steps_per_epoch)):
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(COUNT, 3, epoch)[place * 12 : (place + 1) * 12]
        assert ids == order.tolist()
        assert torch.equal(tokens, split.batch(order, 20))


def test_a_stream_continues_where_it_stopped(split: TokenSplit) -> None:
    stream = TokenTrainStream(split, config(split.folder), 3, RankInfo(), 12, 6)
    cursor = json.loads(json.dumps(stream.state(5)))
    assert stream.check_state(cursor) == 5
    for (ids, tokens), (ids_then, tokens_then) in zip(
        taken(split, 1, 6, 0, 8)[5:], taken(split, 2, 3, 5, 3), strict=True
    ):
        assert ids == ids_then
        assert torch.equal(tokens, tokens_then)


def test_a_cursor_of_other_data_is_refused(split: TokenSplit, tmp_path: Path) -> None:
    other = write_token_split(tmp_path / "other", FACTS, made(9))
    cursor = TokenTrainStream(other, config(other.folder), 3, RankInfo(), 12, 6).state(2)
    with pytest.raises(DataError, match="fingerprint"):
        TokenTrainStream(split, config(split.folder), 3, RankInfo(), 12, 6).check_state(cursor)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 8), (3, 5), (4, 16)])
def test_evaluation_counts_each_sample_once(split: TokenSplit, ranks: int, micro: int) -> None:
    streams = [TokenEvalStream(split, config(split.folder), RankInfo(r, ranks, r, ranks), micro) for r in range(ranks)]
    shares = [list(stream.micro_batches()) for stream in streams]
    assert len({len(share) for share in shares}) == 1
    counted: list[int] = []
    for batch in (batch for share in shares for batch in share):
        assert batch.inputs.shape == (micro, 20)
        assert bool((batch.inputs[:, 0] > 0).all())  # no sequence of nothing, filling included
        assert torch.equal(batch.weights > 0, batch.sample_ids >= 0)
        counted += batch.sample_ids[batch.sample_ids >= 0].tolist()
    assert sorted(counted) == list(range(COUNT))


def test_length_cuts_and_cannot_grow(split: TokenSplit) -> None:
    stream = TokenEvalStream(split, config(split.folder, length=8), RankInfo(), 4)
    assert next(stream.micro_batches()).inputs.shape == (4, 8)
    with pytest.raises(ConfigError, match=r"data.length = 21 is more than the 20 tokens"):
        TokenEvalStream(split, config(split.folder, length=21), RankInfo(), 4)


def test_prepare_makes_ids_and_targets(split: TokenSplit) -> None:
    batch = next(TokenTrainStream(split, config(split.folder), 3, RankInfo(), 12, 12).micro_batches(0))
    prepare = TokenPrepare(config(split.folder, smoothing=0.3), 3, "cpu")
    ids, targets = prepare(batch, train=True)
    assert torch.equal(ids, batch.inputs)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 12)
    assert targets.gather(1, batch.labels[:, None]).flatten().tolist() == pytest.approx([0.8] * 12)
    hard = prepare(batch, train=False)[1]
    assert torch.equal(hard, torch.nn.functional.one_hot(batch.labels, 3).float())


def test_texts_are_not_cut_to_less_than_nothing() -> None:
    with pytest.raises(ConfigError, match="--length -1 must be at least 0"):
        TextOptions(length=-1)
