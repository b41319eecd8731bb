"""What this machine can do, and what can be built on it.

build_ffcv.py   builds FFCV into this Python's environment, for `data.engine = "ffcv"`; `make ffcv` calls it
doctor.py       reports what this machine can do for a run, what is missing, and how to get it
hosts.py        the same of several hosts, and whether they meet
"""
