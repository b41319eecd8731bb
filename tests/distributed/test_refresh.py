"""Refreshes of reference sets on 1, 2 and 3 gloo ranks, under every ZeRO stage and offload.

Given the same features, what a refresh leaves is the same bit by bit: masters, states and average, everywhere. Features
of real forward passes differ in their last bits between world sizes, as losses do, so these are made from the place of
each sample in the global batch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.run.compose import check_device, compose, open_splits
from launch.run.config import load_run, resolve
from launch.run.inputs import inputs_of
from launch.testing.commands import DEMO, SHORT
from launch.testing.ranks import run_ranks
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.comm import TorchCollectives, connect, disconnect
from setformer_dist.engine.config import RefreshConfig
from setformer_dist.engine.refitter import InJob
from setformer_dist.engine.refresh import Refresh
from setformer_dist.models.attention import SetAttention
from setformer_dist.models.build import build_model
from setformer_dist.models.reference_sets import freeze_sets, reference_layers
from setformer_dist.tasks.build import build_task
from tests.distributed import workers
from tests.distributed.test_resume_everywhere import LAYOUTS, few_digits

__all__ = ["few_digits"]  # a fixture

GLOBAL = 12
SETS = ("references", "return_references", "anchors")
NANO = ModelConfig(
    name="setformer_nano",
    args={"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 3), "stem_strides": (2, 1),
          "attn": {"references": 4, "kernel": "nystrom", "anchors": 5}},
)  # fmt: skip


# The same bits on any number of ranks and in any layout.


def written(fragment: Fragment) -> torch.Tensor:
    """Return made-up values of a fragment's elements, a function of what they are alone."""
    seed = int.from_bytes(hashlib.blake2b(f"{fragment.name}|{fragment.state}".encode(), digest_size=4).digest(), "big")
    whole = torch.randn(fragment.full_numel, generator=torch.Generator().manual_seed(seed))
    return (
        whole[fragment.start : fragment.end].abs()
        if fragment.state == "exp_avg_sq"
        else whole[fragment.start : fragment.end]
    )


def whole_of(trainee: workers.Trainee) -> dict[str, torch.Tensor]:
    """Return what all ranks hold of the sets' masters, states and average, whole."""
    held = [f for f in trainee.held() if f.name.rsplit(".", 1)[-1] in SETS]
    parts = trainee.comm.gather_json([[f.name, f.state, f.start, list(f.shape), f.tensor.tolist()] for f in held])
    found: dict[str, torch.Tensor] = {}
    for name, state, start, shape, values in [part for rank in parts for part in rank]:
        whole = found.setdefault(f"{name}|{state}", torch.full(shape, torch.nan))
        whole.view(-1)[start : start + len(values)] = torch.tensor(values)
    return found


@contextlib.contextmanager
def offered(take: Callable[..., None], layers: Any, places: torch.Tensor, step: int) -> Iterator[None]:
    """Offer made-up tokens of these places of the global batch."""
    yield
    for layer in layers:
        seed = int.from_bytes(layer.name.encode()[-3:], "big") + step
        x = torch.randn(GLOBAL, layer.heads, 16, layer.width, generator=torch.Generator().manual_seed(seed))
        take(layer.name, x[places], None)


