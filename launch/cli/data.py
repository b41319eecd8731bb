"""`setformer data`: making, checking and looking at the data that training reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

import typer
from rich.console import Console

from launch.cli.bars import progress_bar
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.terminal import open_console
from setformer_dist.core.words import counted, plain

if TYPE_CHECKING:
    from dataloaders.packing.convert import BetonResult
    from dataloaders.packing.pack import PackOptions, PackResult

    Packed = PackResult | BetonResult


class _ClassMap(TypedDict):
    """Where packing takes class names from: one of the two, or neither."""

    classes_file: Path | None
    classes_from: Path | None


app = typer.Typer(
    help="Pack images, masks, boxes and texts; check, convert, measure and look at data.", no_args_is_help=True
)

# What `verify` ends with when something is damaged.
_DAMAGED = 4

_PACK_HELP = """Pack images (with classes, masks or boxes) or texts for training.

SOURCE is a directory of class folders (CLASS/image.jpg), or a tar or tar.gz of one; or images next to masks (--masks),
images with COCO annotations (--coco), a TSV file of texts and labels, or a container to be repacked (a packed
split, a pattern of WebDataset shards, a .beton file). DEST is a folder for WebDataset shards and their index, or a
file that ends in .beton. DEST holds one split. With --hold-out, a share of each class goes to a second folder, for
validation; if you have a validation set already, pack it with the class map of the training set (--classes-from).

Image bytes are copied unchanged, except with --max-side, --quality or --tiles. CMYK JPEG and (with --pixels uint8)
16-bit PNG become 8-bit RGB. The same source gives the same bytes. To continue a stopped packing into shards, repeat the
command.

Examples:

  setformer data pack photos/train packed/train --workers 8

  setformer data pack photos/train packed/train --hold-out 0.1 packed/val

  setformer data pack photos.tar.gz packed/val --split val --classes-from packed/train

  setformer data pack photos/train packed/train --max-side 512 --quality 90 --skip-bad

  setformer data pack camvid.tar.gz packed/train --split train --masks annotations --void 11

  setformer data pack ade20k packed/train --split train --masks annotations --mask-values ade20k.txt

  setformer data pack coco/train2017 packed/train --coco coco/annotations/instances_train2017.json

  setformer data pack sst2/train.tsv packed/train --length 256

  setformer data pack aerial packed/train --tiles 1024

  setformer data pack aerial packed/unlabelled --tiles 1024 --no-labels

  setformer data pack slides packed/train --tiles 1024 --slides 0

  setformer data pack sentinel packed/train --tiles 512 --pixels uint16 --bands 12

  setformer data pack photos/train packed/train.beton
