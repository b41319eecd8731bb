"""Checkpoints: what is saved comes back bit for bit, on any number of ranks, and errors reach all of them."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from checkpoints import layout, reader
from checkpoints.config import CheckpointConfig
from checkpoints.errors import DeletedError
from checkpoints.identity import Identity, digest_json, digest_shapes
from checkpoints.manager import CheckpointManager
from checkpoints.reader import Checkpoint, list_checkpoints, open_checkpoint, read_kept, verify
from launch.ckpt.diff import diff
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import KEPT, Fragment
from setformer_dist.core.store import Snapshot
from setformer_dist.testing.threads import run_on_threads

IDENTITY = Identity(model="setformer_tiny", model_args='{"depth": 2}', parameters="abc")
SHAPES = {"stem.weight": (4, 3, 2, 2), "blocks.0.norm.weight": (7,), "head|odd.weight": (5, 11), "scale": ()}


def values(seed: int = 0, shapes=SHAPES, states=("param", "exp_avg", "ema")):
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, state): torch.randn(shape, generator=generator) for name, shape in shapes.items() for state in states
    }


def divide(full, rank: int, world: int):
    """Equal contiguous parts, as ZeRO cuts."""
    for (name, state), tensor in full.items():
        flat = tensor.reshape(-1)
        a, b = flat.numel() * rank // world, flat.numel() * (rank + 1) // world
        yield Fragment(name, state, a, tuple(tensor.shape), flat[a:b].clone())


def empty_like(full, rank: int, world: int):
    return [
        Fragment(f.name, f.state, f.start, f.shape, torch.full_like(f.tensor, math.nan))
        for f in divide(full, rank, world)
    ]


def save(root: Path, full, world: int = 1, step: int = 10, config=None, metrics=None, tags=(), trainer=None):
    def work(comm):
        manager = CheckpointManager(root, comm, config or CheckpointConfig())
        return manager.save(
            Snapshot(step, divide(full, comm.ranks.rank, world), trainer or {"step": step}, metrics or {}, tags),
            IDENTITY,
        )

    return run_on_threads(world, work)[0]


def newest(root: Path, world: int = 1):
    return run_on_threads(world, lambda comm: CheckpointManager(root, comm, CheckpointConfig()).newest())[0]


def assert_equal(full, loaded) -> None:
    for (name, state), tensor in full.items():
        assert torch.equal(tensor, loaded[name, state]), (name, state)


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_what_is_saved_comes_back_on_any_number_of_ranks(tmp_path, writers, readers):
    full = values()
    save(tmp_path, full, writers)

    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        checkpoint = manager.newest()
        mine = empty_like(full, comm.ranks.rank, readers)
        manager.load(checkpoint, mine)
        return mine

    back = {key: torch.full_like(tensor, math.nan) for key, tensor in full.items()}
    for fragments in run_on_threads(readers, work):
        for f in fragments:
            back[f.name, f.state].view(-1)[f.start : f.end] = f.tensor
    assert_equal(full, back)


@st.composite
def partitions(draw):
    """Cut points of one flattened parameter into pieces, and an owner for each piece."""
    numel = draw(st.integers(1, 40))
    world = draw(st.integers(1, 4))
    cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=6))})
    owners = draw(st.lists(st.integers(0, world - 1), min_size=len(cuts), max_size=len(cuts)))
    ranges = draw(st.lists(st.tuples(st.integers(0, numel), st.integers(0, numel)), min_size=1, max_size=6))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]))
    return numel, world, cuts, owners, [(min(r), max(r)) for r in ranges], dtype


@settings(max_examples=60, deadline=None)
@given(case=partitions())
def test_any_partition_reads_back_as_any_other(tmp_path_factory, case):
    numel, world, cuts, owners, ranges, dtype = case
    root = tmp_path_factory.mktemp("partition")
    flat = (torch.arange(numel) * 37 % 101).to(dtype)

    def work(comm):
        mine = [
            Fragment("w", "param", a, (numel,), flat[a:b])
            for a, b, owner in zip(cuts, cuts[1:], owners, strict=False)
            if owner == comm.ranks.rank
        ]
        CheckpointManager(root, comm, CheckpointConfig()).save(Snapshot(1, mine, {}, {}), IDENTITY)

    run_on_threads(world, work)
    wanted = [Fragment("w", "param", a, (numel,), torch.zeros(b - a, dtype=dtype)) for a, b in ranges]
    checkpoint = open_checkpoint(root)
    checkpoint.load_into(wanted)
    for fragment in wanted:
        assert torch.equal(fragment.tensor, flat[fragment.start : fragment.end])
    assert torch.equal(checkpoint.read_full()["w"], flat.float() if dtype.is_floating_point else flat)


def test_fragments_that_every_rank_holds_whole_are_written_once(tmp_path):
    full = values()
    one = save(tmp_path / "one", full, 1)

    def work(comm):
        manager = CheckpointManager(tmp_path / "four", comm, CheckpointConfig())
        return manager.save(Snapshot(10, divide(full, 0, 1), {}, {}), IDENTITY)

    four = run_on_threads(4, work)[0]
    assert_equal(
        full, {(n, s): t for s in ("param", "exp_avg", "ema") for n, t in open_checkpoint(four).read_full(s).items()}
    )
    payload = sum(t.numel() * 4 for t in full.values())
    sizes = [p.stat().st_size for p in four.glob("*.safetensors")]
    assert max(sizes) < one.joinpath(layout.rank_file(0, 1)).stat().st_size
    assert sum(sizes) < payload + 4 * 3000  # the data once, and four headers


def test_special_values_and_dtypes_are_kept_bit_for_bit(tmp_path):
    bits = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 0x7F800000, 0x7FC00001, 0x00000001], dtype=torch.int32)
    single = bits.view(torch.float32)  # zero, denormals, infinities, NaN with a payload
    half = bits.view(torch.bfloat16)
    fragments = [Fragment("a", "param", 0, (8,), single), Fragment("b", "param", 0, (16,), half)]
    CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(Snapshot(1, fragments, {}, {}), IDENTITY)
    out = [
        Fragment("a", "param", 0, (8,), torch.zeros(8)),
        Fragment("b", "param", 0, (16,), torch.zeros(16).bfloat16()),
    ]
    open_checkpoint(tmp_path).load_into(out)
    assert torch.equal(out[0].tensor.view(torch.int32), bits)
    assert torch.equal(out[1].tensor.view(torch.int32), bits)


def test_live_parameters_are_filled_in_place(tmp_path):
    full = values()
    save(tmp_path, full)
    parameter = torch.nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16))
    open_checkpoint(tmp_path).load_into([Fragment("stem.weight", "param", 0, (4, 3, 2, 2), parameter.view(-1))])
    assert torch.equal(parameter.detach(), full["stem.weight", "param"].bfloat16())


def test_trainer_identity_metrics_and_tags_come_back(tmp_path):
    trainer = {"cursor": {"seed": 3, "consumed": 10**12}, "scale": 65536.0, "lr": 0.1 + 0.2, "odd": math.inf}
    path = save(tmp_path, values(), 2, 7, metrics={"top1": 0.5, "loss": math.nan}, tags=("final",), trainer=trainer)
    checkpoint = open_checkpoint(path)
    assert checkpoint.trainer == trainer
    assert checkpoint.step == 7
    assert checkpoint.identity == IDENTITY.model_copy(update={"world_size": 2})
    assert checkpoint.metrics["top1"] == 0.5
    assert math.isnan(checkpoint.metrics["loss"])
    assert checkpoint.manifest.tags == ("final",)
    assert "NaN" not in (path / layout.MANIFEST).read_text()


def test_a_step_that_verifies_is_not_written_again(tmp_path):
    first = save(tmp_path, values(0))
    before = (first / layout.MANIFEST).read_bytes()
    assert save(tmp_path, values(1)) == first
    assert (first / layout.MANIFEST).read_bytes() == before
    os.truncate(first / layout.rank_file(0, 1), 100)
    save(tmp_path, values(1))
    assert torch.equal(open_checkpoint(first).read_full()["scale"], values(1)["scale", "param"])


def test_a_leftover_of_a_killed_writer_is_swept(tmp_path):
    leftover = layout.temporary_folder(tmp_path, 3, "0f")
    leftover.mkdir()
    (leftover / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    assert newest(tmp_path) is None
    save(tmp_path, values())
    assert layout.leftovers(tmp_path) == []


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_an_error_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path, bad_rank):
    full = values()
    save(tmp_path, full, 3, 1)

    def broken(rank):
        yield from divide(full, rank, 3)
        if rank == bad_rank:
            raise MemoryError("no room for the copy")

    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        with pytest.raises(CheckpointError, match=rf"rank {bad_rank}: MemoryError: no room"):
            manager.save(Snapshot(2, broken(comm.ranks.rank), {}, {}), IDENTITY)
        return manager.newest().step

    assert run_on_threads(3, work) == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_trainer_state_that_is_not_json_is_refused_on_all_ranks(tmp_path):
    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        with pytest.raises(CheckpointError, match="not JSON serializable"):
            manager.save(Snapshot(2, divide(values(), comm.ranks.rank, 2), {"x": object()}, {}), IDENTITY)

    run_on_threads(2, work)
    assert list(tmp_path.iterdir()) == []


def test_a_fragment_that_cannot_be_stored_is_named(tmp_path):
    manager = CheckpointManager(tmp_path, Alone(), CheckpointConfig())
    twice = [Fragment("w", "param", 0, (4,), torch.zeros(4))] * 2
    with pytest.raises(CheckpointError, match=r"w\|param\|0\|4 was given twice"):
        manager.save(Snapshot(1, twice, {}, {}), IDENTITY)
    with pytest.raises(CheckpointError, match="leaves its parameter of shape"):
        manager.save(Snapshot(1, [Fragment("w", "param", 2, (4,), torch.zeros(4))], {}, {}), IDENTITY)
    with pytest.raises(CheckpointError, match="complex64, which cannot be stored"):
        manager.save(
            Snapshot(1, [Fragment("w", "param", 0, (4,), torch.zeros(4, dtype=torch.complex64))], {}, {}), IDENTITY
        )


def test_ranks_at_different_steps_are_refused(tmp_path):
    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        with pytest.raises(CheckpointError, match=r"different steps: \[1, 2\]"):
            manager.save(Snapshot(1 + comm.ranks.rank, divide(values(), comm.ranks.rank, 2), {}, {}), IDENTITY)

    run_on_threads(2, work)


def test_another_model_is_named_with_its_first_parameters(tmp_path):
    save(tmp_path, values())
    checkpoint = open_checkpoint(tmp_path)
    wanted = [
        Fragment("neck.weight", "param", 0, (3,), torch.zeros(3)),
        Fragment("blocks.0.norm.weight", "param", 0, (9,), torch.zeros(9)),
    ]
    with pytest.raises(CheckpointError, match="another model") as caught:
        checkpoint.load_into(wanted)
    assert "neck.weight is not in it" in str(caught.value)
    assert "blocks.0.norm.weight is (7,) there and (9,) here" in str(caught.value)


def test_a_missing_state_and_a_missing_range_are_named(tmp_path):
    CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(
        Snapshot(1, [Fragment("w", "param", 2, (6,), torch.ones(3))], {}, {}), IDENTITY
    )
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no state 'ema' of w \(it holds param\)"):
        checkpoint.load_into([Fragment("w", "ema", 0, (6,), torch.zeros(6))])
    with pytest.raises(CheckpointError, match="lacks elements 5 to 6"):
        checkpoint.load_into([Fragment("w", "param", 3, (6,), torch.zeros(3))])
    with pytest.raises(CheckpointError, match="lacks elements 0 to 6"):
        checkpoint.read_full()


def test_a_load_error_on_one_rank_is_raised_on_all(tmp_path):
    save(tmp_path, values())

    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        checkpoint = manager.newest()
        name = "nobody" if comm.ranks.rank else "scale"
        with pytest.raises(CheckpointError, match=r"rank 1: .*nobody is not in it"):
            manager.load(checkpoint, [Fragment(name, "param", 0, (), torch.zeros(1))])

    run_on_threads(2, work)


def test_whole_tensors_fall_back_to_another_state(tmp_path):
    fragments = [
        Fragment("w", "param", 0, (2, 3), torch.arange(6.0)),
        Fragment("w", "ema", 0, (2, 3), torch.arange(6.0) + 10),
        Fragment("b", "param", 0, (2,), torch.ones(2).bfloat16()),
        Fragment("none", "param", 0, (0, 4), torch.zeros(0)),
    ]
    CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(Snapshot(1, fragments, {}, {}), IDENTITY)
    full = open_checkpoint(tmp_path).read_full("ema", fallback="param")
    assert torch.equal(full["w"], torch.arange(6.0).reshape(2, 3) + 10)
    assert full["b"].dtype == torch.float32
    assert full["none"].shape == (0, 4)
    with pytest.raises(CheckpointError, match="no state 'ema' of b"):
        open_checkpoint(tmp_path).read_full("ema")


def test_a_user_may_point_at_run_root_or_step(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step, top1 in ((1, 0.3), (2, 0.9), (3, 0.5)):
        save(root, values(step), step=step, metrics={"top1": top1})
    assert open_checkpoint(tmp_path / "run").step == 3
    assert open_checkpoint(root).step == 3
    assert open_checkpoint(root / "step-00000001").step == 1
    assert open_checkpoint(root, best_by=CheckpointConfig()).step == 2
    assert CheckpointManager(root, Alone(), CheckpointConfig()).best().step == 2
    with pytest.raises(CheckpointError, match="holds no checkpoint: name a run folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        open_checkpoint(root / "step-00000009")


def test_a_checkpoint_that_is_passed_over_is_told_of(tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, values(step), step=step)
    assert open_checkpoint(tmp_path).step == 2
    assert not caplog.records
    (rank_file,) = (tmp_path / "step-00000002").glob("rank-*")
    rank_file.write_bytes(rank_file.read_bytes()[:-1])
    assert open_checkpoint(tmp_path).step == 1
    (record,) = caplog.records
    assert "step-00000002 does not verify" in record.message
    assert record.message.endswith("step-00000001 is used instead")


def test_what_a_run_deletes_while_it_is_read_is_told_from_damage(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, values()))
    shutil.rmtree(checkpoint.path)
    for read in (checkpoint.read_full, checkpoint.states, lambda: checkpoint.trainer):
        with pytest.raises(DeletedError, match="was deleted while it was read"):
            read()


def test_another_is_read_where_a_run_deletes_the_first(tmp_path):
    """As a run does that trains in the folder, between two calls of a reader."""
    save(tmp_path, values(), step=10)
    opened = []

    def read() -> int:
        checkpoint = open_checkpoint(tmp_path)
        opened.append(checkpoint.step)
        if checkpoint.step == 10:
            save(tmp_path, values(), step=20)
            shutil.rmtree(checkpoint.path)
        return len(checkpoint.read_full())

    assert read_kept(tmp_path, read) == len(SHAPES)
    assert opened == [10, 20]
    with pytest.raises(DeletedError):  # of one step there is no other
        read_kept(layout.step_folder(tmp_path, 20), lambda: (_ for _ in ()).throw(DeletedError("gone")))


def test_diff_goes_on_with_the_checkpoint_that_is_there(tmp_path, monkeypatch, capsys):
    """Where a run deletes the one that is compared."""
    save(tmp_path / "run", values(), step=10)
    save(tmp_path / "other", values(), step=5)
    whole, deleted = Checkpoint.iterate_full, []

    def first_deleted(self, state):
        if self.step == 10:
            save(tmp_path / "run", values(), step=20)
            shutil.rmtree(self.path)
            deleted.append(self.step)
        return whole(self, state)

    monkeypatch.setattr(Checkpoint, "iterate_full", first_deleted)
    diff(tmp_path / "other", tmp_path / "run", "param", Console(), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert deleted == [10]
    assert found["steps"] == [5, 20]
    assert found["common"] == len(SHAPES)
    assert found["parameters"] == {}


def test_what_is_deleted_after_it_was_listed_is_looked_for_again(tmp_path, monkeypatch, caplog):
    """Neither is the run without a checkpoint, nor is an old one taken for the newest."""
    for step in (10, 20):
        save(tmp_path, values(), step=step)
    verified = reader.verified

    def late(folder: Path):
        if folder.name == layout.step_folder(tmp_path, 20).name and folder.exists():
            shutil.rmtree(folder)
            save(tmp_path, values(), step=30)
        return verified(folder)

    monkeypatch.setattr(reader, "verified", late)
    assert open_checkpoint(tmp_path).step == 30
    assert not caplog.records


def test_a_copied_step_folder_under_another_name_opens(tmp_path):
    path = save(tmp_path / "a", values())
    path.rename(tmp_path / "the-good-one")
    assert open_checkpoint(tmp_path / "the-good-one").step == 10
    (tmp_path / "the-good-one").rename(tmp_path / "step-00000099")
    with pytest.raises(CheckpointError, match="renamed by hand"):
        open_checkpoint(tmp_path / "step-00000099")


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=1)
    for step, top1 in enumerate((0.1, 0.8, 0.2, 0.3, 0.4), start=1):
        save(tmp_path, values(), step=step, config=config, metrics={"top1": top1})
    assert [e.manifest.step for e in list_checkpoints(tmp_path)] == [5, 4, 2]


def test_all_ranks_choose_the_same_checkpoint(tmp_path):
    full = values()
    for step in (1, 2):
        save(tmp_path, full, 3, step)
    path = layout.step_folder(tmp_path, 2) / layout.rank_file(1, 3)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def work(comm):
        manager = CheckpointManager(tmp_path, comm, CheckpointConfig())
        checkpoint = manager.newest()
        return checkpoint.step, [(s.path.name, s.reason) for s in manager.skipped]

    answers = run_on_threads(4, work)
    assert answers == [answers[0]] * 4
    step, skipped = answers[0]
    assert step == 1
    assert skipped == [("step-00000002", "rank-00001-of-00003.safetensors is damaged (its xxh3_128 differs)")]


def test_the_listing_tells_what_is_wrong(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, values(), step=step)
    layout.step_folder(tmp_path, 3).joinpath(layout.MANIFEST).unlink()
    os.truncate(layout.step_folder(tmp_path, 2) / layout.TRAINER, 1)
    three, two, one = list_checkpoints(tmp_path, hashes=True)
    assert "no manifest.json" in three.fault
    assert "trainer.json has 1 bytes" in two.fault
    assert one.fault is None
    assert one.manifest.size == sum(p.stat().st_size for p in one.path.iterdir() if p.name != layout.MANIFEST)


def test_identity_refuses_another_model_and_says_what_differs():
    IDENTITY.check_same_model(IDENTITY.model_copy(update={"stage": 3, "world_size": 8, "config_hash": "x"}))
    with pytest.raises(CheckpointError, match="argument depth 2 against 4"):
        IDENTITY.check_same_model(IDENTITY.model_copy(update={"model_args": '{"depth": 4}'}))
    with pytest.raises(CheckpointError, match="model 'setformer_tiny' against 'soft'"):
        IDENTITY.check_same_model(IDENTITY.model_copy(update={"model": "soft"}))
    with pytest.raises(CheckpointError, match="parameter shapes"):
        IDENTITY.check_same_model(IDENTITY.model_copy(update={"parameters": "def"}))
    with pytest.raises(CheckpointError, match="classes none against abcd"):
        IDENTITY.check_same_model(IDENTITY.model_copy(update={"classes": "abcd"}))


def test_digests_do_not_depend_on_order():
    assert digest_shapes({"a": (1, 2), "b": ()}) == digest_shapes({"b": (), "a": (1, 2)})
    assert digest_shapes({"a": (1, 2)}) != digest_shapes({"a": (2, 1)})
    assert digest_json({"x": 1, "y": 2}) == digest_json({"y": 2, "x": 1})


def test_a_manifest_may_not_lead_out_of_its_folder(tmp_path):
    path = save(tmp_path, values())
    manifest_file = path / layout.MANIFEST
    body = json.loads(manifest_file.read_text())
    body.pop("sha256")
    body["files"][0]["name"] = "../../secret"
    manifest_file.write_text(json.dumps(body | {"sha256": digest_json(body)}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify(path)


def test_a_later_format_is_refused_by_version(tmp_path):
    path = save(tmp_path, values())
    body = json.loads((path / layout.MANIFEST).read_text())
    body = {k: v for k, v in body.items() if k != "sha256"} | {"version": 9}
    (path / layout.MANIFEST).write_text(json.dumps(body | {"sha256": digest_json(body)}))
    with pytest.raises(CheckpointError, match="format version 9, this program reads 1, 2"):
        verify(path)


def test_what_a_part_of_the_run_keeps_is_no_parameter(tmp_path):
    full = values()
    kept = {
        (f"{KEPT}refresh/keys/stem", "sample"): torch.arange(-3, 8),
        (f"{KEPT}refresh/tokens/stem", "sample"): torch.randn(11, 5),
    }
    save(tmp_path, full | kept, world=2)
    checkpoint = newest(tmp_path)
    assert checkpoint.parameters() == SHAPES
    assert set(checkpoint.states()) == {"param", "exp_avg", "ema"}
    assert set(checkpoint.read_full("param")) == set(SHAPES)
    checkpoint.check_holds(SHAPES, ("param", "ema"))
    back = {key: torch.zeros_like(tensor) for key, tensor in kept.items()}
    checkpoint.load_into([Fragment(*key, 0, tuple(t.shape), t.view(-1)) for key, t in back.items()])
    assert_equal(kept, back)


def test_a_checkpoint_of_which_other_parameters_trained_is_refused(tmp_path):
    full = {key: tensor for key, tensor in values().items() if key[0] != "scale" or key[1] != "exp_avg"}
    save(tmp_path, full)
    trained = {name: shape for name, shape in SHAPES.items() if name != "scale"}
    states, weights = ("param", "exp_avg", "ema"), ("param", "ema")
    checkpoint = newest(tmp_path)
    checkpoint.check_holds(trained, states, {"scale": ()}, weights)
    with pytest.raises(CheckpointError, match=r"another model \(scale trains here and did not there\): train the same"):
        checkpoint.check_holds(SHAPES, states)
    less = {name: shape for name, shape in trained.items() if name != "stem.weight"}
    with pytest.raises(CheckpointError, match=r"stem.weight trained there and does not here"):
        checkpoint.check_holds(less, states, {"scale": (), "stem.weight": SHAPES["stem.weight"]}, weights)
