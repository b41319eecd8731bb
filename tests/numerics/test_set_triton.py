"""The Triton kernels, each test in a process of its own: on the GPU where there is one, otherwise interpreted.

Triton decides when it is imported whether its functions are compiled or interpreted, so this process, which may have
imported it, cannot.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def run(*command: str, limit_s: int = 560, **environment: str) -> str:
    """Run Python; return what it printed."""
    result = subprocess.run(
        [sys.executable, *command], cwd=FOLDER.parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=limit_s, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_cases(*which: str, cases: str = "set_triton_cases.py", limit_s: int = 560) -> None:
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    printed = run("-m", "pytest", "-x", "-o", "addopts=", *which, str(FOLDER / cases), limit_s=limit_s, **environment)
    assert " passed" in printed
    assert "skipped" not in printed


@pytest.mark.drill
def test_kernels_equal_the_reference() -> None:
    run_cases(*([] if torch.cuda.is_available() else ["-m", "not drill"]))


@pytest.mark.drill
def test_kernels_equal_the_reference_in_all_cases() -> None:
    run_cases(limit_s=3000)


@pytest.mark.drill
def test_kernels_of_the_split_form_equal_the_whole() -> None:
    """All cases: what interpreting them costs is minutes, half of it of a few."""
    run_cases(cases="set_split_triton_cases.py", limit_s=1500)


KERNELS = {
    "whole": ("forward", "backward", "references_backward"),
    "short": ("forward", "backward", "references_backward"),
    "split": ("forward_round", "forward_tokens", "backward_tokens", "backward_round", "gradients"),
}


@pytest.mark.drill  # LLVM takes a minute and more
@pytest.mark.parametrize(
    ("form", "capability"), [("whole", 90), ("short", 89), *itertools.product(("short", "split"), (80, 90, 100))]
)
def test_kernels_compile_for_a_gpu_without_one(form: str, capability: int) -> None:
    printed = run("-m", "tests.numerics.set_triton_compiles", "bfloat16", form, str(capability), TRITON_INTERPRET="0")
    for kernel in KERNELS[form]:
        assert f"{kernel} compiled" in printed
