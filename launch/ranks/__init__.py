"""The processes of a run: starting, watching, ending and restarting them.

attempt.py     all ranks, of one host or of many, from start to end, and who is to blame for it
board.py       what the supervisor shows of its ranks while they run
environment.py what ranks find in their environment, and what this machine has for them
exposition.py  the figures of a run for Prometheus
forkserver.py  starts ranks from an interpreter that has imported everything
holder.py      who holds a run's folder: a note in run.lock, and whether the process that wrote it still lives
launchers.py   ranks that another launcher has started: srun, mpirun
local.py       start all ranks of this machine and stand by them: they begin together and end together
lock.py        locks on the run's folder, held by the supervisor and by rank 0 while they run
logs.py        log files of the ranks, and what they said last
network.py     addresses and interfaces of this host
orphans.py     what a run leaves on the machine when it is killed, processes, temporary files and semaphores
processes.py   the ranks of one machine, as processes
restarts.py    whether a run that failed is started again, and when: a pure function of what failed before
signals.py     stop signals, collected instead of died of
slurm.py       what Slurm says of the hosts of a job
supervise.py   the process of `setformer train`: starts the ranks, watches them, restarts them
usage.py       how much of its device every rank of this host uses
"""
