"""Random faults in a real training, and whether anything was lost.

drill.py         `setformer drill`: a real small training under random faults, and what came of them
run.py           the run that faults are made in
faults.py        the faults of one machine: processes, signals, files, a full disk
host_faults.py   the faults of several hosts: processes, power, links
compare.py       whether a run that had faults is the same as one that had none
namespaces.py    several hosts on one machine: network namespaces, a real sshd in each
mounts.py        mounts that end with the process that made them, even when it is killed: a mount namespace of its own
"""
