"""Sweeps without processes: the page, the space, the journal, and a state that is a function of the journal."""

from __future__ import annotations

import csv
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from checkpoints.layout import MANIFEST, step_folder
from launch.ranks.signals import Received
from launch.run.config import load_run
from launch.sweep import commands, population, promote
from launch.sweep.driver import Driver, Running
from launch.sweep.journal import JOURNAL, Journal, read_events
from launch.sweep.page import (
    SWEEP,
    SchedulerTable,
    Sweep,
    SweepConfig,
    check_continued,
    load_sweep,
    read_sweep,
    shipped_page,
)
from launch.sweep.progress import ProgressReader
from launch.sweep.report import recommendation, study_of, write
from launch.sweep.space import Parameter, extremes, grid, parameters
from launch.sweep.state import Book, as_json, book_of
from launch.sweep.table import final_table, live_table, write_csv
from launch.testing.commands import DEMO, ROOT
from setformer_dist.core.config import all_keys
from setformer_dist.core.errors import ConfigError, DataError, RankFailedError, TransientError
from setformer_dist.core.files import write_state
from setformer_dist.engine.config import ScheduleConfig
from setformer_dist.report.rows import METRICS

PAGE = """
[sweep]
name = "s"
base = "demo"
{sweep}
[set.schedule]
epochs = 2
[space]
{space}
[budget]
trials = 30
{tail}
"""
LR = '"optim.lr" = { loguniform = [1e-4, 1e-2] }'


def page(folder: Path, space: str = LR, sweep: str = "", tail: str = "", *overrides: str) -> Sweep:
    path = folder / "page.toml"
    path.write_text(PAGE.format(space=space, sweep=sweep, tail=tail))
    return load_sweep(path, [f"sweep.out={folder}", *overrides])


