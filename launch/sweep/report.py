"""The HTML page of a sweep, in one file that opens without a network: plotly's script is in it.

Curves of all trials, parallel coordinates, importance of the parameters (by Optuna), all trials as a table, and what
the sweep recommends, with how sure that is.
"""

from __future__ import annotations

import importlib.resources
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
from markupsafe import Markup, escape
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs
from scipy import stats

from launch.sweep.page import Sweep
from launch.sweep.progress import ProgressReader
from launch.sweep.space import Parameter, label
from launch.sweep.state import COMPLETE, PRUNED, REPLACED, Book, Trial
from setformer_dist.core.files import write_text
from setformer_dist.core.words import counted, plain_page

REPORT = "report.html"
_TEMPLATE = "report.html.j2"
_LEAST = 2  # complete trials with which parameters can be compared
_ENOUGH = 20  # complete trials: with fewer, importances change from trial to trial
_HEIGHT = 460  # pixels of a figure


def _shown(value: object) -> object:
    """Return what a page shows of a value: a text without control characters; what is HTML already, as it is."""
    return plain_page(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write(sweep: Sweep, book: Book) -> Path:
    """Write report.html into the sweep's folder; return the file."""
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
    )
    study = study_of(sweep, book)
    figures = [("Curves", curves(sweep, book)), *_of_parameters(sweep, study)]
    text = environment.from_string(template).render(
        name=sweep.config.sweep.name,
        metric=sweep.metric,
        script=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        lead=_lead(sweep, book),
        recommendation=recommendation(sweep, book),
        figures=[(title, Markup(_html(figure))) for title, figure in figures],
        keys=list(sweep.config.space),
        rows=[_row(sweep, book, trial) for trial in book.in_order()],
    )
    path = sweep.folder / REPORT
    write_text(path, text)
    return path


def _html(figure: go.Figure) -> str:
    figure.update_layout(height=_HEIGHT, margin={"l": 60, "r": 40, "t": 40, "b": 50}, template="plotly_white")
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _lead(sweep: Sweep, book: Book) -> str:
    states = [book.state_of(trial) for trial in book.trials]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    config = sweep.config
    return (
        f"{counted(len(states), 'trial')} ({told}); searcher {config.search.name}, scheduler {config.scheduler.name}, "
        f"{counted(config.sweep.seeds, 'seed')} per point; best is the {sweep.mode} of {sweep.metric}."
    )


def _row(sweep: Sweep, book: Book, trial: Trial) -> list[str]:
    value = "" if trial.value is None else f"{trial.value:.4f}"
    spread = "" if trial.spread is None else f"±{trial.spread:.4f}"
    cells = [label(trial.point[key]) if key in trial.point else "" for key in sweep.config.space]
    note = next((run.why for run in trial.runs if run.why), "")
    if trial.source is not None:
        note = f"clone of trial {trial.source[0]} at step {trial.source[1]}"
    return [str(trial.number), book.state_of(trial), value, spread, *cells, note]


def curves(sweep: Sweep, book: Book) -> go.Figure:
    """Return the metric of every run over its steps."""
    figure = go.Figure()
    for trial in book.trials:
        for seed in range(len(trial.runs)):
            reader = ProgressReader(sweep.run_folder(trial.number, seed), sweep.metric, (None, None))
            evals = [(step, value) for step, value in reader.read().evals if value is not None]
            if not evals:
                continue
            shown = escape(", ".join(f"{key} = {label(value)}" for key, value in trial.point.items()))
            figure.add_scatter(
                x=[step for step, _ in evals],
                y=[value for _, value in evals],
                mode="lines+markers",
                name=f"{trial.number}" + (f", seed {seed}" if seed else ""),
                line={"dash": "solid" if trial.state == COMPLETE else "dot"},
                hovertemplate=f"trial {trial.number}<br>%{{x}} steps: %{{y:.4f}}<br>{shown}<extra></extra>",
            )
    figure.update_layout(xaxis_title="optimizer step", yaxis_title=sweep.metric, showlegend=True)
    return figure


def study_of(sweep: Sweep, book: Book) -> optuna.Study:
    """Return a study that holds the trials with the values that a reader knows, for Optuna's figures."""
    study = optuna.create_study(direction="maximize" if sweep.mode == "max" else "minimize", study_name="shown")
    for trial in book.trials:
        if trial.state not in (COMPLETE, PRUNED, REPLACED) or trial.value is None:
            continue
        space = {key: _distribution(sweep.config.space[key]) for key in trial.point}
        values = {key: _tick(sweep.config.space[key], value) for key, value in trial.point.items()}
        state = TrialState.COMPLETE if trial.state == COMPLETE else TrialState.PRUNED
        study.add_trial(_frozen(trial, state, values, space))
    return study