"""
_HOLD_OUT_HELP = "Pack this share of each class, chosen by seed and name, into this second folder, for validation."
_SEED_HELP = "Seed of --hold-out; another one holds out other images. Default: 0."
_SPLIT_HELP = "Sub-folder of SOURCE to pack, such as train."
_SKIP_HELP = "Exclude and list damaged images and unexpected members of shards, instead of failing."
_EMPTY_HELP = "Ignore class folders without a readable image, instead of failing."
_RAW_HELP = "For .beton: store raw pixels, shrunk to this longer side; 0 shrinks nothing."
_CLASSES_HELP = "Class map: a file as for `data index --classes`, or a packed split, whose map is used."
_VALUES_HELP = "What values or colours of masks stand for: a file of lines such as '7 road', '0 -' (does not count)."
_COCO_HELP = "COCO instances: a file, or its name within SOURCE."
_LABELS_HELP = "Images lie in class folders, or (--no-labels) at any depth, all of one class, for pretraining."
_SLIDES_HELP = "Pack whole-slide images at this level of their resolutions; 0 is the finest. Needs --tiles."
_TILES_HELP = "Cut images into tiles of this side in pixels; training reads only the tiles it needs. 0: no tiles."
_PIXELS_HELP = "Largest height x width of an image; larger ones are refused. Memory grows with it."
_MIB_HELP = "Most MiB of images in one shard, counted as they are in SOURCE."

ClassMap = Annotated[Path | None, typer.Option(help="Class map: names in label order, one per line or a JSON list.")]
PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="Packed split, pattern of shards, .beton file or image folder.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 works in this one. Same result.")]
RawSide = Annotated[int | None, typer.Option(metavar="SIDE", min=0, help=_RAW_HELP)]
Pixels = Literal["uint8", "uint16", "float32"]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier packing left at DEST.")]


@app.command(help=_PACK_HELP)
def pack(
    source: Annotated[str, typer.Argument(help="What to pack; see above.")],
    dest: Annotated[Path, typer.Argument(help="New or empty folder for shards, or a file *.beton.")],
    split: Annotated[str | None, typer.Option(help=_SPLIT_HELP)] = None,
    hold_out: Annotated[tuple[float, Path] | None, typer.Option(metavar="SHARE DEST", help=_HOLD_OUT_HELP)] = None,
    hold_out_seed: Annotated[int | None, typer.Option(metavar="SEED", help=_SEED_HELP)] = None,
    masks: Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of masks next to images/.")] = None,
    void: Annotated[int | None, typer.Option(metavar="VALUE", help="Mask value to ignore.")] = None,
    mask_values: Annotated[Path | None, typer.Option(metavar="FILE", help=_VALUES_HELP)] = None,
    coco: Annotated[str | None, typer.Option(metavar="JSON", help=_COCO_HELP)] = None,
    classes: Annotated[Path | None, typer.Option("--classes", "--classes-from", help=_CLASSES_HELP)] = None,
    labels: Annotated[bool, typer.Option(help=_LABELS_HELP)] = True,
    samples_per_shard: Annotated[int, typer.Option(help="Most samples in one shard.")] = 2000,
    mib_per_shard: Annotated[int, typer.Option(help=_MIB_HELP)] = 512,
    max_side: Annotated[int, typer.Option(help="Shrink images to this longer side in pixels; 0 shrinks none.")] = 0,
    quality: Annotated[
        int | None, typer.Option(help="JPEG quality. Without --max-side or --tiles, it re-encodes every JPEG file.")
    ] = None,
    raw: RawSide = None,
    tiles: Annotated[int, typer.Option(metavar="SIDE", min=0, help=_TILES_HELP)] = 0,
    slides: Annotated[int | None, typer.Option(metavar="LEVEL", min=0, help=_SLIDES_HELP)] = None,
    pixels: Annotated[Pixels, typer.Option(help="Data type of the bands; other images are refused.")] = "uint8",
    bands: Annotated[int, typer.Option(min=1, max=4096, help="Number of bands of each image.")] = 3,
    max_pixels: Annotated[int, typer.Option(min=1, help=_PIXELS_HELP)] = 178_956_970,
    length: Annotated[int, typer.Option(min=0, help="For texts: cut each to this many bytes; 0 cuts none.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 packs in this one. Same result.")] = 2,
    strict: Annotated[bool, typer.Option(help="Decode every image, or read only headers.")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=_SKIP_HELP)] = False,
    allow_empty_classes: Annotated[bool, typer.Option("--allow-empty-classes", help=_EMPTY_HELP)] = False,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="Shuffle the samples with this seed.")] = None,
    force: Force = False,
) -> None:
    """Pack a source; the long help is `_PACK_HELP`."""
    from dataloaders.packing import mask_table, pack, text
    from dataloaders.pixels import depth

    if hold_out is None and hold_out_seed is not None:
        raise ConfigError("--hold-out-seed is for --hold-out SHARE DEST, which is not given")
    if text.holds_text(Path(source)):
        if hold_out is not None:
            raise ConfigError(f"--hold-out divides images, and {source} holds texts: divide the file's lines yourself")
        _pack_text(Path(source), dest, split, classes, length, force)
        return
    if length:
        raise ConfigError(f"--length is for texts, and {source} holds none")
    options = pack.PackOptions(
        samples_per_shard=samples_per_shard,
        mib_per_shard=mib_per_shard,
        workers=workers,
        strict=strict,
        skip_bad=skip_bad,
        allow_empty_classes=allow_empty_classes,
        force=force,
        shuffle_seed=shuffle,
        split=split,
        **_class_map(classes),
        max_side=max_side,
        quality=quality,
        masks=masks,
        void=void,
        mask_table=None if mask_values is None else mask_table.read_mask_table(mask_values),
        coco=coco,
        tiles=tiles,
        labels=labels,
        slides=slides,
        form=depth.PixelFormat(bands, pixels, max_pixels),
    )
    if hold_out is not None:
        _pack_held_out(source, dest, hold_out, hold_out_seed or 0, raw, options)
    else:
        _pack_images(source, dest, raw, options)


@app.command()
def index(
    path: Annotated[
        str, typer.Argument(metavar="PATTERN", help='Shards such as "train-{0000..0146}.tar", or a .beton file.')
    ],
    classes: ClassMap = None,
    checksums: Annotated[bool, typer.Option(help="Read all bytes for checksums, or headers alone.")] = True,
    workers: Workers = 2,
) -> None:
    """Index WebDataset shards or a .beton file that others made, so that samples can be read by number and checked.

    Training makes an index of shards by itself at first sight; this is for making it ahead of time.

    Examples:

        setformer data index "imagenet/train-{0000..1281}.tar" --workers 8

        setformer data index train.beton --classes names.txt
    """
    from launch.data import commands

    with progress_bar(f"opening {path}", "indexing") as steps:
        said = commands.index(path, classes, checksums, workers, steps.start, steps.advance)
    _say(open_console(), said)


@app.command()
def verify(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Packed splits, shards, .beton files or image folders.")
    ],
    decode: Annotated[bool, typer.Option(help="Decode every sample too, or compare digests alone.")] = True,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Read all data: compare every digest, decode every sample, and name everything that is damaged.

    Exit code: 0 all whole, 4 something is damaged, 2 there is nothing to verify.

    Examples:

        setformer data verify packed/train packed/val --workers 8

        setformer data verify packed/train --no-decode --json
    """
    from dataloaders.packing import verify
    from launch.data import commands

    results = []
    for path in paths:
        if "://" not in path and not any(sign in path for sign in "*{[") and not Path(path).exists():
            raise ConfigError(f"{path} does not exist: name a packed split, shards, a .beton file or an image folder")
        with progress_bar(f"opening {path}", "verifying") as steps:
            try:
                results.append(verify.verify(path, workers, decode, steps.start, steps.advance))
            except DataError as error:  # not even its index is whole, or it is no data
                results.append(verify.unreadable(path, error))
    damaged = commands.show_verified(results, as_json, open_console())
    if damaged:
        raise typer.Exit(_DAMAGED)


