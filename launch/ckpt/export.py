"""`setformer ckpt export`: a folder that plain timm loads, with the preprocessing that the model was trained with.

DEST/model.safetensors   weights in fp32
DEST/config.json         architecture, arguments, and timm's pretrained_cfg: size, mean, std, interpolation, crop,
class names; `timm.create_model("local-dir:DEST", pretrained=True)` reads it, and so does `launch.run.exported`
DEST/README.md           a model card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import timm
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from dataloaders.config import DataConfig
from dataloaders.tokens import TOKENIZER_NAME
from launch.run.exported import OURS
from launch.run.initial_weights import STEPS_OF_NORM, tokenizer_of
from launch.run.inputs import ImageInputs
from launch.run.objective import classified_by_model, kept_of
from launch.run.texts import tokenizer_for
from launch.run.trained import TrainedRun, load_trained
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import check_new
from setformer_dist.core.metric import Weights
from setformer_dist.models.build import timm_arguments
from setformer_dist.tasks.detection import Detection
from setformer_dist.tasks.segmentation import Segmentation

_CARD = """# {name}, step {step}

Weights of `{name}` ({weights}), {elements:,} parameters, trained by setformer_dist and exported from
`{source}`.

| metric | value |
| --- | --- |
{metrics}

## Load

```python
{snippet}
```

The tensors are plain safetensors in fp32; nothing in the file runs code.
{classes}
## Training config

```json
{config}
```
"""

_IMAGES = """import timm
from PIL import Image
{register}
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{result} = model(transform(Image.open("some.jpg").convert("RGB")).unsqueeze(0))
print({said})"""

_DENSE = """import setformer

trained = setformer.load("{folder}")
[found] = setformer.predict(trained, "some.jpg")
{shown}

# Of the encoder alone, as timm has it:
import timm
from safetensors.torch import load_file
{register}
weights = {{k.removeprefix("encoder."): v for k, v in load_file("{folder}/model.safetensors").items()}}
encoder = timm.create_model({name!r}, {arguments}).eval()
encoder.load_state_dict({{k: weights[k] for k in encoder.state_dict()}})"""

_SHOWN = {
    Segmentation: "print(found.classes, found.mask.shape)  # the class of each pixel, a number",
    Detection: "print(found.objects)  # class, score and box of each, the surest first",
}

_TOKENS = """import timm
{register}
model = timm.create_model({name!r}, {arguments}checkpoint_path="model.safetensors").eval()"""

# A function of one's own that makes a model may take no notice of pretrained=True.
_OWN = """import json
import timm
from PIL import Image
{register}
about = json.load(open("{folder}/config.json"))
model = timm.create_model({name!r}, {arguments}checkpoint_path="{folder}/model.safetensors").eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=about["pretrained_cfg"]))
{result} = model(transform(Image.open("some.jpg").convert("RGB")).unsqueeze(0))
print({said})"""

# Of other bands or numbers, and of windows at native scale, which timm's transforms do not prepare.
_OTHERS = """import setformer
{register}
trained = setformer.load("{folder}")  # trained.model is an ordinary torch.nn.Module
"""
_PREDICTED = """for found in setformer.predict(trained, ["some.tif"]):
    print(found.classes, found.probabilities)"""

_REGISTER = "import {module}  # registers the architecture with timm\n"


def export(path: Path, dest: Path, weights: Weights, console: Console, best: bool = False) -> None:
    """Write the weights, timm's config and a model card.

    Args:
        path: a checkpoint, or a folder of several.
        dest: folder to make.
        weights: "plain", "ema", or "auto": what scored better in the run.
        console: where to.
        best: of several checkpoints, the best instead of the newest.

    Raises:
        CheckpointError: nothing there verifies, or it was not written by a run.
        ConfigError: the folder is there already.
    """
    check_new(dest)
    trained = load_trained(path, weights, best=best)
    model = kept_of(trained.model)
    tensors = _apart(model.state_dict()) | _counters_of_norms(model)
    written = ["model.safetensors", "README.md"]
    with made(dest) as folder:
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (folder / "model.safetensors").write_bytes(data)  # save_file would make it readable for its owner alone
        if isinstance(trained.config.data, DataConfig):
            text = json.dumps(_timm_config(trained, trained.config.data), indent=2)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
            written.append("config.json")
        elif tokenizer_of(trained.inputs):
            text = json.dumps(_text_config(trained), indent=2)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
            (folder / TOKENIZER_NAME).write_bytes(tokenizer_for(trained, None).data)
            written += ["config.json", TOKENIZER_NAME]
        (folder / "README.md").write_text(_card(trained, dest), encoding="utf-8", errors="backslashreplace")
    console.print(f"{dest}: {', '.join(sorted(written))}, {trained.weights} weights", highlight=False, markup=False)


def _counters_of_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what batch norms have besides those that do not train: a number of steps, which nothing reads."""
    frozen = [name for name, _ in model.named_parameters() if name.endswith(".running_mean")]
    return {f"{name.removesuffix('.running_mean')}{STEPS_OF_NORM}": torch.tensor(0) for name in frozen}


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of which none is part of another: weights with two names are two in a file, as loaders expect."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.contiguous() if storage not in seen else tensor.clone()
        seen.add(storage)
    return found