@pytest.mark.parametrize(
    ("space", "tail", "said"),
    [
        ('"optim.lrr" = { choice = [1.0] }', "", 'space."optim.lrr" is no key of a run config: did you mean optim.lr?'),
        ('"optim.lr" = { logunifrom = [1e-4, 1e-2] }', "", "did you mean loguniform"),
        ('"optim.lr" = { uniform = [1e-2, 1e-4] }', "", "is empty: its lowest value is above its highest"),
        ('"optim.lr" = { loguniform = [0.0, 1.0] }', "", "must begin above 0"),
        ('"optim.lr" = { uniform = [0.0, inf] }', "", "finite"),
        ('"optim.lr" = { choice = [] }', "", "choice is empty"),
        ('"optim.lr" = { choice = [1e-3, 1e-3] }', "", "names a value twice"),
        ('"optim.lr" = { choice = [1, 1.0] }', "", "names a value twice"),
        ('"optim.betas" = { choice = [[0, 0.5], [0.0, 0.5]] }', "", "names a value twice"),
        ('"optim.lr" = { choice = [1e-3], uniform = [0.1, 0.2] }', "", "not choice and uniform"),
        ('"optim.lr" = { step = 2 }', "", "give one of choice, uniform, loguniform, int, grid"),
        ('"optim.lr" = 3', "", "is no parameter"),
        ('"optim.lr" = { grid = [2.0, 1.0] }', "", "must rise"),
        ("", "", "[space] is empty"),
        ('"optim.lr" = { uniform = [-1.0, 1.0] }', "", "optim.lr = -1"),  # impossible at one end of the space
        ('"schedule.epochs" = { uniform = [1.0, 3.0] }', "", "schedule.epochs"),
        ('"run.seed" = { int = [0, 3] }', "", "is set by the sweep itself"),
        ('"optim.lr" = { choice = [2020-01-01, 0.1] }', "", "has a date or a time"),
        ('"optim.lr" = 2020-01-01', "", "is no parameter"),
        ('"data.augment.nosuch.x" = { choice = [1] }', "", "no table has keys there"),
        (f"{LR}\noptim.lr = {{ choice = [0.1] }}", "", 'space."optim.lr" is given twice'),
        ('"run.log_every" = { int = [-9000000000000000000, 9000000000000000000] }', "", "spans more than 2**53"),
        (
            '"run.log_every" = { int = [1, 1000000000000] }',
            'search = { name = "grid" }',
            "page.toml: the grid of the space has more than 100,000 points",
        ),
        ('"schedule.epochs" = { int = [1, 2] }', "", "set.schedule.epochs has no effect"),
        (LR, 'search = { name = "grid" }', "is loguniform, which a grid cannot count out"),
        (LR, 'scheduler = { name = "hyperband" }', "needs scheduler.last"),
        (LR, 'scheduler = { name = "pbt", population = 31 }', "below scheduler.population"),
        ('"data.augment.repeats" = { int = [1, 4] }', 'scheduler = { name = "pbt" }', "cannot change within a run"),
        ('"model.drop_path" = { uniform = [0.0, 0.1] }', 'scheduler = { name = "pbt" }', "cannot change within a run"),
        (LR, 'search = { nmae = "tpe" }', "did you mean search.name?"),
    ],
)
def test_a_page_that_cannot_run_is_refused_in_one_sentence(tmp_path: Path, space: str, tail: str, said: str) -> None:
    top = f"{tail}\n" if tail else ""
    path = tmp_path / "page.toml"
    path.write_text(top + PAGE.format(space=space, sweep="", tail=""))
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_of_a_population_do_not_end_early(tmp_path: Path) -> None:
    page(tmp_path, LR, "", "", "set.eval.patience=2")
    with pytest.raises(ConfigError, match=r"eval\.patience = 2 ends members early"):
        page(tmp_path, LR, "", "", "set.eval.patience=2", "scheduler.name=pbt")


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ('{ "optim.name" = ["adamw"] }', "which is no parameter of the space"),
        ('{ "schedule.name" = ["nosuch"] }', "can never be active"),
        ('{ "schedule.name" = [] }', "can never be active"),
        ('{ "optim.lr" = [0.1] }', "whose values are not countable"),
        ('{ "schedule.power" = [1.0] }', "must stand before it"),
        ('{ "schedule.name" = [2020-01-01] }', "has a date or a time"),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(tmp_path: Path, when: str, said: str) -> None:
    space = f'{LR}\n"schedule.name" = {{ choice = ["cosine", "polynomial"] }}\n'
    space += f'"schedule.power" = {{ grid = [1.0, 2.0], when = {when} }}'
    with pytest.raises(ConfigError, match=said):
        page(tmp_path, space)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("budget.cpus_per_rank=1e-9", "must be at least 0.01"),
        ("sweep.metric=", "sweep.metric = '': string should have at least 1 character"),
        ("sweep.base=", "sweep.base = '': string should have at least 1 character"),
        ("sweep.out=", "sweep.out = '': string should have at least 1 character"),
        ("set.run.name=mine", "set.run.name is set by the sweep itself: sweep.name names"),
        ("set.run.out=here", "set.run.out is set by the sweep itself: sweep.out names"),
        ("set.run.threads=4", "set.run.threads is set by the sweep itself: budget.cpus_per_rank says"),
        ("set.optim.lr=0.1", 'set.optim.lr has no effect, as space."optim.lr" sets it in each run'),
    ],
)
def test_what_a_sweep_would_not_heed_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        page(tmp_path, LR, "", "", override)
    assert said in str(caught.value)


def test_one_and_one_point_zero_are_the_same_value(tmp_path: Path) -> None:
    """A grid holds fractions, whatever its page says, and a condition may name them as integers."""
    when = '"optim.lr" = { choice = [0.1], when = { "optim.weight_decay" = [1] } }'
    for places in ("grid = [1, 2]", "choice = [1.0, 2]"):
        space = page(tmp_path, f'"optim.weight_decay" = {{ {places} }}\n{when}').config.space
        assert {"optim.weight_decay": 1.0, "optim.lr": 0.1} in grid(space)
    told = Parameter(choice=(True, 1, "1"))
    assert [told.place(value) for value in (True, 1.0, "1", 2)] == [0, 1, 2, None]
    assert Parameter(int=(1, 9), step=4).place(5.0) == 1