@app.command()
def inspect(
    path: PathArgument,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet: a file that ends in .html or .png.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures on the sheet.")] = 64,
    side: Annotated[int, typer.Option(min=1, help="Their longest side in pixels.")] = 192,
    look_at: Annotated[int, typer.Option(min=0, help="Samples whose bytes are read for formats.")] = 2000,
    as_json: AsJson = False,
) -> None:
    """Summarise data: counts, classes, sizes, bytes, formats, duplicates; and show it.

    Examples:

        setformer data inspect packed/train

        setformer data inspect packed/train --sheet train.html --count 100
    """
    from launch.data.sheet import describe

    console = open_console(stderr=as_json)
    found = describe(path, look_at, sheet, count, side, console)
    if as_json:
        print(json.dumps(found))
    if sheet is not None:
        _say(console, f"contact sheet: {sheet}")


@app.command()
def stats(
    path: PathArgument,
    look_at: Annotated[int, typer.Option(min=1, help="Images that are read at most, spread evenly.")] = 1000,
    max_pixels: Annotated[int, typer.Option(min=1, help=_PIXELS_HELP)] = 178_956_970,
    as_json: AsJson = False,
) -> None:
    """Print mean and standard deviation of the bands, as a run config's [data] wants them.

    Examples:

        setformer data stats packed/train
    """
    from dataloaders.packing.finding import open_container
    from dataloaders.packing.statistics import band_statistics

    source = open_container(path)
    try:
        total = min(look_at, source.num_samples)
        with progress_bar(f"opening {path}", "reading images") as steps:
            steps.start(total)
            found = band_statistics(source, look_at, max_pixels, steps.advance)
    finally:
        source.close()
    if as_json:
        print(json.dumps(asdict(found)))
        return
    damaged = f", {found.damaged} damaged ones left out" if found.damaged else ""
    print(f"# {counted(found.images, 'image')} of {source.num_samples:,} in {plain(path)}{damaged}\n[data]")
    print(f'pixels = "{found.pixels}"')
    for name in ("mean", "std"):
        print(f"{name} = [{', '.join(f'{value:.4g}' for value in getattr(found, name))}]")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Packed split, pattern of shards, or .beton file.")],
    dest: Annotated[Path, typer.Argument(help="New or empty folder for shards, or a file *.beton.")],
    raw: RawSide = None,
    workers: Workers = 2,
    force: Force = False,
) -> None:
    """Turn shards into a .beton file, or a .beton file into shards: same order, labels, classes and JPEG bytes.

    Examples:

        setformer data convert packed/train train.beton

        setformer data convert train.beton packed/again

        setformer data convert packed/train train-raw.beton --raw 256
    """
    from dataloaders.packing import convert

    with progress_bar(f"opening {source}", "converting") as steps, _resumes(dest):
        result = convert.convert(source, dest, raw, workers, force, steps.start, steps.advance)
    _report_packing(dest, result)


