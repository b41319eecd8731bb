"""Sweeps: many runs over a space of configs, placed by Ray, with a journal from which each continues.

page.py        the sweep config: base run config, space, budget, searcher, scheduler
space.py       parameters, conditions, points
search.py      Optuna's samplers and pruners as functions of the journal
population.py  population based training: who is replaced, by whose clone
journal.py     what happened, in order; append-only, chained digests
state.py       the state that follows from a journal
progress.py    what a run has written so far: evaluations, step, speed
trial.py       the process of one run, as a Ray actor; the hand-over of checkpoints
actors.py      the processes as Ray actors, and how many fit
driver.py      starts, judges, stops and continues trials
table.py       tables on the terminal, and CSV
report.py      one HTML page with curves, importance and a recommendation
commands.py    show, list, stop
promote.py     a winner as a run of its own
"""
