"""Ranks on many hosts: one supervisor, one agent on each host, JSON lines between them over the command's own pipes.

agent.py       one host's end of a run: starts its ranks, tells of their lives, ends them when nobody listens
check.py       what must hold on all hosts before anything starts
config.py      the [launch] table of a run config
facts.py       what a host says of itself
fleet.py       the hosts of a run, over all its attempts
channel.py     what reaches an agent: a command with pipes to it, as ssh
link.py        the supervisor's end of one host, and the ranks behind it
meeting.py     where the ranks of several hosts meet: an address that all can reach, and the interfaces to it
names.py       which hosts, and how many ranks on each: --hosts, a hostfile, a Slurm allocation
reach.py       the command that starts an agent: here, behind ssh, behind srun, behind any prefix
words.py       what an agent may say, as the supervisor takes it
wire.py        JSON lines over pipes that may stop at any moment
"""
