"""`setformer data`: making and checking the shards that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.lazy import load

app = typer.Typer(help="Pack images into shards, and check them.", no_args_is_help=True)


_PACK_HELP = """Pack an image folder into WebDataset shards and an index.

SOURCE is a directory of class folders (CLASS/image.jpg), or a tar or tar.gz of one. Image bytes are kept as they
are. DEST holds one split; give training and validation the same class map with --classes-from.

Examples:

  setformer data pack photos/train packed/train --workers 8

  setformer data pack photos.tar.gz packed/val --split val --classes-from packed/train

  setformer data pack cifar10_train.tar.gz packed/train --shuffle 0
"""


@app.command(help=_PACK_HELP)
def pack(
    source: Annotated[Path, typer.Argument(help="Image folder, or a tar or tar.gz of one.")],
    dest: Annotated[Path, typer.Argument(help="Folder to hold the shards; new or empty.")],
    split: Annotated[str | None, typer.Option(help="Sub-folder of SOURCE to pack, such as train.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class map: names in label order, one per line or a JSON list.")
    ] = None,
    classes_from: Annotated[Path | None, typer.Option(help="Packed split whose class map to use.")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Most samples in one shard.")] = 2000,
    mib_per_shard: Annotated[int, typer.Option(help="Most MiB of images in one shard.")] = 512,
    workers: Annotated[int, typer.Option(help="Processes; 0 packs in this one. Same result.")] = 2,
    strict: Annotated[bool, typer.Option(help="Decode every image, or only look at headers.")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave damaged images out instead of failing.")] = False,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="Mix the samples by this seed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a packed split at DEST.")] = False,
) -> None:
    """Pack an image folder; the long help is `_PACK_HELP`."""
    packing = load("dataloaders.packing")
    options = packing.PackOptions(
        samples_per_shard=samples_per_shard,
        mib_per_shard=mib_per_shard,
        workers=workers,
        strict=strict,
        skip_bad=skip_bad,
        force=force,
        shuffle_seed=shuffle,
        split=split,
        classes_file=classes,
        classes_from=classes_from,
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"looking for images in {source}", total=None)
        result = packing.pack_image_folder(
            source,
            dest,
            options,
            on_start=lambda total: progress.update(task, total=total, description="packing"),
            on_progress=lambda done: progress.advance(task, done),
        )
    _report(console, dest, result)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A packed split.")]) -> None:
    """Read every shard of FOLDER and compare it with the hash it was packed with.

    Example: setformer data verify packed/train
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"reading {folder}", total=None)
        shards = load("dataloaders.verify").verify_split(
            folder,
            on_start=lambda total: progress.update(task, total=total),
            on_progress=lambda done: progress.advance(task, done),
        )
    console.print(f"{shards} shards in {folder} are whole", markup=False, highlight=False, soft_wrap=True)


def _report(console: Console, dest: Path, result: Any) -> None:
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for name, reason in result.rejected:
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    index = result.index
    mib = sum(shard.size for shard in index.shards) / (1 << 20)
    console.print(
        f"packed {len(index)} images of {len(index.classes)} classes into {len(index.shards)} shards "
        f"({mib:.1f} MiB) in {dest}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
