"""`setformer ckpt`: list, verify, compare, export, import and delete checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import BestOption, CheckpointPath, ImportOption, StoredPath, WeightsOption
from launch.run.own_code import bring
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.metric import weights_named
from setformer_dist.core.terminal import open_console

app = typer.Typer(help="List, verify, compare, export, import and delete checkpoints.", no_args_is_help=True)

# Exit code of a command that found damage.
_DAMAGED = 4

RunFolder = Annotated[Path, typer.Argument(help="A run folder or its checkpoints folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command("ls")
def ls(
    folder: StoredPath,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file, not only sizes.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run and whether they verify; exit code 4 if one does not.

    Example:

        setformer ckpt ls runs/demo --verify

        setformer ckpt ls s3://bucket/runs/demo
    """
    from launch.ckpt import listing, stored

    if stored.is_stored(folder):
        faulty = stored.list_url(folder, verify, open_console(), as_json)
    else:
        faulty = listing.list_folder(Path(folder), verify, open_console(), as_json)
    if faulty:
        raise typer.Exit(_DAMAGED)


@app.command("show")
def show(checkpoint: CheckpointPath, as_json: AsJson = False) -> None:
    """Verify a checkpoint and print its contents; of several, the newest that verifies.

    Examples:

        setformer ckpt show runs/demo

        setformer ckpt show runs/demo/checkpoints/step-00000440 --json
    """
    from launch.ckpt import listing

    listing.show(checkpoint, open_console(), as_json)


@app.command("verify")
def verify(checkpoint: StoredPath, as_json: AsJson = False) -> None:
    """Read every byte of one or all checkpoints of a run, on all cores; exit code 4 if one does not verify.

    Examples:

        setformer ckpt verify runs/demo

        setformer ckpt verify runs/demo/checkpoints/step-00000440 --json

        setformer ckpt verify s3://bucket/runs/demo
    """
    from launch.ckpt import stored
    from launch.ckpt import verify as verify_command

    if stored.is_stored(checkpoint):
        faulty = stored.verify_url(checkpoint, open_console(), as_json)
    else:
        faulty = verify_command.verify(Path(checkpoint), open_console(), as_json)
    if faulty:
        raise typer.Exit(_DAMAGED)


@app.command("fetch")
def fetch(
    url: Annotated[str, typer.Argument(help="A run's copies in an object store, or one of them.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="Folder in which the step's folder is made.", show_default=False)],
) -> None:
    """Fetch the newest copy of a checkpoint that verifies from an object store (checkpoint.mirror).

    A run with checkpoint.mirror does so by itself where its folder has no checkpoint.

    Examples:

        setformer ckpt fetch s3://bucket/runs/demo fetched

        setformer ckpt fetch s3://bucket/runs/demo/step-00000440-5f0c21aa fetched
    """
    from launch.ckpt import stored

    stored.fetch(url, dest, open_console())


@app.command("diff")
def diff(
    first: CheckpointPath,
    second: CheckpointPath,
    state: Annotated[str, typer.Option(help="Which state to compare: param, ema, exp_avg, ...")] = "param",
    as_json: AsJson = False,
) -> None:
    """Print the parameters, metrics and config keys in which two checkpoints differ.

    Examples:

        setformer ckpt diff runs/demo/checkpoints/step-00000330 runs/demo/checkpoints/step-00000440

        setformer ckpt diff runs/one runs/two --state ema --json
    """
    from launch.ckpt import diff as diff_command

    diff_command.diff(first, second, state, open_console(), as_json)


@app.command("export")
def export(
    checkpoint: CheckpointPath,
    dest: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    weights: WeightsOption = "auto",
    best: BestOption = False,
    deepspeed: Annotated[
        bool,
        typer.Option("--deepspeed", help="Write the format of DeepSpeed's zero_to_fp32.py, with Adam's states."),
    ] = False,
    imports: ImportOption = None,
) -> None:
    """Write the weights as a folder with preprocessing and class names; for a model of texts, with the tokenizer.

    timm loads models of images: `timm.create_model("local-dir:DEST", pretrained=True)` and
    `timm.data.resolve_model_data_config` read the folder. So do `eval`, `predict` (or `text predict`) and
    `model.weights`.

    Examples:

        setformer ckpt export runs/demo exported --weights ema

        setformer ckpt export runs/demo the-best --best

        setformer ckpt export runs/demo for-deepspeed --deepspeed
    """
    chosen = weights_named(weights)
    bring(imports or ())
    if deepspeed:
        if best:
            raise ConfigError("--best does not go with --deepspeed: name the folder of a step")
        from launch.ckpt import transfer

        transfer.export_deepspeed(checkpoint, dest, open_console())
    else:
        from launch.ckpt import export

        export.export(checkpoint, dest, chosen, open_console(), best)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Directory of DeepSpeed's save_checkpoint.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="Folder in which the step's folder is created.", show_default=False)],
    model: Annotated[str, typer.Option(help="Name of the model, for the manifest.")] = "imported",
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Also read files that name foreign classes; they can run any code.")
    ] = False,
) -> None:
    """Import a checkpoint that DeepSpeed's own save_checkpoint wrote, under ZeRO 0 to 3 on any number of ranks.

    The files are pickles. The loader creates only tensors and plain values; it refuses a file with other objects unless
    you pass --trust-pickle.

    If DEST is the checkpoints folder of a new run, setformer train resumes from it with weights, Adam's states and step
    count. The files hold no config: the config of the run must describe the same model.

    Examples:

        setformer ckpt import elsewhere/output runs/mine/checkpoints --model vit_base_patch16_224

        setformer ckpt import elsewhere/output/global_step500 imported --trust-pickle
    """
    from launch.ckpt import transfer

    transfer.import_deepspeed(source, dest, model, trust_pickle, open_console())


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, .pt or .bin file of torch.save.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    key: Annotated[
        str | None, typer.Option(help="Entry that holds the weights; by default state_dict_ema, state_dict, model …")
    ] = None,
) -> None:
    """Convert pickled weights into a .safetensors file, for model.weights of a run.

    The loader creates only tensors and plain values; it refuses anything that could run code.

    Examples:

        setformer ckpt convert vit_small.pth vit_small.safetensors

        setformer ckpt convert checkpoint.pth.tar weights.safetensors --key state_dict
    """
    from launch.ckpt import convert

    convert.convert(source, dest, key, open_console())


@app.command("prune")
def prune(
    folder: RunFolder,
    keep_last: Annotated[int | None, typer.Option(help="Number of newest to keep; by default the run's.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Keep multiples of this step; by default the run's.")] = None,
    keep_best: Annotated[int | None, typer.Option(help="Number of best to keep; by default the run's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
) -> None:
    """Delete the checkpoints that retention does not keep; the newest that verifies is always kept.

    Examples:

        setformer ckpt prune runs/demo --keep-last 1 --dry-run

        setformer ckpt prune runs/demo --keep-last 2 --keep-every 1000
    """
    from launch.ckpt import prune as prune_command

    asked = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
    changes = {key: value for key, value in asked.items() if value is not None}
    prune_command.prune(folder, changes, dry_run, open_console())
