"""Copies in an object store that fails, lies, or holds what no run put there; a real S3 server on loopback."""

from __future__ import annotations

import logging
import re
import time

import pytest
import s3fs
import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.copies import list_copies, step_of_copy
from checkpoints.errors import StorageError
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from checkpoints.objects import Objects
from checkpoints.testing.copy_faults import finish
from launch.testing.commands import setformer
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot

IDENTITY = Identity(model="m")


def manager_of(root, s3, **config):
    values = {"keep_last": 9, "keep_best": 0, "mirror_minutes": 0.2, **config}
    return CheckpointManager(root, Alone(), CheckpointConfig(**values), objects=Objects(f"{s3.url}/run"))


def save(manager, step, wait=True):
    values = torch.full((100,), float(step))
    manager.begin(Snapshot(step, [Fragment("w", "param", 0, (100,), values)], {"step": step}, {}), IDENTITY)
    manager.finish(last=True)
    if wait:
        finish(manager)


def copied(s3):
    return [copy.manifest.step for copy in list_copies(Objects(f"{s3.url}/run")) if copy.manifest]


def key_of(s3, step, name):
    return next(key for key in s3.objects() if f"/step-{step:08d}-" in key and key.endswith(f"/{name}"))


def test_a_server_that_is_away_for_a_while_costs_time_alone(tmp_path, s3):
    manager = manager_of(tmp_path, s3)
    assert manager.newest() is None
    s3.stop()
    began = time.monotonic()
    save(manager, 1, wait=False)
    assert time.monotonic() - began < 2  # training waits for no part of it
    s3.start()
    finish(manager)
    assert copied(s3) == [1]
    assert [event.ok for event in manager.copies()] == [True]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_answers_with_an_error_now_and_then_is_asked_again(tmp_path, s3, status):
    manager = manager_of(tmp_path, s3)
    s3.faults += [("PUT", "manifest.json", f"status {status}"), ("GET", ".safetensors", f"status {status}")]
    save(manager, 1)
    assert not s3.faults
    assert copied(s3) == [1]


