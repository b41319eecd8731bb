"""What a refresh service does: solves problems of new reference sets, one at a time. Ray is not imported."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from setformer_dist.ops.refit_bytes import solved

_KEPT = 16  # solutions, of some 100 KB each: a run that resumes asks for its last one again


class Fits:
    """Solves problems, and keeps the last solutions. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def fit(self, problem: bytes) -> bytes:
        """Return the solution of a problem.

        Raises:
            ValueError: it is none.
        """
        digest = hashlib.sha256(problem).hexdigest()
        with self._busy:
            if digest not in self._kept:
                self._kept[digest] = solved(problem)
            self._kept.move_to_end(digest)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[digest]