def test_metric_and_mode_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean top1"):
        page(tmp_path, sweep='metric = "tpo1"')
    with pytest.raises(ConfigError, match="its best is the min"):
        page(tmp_path, sweep='metric = "loss"\nmode = "max"')
    assert page(tmp_path).metric == "top1"
    assert page(tmp_path, sweep='metric = "ema_loss"').mode == "min"


def test_a_point_of_the_grid_is_made_once_and_inactive_parameters_are_left_out() -> None:
    space = parameters(
        {"a": {"choice": ["x", "y"]}, "b": {"int": [1, 5], "step": 2}, "c": {"grid": [0.5, 1.0], "when": {"a": ["y"]}}},
        "here",
    )
    points = grid(space)
    assert len(points) == 3 + 3 * 2
    assert {json.dumps(point) for point in points} >= {'{"a": "x", "b": 5}', '{"a": "y", "b": 3, "c": 0.5}'}
    assert len({json.dumps(point) for point in points}) == len(points)
    ends = list(extremes(space))
    assert {point["b"] for point in ends} == {1, 5}
    assert {point.get("c") for point in ends} == {None, 0.5, 1.0}
    nested = parameters({"optim": {"lr": {"grid": [1.0]}}, "x": {"choice": [1]}}, "here")
    assert list(nested) == ["optim.lr", "x"]
    assert isinstance(nested["optim.lr"], Parameter)


def test_the_config_of_a_run_follows_from_page_point_and_seed(tmp_path: Path) -> None:
    sweep = page(tmp_path, sweep="seeds = 2", tail="cpus_per_rank = 2")
    config = sweep.run_config({"optim.lr": 0.5}, 1, "trial-0007-seed-1")
    assert config.optim.lr == 0.5
    assert (config.run.seed, config.run.threads) == (1, 2)
    assert config.folder == tmp_path / "s" / "trials" / "trial-0007-seed-1"
    assert config.schedule.epochs == 2


# The journal.


