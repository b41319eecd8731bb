"""Runs on Ray. The package ray is an extra: whoever imports a module of this room calls installed.require_ray first.

bundles.py     channels to the agents in the bundles of a placement group
cluster.py     connects to a cluster, or starts one on this machine and ends it
fleet.py       the crew of a run: a fleet whose hosts are bundles
head.py        the process that holds a cluster of our own
installed.py   whether the package is there; imports nothing of it
relay.py       the cluster's driver: an actor for each bundle, which runs an agent and relays its pipes
room.py        how many ranks each bundle has
"""