def refreshed(stage: int, offload: str, dtype: str, optimizer: str) -> dict[str, Any]:
    """Sample three steps and refresh; return digests of what is left, and what the model computes with."""
    trainee = workers.Trainee(
        stage, dtype, micro=2, model=NANO, offload=offload, global_size=GLOBAL,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None,
    )  # fmt: skip
    for fragment in trainee.held():
        fragment.tensor.data.copy_(written(fragment))
    trainee.master.refresh()
    before = whole_of(trainee)
    layers = reference_layers(build_model(NANO, 10, 16, 0))
    state: dict[str, Any] = {}
    config = RefreshConfig(at_steps=(3,), sample_steps=3, samples=40, optimizer=optimizer, iterations=5)
    made = Refresh(
        config, layers, lambda take: offered(take, layers, **state), trainee.master, trainee.ema, trainee.comm,
        trainee.plan, InJob(trainee.ranks, trainee.engine.device), seed=7, total_steps=9,
    )  # fmt: skip
    for step in range(3):
        for index in range(trainee.plan.accumulation):
            first = (index * trainee.ranks.world_size + trainee.ranks.rank) * trainee.plan.micro
            state |= {"places": torch.arange(first, first + trainee.plan.micro), "step": step}
            batch = MicroBatch(torch.zeros(0), torch.zeros(0), torch.zeros(0), state["places"])
            with made.watching(step, index, batch):
                pass
        made.after_update(step)
    made.begin(3)
    values = made.apply(3)
    values.pop("seconds")
    after = whole_of(trainee)
    made.begin(3)
    skipped = made.apply(3)  # nothing was sampled since
    skipped.pop("seconds")
    unchanged = all(torch.equal(tensor, after[name]) for name, tensor in whole_of(trainee).items())
    moved = {name: not torch.equal(after[name], before[name]) for name in after}
    return {
        "digests": {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in sorted(after.items())},
        "moved": sorted(name for name, did in moved.items() if did),
        "zero": sorted(name for name, t in after.items() if not t.any()),
        "finite": all(bool(t.isfinite().all()) for t in after.values()),
        "computes": computes_with(trainee, after),
        "values": values,
        "left": made.state(),
        "skipped": [skipped, unchanged],
    }


def computes_with(trainee: workers.Trainee, masters: dict[str, torch.Tensor]) -> bool:
    """Return whether the model's own sets, gathered for a forward pass, are the masters in its dtype."""
    seen: dict[str, bool] = {}

    def compare(name: str, module: SetAttention, _: object) -> None:
        for kind, vectors in module.sets().items():
            key = f"{name}.{kind}"
            seen[key] = torch.equal(vectors.detach(), masters[f"{key}|param"].to(vectors.dtype))

    for name, module in trainee.engine.module.named_modules():
        if isinstance(module, SetAttention):
            module.register_forward_pre_hook(functools.partial(compare, name))
    trainee.engine(torch.randn(2, 3, 16, 16).to(trainee.dtype))
    return len(seen) == 6 and all(seen.values())


def in_all_layouts() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for stage, offload in LAYOUTS:
        for dtype in ("fp32", "bf16") if (stage, offload) in ((0, "none"), (2, "none"), (3, "all")) else ("fp32",):
            rule = "all" if (stage, offload) == (1, "none") else "momentum"
            found.append({"layout": [stage, offload, dtype, rule], **refreshed(stage, offload, dtype, rule)})
    disconnect()
    return found


@pytest.fixture(scope="module")
def by_world() -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(in_all_layouts, world, timeout=280)[0] for world in (1, 2, 3)}


def test_the_same_bits_on_any_ranks_in_any_layout(by_world: dict[int, list[dict[str, Any]]]) -> None:
    expected = by_world[1][0]
    for world, found in by_world.items():
        assert len(found) == 11
        for entry in found:
            where = (world, entry["layout"])
            assert entry["computes"], where
            assert entry["finite"], where
            assert entry["left"] == {}, where
            why = "stages.0.blocks.0.attn has 0 sampled tokens for 5 anchors"
            assert entry["skipped"] == [{"sampled": 3, "samples": 0, "skipped": why}, True], where
            assert entry["values"] == expected["values"], where
            compared = {
                name: digest for name, digest in entry["digests"].items()
                if entry["layout"][3] == "momentum" or not name.endswith("exp_avg_sq")
            }  # fmt: skip
            assert {name: expected["digests"][name] for name in compared} == compared, where


def test_what_becomes_of_states_and_average(by_world: dict[int, list[dict[str, Any]]]) -> None:
    for entry in [entry for found in by_world.values() for entry in found]:
        names = {name.split("|")[0] for name in entry["digests"]}
        zeroed = ("exp_avg", "exp_avg_sq") if entry["layout"][3] == "all" else ("exp_avg",)
        assert entry["zero"] == sorted(f"{name}|{state}" for name in names for state in zeroed)
        changed = ("param", "ema", *zeroed)
        assert entry["moved"] == sorted(f"{name}|{state}" for name in names for state in changed)
        for name in names:  # the average follows
            assert entry["digests"][f"{name}|param"] == entry["digests"][f"{name}|ema"]


