"""The config of a sweep: one strict TOML file, and the run config of each of its trials.

configs/sweeps/NAME.toml
[sweep]      name, base run config, metric, seeds per point
[set]        keys of the run config that all trials share, above those of the base
[space]      "optim.lr" = { loguniform = [1e-4, 1e-2] }
[budget]     trials, hours, ranks of a trial
[search]     which points          [scheduler]  which trials are stopped early

page + point + seed -> RunConfig -> an ordinary run in the sweep's folder
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from launch.run.config import RunConfig, resolve, shipped
from launch.sweep.journal import read_events
from launch.sweep.space import Parameter, Point, active, check_space, extremes, grid, parameters
from setformer_dist.core import config as base
from setformer_dist.core.config import FrozenConfig, nearest, suggested_key
from setformer_dist.core.continuing import FREE, Difference, differences
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.files import read_state
from setformer_dist.core.metric import AVERAGED, Mode, metric_named, mode_by_name

SWEEP = "sweep.json"
TRIALS = "trials"
_CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
_LEAST_SHARE = 0.01  # of a core; Ray counts cores in parts of 10,000
_MISSING = object()
_SHOWN = 4  # differences that an error names
# Keys of [run] that each trial gets from the sweep, and what sets them.
_OWN = {
    "name": "sweep.name names the folder of its trials",
    "out": "sweep.out names the folder of all sweeps",
    "threads": "budget.cpus_per_rank says how many a rank has",
}

# What a clone of a population may change: neither the shape of the model nor the order of samples.
_EXPLORED = ("optim.", "schedule.", "data.augment.", "ema.decay", "guard.", "distill.share", "distill.temperature")
_FIXED_IN_A_POPULATION = ("optim.name", "schedule.name", "schedule.epochs", "schedule.steps", "data.augment.repeats")


class SweepTable(FrozenConfig):
    """The `[sweep]` table.

    Attributes:
        name: the sweep's folder below `out`.
        out: folder of all sweeps.
        base: run config of the trials: a file beside the sweep config, or one that `setformer train` would take.
        metric: figure of an evaluation that is compared, with "ema_" before it for the averaged weights. By default
            the base's checkpoint.best_metric.
        mode: whether its largest or its smallest value is best; by default the task decides.
        value: which evaluation counts in the end, the last or the best one.
        seed: of the searcher; runs have run.seed of their own.
        seeds: runs per point, with run.seed, run.seed + 1, …; a point's value is their mean. The scheduler judges the
            first of them, and the others are run where it was not stopped.
    """

    name: Annotated[str, FREE]
    out: Annotated[str, FREE] = pydantic.Field(default="runs/sweeps", min_length=1)
    base: Annotated[str, FREE] = pydantic.Field(min_length=1)
    metric: str | None = pydantic.Field(default=None, min_length=1)
    mode: Mode | None = None
    value: Literal["last", "best"] = "last"
    seed: int = pydantic.Field(default=0, ge=0)
    seeds: int = pydantic.Field(default=1, ge=1, le=100)

    @pydantic.field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", value):
            raise ValueError("must be a folder name of at most 200 letters, digits, dots, dashes and underscores")
        return value


class BudgetTable(FrozenConfig):
    """The `[budget]` table.

    Attributes:
        trials: points that are tried, clones of a population among them.
        hours: of all starts of the sweep together, after which running trials are stopped; 0 for no limit.
        ranks: processes of each run.
        parallel: runs at one time; 0 for as many as fit.
        cpus_per_rank: cores that a rank is given; also its compute threads, at least one.
        gpus_per_rank: devices that a rank is given.
        stop_s: seconds that a stopped run has for its last checkpoint before it is ended.
        restarts: starts of a run again after its process or its node died.
        failed_share: share of failed trials, of those that ended since the start, at which the sweep stops.
        failed_least: how many must have ended before that is judged.
    """

    trials: Annotated[int, FREE] = pydantic.Field(ge=1, le=100_000)
    hours: Annotated[float, FREE] = pydantic.Field(default=0.0, ge=0)
    ranks: Annotated[int, FREE] = pydantic.Field(default=1, ge=1)
    parallel: Annotated[int, FREE] = pydantic.Field(default=0, ge=0)
    cpus_per_rank: float = pydantic.Field(default=1.0, gt=0)
    gpus_per_rank: Annotated[int, FREE] = pydantic.Field(default=0, ge=0, le=1)
    stop_s: Annotated[float, FREE] = pydantic.Field(default=4.0, gt=0)
    restarts: Annotated[int, FREE] = pydantic.Field(default=3, ge=0)
    failed_share: Annotated[float, FREE] = pydantic.Field(default=0.5, gt=0, le=1)
    failed_least: Annotated[int, FREE] = pydantic.Field(default=3, ge=1)

    @pydantic.field_validator("cpus_per_rank")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a whole number, or a share of one core")
        if value < _LEAST_SHARE:
            raise ValueError(f"must be at least {_LEAST_SHARE:g}: a rank needs a share of a core")
        return value

    @property
    def threads(self) -> int:
        """Compute threads of a rank."""
        return max(1, int(self.cpus_per_rank))


class SearchTable(FrozenConfig):
    """The `[search]` table.

    Attributes:
        name: "random", "grid" (every combination; all parameters are choice, grid or int), "tpe" (Bergstra et al. 2011)
            or "cmaes" (Hansen 2016; numbers only, others are drawn at random), both by Optuna.
        startup: points drawn at random before "tpe" or "cmaes" begins.
    """

    name: Literal["random", "grid", "tpe", "cmaes"] = "tpe"
    startup: int = pydantic.Field(default=10, ge=1)


class SchedulerTable(FrozenConfig):
    """The `[scheduler]` table; a trial is judged at each of its evaluations.

    Attributes:
        name: "none", "asha" (asynchronous successive halving, Li et al. 2020), "hyperband" (Li et al. 2018), "median"
            (worse than the median of the others at the same evaluation), all by Optuna; or "pbt" (population based
            training, Jaderberg et al. 2017).
        first: evaluations before a trial may be stopped.
        last: evaluations of a whole run; "hyperband" needs it.
        reduction: one of so many trials goes on from a rung ("asha", "hyperband").
        startup: trials that must have ended before "median" judges.
        population: members of "pbt", all at one time.
        interval: evaluations between two judgements of "pbt".
        quantile: share of the members that is replaced by clones of as many best ones ("pbt").
        resample: probability that a clone's parameter is drawn anew instead of multiplied by 0.8 or 1.2 ("pbt").
    """

    name: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    first: int = pydantic.Field(default=1, ge=1)
    last: int | None = pydantic.Field(default=None, ge=1)
    reduction: int = pydantic.Field(default=3, ge=2)
    startup: int = pydantic.Field(default=4, ge=1)
    population: int = pydantic.Field(default=4, ge=2)
    interval: int = pydantic.Field(default=1, ge=1)
    quantile: float = pydantic.Field(default=0.25, gt=0, le=0.5)
    resample: float = pydantic.Field(default=0.25, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _complete(self) -> SchedulerTable:
        if self.name == "hyperband" and self.last is None:
            raise ValueError('scheduler.name = "hyperband" needs scheduler.last, the evaluations of a whole run')
        if self.last is not None and self.last < self.first:
            raise ValueError(f"scheduler.last = {self.last} is below scheduler.first = {self.first}")
        return self


class SweepConfig(FrozenConfig):
    """The sweep config.

    Attributes:
        set: keys of the run config that all trials share, as tables.
        space: parameters by dotted key of the run config.
    """

    sweep: SweepTable
    budget: BudgetTable
    search: SearchTable = SearchTable()
    scheduler: SchedulerTable = SchedulerTable()
    set: dict[str, Any] = pydantic.Field(default_factory=dict)
    space: dict[str, Parameter]

    @pydantic.model_validator(mode="after")
    def _together(self) -> SweepConfig:
        check_space(self.space, self.search.name)
        if self.scheduler.name != "pbt":
            return self
        if self.sweep.seeds != 1:
            raise ValueError('scheduler.name = "pbt" takes one seed per point: leave sweep.seeds out')
        if self.search.name == "grid":
            raise ValueError('scheduler.name = "pbt" draws its own points: search.name = "grid" has no effect with it')
        if self.budget.trials < self.scheduler.population:
            raise ValueError(
                f"budget.trials = {self.budget.trials} is below scheduler.population = {self.scheduler.population}"
            )
        for key, parameter in self.space.items():
            if not key.startswith(_EXPLORED) or key in _FIXED_IN_A_POPULATION:
                raise ValueError(
                    f'space."{key}" cannot change within a run, and the clones of "pbt" go on from a checkpoint: '
                    f"parameters may be of {', '.join(word.rstrip('.') for word in _EXPLORED)}"
                )
            if parameter.when:
                raise ValueError(f'space."{key}": "pbt" takes no conditions (when)')
        return self

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(self.sweep.out) / self.sweep.name


@dataclass(frozen=True)
class Sweep:
    """A sweep whose config and base have been read.

    Attributes:
        config: the sweep config.
        table: of the base run config, with `[set]` on top.
        source: what errors of a trial's config begin with.
    """

    config: SweepConfig
    table: Mapping[str, object]
    source: str

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.config.folder

    @cached_property
    def run(self) -> RunConfig:
        """The base run config; its keys that the space sets have no meaning."""
        return self.run_config(self._any_point(), 0, "base")

    @cached_property
    def metric(self) -> str:
        """The figure that is compared."""
        return self.config.sweep.metric or self.run.checkpoint.best_metric

    @cached_property
    def mode(self) -> Mode:
        """Which values of it are better."""
        if self.config.sweep.mode is not None:
            return self.config.sweep.mode
        known = metric_named(self.run.metrics, self.metric)
        return known.mode if known is not None else mode_by_name(self.metric)

    def better(self, a: float, b: float) -> bool:
        """Return whether one value is better than another."""
        return a > b if self.mode == "max" else a < b

    def run_folder(self, trial: int, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / TRIALS / self.run_name(trial, seed)

    def run_name(self, trial: int, seed: int) -> str:
        """Return the name of a run: the first seed's is the trial's."""
        return f"trial-{trial:04d}" + (f"-seed-{seed}" if seed else "")

    def run_config(self, point: Point, seed: int, name: str) -> RunConfig:
        """Return the config of a run.

        Args:
            point: values of the active parameters, by key.
            seed: index of the seed, from 0.
            name: of the run.

        Raises:
            ConfigError: the values make no run config.
        """
        table = laid_on(self.table, point)
        of_run = table.get("run")
        given = of_run.get("seed", 0) if isinstance(of_run, Mapping) else 0
        own = {
            "name": name,
            "out": str(self.folder / TRIALS),
            "seed": given + seed if type(given) is int else given,
            # Not the cores that happen to be free: another number of threads adds in another order.
            "threads": self.config.budget.threads,
        }
        shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in point.items())
        return base.build(
            RunConfig, base.merge(table, {"run": own}), f"{self.source} with {shown}" if shown else self.source
        )

    def as_json(self) -> dict[str, Any]:
        """Return sweep config and base as sweep.json stores them."""
        return {"page": self.config.model_dump(mode="json"), "base": self.run.model_dump(mode="json")}

    def _any_point(self) -> Point:
        return active(self.config.space, {key: p.first for key, p in self.config.space.items()})


def laid_on(table: Mapping[str, object], point: Point) -> dict[str, object]:
    """Return a run config's table with the values of a point on top."""
    merged = dict(table)
    for key, value in point.items():
        *tables, last = key.split(".")
        inner: dict[str, object] = {last: value}
        for name in reversed(tables):
            inner = {name: inner}
        merged = base.merge(merged, inner)
    return merged


