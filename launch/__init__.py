"""Where runs begin: the command line, one run, its processes, and the tools around runs. One folder per room.

    entry.py     what each rank executes; also `deepspeed --module launch.entry ...`
    shown.py     cells of tables that show texts from files
    cli/         the words typed: `setformer ...`; imports what a command needs when it runs
    run/         one run: its config, its parts, what begins, continues and ends it, its trained weights
    ranks/       the processes of a run: starting, watching, ending, restarting; locks and what killed ones leave
    ray/         the same on a Ray cluster; an extra
    ckpt/  data/  history/    what `setformer ckpt`, `data` and `runs` do
    machine/     what this machine can do
    sweep/       many runs over a space of configs, placed by Ray
    queue/       a queue of runs for several people; an extra
    drill/       random faults in a real training
    examples/    the demo and Long Range Arena
    testing/     commands, ranks and elastic runs as tests start them

Which room may import which: tests/unit/test_imports.py.
"""

from setformer_dist.core.lean import import_lean

import_lean(in_commands=True)
