import json
import math
import time
from pathlib import Path

import pytest
import torch

from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.seeding import Purpose, derive_key, generator, sample_keys
from setformer_dist.engine.batch_plan import BatchPlan
from setformer_dist.engine.config import EmaConfig, OptimConfig, PrecisionConfig, ScheduleConfig, ZeroConfig
from setformer_dist.engine.metrics import RunRecord, StepClock, peak_flops
from setformer_dist.engine.optim import Schedule, optimizer_of, parameter_groups
from setformer_dist.engine.run_state import Best
from setformer_dist.engine.zero import check_precision, deepspeed_config
from setformer_dist.models.build import build_model
from setformer_dist.models.measure import Memory, parameters, predict_memory
from setformer_dist.tasks.classification import soft_cross_entropy

PLAN = BatchPlan(64, 8, 4, 2)


def schedule(**kwargs: object) -> tuple[Schedule, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig.model_validate(
        {"steps": 100, "warmup_steps": 10, "warmup_lr": 0.0, "min_lr": 0.1, **kwargs}
    )
    return Schedule(optimizer, config, steps_per_epoch=20), optimizer


def test_schedule_is_the_stated_function_of_the_step() -> None:
    lr, _ = schedule()
    assert [lr.apply(k) for k in (0, 5)] == pytest.approx([0.0, 0.5])
    for k in (10, 40, 99):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 10) / 90))
        assert lr.apply(k) == pytest.approx(cosine)


def test_schedule_does_not_depend_on_the_steps_before() -> None:
    lr, _ = schedule()
    fresh, _ = schedule()
    for k in range(50):
        lr.apply(k)
    assert lr.apply(50) == fresh.apply(50)


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*: lower schedule.warmup_"):
        schedule(warmup_steps=100)


def test_norms_biases_and_references_do_not_decay() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 16, 0)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "references" in name:
            assert id(parameter) in free, name
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert optimizer_of(groups, OptimConfig()).param_groups


def test_layer_decay_scales_the_learning_rate() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 16, 0)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5))
    scales = {g["lr_scale"] for g in groups}
    assert max(scales) == 1.0
    assert min(scales) < 0.5


def test_ema_decay_warms_up() -> None:
    config = EmaConfig(decay=0.9)
    assert config.decay_at(0) == pytest.approx(0.1)
    assert config.decay_at(1000) == 0.9
    assert EmaConfig(decay=0.9, warmup=False).decay_at(0) == 0.9


def test_best_by_mode() -> None:
    assert Best("top1", "max", 0.5, 1).improved_by(0.6)
    assert not Best("loss", "min", 0.5, 1).improved_by(0.6)
    assert Best("top1", "max").improved_by(0.0)
    assert not Best("loss", "min").improved_by(math.nan)


def test_soft_cross_entropy_is_its_formula() -> None:
    logits, targets = torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64).softmax(1)
    expected = -(targets * logits.float().log_softmax(1)).sum(1).mean()
    assert soft_cross_entropy(logits, targets.float()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sample_keys_depend_on_the_sample_not_its_neighbours() -> None:
    ids = torch.arange(1000).numpy()
    whole = sample_keys(Purpose.DROP_PATH, 1, 2, ids)
    assert (whole[10:20] == sample_keys(Purpose.DROP_PATH, 1, 2, ids[10:20])).all()
    assert len(set(whole.tolist())) == 1000
    assert (whole != sample_keys(Purpose.DROP_PATH, 1, 3, ids)).all()


def test_keys_and_streams_are_fixed_for_ever() -> None:
    assert derive_key(Purpose.ORDER, 0, 0) == 0x85A903F28A7E8466FD8790C6926CEE16
    assert generator(Purpose.ORDER, 3, 4).integers(0, 100, 5).tolist() == [59, 39, 93, 54, 37]
    assert derive_key(Purpose.ORDER, 0, 1) != derive_key(Purpose.AUGMENT, 0, 1)


def test_deepspeed_json_states_the_equation() -> None:
    json = deepspeed_config(PrecisionConfig(dtype="bf16", grad_accum="fp32"), ZeroConfig(stage=2), PLAN, 1.0, {})
    assert json["train_batch_size"] == 64
    assert json["train_micro_batch_size_per_gpu"] * json["gradient_accumulation_steps"] * 2 == 64
    assert json["bf16"]["enabled"]
    assert json["data_types"]["grad_accum_dtype"] == "fp32"
    assert json["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ({"train_batch_size": 3}, "use batch.global_size instead"),
        ({"bf16": {"enabled": True}}, "use precision.dtype instead"),
        ({"zero_optimization": {"stage": 1}}, "use zero.stage instead"),
        ({"zero_optimization": {"overlap_comm": True}}, "use zero.overlap_comm instead"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "use zero.offload instead"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "use zero.offload instead"),
        ({"zero_force_ds_cpu_optimizer": True}, "use zero.offload instead"),
        ({"zero_optimization": 2}, "is not a table"),
    ],
)
def test_deepspeed_keys_of_ours_do_not_pass_through(extra: dict[str, object], use: str) -> None:
    with pytest.raises(ConfigError, match=use):
        deepspeed_config(PrecisionConfig(), ZeroConfig(), PLAN, 1.0, extra)