def test_a_store_that_stays_away_is_told_and_costs_no_checkpoint(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # of the client's own, which take 10 s a call
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    manager = manager_of(tmp_path, s3, mirror_minutes=0.02)
    save(manager, 1)
    s3.stop()
    save(manager, 2)
    told = [event.text for event in manager.copies()]
    assert told[0].startswith(f"checkpoint 1 is copied to {s3.url}/run")
    assert told[1].startswith(f"warning: checkpoint 2 is not copied to {s3.url}/run: ")
    assert told[1].endswith("the newest copy is of step 1")
    assert manager_of(tmp_path, s3).newest().step == 2  # from its own disk
    with pytest.raises(StorageError, match="look for a copy"):  # nothing is known: no run begins from nothing
        manager_of(tmp_path / "empty", s3).newest()


def test_a_bucket_that_is_not_there_or_not_ours_is_told_before_training(tmp_path, s3):
    s3.bucket = "nobody-has-made-it"
    with pytest.raises(CheckpointError, match=r"s3://nobody-has-made-it/.* there is no such bucket"):
        manager_of(tmp_path, s3).newest()
    s3.always = "status 403"
    with pytest.raises(CheckpointError, match=r"may not be written .*credentials"):
        manager_of(tmp_path, s3).newest()


def test_a_slow_copy_leaves_out_saves_and_the_last_is_copied_at_the_end(tmp_path, s3):
    manager = manager_of(tmp_path, s3)
    s3.faults.append(("PUT", ".safetensors", "slow"))
    for step in (1, 2, 3):
        save(manager, step, wait=False)
    finish(manager)
    assert copied(s3) == [3, 1]


def test_what_was_not_copied_is_copied_by_the_next_start(tmp_path, s3):
    CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(
        Snapshot(4, [Fragment("w", "param", 0, (2,), torch.ones(2))], {"step": 4}, {}), IDENTITY
    )
    manager = manager_of(tmp_path, s3)
    assert manager.newest().step == 4
    finish(manager)
    assert copied(s3) == [4]
    before = len(s3.objects())
    again = manager_of(tmp_path, s3)
    again.newest()
    finish(again)
    assert len(s3.objects()) == before  # it is there already


def test_a_damaged_newest_checkpoint_is_taken_from_the_store_and_not_an_older_one(tmp_path, s3):
    manager = manager_of(tmp_path, s3)
    save(manager, 1)
    save(manager, 2)
    path = tmp_path / "step-00000002" / layout.rank_file(0, 1)
    path.write_bytes(path.read_bytes()[:-1])
    found = manager_of(tmp_path, s3).newest()
    assert found.step == 2
    assert torch.equal(found.read_full()["w"], torch.full((100,), 2.0))


def test_a_checkpoint_in_the_folder_is_preferred_and_the_branch_that_was_left_goes(tmp_path, s3):
    manager = manager_of(tmp_path, s3)
    for step in (1, 2, 3):
        save(manager, step)
    back = manager_of(tmp_path, s3)
    assert back.newest_before(3, "the guard said so").step == 2
    again = manager_of(tmp_path, s3)
    assert again.newest().step == 2  # and not 3, though a copy of it is there
    finish(again)
    save(again, 4)
    assert copied(s3) == [4, 3, 2, 1]
    third = manager_of(tmp_path, s3)
    assert third.newest_before(3, "and again").step == 2
    finish(third)
    save(third, 3)
    assert copied(s3) == [3, 2, 1]  # 4 is of a branch that the run has left


@pytest.mark.parametrize(
    "harm",
    ["a file is gone", "a byte differs", "a file is cut", "a file is longer", "no manifest", "manifest cut", "huge"],
)
def test_a_copy_that_was_harmed_is_passed_over(tmp_path, s3, harm, caplog):
    manager = manager_of(tmp_path / "first", s3)
    save(manager, 1)
    save(manager, 2)
    manifest = harm in ("no manifest", "manifest cut", "huge")
    key = key_of(s3, 2, layout.MANIFEST if manifest else layout.rank_file(0, 1))
    data = s3.get(key)
    changed = {
        "a byte differs": data[:-1] + bytes([data[-1] ^ 1]),
        "a file is cut": data[:-1],
        "a file is longer": data + b"x",
        "manifest cut": data[:100],
        "huge": b" " * (65 << 20),
    }
    s3.delete(key) if harm in ("a file is gone", "no manifest") else s3.put(key, changed[harm])
    with caplog.at_level(logging.WARNING):
        found = manager_of(tmp_path / "second", s3).newest()
    assert found.step == 1
    assert torch.equal(found.read_full()["w"], torch.full((100,), 1.0))
    assert not list((tmp_path / "second").glob(".tmp-*"))
    assert harm == "no manifest" or "step-00000002" in caplog.text


def test_names_of_a_listing_lead_nowhere(tmp_path, s3):
    manager = manager_of(tmp_path / "first", s3)
    save(manager, 1)
    prefix = key_of(s3, 1, layout.MANIFEST).rpartition("/step-")[0]
    for name in (
        "step-00000009-../x",
        "../step-00000009-00000000",
        "step-00000009-zzzzzzzz/manifest.json",
        "x/manifest.json",
    ):
        s3.put(f"{prefix}/{name}", b"{}")
    assert manager_of(tmp_path / "second", s3).newest().step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_copy_of_another_run_is_refused_and_not_left_behind(tmp_path, s3):
    save(manager_of(tmp_path / "first", s3), 1)

    def accept(found):
        raise CheckpointError("it is of another model")

    with pytest.raises(CheckpointError, match=r"another model \(it was fetched from s3://"):
        manager_of(tmp_path / "second", s3).newest(accept)
    assert not list((tmp_path / "second").glob("*step*"))


def test_commands_list_verify_and_fetch(tmp_path, s3):
    manager = manager_of(tmp_path / "first", s3)
    save(manager, 1)
    save(manager, 2)
    url = f"{s3.url}/run"
    listed = setformer("ckpt", "ls", url)
    assert listed.code == 0, listed.err
    assert re.search(r" 2 .*complete", listed.out), listed.out
    verified = setformer("ckpt", "verify", url)
    assert (verified.code, verified.out.count("verifies")) == (0, 2), verified.err
    fetched = setformer("ckpt", "fetch", url, str(tmp_path / "to"))
    assert fetched.code == 0, fetched.err
    assert setformer("ckpt", "verify", str(tmp_path / "to")).code == 0
    again = setformer("ckpt", "fetch", url, str(tmp_path / "to"))
    assert again.code == 2
    assert "already exists" in again.err
    shown = setformer("ckpt", "show", url)
    assert shown.code == 2
    assert f"error: {url} is a URL: `setformer ckpt fetch` it first" in shown.err
    key = key_of(s3, 2, layout.rank_file(0, 1))
    s3.put(key, s3.get(key)[:-1])
    for words in (("verify", url), ("ls", url, "--verify")):
        ended = setformer("ckpt", *words)
        assert ended.code == 4, ended.err
        assert "bytes, not" in ended.out
    one = next(copy.name for copy in list_copies(Objects(url)) if step_of_copy(copy.name) == 1)
    assert setformer("ckpt", "verify", f"{url}/{one}").code == 0
    nothing = setformer("ckpt", "ls", f"{s3.url}/nothing")
    assert nothing.code == 4
    assert nothing.err.startswith(f"error: {s3.url}/nothing holds no copies")


@pytest.mark.parametrize(
    "url", ["bucket/runs", "https://host/runs", "simplecache::s3://b/x", "s3://b/x?sig=1", "s3://"]
)
def test_what_is_no_folder_of_a_store_is_refused(url):
    with pytest.raises(ValueError, match="mirror"):
        CheckpointConfig(mirror=url)


def test_a_store_of_no_known_kind_is_told_before_training(tmp_path):
    config = CheckpointConfig(mirror="s4://bucket/runs")
    manager = CheckpointManager(tmp_path, Alone(), config, objects=Objects(config.mirror))
    with pytest.raises(CheckpointError, match=r"s4://bucket/runs cannot be opened: Protocol not known: s4") as told:
        manager.newest()
    assert not isinstance(told.value, StorageError)
