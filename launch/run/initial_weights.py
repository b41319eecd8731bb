"""Weights that a new run begins with, for fine-tuning: `model.weights = "PATH"`, `model.skip = ["head."]`.

PATH is a checkpoint of ours (a run's folder, its checkpoints, one step), verified before it is read, or a .safetensors
file as `setformer ckpt export` and timm write it, or a model of a hub ("hf-hub:timm/vit_small_patch16_224.dino").
Weights whose names and shapes do not fit are adapted by timm's rules (timm_weights.py). A classifier of another number
of classes is left as it is drawn, wherever it comes from; what is said of the weights names it. Only parameters are
taken: the optimizer, the schedule, the samples and the average begin again, the average with these weights. A run that
resumes from a checkpoint of its own does not look at PATH any more, nor does anything that reads that checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from checkpoints.reader import Checkpoint, open_checkpoint, read_kept
from dataloaders.sources.files import LARGEST_TABLE
from dataloaders.tokens import TOKENIZER_NAME
from launch.run.objective import TASKS_OF_ENCODERS
from launch.run.timm_weights import HUB, Adapted, adapted, classifiers_of, fetched
from setformer_dist.core import revisions, strictjson
from setformer_dist.core.comm import Collectives
from setformer_dist.core.continuing import flatten
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.files import read_plain
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.metric import Mode, better_weights, mode_by_name
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.words import counted
from setformer_dist.models.detector import CLASSIFIER
from setformer_dist.models.encoded import ENCODER
from setformer_dist.models.segmenter import CLASSIFIERS

# What the names of counters end with, of which batch norms that do not train have no use.
STEPS_OF_NORM = ".num_batches_tracked"

# What the names of a classifier begin with in the models that can be pretrained as encoders.
_HEAD = "head."

_PLACES = "embedding.position"  # what the name of a parameter ends with that has a row for each token of a text

_NAMED = 3  # faults that an error names before it only counts

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names types


@dataclass(frozen=True)
class _Source:
    """Where weights come from.

    Attributes:
        name: for people.
        facts: what must be the same for all ranks; JSON-able.
        shapes: of all that is in it.
        fill: fills fragments of state "param".
        tensors: reads all of it, to adapt it.
        choices: what the weights were trained with (core/revisions.py), as far as it is known.
        encoder: what the names of an encoder begin with that was pretrained within a larger model; "" for a model.
        quantized: names and types of tensors whose numbers are not those that were trained.
        model: name and arguments of the model as its run's config has them; empty where they are not known.
        images: (H, W) of the images that they were trained with; None where that is not known.
        tokenizer: sha256 of the tokenizer of their texts; "" where there is none, or it is not known.
    """

    name: str
    facts: list[object]
    shapes: Mapping[str, tuple[int, ...]]
    fill: Callable[[list[Fragment]], None]
    tensors: Callable[[], Mapping[str, torch.Tensor]]
    choices: Mapping[revisions.Revision, str] = dataclasses.field(default_factory=dict)
    encoder: str = ""
    quantized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)
    images: tuple[int, int] | None = None
    tokenizer: str = ""


@dataclass(frozen=True)
class FirstWeights:
    """Fills a model that is fresh from its seed; the same on all ranks.

    Attributes:
        config: with `weights`.
        shapes: of the model's parameters.
        buffers: names of the model's buffers, which exported files hold too: constants of the architecture.
        comm: all ranks must read the same.
        arguments: of `timm.create_model`, with which weights that do not fit are adapted; None adapts none.
        within: what the names of these parameters begin with in a larger model.
        tokenizer: sha256 of the tokenizer of the run's texts; "" where there is none.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str]
    comm: Collectives
    arguments: Mapping[str, object] | None = None
    within: str = ""
    tokenizer: str = ""

    def __call__(self, fragments: Iterable[Fragment]) -> str:
        """Fill the masters and their average as far as a rank holds them; say what was filled. Collective.

        Raises:
            ConfigError: there is nothing of the kind at the path, or `model.skip` names nothing.
            CheckpointError: it is damaged, or of another model.
        """
        source = _open(self.config.weights or "")
        self._check_tokenizer(source)
        if any(facts != source.facts for facts in self.comm.gather_json(source.facts)):
            raise CheckpointError(
                f"ranks found different weights at model.weights = {self.config.weights}: name one step's folder that "
                "all hosts share"
            )
        self._check_choices(source)
        source, left, report = self._fitted(source)
        filled = [f for f in fragments if f.state in ("param", "ema") and f.name not in left]
        source.fill([dataclasses.replace(f, state="param") for f in filled])
        bad = next((f.name for f in filled if not bool(f.tensor.isfinite().all())), "")
        if bad := next(filter(None, self.comm.gather_json(bad)), ""):
            raise CheckpointError(f"{source.name} hold values in {bad} that are not finite: name other model.weights")
        return report

    def check(self) -> str:
        """Say what would be filled, and fill nothing; raises as a call does."""
        source = _open(self.config.weights or "")
        self._check_tokenizer(source)
        self._check_choices(source)
        return self._fitted(source)[2]

    def _fitted(self, source: _Source) -> tuple[_Source, set[str], str]:
        """Return what fills the parameters, those that it leaves, and what is said of it."""
        if (within := self._within_encoder(source)) is not None:
            return within
        source, new, notes = self._encoder_alone(source)
        notes += self._told_apart(source)
        self._check_skip(source)
        self._check_numbers(source)
        self._check_positions(source)
        self._check_length(source)
        faults = {name: fault for name, fault in self._faults(source).items() if name not in new}
        drawn = new | self._other_classifier(source, faults)
        if faults := {name: fault for name, fault in faults.items() if name not in drawn}:
            source, drawn, more = self._adapted(source, drawn, faults)
            notes += more
        left = drawn | {name for name in self.shapes if name.startswith(self.config.skip or ())}
        if len(left) == len(self.shapes):
            raise ConfigError(
                f"model.skip = {list(self.config.skip or ())} excludes every parameter of model.weights: remove both"
            )
        if left:
            notes.append(f"left as drawn from the seed: {', '.join(f'{self.within}{name}' for name in sorted(left))}")
        notes += self._never_trained(f"{self.within}{name}" for name in left)
        count = f"{len(self.shapes) - len(left)} of {len(self.shapes)} parameters"
        return source, left, "; ".join((f"begins with {source.name}: {count}", *notes))

    def _within_encoder(self, source: _Source) -> tuple[_Source, set[str], str] | None:
        """Return what `_fitted` does, where a source knows the encoder alone of a larger model; else None.

        A run of the same task begins with all of it.
        """
        around = {name for name in self.shapes if not name.startswith(ENCODER)}
        if len(around) == len(self.shapes) or around & source.shapes.keys():
            return None
        self._check_skip(source)
        skip = [prefix.removeprefix(ENCODER) for prefix in self.config.skip or () if prefix.startswith(ENCODER)]
        inner = dataclasses.replace(
            self,
            config=self.config.model_copy(update={"skip": tuple(skip)}),
            shapes={n.removeprefix(ENCODER): s for n, s in self.shapes.items() if n not in around},
            buffers=frozenset(n.removeprefix(ENCODER) for n in self.buffers),
            within=ENCODER,
        )
        alone, _, notes = inner._encoder_alone(source)
        classifiers = tuple(f"{name}." for name in classifiers_of(self.config.name))
        kept = {n: s for n, s in alone.shapes.items() if n in inner.shapes or not n.startswith(classifiers)}
        if len(kept) < len(alone.shapes):
            notes.append("its classifier is left out")
        fitted, left, said = inner._fitted(dataclasses.replace(alone, shapes=kept, encoder=""))

        def fill(fragments: list[Fragment]) -> None:
            fitted.fill([dataclasses.replace(f, name=f.name.removeprefix(ENCODER)) for f in fragments])

        drawn = around | {f"{ENCODER}{name}" for name in left}
        notes.append(f"drawn from the seed: {', '.join(sorted({name.split('.')[0] for name in around}))}")
        notes += self._never_trained(around)
        return dataclasses.replace(fitted, fill=fill), drawn, "; ".join((said, *notes))

    def _never_trained(self, drawn: Iterable[str]) -> list[str]:
        """Return a note where parameters are drawn, by whole names, and do not train either."""
        fixed = sorted(name for name in drawn if name.startswith(self.config.freeze))
        if not fixed:
            return []
        kept = counted(len(fixed), "parameter")
        return [f"warning: model.freeze keeps {kept} of these as drawn, such as {fixed[0]}"]

    def _encoder_alone(self, source: _Source) -> tuple[_Source, set[str], list[str]]:
        """Return a source with the encoder alone where another task pretrained it, the head that it lacks, and a note.

        A run of the pretraining task itself begins with all of it.
        """
        prefix = source.encoder
        if not prefix or any(name.startswith(prefix) for name in self.shapes):
            return source, set(), []
        shapes = {name.removeprefix(prefix): s for name, s in source.shapes.items() if name.startswith(prefix)}

        def fill(fragments: list[Fragment]) -> None:
            source.fill([dataclasses.replace(f, name=f"{prefix}{f.name}") for f in fragments])

        def tensors() -> Mapping[str, torch.Tensor]:
            return {n.removeprefix(prefix): t for n, t in source.tensors().items() if n.startswith(prefix)}

        new = {name for name in self.shapes if name.startswith(_HEAD) and name not in shapes}
        count = len(source.shapes) - len(shapes)
        note = f"of its pretraining, {counted(count, 'parameter')} besides the encoder's are left out"
        return dataclasses.replace(source, shapes=shapes, fill=fill, tensors=tensors), new, [note]

    def _check_choices(self, source: _Source) -> None:
        for revision, ours in revisions.choices_of(self.config.model_dump()).items():
            theirs = source.choices.get(revision, ours)
            if theirs != ours:
                raise CheckpointError(
                    f"model.weights = {self.config.weights}: these were trained with {revision.shown} = {theirs!r}, "
                    f'this run has {ours!r}, which is another function: set model.args.{revision.shown} = "{theirs}"'
                )

    def _check_tokenizer(self, source: _Source) -> None:
        """Refuse weights of other tokens for a run on texts; a model of images may well lie beside a tokenizer."""
        if self.tokenizer and source.tokenizer and source.tokenizer != self.tokenizer:
            raise CheckpointError(
                f"model.weights = {self.config.weights}: these learned tokens of tokenizer {source.tokenizer[:12]}, "
                f"and this run's data are of {self.tokenizer[:12]}: pack the data with theirs (--tokenizer)"
            )

    def _check_positions(self, source: _Source) -> None:
        """Refuse position embeddings whose rows and columns would be taken for others.

        timm takes a grid of another number of positions for square, and one of as many for the model's own.
        """
        size = (self.arguments or {}).get("img_size")
        here = (size, size) if isinstance(size, int) else size
        if source.images is None or not (isinstance(here, list | tuple) and len(here) == 2):
            return
        (rows, columns), (height, width) = source.images, here
        for name, shape in self.shapes.items():
            if "pos_embed" not in name or name not in source.shapes or name.startswith(self.config.skip or ()):
                continue
            known = rows * width == columns * height if source.shapes[name] == shape else rows == columns
            if not known:
                raise CheckpointError(
                    f"model.weights = {self.config.weights}: {name} is of images of {rows} x {columns}, this run's are "
                    f"{height} x {width}, and only those of square images are resized: set data.image_size and "
                    f'data.image_width alike, or draw it from the seed (model.skip = ["{name}"])'
                )

    def _check_length(self, source: _Source) -> None:
        """Refuse places of a text of another number."""
        for name, shape in self.shapes.items():
            there = source.shapes.get(name, shape)
            if name.endswith(_PLACES) and there != shape and not name.startswith(self.config.skip or ()):
                raise CheckpointError(
                    f"model.weights = {self.config.weights}: these know texts of {there[0]} tokens, this run's "
                    f"encoder of {shape[0]}: set model.args.length = {there[0]} (and data.length to at most that), or "
                    f'draw the places from the seed (model.skip = ["{name}"])'
                )

    def _check_skip(self, source: _Source) -> None:
        for prefix in self.config.skip or ():
            if not any(name.startswith(prefix) for name in (*self.shapes, *source.shapes)):
                raise ConfigError(
                    f"model.skip = {list(self.config.skip or ())}: no parameter's name begins with {prefix!r}"
                )

    def _told_apart(self, source: _Source) -> list[str]:
        """Return a note where the weights were trained as another function: strides or epsilon change no shape."""
        if not source.model:
            return []
        mine: Mapping[str, object] = self.config.model_dump(mode="json")
        tables = (
            {"name": model.get("name"), **flatten(_table(model, "args"), "args.")} for model in (source.model, mine)
        )
        theirs, ours = ({key: value for key, value in table.items() if value != {}} for table in tables)
        other = [
            f"model.{key} = {theirs.get(key, 'default')} there and {ours.get(key, 'default')} here"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        return [f"trained as another function: {', '.join(other)}"] if other else []

    def _check_numbers(self, source: _Source) -> None:
        """Refuse quantized weights: without their scales they are other numbers."""
        for name in sorted(source.quantized.keys() & self.shapes.keys()):
            if not name.startswith(self.config.skip or ()):
                raise CheckpointError(
                    f"{source.name} have numbers of type {source.quantized[name]} in {name}, as quantized weights do: "
                    "name weights in fp32, fp16 or bf16"
                )

    def _faults(self, source: _Source) -> dict[str, str]:
        """Return what neither fits nor is skipped, by name."""
        faults = {}
        for name, shape in self.shapes.items():
            there = source.shapes.get(name)
            if there is None:
                faults[name] = f"{name} is not in it"
            elif there != shape:
                faults[name] = f"{name} is {there} there and {shape} here"
        for name in source.shapes.keys() - self.shapes.keys() - self.buffers:
            if not name.endswith(STEPS_OF_NORM):
                faults[name] = f"{name} is not in this model"
        return {name: fault for name, fault in faults.items() if not name.startswith(self.config.skip or ())}

    def _other_classifier(self, source: _Source, faults: Mapping[str, str]) -> set[str]:
        """Return the classifier's parameters that a source has not, or has for another number of classes."""
        heads = (*(f"{name}." for name in classifiers_of(self.config.name)), *CLASSIFIERS, CLASSIFIER)
        mine = {name: self.shapes[name] for name in faults if name in self.shapes and name.startswith(heads)}
        return {name for name, shape in mine.items() if source.shapes.get(name, shape)[1:] == shape[1:]}

    def _adapted(self, source: _Source, free: set[str], faults: dict[str, str]) -> tuple[_Source, set[str], list[str]]:
        """Return the weights adapted by timm's rules, what these leave as drawn, and what is to be said.

        Args:
            source: of the weights.
            free: names of parameters that may be left as drawn.
            faults: what does not fit.

        Raises:
            CheckpointError: there are no rules for this model, or they do not make the weights fit.
        """
        if self.arguments is None:
            raise CheckpointError(self._refusal(source, faults))
        try:
            found = adapted(source.tensors(), self.config.name, self.arguments)
        except CheckpointError as error:
            raise CheckpointError(f"{self._refusal(source, faults)} (timm's rules: {error})") from None
        drawn = {name for name in found.drawn if name in self.shapes}
        missing = {n: faults.get(n, f"{n} is not in it") for n in drawn - free if not n.startswith(found.classifier)}
        missing = {name: fault for name, fault in missing.items() if not name.startswith(self.config.skip or ())}
        if missing:
            raise CheckpointError(self._refusal(source, missing))
        changed = [
            f"{name} {source.shapes[name]} → {shape}"
            for name, shape in self.shapes.items()
            if source.shapes.get(name, shape) != shape
            and name not in drawn
            and not name.startswith(self.config.skip or ())
        ]
        notes = ["resized by timm's rules: " + ", ".join(changed[:_NAMED])] if changed else []
        if found.unused:
            notes.append(f"{len(found.unused)} tensors have no place in the model: {found.unused[0]} …")
        return dataclasses.replace(source, fill=_filler(found)), drawn, notes

    def _refusal(self, source: _Source, faults: Mapping[str, str]) -> str:
        first = "; ".join(list(faults.values())[:_NAMED])
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        modules = {name.rpartition(".")[0] + "." if "." in name else name for name in faults}
        repair = "set model.name and model.args to those that they were trained with"
        if len(modules) <= _NAMED:
            skip = [f"{self.within}{prefix}" for prefix in (*(self.config.skip or ()), *sorted(modules))]
            repair += f", or draw these from the seed (model.skip = {skip})".replace("'", '"')
        return f"model.weights do not fit: {source.name} are of another model ({first}{more}): {repair}"


def _filler(found: Adapted) -> Callable[[list[Fragment]], None]:
    def fill(fragments: list[Fragment]) -> None:
        for fragment in fragments:
            whole = found.tensors[fragment.name].reshape(-1)
            fragment.tensor.detach().copy_(whole[fragment.start : fragment.end])

    return fill


def _open(weights: str) -> _Source:
    if weights.startswith(HUB):
        return dataclasses.replace(_of_file(fetched(weights)), name=f"the weights of {weights}")
    path = Path(weights)
    if (exported := path / "model.safetensors").is_file() and not (path / "checkpoints").is_dir():
        path = exported  # of `setformer ckpt export`, or of the hub
    if path.is_dir():
        return read_kept(path, lambda: _of_checkpoint(open_checkpoint(path)))
    if not path.exists():
        raise ConfigError(
            f"model.weights = {path} does not exist: name a run's folder, an exported one, a .safetensors file, or "
            f"{HUB}OWNER/MODEL"
        )
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"model.weights = {path} is neither a checkpoint's folder nor a .safetensors file, and nothing else is "
            f"read (pickles can run code): convert it first, setformer ckpt convert {path} "
            f"{path.with_suffix('.safetensors')}"
        )
    return _of_file(path)


