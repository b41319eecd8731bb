"""Hosts with a disk each: real gloo ranks with folders of their own; disks are lost, files damaged, ranks killed."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import layout
from checkpoints.beside import TURN, Beside, Names
from checkpoints.config import CheckpointConfig
from checkpoints.disk import Disk
from checkpoints.identity import Identity
from checkpoints.objects import Objects
from checkpoints.reader import verify
from checkpoints.spread import Hosts
from checkpoints.spread_manager import SpreadManager
from checkpoints.testing.copy_faults import finish
from checkpoints.together import Together
from launch.testing.ranks import RanksFailedError, run_ranks
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.store import Snapshot
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from tests.unit.s3 import S3

NUMEL = 1000
IDENTITY = Identity(model="m")


def share(rank: int, world: int, step: int) -> list[Fragment]:
    a, b = NUMEL * rank // world, NUMEL * (rank + 1) // world
    return [Fragment("w", "param", a, (NUMEL,), torch.arange(NUMEL, dtype=torch.float32)[a:b] + 1000 * step)]


def root_of(base: str, host: int) -> Path:
    return Path(base) / f"host-{host}" / "checkpoints"


def joined(
    base: str,
    hosts: list[int],
    per_host: int,
    replicas: int,
    disk: Disk | None = None,
    url: str = "",
    beside: Names | None = None,
    **config: Any,
) -> SpreadManager:
    """Join as one rank of those hosts, each of which has so many ranks and a disk of its own."""
    place = RankInfo.from_env()
    ranks = RankInfo(place.rank, place.world_size, place.rank % per_host, per_host)
    connect(ranks, os.environ["SETFORMER_RENDEZVOUS"])
    values = {"keep_last": 2, "keep_best": 0, "replicas": replicas, **config}
    own = TorchCollectives(ranks, own=True)
    root = root_of(base, hosts[place.rank // per_host])
    return SpreadManager(
        root, TorchCollectives(ranks), own, CheckpointConfig(**values), disk, Objects(url) if url else None, beside
    )


def save_steps(base: str, hosts: list[int], per_host: int, replicas: int, steps: list[int]) -> int:
    manager = joined(base, hosts, per_host, replicas)
    ranks = RankInfo.from_env()
    found = manager.newest()
    for step in steps:
        manager.begin(Snapshot(step, share(ranks.rank, ranks.world_size, step), {"step": step}, {}), IDENTITY)
    manager.finish(last=True)
    disconnect()
    return -1 if found is None else found.step


def save_and_copy(base: str, url: str, step: int) -> list[Any]:
    manager = joined(base, [0, 1], 1, 1, None, url, mirror_minutes=0.3)
    ranks = RankInfo.from_env()
    found = manager.newest()
    at = -1 if found is None else found.step
    right = found is None or found.trainer == {"step": at}
    manager.begin(Snapshot(step, share(ranks.rank, 2, step), {"step": step}, {}), IDENTITY)
    manager.finish(last=True)
    finish(manager)
    told = [event.text for event in manager.copies()]
    disconnect()
    return [at, right, told]


def save_and_complete(base: str) -> list[bool]:
    manager = joined(base, [0, 1, 2, 3], 1, 1)
    ranks = RankInfo.from_env()
    manager.save(Snapshot(1, share(ranks.rank, 4, 1), {"step": 1}, {}), IDENTITY)
    folder = root_of(base, ranks.rank) / "step-00000001"
    before = len(list(folder.iterdir()))
    manager.complete()
    disconnect()
    return [before == 4, len(list(folder.iterdir())) == 6]  # manifest, trainer.json, two of four rank files


def resume(base: str, hosts: list[int], per_host: int, replicas: int) -> list[Any]:
    manager = joined(base, hosts, per_host, replicas)
    found = manager.newest()
    if found is None:
        disconnect()
        return [-1, 0.0, {}]
    ranks = RankInfo.from_env()
    mine = share(ranks.rank, ranks.world_size, 0)
    mine = [Fragment("w", "param", f.start, f.shape, torch.zeros_like(f.tensor)) for f in mine]
    manager.load(found, mine)
    right = torch.equal(mine[0].tensor, share(ranks.rank, ranks.world_size, found.step)[0].tensor)
    disconnect()
    return [found.step, right, found.trainer]


def save(base: Path, hosts: int, per_host: int, replicas: int, steps: list[int]) -> list[int]:
    return run_ranks(save_steps, hosts * per_host, str(base), list(range(hosts)), per_host, replicas, steps)


def resumed(base: Path, hosts: list[int], per_host: int = 1, replicas: int = 1) -> int:
    """Return the step from which a run on those hosts goes on; it must be whole on every rank."""
    answers = run_ranks(resume, len(hosts) * per_host, str(base), hosts, per_host, replicas)
    steps = {step for step, _, _ in answers}
    assert len(steps) == 1, answers
    assert all(right and trainer == {"step": step} for step, right, trainer in answers if step >= 0), answers
    return steps.pop()


def test_two_hosts_lose_either_disk_and_nothing_else(tmp_path: Path) -> None:
    assert save(tmp_path, 2, 1, 1, [1, 2, 3]) == [-1, -1]
    for host in (0, 1):
        folders = sorted(path.name for path in root_of(str(tmp_path), host).iterdir())
        assert folders == ["step-00000002", "step-00000003"]  # retention on every host
    for lost in (0, 1):
        shutil.rmtree(root_of(str(tmp_path), lost))
        assert resumed(tmp_path, [0, 1]) == 3
        assert (root_of(str(tmp_path), lost) / "step-00000003" / layout.rank_file(0, 2)).exists()
    assert save(tmp_path, 2, 1, 1, [4]) == [3, 3]
    assert resumed(tmp_path, [1]) == 4  # on one host alone


@pytest.mark.drill
@pytest.mark.parametrize("replicas", [1, 2])
def test_any_loss_of_as_many_disks_as_replicas(tmp_path: Path, replicas: int) -> None:
    save(tmp_path / "whole", 4, 1, replicas, [1, 2])
    for at, lost in enumerate(itertools.combinations(range(4), replicas)):
        shutil.copytree(tmp_path / "whole", tmp_path / str(at))
        for host in lost:
            shutil.rmtree(root_of(str(tmp_path / str(at)), host))
        left = [host for host in range(4) if host not in lost]
        hosts = left if at % 2 else list(range(4))  # the lost ones come back empty, or not at all
        assert resumed(tmp_path / str(at), hosts, replicas=replicas) == 2, lost


def test_hosts_of_two_ranks_each_and_another_number_of_them(tmp_path: Path) -> None:
    save(tmp_path, 2, 2, 1, [5])
    shutil.rmtree(root_of(str(tmp_path), 0))
    assert resumed(tmp_path, [1], per_host=2) == 5


def test_a_damaged_file_is_taken_from_another_host(tmp_path: Path) -> None:
    save(tmp_path, 2, 1, 1, [1, 2])
    for host, name in ((0, layout.rank_file(0, 2)), (1, layout.TRAINER), (0, layout.rank_file(1, 2))):
        path = root_of(str(tmp_path), host) / "step-00000002" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    path = root_of(str(tmp_path), 1) / "step-00000002" / layout.MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    assert resumed(tmp_path, [0, 1]) == 2  # every file is whole on one of them
    for host in (0, 1):
        verify(root_of(str(tmp_path), host) / "step-00000002")
    for host in (0, 1):
        path = root_of(str(tmp_path), host) / "step-00000002" / layout.rank_file(0, 2)
        path.write_bytes(path.read_bytes()[:-5])
    assert resumed(tmp_path, [0, 1]) == 1  # that one on neither
    assert list((root_of(str(tmp_path), 0) / layout.ASIDE).glob("superseded-step-00000002-*"))


def test_too_many_lost_disks_begin_no_run_anew(tmp_path: Path) -> None:
    save(tmp_path, 3, 1, 1, [1])
    with pytest.raises(RanksFailedError, match=r"no checkpoint in .* is complete on the hosts that answer"):
        resumed(tmp_path, [0])
    assert resumed(tmp_path, [0, 2]) == 1  # another host is back


def test_the_disks_of_all_hosts_are_lost_and_the_store_has_copies(tmp_path: Path, s3: S3) -> None:
    url = f"{s3.url}/run"
    assert [at for at, _, _ in run_ranks(save_and_copy, 2, str(tmp_path), url, 1)] == [-1, -1]
    for host in (0, 1):
        shutil.rmtree(root_of(str(tmp_path), host))
    answers = run_ranks(save_and_copy, 2, str(tmp_path), url, 2)
    assert [[at, right] for at, right, _ in answers] == [[1, True], [1, True]]
    assert answers[0][2][0].startswith(f"checkpoint 1 was fetched from {url}")
    assert answers[0][2][-1].startswith(f"checkpoint 2 is copied to {url}")
    assert not answers[1][2]
    assert [key for key in s3.objects() if key.endswith("manifest.json") and "step-00000002" in key]


def test_a_shared_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="is for hosts with a disk each, but the hosts of ranks"):
        run_ranks(save_steps, 2, str(tmp_path), [0, 0], 1, 1, [1])


def test_at_its_end_a_run_has_the_whole_newest_checkpoint_where_rank_0_is(tmp_path: Path) -> None:
    assert run_ranks(save_and_complete, 4, str(tmp_path)) == [[True, True], *[[True, False]] * 3]
    verify(root_of(str(tmp_path), 0) / "step-00000001")


@pytest.mark.parametrize("hosts", range(1, 9))
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_are_on_other_hosts_and_no_rank_waits_in_a_circle(hosts: int, replicas: int) -> None:
    sizes = [1 + host % 3 for host in range(hosts)]
    found = Hosts.of([[local, size] for size in sizes for local in range(size)])
    holders: dict[int, set[int]] = {}
    for sender, receiver in found.transfers(replicas):
        holders.setdefault(sender, {found.host_of(sender)}).add(found.host_of(receiver))
    assert all(len(on) == 1 + min(replicas, hosts - 1) for on in holders.values())
    assert hosts == 1 or len(holders) == sum(sizes)


def test_ranks_that_are_not_numbered_host_by_host_are_refused() -> None:
    with pytest.raises(CheckpointError, match="host by host"):
        Hosts.of([[0, 2], [0, 2], [1, 2], [1, 2]])


BESIDE = Names(whole=("guard.json",), grown=("metrics.jsonl", "ledger.jsonl"), kept=("ledger.jsonl", "run.lock"))


def train_beside(base: str, hosts: list[int], steps: list[int]) -> int:
    """Save steps; rank 0 writes a line for each before its save, and one more that no save follows."""
    manager = joined(base, hosts, 1, 1, beside=BESIDE)
    ranks = RankInfo.from_env()
    folder = root_of(base, hosts[0]).parent
    manager.agree()
    found = manager.newest()
    for step in steps:
        if ranks.is_main:
            for name in BESIDE.grown:
                with (folder / name).open("a") as file:
                    file.write(f"{step} by {hosts[0]}\n")
            (folder / "guard.json").write_text(f"after {step}")
        manager.begin(Snapshot(step, share(ranks.rank, ranks.world_size, step), {"step": step}, {}), IDENTITY)
    manager.finish(last=True)
    if ranks.is_main:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("a line that no save foll")
    disconnect()
    return -1 if found is None else found.step


def test_what_lies_beside_the_checkpoints_outlives_rank_0s_disk(tmp_path: Path) -> None:
    """Host 0 trains, loses its disk, is away while host 1 goes on, comes back, and comes back again with old files."""

    def ran(hosts: list[int], *steps: int) -> set[int]:
        return set(run_ranks(train_beside, len(hosts), str(tmp_path), hosts, list(steps)))

    def text(host: int, name: str = "metrics.jsonl") -> str:
        return (root_of(str(tmp_path), host).parent / name).read_text()

    assert ran([0, 1], 1, 2) == {-1}
    assert text(0) == "1 by 0\n2 by 0\na line that no save foll"
    assert text(1) == "1 by 0\n2 by 0\n"
    assert text(1, "guard.json") == "after 2"
    shutil.copytree(tmp_path / "host-0", tmp_path / "old")
    shutil.rmtree(tmp_path / "host-0")
    assert ran([1], 3) == {2}
    assert text(1).startswith("1 by 0\n2 by 0\n3 by 1\n")
    assert ran([0, 1], 4) == {3}  # with an empty disk
    assert text(0, "ledger.jsonl") == "1 by 0\n2 by 0\n3 by 1\n4 by 0\n"
    assert text(0, "guard.json") == text(1, "guard.json") == "after 4"
    assert ran([1], 5) == {4}
    shutil.rmtree(tmp_path / "host-0")
    (tmp_path / "old").rename(tmp_path / "host-0")
    (tmp_path / "host-0" / "ledger.jsonl").write_text("a supervisor's\n")
    (tmp_path / "host-0" / "run.lock").touch()
    (tmp_path / "host-1" / "guard.json").unlink()
    assert ran([0, 1]) == {5}
    assert all(line in text(0) for line in ("2 by 0\n", "3 by 1\n", "4 by 0\n", "5 by 1\n"))
    assert text(0, "ledger.jsonl") == "a supervisor's\n"  # its own stays
    assert not (tmp_path / "host-0" / "guard.json").exists()  # where the last writer has none, none counts


@pytest.mark.parametrize("damage", ["", "{", '{"turn": true, "writer": 1}', '{"turn": 1e400, "writer": true}', "link"])
def test_a_damaged_turn_counts_as_none(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    beside = Beside(tmp_path, BESIDE, Hosts((0,), (1,)), Disk())
    if damage == "link":
        (tmp_path / TURN).symlink_to("/dev/zero")
    else:
        (tmp_path / TURN).write_text(damage)
    assert beside._turn() == (0, False)
    assert "turn.json is damaged" in caplog.text
    beside.agree(Alone(), Together(Alone(), tmp_path))  # type: ignore[arg-type]
    assert beside._turn() == (1, True)


def damage(folder: Path, kind: str) -> None:
    """Harm host 0's rank file of a step, or what holds it."""
    path = folder / layout.rank_file(0, 2)
    if kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif kind == "of another step":
        shutil.copyfile(folder.with_name("step-00000001") / path.name, path)
    elif kind == "of the other rank":
        shutil.copyfile(folder / layout.rank_file(1, 2), path)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "link":
        path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
        (path / "in it").write_text("x")
    elif kind == "of 1 TiB":
        os.truncate(path, 1 << 40)
    elif kind == "the manifests of two steps swapped":
        names = [at / layout.MANIFEST for at in (folder, folder.with_name("step-00000001"))]
        texts = [name.read_text() for name in names]
        for name, text in zip(names, reversed(texts), strict=True):
            name.write_text(text)
    elif kind == "the step is a file":
        shutil.rmtree(folder)
        folder.write_text("x")
    elif kind == "the step is a link":
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))


KINDS = (
    "cut", "longer", "of another step", "of the other rank", "pipe", "link", "a folder", "of 1 TiB",
    "the manifests of two steps swapped", "the step is a file", "the step is a link",
)  # fmt: skip


@pytest.mark.drill
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_one_disk_holds_in_place_of_a_file_the_other_host_makes_it_good(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 2, 1, 1, [1, 2])
    damage(root_of(str(tmp_path), 0) / "step-00000002", kind)
    assert resumed(tmp_path, [0, 1]) == 2
    for host in (0, 1):
        folder = root_of(str(tmp_path), host) / "step-00000002"
        assert not folder.is_symlink()
        verify(folder)
        assert not [path for path in folder.iterdir() if path.is_symlink() or not path.is_file()]
