"""Errors a user can repair. Each message names the thing, the place and the repair in one sentence.

The command line prints such an error as one line and exits with the class's `exit_code`; anything else that
escapes is a defect of ours and shows its traceback.
"""


class SetformerError(Exception):
    """Base of all errors that a user can repair."""

    exit_code = 1


class ConfigError(SetformerError):
    """A config, an override or a combination of options that cannot run."""

    exit_code = 2


class DataError(SetformerError):
    """A data set that is missing, damaged, or not what the run expects."""

    exit_code = 3


class CheckpointError(SetformerError):
    """A checkpoint that is missing, damaged, or belongs to another model or run."""

    exit_code = 4


class LaunchError(SetformerError):
    """Processes that could not be started or connected: ports, ranks, devices, packages."""

    exit_code = 5


class RankFailedError(SetformerError):
    """A rank ended with an error; its own log says why.

    Args:
        message: which rank, how, where to read on; empty where the rank has printed it itself.
        exit_code: the rank's own, where it is one of ours.
    """

    exit_code = 6

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class TrainingError(SetformerError):
    """Training that cannot continue, such as a loss that is not finite."""

    exit_code = 7


class DrillError(SetformerError):
    """The drill found something lost, or could not be made."""

    exit_code = 8


class TransientError(SetformerError):
    """What comes from outside the run and may pass: a process that died, storage that hangs. Worth another start."""

    exit_code = 9