def better_of(checkpoint: Checkpoint) -> Literal["plain", "ema"]:
    """Return which weights of a checkpoint scored better in its run's last evaluation, as its run measured it."""
    trainer = checkpoint.trainer  # of any version; `launch.run.trained` checks its form, a resume does so too
    run, config = _table(trainer, "run"), _table(trainer, "config")
    scores = {n: float(v) for n, v in _table(run, "evaluation").items() if isinstance(v, int | float)}
    best = _table(config, "checkpoint")
    name = str(best.get("best_metric", "top1"))
    mode: Mode = "min" if best.get("best_mode", mode_by_name(name)) == "min" else "max"
    return better_weights(scores, name, mode) if "ema" in checkpoint.states() else "plain"


def _table(table: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = table.get(key)
    return value if isinstance(value, Mapping) else {}


def _of_checkpoint(checkpoint: Checkpoint) -> _Source:
    averaged = better_of(checkpoint) == "ema"

    def fill(fragments: list[Fragment]) -> None:
        state = "ema" if averaged else "param"
        checkpoint.load_into([dataclasses.replace(f, state=state) for f in fragments])

    kind = "the averaged weights" if averaged else "the weights"
    facts: list[object] = [record.digest for record in checkpoint.manifest.files]
    config = checkpoint.trainer.get("config", {})
    trained = config.get("model") if isinstance(config, dict) else None
    choices = revisions.choices_of(trained) if isinstance(trained, dict) else {}
    task = _table(config, "task").get("name") if isinstance(config, dict) else None
    encoder = ENCODER if task in TASKS_OF_ENCODERS else ""
    name = f"{kind} of {checkpoint.path}"
    tensors = functools.partial(checkpoint.read_full, "ema" if averaged else "param")
    model = trained if isinstance(trained, dict) and isinstance(trained.get("args", {}), dict) else {}
    model = model if isinstance(model.get("name"), str) else {}
    inputs = _table(checkpoint.trainer, "inputs")
    images = _height_and_width(inputs.get("image_size"))
    return _Source(
        name, facts, checkpoint.parameters(), fill, tensors, choices, encoder, model=model, images=images,
        tokenizer=tokenizer_of(inputs),
    )  # fmt: skip


def tokenizer_of(inputs: Mapping[str, object]) -> str:
    """Return the sha256 of the tokenizer that an input spec names; "" for none."""
    name = inputs.get("tokenizer", "")
    return name if isinstance(name, str) else ""


def _height_and_width(size: object) -> tuple[int, int] | None:
    """Return (H, W) of the size of images as a file has it, one number for square ones; None for anything else."""
    match size:
        case int():
            return size, size
        case [int(height), int(width)]:
            return height, width
    return None


def _images_of_export(config: Path) -> tuple[int, int] | None:
    """Return (H, W) of an exported model's images by its config.json; None where it does not say so."""
    try:
        about = strictjson.parse(read_plain(config))
    except (OSError, ValueError):
        return None
    size = _table(about, "pretrained_cfg").get("input_size") if isinstance(about, dict) else None
    return _height_and_width(size[1:]) if isinstance(size, list) else None


def _digest_of(tokenizer: Path) -> str:
    try:
        return hashlib.sha256(read_plain(tokenizer, LARGEST_TABLE)).hexdigest()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer {tokenizer} cannot be read ({error}): export the model again") from None


def _of_file(path: Path) -> _Source:
    def fill(fragments: list[Fragment]) -> None:
        with safe_open(path, "pt") as file:
            for fragment in fragments:
                whole: torch.Tensor = file.get_tensor(fragment.name)
                fragment.tensor.detach().copy_(whole.reshape(-1)[fragment.start : fragment.end])

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"model.weights = {path} is not a complete .safetensors file: {error}") from None
    facts: list[object] = [path.stat().st_size, sorted(shapes)]
    tensors = functools.partial(safetensors.torch.load_file, path)
    encoder = ENCODER if any(name.startswith(ENCODER) for name in shapes) else ""
    quantized = {name: kind for name, kind in kinds.items() if kind not in _FLOATS}
    images = _images_of_export(path.with_name("config.json"))
    tokenizer = _digest_of(path.with_name(TOKENIZER_NAME))
    name = f"the weights of {path}"
    return _Source(
        name, facts, shapes, fill, tensors, encoder=encoder, quantized=quantized, images=images, tokenizer=tokenizer
    )
