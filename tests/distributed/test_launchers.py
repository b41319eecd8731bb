"""One run, started by every launcher that people have: the losses are the same bits."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.drill.namespaces import Cluster, why_impossible
from launch.ranks.launchers import adopt, port_of
from launch.record import attempts
from launch.testing.commands import DEMO, ROOT, SHORT, losses, setformer, train_words
from setformer_dist.core.errors import LaunchError

REASON = why_impossible()
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if REASON is not None:
        pytest.skip(REASON)
    with Cluster(2) as made:
        (made.folder / "hostfile").write_text("a slots=1\nb slots=1\n")
        yield made


@pytest.fixture(scope="module")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    ended = setformer(*train_words(digits, out))
    assert ended.code == 0, ended.err
    return out / "demo"


def on_each(cluster: Cluster, command: Callable[[int], list[str]]) -> list[list[str]]:
    """Return commands that log in to each host and run its input spec."""
    return [
        ["ssh", "-F", str(cluster.config), name,
         f"cd {ROOT} && DS_ACCELERATOR=cpu PATH={BIN}:$PATH {shlex.join(command(at))}"]
        for at, name in enumerate(cluster.names)
    ]  # fmt: skip


def deepspeed_pdsh(c: Cluster, entry: list[str], address: str) -> list[list[str]]:
    return [["deepspeed", "--hostfile", str(c.folder / "hostfile"), "--no_ssh_check", "--master_addr", address,
             "--master_port", "29511", "--module", *entry]]  # fmt: skip


def deepspeed_by_hand(c: Cluster, entry: list[str], address: str) -> list[list[str]]:
    return on_each(c, lambda at: [
        "deepspeed", "--hostfile", str(c.folder / "hostfile"), "--no_ssh", "--node_rank", str(at),
        "--master_addr", address, "--master_port", "29512", "--module", *entry,
    ])  # fmt: skip


def torchrun(c: Cluster, entry: list[str], address: str) -> list[list[str]]:
    return on_each(c, lambda at: [
        "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(at), "--master_addr", address,
        "--master_port", "29513", "-m", *entry,
    ])  # fmt: skip


def mpirun(c: Cluster, entry: list[str], address: str) -> list[list[str]]:
    net = address.rsplit(".", 1)[0]
    return [["mpirun", "--mca", "plm_rsh_args", f"-F {c.config}", "--mca", "oob_tcp_if_include", f"{net}.0/24",
             "-H", "a:1,b:1", "-np", "2", "-x", f"MASTER_ADDR={address}", sys.executable, "-m", *entry]]  # fmt: skip


WAYS = {way.__name__: way for way in (deepspeed_pdsh, deepspeed_by_hand, torchrun, mpirun)}
NEEDS = {"deepspeed_pdsh": "pdsh", "mpirun": "mpirun"}


@pytest.mark.drill
@pytest.mark.hosts
@pytest.mark.parametrize("way", WAYS)
def test_a_launcher_gives_the_losses_of_one_host(
    way: str, cluster: Cluster, one: Path, digits: Path, tmp_path: Path
) -> None:
    if way in NEEDS and shutil.which(NEEDS[way]) is None:
        pytest.skip(f"{NEEDS[way]} is not installed")
    entry = ["launch.entry", DEMO, f"data.root={digits}", f"run.out={tmp_path}", *SHORT]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": f"-F {cluster.config}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    commands = WAYS[way](cluster, entry, cluster.address("a"))
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert losses(tmp_path / "demo") == losses(one)
    assert all(cluster.processes(name) == [] for name in cluster.names)
    record = attempts.last(tmp_path / "demo")
    assert record is not None
    assert {name: host.ranks for name, host in record.hosts.items()} == {"a": 1, "b": 1}


def test_variables_of_other_launchers_are_adopted() -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
             "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_JOB_ID": "7",
             "SLURM_STEP_ID": "0"}  # fmt: skip
    adopt(slurm)
    found = [slurm[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert found == ["2", "3", "0", "3", "127.0.0.1"]
    assert slurm["MASTER_PORT"] == str(port_of("7.0")) != str(port_of("7.1"))
    assert slurm["GLOO_SOCKET_IFNAME"] == "lo"
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}  # fmt: skip
    with pytest.raises(LaunchError, match="add -x MASTER_ADDR"):
        adopt(mpi)
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # a batch script, not one of four tasks
    adopt(batch)
    assert "RANK" not in batch
    ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "mine"}
    adopt(ours)
    assert ours["GLOO_SOCKET_IFNAME"] == "mine"
