"""What `setformer data inspect` shows: a table in the terminal, JSON, or a contact sheet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from dataloaders.packing.finding import open_container
from dataloaders.packing.inspection import Inspection, Picture, Spread, inspect, pictures
from dataloaders.pixels.colours import colour
from dataloaders.tokens import TOKENS_NAME, TokenSplit, open_token_split
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.terminal import open_table
from setformer_dist.core.words import counted, plain
from setformer_dist.report.sheet import Cell, ClassBar, Sheet, write_html, write_png

# Classes named in the terminal at either end of the balance, and on the sheet.
_NAMED, _BARS = 5, 40


def describe(path: str, look_at: int, sheet: Path | None, count: int, side: int, console: Console) -> dict[str, object]:
    """Inspect data, write the sheet if one is wanted, and return all as plain values.

    Raises:
        ConfigError: the sheet's name ends in neither .html nor .png.
        DataError: the data cannot be opened.
    """
    if sheet is not None and sheet.suffix.lower() not in (".html", ".png"):
        raise ConfigError(f"--sheet {sheet} must end in .html or .png")
    if (Path(path) / TOKENS_NAME).is_file():
        return _describe_tokens(open_token_split(Path(path)), sheet, console)
    source = open_container(path)
    try:
        found = inspect(source, look_at)
        if sheet is not None:
            page = _sheet(found, pictures(source, count, side), side)
            (write_html if sheet.suffix.lower() == ".html" else write_png)(page, sheet)
    finally:
        source.close()
    _show(found, console)
    return {**asdict(found), "counts": found.counts.tolist()}


def _describe_tokens(split: TokenSplit, sheet: Path | None, console: Console) -> dict[str, object]:
    if sheet is not None:
        raise ConfigError(f"--sheet shows images, and {split.folder} holds token sequences")
    lengths = split.lengths
    everything = np.arange(split.num_samples)
    counts = np.bincount(split.labels(everything).numpy(), minlength=len(split.classes))[: len(split.classes)]
    numbers = split.numbers(everything)
    what = "none"
    if split.classes:
        what = ", ".join(f"{plain(name)} {count:,}" for name, count in zip(split.classes, counts.tolist(), strict=True))
    elif numbers is not None:
        what = f"none, but numbers from {float(numbers.min()):g} to {float(numbers.max()):g}"
    table = open_table("", "", show_header=False, box=None, pad_edge=False)
    for label, value in [
        ("data", str(split.folder)),
        ("samples", f"{split.num_samples:,} token sequences ({split.facts.task})"),
        ("classes", what),
        ("tokens", f"{int(lengths.min()):,} to {int(lengths.max()):,}, median {np.median(lengths):,.0f}"),
        ("vocabulary", f"{split.facts.vocabulary:,}"),
    ]:
        table.add_row(label, value)
    console.print(table, markup=False, highlight=False)
    return {
        "name": str(split.folder),
        "samples": split.num_samples,
        "classes": split.classes,
        "counts": counts.tolist(),
    }


def _show(found: Inspection, console: Console) -> None:
    table = open_table("", "", show_header=False, box=None, pad_edge=False)
    for label, value in [("data", found.name), *_facts(found)]:
        table.add_row(label, value)
    console.print(table, markup=False, highlight=False)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    facts = [
        ("samples", f"{found.samples:,}{_in_shards(found)}"),
        ("classes", _classes(found)),
        ("balance", _balance(found)),
        ("height", _range(found.height, " pixels")),
        ("width", _range(found.width, " pixels")),
        ("megapixels", _range(found.megapixels, "")),
        ("image bytes", _bytes(found)),
        ("formats", ", ".join(f"{name} {count:,}" for name, count in found.formats.items()) + _of(found)),
        ("duplicates", _duplicates(found)),
    ]
    if found.parts:
        facts.insert(2, ("besides", ", ".join(found.parts)))
    if found.shared_keys:
        facts.append(("same keys", f"{counted(found.shared_keys, 'sample')}, the first {found.first_shared_key}"))
    if found.damaged:
        facts.append(("damaged", f"{found.damaged:,}{_of(found)}: name them with `setformer data verify`"))
    return facts


def _in_shards(found: Inspection) -> str:
    return f" in {counted(found.shards, found.shard_kind)}" if found.shards > 1 else ""


def _of(found: Inspection) -> str:
    return f" (of {found.looked_at:,} looked at)" if found.looked_at < found.samples else ""


def _classes(found: Inspection) -> str:
    names = ", ".join(map(plain, found.classes[:_NAMED])) + (" …" if len(found.classes) > _NAMED else "")
    return f"{len(found.classes):,}: {names}"


def _balance(found: Inspection) -> str:
    counts = found.counts
    order = np.argsort(-counts, kind="stable")
    most, least = int(order[0]), int(order[-1])
    total = max(int(counts.sum()), 1)
    empty = int((counts == 0).sum())
    if counts[most] == counts[least]:
        return f"{counts[most]:,} {found.counted} of each class"
    fewest, most_of = (
        f"{counts[which]:,} ({plain(found.classes[which])}, {counts[which] / total:.1%})" for which in (least, most)
    )
    text = f"{found.counted} per class from {fewest} to {most_of}"
    text += f"; {empty} {'class has' if empty == 1 else 'classes have'} none" if empty else ""
    return text + (_of(found) if found.counted != "images" else "")


def _range(spread: Spread, unit: str) -> str:
    low, middle, high = (f"{value:,.3g}" if value < 10 else f"{value:,.0f}" for value in vars(spread).values())
    if spread.smallest == spread.largest:
        return f"all {low}{unit}"
    return f"{low} to {high}{unit}, median {middle}"


def _bytes(found: Inspection) -> str:
    about = "" if found.image_bytes_exact else "about "
    mean = found.image_bytes / found.samples
    return f"{about}{size_text(found.image_bytes)}, {size_text(mean)} per image"


def size_text(count: float) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _duplicates(found: Inspection) -> str:
    of = "" if found.duplicates_of == found.samples else f" among {found.duplicates_of:,} looked at"
    if not found.duplicate_samples:
        return f"none{of}"
    first = " = ".join(found.duplicates[0][:3])
    return f"{counted(found.duplicate_samples, 'sample equals', 'samples equal')} an earlier one{of}, such as {first}"


def _named(item: Picture) -> tuple[str, str]:
    """Return a picture's name and what else to say: packing puts a number before each key."""
    number, dash, rest = item.key.partition("-")
    sides = f"{item.size[1]} × {item.size[0]}"
    if dash and len(number) == 9 and number.isdigit():
        return rest, f"no. {int(number)} · {sides}"
    return item.key, sides


