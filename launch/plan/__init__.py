"""`setformer plan`: what a run would need and how fast it would be on machines that are not there.

goodput.py   how often to save, and how much of the time is progress, on machines that fail at a known rate
groups.py    what ranks that share images by rows exchange for each of them
hardware.py  devices and links, as a small table; each figure names its source. A guess is called an assumption
plan.py      `setformer plan`: a run config on numbers of devices, under every ZeRO stage, as tables and JSON
rows.py      one row of a plan: a number of ranks under a ZeRO stage. Pure functions of what was measured once
subject.py   the model of a run config, measured once: what every row of a plan follows from
traffic.py   what the ranks of a step send each other under each ZeRO stage, and how long it takes
"""
