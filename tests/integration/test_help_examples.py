"""Every example of every `--help` runs as it stands, in a folder that has what it names."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import timm
import torch
import typer.main
from PIL import Image

from launch.cli import main as cli
from launch.testing.commands import ROOT, setformer, train_words
from tests.unit.test_data_slides import write_slide

# What no test has the data or the hours for, and where its command runs instead.
ELSEWHERE = {
    "queue submit demo data.root=runs/demo-data --ranks 2": "tests/unit/test_queue_commands.py",
    "queue ls": "tests/unit/test_queue_commands.py",
    "queue submit digits --sweep set.data.root=runs/demo-data --ranks 2": "tests/unit/test_queue_commands.py",
    'queue drain node3 --why "new memory" --vacate': "tests/unit/test_queue_commands.py",
    "queue serve": "tests/unit/test_queue_commands.py",
    "queue serve --page 8765": "tests/unit/test_queue_page_server.py",
    "queue page 8765": "tests/unit/test_queue_page_server.py",
    "queue submit demo data.root=runs/demo-data --ranks 1:2": "tests/unit/test_queue_commands.py",
    "queue submit imagenet_base --nodes 4 --ranks-per-node 8 --priority 5 --time-limit 2d": (
        "tests/unit/test_queue_commands.py"
    ),
    "queue ls --all": "tests/unit/test_queue_commands.py",
    "queue show 1": "tests/unit/test_queue_commands.py",
    "queue logs 1": "tests/unit/test_queue_commands.py",
    "queue top --once": "tests/unit/test_queue_commands.py",
    "queue events": "tests/unit/test_queue_commands.py",
    "queue cancel 1": "tests/unit/test_queue_commands.py",
    "queue hold 1": "tests/unit/test_queue_commands.py",
    "queue release 1": "tests/unit/test_queue_commands.py",
    "queue move 1 --priority 5": "tests/unit/test_queue_commands.py",
    'queue drain node3 --why "new memory"': "tests/unit/test_queue_commands.py",
    "queue undrain node3": "tests/unit/test_queue_commands.py",
    "queue backup queue-copy.db": "tests/unit/test_queue_commands.py",
    "queue check": "tests/unit/test_queue_commands.py",
    "lra prepare text --source aclImdb": "tests/unit/test_lra_tasks.py",
    "lra prepare pathx --workers 16 --root /data/lra": "tests/unit/test_lra_tasks.py",
    "lra prepare listops": "tests/unit/test_lra_listops.py",
    "lra pathfinder --attention set,softmax --ranks 8 batch.max_micro=64": "tests/integration/test_lra.py",
    "lra listops --short --attention all --ranks 2": "tests/integration/test_lra.py",
    "lra image --attention set,softmax --ranks 8 optim.lr=2e-4": "tests/integration/test_lra.py",
    "lra stats listops": "tests/integration/test_lra.py",
    "lra prepare listops --short": "tests/integration/test_lra.py",
    "lra prepare image --source cifar10/": "tests/integration/test_lra.py",
    "plan imagenet_base --gpus 8,64,512 --batch-per-gpu 128 --json plan.json": "tests/unit/test_plan.py",
    "train demo data.root=runs/demo-data --ray auto --ranks 2": "tests/distributed/test_ray.py",
    "doctor --ray auto": "tests/distributed/test_ray.py",
    "predict runs/camvid street.jpg --out masks": "tests/integration/test_segmentation.py",
    "predict runs/pennfudan street.jpg --out pictures": "tests/integration/test_detection.py",
    "probe runs/mlm --data data/sst2": "tests/integration/test_texts.py",
    **dict.fromkeys(
        (
            "text tokenizer corpus/ tokenizer.json",
            "text pack corpus/train data/corpus/train --tokenizer tokenizer.json",
            "text pack corpus/valid data/corpus/val --like data/corpus/train",
            "train mlm data.root=data/corpus",
            "text tokenizer corpus/ german.json --vocabulary 16000 --cased",
            "text pack sst2/train.tsv data/sst2/train --tokenizer tokenizer.json --text sentence --label label",
            "text pack sst2/dev.tsv data/sst2/val --like data/sst2/train",
            "text pack pairs.csv data/pairs/train --tokenizer tokenizer.json --text a --text b --number score",
            "text show data/sst2/train --samples 3",
            'text predict runs/sst2 "a lovely film" "two hours of nothing"',
            'text predict runs/stsb --pairs "a man plays a flute" "somebody makes music"',
            'text predict runs/mlm "the king and the [MASK] ruled the land"',
            "text predict runs/sst2 --file sentences.txt --json",
        ),
        "tests/integration/test_texts.py",
    ),
    "train --from runs/demo": "tests/integration/test_record.py",
    "runs top runs/demo": "tests/unit/test_live.py",  # of a run that is running
    "demo --ranks 2": "tests/integration/test_train.py",
    "drill --faults 10": "tests/integration/test_drill.py",
    "drill --hosts 3 --faults 100": "tests/integration/test_drill.py",
    "drill --faults 100 --seed 7 --json drill.json": "tests/integration/test_drill.py",
    "sweep configs/sweeps/digits.toml": "tests/integration/test_sweep.py",
    "sweep show runs/sweeps/digits": "tests/integration/test_sweep.py",
    "sweep show runs/sweeps/digits --json": "tests/integration/test_sweep.py",
    "sweep run digits set.data.root=runs/demo-data budget.trials=4": "tests/integration/test_sweep.py",
    "sweep run configs/sweeps/digits.toml --ray auto --wait": "tests/integration/test_sweep.py",
    "sweep ls runs/sweeps": "tests/integration/test_sweep.py",
    "sweep stop runs/sweeps/digits": "tests/integration/test_sweep.py",
    "sweep promote runs/sweeps/digits --best 1 --ranks 2 schedule.epochs=12": "tests/integration/test_sweep.py",
    "sweep promote runs/sweeps/digits --from-start run.name=again": "tests/integration/test_sweep.py",
    "ckpt ls s3://bucket/runs/demo": "tests/faults/test_copy_store.py",
    "ckpt verify s3://bucket/runs/demo": "tests/faults/test_copy_store.py",
    "ckpt fetch s3://bucket/runs/demo fetched": "tests/faults/test_copy_store.py",
    "ckpt fetch s3://bucket/runs/demo/step-00000440-5f0c21aa fetched": "tests/faults/test_copy_store.py",
    "ckpt import elsewhere/output runs/mine/checkpoints --model vit_base_patch16_224": (
        "tests/integration/test_checkpoint_imported.py"
    ),
}
SHORTER = ["~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=2", "run.threads=1", "eval.every_epochs=0",
           "data.augment.crop=resized"]  # fmt: skip


def walk(command: click.Command, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*path, name])


ROOT_COMMAND = typer.main.get_command(cli.app)
COMMANDS = [(path, command) for path, command in walk(ROOT_COMMAND, []) if path]


def examples_of(command: click.Command) -> list[str]:
    """Return the examples of a command without the first word."""
    lines = [line.strip() for line in (command.help or "").splitlines()]
    found = [line.removeprefix("Example: ") for line in lines if line.startswith(("setformer ", "Example: setformer "))]
    return [line.removeprefix("setformer ") for line in found]


EXAMPLES = list(dict.fromkeys(example for _, command in COMMANDS for example in examples_of(command)))


@pytest.mark.parametrize("path", [path for path, c in COMMANDS if not hasattr(c, "commands")], ids=" ".join)
def test_every_command_has_an_example(path: list[str]) -> None:
    command = next(command for known, command in COMMANDS if known == path)
    assert examples_of(command)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_of_the_commands_own_options(example: str) -> None:
    context = click.Context(ROOT_COMMAND)
    command, words = ROOT_COMMAND, shlex.split(example)
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    command.make_context("setformer", words)  # raises for an option or an argument that is not there


def test_what_runs_elsewhere_is_an_example() -> None:
    assert all((ROOT / where).is_file() for where in ELSEWHERE.values())
    assert set(ELSEWHERE) <= set(EXAMPLES)


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _png(value: int, size: int = 16, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, 2 * value % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all that the examples name and do not make themselves."""
    root = tmp_path_factory.mktemp("examples")
    for split in ("train", "val"):
        for digit in "01":
            shutil.copytree(digits / "images" / split / digit, root / "photos" / split / digit)
    _tar(root / "photos.tar.gz", {p.relative_to(root).as_posix().removeprefix("photos/"): p.read_bytes()
                                  for p in (root / "photos").rglob("*.png")})  # fmt: skip
    for place in ("runs/demo-data", "data/cifar10", "data/imagenet"):
        for split in ("train", "val", "images"):
            shutil.copytree(digits / split, root / place / split)
    shutil.copytree(digits / "images" / "val" / "3", root / "some")
    for name, source in (("some/digit.png", 0), ("another/digit.png", 1)):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(sorted((digits / "images" / "val" / "5").iterdir())[source], root / name)
    for folder, suffix, bands in (("aerial", "png", 3), ("sentinel", "tif", 12)):
        pixels = np.arange(40 * 50 * bands).reshape(40, 50, bands)
        (root / folder / "a").mkdir(parents=True)
        if bands == 3:
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / "a" / f"1.{suffix}")
        else:
            tifffile.imwrite(root / folder / "a" / f"1.{suffix}", pixels.astype(np.uint16), planarconfig="contig")
    write_slide(root / "slides" / "a" / "1.svs", aperio=True)
    masks = {f"train/images/{i}.png": _png(i) for i in range(4)}
    masks |= {f"train/annotations/{i}.png": _png(i, mode="L") for i in range(4)}
    _tar(root / "camvid.tar.gz", masks)
    for name, data in masks.items():
        (root / "ade20k" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "ade20k" / name).write_bytes(data)
    (root / "ade20k.txt").write_text("0 -\n1 wall\n2 building\n3 sky\n")
    _coco(root / "coco")
    (root / "sst2").mkdir()
    (root / "sst2" / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"word {i}\t{i % 2}\n" for i in range(20)))
    (root / "imagenet").mkdir()
    for shard in range(1282):
        files = {f"{shard}{i}.{e}": d for i in range(1) for e, d in (("png", _png(i)), ("cls", b"%d" % (shard % 2)))}
        _tar(root / "imagenet" / f"train-{shard:04d}.tar", files)
    (root / "names.txt").write_text("zero\none\n")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    torch.save(vit, root / "vit_small.pth")
    torch.save({"state_dict": vit, "epoch": 3}, root / "checkpoint.pth.tar")
    return root


