"""Faults of disks and commits, for tests and benchmarks."""