@app.command()
def bench(
    path: PathArgument,
    image_size: Annotated[int, typer.Option(help="Model input size in pixels.")] = 224,
    randaugment: Annotated[int, typer.Option(help="RandAugment operations per image.")] = 0,
    policy: Annotated[str, typer.Option(help="One operation per image instead: trivialaugment or 3augment.")] = "none",
    threads: Annotated[int, typer.Option(help="Most threads to try; 0 is as many as there are cores.")] = 0,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Measure how fast data loads on this machine, where an image's time goes, and what would help.

    Examples:

        setformer data bench packed/train

        setformer data bench train.beton --image-size 288 --randaugment 2 --threads 8
    """
    from launch.data import commands

    most = threads or len(os.sched_getaffinity(0))
    with progress_bar("measuring", "measuring") as steps:
        found = commands.measure(path, image_size, randaugment, policy, most, seconds, steps.say)
    commands.show_throughput(found, as_json, open_console())


# ------------------------------------------------------------------------------------------------------------------


def _pack_images(source: str, dest: Path, raw: int | None, options: PackOptions) -> None:
    from dataloaders.packing import convert, pack

    if options.tiles and dest.suffix == ".beton":
        raise ConfigError("--tiles makes WebDataset shards, which a .beton file is not: name a folder as destination")
    if raw is not None and dest.suffix != ".beton":
        raise ConfigError("--raw stores pixels, which only a .beton file can hold: name a destination *.beton")
    with progress_bar(f"looking for images in {source}", "packing") as steps, _resumes(dest):
        if dest.suffix == ".beton":
            result: Packed = convert.pack_beton(source, dest, options, raw, steps.start, steps.advance)
        else:
            result = pack.pack_image_folder(source, dest, options, steps.start, steps.advance)
    _report_packing(dest, result)


def _pack_held_out(
    source: str, dest: Path, hold_out: tuple[float, Path], seed: int, raw: int | None, options: PackOptions
) -> None:
    from dataloaders.packing.hold_out import HoldOut, pack_held_out

    share, held_dest = hold_out
    if raw is not None or ".beton" in (dest.suffix, held_dest.suffix):
        raise ConfigError(
            "--hold-out makes shards: name two folders, then make .beton files with `setformer data convert`"
        )
    how = HoldOut(share, seed)
    with progress_bar(f"looking for images in {source}", "packing") as steps, _resumes(dest, held_dest):
        trained, held = pack_held_out(source, dest, held_dest, how, options, steps.start, steps.advance)
    _report_packing(dest, trained)
    _report_packing(held_dest, held, about=f"{held_dest}: ")


@contextmanager
def _resumes(*dests: Path) -> Iterator[None]:
    """Say after Ctrl-C what is kept and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        from dataloaders.packing import pack

        kept = pack.unfinished(*dests)
        print(kept or "nothing was kept", file=sys.stderr)
        raise


def _pack_text(
    source: Path,
    dest: Path,
    split: str | None,
    classes: Path | None,
    length: int,
    force: bool,
) -> None:
    from dataloaders.packing import text

    options = text.TextOptions(length, split, **_class_map(classes), force=force)
    with progress_bar(f"reading {source}", "packing") as steps:
        packed = text.pack_text(source, dest, options, steps.advance)
    _say(
        open_console(),
        f"packed {counted(packed.num_samples, 'text')} of {counted(len(packed.classes), 'class', 'classes')}, at most "
        f"{packed.facts.length} bytes long, in {dest}",
    )


def _class_map(path: Path | None) -> _ClassMap:
    """Return the option by which packing knows a class map: a file of names, or a packed split that has one."""
    if path is not None and path.is_dir():
        return {"classes_file": None, "classes_from": path}
    return {"classes_file": path, "classes_from": None}


def _report_packing(dest: Path, result: Packed, about: str = "") -> None:
    console = open_console()
    for note in result.notes:
        _say(console, f"note: {about}{note}")
    for name, reason in result.rejected:
        _say(console, f"left out: {about}{name}: {reason}")
    if hasattr(result, "index"):
        index = result.index
        mib = sum(shard.size for shard in index.shards) / (1 << 20)
        total = counted(len(index.classes), "class", "classes")
        present = len(index.classes) if index.parts else len(set(index.columns["label"].tolist()))
        classes = total if present == len(index.classes) else f"{present:,} of {total}"
        images, shards = counted(len(index), "image"), counted(len(index.shards), "shard")
        _say(console, f"packed {images} of {classes} into {shards} ({mib:.1f} MiB) in {dest}")
    else:
        mib = dest.stat().st_size / (1 << 20)
        images, classes = counted(result.samples, "image"), counted(len(result.classes), "class", "classes")
        _say(console, f"packed {images} of {classes} ({mib:.1f} MiB) into {dest}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