# Sets that K-means alone moves.


def frozen_everywhere() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for stage, offload in LAYOUTS:
        module = build_model(NANO, 10, 16, 0)
        freeze_sets(module, ("references", "anchors"))
        trainee = workers.Trainee(stage, "fp32", offload=offload, module=module)
        before = whole_of(trainee)
        losses = [trainee.step(step) for step in range(3)]
        after = whole_of(trainee)
        same = sorted({name.split("|")[0] for name in after if torch.equal(before[name], after[name])})
        found.append({"losses": losses, "same": same})
    disconnect()
    return found


def test_frozen_sets_stay_and_all_else_learns() -> None:
    for by_rank in run_ranks(frozen_everywhere, 2, timeout=200):
        for entry in by_rank:
            assert entry["losses"] == pytest.approx(by_rank[0]["losses"], rel=1e-5)
            layers = [f"stages.{i}.blocks.0.attn" for i in range(2)]
            assert entry["same"] == sorted(f"{layer}.{kind}" for layer in layers for kind in ("references", "anchors"))


# Whole runs: a checkpoint before, within and after a refresh, on the same ranks and on others.

TINY = (
    "~model.args",
    "model.args={embed_dim = 12, depths = [1, 1], num_heads = [2, 3], stem_strides = [2, 1]}",
    "~schedule.epochs",
    "~schedule.warmup_epochs",
    "schedule.steps=8",
    "batch.global_size=24",
    "batch.micro=4",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=20",
    "zero.bucket_mib=1",
    "refresh.at_steps=[5]",
    "refresh.sample_steps=3",
    "refresh.samples=64",
)
MOMENTS = (1, 4, 5)  # before the first sampled step, after two of three, and just after the refresh


def trainer_of(words: list[str]) -> Any:
    """Return the trainer of a run, resumed from wherever its folder lets it."""
    ranks = RankInfo.from_env()
    config = load_run(Path(DEMO), words)
    run = resolve(config, ranks.world_size)
    check_device(run)
    splits = open_splits(run)
    inputs = inputs_of(config.data)
    task = build_task(config.task, splits.train.classes)
    model = inputs.build_model(config.model, len(task.outputs), inputs.spec(splits.train), config.run.seed)
    config.folder.mkdir(parents=True, exist_ok=True)
    trainer = compose(run, splits, task, model, TorchCollectives(ranks))
    trainer.resume()
    return trainer


def held_by(trainer: Any) -> dict[str, str]:
    sample = {f.name: hashlib.sha256(f.tensor.numpy().tobytes()).hexdigest() for f in trainer._c.refresh._fragments()}
    return dict(sorted(sample.items()))


def words_of(data: str, out: str, name: str, stage: int, offload: str) -> list[str]:
    where = [
        f"data.root={data}",
        f"run.out={out}",
        f"run.name={name}",
        f"zero.stage={stage}",
        f"zero.offload={offload}",
    ]
    return [*SHORT, *TINY, *where, f"zero.stage={stage}", f"zero.offload={offload}"]


def from_every_moment(data: str, out: str, layouts: list[list[Any]]) -> list[dict[str, Any]]:
    """Train whole runs, and again from the checkpoint of each moment alone."""
    torch.set_num_threads(1)
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    found = []
    for number, (stage, offload) in enumerate(layouts):
        name = f"whole-{stage}-{offload}"
        trainer_of(words_of(data, out, name, stage, offload)).run()
        # Every moment in one layout, and in each of the others the one within.
        for moment in MOMENTS if number == 0 else (4,):
            again = f"from-{moment}-{stage}-{offload}"
            copy_checkpoint(Path(out), name, again, moment)
            trainer = trainer_of(words_of(data, out, again, stage, offload))
            sample = held_by(trainer)
            trainer.run()
            found.append({"whole": name, "again": again, "moment": moment, "sample": sample})
    disconnect()
    return found