def shipped_page(path: Path) -> Path:
    """Return the path of a sweep config: as given if it exists, else the shipped one of that name."""
    if path.exists() and not (path.is_dir() and len(path.parts) == 1):  # digits/ may be a folder here
        return path
    place = _CONFIGS / "sweeps" / f"{path.name.removesuffix('.toml')}.toml"
    return place if place.is_file() and path.suffix in ("", ".toml") and not path.is_absolute() else path


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep config, its overrides and its base, and check all that can be checked before a trial runs.

    Raises:
        ConfigError: naming the file, the key and the repair.
    """
    table: Mapping[str, object] = base.read_toml(path)
    for text in overrides:
        table = base.apply_override(table, text)
    space = table.get("space")
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            f'{path}: [space] is empty: name a parameter, as "optim.lr" = {{ loguniform = [1e-4, 1e-2] }}'
        )
    table = {**table, "space": parameters(space, str(path))}
    config = base.build(SweepConfig, table, str(path))
    origin = base_of(path, config.sweep.base)
    sweep = Sweep(config, base.merge(base.read_toml(origin), config.set), f"{path}, base {origin}")
    _check(sweep, path)
    return sweep


def base_of(page: Path, name: str) -> Path:
    """Return the run config that a sweep config names: a file beside it, or a shipped one."""
    beside = page.parent / name
    return beside if beside.is_file() else shipped(Path(name))


def _check(sweep: Sweep, path: Path) -> None:
    """Check keys, metric and the configs at the ends of the space."""
    known = base.all_keys(RunConfig)
    for key in sweep.config.space:
        if not any(key == other or key.startswith(f"{other}.") for other in known):
            raise ConfigError(f'{path}: space."{key}" is no key of a run config{suggested_key(RunConfig, key)}')
        if key in ("run.seed", *(f"run.{name}" for name in _OWN)):
            raise ConfigError(f'{path}: space."{key}" is set by the sweep itself: leave it out')
    _check_set(sweep.config, path)
    if sweep.config.scheduler.name == "pbt" and sweep.run.eval.patience:
        raise ConfigError(
            f'{path}: eval.patience = {sweep.run.eval.patience} ends members early, and "pbt" judges a population that '
            "is whole: set it to 0"
        )
    metrics = sweep.run.metrics
    metric = metric_named(metrics, sweep.metric)
    if metrics and metric is None:
        names = [m.name for m in metrics]
        raise ConfigError(
            f"{path}: sweep.metric = {sweep.metric!r} is no metric of task {sweep.run.task.name}: "
            f"{nearest(sweep.metric, names)}"
        )
    if metric is not None and sweep.mode != metric.mode:
        raise ConfigError(
            f"{path}: sweep.mode = {sweep.mode!r} is wrong for {sweep.metric}: its best is the {metric.mode}"
        )
    if sweep.metric.startswith(AVERAGED) and sweep.run.ema.decay == 0 and "ema.decay" not in sweep.config.space:
        raise ConfigError(f"{path}: sweep.metric = {sweep.metric!r} needs averaged weights: set ema.decay in the base")
    if sweep.config.search.name == "grid":
        try:
            grid(sweep.config.space)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    for point in extremes(sweep.config.space):
        resolve(sweep.run_config(point, 0, sweep.run_name(0, 0)), sweep.config.budget.ranks)


def _check_set(config: SweepConfig, path: Path) -> None:
    """Refuse keys of `[set]` that no run would ever have, as the sweep or the space has the last word on them."""
    of_run = config.set.get("run")
    if taken := [name for name in _OWN if isinstance(of_run, Mapping) and name in of_run]:
        raise ConfigError(f"{path}: set.run.{taken[0]} is set by the sweep itself: {_OWN[taken[0]]}")
    for key, parameter in config.space.items():
        inner: object = config.set
        for name in key.split("."):
            inner = inner.get(name, _MISSING) if isinstance(inner, Mapping) else _MISSING
        if inner is not _MISSING and not parameter.when:
            raise ConfigError(f'{path}: set.{key} has no effect, as space."{key}" sets it in each run: take one out')


def check_continued(sweep: Sweep) -> bool:
    """Return whether the folder holds this sweep, False where it holds none, or one that never did anything.

    Raises:
        ConfigError: it holds a sweep of another config or base; with the keys that differ.
        DataError: the journal is damaged.
    """
    path = sweep.folder / SWEEP
    try:
        there, _ = read_state(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it, or give this sweep another sweep.name") from None
    page, run = there.get("page"), there.get("base")
    if not isinstance(page, dict) or not isinstance(run, dict):
        raise ConfigError(f"{path} holds no sweep: move it away, or give this sweep another sweep.name")
    if not read_events(sweep.folder) and not (sweep.folder / TRIALS).exists():
        return False  # what kept it from its first trial may have been its config
    found: list[Difference] = [*_changed_space(page, sweep), *differences(page, sweep.config)]
    found += [Difference(f"base {d.key}", d.there, d.here) for d in differences(run, sweep.run)]
    own = {f"base {key}" for key in sweep.config.space}
    found = [d for d in found if d.key not in own and not d.key.startswith("set")]
    if found:
        shown = ", ".join(f"{d.key} was {d.there!r} and is {d.here!r}" for d in found[:_SHOWN])
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"the sweep config or its base changed since the sweep in {sweep.folder} began ({shown}{more}): "
            "set it back, or give this sweep another sweep.name"
        )
    return True


def _changed_space(page: Mapping[str, Any], sweep: Sweep) -> list[Difference]:
    there, here = page.get("space"), sweep.config.model_dump(mode="json")["space"]
    names = there.keys() if isinstance(there, dict) else ()
    return [
        Difference(f'space."{key}"', key if key in names else None, key if key in here else None)
        for key in sorted({*names} ^ {*here})
    ]


def read_sweep(folder: Path) -> Sweep:
    """Return the sweep of a folder, as it was begun.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        there, _ = read_state(folder / SWEEP)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no sweep: name a sweep's folder, such as runs/sweeps/NAME") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / SWEEP} is damaged: {error}") from None
    page, run = there.get("page"), there.get("base")
    if not isinstance(page, dict) or not isinstance(run, dict) or not isinstance(page.get("space"), dict):
        raise DataError(f"{folder / SWEEP} holds no sweep")
    try:
        page = {**page, "space": parameters(page["space"], str(folder / SWEEP))}
        config = base.build(SweepConfig, page, str(folder / SWEEP))
    except ConfigError as error:
        raise DataError(str(error)) from None
    moved = config.model_copy(
        update={"sweep": config.sweep.model_copy(update={"name": folder.name, "out": str(folder.parent)})}
    )
    return Sweep(moved, run, str(folder / SWEEP))
