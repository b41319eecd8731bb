"""Helpers for tests that ship with the package: functions run on N gloo ranks.

threads.py   several ranks as threads of one process, with the collectives of `setformer_dist.core.comm`
"""