def test_a_torn_line_is_taken_away_and_a_changed_one_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        journal.append({"event": "opened", "time": float(number)})
    journal.close()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    for end in range(len(whole) - 1, whole.rindex(b"\n", 0, -1), -7):
        path.write_bytes(whole[:end])
        assert [event["time"] for event in read_events(tmp_path)] == [0.0, 1.0]
        journal = Journal(tmp_path)
        journal.append({"event": "opened", "time": 9.0})
        journal.close()
        assert [event["time"] for event in read_events(tmp_path)] == [0.0, 1.0, 9.0]
    lines = whole.splitlines(keepends=True)
    changed = lines[1].replace(b"1.0", b"7.0")
    for damaged in (lines[0] + changed + lines[2], lines[0] + lines[2] + lines[2], lines[1] + lines[0] + lines[2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged or another one is missing"):
            Journal(tmp_path)


def test_a_page_that_changed_is_refused_by_name(tmp_path: Path) -> None:
    sweep = page(tmp_path)
    assert not check_continued(sweep)
    sweep.folder.mkdir()
    write_state(sweep.folder / SWEEP, sweep.as_json())
    # Nothing has been done yet, for example since no cluster was there: another config may take its place.
    assert not check_continued(page(tmp_path, LR, "seed = 4"))
    journal = Journal(sweep.folder)
    journal.append({"event": "opened"})
    journal.close()
    assert check_continued(sweep)
    assert check_continued(page(tmp_path, LR, "", "", "budget.trials=99", "budget.hours=3.0"))  # may change
    for changed, named in (
        (page(tmp_path, '"optim.lr" = { loguniform = [1e-4, 1e-3] }'), "space.optim.lr.loguniform was"),
        (page(tmp_path, f'{LR}\n"ema.decay" = {{ grid = [0.9] }}'), r'space."ema.decay" was'),
        (page(tmp_path, LR, "seed = 4"), "sweep.seed was 0 and is 4"),
        (page(tmp_path, LR, "", "", "set.optim.weight_decay=0.5"), "base optim.weight_decay was"),
        (page(tmp_path, LR, "", "", "search.name=random"), "search.name was 'tpe' and is 'random'"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_continued(changed)
    there = read_sweep(sweep.folder)
    assert there.run_config({"optim.lr": 0.5}, 0, "x") == sweep.run_config({"optim.lr": 0.5}, 0, "x")
    (sweep.folder / SWEEP).write_text("{}}")
    with pytest.raises(ConfigError, match=r"sweep.json is damaged"):
        check_continued(sweep)


# The state is a function of the journal.


def drive(sweep: Sweep, seed: int, trials: int, at_once: int = 3, reports: int = 4) -> list[dict[str, Any]]:
    """Return the journal of a sweep whose trials are a formula, in an order that is drawn."""
    book, draw, journal = Book(sweep), random.Random(seed), []

    def write(event: dict[str, Any]) -> None:
        journal.append(book.take(event))

    living: list[int] = []
    while True:
        while len(living) < at_once and len(book.trials) < trials and not book.exhausted:
            write({"event": "asked", "trial": len(book.trials)})
            living.append(len(book.trials) - 1)
        if not living:
            return journal
        trial = book.trials[draw.choice(living)]
        done = len(trial.reports)
        value = sum(float(v) if isinstance(v, float) else len(str(v)) for v in trial.point.values()) + 0.1 * done
        if trial.stop or done == reports:
            state = "pruned" if trial.stop else "done"
            value = draw.choice([value, value + 1])
            write({"event": "ended", "trial": trial.number, "seed": 0, "state": state, "step": done, "seconds": 1.0,
                   "value": None if trial.stop else value})  # fmt: skip
            living.remove(trial.number)
        else:
            write({"event": "reported", "trial": trial.number, "step": done + 1, "value": value})


SPACE = (
    f'{LR}\n"optim.weight_decay" = {{ uniform = [0.0, 0.1] }}\n"batch.micro" = {{ choice = [16, 32] }}\n'
    '"ema.decay" = { grid = [0.9, 0.95, 0.99] }\n"schedule.name" = { choice = ["cosine", "polynomial"] }\n'
    '"schedule.power" = { uniform = [1.0, 2.0], when = { "schedule.name" = ["polynomial"] } }'
)


@pytest.mark.parametrize("searcher", ["random", "tpe", "cmaes"])
@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband", "median"])
def test_a_sweep_that_was_killed_suggests_and_decides_as_if_it_was_not(
    tmp_path: Path, searcher: str, scheduler: str
) -> None:
    tail = f'[search]\nname = "{searcher}"\nstartup = 4\n[scheduler]\nname = "{scheduler}"\nlast = 4\nreduction = 2\n'
    sweep = page(tmp_path, SPACE, "", tail)
    whole = drive(sweep, 1, 10)
    points = [event["point"] for event in whole if event["event"] == "asked"]
    assert len({json.dumps(point) for point in points}) == 10
    for kill in range(1, len(whole), 19):
        killed = book_of(sweep, json.loads(json.dumps(whole[:kill])))  # as it is read back
        for event in whole[kill:]:
            asked = {key: value for key, value in event.items() if key != "point"}
            assert killed.take(asked) == event
        again = book_of(sweep, whole)
        assert [(t.state, t.stop, t.value) for t in killed.trials] == [(t.state, t.stop, t.value) for t in again.trials]
    if scheduler != "none":
        assert any(event.get("state") == "pruned" for event in whole)


def test_the_searcher_learns(tmp_path: Path) -> None:
    """Suggestions depend on results: another result, another suggestion."""
    sweep = page(tmp_path, SPACE, "", "[search]\nstartup = 3\n")
    one, other = drive(sweep, 1, 14), drive(sweep, 2, 14)
    points = [[event["point"] for event in journal if event["event"] == "asked"] for journal in (one, other)]
    assert points[0][:3] == points[1][:3]
    assert points[0][-1] != points[1][-1]


def test_a_journal_of_another_searcher_is_refused(tmp_path: Path) -> None:
    journal = drive(page(tmp_path), 1, 4)
    journal[0]["point"]["optim.lr"] = 0.0077
    with pytest.raises(DataError, match="the searcher suggests"):
        book_of(page(tmp_path), journal)
    with pytest.raises(DataError, match="does not follow"):
        book_of(page(tmp_path), [{"event": "ended", "trial": 3, "seed": 0}])


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "forked"}, "an event that this version does not know"),
        ({"event": "_init__"}, "an event that this version does not know"),
        ({"event": "started", "trial": -1, "seed": 0}, "does not follow"),
        ({"event": "started", "trial": 0, "seed": -1}, "does not follow"),
        ({"event": "reported", "trial": 0, "step": 1e999, "value": 0.5}, "does not follow"),
        ({"event": "reported", "trial": 0, "step": 1, "value": "much"}, "does not follow"),
        ({"event": "cloned", "trial": 1, "point": [], "source": 0, "step": 1, "replaces": 0}, "does not follow"),
        ({"event": "ended", "trial": 0, "seed": 0, "state": "won", "value": 1, "step": 1, "seconds": 1}, "not follow"),
        ({"event": "over", "time": 10**400}, "does not follow"),
    ],
)
def test_an_event_that_no_driver_wrote_is_refused(tmp_path: Path, event: dict[str, Any], said: str) -> None:
    book = Book(page(tmp_path))
    book.take({"event": "asked", "trial": 0, "time": 1.0})
    with pytest.raises(DataError, match=said):
        book.take(event)


