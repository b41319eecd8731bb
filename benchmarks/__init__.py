"""Measurements: each prints a table, writes JSON, names the machine, compares with its peers in one run."""