def _sheet(found: Inspection, shown: list[Picture], side: int) -> Sheet:
    mean = found.image_bytes / found.samples
    order = np.argsort(-found.counts, kind="stable")[:_BARS].tolist()
    most = max(int(found.counts.max()), 1)
    total = max(int(found.counts.sum()), 1)
    coloured = found.counted != "images"
    balanced = not coloured and int(found.counts.min()) == most
    hidden = len(found.classes) - len(order)
    bars = [
        ClassBar(
            found.classes[label],
            f"{found.counts[label]:,}" if found.counted != "pixels" else f"{found.counts[label] / total:.1%}",
            float(found.counts[label]) / most,
            "#{:02x}{:02x}{:02x}".format(*colour(label)) if coloured else "",
        )
        for label in order
    ]
    return Sheet(
        title=Path(found.name).name or found.name,
        lead=(
            f"{counted(found.samples, 'image')} of {counted(len(found.classes), 'class', 'classes')}, {len(shown)} of "
            "them below, spread evenly."
        ),
        tiles=[
            (f"{found.samples:,}", "images"),
            (f"{len(found.classes):,}", "classes"),
            (size_text(found.image_bytes), "of images"),
            (size_text(mean), "per image"),
            (f"{found.width.median:,.0f} × {found.height.median:,.0f}", "median size"),
            (f"{found.megapixels.median:,.3g}", "median megapixels"),
        ],
        bars=[] if balanced and hidden else bars,
        bars_title=f"Classes by {found.counted}" + (_of(found) if coloured else ""),
        bars_note=f"and {hidden} more {'class' if hidden == 1 else 'classes'}, down to {found.counts.min():,}"
        if hidden
        else "",
        facts=_facts(found),
        cells=[Cell(item.pixels, item.caption, *_named(item), item.damage) for item in shown],
        side=side,
    )
