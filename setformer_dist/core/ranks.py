"""Which process this is among all that train together: one frozen value, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from setformer_dist.core.errors import LaunchError

# "0" where our supervisor has chosen MASTER_PORT: another start then takes another one.
PORT_GIVEN_VARIABLE = "SETFORMER_PORT_GIVEN"


@dataclass(frozen=True)
class RankInfo:
    """Place of this process. `rank` counts over all hosts, `local_rank` on this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise LaunchError(
                f"rank {self.rank} of {self.world_size} (local {self.local_rank} of {self.local_world_size}) "
                "is not a valid place: check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, prints and writes for all."""
        return self.rank == 0

    def sharing_data(self, parts: int) -> RankInfo:
        """Return the place among groups of `parts` neighbours that see the same samples."""
        return RankInfo(self.rank // parts, self.world_size // parts, self.local_rank, self.local_world_size)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> RankInfo:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (or DeepSpeed's LOCAL_SIZE).

        Raises:
            LaunchError: a variable is not an integer, or the place is impossible.
        """
        env = os.environ if env is None else env

        def read(name: str, default: int) -> int:
            text = env.get(name, str(default))
            try:
                return int(text)
            except ValueError:
                raise LaunchError(
                    f"environment variable {name}={text!r} is not an integer: unset it or set a number"
                ) from None

        world = read("WORLD_SIZE", 1)
        return cls(
            rank=read("RANK", 0),
            world_size=world,
            local_rank=read("LOCAL_RANK", 0),
            local_world_size=read("LOCAL_WORLD_SIZE", read("LOCAL_SIZE", world)),
        )
