"""`setformer text`: tokenizers, and texts as packed tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.cli.options import BestOption, ModelPath, WeightsOption
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.metric import weights_named
from setformer_dist.core.terminal import open_console
from setformer_dist.core.words import counted, plain

if TYPE_CHECKING:
    from launch.run.texts import TextPrediction

_HELP = """Pack texts for masked language modelling, and for tasks on sentences and pairs of sentences.

Examples:

  setformer text tokenizer corpus/ tokenizer.json

  setformer text pack corpus/train data/corpus/train --tokenizer tokenizer.json

  setformer text pack corpus/valid data/corpus/val --like data/corpus/train

  setformer train mlm data.root=data/corpus
"""

app = typer.Typer(help=_HELP, no_args_is_help=True)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


_TOKENIZER_HELP = """Make a tokenizer of texts (WordPiece, as BERT's), and write it as tokenizer.json.

A tokenizer of Hugging Face's libraries for masked language models can be used instead, without this command.
Two trainings on the same texts may give two different tokenizers. Keep the file: packed data and checkpoints hold its
sha256, and weights of another tokenizer are refused.

Examples:

  setformer text tokenizer corpus/ tokenizer.json

  setformer text tokenizer corpus/ german.json --vocabulary 16000 --cased
"""


@app.command(help=_TOKENIZER_HELP)
def tokenizer(
    source: Annotated[Path, typer.Argument(help="A .txt or .jsonl file, or a folder of such.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="File to write.", show_default=False)],
    vocabulary: Annotated[int, typer.Option(help="Number of tokens.")] = 8192,
    cased: Annotated[bool, typer.Option("--cased", help="Keep capital letters and accents.")] = False,
    text: Annotated[str, typer.Option(help="Key of the texts in .jsonl files.")] = "text",
    force: Force = False,
) -> None:
    """Make a tokenizer of texts."""
    from dataloaders.sources.index import durable_write
    from dataloaders.text.corpus import check_running, documents_of, files_of
    from dataloaders.text.tokenizer import train_tokenizer

    if destination.exists() and not force:
        raise ConfigError(f"{destination} exists: choose another name, or replace it with --force")
    files = files_of(source)
    check_running(files)
    console = open_console()

    def lines() -> Iterator[str]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("reading files", total=len(files))
            for file in files:
                for part in documents_of(file, text):
                    yield from part
                progress.advance(bar)

    made = train_tokenizer(lines(), vocabulary, lowercase=not cased)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        durable_write(destination, made.data)
    except OSError as error:
        raise DataError(f"{destination} cannot be written ({error.strerror}): nothing was kept") from None
    print(f"{destination}: {made.vocabulary:,} tokens from {counted(len(files), 'file')}")


_PACK_HELP = """Pack texts as tokens. Running text (.txt, .jsonl) is cut into windows of --length tokens.

Of tables (.tsv, .csv, .jsonl), --text names the column of the sentence, or is given twice for pairs. --label names the
column of the class, --number that of a number for regression. --like takes tokenizer, length, columns and classes from
a packed split.

Examples:

  setformer text pack corpus/train data/corpus/train --tokenizer tokenizer.json

  setformer text pack sst2/train.tsv data/sst2/train --tokenizer tokenizer.json --text sentence --label label

  setformer text pack sst2/dev.tsv data/sst2/val --like data/sst2/train

  setformer text pack pairs.csv data/pairs/train --tokenizer tokenizer.json --text a --text b --number score
"""


@app.command(help=_PACK_HELP)
def pack(
    source: Annotated[Path, typer.Argument(help="A file, or a folder of files.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, or a folder that holds one.", show_default=False)
    ] = None,
    like: Annotated[Path | None, typer.Option(help="Pack as this split was packed.", show_default=False)] = None,
    length: Annotated[int | None, typer.Option(help="Most tokens of a sample; 128 by default.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Column of a text; twice for pairs.", show_default=False)
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the class.", show_default=False)] = "",
    number: Annotated[str, typer.Option(help="Column of the number.", show_default=False)] = "",
    no_header: Annotated[bool, typer.Option("--no-header", help="Columns have no names: they are 1, 2, 3.")] = False,
    force: Force = False,
) -> None:
    """Pack texts as tokens."""
    from dataloaders.text import pack as texts

    asked = texts.Asked(tokenizer, like, length, tuple(text or ()), label, number, header=not no_header, force=force)
    options = texts.options_of(asked, source)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=open_console(), transient=True) as progress:
        bar = progress.add_task("samples", total=None)
        split, counts = texts.pack_texts(source, destination, options, lambda: progress.advance(bar))
    said = [counted(split.num_samples, "sample"), counted(counts.tokens, "token")]
    if split.classes:
        said.append(f"classes {', '.join(map(plain, split.classes[:10]))}{' …' * (len(split.classes) > 10)}")
    if counts.cut:
        said.append(f"{counts.cut} cut to {options.length} tokens")
    if counts.unknown:
        said.append(f"{counts.unknown / max(1, counts.tokens):.2%} of tokens unknown")
    print(f"{plain(destination)}: {', '.join(said)}")
    if counts.cut > split.num_samples // 20:
        print("warning: many samples are cut: consider a larger --length", file=sys.stderr)


_SHOW_HELP = """Print samples of a packed split as texts.

Example:

  setformer text show data/sst2/train --samples 3
"""


@app.command(help=_SHOW_HELP)
def show(
    split: Annotated[Path, typer.Argument(help="Folder of the split.", show_default=False)],
    samples: Annotated[int, typer.Option(min=1, help="How many, from the first on.")] = 5,
) -> None:
    """Print samples of a packed split as texts."""
    from dataloaders.text.pack import shown

    for line in shown(split, samples):
        print(plain(line))


_PREDICT_HELP = """Print what a trained model says of texts: the likeliest classes, a number, or tokens for [MASK].

Examples:

  setformer text predict runs/sst2 "a lovely film" "two hours of nothing"

  setformer text predict runs/stsb --pairs "a man plays a flute" "somebody makes music"

  setformer text predict runs/mlm "the king and the [MASK] ruled the land"

  setformer text predict runs/sst2 --file sentences.txt --json

In files each line is a text, and a tab separates the two texts of a pair.
"""


@app.command(help=_PREDICT_HELP)
def predict(
    checkpoint: ModelPath,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts.", show_default=False)] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Each two texts are a pair.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="File with a text per line; - is standard input.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes or tokens shown.")] = 3,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Its tokenizer.json, where it is not beside the model.", show_default=False)
    ] = None,
    weights: WeightsOption = "auto",
    best: BestOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text.")] = False,
) -> None:
    """Print what a trained model says of texts."""
    from launch.run.exported import load_named
    from launch.run.texts import predict_texts, tokenizer_for

    samples = _samples(list(texts or ()), pairs, file)
    trained = load_named(checkpoint, weights_named(weights), best=best)
    for found in predict_texts(trained, tokenizer_for(trained, tokenizer), samples, top):
        print(_as_json(found) if as_json else _line(found))


def _samples(texts: list[str], pairs: bool, file: Path | None) -> list[tuple[str, ...]]:
    from dataloaders.text.corpus import lines_of

    samples: list[tuple[str, ...]] = [(text,) for text in texts]
    if pairs:
        if len(texts) % 2:
            raise ConfigError(f"--pairs: {counted(len(texts), 'text')} cannot be paired: give an even number")
        samples = list(zip(texts[::2], texts[1::2], strict=True))
    if file is not None:
        for number, line in lines_of(Path("/dev/stdin") if str(file) == "-" else file):
            parts = tuple(line.split("\t"))
            if len(parts) > 2:
                raise ConfigError(f"{file}, line {number}, has {len(parts)} texts: a tab separates the two of a pair")
            if not line.strip():
                continue
            if not all(part.strip() for part in parts):
                raise ConfigError(f"{file}, line {number}, has an empty text: give it some words")
            samples.append(parts)
    if any(_has_half(text) for text in texts):
        raise ConfigError("a text is not UTF-8: check the terminal's encoding, or give --file FILE")
    if not samples:
        raise ConfigError("no text: give some, or --file FILE")
    return samples


def _has_half(text: str) -> bool:
    """Return whether a text has bytes that are no characters, as the shell hands them on."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _as_json(found: TextPrediction) -> str:
    said: dict[str, object] = {"texts": list(found.texts)}
    if found.value is not None:
        said["value"] = found.value
    elif found.fillings:
        said["fillings"] = [dict(filling) for filling in found.fillings]
    else:
        said["classes"] = dict(zip(found.classes, found.probabilities, strict=True))
    return json.dumps(said)


def _line(found: TextPrediction) -> str:
    if found.value is not None:
        said = f"{found.value:.3f}"
    elif found.fillings:
        said = "; ".join(", ".join(f"{plain(t)} {share:.1%}" for t, share in filling) for filling in found.fillings)
    else:
        ranked = zip(found.classes, found.probabilities, strict=True)
        said = ", ".join(f"{plain(name)} {share:.1%}" for name, share in ranked)
    return f"{plain(' | '.join(found.texts))}: {said}"
