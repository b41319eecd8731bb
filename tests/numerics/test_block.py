"""The Triton kernels on both sides of attention, in processes of their own (see test_set_triton.py)."""

from __future__ import annotations

import pytest

from tests.numerics.test_set_triton import run, run_cases


@pytest.mark.drill
def test_both_sides_equal_pytorchs_operators() -> None:
    run_cases(cases="block_cases.py")


@pytest.mark.drill
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_a_gpu_without_one(capability: int) -> None:
    printed = run("-m", "tests.numerics.block_compiles", str(capability), TRITON_INTERPRET="0")
    for kernel in ("add_norm", "add_norm_backward", "gelu_backward"):
        assert f"{kernel} compiled" in printed
