"""The pure model of `setformer plan`, against sums done by hand and published formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.plan.goodput import Saving, best_interval, goodput
from launch.plan.hardware import DEVICES, GB
from launch.plan.plan import (
    _shared_rows,
    counts_of,
    device_named,
    impossible,
    memory_parts,
    plan,
    recovery_of,
    with_batch,
)
from launch.plan.rows import MOST_MICRO, Cluster, Row, rank_memory, recommended, row_of, saving_of, shared
from launch.plan.subject import Passes, Subject, subject_of
from launch.plan.traffic import Model, Transfer, seconds, traffic
from launch.run.config import load_run
from launch.run.objective import assumed_classes, build_assumed
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.terminal import open_console
from setformer_dist.models.build import build_model
from setformer_dist.models.measure import Activations, Memory, measure_activations, memory_of, parameters, with_fixed

CONFIG = Path("configs/runs/demo.toml")
H100 = Cluster(DEVICES["h100"], 8, 2 * GB, 50_000, 180)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(load_run(CONFIG, ["data.root=nowhere", "precision.dtype=bf16"]))


def test_activations_of_a_chain_are_those_counted_by_hand() -> None:
    # Without bias, autograd keeps the input of each product; ReLU keeps its output, which is the next input.
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    found = measure_activations(model, torch.float32, (32, 8))
    inputs, hidden = 4 * 32 * 8, 4 * 32 * 16
    assert found.kept == inputs + hidden + 4  # and the loss
    assert found.peak >= found.kept + 4 * (16 * 4)  # the gradient of the last weights
    assert found.added < found.peak


def test_recomputed_activations_count_what_is_alive_while_a_block_is_recomputed() -> None:
    shape = (4, 3, 64, 64)
    kept, recomputed = (
        measure_activations(
            build_model(ModelConfig(name="setformer_nano", activation_checkpointing=choice), 10, 64, 0),
            torch.float32,
            shape,
        )
        for choice in (False, True)
    )
    assert recomputed.kept < 0.5 * kept.kept
    assert recomputed.kept < recomputed.peak < kept.peak
    assert recomputed.added - recomputed.kept > 0.1 * kept.kept  # a block's own, which is not kept


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 32, 0).eval()
    measure_activations(model, torch.bfloat16, (2, 3, 32, 32))
    assert not model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_activations_between_measured_batches_are_not_below_the_true_ones() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 32, 0)

    def measured(micro: int) -> Activations:
        return measure_activations(model, torch.float32, (micro, 3, 32, 32))

    passes = Passes({m: measured(m) for m in (1, 8, 64)})
    for micro in (2, 8, 20, 100):
        true, found = measured(micro), passes.at(micro)
        assert found.kept == pytest.approx(true.kept, rel=0.01)
        assert true.peak * 0.99 <= found.peak <= true.peak * 1.15


def test_stages_share_what_they_say_they_share() -> None:
    nothing = Activations(0, 0, 0)
    count, world = 1_000_000, 4
    held = [
        memory_of(count, nothing, torch.bfloat16, torch.bfloat16, stage, world, ema=False) for stage in (0, 1, 2, 3)
    ]
    share = count // world
    assert [m.masters for m in held] == [12 * count, 12 * share, 12 * share, 12 * share]
    assert [m.gradients for m in held] == [2 * count, 2 * count, 2 * share, 2 * share]
    # Gradients and their flat copy; at stage 0 the fp32 copies that the optimizer takes; ZeRO-3's bucket, once filled.
    assert [m.working for m in held] == [
        6 * count,
        4 * count + 2 * share,
        4 * count + 2 * share,
        6 * count + 2 * share,
    ]
    assert [m.parameters for m in held] == [2 * count, 2 * count, 2 * count, 2 * share + 2 * count]
    assert all(m.total == m.parameters + m.masters + m.working for m in held)


def test_traffic_of_the_stages_by_hand() -> None:
    model = Model(((150_000, 11), (7,)), 2, 100_000)
    gradients = 2 * 150_018
    assert traffic(model, 0, 4, 3) == (Transfer("all_reduce", gradients, 2, "gradients"),)
    padded = 2 * (150_016 + 8)  # each group to a multiple of 2 x 4
    assert traffic(model, 1, 4, 3) == (
        Transfer("all_reduce", gradients, 2, "gradients"),
        Transfer("all_gather", padded, 2, "updated weights"),
    )
    assert traffic(model, 2, 4, 3)[0] == Transfer("all_reduce", 3 * gradients, 6, "gradients")
    assert [(t.operation, t.payload) for t in traffic(model, 3, 4, 3)] == [
        ("all_gather", 3 * 2 * 150_000),
        ("all_gather", 2 * (12 + 8)),
        ("reduce_scatter", 3 * 2 * (150_000 + 12 + 8)),
    ]


def test_what_does_not_train_is_gathered_and_takes_memory_all_the_same() -> None:
    model = Model(((11,),), 2, 100_000, fixed=(150_000, 5))
    assert traffic(model, 0, 4, 3) == (Transfer("all_reduce", 22, 1, "gradients"),)
    assert traffic(model, 3, 4, 3)[0] == Transfer("all_gather", 3 * 2 * 150_000, 3, "weights")
    fixed, world, nothing = 1_000, 4, Memory(0, 0, 0, 0, 0)
    for stage, dtype, offload, weights, copies, host in [
        (0, torch.float32, "none", 4, 4, 0),  # the average
        (2, torch.bfloat16, "none", 2, 8, 0),  # and fp32 beside bf16
        (3, torch.float32, "none", 5, 8, 0),  # a part, and all at once; a whole copy
        (3, torch.bfloat16, "all", 2, 8, 0.5),
    ]:
        found = with_fixed(nothing, fixed, dtype, stage, world, ema=True, offload=offload)
        assert (found.parameters, found.masters, found.host) == (fixed * weights, fixed * copies, fixed * host)


def test_weights_too_far_from_their_next_use_are_gathered_twice() -> None:
    model = Model(((200_000, 150_000, 300_000),), 2, 100_000, reuse=700_000)
    gathers = traffic(model, 3, 1, 1)[0]
    assert gathers.payload == 2 * (650_000 + 200_000 + 150_000)  # 2 x 300,000 elements lie behind the third only


def test_a_ring_sends_all_parts_but_ones_own() -> None:
    assert Transfer("all_gather", 800, 1, "").sent(8) == 700
    assert Transfer("reduce_scatter", 800, 1, "").sent(8) == 700
    assert Transfer("all_reduce", 800, 1, "").sent(8) == 1400
    assert Transfer("all_reduce", 800, 1, "").sent(1) == 0


def test_seconds_of_an_all_reduce_inside_and_between_nodes() -> None:
    device, payload = DEVICES["h100"], 10**9
    transfer = Transfer("all_reduce", payload, 1, "")
    assert seconds(transfer, device, 1, 8) == 0
    inside = 2 * (7 / 8 * payload / 450e9 + 7 * 3e-6)
    assert seconds(transfer, device, 8, 8) == pytest.approx(inside)
    between = 2 * (3 / 4 * payload / 8 / 50e9 + 2 * 8e-6)  # 4 nodes, log2 of them hops
    assert seconds(transfer, device, 32, 8) == pytest.approx(inside + between)
    assert seconds(Transfer("all_gather", payload, 3, ""), device, 32, 8) == pytest.approx(
        7 / 8 * payload / 450e9 + 3 / 4 * payload / 8 / 50e9 + 3 * (7 * 3e-6 + 3 * 8e-6)
    )


def test_best_interval_is_the_maximum_of_goodput() -> None:
    saving = Saving(size=1, pause_s=5.0, write_s=20.0)
    for between in (600.0, 7_200.0, 1e6):
        best = best_interval(saving.pause_s, between)
        shares = [goodput(best * factor, saving, between, 60) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)]
        assert max(shares) == shares[2]
        assert 0 < shares[2] < 1


def test_best_interval_for_rare_failures_is_youngs() -> None:
    assert best_interval(2.0, 1e9) == pytest.approx(math.sqrt(2 * 2.0 * 1e9), rel=1e-3)
    assert best_interval(100.0, 40.0) == 40.0  # a checkpoint costs more than a failure leaves time for


def test_goodput_of_a_machine_that_does_not_fail_is_what_saving_leaves() -> None:
    assert goodput(95.0, Saving(1, 5.0, 20.0), 1e12, 60) == pytest.approx(0.95, rel=1e-6)


def test_a_row_is_the_sum_of_its_parts(subject: Subject) -> None:
    waits = subject.config.zero.model_copy(update={"overlap_comm": False})
    waiting = dataclasses.replace(subject, config=subject.config.model_copy(update={"zero": waits}))
    row = row_of(waiting, H100, 2, 8)
    assert row.batch is not None
    assert row.batch.global_size == row.batch.micro * row.batch.accumulation * 8 == 64
    assert row.fits
    assert row.step_s == pytest.approx(row.compute_s + row.traffic_s + row.update_s)
    assert row.efficiency == pytest.approx(row.compute_s / row.step_s)
    assert memory_parts(waiting, row)["total"] == rank_memory(waiting, H100.device, 2, row.batch, False).total
    hidden = row_of(subject, H100, 2, 8)
    updated = seconds(row.transfers[1], H100.device, 8, 8)
    assert hidden.traffic_s == pytest.approx(updated)  # these are waited for
    assert row.traffic_s == pytest.approx(updated + seconds(row.transfers[0], H100.device, 8, 8))


def test_ranks_that_share_images_wait_for_sums_and_rows(subject: Subject) -> None:
    shared = subject_of(load_run(CONFIG, ["data.root=nowhere", "precision.dtype=bf16", "parallel.sequence=2"]))
    assert shared.exchange is not None
    row, alone = row_of(shared, H100, 2, 8), row_of(subject, H100, 2, 4)
    assert row.batch is not None
    assert alone.batch is not None
    assert row.batch.global_size == row.batch.micro * row.batch.accumulation * 4 == 64
    assert shared.passes[False].at(8).kept == pytest.approx(subject.passes[False].at(8).kept / 2, rel=0.1)
    sums, rows = row.transfers[-2:]
    assert (sums.calls, rows.calls) == (shared.exchange.sums, shared.exchange.rows)
    assert sums.payload == row.batch.micro * shared.exchange.sum_bytes
    assert rows.sent(8) == rows.payload == row.batch.micro * shared.exchange.row_bytes
    ring = 2 * (sums.payload / 2 / H100.device.inside.bandwidth + sums.calls * H100.device.inside.latency)
    assert seconds(sums, H100.device, 8, 8) == pytest.approx(ring)  # between two ranks, however many there are
    apart = seconds(rows, H100.device, 8, 1)
    assert apart == pytest.approx(rows.payload / H100.device.between.bandwidth + rows.calls * 8e-6)
    assert row.traffic_s > sum(seconds(t, H100.device, 8, 8) for t in (sums, rows))
    assert "cannot be cut into groups of 2" in row_of(shared, H100, 2, 3).why_not


def test_a_model_of_one_stage_gives_no_rows_to_neighbours() -> None:
    words = ["parallel.sequence=2", "model.args.depths=[2]", "model.args.num_heads=[2]", "data.root=nowhere"]
    one = subject_of(load_run(CONFIG, [*words, "model.args.attn.references=9"]))
    assert [transfer.what for transfer in shared(one, 1, 1)] == ["sums"]
    ((_, text),) = _shared_rows(one, H100)
    assert "neighbour" not in text


def test_a_model_without_a_split_form_is_not_planned_in_groups() -> None:
    words = [
        "data.root=nowhere",
        "data.image_size=64",
        "parallel.sequence=2",
        "model.name=convnext_atto",
        "~model.args",
        "ema.decay=0",
    ]
    with pytest.raises(ConfigError, match="convnext_atto has no form for images cut by rows"):
        subject_of(load_run(CONFIG, words))


def test_the_largest_micro_batch_fits_and_the_next_does_not(subject: Subject) -> None:
    small = dataclasses.replace(DEVICES["cpu"], memory=2**28, reserved=2**24)
    cluster = dataclasses.replace(H100, device=small)
    row = row_of(subject, cluster, 1, 2)
    largest = dict(row.largest)
    assert 0 < largest[False] < largest[True]
    assert row.batch is not None
    for choice, micro in largest.items():
        room = small.memory - small.reserved
        sizes = [
            rank_memory(subject, small, 1, dataclasses.replace(row.batch, micro=m), choice).total
            for m in (micro, micro + 1)
        ]
        assert sizes[0] <= room < sizes[1]


def test_what_does_not_fit_is_said_and_not_recommended(subject: Subject) -> None:
    tiny = dataclasses.replace(H100, device=dataclasses.replace(DEVICES["cpu"], memory=2**21, reserved=0))
    rows = [row_of(subject, tiny, stage, 2) for stage in (0, 1, 2, 3)]
    assert not any(row.fits for row in rows)
    assert dict(rows[0].largest)[False] == 0
    assert recommended(rows) is None


def test_the_fastest_that_fits_is_recommended_and_of_equals_the_lowest_stage() -> None:
    rows = [
        Row(8, 3, fits=True, compute_s=1.0),
        Row(8, 0, fits=False, compute_s=0.1),
        Row(8, 2, fits=True, compute_s=1.005),
        Row(8, 1, fits=True, compute_s=1.5),
    ]
    assert recommended(rows) is rows[2]


def test_a_layout_that_cannot_be_is_reported_with_its_reason(subject: Subject) -> None:
    assert "fewer samples per step than the 128 ranks" in row_of(subject, H100, 2, 128).why_not
    v100 = dataclasses.replace(H100, device=DEVICES["v100"])
    assert "does not compute bf16" in row_of(subject, v100, 2, 8).why_not
    grown = with_batch(subject, 128, 4)
    assert row_of(grown, H100, 2, 128).why_not == ""
    assert grown.config.batch.global_size == 512


def test_stages_that_share_a_reason_are_told_together() -> None:
    rows = [Row(8, stage, "why a") for stage in range(4)]
    rows += [Row(64, 0, "why a"), Row(64, 2, "batch.global_size = 4 is few")]
    assert impossible(rows) == [
        "not possible on 8 GPUs and 64 GPUs under ZeRO-0: why a",
        "not possible on 64 GPUs under ZeRO-2: batch.global_size = 4 is few "
        "(--batch-per-gpu N plans one that grows with the GPUs)",
    ]


def test_no_micro_batch_beyond_the_bound_is_promised(subject: Subject) -> None:
    vast = dataclasses.replace(H100, device=dataclasses.replace(DEVICES["cpu"], memory=2**50, reserved=0))
    assert dict(row_of(subject, vast, 1, 2).largest) == {False: MOST_MICRO, True: MOST_MICRO}


def test_a_checkpoint_holds_masters_states_and_average(subject: Subject) -> None:
    saving = saving_of(subject, H100, 8)
    assert saving.size == 4 * 4 * subject.model.count  # weights, two averages of Adam, average of weights
    found = recovery_of(subject, H100, row_of(subject, H100, 2, 8))
    assert found.failures_s == pytest.approx(50_000 * 3600 / 8)
    assert found.goodput >= found.as_written


def test_counted_parameters_are_the_models(subject: Subject) -> None:
    model = build_model(subject.config.model, 1000, 16, 0)
    assert subject.model.count == parameters(model)
    assert subject.references > 0
    assert subject.assumed


def test_a_segmentation_is_planned_without_its_data() -> None:
    camvid = CONFIG.parent / "camvid.toml"
    config = load_run(camvid, ["data.root=nowhere", "task.args.class_weights.car=2.0", "data.image_size=64"])
    model = build_assumed(config)
    assert model.num_classes == assumed_classes(config) == 150


@pytest.mark.parametrize("text", ["", "8,", "0", "eight", "-1", "1.5", "8;9", "99999999"])
def test_numbers_of_devices_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpus .*such as 8,64,512"):
        counts_of(text)


def test_devices_are_named() -> None:
    assert counts_of("64, 8,8") == [8, 64]
    with pytest.raises(ConfigError, match="--gpu 'tpu': give one of h100, a100, v100, cpu"):
        device_named("tpu")


def test_the_command_prints_tables_and_writes_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = load_run(CONFIG, ["data.root=nowhere"])
    cpu = Cluster(DEVICES["cpu"], 8, 2 * GB, 50_000, 180)
    plan(config, [1, 2, 128], cpu, None, tmp_path / "plan.json", open_console())
    printed = capsys.readouterr().out
    assert "1000 classes" in printed
    assert printed.count("recommended") >= 2
    assert "not possible on 128 GPUs: batch.global_size = " in printed
    assert "--batch-per-gpu N" in printed
    assert "no stage fits" not in printed  # what cannot be has its own reason, and only that
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [(row["gpus"], row["stage"]) for row in found["rows"]] == [(n, s) for n in (1, 2, 128) for s in range(4)]
    assert all("128 ranks" in row["why_not"] for row in found["rows"] if row["gpus"] == 128)
    assert sum(row.get("recommended", False) for row in found["rows"]) == 2
    with pytest.raises(ConfigError, match="128 ranks"):
        plan(config, [128], cpu, None, tmp_path / "none.json", open_console())
    assert not (tmp_path / "none.json").exists()
