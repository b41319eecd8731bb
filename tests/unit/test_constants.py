"""What several places must agree on stands in one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import launch.drill.drill
import launch.entry  # noqa: F401
from setformer_dist.core import splitmix
from setformer_dist.core.errors import RankFailedError, SetformerError
from setformer_dist.ops import splitmix as on_tensors

ROOT = Path(__file__).parent.parent.parent
# The first numbers of the stream of seed 1234567, as the authors' C code gives them.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_splitmix_gives_the_published_numbers_in_numpy_and_torch() -> None:
    assert splitmix.mix64(splitmix.counted(1234567, np.arange(5))).tolist() == PUBLISHED
    words = 1234567 + torch.arange(1, 6) * on_tensors.GOLDEN
    assert [word % 2**64 for word in on_tensors.mix64(words).tolist()] == PUBLISHED


def subclasses(kind: type[SetformerError]) -> Iterator[type[SetformerError]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_kind_of_error_has_an_exit_code_of_its_own() -> None:
    own = {kind: vars(kind)["exit_code"] for kind in subclasses(SetformerError) if "exit_code" in vars(kind)}
    assert len(set(own.values())) == len(own)
    assert all(kind.__module__ == RankFailedError.__module__ for kind in own)


@pytest.mark.parametrize(
    ("constant", "home"),
    [
        (r"0x9E3779B97F4A7C15|0xBF58476D1CE4E5B9|-7046029254386353131|-0x61C8864680B583EB", "core/splitmix.py"),
        (r'"backward", "optimizer"', "core/phases.py"),
    ],
)
def test_a_constant_stands_in_one_file(constant: str, home: str) -> None:
    packages = ("setformer_dist", "dataloaders", "checkpoints", "launch")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    holding = [str(path.relative_to(ROOT)) for path in files if re.search(constant, path.read_text(), re.I)]
    assert set(holding) == {f"setformer_dist/{home}"}
