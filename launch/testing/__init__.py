"""Commands, ranks and elastic runs as tests start them; ships with the package for users' own tests.

commands.py   the command line as a user starts it, and what it left behind; for tests and benchmarks in a checkout
ray_nodes.py  a real Ray cluster on two hosts
slurm.py      a real Slurm of one node
terminal.py   a command in a terminal of its own, which a test can type into and take away
warm.py       commands forked from an interpreter that has imported torch
elastic.py    checkpoints between layouts: ranks, ZeRO stages, offload
ranks.py      run a function on N gloo ranks as an ordinary test: processes, a file to meet at, a hard time limit
"""
