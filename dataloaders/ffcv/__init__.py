"""FFCV's own loader as a second engine."""
