"""What `setformer ckpt verify | diff | export | import | prune` do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from checkpoints import deepspeed_files, layout
from checkpoints.commit import delete_checkpoint
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity, digest_shapes
from checkpoints.manager import CheckpointManager
from checkpoints.manifest import read_manifest
from checkpoints.policy import steps_to_delete
from checkpoints.reader import (
    Checkpoint,
    candidates,
    checkpoints_folder,
    list_checkpoints,
    open_checkpoint,
    verified,
)
from launch.ckpt.export import check_free, made
from launch.ranks.lock import held
from launch.run.trained import load_trained
from setformer_dist.core import config as base
from setformer_dist.core.comm import Alone
from setformer_dist.core.continuing import flatten
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.files import read_state
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.terminal import open_console, open_table

# verify


def verify(path: Path, console: Console, as_json: bool = False) -> int:
    """Read every byte of one checkpoint, or of all of a run; print what is wrong; return how many do not verify.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    single = layout.step_of(path) is not None or (path / layout.MANIFEST).exists()
    folders = [path] if single else layout.step_folders(checkpoints_folder(path))
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoints: name a run's folder, such as runs/demo")
    answers: list[dict[str, Any]] = []
    total = sum(_bytes_of(folder) for folder in folders)
    began = time.perf_counter()
    with _progress(console, "verify", total, as_json) as advance:
        for folder in folders:
            try:
                verified(folder, workers=len(os.sched_getaffinity(0)), advance=advance)
                answers.append({"path": str(folder), "fault": None})
            except CheckpointError as error:
                answers.append({"path": str(folder), "fault": str(error)})
    seconds = time.perf_counter() - began
    if as_json:
        print(json.dumps({"checkpoints": answers, "bytes": total, "seconds": seconds}, indent=2))
    else:
        for answer in answers:
            console.print(f"{answer['path']}: {answer['fault'] or 'verifies'}", highlight=False, markup=False)
        console.print(
            f"{total / 2**20:.1f} MiB in {seconds:.2f} s, {total / seconds / 1e9:.2f} GB/s",
            highlight=False,
            markup=False,
        )
    return sum(answer["fault"] is not None for answer in answers)


def _bytes_of(folder: Path) -> int:
    try:
        return read_manifest(folder).size
    except CheckpointError:
        return 0


