"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.secrets import redacted

ConfigPath = Annotated[
    Path, typer.Argument(help="The run's TOML config, or the name of a shipped one, such as demo.", show_default=False)
]
ConfigOrRun = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="The run's TOML config, or the name of a shipped one, such as demo; none with --from.",
        show_default=False,
    ),
]
FromOption = Annotated[
    Path | None,
    typer.Option("--from", help="Start a new run with the config and seed of this run folder.", show_default=False),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Use the modules, commands, hosts and addresses that the repeated run names.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides, such as optim.lr=1e-3; ~key removes one.", show_default=False),
]


def _local(path: Path) -> Path:
    """Refuse a URL, which a path does not hold."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ConfigError(f"{redacted(str(path).replace(':/', '://', 1))} is a URL: `setformer ckpt fetch` it first")
    return path


def _where(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
    """Refuse a place to train that is empty, as of a variable that is not set: the run would start on this machine."""
    given = context.get_parameter_source(parameter.name or "")
    if value is not None and not value.strip() and given is not None and given.name == "COMMANDLINE":
        raise LaunchError(f"{parameter.opts[0]} is empty: say where to train, or leave the option out")
    return value


CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="A run folder, its checkpoints folder, or one step's folder.", show_default=False, callback=_local
    ),
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="model",
        help="A run folder, its checkpoints folder, one step's folder, or an exported model.",
        show_default=False,
        callback=_local,
    ),
]
StoredPath = Annotated[
    str,
    typer.Argument(
        help="A run folder, its checkpoints folder, one step's folder, or the URL of a run's copies.",
        show_default=False,
    ),
]
ImportOption = Annotated[
    list[str] | None,
    typer.Option("--import", help="Module of your own that registers the model or the task.", show_default=False),
]
WeightsOption = Annotated[str, typer.Option(help="plain, ema, or auto: those that scored better in the run.")]
BestOption = Annotated[
    bool,
    typer.Option("--best", help="Of a run's checkpoints, take the best (checkpoint.best_metric), not the newest."),
]
HostsOption = Annotated[
    str, typer.Option(help="Hosts and the ranks on each, such as a:8,b:8.", show_default=False, callback=_where)
]
HostfileOption = Annotated[
    Path | None, typer.Option(help="The same as a DeepSpeed hostfile: lines HOST slots=N.", show_default=False)
]
ViaOption = Annotated[
    str | None,
    typer.Option(
        help='How to reach a host: ssh, srun, or a prefix such as "docker exec -i {host}".',
        show_default=False,
        callback=_where,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", help="A Ray cluster to train on: its HOST:PORT, or auto.", show_default=False, callback=_where
    ),
]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", "-n", help="Processes on this machine, by default 1.", min=1)
]
RanksPerNodeOption = Annotated[
    int | None, typer.Option(help="With --ray: ranks on each node; by default as many as fit.", min=1)
]
RayNodesOption = Annotated[
    str,
    typer.Option(
        "--ray-nodes",
        help="With --ray: addresses of nodes and the ranks on each, such as 10.0.0.2:8,10.0.0.3:8.",
    ),
]
WaitOption = Annotated[bool, typer.Option("--wait", help="With --ray: wait for more nodes if the ranks do not fit.")]
IncludeOption = Annotated[str, typer.Option(help="Hosts of the hostfile to use, such as a@b:0,1.")]
ExcludeOption = Annotated[str, typer.Option(help="Hosts of the hostfile to leave out.")]
GraceOption = Annotated[
    float, typer.Option(help="Seconds for a last checkpoint after Ctrl-C, SIGTERM or SIGUSR1.", min=0)
]
RestartsOption = Annotated[
    int | None, typer.Option(help="Restarts after deaths and hangs within restart.window_minutes; 0 for none.", min=0)
]
