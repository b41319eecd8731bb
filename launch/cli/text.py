"""`setformer text`: tokenizers, and texts as packed tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.terminal import open_console
from setformer_dist.core.words import counted, plain

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
    from dataloaders.text.corpus import documents_of, files_of
    from dataloaders.text.tokenizer import train_tokenizer

    if destination.exists() and not force:
        raise ConfigError(f"{destination} exists: choose another name, or replace it with --force")
    files = files_of(source)
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
    destination.parent.mkdir(parents=True, exist_ok=True)
    durable_write(destination, made.data)
    print(f"{destination}: {made.vocabulary:,} tokens from {counted(len(files), 'file')}")


_PACK_HELP = """Pack texts as tokens. Running text (.txt, .jsonl) is cut into windows of --length tokens.

Of tables (.tsv, .csv, .jsonl), --text names the column of the sentence, or is given twice for pairs. --label names the
column of the class, --number that of a number for regression. --like takes tokenizer, length, columns and classes from
a packed split.

Examples:

  setformer text pack corpus/train data/corpus/train --tokenizer tokenizer.json

  setformer text pack sst2/train.tsv data/sst2/train --tokenizer tokenizer.json --text sentence --label label

  setformer text pack sst2/dev.tsv data/sst2/val --like data/sst2/train

  setformer text pack stsb/train.csv data/stsb/train --tokenizer tokenizer.json --text sentence1 --text sentence2
      --number score
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
        print(f"warning: many samples are cut: consider --length {2 * options.length}", file=sys.stderr)


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
