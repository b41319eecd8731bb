"""Holds a Ray cluster of one node on this machine until nobody wants it any more; see `launch.ray.cluster`.

python -m launch.ray.head --folder FOLDER --cpus N      prints its address, and ends with its standard input
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.resource_isolation_config import ResourceIsolationConfig

from launch.ranks.environment import HOST


def start(folder: Path, cpus: int, gpus: int | None, object_store_bytes: int) -> Node:
    """Start the processes of a head: its store of states, its node and the agents of that.

    `ray start` would start a dashboard, a server for clients, an autoscaler and a collector of logs as well, and
    listen on every interface. All processes die with this one (the kernel sees to it).
    """
    parameters = RayParams(
        node_ip_address=HOST,
        node_name=HOST,
        gcs_server_port=0,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        num_cpus=cpus,
        num_gpus=gpus,
        object_store_memory=object_store_bytes,
        temp_dir=str(folder),
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        resource_isolation_config=ResourceIsolationConfig(),
    )
    return Node(parameters, head=True, shutdown_at_exit=True, spawn_reaper=True)


def main() -> int:
    """Hold a cluster."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for its files")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--object-store", type=int, required=True, help="bytes")
    args = parser.parse_args()
    out = os.dup(1)
    os.dup2(2, 1)  # nothing but the address may reach the owner
    node = start(args.folder, args.cpus, args.gpus, args.object_store)
    os.write(out, f"{node.address}\n".encode())
    sys.stdin.buffer.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
