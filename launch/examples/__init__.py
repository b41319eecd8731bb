"""The demo and Long Range Arena: whole uses of everything else."""
