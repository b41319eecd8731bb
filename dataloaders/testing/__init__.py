"""Proofs that samples do not depend on machines, for tests and benchmarks."""
