"""`setformer`: one command for packing, training, evaluation and inspection.

`import torch` takes seconds and hundreds of MiB. So that `setformer --help` is fast and the supervisor of `setformer
train` stays small, each command imports what it needs when it runs. Only launch/cli imports inside functions.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.control import Control
from rich.logging import RichHandler
from rich.segment import ControlType
from rich.text import Text

from launch.cli import ckpt as cli_ckpt
from launch.cli import data as cli_data
from launch.cli import lra as cli_lra
from launch.cli import plan as cli_plan
from launch.cli import queue as cli_queue
from launch.cli import runs as cli_runs
from launch.cli import sweep as cli_sweep
from launch.cli import text as cli_text
from launch.cli import trained as cli_trained
from launch.cli.options import (
    ConfigOrRun,
    ExcludeOption,
    FromOption,
    GraceOption,
    HostfileOption,
    HostsOption,
    IncludeOption,
    Overrides,
    RanksOption,
    RanksPerNodeOption,
    RayNodesOption,
    RayOption,
    RestartsOption,
    TrustOption,
    ViaOption,
    WaitOption,
)
from launch.cli.stopped import STOPPED, STOPPED_CODE
from launch.cli.usage import UsageError, check_homes, system_fault, usage_fault
from launch.hosts.fleet import Fleet
from launch.hosts.names import HostSpec, of_slurm, parse_hosts, read_hostfile
from launch.hosts.reach import is_here, opener
from launch.ranks.local import LocalCrew
from launch.ranks.restarts import RestartConfig
from launch.ranks.supervise import Crew, run_supervised
from launch.ray.fleet import VIA, RayFleet
from launch.ray.installed import check_reachable
from launch.record.attempts import Recorder
from launch.run import keys
from launch.run.config import RunConfig, check_folder, continued, load_run, resolve, shipped
from launch.run.repeat import Repetition, check_trusted, repetition
from setformer_dist import __version__
from setformer_dist.core.errors import (
    ConfigError,
    LaunchError,
    RankFailedError,
    SetformerError,
    TransientError,
)
from setformer_dist.core.ledger import LEDGER
from setformer_dist.core.secrets import redact_tracebacks, redacted
from setformer_dist.core.shared_memory import no_memory
from setformer_dist.core.terminal import open_closed_streams, open_console
from setformer_dist.core.words import counted, plain, plain_lines


class _Stoppable(typer.core.TyperGroup):
    """A group of commands that says that Ctrl-C has stopped one: Typer alone ends without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr)
            raise typer.Exit(STOPPED_CODE) from None


app = typer.Typer(
    name="setformer",
    cls=_Stoppable,
    help="Train SeTformer with DeepSpeed, on streamed shards, from one CPU machine to many GPUs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_text.app, name="text")
app.add_typer(cli_lra.app, name="lra")
app.add_typer(cli_runs.app, name="runs")
app.add_typer(cli_ckpt.app, name="ckpt")
app.add_typer(cli_sweep.app, name="sweep")
app.add_typer(cli_queue.app, name="queue")

app.command()(cli_plan.plan)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"setformer_dist {__version__}")
        raise typer.Exit()


@app.callback()
def setformer(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, then stop.")
    ] = False,
) -> None:
    """Train SeTformer with DeepSpeed, on streamed shards, from one CPU machine to many GPUs."""


