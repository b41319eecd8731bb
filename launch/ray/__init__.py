"""Runs on Ray. The package ray is an extra: whoever imports a module of this room calls installed.require_ray first.

cluster.py     connects to a cluster, or starts one on this machine and ends it
head.py        the process that holds a cluster of our own
installed.py   whether the package is there; imports nothing of it
"""
