"""Faults of disks and commits, for tests and benchmarks.

commit_faults.py   one fault at one step of the commit protocol, in a real save by two processes
copy_faults.py     one fault at one step of a copy to an object store, by two processes
spread_faults.py   the faults that a save on hosts with a disk each can meet
disk_faults.py     a disk that fails at one chosen operation
"""