def _as_elsewhere(exported: Path, output: Path) -> None:
    """Copy a DeepSpeed checkpoint under the tag of the example."""
    shutil.copytree(exported, output)
    tag = next(path for path in output.iterdir() if path.is_dir())
    tag.rename(output / "global_step500")
    (output / "latest").write_text("global_step500")


def _coco(root: Path) -> None:
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(3):
        (root / "train2017" / f"{i}.png").write_bytes(_png(i))
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0} for i in range(3)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in range(3)]
    table = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(table))


def _shortened(words: list[str]) -> list[str]:
    """Return an example's words with what makes it short."""
    if "--workers" in words:  # each would import for seconds
        words[words.index("--workers") + 1] = "0" if words[:2] == ["data", "verify"] else "1"
    if words[0] == "train" and "--dry-run" not in words:
        return [*words, *SHORTER, f"run.name=tried-{len(words)}"]
    if words[:2] == ["doctor", "demo"]:  # the folder of that name holds a run of another config by now
        return [*words, "run.name=tried"]
    if words[:2] == ["data", "bench"]:
        return [*words, "--seconds", "0.1"]
    return words


@pytest.mark.drill
@pytest.mark.timeout(1500)
def test_every_example_runs(place: Path) -> None:
    small = ["schedule.steps=440", "~schedule.epochs", "~schedule.warmup_epochs", "run.log_every=50",
             "model.args.depths=[1,1,1]", "model.args.embed_dim=16", "checkpoint.every_steps=110",
             "batch.global_size=16", "data.workers=0"]  # fmt: skip
    for name in ("demo", "one", "two"):
        steps = small if name == "demo" else [*small, "schedule.steps=2"]
        words = train_words(
            place / "runs" / "demo-data", place / "runs", *steps, "ema.decay=0.9", f"run.name={name}", ranks=1
        )
        ended = setformer(*words, cwd=place)
        assert ended.code == 0, ended.err
    packs = [example for example in EXAMPLES if example.startswith("data pack")]
    others = [example for example in EXAMPLES if example not in packs and example not in ELSEWHERE]
    last = ("eval exported", "data index train.beton")  # what others make comes before what uses it
    order = [*reversed(packs), *sorted(others, key=lambda e: ("prune" in e, e.startswith(last)))]
    assert len(order) > 30
    for example in order:
        if example.startswith("ckpt import") and not (place / "elsewhere").exists():
            _as_elsewhere(place / "for-deepspeed", place / "elsewhere" / "output")
        words = _shortened(shlex.split(example))
        if words[:2] == ["data", "pack"]:
            held = words[words.index("--hold-out") + 2 :][:1] if "--hold-out" in words else []
            for destination in (words[3], *held):
                shutil.rmtree(place / destination, ignore_errors=True)
        ended = setformer(*words, cwd=place)
        assert ended.code == 0, (example, ended.out, ended.err)