def _timm_config(trained: TrainedRun, data: DataConfig) -> dict[str, object]:
    """Return the config.json of timm's hub layout."""
    name = trained.config.model.name
    arguments = ImageInputs(data).model_arguments(trained.config.model, classified_by_model(trained.task))
    default = timm.get_pretrained_cfg(name, allow_unregistered=True)
    kept = default.to_dict() if default is not None else {}
    features = getattr(trained.model, "num_features", None)  # timm's models have it; a model of one's own may not
    same = ("first_conv", "classifier", "fixed_input_size", "pool_size")
    ours: dict[str, object] = {
        "task": trained.config.task.model_dump(mode="json"), "pixels": data.pixels, "crop": data.augment.crop,
        "eval_crop": data.eval_crop, "eval_view": data.eval_view, "bucket_multiple": data.bucket_multiple,
        "eval_longest": data.eval_longest,
    }  # fmt: skip
    if trained.classes != tuple(trained.task.outputs):
        ours["classes"] = list(trained.classes)
    return {
        "architecture": name.split(".")[0],
        "num_classes": len(trained.task.outputs),
        **({"num_features": features} if features is not None else {}),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "label_names": list(trained.task.outputs),
        "pretrained_cfg": {
            **{key: kept[key] for key in same if key in kept},
            "num_classes": len(trained.task.outputs),
            "input_size": [data.bands, *data.shape],
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": data.interpolation,
            "crop_pct": _crop(data),
            "crop_mode": "center",
            "label_names": list(trained.task.outputs),
        },
        OURS: ours,
    }


def _text_config(trained: TrainedRun) -> dict[str, object]:
    """Return the config.json of a model of texts: what `launch.run.exported` builds it from."""
    return {
        "architecture": trained.config.model.name,
        "num_classes": len(trained.task.outputs),
        "model_args": trained.config.model.args,
        "label_names": list(trained.task.outputs),
        OURS: {
            "task": trained.config.task.model_dump(mode="json"),
            "classes": list(trained.classes),
            "inputs": dict(trained.inputs),
        },
    }


def _crop(data: DataConfig) -> float:
    """Return timm's crop_pct. Images that are stored at the image size are taken as they are, which is 1 there.

    Training with crop = "pad" takes no other images; elsewhere what is stored larger is cropped to `eval_crop`.
    """
    return 1.0 if data.augment.crop == "pad" else data.eval_crop


def _card(trained: TrainedRun, dest: Path) -> str:
    checkpoint = trained.checkpoint
    few = 0 < len(trained.task.outputs) <= 1000
    return _CARD.format(
        name=checkpoint.identity.model,
        step=checkpoint.step,
        weights={"ema": "averaged weights"}.get(trained.weights, "plain weights"),
        elements=sum(parameter.numel() for parameter in kept_of(trained.model).parameters()),
        source=f"{checkpoint.path.parent.parent.name}/{checkpoint.path.parent.name}/{checkpoint.path.name}",
        metrics=_metrics_of(trained),
        snippet=_snippet(trained, dest),
        classes=f"\nClasses in order: {', '.join(trained.task.outputs)}.\n" if few else "",
        config=json.dumps(checkpoint.trainer["config"], indent=2),
    )


def _snippet(trained: TrainedRun, dest: Path) -> str:
    """Return a program that loads what is exported, and classifies an image where there are any."""
    config, outputs = trained.config, len(trained.task.outputs)
    home = timm.models.model_entrypoint(config.model.name.split(".")[0]).__module__
    known = home.startswith(("timm.", "setformer_dist."))
    register = "" if home.startswith("timm.") else _REGISTER.format(module="setformer_dist.models" if known else home)
    if isinstance(config.data, DataConfig) and isinstance(trained.task, Segmentation | Detection):
        given = ImageInputs(config.data).model_arguments(config.model, 0)
        return _DENSE.format(
            shown=_SHOWN[type(trained.task)],
            register=register,
            name=config.model.name,
            arguments=_words(given).rstrip(", "),
            folder=dest.name,
        )
    data = config.data
    if not isinstance(data, DataConfig):
        arguments = {**trained.checkpoint.trainer.get("inputs", {}), **timm_arguments(config.model, outputs, 0)}
        return _TOKENS.format(register=register, name=config.model.name, arguments=_words(arguments))
    if data.bands != 3 or data.pixels != "uint8" or data.augment.crop == "window":
        return (_OTHERS + _PREDICTED * bool(outputs)).format(register=register, folder=dest.name).rstrip()
    names = 'model.pretrained_cfg["label_names"]' if known else 'about["label_names"]'
    result, said = ("logits", f"{names}[logits.argmax()]") if outputs else ("features", "features.shape")
    arguments = ImageInputs(data).model_arguments(config.model, outputs)
    template = _IMAGES if known else _OWN
    return template.format(
        register=register, folder=dest.name, name=config.model.name, arguments=_words(arguments), result=result,
        said=said,
    )  # fmt: skip


def _words(arguments: Mapping[str, object]) -> str:
    return "".join(f"{key}={value!r}, " for key, value in arguments.items())


def _metrics_of(trained: TrainedRun) -> str:
    """Return the rows of the exported step's own metrics; an evaluation of an earlier step is said to be one."""
    checkpoint = trained.checkpoint
    if checkpoint.metrics:
        rows = sorted(checkpoint.metrics.items())
        return "\n".join(f"| {key} | {value:.4f} |" for key, value in rows)
    earlier = sorted(checkpoint.trainer["run"]["evaluation"].items())
    lines = [f"| {key}, last evaluation before this step | {value:.4f} |" for key, value in earlier]
    return "\n".join(lines) or "| none | |"


@contextmanager
def made(dest: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to its final name when complete, and removed otherwise.

    Raises:
        ConfigError: it cannot be written.
    """
    dest = dest.absolute()
    aside = dest.with_name(f".{dest.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(dest)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's zip writer raises RuntimeErrors
        raise ConfigError(f"{dest} cannot be written: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