def test_a_journal_that_was_removed_is_not_written_to_nobody(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"event": "opened"})
    journal.path.unlink()
    with pytest.raises(TransientError, match="was removed while the sweep was at work"):
        journal.append({"event": "over"})
    journal.close()


def test_a_sweep_whose_trials_all_failed_has_failed(tmp_path: Path) -> None:
    sweep = page(tmp_path, LR, "", "", "budget.trials=1")
    sweep.folder.mkdir()
    journal = Journal(sweep.folder)
    book = Book(sweep)
    journal.append(book.take({"event": "asked", "trial": 0}))
    journal.append({"event": "ended", "trial": 0, "seed": 0, "state": "failed", "value": None, "step": 0,
                    "seconds": 1.0, "why": "no data"})  # fmt: skip
    with pytest.raises(RankFailedError, match="of 1 trial each one failed, the last one: no data"):
        Driver(sweep, journal, Received(None), print).run()
    journal.close()


def test_a_note_is_a_text_in_the_csv(tmp_path: Path) -> None:
    sweep = page(tmp_path)
    book = Book(sweep)
    for number, why in enumerate(["=cmd|'/c calc'!A1", "\x1b[31mred"]):
        book.take({"event": "asked", "trial": number})
        book.take({"event": "ended", "trial": number, "seed": 0, "state": "failed", "value": None, "step": 0,
                   "seconds": 1.0, "why": why})  # fmt: skip
    sweep.folder.mkdir()
    notes = [row["note"] for row in csv.DictReader(write_csv(sweep, book).open())]
    assert notes == ["'=cmd|'/c calc'!A1", r"\x1b[31mred"]


def test_a_sweep_can_be_shown_where_nothing_can_be_written(tmp_path: Path) -> None:
    sweep = page(tmp_path)
    sweep.folder.mkdir()
    write_state(sweep.folder / SWEEP, sweep.as_json())
    (sweep.folder / "results.csv").mkdir()  # nothing can take its place
    console = Console(width=200, file=io.StringIO())
    journal = Journal(sweep.folder)
    journal.append(Book(sweep).take({"event": "asked", "trial": 0}))
    journal.close()
    with pytest.raises(OSError, match=r"s/results.csv"):
        commands.show(sweep.folder, console)
    assert isinstance(console.file, io.StringIO)
    assert "nothing to recommend" in console.file.getvalue()
    assert "interrupted" in console.file.getvalue()  # nobody runs it


