"""Shared data for tests: the digits, packed once per session; real data where it is present."""

from __future__ import annotations

import importlib
import os
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dataloaders.packing.pack import pack_image_folder
from launch.drill.mounts import keep_mounts_private
from launch.examples.demo import write_digits
from launch.ranks.environment import usable_cores
from launch.testing.commands import end_all

if TYPE_CHECKING:
    from tests.unit.s3 import S3

ROOT = Path(__file__).parent.parent

keep_mounts_private()  # what a test mounts is gone with its process, however that ends


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out drills where SETFORMER_DRILLS_SHARE asks for a share of them, in percent, which the commit draws."""
    share = int(os.environ.get("SETFORMER_DRILLS_SHARE", "100"))
    if share >= 100:
        return
    words = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(words, cwd=ROOT, capture_output=True, check=False).stdout  # of no checkout: always the same
    left_out = [
        item for item in items
        if item.get_closest_marker("drill") and zlib.crc32(head + item.nodeid.encode()) % 100 >= share
    ]  # fmt: skip
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ and val/ shards of the handwritten digits, and images/ they were made from."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images")
    pack_image_folder(folder / "images" / "train", folder / "train")
    pack_image_folder(folder / "images" / "val", folder / "val")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep indexes of foreign data out of the user's cache folder, in this process and all that it starts."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_terminal() -> None:
    """Print as into a pipe, whatever terminal started the tests: its width folds texts and its colors split them."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def own_cores() -> None:
    """Leave the other cores to the tests that run next to these, here and in all that this process starts.

    Threads that wait for a core that another process has spin: a test then takes three times as long.
    """
    threads = max(1, usable_cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End what a test that failed has left behind."""
    yield
    end_all()


@pytest.fixture
def shared_data() -> Path:
    """Folder of the real data sets; the test is skipped where it is absent."""
    folder = Path(os.environ.get("SETFORMER_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder} (set SETFORMER_SHARED_DATA)")
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A real S3 server on loopback with a bucket, and the environment by which clients find it."""
    pytest.importorskip("moto")  # here, so that a machine without it runs all other tests
    server = importlib.import_module("tests.unit.s3").S3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.make_bucket()
    yield server
    server.stop()
