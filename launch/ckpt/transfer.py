"""`setformer ckpt export --deepspeed` and `import`: checkpoints to and from DeepSpeed's own form."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from checkpoints import deepspeed_files, layout
from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity, digest_shapes
from checkpoints.manager import CheckpointManager
from checkpoints.reader import Checkpoint, open_checkpoint, read_kept
from launch.ckpt.export import made
from launch.ranks.lock import held_by_tool
from launch.run.imported import ADAMS
from launch.run.trained import load_trained
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import check_new
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot


def export_deepspeed(path: Path, dest: Path, console: Console) -> None:
    """Write a directory that DeepSpeed's zero_to_fp32.py reads: fp32 masters, and the states where they are Adam's.

    Raises:
        CheckpointError: nothing there verifies.
        ConfigError: the folder is there already.
    """
    check_new(dest)
    read_kept(path, lambda: _export_deepspeed(path, dest, console))


def _export_deepspeed(path: Path, dest: Path, console: Console) -> None:
    checkpoint = open_checkpoint(path)
    names, options = _as_trained(path, checkpoint)
    states_of = {"param"} if options is None else {"param", "exp_avg", "exp_avg_sq"}
    wanted = [state for state in ("param", "exp_avg", "exp_avg_sq") if state in states_of & set(checkpoint.states())]
    whole: dict[str, dict[str, torch.Tensor]] = {state: checkpoint.read_full(state) for state in wanted}
    states = {state: {n: tensors[n] for n in names if n in tensors} for state, tensors in whole.items()}
    updates = checkpoint.trainer.get("optimizer_steps")
    with made(dest) as folder:
        tag = deepspeed_files.write(
            folder,
            checkpoint.step,
            states,
            updates=updates if isinstance(updates, int) and 0 <= updates <= checkpoint.step else None,
            hyperparameters=options,
        )
        about = _WEIGHTS_ALONE if options is None else _FOR_DEEPSPEED[_holds_model(checkpoint)]
        (folder / "README.md").write_text(about, encoding="utf-8")
    console.print(
        f"{dest / tag.name}: {', '.join(states)} of {len(states['param'])} parameters", highlight=False, markup=False
    )


_FOR_DEEPSPEED = {
    True: """# Written by setformer ckpt export --deepspeed

fp32 weights and Adam's states as DeepSpeed's ZeRO stage 2 on one rank keeps them.

* `zero_to_fp32.py` makes a state_dict of it.
* `engine.load_checkpoint` resumes from it on one rank, fp32, stage 1 or 2, with one group of parameters, those of
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

_WEIGHTS_ALONE = """# Written by setformer ckpt export --deepspeed

fp32 weights, for `zero_to_fp32.py` and `engine.load_checkpoint(..., load_module_only=True)`. The run had another
optimizer than Adam, whose states DeepSpeed's own form has no names for.
"""


def _holds_model(checkpoint: Checkpoint) -> bool:
    config = checkpoint.trainer.get("config")
    return isinstance(config, dict) and "model" in config


def _as_trained(path: Path, checkpoint: Checkpoint) -> tuple[list[str], dict[str, object] | None]:
    """Return the parameters' names in the model's order, and what Adam was set to, as far as is known.

    None in place of the latter where the optimizer was not Adam.
    """
    if not _holds_model(checkpoint):
        return list(checkpoint.parameters()), {}
    trained = load_trained(path, "plain")
    optim = trained.config.optim
    names = [name for name, _ in trained.model.named_parameters()]
    if optim.name not in ADAMS:
        return names, None
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
        "decoupled_weight_decay": optim.name == "adamw",
    }
    return names, options


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
    with held_by_tool(dest):
        if (there := layout.step_folder(dest, found.steps)).exists():
            raise ConfigError(f"{there} already exists: move it away, or name another folder")
        path = manager.save(Snapshot(found.steps, fragments, trainer, {}, tags=("imported",)), identity)
    console.print(
        f"{path}: {', '.join(found.states)} of {len(shapes)} parameters, from ZeRO stage {found.stage} on "
        f"{found.world_size} ranks",
        highlight=False,
    )
