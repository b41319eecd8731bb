"""`setformer eval`, `probe` and `predict`: what a trained checkpoint is worth, and what it says of images."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataloaders.pixels.formats import IMAGE_SUFFIXES
from launch.cli.bars import progress_bar
from launch.cli.options import BestOption, ImportOption, ModelPath, WeightsOption
from launch.run.own_code import bring
from setformer_dist.core.errors import DataError
from setformer_dist.core.metric import by_class, headline, title_of_classes, weights_named
from setformer_dist.core.words import plain

if TYPE_CHECKING:
    from launch.run.trained import Prediction

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per image instead of text.")]


def evaluate(
    checkpoint: ModelPath,
    data: Annotated[str | None, typer.Option(help="Folder of packed splits; by default the run's.")] = None,
    split: Annotated[str | None, typer.Option(help="Name of the split; by default the run's validation.")] = None,
    weights: WeightsOption = "auto",
    best: BestOption = False,
    batch: Annotated[int, typer.Option(help="Samples computed at once.")] = 128,
    as_json: AsJson = False,
    imports: ImportOption = None,
) -> None:
    """Evaluate a checkpoint, or an exported model, on a packed split.

    Examples:

        setformer eval runs/demo

        setformer eval runs/demo --best --json

        setformer eval runs/demo/checkpoints/step-00000440 --data runs/demo-data --split val --weights ema

        setformer eval exported --data runs/demo-data
    """
    from launch.run import trained as infer
    from launch.run.exported import load_named

    bring(imports or ())
    trained = load_named(checkpoint, weights_named(weights), best=best)
    opened = infer.open_named_split(trained, data, split)
    if not trained.named:
        said = "names no classes: its outputs are taken for the classes of the data, in their order"
        print(plain(f"{trained.place} {said}"), file=sys.stderr)
    with progress_bar("opening the data", "evaluating") as steps:
        steps.start(opened.num_samples)
        result = infer.evaluate_checkpoint(trained, opened, batch, steps.advance)
    place = str(trained.place)
    if as_json:
        about = {"checkpoint": place, "weights": trained.weights, "samples": result.samples}
        print(json.dumps({**about, "left_out": result.left_out, "metrics": result.figures}))
        return
    left_out = f", {result.left_out} damaged ones left out" if result.left_out else ""
    print(
        f"{place} ({trained.weights} weights): "
        f"{headline(trained.task.metrics, result.figures, everything=True)} on {result.samples} samples{left_out}"
    )
    classes = by_class(result.figures)
    width, title = max(map(len, classes), default=0), title_of_classes(result.figures)
    for name, value in classes.items():
        print(f"  {plain(name):<{width}}  {title} {value:7.2%}")


def probe_features(
    checkpoint: ModelPath,
    data: Annotated[str | None, typer.Option(help="Labelled data; by default the run's.")] = None,
    weights: WeightsOption = "auto",
    neighbours: Annotated[int, typer.Option(min=1, help="Number of nearest neighbours that vote.")] = 20,
    labels: Annotated[float, typer.Option(help="Share of the training labels to use, per class.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the choice of labels.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples computed at once.")] = 128,
    imports: ImportOption = None,
) -> None:
    """Score a model's frozen features by a linear classifier and by nearest neighbours. Both learn from the run's
    training split and are scored on its validation split.

    Examples:

        setformer probe runs/demo

        setformer probe runs/mlm --data data/sst2
    """
    from launch.run import features
    from launch.run import trained as infer
    from launch.run.exported import load_named

    bring(imports or ())
    trained = load_named(checkpoint, weights_named(weights))
    train, val = (
        infer.open_named_split(trained, data, name) for name in (trained.config.data.train, trained.config.data.val)
    )
    found = features.probe(trained, train, val, batch, neighbours, labels, seed)
    print(
        f"{trained.place} ({trained.weights} weights): linear {found.linear:.2%}, {neighbours} nearest "
        f"neighbours {found.neighbours:.2%} on {found.scored} samples of {found.classes} classes, with the labels of "
        f"{found.trained_on}"
    )


def predict(
    checkpoint: ModelPath,
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders whose images are taken.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes or boxes shown per image.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write masks (segmentation) or pictures with boxes (detection) there."),
    ] = None,
    weights: WeightsOption = "auto",
    best: BestOption = False,
    as_json: AsJsonLines = False,
    imports: ImportOption = None,
) -> None:
    """Print the most likely classes of image files; of a segmentation model, the classes of most pixels; of a detector,
    its surest boxes as x0, y0, x1, y1 in pixels (--json: all of them).

    With --out a PNG file is written for each image. Of a segmentation model its values are the classes of the pixels.
    Of a detector it is the image with the boxes of scores from 0.3 on.

    Examples:

        setformer predict runs/demo some/digit.png another/digit.png --top 3

        setformer predict runs/demo some --best --json

        setformer predict runs/camvid street.jpg --out masks

        setformer predict runs/pennfudan street.jpg --out pictures
    """
    from launch.run import trained as infer
    from launch.run.exported import load_named
    from launch.run.picture_files import PictureFolder

    bring(imports or ())
    trained = load_named(checkpoint, weights_named(weights), best=best)
    files = list(_images_of(images))
    pictures = None if out is None else PictureFolder(trained, out, files)
    failed: DataError | None = None
    for found in infer.predict(trained, files, top):
        if isinstance(found, DataError):  # one bad image does not hide the others
            print(f"error: {plain(found)}", file=sys.stderr)
            failed = found
            continue
        if pictures is not None:
            pictures.write(found)
        print(_as_json(found) if as_json else _line(found, top))
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _as_json(found: Prediction) -> str:
    """Return a prediction as a line of JSON; of a detector with all boxes that it found."""
    said: dict[str, object] = {
        "image": os.fsdecode(found.image),
        "classes": dict(zip(found.classes, found.probabilities, strict=True)),
    }
    if found.objects is not None:
        said["objects"] = [{"class": o.name, "score": o.score, "box": o.box} for o in found.objects]
    return json.dumps(said)


def _line(found: Prediction, top: int) -> str:
    """Return a prediction as a line for people; of a detector its surest boxes."""
    if found.objects is None:
        ranked = zip(found.classes, found.probabilities, strict=True)
        said = ", ".join(f"{plain(name)} {share:.1%}" for name, share in ranked)
    else:
        boxes = (f"{plain(o.name)} {o.score:.1%} [{', '.join(f'{x:.0f}' for x in o.box)}]" for o in found.objects[:top])
        said = ", ".join(boxes) or "nothing found"
    return f"{plain(found.image)}: {said}"


def _images_of(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files as they are named, and of folders the images at any depth, in the order of their names.

    A folder without an image comes as it is, so that it is told of as one that cannot be read.
    """
    for path in paths:
        inside = path.rglob("*") if path.is_dir() else ()
        found = sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        yield from found or [path]
