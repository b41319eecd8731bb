"""Compiled runs from the command line: killed and resumed with the compiler and without, in fp32 and bf16, with EMA."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.run.compiled import VARIABLE
from launch.testing.commands import losses, setformer, start, train_words, wait_for

OWN = ("checkpoint.every_steps=4", "eval.every_steps=11", "ema.decay=0.9", "zero.stage=2")
COMPILED = "compile.mode=blocks"


@pytest.mark.drill
@pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_a_compiled_run_is_killed_and_resumed_with_the_compiler_or_without(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, near: float
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "code"))
    own = (*OWN, f"precision.dtype={dtype}")
    for name, more in (("eager", ()), ("compiled", (COMPILED,))):
        ended = setformer(*train_words(digits, tmp_path, *own, f"run.name={name}", *more), timeout=600)
        assert ended.code == 0, ended.err
    for name, mode in (("again", "blocks"), ("off", "off")):
        words = train_words(digits, tmp_path, *own, f"run.name={name}")
        process = start(*words, COMPILED)
        wait_for(tmp_path / name / "checkpoints" / "step-00000004" / "manifest.json", process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        ended = setformer(*words, f"compile.mode={mode}", timeout=600)
        assert ended.code == 0, ended.err

    eager, compiled, again, off = (losses(tmp_path / name) for name in ("eager", "compiled", "again", "off"))
    assert again == compiled  # to the last bit
    assert off.keys() == eager.keys() == compiled.keys()
    for other in (compiled, off):
        for place, both in eager.items():
            for loss, expected in zip(other[place], both, strict=True):  # the average's is None of steps
                assert loss == (expected if expected is None else pytest.approx(expected, rel=near)), place
