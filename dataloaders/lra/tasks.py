"""The six tasks, full-size and shortened, and how each becomes packed splits train, val and test.

ROOT/listops/{train,val,test}          full size
ROOT/listops-short/{train,val,test}    the shortened task, for CPUs; its figures are not comparable with any paper's
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataloaders.lra import listops, pathfinder, readers
from dataloaders.lra.generating import MakeChunk, accepted_samples
from dataloaders.tokens import TOKENS_NAME, TokenFacts, TokenSample, TokenSplit, open_token_split, write_token_split
from setformer_dist.core.config import nearest
from setformer_dist.core.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")
BYTE_VOCABULARY = 257  # 256 byte or grey values, and padding

OnStart = Callable[[str, int | None], None]
OnSample = Callable[[], None]


@dataclass(frozen=True)
class Preparation:
    """How data are to be prepared.

    Attributes:
        source: folder of the public files, for tasks that are read.
        seed: of what is generated or mixed.
        workers: processes; 0 works in this one. Does not change the data.
        counts: samples of the splits; None is the task's own.
        force: replace what is there.
    """

    source: Path | None = None
    seed: int = 0
    workers: int = 0
    counts: tuple[int, ...] | None = None
    force: bool = False


@dataclass(frozen=True)
class Task:
    """One task at one size.

    Attributes:
        name: as on the command line.
        title: for people.
        facts: classes, vocabulary, length; classes of read data may come from the files.
        counts: samples of train, val and test; None where the files decide.
        generated: the parameters of what is generated, or None for what is read.
        needs: what `--source` must be, or "" for what is generated.
        short: whether it is the shortened task.
    """

    name: str
    title: str
    facts: TokenFacts
    counts: tuple[int, int, int] | None = None
    generated: listops.ListOpsConfig | pathfinder.PathfinderConfig | None = None
    needs: str = ""
    short: bool = False

    @property
    def folder(self) -> str:
        """Name of the task's folder below a root."""
        return f"{self.name}-short" if self.short else self.name


_LISTOPS = TokenFacts("ListOps", listops.CLASSES, listops.TOKENS + 1, 1999)
_IMAGE = TokenFacts("Image", (), BYTE_VOCABULARY, 1024, full=True)
_TEXT = TokenFacts("Text", readers.SENTIMENTS, BYTE_VOCABULARY, 4000)
_RETRIEVAL = TokenFacts("Retrieval", ("unrelated", "related"), BYTE_VOCABULARY, 4000, sequences=2)
_PATHS = TokenFacts("Pathfinder", pathfinder.CLASSES, BYTE_VOCABULARY, 32**2, full=True)

_FULL = (
    Task("listops", "ListOps", _LISTOPS, (96_000, 2_000, 2_000), listops.ListOpsConfig()),
    Task("text", "Text (IMDB, bytes)", _TEXT, needs="the folder aclImdb, or one with train.tsv and test.tsv"),
    Task("retrieval", "Retrieval (AAN, bytes)", _RETRIEVAL, needs="the folder of new_aan_pairs.{train,eval,test}.tsv"),
    Task("image", "Image (grey CIFAR-10)", _IMAGE, (45_000, 5_000, 10_000), needs="the folder of CIFAR-10's images"),
    Task("pathfinder", "Pathfinder", _PATHS, (160_000, 20_000, 20_000), pathfinder.PathfinderConfig()),
    Task("pathx", "Path-X", replace(_PATHS, task="Path-X", length=128**2), (160_000, 20_000, 20_000), pathfinder.PATHX),
)

# Shallow trees; 16 x 16 images; the first bytes of texts; snakes of two dashes in four greys, no distractors.
_SHALLOW = listops.ListOpsConfig(max_depth=4, max_args=5, operator_share=0.4, longer_than=7, shorter_than=65)
_SMALL = pathfinder.PathfinderConfig(
    window=12,
    contour_length=2,
    seed_distance=2.5,
    marker_radius=1.0,
    thickness=1.0,
    contrast=0.6,
    distractors=0,
    levels=4,
)
_SMALL_X = replace(_SMALL, window=24, contour_length=5, seed_distance=5.0, continuity=1.8)


