"""Where runs begin: the command line, the run's config page, the composition root, local ranks and their supervision.

cli.py        `setformer ...`
config.py     one page -> RunConfig -> ResolvedRun (batch arithmetic, steps) for a number of ranks
compose.py    builds every part of a run, in plain sight
entry.py      what each rank executes; also `deepspeed --module launch.entry ...`
local.py      starts and supervises the ranks of this machine
dryrun.py     what a run would be and cost, without running it
infer.py      `setformer eval` and `setformer predict`
demo.py       the handwritten digits as a data set, and the summary at the end
doctor.py     whether the main job could run here
"""
