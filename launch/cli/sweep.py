"""`setformer sweep`: many runs over a space of configs."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.cli.options import RayNodesOption, TrustOption
from launch.hosts.names import parse_hosts
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.terminal import open_console


class PageFirst(TyperGroup):
    """Makes `setformer sweep CONFIG` an abbreviation of `setformer sweep run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `run` before a first argument that is not a command."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


_HELP = """Search hyperparameters: `setformer sweep CONFIG` trains many variants of a run config.

Each trial is an ordinary run with its own folder. Needs the extra: pip install 'setformer_dist[ray]'.

Examples:

  setformer sweep digits --dry-run

  setformer sweep configs/sweeps/digits.toml

  setformer sweep show runs/sweeps/digits
"""

app = typer.Typer(help=_HELP, no_args_is_help=True, cls=PageFirst)

SweepFolder = Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's folder.", show_default=False)]


def _require() -> None:
    """Check that the extra is installed.

    Raises:
        LaunchError: it is not.
    """
    for name in ("ray", "optuna", "plotly", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise LaunchError(f"sweeps need the package {name}: pip install 'setformer_dist[ray]'")


@app.command()
def run(
    page: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="The sweep's TOML config, or the name of a shipped one.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides, such as budget.trials=4; set.KEY for all runs.", show_default=False),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Ray cluster: HOST:PORT or auto; by default one is started here.", show_default=False),
    ] = None,
    ray_nodes: RayNodesOption = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for more nodes if trials do not fit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first trials, then stop.")] = False,
) -> None:
    """Start or continue the sweep that a sweep config describes; `setformer sweep CONFIG` means the same.

    Run the same command again after a stop or a kill: it keeps finished trials, and resumes interrupted ones
    from their checkpoints. After Ctrl-C and SIGTERM, all runs save before they end.

    Examples:

        setformer sweep run digits --dry-run

        setformer sweep run digits set.data.root=runs/demo-data budget.trials=4

        setformer sweep run configs/sweeps/digits.toml --ray auto --wait
    """
    _require()
    from launch.sweep.page import load_sweep, shipped_page

    if ray_nodes and ray is None:
        raise LaunchError("--ray-nodes names nodes of a Ray cluster: give --ray as well")
    nodes = parse_hosts(ray_nodes, "--ray-nodes") if ray_nodes else []
    sweep = load_sweep(shipped_page(page), overrides or [])
    from launch.sweep import commands

    if dry_run:
        commands.dry_run(sweep, open_console())
        return
    if code := commands.run(sweep, ray, wait, open_console(), nodes):
        raise typer.Exit(code)


@app.command()
def show(
    folder: SweepFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the trials of a sweep, best first, and what it recommends; write results.csv and report.html.

    Examples:

        setformer sweep show runs/sweeps/digits

        setformer sweep show runs/sweeps/digits --json
    """
    _require()
    from launch.sweep import commands

    commands.show(folder, open_console(), as_json)


@app.command("ls")
def ls(root: Annotated[Path, typer.Argument(help="The folder of sweeps.")] = Path("runs/sweeps")) -> None:
    """List sweeps with state and best trial.

    Example: setformer sweep ls runs/sweeps
    """
    _require()
    from launch.sweep import commands

    commands.list_sweeps(root, open_console())


@app.command()
def stop(folder: SweepFolder) -> None:
    """Stop a running sweep, wherever its driver is. Its runs save; `setformer sweep CONFIG` continues it.

    Example: setformer sweep stop runs/sweeps/digits
    """
    _require()
    from launch.sweep import commands

    commands.stop(folder, open_console())


@app.command()
def promote(
    folder: SweepFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides of the new run, such as schedule.epochs=300.", show_default=False),
    ] = None,
    best: Annotated[int, typer.Option(help="Which complete trial: 1 for the best.", min=1)] = 1,
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Processes on this machine.", min=1)] = 1,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Train from step 0, not from the trial's checkpoint.")
    ] = False,
    trust: TrustOption = False,
) -> None:
    """Turn a trial into a full run outside Ray, from its newest checkpoint or from the start.

    The run is runs/SWEEP-trial-N unless run.name and run.out say otherwise. Run the same command again to resume it.

    Examples:

        setformer sweep promote runs/sweeps/digits --best 1 --ranks 2 schedule.epochs=12

        setformer sweep promote runs/sweeps/digits --from-start run.name=again
    """
    _require()
    from launch.ranks.local import LocalCrew
    from launch.ranks.supervise import run_supervised
    from launch.record.attempts import Recorder
    from launch.run.config import check_folder, resolve
    from launch.sweep import promote as winners

    repeated, source = winners.promoted(folder, best, from_start, overrides or [], trust)
    config = repeated.config
    check_folder(resolve(config, ranks))
    say = functools.partial(open_console(stderr=True).print, highlight=False, markup=False)
    if source is not None:
        say(f"{config.folder} begins at step {winners.take_over(source, config)} of {source}")
    crew = LocalCrew([str(repeated.path), *repeated.overrides], ranks, warm=config.launch.warm)
    recorder = Recorder(
        config.folder, config.run.imports, config.launch.env, repeats=repeated.source, first=repeated.write_config
    )
    if code := run_supervised(crew, config.folder, config.restart, say=say, recorder=recorder):
        raise typer.Exit(code)