@app.command()
def train(
    config: ConfigOrRun = None,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    hosts: HostsOption = "",
    hostfile: HostfileOption = None,
    include: IncludeOption = "",
    exclude: ExcludeOption = "",
    via: ViaOption = None,
    ray: RayOption = None,
    ranks_per_node: RanksPerNodeOption = None,
    ray_nodes: RayNodesOption = "",
    wait: WaitOption = False,
    port: Annotated[int | None, typer.Option(help="Port of rank 0; by default a free one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print config and predicted costs, then stop.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="With --dry-run: print every key and DeepSpeed's config.")
    ] = False,
    grace: GraceOption = 60.0,
    restarts: RestartsOption = None,
    source: FromOption = None,
    trust: TrustOption = False,
) -> None:
    """Start or resume the run that a config describes.

    Run the same command again to resume from the newest checkpoint that passes verification. If a rank dies or hangs,
    all ranks are stopped and restarted automatically ([restart]). Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint first.

    Examples:

        setformer train demo data.root=runs/demo-data --ranks 2

        setformer train configs/runs/cifar10.toml data.root=data/cifar10 optim.lr=2e-3 run.name=try2 --ranks 2

        setformer train demo data.root=runs/demo-data run.name=next --ranks 2 --dry-run

        setformer train demo data.root=runs/demo-data --hosts localhost:2

        setformer train demo data.root=runs/demo-data --ray auto --ranks 2

        setformer train --from runs/demo

    DeepSpeed's own launcher starts the same run with
    `deepspeed --num_accelerators 2 --module launch.entry configs/runs/demo.toml data.root=data/digits`.
    """
    _refuse_other_launchers()
    if full and not dry_run:
        raise LaunchError("--full says how much --dry-run prints: add --dry-run, or leave --full out")
    share = _Share(ranks_per_node, tuple(parse_hosts(ray_nodes, "--ray-nodes")) if ray_nodes else (), wait)
    asked = (share.ranks(ranks), hosts, hostfile, include, exclude)
    _check_ray(ray, share, hosts or hostfile or include or exclude or via)
    via, words = f"{VIA}{ray}" if ray else via, overrides or []
    began = _from_run(source, config, words, asked, via, trust) if source else _from_config(config, words, asked, via)
    run = resolve(began.config, began.world_size)
    if dry_run:
        from launch.run import dry_run as predicted

        elsewhere = began.specs or via or began.via
        predicted.dry_run(run, open_console(), None if elsewhere else began.world_size, full)
        return
    check_folder(run)
    if not began.specs and not (via or began.via):  # else it is reached from another machine
        _check_service(run.config)
    limit = {} if restarts is None else {"limit": restarts}
    policy = run.config.restart.model_copy(update=limit)
    if code := _supervise(began, via or began.via, share, port, grace, policy):
        raise typer.Exit(code)


@dataclasses.dataclass(frozen=True)
class _Start:
    """A run as a command line names it.

    Attributes:
        path: of the config that every rank reads.
        overrides: likewise.
        config: of the run.
        specs: hosts; none for this machine alone.
        world_size: ranks in all.
        via: how hosts were reached by the run that this one repeats.
        repeats: that run.
    """

    path: Path
    overrides: list[str]
    config: RunConfig
    specs: list[HostSpec]
    world_size: int
    via: str | None = None
    repeats: Repetition | None = None


@dataclasses.dataclass(frozen=True)
class _Share:
    """The share of a Ray cluster that a command line asks for; see `launch.ray.fleet.RayFleet`."""

    per_node: int | None = None
    nodes: tuple[HostSpec, ...] = ()
    wait: bool = False

    def ranks(self, asked: int | None) -> int | None:
        """Return the ranks in all: as asked, or those of the named nodes."""
        if not self.nodes:
            return asked
        total = sum(node.slots for node in self.nodes)
        if self.per_node is not None or asked not in (None, total):
            raise LaunchError(
                f"--ray-nodes names {counted(total, 'rank')} and where they are: leave --ranks and --ranks-per-node out"
            )
        return total


_Asked = tuple[int | None, str, Path | None, str, str]


def _check_ray(ray: str | None, share: _Share, elsewhere: object) -> None:
    if ray is not None and elsewhere:
        raise LaunchError("--ray and --hosts, --hostfile or --via both say where to train: give only one of them")
    if ray is None and share.per_node is not None:
        raise LaunchError("--ranks-per-node shares out the ranks of a Ray cluster: give --ray as well")
    if ray is None and share.nodes:
        raise LaunchError("--ray-nodes names nodes of a Ray cluster: give --ray as well")
    if ray is None and share.wait:
        raise LaunchError("--wait waits for room on a Ray cluster: give --ray as well")


def _check_service(config: RunConfig) -> None:
    """Check that a new run reaches the Ray cluster that its refreshes are for; one that resumes does as it may."""
    if config.refresh.on and config.refresh.by == "ray" and not (config.folder / LEDGER).exists():
        check_reachable(config.refresh.address)


def _on_ray(via: str | None) -> bool:
    return via is not None and via.startswith(VIA)


def _from_config(name: str | None, overrides: list[str], asked: _Asked, via: str | None) -> _Start:
    if name is None:
        raise UsageError(
            "Missing argument 'CONFIG': name the run's TOML config, or --from with the folder of a run to repeat"
        )
    path = shipped(Path(name))
    specs = [] if _on_ray(via) else chosen_hosts(*asked)
    config = continued(load_run(path, overrides))
    return _Start(path, overrides, config, specs, _training(specs, config) or asked[0] or 1)


def _training(specs: Sequence[HostSpec], config: RunConfig) -> int:
    """Return how many ranks train at first on some hosts; further hosts stand by."""
    return sum(spec.slots for spec in specs[: config.launch.max_hosts or None])


def _from_run(
    source: Path, name: str | None, overrides: list[str], asked: _Asked, via: str | None, trust: bool
) -> _Start:
    """Return the start of a run that repeats another: on its hosts, or its number of ranks, unless others are named."""
    if name is not None and "=" not in name and not name.startswith("~"):
        raise LaunchError(f"--from takes the config of {source}: leave the config {name} out")
    own = [*([name] if name is not None else []), *overrides]
    repeated = repetition(source, own)
    specs = [] if _on_ray(via) else chosen_hosts(*asked)
    record = repeated.record
    theirs: tuple[list[str], str | None] = ([], None)  # what the record names and nobody here has
    if specs or asked[0] or record is None or _on_ray(via):
        pass  # the user says where to train
    elif _on_ray(record.via):
        if not via:
            theirs, via = ([], record.via), record.via
    elif record.several:
        specs = [HostSpec(name, host.ranks) for name, host in record.hosts.items()]
        theirs = [spec.name for spec in specs if not is_here(spec.name)], None if via else record.via
        via = via or record.via
    if not trust:
        check_trusted(repeated, own, *theirs)
    world_size = _training(specs, repeated.config) or asked[0] or repeated.world_size
    return _Start(repeated.path, list(repeated.overrides), repeated.config, specs, world_size, via, repeated)


def _supervise(
    began: _Start, via: str | None, share: _Share, port: int | None, grace: float, policy: RestartConfig
) -> int:
    """Start the ranks and stand by them; return the exit code."""
    config, folder, specs = began.config, began.config.folder, began.specs
    existed = folder.exists()
    try:
        say = functools.partial(open_console(stderr=True).print, highlight=False, markup=False)
        repeats = began.repeats
        recorder = Recorder(folder, config.run.imports, config.launch.env, via)
        if repeats is not None:
            recorder = dataclasses.replace(recorder, repeats=repeats.source, first=repeats.write_config)
            for line in repeats.told(recorder, began.world_size, {spec.name: spec.slots for spec in specs}):
                say(plain(line))
        if sys.stderr.isatty():
            say(f"starting {counted(began.world_size, 'rank')} …")
        args = [str(began.path), *began.overrides]
        crew: Crew = LocalCrew(args, began.world_size, port, grace, config.launch.warm)
        if specs or _on_ray(via):
            common = (args, folder, config.launch, functools.partial(can_share, config), say, opener(via), port, grace,
                      config.checkpoint.replicas > 0, config.run.imports)  # fmt: skip
            crew = Fleet(specs, *common)
            if not specs:
                crew = RayFleet(
                    (),
                    *common,
                    via=str(via),
                    world_size=began.world_size,
                    per_node=share.per_node,
                    nodes=share.nodes,
                    wait=share.wait,
                )
        if not config.logging.prometheus:
            return run_supervised(crew, folder, policy, say=say, recorder=recorder)
        from launch.ranks.exposition import Exposition

        with Exposition(folder, config.logging.prometheus, config.model.name) as exposed:
            return run_supervised(crew, folder, policy, say=say, recorder=recorder, tell=exposed.look)
    except SetformerError as error:
        names_a_log = isinstance(error, RankFailedError) and str(error)
        if not existed and not names_a_log and not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def chosen_hosts(ranks: int | None, hosts: str, hostfile: Path | None, include: str, exclude: str) -> list[HostSpec]:
    """Return the hosts to train on; none for this machine alone.

    Raises:
        LaunchError: two options exclude each other, or a host name is invalid.
    """
    given = [name for name, value in (("--ranks", ranks), ("--hosts", hosts), ("--hostfile", hostfile)) if value]
    if len(given) > 1:
        raise LaunchError(f"{given[0]} and {given[1]} both say where to train: give only one of them")
    if (include or exclude) and hostfile is None:
        raise LaunchError(f"{'--include' if include else '--exclude'} chooses from a hostfile: give --hostfile")
    if hosts:
        return parse_hosts(hosts)
    if hostfile is not None:
        return read_hostfile(hostfile, include, exclude)
    return [] if ranks else of_slurm(os.environ) or []


def can_share(config: RunConfig, ranks: int) -> bool:
    """Return whether a number of ranks can share the run's global batch."""
    try:
        resolve(config, ranks)
    except ConfigError:
        return False
    return True


def _refuse_other_launchers() -> None:
    """Refuse to run as one of several processes of another launcher: each would start all ranks.

    Raises:
        LaunchError: the message has the right commands.
    """
    world = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ and "LOCAL_RANK" in os.environ else "1"
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        world = os.environ.get(name, world)
    if world != "1":
        raise LaunchError(
            f"setformer train starts its ranks itself, and a launcher has started {world} processes of it: run "
            f"setformer train CONFIG --ranks {world}, or have the launcher start -m launch.entry CONFIG"
        )


app.command("eval")(cli_trained.evaluate)
app.command("probe")(cli_trained.probe_features)
app.command()(cli_trained.predict)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Run config to check on the hosts.", show_default=False)] = None,
    overrides: Overrides = None,
    run_folder: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
    hosts: HostsOption = "",
    hostfile: HostfileOption = None,
    via: ViaOption = None,
    ray: RayOption = None,
) -> None:
    """Check whether a training run can start here, on several hosts, or on Ray; the exit code is non-zero if it cannot.

    Examples:

        setformer doctor --run-folder runs

        setformer doctor --hosts localhost:2

        setformer doctor demo data.root=runs/demo-data --hosts localhost:2

        setformer doctor --ray auto
    """
    from launch.machine import doctor as checks
    from launch.machine.hosts import survey

    _check_ray(ray, _Share(), hosts or hostfile or via)
    if ray:
        from launch.ray.installed import require_ray

        require_ray()
        from launch.ray.doctor import examine

        found = examine(ray, run_folder, shipped(config) if config else None, overrides or ())
        raise typer.Exit(checks.render(found))
    if hosts or hostfile:
        specs = chosen_hosts(None, hosts, hostfile, "", "")
        path, words = shipped(config) if config else None, overrides or ()
        imports = load_run(path, words).run.imports if path else ()
        found = survey(specs, via, run_folder, path, words, imports)
        raise typer.Exit(checks.render(found))
    if config is not None:
        raise LaunchError("a run config is checked on hosts: add --hosts or --ray, or say `setformer train --dry-run`")
    raise typer.Exit(checks.render(checks.diagnose(run_folder)))