def copy_checkpoint(out: Path, name: str, again: str, moment: int) -> None:
    step = f"step-{moment:08d}"
    if RankInfo.from_env().is_main:
        shutil.copytree(out / name / "checkpoints" / step, out / again / "checkpoints" / step)
    torch.distributed.barrier()


def samples_elsewhere(data: str, out: str) -> list[dict[str, str]]:
    """Resume on these ranks from within the sampling of another number of ranks; return what is held."""
    connect(RankInfo.from_env(), os.environ["SETFORMER_RENDEZVOUS"])
    found = []
    for stage, offload in ((0, "none"), (3, "none")):
        again = f"elsewhere-{RankInfo.from_env().world_size}-{stage}"
        copy_checkpoint(Path(out), "whole-2-none", again, 4)
        trainer = trainer_of(words_of(data, out, again, stage, offload))
        found.append({"sample": held_by(trainer)})
        trainer.run()
    disconnect()
    return found


def state_of(out: Path, name: str, step: int = 8) -> tuple[Any, Any]:
    folder = out / name / "checkpoints" / f"step-{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    trainer = json.loads((folder / "trainer.json").read_text())
    tensors = [f for f in files if f["name"].endswith(".safetensors")]
    return tensors, [trainer[key] for key in ("stream", "optimizer_steps", "refresh")]


def lines_of(out: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["kind"] == "refresh"]


@pytest.fixture(scope="module")
def runs(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("runs")
    layouts = [[2, "none"], [0, "none"], [3, "all"]]
    return out, run_ranks(from_every_moment, 2, str(few_digits), str(out), layouts, timeout=500)[0]


def test_a_run_resumed_at_any_moment_of_a_refresh_is_the_whole_run(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    assert len(runs[1]) == len(MOMENTS) + 2
    assert_same_runs(*runs)


@pytest.mark.drill
def test_so_it_is_in_every_layout(few_digits: Path, tmp_path: Path) -> None:
    layouts = [[2, "none"], *[list(layout) for layout in LAYOUTS if layout != (2, "none")]]
    found = run_ranks(from_every_moment, 2, str(few_digits), str(tmp_path), layouts, timeout=900)[0]
    assert len(found) == len(MOMENTS) + len(LAYOUTS) - 1
    assert_same_runs(tmp_path, found)


def assert_same_runs(out: Path, found: list[dict[str, Any]]) -> None:
    for entry in found:
        assert state_of(out, entry["again"]) == state_of(out, entry["whole"]), entry
        assert bool(entry["sample"]) is (entry["moment"] == 4)
        assert [row["step"] for row in lines_of(out, entry["whole"])] == [5]
        expected = lines_of(out, entry["whole"]) if entry["moment"] < 5 else []
        assert lines_of(out, entry["again"]) == expected, entry
    # The sample is in the checkpoints between, whole, and in no other.
    for step in (2, 3, 4, 5):
        rows = state_of(out, "whole-2-none", step)[1][2].get("rows", {})
        assert set(rows.values()) == ({64} if step in (3, 4) else set())


@pytest.mark.drill
@pytest.mark.parametrize("world", [1, 3])
def test_other_ranks_take_over_the_sample_bit_by_bit(
    runs: tuple[Path, list[dict[str, Any]]], few_digits: Path, world: int
) -> None:
    out, on_two = runs
    [sample] = [entry["sample"] for entry in on_two if entry["again"] == "from-4-2-none"]
    assert len(sample) == 4
    by_rank = run_ranks(samples_elsewhere, world, str(few_digits), str(out), timeout=200)
    for found in by_rank:
        for entry in found:
            assert entry["sample"] == sample
    for stage in (0, 3):  # and go on to the end with it
        [row] = lines_of(out, f"elsewhere-{world}-{stage}")
        [theirs] = lines_of(out, "whole-2-none")
        for kind in ("references", "return_references"):
            assert row[kind] == pytest.approx(theirs[kind], rel=0.05, abs=0.02)
