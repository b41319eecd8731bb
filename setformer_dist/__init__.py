"""SeTformer and the engine that trains it: attention by optimal transport to a small reference set."""

from setformer_dist.core.lean import import_lean

import_lean()

__version__ = "0.1.0"