def test_a_wide_range_of_integers_is_not_counted_out(tmp_path: Path) -> None:
    wide = '"run.log_every" = { int = [1, 1000000000000], step = 3 }'
    sweep = page(tmp_path, f'{wide}\n"optim.lr" = {{ choice = [0.1], when = {{ "run.log_every" = [4] }} }}')
    parameter = sweep.config.space["run.log_every"]
    assert parameter.ends == (1, 1_000_000_000_000)
    assert [parameter.place(value) for value in (1, 4, 5, True, "4")] == [0, 1, None, None, None]
    asked = [event["point"]["run.log_every"] for event in drive(sweep, 1, 3) if event["event"] == "asked"]
    assert all(value % 3 == 1 for value in asked)
    table = SchedulerTable(name="pbt")
    assert population.explored(table, sweep.config.space, {"run.log_every": 4}, 1, 0)["run.log_every"] % 3 == 1


def test_a_grid_ends_where_its_points_do(tmp_path: Path) -> None:
    sweep = page(tmp_path, '"ema.decay" = { grid = [0.9, 0.95] }', "", '[search]\nname = "grid"\n')
    points = [event["point"]["ema.decay"] for event in drive(sweep, 1, 30) if event["event"] == "asked"]
    assert points == [0.9, 0.95]


def test_points_have_the_mean_and_the_spread_of_their_seeds(tmp_path: Path) -> None:
    sweep = page(tmp_path, LR, "seeds = 2")
    book = Book(sweep)
    for number, values in enumerate([(0.5, 0.7), (0.9, 0.9), (0.1, None)]):
        book.take({"event": "asked", "trial": number})
        for seed, value in enumerate(values):
            state = "failed" if value is None else "done"
            book.take({"event": "ended", "trial": number, "seed": seed, "state": state, "value": value, "step": 5,
                       "seconds": 1.0, "why": "x" if value is None else ""})  # fmt: skip
    assert [trial.number for trial in book.ranked()] == [1, 0]
    assert book.trials[0].value == pytest.approx(0.6)
    assert book.trials[0].spread == pytest.approx(0.1414, abs=1e-3)
    assert book.trials[2].state == "failed"
    said = " ".join(recommendation(sweep, book))
    assert "Recommended: trial 1" in said
    assert "Welch" in said
    sweep.folder.mkdir()
    text = write_csv(sweep, book).read_text().splitlines()
    assert text[0].startswith("trial,state,top1,spread,seeds,step,seconds,optim.lr")
    assert [line.split(",")[0] for line in text[1:]] == ["1", "0", "2"]
    assert final_table(sweep, book).row_count == 3


def test_what_has_not_ended_is_interrupted_where_no_driver_runs(tmp_path: Path) -> None:
    sweep = page(tmp_path)
    sweep.folder.mkdir()
    book = Book(sweep)
    book.take({"event": "asked", "trial": 0})
    for at_work, state in ((True, "running"), (False, "interrupted")):
        book.at_work = at_work
        assert write_csv(sweep, book).read_text().splitlines()[1].startswith(f"0,{state},")
        assert as_json(book, book.trials[0])["state"] == state
        assert f"1 trial (1 {state})" in write(sweep, book).read_text()


def test_the_page_of_a_sweep_is_one_file_that_needs_no_network(tmp_path: Path) -> None:
    sweep = page(tmp_path, SPACE.replace('"ema.decay"', '"optim.clip_norm"'))
    events = drive(sweep, 3, 10)
    sweep.folder.mkdir()
    text = write(sweep, book_of(sweep, events)).read_text()
    assert "Parallel coordinates" in text
    assert "Importance of the parameters, from 10 complete trials: too few to rely on" in text
    assert "optim.weight_decay" in text
    outside = [tag for tag in ("<script src", "<link", "cdn.plot.ly/plotly") if tag in text]
    assert not outside
    study = study_of(sweep, book_of(sweep, events))
    assert len(study.trials) == 10
    assert {trial.params["schedule.name"] for trial in study.trials} == {"cosine", "polynomial"}  # not "'cosine'"
    assert {trial.params["batch.micro"] for trial in study.trials} == {"16", "32"}


