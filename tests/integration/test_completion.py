"""A shell completes commands and config keys, by what `setformer --install-completion` writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETFORMER = Path(sys.executable).parent / "setformer"


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not here")
def test_bash_completes_what_the_installed_script_asks_for(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{SETFORMER.parent}{os.pathsep}{os.environ['PATH']}"}
    # The command installs for the shell that called it, which it finds among its parents; `exit` keeps bash from
    # becoming the command itself.
    said = subprocess.run(["bash", "-c", "setformer --install-completion; exit $?"], env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "bash completion installed" in said.stdout
    script = tmp_path / ".bash_completions" / "setformer.sh"
    for words, place, offered in (
        ("setformer ck", 1, "ckpt"),
        ("setformer config optim.l", 2, "optim.layer_decay optim.lr"),
    ):
        program = (
            f"source {script}; COMP_WORDS=({words}); COMP_CWORD={place}; _setformer_completion setformer; "
            'echo "${COMPREPLY[*]}"'
        )
        done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, timeout=120,
                              check=True)  # fmt: skip
        assert done.stdout.strip() == offered, done.stderr
