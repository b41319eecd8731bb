"""Prints what the nodes of a Ray cluster have room for, a JSON line every few seconds: {"address": ranks, ...}.

python -m launch.ray.watch ADDRESS      for `setformer queue serve`, which must not be a driver itself
"""

from __future__ import annotations

import json
import os
import sys
import time

from launch.ray.cluster import connected
from launch.ray.relay import rooms
from setformer_dist.core.errors import LaunchError

_EVERY_S = 5.0


def main() -> int:
    """Print until the cluster is lost, which ends its drivers."""
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        with connected(sys.argv[1]):
            while True:
                os.write(out, json.dumps({room.node: room.ranks for room in rooms()}).encode() + b"\n")
                time.sleep(_EVERY_S)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
