"""Our C++ for CPUs (csrc/), built for this very CPU when a process first asks for it, and kept.

    $TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions
      setformer_cpu/set_attention-<hash of source, flags, compiler, CPU and PyTorch>.so
      setformer_cpu/set_attention-<the same>.failed   what the compiler said, if it failed within the last day

A file is built aside and renamed into place, under a lock that the system takes from a builder that dies: ranks that
start together wait for one of them, and none ever waits for a dead one or loads half a file. A build that fails is
tried once, not by one rank after the other; another compiler, flag or source is another build. Where there is no
kernel, that is said once, and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: sums keep their order, and NaN of the inputs stays NaN.
ARITHMETIC = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS = ("-std=c++20", *ARITHMETIC, "-fopenmp", "-fPIC", "-fvisibility=hidden", "-shared")
BUILD_SECONDS = 300
# How long a failure is believed: its cause may have been a full disk.
FAILURE_SECONDS = 24 * 3600
OFF = "SETFORMER_NO_CPP"


def library() -> ctypes.CDLL | str:
    """Return the kernels, or the reason why there are none: switched off, or not to be built."""
    if os.environ.get(OFF, "0") not in ("", "0"):
        return f"{OFF} is set"
    return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the kernel, built if need be, or the reason why there is none, which is also logged."""
    try:
        return ctypes.CDLL(str(_built()))
    except _BuildFailedError as error:
        reason = str(error)
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed: {_last_line(error.stderr)}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"the kernel cannot be built here: {error}"
    text = "SeT attention runs on PyTorch's operators, several times slower than its own kernel: %s; %s"
    log.warning(text, reason, f"set CXX to a C++20 compiler, or {OFF}=1 to do without")
    return reason


class _BuildFailedError(Exception):
    """This build failed, now or in another process."""


def _built() -> Path:
    """Return the file of the kernel for this machine, building it if it is not there.

    Raises:
        _BuildFailedError: the compiler cannot; on record for the others.
        OSError: there is no compiler, or no place for the file.
        subprocess.SubprocessError: the compiler does not even report its version.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    include, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    sources = sorted(SOURCES.glob("*.*"))
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    identity = [
        version,
        *(s.read_text() for s in sources),
        *FLAGS,
        *compiler,
        cpu_facts(),
        torch.__version__,
        str(libraries),
    ]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = _folder()
    target = folder / f"set_attention-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as aside:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = Path(aside) / target.name
            where = ["-isystem", str(include), f"-L{libraries}", "-lc10", "-ltorch_cpu", "-o", str(made)]
            _compile([*compiler, *FLAGS, str(SOURCES / "set_attention.cpp"), *where], target.with_suffix(".failed"))
            made.replace(target)
    return target


def _compile(command: list[str], record: Path) -> None:
    """Run the compiler, unless the same has failed lately; a failure is recorded, whole or not at all.

    Raises:
        _BuildFailedError: with what the compiler said.
    """
    if record.exists() and time.time() - record.stat().st_mtime < FAILURE_SECONDS:
        raise _BuildFailedError(f"{record.read_text()} (as {record} remembers: remove it to try again)")
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.CalledProcessError as error:
        said = f"the compiler failed: {_last_line(error.stderr)}"
    except subprocess.TimeoutExpired:
        said = f"the compiler was not done after {BUILD_SECONDS} s"
    else:
        record.unlink(missing_ok=True)
        return
    aside = record.with_suffix(f".{os.getpid()}")
    aside.write_text(said)
    aside.replace(record)
    raise _BuildFailedError(said)


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "setformer_cpu"


def cpu_facts() -> str:
    """Name the CPU as far as compiled code depends on it: a home folder may be shared by machines of many kinds."""
    facts = [platform.machine(), platform.processor()]
    described = Path("/proc/cpuinfo")
    if described.exists():
        first = described.read_text().split("\n\n")[0].splitlines()
        names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        facts += [line for line in first if line.startswith(names)]
    return "\n".join(facts)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it said nothing")
