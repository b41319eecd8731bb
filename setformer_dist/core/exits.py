"""How a rank's process ends."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after everything that Python promises to do at exit.

    The interpreter itself is not taken down: gloo's threads may still hold the tensors of the last collective (also
    after `destroy_process_group`, since DeepSpeed keeps its groups), and a thread that lets go of a tensor while
    the interpreter ends aborts the process: "terminate called without an active exception", about once in a
    thousand runs (pytorch issue 190489).
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.flush()
    os._exit(code)
