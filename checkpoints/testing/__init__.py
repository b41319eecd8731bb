"""Faults of disks and commits, for tests and benchmarks.

commit_faults.py   one fault at one step of the commit protocol, in a real save by two processes
disk_faults.py     a disk that fails at one chosen operation
"""