def _frozen(
    trial: Trial, state: TrialState, values: dict[str, object], space: dict[str, BaseDistribution]
) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=state,
        value=trial.value,
        params=values,
        distributions=space,
        intermediate_values={step: value for step, value in trial.reports if value is not None},
        user_attrs={"trial": trial.number},
    )


def _tick(parameter: Parameter, value: Any) -> Any:
    """Return what the figures show of a value: the words of a choice, which Optuna puts in quotes by itself."""
    if parameter.choice is None:
        return value
    texts = [known if isinstance(known, str) else label(known) for known in parameter.choice]
    ambiguous = len(set(texts)) < len(texts)  # "1" and 1
    return label(value) if ambiguous or not isinstance(value, str) else value


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choice is not None:
        return CategoricalDistribution([_tick(parameter, value) for value in parameter.choice])
    if parameter.grid is not None:
        return FloatDistribution(parameter.grid[0], parameter.grid[-1])
    if parameter.int is not None:
        return IntDistribution(parameter.int[0], parameter.ends[1], step=parameter.step)
    low, high = parameter.bounds
    return FloatDistribution(low, high, log=parameter.loguniform is not None)


def _of_parameters(sweep: Sweep, study: optuna.Study) -> list[tuple[str, go.Figure]]:
    complete = len(study.get_trials(states=(TrialState.COMPLETE,)))
    if complete < _LEAST:
        return []
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.append(
            ("Parallel coordinates", optuna.visualization.plot_parallel_coordinate(study, target_name=sweep.metric))
        )
        if importances(study):
            head = f"Importance of the parameters, from {complete} complete trials"
            plot = optuna.visualization.plot_param_importances(study, evaluator=_evaluator())
            found.append((head if complete >= _ENOUGH else f"{head}: too few to rely on", plot))
        found.append(("Slices", optuna.visualization.plot_slice(study, target_name=sweep.metric)))
    return found


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of each parameter in the variance of the metric (fANOVA); none where it cannot be told."""
    values = {trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    if len(values) < _LEAST:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(study, evaluator=_evaluator())
    except (ValueError, RuntimeError):  # no parameter that all trials have
        return {}


def _evaluator() -> optuna.importance.FanovaImportanceEvaluator:
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def recommendation(sweep: Sweep, book: Book) -> list[str]:
    """Return what the sweep recommends and how sure that is, in sentences."""
    ranked = book.ranked()
    if not ranked:
        return ["No trial is complete yet, so there is nothing to recommend."]
    best = ranked[0]
    point = ", ".join(f"{key} = {label(value)}" for key, value in best.point.items())
    lines = [f"Recommended: trial {best.number} ({point}), {sweep.metric} {best.value:.4f}{_spread(best)}."]
    if len(ranked) == 1:
        return [*lines, "It is the only complete trial, so nothing is known of how good that is."]
    return [*lines, _how_sure(sweep, best, ranked[1:])]


def _spread(trial: Trial) -> str:
    return f" ± {trial.spread:.4f} over {counted(len(trial.runs), 'seed')}" if trial.spread is not None else ""


def _how_sure(sweep: Sweep, best: Trial, others: Sequence[Trial]) -> str:
    second = others[0]
    assert best.value is not None
    assert second.value is not None
    gap = abs(best.value - second.value)
    head = f"It is {gap:.4f} better than the next, trial {second.number}{_spread(second)}"
    if len(best.runs) == 1:
        return (
            f"{head}. With one seed per point it is not known how far chance moves a value: run the best points again "
            "with sweep.seeds = 3 before you rely on a small difference."
        )
    a, b = ([run.value for run in trial.runs if run.value is not None] for trial in (best, second))
    if best.spread == second.spread == 0:
        return f"{head}. All seeds of each gave the same value."
    side = "greater" if sweep.mode == "max" else "less"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are nearly equal
        chance = float(stats.ttest_ind(a, b, equal_var=False, alternative=side).pvalue)
    verdict = (
        "that is more than chance"
        if chance < 0.05
        else "chance alone can explain that"
        if chance > 0.2
        else "that is likely more than chance"
    )
    return (
        f"{head}; chance alone gives such a difference with probability {chance:.2f} (Welch's t-test over the seeds): "
        f"{verdict}. The best of {len(others) + 1} was chosen, which makes it look a little better than it is."
    )