@contextmanager
def _progress(console: Console, what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, console=open_console(stderr=True, quiet=quiet or console.quiet), transient=True
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


# diff


def diff(first: Path, second: Path, state: str, console: Console, as_json: bool = False) -> bool:
    """Print in what two checkpoints differ; return whether they do.

    Args:
        first: a checkpoint.
        second: another.
        state: which state of the parameters to compare, such as "param" or "ema".
        console: where to.
        as_json: print JSON instead.

    Raises:
        CheckpointError: one does not verify, or does not hold the state.
    """
    a, b = open_checkpoint(first), open_checkpoint(second)
    shapes_a, shapes_b = a.parameters(), b.parameters()
    both = [name for name, shape in shapes_a.items() if shapes_b.get(name) == shape]
    found: dict[str, Any] = {
        "steps": [a.step, b.step],
        "only_first": sorted({*shapes_a} - {*shapes_b}),
        "only_second": sorted({*shapes_b} - {*shapes_a}),
        "shapes": {n: [shapes_a[n], shapes_b[n]] for n in shapes_a if n in shapes_b and n not in both},
        "parameters": _distances(a, b, both, state),
        "metrics": _differing(a.metrics, b.metrics),
        "config": _differing(_config_of(a), _config_of(b)),
    }
    different = any(found[key] for key in found if key != "steps")
    if as_json:
        print(json.dumps(found, indent=2))
        return different
    for key in ("only_first", "only_second"):
        if found[key]:
            console.print(f"{key.replace('_', ' in the ')}: {', '.join(found[key])}", highlight=False, markup=False)
    table = open_table("what", str(a.path), str(b.path))
    for group in ("shapes", "metrics", "config"):
        for key, (left, right) in found[group].items():
            table.add_row(key, str(left), str(right))
    if table.row_count:
        console.print(table)
    distances = open_table(f"{state} of", "largest difference", "relative to the largest value")
    for name, (absolute, relative) in found["parameters"].items():
        distances.add_row(name, f"{absolute:.3e}", f"{relative:.3e}")
    if distances.row_count:
        console.print(distances)
    same = len(both) - len(found["parameters"])
    console.print(f"{same} of {len(both)} common parameters are the same bit by bit", highlight=False, markup=False)
    return different


def _distances(a: Checkpoint, b: Checkpoint, names: list[str], state: str) -> dict[str, tuple[float, float]]:
    """Return the largest absolute difference, and that over the largest magnitude, of parameters that differ."""
    others = dict(b.iterate_full(state))
    found = {}
    for name, tensor in a.iterate_full(state):
        if name not in names or torch.equal(tensor, others[name]):
            continue
        largest = float((tensor - others[name]).abs().max())
        found[name] = (largest, largest / max(float(tensor.abs().max()), 1e-38))
    return found


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config of the run that wrote a checkpoint, flat; nothing where it holds none."""
    config = checkpoint.trainer.get("config")
    return flatten(config) if isinstance(config, dict) else {}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


# export and import


def export_deepspeed(path: Path, dest: Path, console: Console) -> None:
    """Write a directory that DeepSpeed's zero_to_fp32.py reads: fp32 masters and Adam's states.

    Raises:
        CheckpointError: nothing there verifies.
        ConfigError: the folder is there already.
    """
    check_free(dest)
    checkpoint = open_checkpoint(path)
    there = checkpoint.states()
    wanted = [state for state in ("param", "exp_avg", "exp_avg_sq") if state in there]
    whole: dict[str, dict[str, torch.Tensor]] = {state: checkpoint.read_full(state) for state in wanted}
    names, options = _as_trained(path, checkpoint)
    states = {state: {name: tensors[name] for name in names} for state, tensors in whole.items()}
    updates = checkpoint.trainer.get("optimizer_steps")
    with made(dest) as folder:
        tag = deepspeed_files.write(
            folder,
            checkpoint.step,
            states,
            updates=updates if isinstance(updates, int) and 0 <= updates <= checkpoint.step else None,
            hyperparameters=options,
        )
        ordered = _holds_model(checkpoint)
        (folder / "README.md").write_text(_FOR_DEEPSPEED[ordered], encoding="utf-8")
    console.print(
        f"{dest / tag.name}: {', '.join(states)} of {len(states['param'])} parameters", highlight=False, markup=False
    )


_FOR_DEEPSPEED = {
    True: """# Written by setformer ckpt export --deepspeed

fp32 weights and Adam's states as DeepSpeed's ZeRO stage 2 on one rank keeps them.

* `zero_to_fp32.py` makes a state_dict of it.
* `engine.load_checkpoint` goes on from it on one rank, fp32, stage 1 or 2, with one group of parameters, those of
  `model.parameters()` in their order. With other groups (without decay for norms and biases, say) DeepSpeed would cut
  the flat vectors elsewhere and say nothing: there take the weights alone, by `load_module_only=True`.
* On other ranks or stages: `load_module_only=True`.
""",
    False: """# Written by setformer ckpt export --deepspeed

fp32 weights and Adam's states, for `zero_to_fp32.py` and `engine.load_checkpoint(..., load_module_only=True)`. The
checkpoint was imported and holds no config, so the order of the model's parameters is not known, and
`load_checkpoint` with the optimizer's states would put them at wrong places.
""",
}


def _holds_model(checkpoint: Checkpoint) -> bool:
    config = checkpoint.trainer.get("config")
    return isinstance(config, dict) and "model" in config


def _as_trained(path: Path, checkpoint: Checkpoint) -> tuple[list[str], dict[str, Any]]:
    """Return the parameters' names in the model's order, and what the optimizer was set to, as far as is known."""
    if not _holds_model(checkpoint):
        return list(checkpoint.parameters()), {}
    trained = load_trained(path, "plain")
    optim = trained.config.optim
    options = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }
    return [name for name, _ in trained.model.named_parameters()], options


def import_deepspeed(source: Path, dest: Path, model: str, trust_pickle: bool, console: Console) -> None:
    """Write what DeepSpeed's `save_checkpoint` left as one of our checkpoints.

    Args:
        source: DeepSpeed's directory, or one tag's folder in it.
        dest: folder in which the step's folder is made.
        model: name noted in the manifest.
        trust_pickle: see `checkpoints.deepspeed_files.read`.
        console: where to.

    Raises:
        CheckpointError: the directory cannot be read, or the result not written.
        ConfigError: a checkpoint of this step is there already.
        LaunchError: a run trains in the folder.
    """
    if dest.exists() and not dest.is_dir():
        raise ConfigError(f"{dest} is a file: name the folder in which the step's folder is made")
    found = deepspeed_files.read(source, trust_pickle)
    fragments = [
        Fragment(name, state, 0, tuple(tensor.shape), tensor.reshape(-1))
        for state, tensors in found.states.items()
        for name, tensor in tensors.items()
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in found.states["param"].items()}
    identity = Identity(model=model, parameters=digest_shapes(shapes), stage=found.stage)
    trainer = {
        "imported": {"from": "deepspeed", "ranks": found.world_size, "stage": found.stage},
        "optimizer_steps": found.updates,
        "loss_scale": {},
    }
    manager = CheckpointManager(dest, Alone(), CheckpointConfig(keep_last=1_000_000))
    with ExitStack() as stack:
        if dest.name == "checkpoints":  # of a run, which may be training there
            stack.enter_context(held(dest.parent, Alone(), patience_s=0))
        if (there := layout.step_folder(dest, found.steps)).exists():
            raise ConfigError(f"{there} is there already: move it away, or name another folder")
        path = manager.save(found.steps, fragments, trainer, identity, {}, tags=("imported",))
    console.print(
        f"{path}: {', '.join(found.states)} of {len(shapes)} parameters, from ZeRO stage {found.stage} on "
        f"{found.world_size} ranks",
        highlight=False,
    )


# prune


def prune(path: Path, changes: dict[str, int], dry_run: bool, console: Console) -> None:
    """Delete what retention lets go, now.

    The newest checkpoint that verifies, all its bytes read, stays in any case, and so does what is newer than it.

    Args:
        path: a run's folder or its checkpoints folder.
        changes: to the run's own keep_last, keep_every and keep_best.
        dry_run: only say what would go.
        console: where to.

    Raises:
        CheckpointError: there is none that verifies, and nothing is deleted.
    """
    root = checkpoints_folder(path)
    config = base.build(CheckpointConfig, {**_retention_of(root.parent), **changes}, str(path))
    anchor = open_checkpoint(root)
    entries = list_checkpoints(root)
    going = steps_to_delete(candidates(entries), anchor.step, config)
    for step in going:
        folder = layout.step_folder(root, step)
        if not dry_run:
            delete_checkpoint(folder)
        console.print(f"{'would delete' if dry_run else 'deleted'} {folder}", highlight=False, markup=False)
    console.print(
        f"{len(entries) - len(going)} stay, the newest that verifies is step {anchor.step}",
        highlight=False,
        markup=False,
    )


def _retention_of(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "config.json"
    if not os.path.lexists(path):
        return {}
    try:
        table = read_state(path)[0].get("checkpoint")
        if not isinstance(table, dict):
            raise ValueError("has no table [checkpoint]")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): name --keep-last and the folder of checkpoints") from None
    return table
