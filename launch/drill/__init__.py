"""Random faults in a real training, and whether anything was lost.

drill.py    `setformer drill`: a real small training under random faults, and whether anything was lost
mounts.py   mounts that end with the process that made them, even when it is killed: a mount namespace of its own
faults.py   the faults of the drill, and the run they are made in
"""
