"""Use what a run has trained, in one process: evaluate on a split, predict for images or texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launch.run import texts as language
from launch.run import trained as runs
from launch.run.exported import load_named
from launch.run.own_code import bring
from launch.run.own_model import OwnModel
from launch.run.texts import TextPrediction, tokenizer_for
from launch.run.trained import Prediction, Trained
from setformer_dist.core.errors import DataError
from setformer_dist.core.metric import weights_named
from setformer_dist.engine.evaluate import EvalResult


def load(
    path: str | Path,
    weights: str = "auto",
    *,
    model: OwnModel | None = None,
    imports: Iterable[str] = (),
    best: bool = False,
) -> Trained:
    """Load the model of a checkpoint, verified, or an exported model, in fp32 on the CPU.

    A checkpoint contains no code. If the run used your own code, pass it again: modules by `imports` (or import them
    before), a model that was passed as an object by `model`.

    Args:
        path: a run's folder (its newest checkpoint that verifies), its checkpoints folder, one step's folder, or the
            folder of an exported model, ours or timm's.
        weights: "plain", "ema", or "auto": those that scored better in the run.
        model: as `Training`; a copy is filled.
        imports: modules to import first.
        best: of a run, take the checkpoint that scored best (`checkpoint.best_metric`), not the newest.

    Returns:
        `model` (an `nn.Module` in evaluation mode), `classes`, `config`, `task`, and `probabilities(images)`, which
        takes (k, 3, S, S) uint8 and returns (k, outputs) float32.

    Raises:
        CheckpointError: nothing there verifies, or its model cannot be built without code of the user's own.
        ConfigError: `weights` is none of the three, or a module cannot be imported.
    """
    bring(imports)
    if model is not None:
        return runs.load_trained(Path(path), weights_named(weights), own=model, best=best)
    return load_named(Path(path), weights_named(weights), best)


def evaluate(
    trained: Trained, data: str | Path | None = None, split: str | None = None, batch: int = 128
) -> EvalResult:
    """Evaluate a model on a split, each sample once.

    Args:
        trained: from `load`.
        data: folder or URL of packed splits; None takes the run's own folder.
        split: its name below `data`; None takes the run's validation split.
        batch: samples computed at once.

    Returns:
        `figures` (the task's metrics by name), `samples` (that count), `left_out` (damaged ones).

    Raises:
        DataError: the split is missing or damaged, or has other classes than the model.
    """
    root = str(data) if data is not None else None
    return runs.evaluate_checkpoint(trained, runs.open_named_split(trained, root, split), batch)


def predict(trained: Trained, images: str | Path | Iterable[str | Path], top: int = 3) -> list[Prediction]:
    """Classify image files.

    Args:
        trained: from `load`, of a run on images.
        images: files, or one file.
        top: classes for each image.

    Returns:
        For each image `image`, `classes` and `probabilities`, the most likely first.

    Raises:
        DataError: a file cannot be read, or is no image.
        ConfigError: the model does not take images.
    """
    found = []
    files = [images] if isinstance(images, str | Path) else images
    for prediction in runs.predict(trained, map(Path, files), top):
        if isinstance(prediction, DataError):
            raise prediction
        found.append(prediction)
    return found


def predict_texts(
    trained: Trained,
    texts: str | Iterable[str | tuple[str, str]],
    top: int = 3,
    tokenizer: str | Path | None = None,
) -> list[TextPrediction]:
    """Say what a model of texts makes of some.

    Args:
        trained: from `load`, of a run on texts.
        texts: one, or several; the two of a pair in a tuple. "[MASK]" in a text is a hidden token.
        top: classes, or tokens for a hidden one.
        tokenizer: tokenizer.json of the model's data, where it is not beside the model.

    Returns:
        For each text `classes` and `probabilities`, or `value`, or `fillings`.

    Raises:
        DataError: a text is empty, or has no hidden token where the model names them.
        ConfigError: the model is of no texts, or its tokenizer is not found.
    """
    given = [texts] if isinstance(texts, str) else texts
    samples = [(text,) if isinstance(text, str) else text for text in given]
    found = tokenizer_for(trained, None if tokenizer is None else Path(tokenizer))
    return list(language.predict_texts(trained, found, samples, top))