def _shortened(task: Task, length: int, **more: Any) -> Task:
    title = f"{task.title}, short"
    return replace(task, title=title, facts=replace(task.facts, task=title, length=length), short=True, **more)


_COUNTS = (40_000, 2_000, 2_000)
_SHORT = (
    _shortened(_FULL[0], 64, counts=_COUNTS, generated=_SHALLOW),
    _shortened(_FULL[1], 256),
    _shortened(_FULL[2], 256),
    _shortened(_FULL[3], 256),
    _shortened(_FULL[4], 12**2, counts=_COUNTS, generated=_SMALL),
    _shortened(_FULL[5], 24**2, counts=_COUNTS, generated=_SMALL_X),
)

NAMES = tuple(task.name for task in _FULL)


def task_named(name: str, short: bool = False) -> Task:
    """Return a task.

    Raises:
        ConfigError: there is none of this name; the nearest one is named.
    """
    if name not in NAMES:
        raise ConfigError(f"no Long Range Arena task {name!r}: {nearest(name, NAMES)}")
    return (_SHORT if short else _FULL)[NAMES.index(name)]


def open_task(task: Task, root: Path) -> dict[str, TokenSplit]:
    """Open the prepared splits of a task.

    Raises:
        DataError: they are not there, or damaged; the message says how to prepare them.
    """
    missing = [name for name in SPLITS if not (root / task.folder / name / TOKENS_NAME).is_file()]
    if missing:
        words = ["setformer lra prepare", task.name, *(["--short"] if task.short else []), f"--root {root}"]
        source = f" --source FOLDER, {task.needs}" if task.needs else ""
        raise DataError(
            f"{root / task.folder} holds no packed {', '.join(missing)}: make it with `{' '.join(words)}`{source}"
        )
    return {name: open_token_split(root / task.folder / name) for name in SPLITS}


def prepare(
    task: Task,
    root: Path,
    how: Preparation,
    on_start: OnStart = lambda split, total: None,
    on_sample: OnSample = lambda: None,
) -> dict[str, TokenSplit]:
    """Generate or read a task and pack its splits; what is there already and is the same is kept.

    Args:
        task: which.
        root: folder of all tasks.
        how: source, seed, workers.
        on_start: called with the name of each split and its number of samples, where known, before it is made.
        on_sample: called for each sample packed.

    Raises:
        DataError: the source is missing or not of the format, the destination is in use, or, without `how.force`,
            it holds the task of another seed or other parameters.
    """
    if task.needs and how.source is None:
        raise DataError(f"{task.title} is read from public files: give --source, {task.needs}")
    folder = root / task.folder
    if not how.force and all((folder / name / TOKENS_NAME).is_file() for name in SPLITS):
        return _same(open_task(task, root), task, how, folder)
    for name in SPLITS:  # or splits of two seeds would stand side by side if this process died in between
        (folder / name / TOKENS_NAME).unlink(missing_ok=True)
    made = {}
    for part in _parts(task, how):
        on_start(part.split, part.count)
        samples = itertools.islice(part.samples, part.count)
        made[part.split] = write_token_split(
            folder / part.split, part.facts, _counted(samples, on_sample), part.options, force=True
        )
        found = made[part.split].num_samples
        if part.count is not None and found != part.count:
            raise DataError(f"{task.title} has {found} samples for {part.split} where {part.count} are needed")
    return made


def _same(splits: dict[str, TokenSplit], task: Task, how: Preparation, folder: Path) -> dict[str, TokenSplit]:
    """Return the splits that are there if they are what would be made now, judged by the options.

    Raises:
        DataError: they are not; the first difference is named.
    """
    counts = how.counts or (task.counts if task.generated else None) or (None,) * len(SPLITS)
    for (name, split), count in zip(splits.items(), counts, strict=True):
        asked: dict[str, Any] = {"length": task.facts.length}
        there: dict[str, Any] = {"length": split.facts.length}
        if task.generated is not None:
            asked |= {"seed": how.seed, **task.generated.as_json()}
            there |= {"seed": split.options.get("seed"), **split.options.get("generator", {})}
        elif task.name == "image":
            asked["seed"], there["seed"] = how.seed, split.options.get("seed")
        if count is not None:
            asked["samples"], there["samples"] = count, split.num_samples
        differing = [key for key, value in asked.items() if there.get(key) != value]
        if differing:
            key = differing[0]
            raise DataError(
                f"{folder} holds {task.title} with {key} = {there.get(key)} in {name}, not {asked[key]}: give --force "
                "to make it again, or another --root"
            )
    return splits


