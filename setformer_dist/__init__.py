"""SeTformer and the engine that trains it: attention by optimal transport to a small reference set."""

__version__ = "0.1.0"
