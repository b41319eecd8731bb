"""Ranks that another launcher has started: its variables become those that every rank reads.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE and the rest themselves. srun and mpirun have names of their own, and
say nothing of an address to meet at. None of them says which interface leads there. Gloo then takes that of the host's
name, which is 127.0.0.1 on many hosts, and waits for no other rank.
"""

from __future__ import annotations

import zlib
from collections.abc import MutableMapping

from launch.ranks.environment import HOST
from launch.ranks.network import interface_to
from launch.ranks.slurm import hosts_of, tasks_of
from setformer_dist.core.errors import LaunchError

_MPI = (  # rank, ranks, rank on its host, ranks on its host
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections


def adopt(environ: MutableMapping[str, str]) -> None:
    """Fill in what another launcher left out.

    Args:
        environ: of this rank; changed in place. What is set stays.

    Raises:
        LaunchError: the launcher does not say where rank 0 is.
    """
    if "RANK" not in environ:
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            _of_slurm(environ)
        elif (names := next((n for n in _MPI if n[0] in environ), None)) is not None:
            _of_mpi(environ, names)
    address = environ.get("MASTER_ADDR")
    if address and int(environ.get("WORLD_SIZE", "1")) > 1 and (way := interface_to(address)) is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environ.setdefault(name, way)


def port_of(job: str) -> int:
    """Return the port at which the ranks of a job meet, the same on all hosts and another one for another job."""
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]


def _of_slurm(environ: MutableMapping[str, str]) -> None:
    tasks = tasks_of(environ["SLURM_STEP_TASKS_PER_NODE"])
    values = (
        environ["SLURM_PROCID"],
        environ["SLURM_STEP_NUM_TASKS"],
        environ["SLURM_LOCALID"],
        str(tasks[int(environ["SLURM_NODEID"])]),
    )
    environ.update(zip(_OURS, values, strict=True))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = HOST if len(tasks) == 1 else hosts_of(environ["SLURM_STEP_NODELIST"])[0]
    environ.setdefault("MASTER_PORT", str(port_of(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")))


def _of_mpi(environ: MutableMapping[str, str], names: tuple[str, ...]) -> None:
    if any(name not in environ for name in names):
        missing = next(name for name in names if name not in environ)
        raise LaunchError(f"the launcher has set {names[0]} and not {missing}: set RANK, WORLD_SIZE, LOCAL_RANK and "
                          "LOCAL_WORLD_SIZE for each rank")  # fmt: skip
    environ.update(zip(_OURS, (environ[name] for name in names), strict=True))
    if "MASTER_ADDR" not in environ:
        if environ["LOCAL_WORLD_SIZE"] != environ["WORLD_SIZE"]:
            raise LaunchError("mpirun does not say where rank 0 is: add -x MASTER_ADDR=ADDRESS OF THE FIRST HOST")
        environ["MASTER_ADDR"] = HOST
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or environ.get("PMI_ID", "mpi")
    environ.setdefault("MASTER_PORT", str(port_of(job)))
