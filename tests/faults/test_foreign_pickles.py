"""Pickles of others that torch's restricted unpickler accepts: each is taken whole or refused in a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from checkpoints import deepspeed_files
from launch.ckpt.convert import convert
from setformer_dist.core.errors import CheckpointError, ConfigError

W = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: {1: W}, "tensor under 1, which is not a parameter name"),
        (lambda: {None: W}, "tensor under None, which is not a parameter name"),
        (lambda: {("a", 1): W}, "which is not a parameter name"),
        (lambda: {"": W}, "which is not a parameter name"),
        (lambda: {"module.": W}, "which is not a parameter name"),
        (lambda: {"\ud800": W}, "which is not a parameter name"),
        (lambda: {"a\x1b]0;x\x07": W}, "which is not a parameter name"),
        (lambda: {"state_dict": {1: W}}, "which is not a parameter name"),
        (lambda: {"module.a": W, "a": W + 1}, "two tensors for a, with and without"),
        (lambda: {"a": torch.zeros(1).expand(1 << 40)}, "a is a tensor of 4398046511104 bytes"),
        (lambda: {"a": W.to_sparse()}, "a is a sparse or nested tensor"),
        (lambda: {"a": W.to_sparse_csr()}, "a is a sparse or nested tensor"),
        (lambda: {"a": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)}, "a is a quantized tensor"),
        (lambda: {"a": torch.zeros(3, device="meta")}, "a is a tensor without values"),
    ],
)
def test_what_a_file_of_tensors_does_not_hold_is_refused(tmp_path: Path, make: Callable[[], Any], why: str) -> None:
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=why):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors", None, Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    "data", [b"\x80\xff.", b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02\x85.", b"\x80\x02K\x01s.", b"."]
)
def test_broken_pickles_are_a_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors", None, Console(file=io.StringIO()))


def test_what_is_no_pickle_is_told_by_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(CheckpointError, match=r"no file of torch.save: it begins with b'<!DOCTYPE html><'"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors", None, Console(file=io.StringIO()))


def test_a_module_is_named_and_nobody_is_told_to_allow_it(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it names torch\.nn\.modules\.linear\.Linear\)$"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors", None, Console(file=io.StringIO()))


def test_names_of_others_do_not_repaint_the_terminal(tmp_path: Path) -> None:
    torch.save({"module.a": W, "b": W.T, "left\x1b[31m": 3, "t\x1b[31m": {}}, tmp_path / "a.pth")
    out = io.StringIO()
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", None, Console(file=out, width=200))
    assert "\x1b" not in out.getvalue()
    assert "left\\x1b[31m" in out.getvalue()
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], W)
    assert torch.equal(found["b"], W.T)
    with pytest.raises(ConfigError) as refused:
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "x\x1b[31m", Console(file=out))
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"global_steps": -5},
        {"global_steps": 10**30},
        {"global_steps": float("inf")},
        {"skipped_steps": 10},
        {"skipped_steps": -1},
        {"dp_world_size": 0},
        {"module": {1: W}},
        {"module": {"": W}},
        {"module": {"a\x1b": W}},
        {"module": {}},
    ],
)
def test_deepspeed_files_that_say_the_impossible_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "latest").write_text("t")
    sound = {
        "module": {"a": W}, "buffer_names": [], "param_shapes": None,
        "global_steps": 3, "skipped_steps": 0, "dp_world_size": 1,
    }  # fmt: skip
    torch.save(sound, tmp_path / "t" / "mp_rank_00_model_states.pt")
    assert deepspeed_files.read(tmp_path).updates == 3
    torch.save({**sound, **change}, tmp_path / "t" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="not laid out as DeepSpeed"):
        deepspeed_files.read(tmp_path)


def deepspeed_of(folder: Path, stage: int, extra: int = 0, state: str = "param", groups: int = 1) -> None:
    """Two ranks' files of one parameter of 5 elements, with `extra` elements more than that in one state."""
    (folder / "t").mkdir(parents=True)
    (folder / "latest").write_text("t")
    model = {
        "module": {}, "buffer_names": [], "param_shapes": [{"a": torch.Size([5])}],
        "global_steps": 3, "skipped_steps": 0, "dp_world_size": 2,
    }  # fmt: skip
    torch.save(model, folder / "t" / "mp_rank_00_model_states.pt")
    for rank in range(2):
        sizes = {
            name: 3 - (rank if stage == 2 else 0) + (extra if name == state else 0) for name in ("param", "exp_avg")
        }
        adam = {"state": {g: {"exp_avg": torch.zeros(sizes["exp_avg"])} for g in range(groups)}}
        masters = [torch.arange(sizes["param"]).float() for _ in range(groups)]
        if stage == 3:
            saved = {"fp32_flat_groups": masters, "optimizer_state_dict": adam}
        else:
            saved = {"single_partition_of_fp32_groups": masters, "base_optimizer_state": adam}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": saved}, folder / "t" / name)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("state", ["param", "exp_avg"])
def test_flat_vectors_of_another_length_than_the_shapes_are_refused(tmp_path: Path, stage: int, state: str) -> None:
    deepspeed_of(tmp_path / "sound", stage)
    assert deepspeed_files.read(tmp_path / "sound").states[state]["a"].shape == (5,)
    for extra in (2, -1, 100):
        deepspeed_of(tmp_path / str(extra), stage, extra, state)
        with pytest.raises(CheckpointError, match="not laid out as DeepSpeed"):
            deepspeed_files.read(tmp_path / str(extra))


def test_the_filling_up_to_equal_shares_is_no_length_of_its_own(tmp_path: Path) -> None:
    deepspeed_of(tmp_path, 2, extra=1, state="exp_avg")  # 7 elements for 5: DeepSpeed cuts 8 for two ranks
    assert deepspeed_files.read(tmp_path).states["exp_avg"]["a"].shape == (5,)


def test_groups_that_no_shape_belongs_to_are_refused(tmp_path: Path) -> None:
    deepspeed_of(tmp_path, 2, groups=2)
    with pytest.raises(CheckpointError, match="groups of parameters"):
        deepspeed_files.read(tmp_path)


@pytest.mark.parametrize("tag", ["x" * 900, "../x", "a\0b", "", "\x1b[31m"])
def test_a_tag_that_is_no_name_of_a_folder_is_refused(tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="no folder next to it") as refused:
        deepspeed_files.read(tmp_path)
    assert "\x1b" not in str(refused.value)
