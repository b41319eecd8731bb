"""One kind of CheckpointError more: damage, which another checkpoint can make good."""

from __future__ import annotations

from setformer_dist.core.errors import CheckpointError


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were written: missing, cut, changed, or never complete.

    A resume passes such a checkpoint over and puts it aside; any other CheckpointError (a later format, a file
    that may not be read) leaves it where it is.
    """
