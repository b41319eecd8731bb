"""Proofs that samples do not depend on machines, for tests and benchmarks.

determinism.py   the same samples and pixels whatever varies: each check varies one thing
"""
