"""Who ran a run: hosts, versions, environment and git state, one record per attempt.

machine.py    what this host says of itself
checkout.py   the git state of a folder of code, with its uncommitted changes
attempts.py   the records in a run's folder: written at each attempt, read back
differ.py     what differs between two records
"""