def test_the_live_table_shows_what_runs(tmp_path: Path) -> None:
    sweep = page(tmp_path, LR, "seeds = 2")
    book = Book(sweep)
    book.take({"event": "asked", "trial": 0})
    run = sweep.run_folder(0, 0)
    run.mkdir(parents=True)
    rows = [
        {"kind": "train", "step": 22, "images_per_s": 1234.5, "epoch": 1.0},
        {"kind": "eval", "step": 22, "top1": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    reader = ProgressReader(run, "top1", (2, None))
    progress = reader.read()
    assert (progress.step, progress.evals, progress.share) == (22, [(22, 0.5)], 0.5)
    running = Running(time.monotonic() - 100.0, reader, progress, 0.0)
    console = Console(width=200, file=io.StringIO())
    console.print(live_table(sweep, book, {(0, 0): running}))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for word in ("trial", "state", "config", "step", "top1", "samples/s", "time left"):
        assert word in text
    for value in ("running", "optim.lr=", "22", "0.5000", "1,234", "2 min"):
        assert value in text


# Populations.


def test_the_worst_member_gives_up_for_a_clone_of_a_better_one() -> None:
    config = SchedulerTable(name="pbt", population=4, quantile=0.25)
    scores = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.6}
    assert population.source_of(config, scores, 0, 1, 7, larger=True) == 1
    assert population.source_of(config, scores, 2, 1, 7, larger=True) is None
    assert population.source_of(config, scores, 1, 1, 7, larger=False) == 0
    assert population.source_of(config, {0: 0.1, 1: 0.9}, 0, 1, 7, larger=True) is None  # not all have reported
    assert population.source_of(config, dict.fromkeys(range(4), 0.5), 3, 1, 7, larger=True) is None
    every_other = SchedulerTable(name="pbt", population=4, interval=2)
    assert population.source_of(every_other, scores, 0, 1, 7, larger=True) is None
    assert population.source_of(every_other, scores, 0, 2, 7, larger=True) == 1


def test_no_clone_is_made_of_a_run_that_has_done_all_its_steps(tmp_path: Path) -> None:
    sweep = page(tmp_path, LR, "", '[scheduler]\nname = "pbt"\npopulation = 2\nquantile = 0.5')
    for done, step in ((1.0, 22), (2.0, 44)):  # of 2 epochs
        folder = sweep.run_folder(1, 0)
        checkpoint = step_folder(folder / "checkpoints", step)
        checkpoint.mkdir(parents=True)
        (checkpoint / MANIFEST).write_text("{}")
        row = {"kind": "train", "step": step, "epoch": done, "time": 0.0, "loss": 1.0}
        (folder / METRICS).write_text(json.dumps(row) + "\n")
        (sweep.folder / str(step)).mkdir()
        journal = Journal(sweep.folder / str(step))
        driver = Driver(sweep, journal, Received(None), print)
        for number in (0, 1):
            driver._write({"event": "asked", "trial": number})
        for number, value in ((1, 0.9), (0, 0.1)):
            driver._write({"event": "reported", "trial": number, "step": step, "value": value})
        driver._clone(driver.book.trials[0])
        journal.close()
        last = journal.events[-1]
        assert last["event"] == ("kept" if done == 2 else "cloned")
        assert sweep.run_folder(2, 0).exists() == (done != 2)
    assert last["why"] == "trial 1 has done all its steps"


@pytest.mark.parametrize(
    ("old", "new", "longer"),
    [
        ({"epochs": 3}, {"epochs": 2}, False),
        ({"epochs": 3}, {"epochs": 3, "name": "constant"}, False),
        ({"epochs": 3}, {"epochs": 4}, True),
        ({"steps": 9}, {"steps": 9, "name": "linear"}, False),
        ({"epochs": 3}, {"steps": 9}, True),  # only the data says
    ],
)
def test_a_winner_is_trained_further_by_a_longer_schedule_alone(
    old: dict[str, Any], new: dict[str, Any], longer: bool
) -> None:
    assert promote._longer(ScheduleConfig(**new), ScheduleConfig(**old)) is longer


@pytest.mark.parametrize(
    ("patience", "epochs", "since_best", "repair"),
    [
        (2, 3, 2, "eval.patience"),
        (2, 9, 2, "eval.patience"),  # a longer schedule alone ends at once
        (1, 3, 1, "eval.patience"),  # it was at its last step
        (3, 3, 2, ""),
        (0, 3, 2, ""),
        (3, 3, 1, "schedule"),  # it did not end early, so patience changes nothing
        (2, 9, 1, ""),
    ],
)
def test_a_winner_that_ended_early_needs_more_patience(
    patience: int, epochs: int, since_best: int, repair: str
) -> None:
    was = load_run(Path(DEMO), ["eval.patience=2", "schedule.epochs=3"])
    config = load_run(Path(DEMO), [f"eval.patience={patience}", f"schedule.epochs={epochs}"])
    missing = promote.missing_change(config, was, since_best)
    assert repair in missing
    assert bool(missing) == bool(repair)


def test_a_clone_is_near_its_source_and_within_the_space() -> None:
    space = parameters(
        {"a": {"loguniform": [0.1, 1.0]}, "b": {"grid": [1.0, 2.0, 3.0]}, "c": {"choice": ["x", "y"]}}, ""
    )
    config = SchedulerTable(name="pbt", resample=0.0)
    found = [population.explored(config, space, {"a": 0.5, "b": 2.0, "c": "x"}, number, 3) for number in range(40)]
    assert {point["a"] for point in found} == {0.4, 0.6}
    assert {point["b"] for point in found} == {1.0, 3.0}
    assert {point["c"] for point in found} == {"x", "y"}
    assert found[5] == population.explored(config, space, {"a": 0.5, "b": 2.0, "c": "x"}, 5, 3)
    anew = SchedulerTable(name="pbt", resample=1.0)
    drawn = [population.explored(anew, space, {"a": 0.1, "b": 2.0, "c": "x"}, number, 3)["a"] for number in range(40)]
    assert len(set(drawn)) == 40
    assert all(0.1 <= value <= 1.0 for value in drawn)


def test_shipped_pages_are_sound() -> None:
    pages = sorted((ROOT / "configs" / "sweeps").glob("*.toml"))
    assert pages
    for path in pages:
        load_sweep(path)


def test_a_folder_of_the_name_of_a_shipped_page_hides_it_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped_page(Path("digits")) == ROOT / "configs" / "sweeps" / "digits.toml"


def test_the_guide_has_a_sound_page_and_every_key(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "sweeps.md").read_text()
    (tmp_path / "page.toml").write_text(guide.partition("```toml\n")[2].partition("```")[0])
    assert load_sweep(tmp_path / "page.toml").config.scheduler.name == "asha"
    own = [key for key in all_keys(SweepConfig) if not key.startswith(("space", "set"))]
    assert len(own) > 25
    assert not [key for key in own if f"`{key}" not in guide and f"`.{key.partition('.')[2]}`" not in guide]


@pytest.mark.parametrize(
    ("rows", "which", "reached", "why"),
    [
        ([], "best", None, "the run has written no evaluation, so 'top1' never appeared"),
        (['"loss": 2.0'], "best", None, "'top1' never appeared in its evaluations, which have loss"),
        (['"top1": NaN', '"top1": null'], "best", None, "'top1' is no number in its evaluations"),
        (['"top1": 0.5', '"top1": null'], "last", None, "'top1' is no number in its evaluations"),
        (['"top1": 0.5', '"top1": null', '"top1": 0.25'], "best", 0.5, ""),
        (['"top1": 0.5', '"top1": 0.25'], "last", 0.25, ""),
    ],
)
def test_what_a_run_reached_or_why_that_is_not_known(
    tmp_path: Path, rows: list[str], which: str, reached: float | None, why: str
) -> None:
    lines = [f'{{"kind": "eval", "step": {at + 1}, "time": 1.0, {row}}}\n' for at, row in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    progress = ProgressReader(tmp_path, "top1", (None, 9)).read()
    assert progress.reached("top1", "max", which) == (reached, why)