def _keys_beginning(incomplete: str) -> list[str]:
    """Return completions of a key for the shell."""
    return sorted({entry.key for entry in keys.all_run_keys() if entry.key.startswith(incomplete)})


@app.command("config")
def show_config(
    key: Annotated[
        str,
        typer.Argument(help="A key such as optim.lr, or a table.", show_default=False, autocompletion=_keys_beginning),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the keys of a run config with type, default, unit and meaning: one key, a table, or all.

    Examples:

        setformer config optim.lr

        setformer config checkpoint

        setformer config --json
    """
    found = keys.keys_named(key)
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2, ensure_ascii=False))
        return
    for entry in found:
        unit, kind = f"; unit: {entry.unit}" if entry.unit else "", f" ({entry.of})" if entry.of else ""
        print(f"{entry.key}{kind}\n  {entry.type}{unit}; default {entry.default}; when a run resumes: {entry.resume}")
        print(textwrap.fill(entry.meaning, width=100, initial_indent="  ", subsequent_indent="  "))


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Pattern of names, such as 'soft_*'.", show_default=False)] = "",
    size: Annotated[int | None, typer.Option(help="Image side to count for; by default each model's own.")] = None,
) -> None:
    """List the architectures of this package with parameters and multiply-adds.

    Examples:

        setformer models

        setformer models "setformer_*" --size 768

        setformer models "text_*"
    """
    from launch.run import models

    models.list_models(pattern, size, open_console())


@app.command()
def demo(
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Processes on this machine.", min=1)] = 2,
    data: Annotated[Path, typer.Option(help="Folder for the packed digits.")] = Path("runs/demo-data"),
) -> None:
    """Train SeTformer on scikit-learn's handwritten digits: the whole pipeline in a few minutes.

    Examples:

        setformer demo --ranks 2

        setformer demo run.name=short schedule.epochs=4
    """
    from launch.examples import demo

    code = demo.run_demo(ranks, data, open_console(), overrides or [])
    if code:
        raise typer.Exit(code)


@app.command()
def drill(
    faults: Annotated[int, typer.Option(help="Number of faults to inject.", min=0)] = 100,
    seed: Annotated[int, typer.Option(help="Seed for the kind, time and target of the faults.")] = 0,
    ranks: Annotated[int, typer.Option("--ranks", "-n", help="Processes of the run.", min=1)] = 2,
    hosts: Annotated[
        int, typer.Option(help="Make this many hosts (network namespaces, root) and train on all but one.", min=0)
    ] = 0,
    epochs: Annotated[int, typer.Option(help="Length of each run; 22 steps an epoch.", min=3)] = 16,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/drill"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the faults to this file.")] = None,
) -> None:
    """Inject random faults into small training runs, and check that nothing is lost.

    Kills ranks and the launcher, suspends ranks, sends SIGTERM and SIGUSR1, damages checkpoints and fills the disk
    (where a small one can be mounted, which takes root). With --hosts it kills agents and ssh, takes hosts' power
    away and cuts, slows and half opens their links. Exit code 8 if anything was lost.

    Examples:

        setformer drill --faults 10

        setformer drill --faults 100 --seed 7 --json drill.json

        setformer drill --hosts 3 --faults 100
    """
    from launch.drill import drill

    drill.run_drill(out, faults, seed, ranks, epochs, open_console(), hosts=hosts, json_file=json_file)


class AboveBar(RichHandler):
    """Prints in place of rank 0's progress bar, which is redrawn below. One write, so that nothing comes between."""

    def render(self, *, record: logging.LogRecord, traceback: Any, message_renderable: Any) -> Any:
        """Return level and message as one text: rich's own table would wrap it, or pad it to the width."""
        assert isinstance(message_renderable, Text)
        return Text.assemble(self.get_level_text(record), " ", message_renderable)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        with self.console:
            self.console.control(Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)))
            super().emit(record)


def main() -> None:
    """Run the command line; a user's mistake becomes one line and its exit code."""
    open_closed_streams()
    redact_tracebacks()
    # DeepSpeed warns on import where there is no GPU; that is noise for most commands.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.funcName != "get_accelerator")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[AboveBar(console=open_console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        check_homes(sys.argv[1:])
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except SetformerError as error:
        if str(error):  # empty where a rank has printed it already
            print(f"error: {plain_lines(redacted(str(error)))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except UsageError as error:
        print(usage_fault(error, RunConfig), file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except (OSError, RuntimeError, MemoryError) as error:
        fault = no_memory(error) or (system_fault(error) if isinstance(error, OSError) else None)
        if fault is None:
            raise
        print(f"error: {plain_lines(redacted(fault))}", file=sys.stderr)
        sys.stdout = None  # what is left of its text would only fail again
        sys.exit(TransientError.exit_code)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(STOPPED_CODE)


if __name__ == "__main__":
    main()
