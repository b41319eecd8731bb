"""Helpers for tests that ship with the package: functions run on N gloo ranks."""
