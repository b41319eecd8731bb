"""The processes of a run: starting, watching, ending and restarting them.

local.py       start all ranks of one host and stand by them: they begin together and end together
lock.py        locks on the run's folder, held by the supervisor and by rank 0 while they run
orphans.py     what a run leaves on the machine when it is killed, processes, temporary files and semaphores
restarts.py    whether a run that failed is started again, and when: a pure function of what failed before
supervise.py   the process of `setformer train`: starts the ranks, watches them, restarts them
"""
