"""What rank 0 leaves behind when training ends: summary.json and report.html in the run's folder."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from launch.run.compose import Splits
from launch.run.config import ResolvedRun
from launch.run.detected import detected_samples
from launch.run.own_model import OwnModel
from launch.run.reconstructions import reconstructed_samples
from launch.run.scored_texts import scored_texts
from launch.run.segmented import segmented_samples
from launch.run.trained import classified_samples, load_trained
from setformer_dist.core import ledger
from setformer_dist.core.files import write_state
from setformer_dist.core.words import counted, plain
from setformer_dist.engine.run_state import Outcome
from setformer_dist.models.measure import parameters
from setformer_dist.report.html import write_report

log = logging.getLogger(__name__)


def summary(run: ResolvedRun, outcome: Outcome) -> dict[str, object]:
    """Return the headline figures of a run."""
    c = run.config
    state = outcome.state
    account = ledger.account(ledger.read_events(c.folder), now=time.time())
    return {
        "name": c.run.name,
        "model": c.model.name,
        "finished": outcome.signum is None,
        "steps": state.step,
        "evaluation": state.evaluation,
        "best": {"metric": state.best.metric, "value": state.best.value, "step": state.best.step},
        "images_per_s": round(outcome.images_per_s, 1),
        "seconds": round(state.seconds, 1),
        "goodput": round(account.goodput, 4),
        "attempts": account.attempts,
        "failures": len(account.failures),
        "steps_lost": account.steps_lost,
        "wall": {f"{kind}_seconds": round(spent, 1) for kind, spent in ledger.kinds_by_size(account)},
        "substitutions": state.substitutions,
        "ranks": run.plan.world_size,
        "zero_stage": c.zero.stage,
        "dtype": c.precision.dtype,
        "global_batch": run.plan.global_size,
    }


def finish(run: ResolvedRun, splits: Splits, outcome: Outcome, own: OwnModel | None = None) -> None:
    """Write the summary and the report, for a run that came to its end with pictures of what it gets right and wrong.

    The run is over and saved by now: an error here costs one line and the report, nothing else.
    """
    folder: Path = run.config.folder
    try:
        figures = summary(run, outcome)
        write_state(folder / "summary.json", figures)
        if outcome.signum is None:
            _report(run, splits, outcome, figures, own)
        else:
            write_report(folder, folder / "report.html", [])
    except Exception as error:
        log.exception("the report could not be written")
        reason = plain(" ".join(f"{type(error).__name__}: {error}".split()))
        print(
            f"warning: the run is done and saved, but its report could not be written ({reason[:500]}): see the log",
            file=sys.stderr,
            flush=True,
        )


def _report(
    run: ResolvedRun, splits: Splits, outcome: Outcome, figures: dict[str, object], own: OwnModel | None
) -> None:
    folder: Path = run.config.folder
    trained = load_trained(folder / "checkpoints", own=own)
    figures |= {
        "parameters": parameters(trained.model),
        "checkpoint": str(trained.checkpoint.path),
        "report": str(folder / "report.html"),
    }
    write_state(folder / "summary.json", figures)
    write_report(
        folder,
        folder / "report.html",
        classified_samples(trained, splits.val),
        reconstructed_samples(trained, splits.val),
        segmented_samples(trained, splits.val) or detected_samples(trained, splits.val),
        scored_texts(trained, splits.val),
    )
    log.info("report %s", folder / "report.html")
    print(_said(run, outcome), file=sys.stderr, flush=True)


def _said(run: ResolvedRun, outcome: Outcome) -> str:
    """Return the last line of a run that is done: what came out, and where it is."""
    state, folder = outcome.state, run.config.folder
    best = state.best
    scored = "" if best.value is None else f", best {best.metric} {best.value:.4f} at step {best.step}"
    return plain(f"done: {counted(state.step, 'step')}{scored}; report {folder / 'report.html'}")
