"""CheckpointErrors of three more kinds: damage, which another checkpoint can make good, and storage that fails."""

from __future__ import annotations

from setformer_dist.core.errors import CheckpointError, TransientError


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were written: missing, cut, changed, or never complete.

    A resume passes such a checkpoint over and puts it aside; any other CheckpointError (a later format, a file
    that may not be read) leaves it where it is.
    """


class MissingError(DamagedError):
    """A file is not there."""


class DeletedError(MissingError):
    """A checkpoint was deleted between its verification and its reading, as a run deletes older ones."""


class MisplacedError(CheckpointError):
    """A manifest is whole, but of another step than its folder's name says."""


class StorageError(TransientError, CheckpointError):
    """The storage did not give or take what it was asked for, and may do so later: nothing is known of the bytes."""