def _counted(samples: Iterable[TokenSample], on_sample: OnSample) -> Iterator[TokenSample]:
    for sample in samples:
        on_sample()
        yield sample


@dataclass(frozen=True)
class _Part:
    """A split to be packed: its samples are the first `count` of the iterator, all with None."""

    split: str
    count: int | None
    facts: TokenFacts
    samples: Iterator[TokenSample]
    options: Callable[[], dict[str, Any]] = field(default=dict)


def _parts(task: Task, how: Preparation) -> Iterator[_Part]:
    """Yield the splits in the order in which they must be made."""
    if task.generated is not None:
        yield from _generated(task, how)
        return
    assert how.source is not None
    if not how.source.is_dir():
        raise DataError(f"source {how.source} is no folder: give --source, {task.needs}")
    read = {"text": _text, "retrieval": _retrieval, "image": _image}[task.name]
    yield from read(task, how, how.source)


def _generated(task: Task, how: Preparation) -> Iterator[_Part]:
    """The splits follow one another in the order of the samples, so no sample is in two of them."""
    config = task.generated
    assert config is not None
    assert task.counts is not None
    make: MakeChunk
    if isinstance(config, listops.ListOpsConfig):
        make, chunk = listops.chunk_maker(config, how.seed), listops.CHUNK
    else:
        make, chunk = pathfinder.chunk_maker(config, how.seed), pathfinder.CHUNK
    stream = accepted_samples(make, chunk, how.workers)
    candidates = 0

    def samples() -> Iterator[TokenSample]:
        nonlocal candidates
        for sample in stream:
            candidates = sample.candidate + 1
            yield TokenSample((sample.tokens,), sample.label)

    source = samples()
    for split, count in zip(SPLITS, how.counts or task.counts, strict=True):
        begun = candidates
        yield _Part(
            split,
            count,
            task.facts,
            source,
            lambda begun=begun: {  # type: ignore[misc]
                "seed": how.seed,
                "generator": config.as_json(),
                "candidates": candidates - begun,
            },
        )
    stream.close()  # ends the processes


def _text(task: Task, how: Preparation, source: Path) -> Iterator[_Part]:
    """IMDB has no validation split: the test split serves as one (Tay et al.)."""
    for split, name in (("train", "train"), ("val", "test"), ("test", "test")):
        yield _Part(split, None, task.facts, readers.texts(source, name), lambda: {"source": "text files"})


def _retrieval(task: Task, how: Preparation, source: Path) -> Iterator[_Part]:
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test")):
        yield _Part(split, None, task.facts, readers.pairs(source, name), lambda: {"source": "pairs of documents"})


def _image(task: Task, how: Preparation, source: Path) -> Iterator[_Part]:
    """The last tenth of the training images, mixed by the seed, are for validation."""
    assert task.counts is not None
    side = int(task.facts.length**0.5)
    train, test = (readers.GreyImages(source, split, side) for split in ("train", "test"))
    if train.classes != test.classes:
        raise DataError(f"source {source}: the classes of train and test differ: {train.classes} and {test.classes}")
    facts = replace(task.facts, classes=train.classes)
    held_out = len(train) // 10
    counts = how.counts or (len(train) - held_out, held_out, len(test))
    samples = train.samples(how.seed)
    options = {"seed": how.seed}
    yield _Part("train", counts[0], facts, samples, lambda: options)
    yield _Part("val", counts[1], facts, samples, lambda: options)
    yield _Part("test", counts[2], facts, test.samples(how.seed), lambda: options)