def test_offload_is_what_deepspeed_calls_it() -> None:
    where = {"device": "cpu", "pin_memory": True}
    optimizer = deepspeed_config(PrecisionConfig(), ZeroConfig(stage=1, offload="optimizer"), PLAN, 1.0, {})
    everything = deepspeed_config(PrecisionConfig(), ZeroConfig(stage=3, offload="all"), PLAN, 1.0, {})
    without = deepspeed_config(PrecisionConfig(), ZeroConfig(stage=3), PLAN, 1.0, {})
    assert optimizer["zero_optimization"]["offload_optimizer"] == where
    assert "offload_param" not in optimizer["zero_optimization"]
    assert everything["zero_optimization"]["offload_optimizer"] == where
    assert everything["zero_optimization"]["offload_param"] == where
    assert optimizer["zero_force_ds_cpu_optimizer"] is False  # our AdamW, not one to be compiled
    assert not {"offload_optimizer", "offload_param"} & without["zero_optimization"].keys()


def test_memory_that_offload_moves_is_predicted_where_it_lies() -> None:
    model = build_model(ModelConfig(name="setformer_nano"), 10, 32, 0)
    half = parameters(model) // 2

    def predict(stage: int, offload: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> Memory:
        batch = (2, 3, 32, 32)
        return predict_memory(model, dtype, grad_dtype, stage, 2, True, batch, offload=offload, accumulation=2)

    low, full = torch.bfloat16, torch.float32
    for stage, offload, dtype, grad_dtype, on_device, in_host_memory in [
        (1, "optimizer", low, low, 2 * 2 + 2 * 2, 20 + 2),
        (2, "optimizer", low, low, 2 * 2, 20 + 2 + 2),
        (2, "optimizer", low, full, 2 * 2 + 4, 20 + 2),
        (2, "optimizer", full, full, 2 * 4, 20 + 4 + 4),
        (3, "optimizer", low, low, 2 + 2 * 2, 20 + 2),  # ZeRO-3 keeps all weights of so small a model that it gathers
        (3, "all", low, low, 2 * 2, 20 + 2 + 2),
    ]:  # bytes per parameter of a rank's half
        memory = predict(stage, offload, dtype, grad_dtype)
        assert memory.parameters + memory.gradients + memory.masters == pytest.approx(half * on_device, rel=1e-4)
        assert memory.host == pytest.approx(half * in_host_memory, rel=1e-4)
        without = predict(stage, "none", dtype, grad_dtype)
        assert without.host == 0
        assert without.total > memory.total


def test_other_deepspeed_keys_pass_through() -> None:
    extra = {"zero_optimization": {"round_robin_gradients": True}, "flops_profiler": {"enabled": False}}
    json = deepspeed_config(PrecisionConfig(), ZeroConfig(stage=2), PLAN, 1.0, extra)
    assert json["zero_optimization"]["round_robin_gradients"]
    assert json["zero_optimization"]["stage"] == 2
    assert json["flops_profiler"] == {"enabled": False}


def test_precision_the_device_does_not_compute_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="this cpu does not compute fp16"):
        check_precision(PrecisionConfig(dtype="fp16"), ZeroConfig(), {"fp32", "bf16"}, "cpu")
    with pytest.raises(ConfigError, match="has no DeepSpeed optimizer"):
        check_precision(PrecisionConfig(dtype="bf16", grad_accum="fp32"), ZeroConfig(stage=0), {"fp32", "bf16"}, "cpu")


def test_same_seed_same_weights() -> None:
    first, second, other = (build_model(ModelConfig(name="setformer_nano"), 10, 16, seed) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_models_with_running_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="running"):
        build_model(ModelConfig(name="resnet10t"), 10, 32, 0)


def test_unknown_model_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="epsilonn"):
        build_model(ModelConfig(name="setformer_nano", args={"attn": {"epsilonn": 1}}), 10, 16, 0)
    with pytest.raises(ConfigError, match="no_such"):
        build_model(ModelConfig(name="vit_tiny_patch16_224", args={"no_such": 1}), 10, 16, 0)


def test_peaks_are_known_by_part_of_the_name() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_clock_splits_a_step_and_leaves_the_rest_as_other() -> None:
    clock = StepClock(None)
    clock.take()
    with clock.section("forward"):
        time.sleep(0.02)
    time.sleep(0.01)
    seconds, wall = clock.take()
    assert seconds["forward"] >= 0.02
    assert seconds["other"] >= 0.01
    assert sum(seconds.values()) == pytest.approx(wall)


def test_record_survives_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st')
    record = RunRecord(tmp_path, is_main=True)
    record.write("train", 3, {"loss": 1.0, "seconds": {"data": 0.5}})
    record.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, is_main=False)
    record.write("train", 3, {"loss": 1.0})
    record.close()
    assert not list(tmp_path.iterdir())
