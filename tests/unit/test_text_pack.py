"""Texts are packed without loss, whatever tokenizer made them; tables are read as they are meant, or refused."""

from __future__ import annotations

import errno
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dataloaders.sources.index import durable_write
from dataloaders.text.corpus import windows_of
from dataloaders.text.pack import Asked, options_of, pack_texts, shown
from dataloaders.text.samples import cut_to, sample_of
from dataloaders.text.tables import Columns, rows_of
from dataloaders.text.tokenizer import TextTokenizer, read_tokenizer, train_tokenizer
from dataloaders.tokens import open_token_split
from launch.data.sheet import describe
from launch.testing.commands import setformer
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.text_ids import CLS, FIRST, MASK, SEP

SENTENCES = [f"the {c} cat eats {n} fish near the river ." for c in ("red", "old", "small") for n in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer(iter(SENTENCES * 3), 80, lowercase=True).data)
    return path


def words(name: str, tokens: list[str], **special: str) -> bytes:
    """A tokenizer of whole words, as another library's file has it, with ids in the given order."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=special["unk"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([special[key] for key in special])
    made.post_processor = processors.TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        special_tokens=[(special[key], tokens.index(special[key])) for key in ("cls", "sep")],
    )
    made.enable_truncation(2)
    made.enable_padding(length=9, pad_id=tokens.index(special["pad"]), pad_token=special["pad"])
    return made.to_str().encode()


BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}


@pytest.mark.parametrize(
    ("tokens", "special"),
    [
        (["[PAD]", "a", "[UNK]", "b", "[CLS]", "[SEP]", "[MASK]", "c"], BERT),
        (["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c", "<mask>"], ROBERTA),
    ],
)
def test_ids_are_the_same_whatever_the_tokenizer(tokens: list[str], special: dict[str, str]) -> None:
    """Its own padding, cutting and template are left out, and special tokens in a text are text."""
    found = TextTokenizer(words("t", tokens, **special), "here")
    order = [token for token in tokens if token not in (special[k] for k in ("pad", "cls", "sep", "mask"))]
    assert found.vocabulary == FIRST + len(order)
    expected = [FIRST + order.index(word) for word in ("c", "a", "b", "a")]
    (ids,) = found.encode(["c a b a"])
    assert ids.tolist() == expected
    assert found.decode(sample_of(ids)) == f"{special['cls']} c a b a {special['sep']}"
    (inside,) = found.encode([f"a {special['mask']} {special['sep']}"])
    assert not {CLS, SEP, MASK} & set(inside.tolist())
    assert found.unknown(inside) == 2
    assert [found.token(i) for i in (CLS, SEP, MASK)] == [special[k] for k in ("cls", "sep", "mask")]


def test_files_that_are_no_such_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for data, said in (
        (b"{}", "not a tokenizer.json"),
        (b"\xff", "not a tokenizer.json"),
        (b'{"version": "1.0", "model": {"type": "os.system"}}', "not a tokenizer.json"),
        (words("t", [*ROBERTA.values(), "a"], **ROBERTA).replace(b"<mask>", b"<hole>"), "no token"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=said):
            read_tokenizer(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_tokenizer(tmp_path / "none.json")
    special = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    known = Tokenizer(models.WordLevel({**special, "the": 5}, unk_token="[UNK]")).to_str()
    path.write_text(known.replace('"the":5', '"the":4000000000'))
    with pytest.raises(DataError, match="ids up to"):
        read_tokenizer(path)
    path.write_text(Tokenizer(models.WordLevel({**special, "the": 9}, unk_token="[NIL]")).to_str())
    with pytest.raises(DataError, match="cannot encode a text"):
        read_tokenizer(path).encode(["a cat"])
    with pytest.raises(DataError, match="no word"):
        train_tokenizer(iter([" "]), 100, lowercase=True)
    with pytest.raises(ConfigError, match="between"):
        train_tokenizer(iter(["once"]), 70_000, lowercase=True)


def test_windows_hold_all_tokens_and_no_two_documents(tokenizer: Path, tmp_path: Path) -> None:
    read = read_tokenizer(tokenizer)
    documents = [SENTENCES[i : i + 1 + i % 4] for i in range(0, len(SENTENCES), 4)]
    (tmp_path / "a.txt").write_text("\n\n\n".join("\n".join(part) for part in documents[:3]), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_bytes("\r\n".join(documents[3]).encode())
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": "\n".join(d)}) + "\n" for d in documents[4:]))
    files = sorted(tmp_path.iterdir())
    windows = [window.sequences[0].astype(int) + 1 for window in windows_of(files, read, 12, "text")]
    assert all(w[0] == CLS and w[-1] == SEP and 2 < len(w) <= 12 for w in windows)
    found = [token for window in windows for token in window[1:-1].tolist()]
    expected = [np.concatenate(read.encode(part)).tolist() for part in documents]
    assert found == [token for document in expected for token in document]
    # A window that is not full ends its document.
    ends = np.cumsum([len(part) for part in expected]).tolist()
    at = np.cumsum([len(window) - 2 for window in windows]).tolist()
    assert {end for end, window in zip(at, windows, strict=True) if len(window) < 12} <= set(ends)
    assert set(ends) <= set(at)


@pytest.mark.parametrize(
    ("lengths", "kept"), [((5,), (5,)), ((90,), (30,)), ((40, 10), (19, 10)), ((3, 40), (3, 26)), ((40, 40), (15, 14))]
)
def test_pairs_lose_the_end_of_the_longer_text(lengths: tuple[int, ...], kept: tuple[int, ...]) -> None:
    texts = [np.arange(FIRST, FIRST + n) for n in lengths]
    cut = cut_to(texts, 32)
    assert tuple(map(len, cut)) == kept
    assert all((a[: len(b)] == b).all() for a, b in zip(texts, cut, strict=True))
    assert len(sample_of(*cut)) <= 32


def packed(source: Path, tokenizer: Path, **asked: object) -> list[tuple[object, str]]:
    """Pack a table, and return labels or numbers with texts."""
    options = options_of(Asked(tokenizer=tokenizer, force=True, **asked), source)  # type: ignore[arg-type]
    split, _ = pack_texts(source, source.parent / "packed" / source.stem, options)
    read, all_of_it = read_tokenizer(split.folder), np.arange(split.num_samples)
    numbers = split.numbers(all_of_it)
    labels = [split.classes[i] for i in split.labels(all_of_it)] if split.classes else [None] * split.num_samples
    said = labels if numbers is None else numbers.tolist()
    return [(what, read.decode(split.raw(i)[0].astype(int) + 1)) for i, what in enumerate(said)]


def test_tables(tokenizer: Path, tmp_path: Path) -> None:
    tsv, csv, lines = tmp_path / "t.tsv", tmp_path / "c.csv", tmp_path / "l.jsonl"
    tsv.write_text('\ufefflabel\ttext\n10\tthe "red cat\n9\tthe old cat"\n', encoding="utf-8")
    assert packed(tsv, tokenizer, texts=("text",), label="label") == [
        ("10", "[CLS] the [UNK] red cat [SEP]"),
        ("9", "[CLS] the old cat [UNK] [SEP]"),
    ]
    assert open_token_split(tmp_path / "packed" / "t").classes == ("9", "10")  # by value
    csv.write_text('a,b,score\n"the red, old cat","the\nriver",2.5\nthe cat,the fish,0\n')
    assert packed(csv, tokenizer, texts=("a", "b"), number="score") == [
        (2.5, "[CLS] the red [UNK] old cat [SEP] the river [SEP]"),
        (0.0, "[CLS] the cat [SEP] the fish [SEP]"),
    ]
    lines.write_text('{"s": "the cat", "y": 1}\n{"y": "no", "s": "the fish"}\n')
    assert packed(lines, tokenizer, texts=("s",), label="y") == [
        ("1", "[CLS] the cat [SEP]"),
        ("no", "[CLS] the fish [SEP]"),
    ]
    bare = tmp_path / "bare.tsv"
    bare.write_text("the cat\t1\nthe fish\t0\n")
    assert len(packed(bare, tokenizer, texts=("1",), label="2", header=False)) == 2


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.tsv", "text\tlabel\nthe cat\t1\nthe cat\n", "line 3, has 1 columns"),
        ("t.tsv", "text\tlabel\n \t1\n", "line 2, has an empty text"),
        ("t.tsv", "text\tlabel\nthe cat\t\n", "line 2, has no label"),
        ("t.tsv", "txt\tlabel\nthe cat\t1\n", "did you mean txt"),
        ("t.tsv", "text\ttext\tlabel\na\tb\tc\n", "2 columns 'text'"),
        ("t.csv", 'text,label\n"the cat,1\n', "is not CSV"),
        ("t.jsonl", '{"text": "a"}\n', "no key 'label'"),
        ("t.jsonl", '{"text": "a", "label": [1]}\n', "neither a text nor a number"),
        ("t.jsonl", "[1]\n", "not an object"),
        ("t.jsonl", "{\n", "is not JSON"),
        ("t.jsonl", '\n{"text": "a \\ud800 b", "label": "x"}\n', r"line 2, has \\ud800, which is half a character"),
        ("t.jsonl", '{"text": "a b", "label": "\\udfff"}\n', "half a character"),
        ("t.bin", "text\tlabel\nthe cat\t1\n", "none of .tsv"),
    ],
)
def test_tables_that_are_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        list(rows_of(tmp_path / name, Columns(("text",), "label")))


def test_numbers_and_bytes_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    for number in ("nan", "inf", "many", "", "1e39", "-1e39", "1_0"):
        path.write_text(f"text\tscore\nthe cat\t{number}\n")
        with pytest.raises(DataError, match="where a number is wanted"):
            list(rows_of(path, Columns(("text",), number="score")))
    path.write_bytes(b"text\tscore\nthe cat\t1\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="line 3, is not UTF-8"):
        list(rows_of(path, Columns(("text",), number="score")))


@pytest.mark.parametrize(
    ("name", "data", "texts", "said"),
    [
        ("a.txt", "the cat\n".encode("utf-16-le"), (), "line 1, has a NUL byte"),
        ("a.parquet", b"PAR1\x15\x00the cat", (), "line 1, has a NUL byte"),
        ("a.txt.gz", gzip.compress(b"the cat\n", mtime=0), (), "is compressed with gzip"),
        ("a.tsv", b"text\tlabel\nthe cat\t1\n", (), "is a table, and running text is wanted"),
        ("a.TSV", b"text\tlabel\nthe cat\t1\n", (), "is a table, and running text is wanted"),
        ("a.parquet", b"the cat\n", ("text",), "is none of .tsv, .csv, .jsonl, which have columns"),
        ("a.JSONL", b"the cat\n", (), "is not JSON"),
    ],
)
def test_what_is_no_running_text_is_refused(
    name: str, data: bytes, texts: tuple[str, ...], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((DataError, ConfigError), match=said):
        packed(tmp_path / name, tokenizer, texts=texts)
    if not texts:
        made = setformer("text", "tokenizer", str(tmp_path / name), str(tmp_path / "made.json"), "--vocabulary", "64")
        assert made.code in (2, 3)
        assert said in made.err
        assert not (tmp_path / "made.json").exists()


def test_suffixes_may_be_in_capitals(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "T.TSV").write_text("text\tlabel\nthe cat\t1\nthe fish\t0\n")
    assert len(packed(tmp_path / "T.TSV", tokenizer, texts=("text",), label="label")) == 2


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat eats the fish\n" * 9)
    there = tmp_path / "a.txt" / "tokenizer.json"
    made = setformer("text", "tokenizer", str(tmp_path / "a.txt"), str(there), "--vocabulary", "64")
    assert made.code == 3, made.err
    assert f"{there} cannot be written (" in made.error_lines[0]

    def full_disk() -> Iterator[bytes]:
        yield b"{"
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        durable_write(tmp_path / "tokenizer.json", full_disk())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_split_is_packed_like_another(tokenizer: Path, tmp_path: Path) -> None:
    for name, rows in (("train", "the cat\tyes\nthe fish\tno\n"), ("val", "the river\tno\n"), ("bad", "a\tmaybe\n")):
        (tmp_path / f"{name}.tsv").write_text(f"s\ty\n{rows}")
    train = tmp_path / "train"
    pack_texts(tmp_path / "train.tsv", train, options_of(Asked(tokenizer, None, 16, ("s",), "y"), tmp_path / "x.tsv"))
    like = options_of(Asked(like=train), tmp_path / "val.tsv")
    val, _ = pack_texts(tmp_path / "val.tsv", tmp_path / "val", like)
    first = open_token_split(train)
    assert vars(val.facts) == vars(first.facts)
    assert val.classes == ("no", "yes")
    assert val.tokenizer == tokenizer.read_bytes()
    assert list(shown(tmp_path / "val", 5))[1:] == ["no  [CLS] the river [SEP]"]
    with pytest.raises(DataError, match="'maybe', which is none of no, yes"):
        pack_texts(tmp_path / "bad.tsv", tmp_path / "bad", like)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ConfigError, match="--like takes"):
        options_of(Asked(like=train, length=64), tmp_path / "val.tsv")
    with pytest.raises(ConfigError, match="no tokenizer"):
        options_of(Asked(), tmp_path / "val.tsv")


def test_a_folder_of_json_lines_is_running_text_as_a_file_is(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n" + json.dumps({"body": " ".join(SENTENCES)}) + "\n\n")
    splits = [
        pack_texts(source, tmp_path / name, options_of(Asked(tokenizer, length=16, texts=("body",)), source))[0]
        for name, source in (("one", folder), ("two", folder / "a.jsonl"))
    ]
    assert splits[0].fingerprint == splits[1].fingerprint
    assert splits[0].num_samples > 10
    (folder / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="folder has no text"):
        pack_texts(folder, tmp_path / "three", options_of(Asked(tokenizer, texts=("body",)), folder))


def test_a_panic_of_the_library_says_one_sentence(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(tokenizer.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "t.json").write_text(json.dumps({**said, "pre_tokenizer": pattern}))
    with pytest.raises(DataError, match="cannot encode a text"):
        read_tokenizer(tmp_path / "t.json").encode(["x" * 5000])
    assert capfd.readouterr().err == ""


def test_a_damaged_tokenizer_is_found(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    split, _ = pack_texts(tmp_path / "a.txt", tmp_path / "s", options_of(Asked(tokenizer), tmp_path / "a.txt"))
    assert split.facts.vocabulary == read_tokenizer(tokenizer).vocabulary
    console = Console(file=io.StringIO(), width=100)
    assert describe(str(tmp_path / "s"), 10, None, 4, 64, console)["counts"] == []
    assert "classes     none" in console.file.getvalue()  # type: ignore[attr-defined]
    file = tmp_path / "s" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"cat", b"dog", 1))
    with pytest.raises(DataError, match=r"tokenizer\.json does not have the sha256"):
        open_token_split(tmp_path / "s")
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_token_split(tmp_path / "s")
