"""What ranks use of their devices: cores of real processes, GPUs through the real NVML bindings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ranks.usage import Usage

ROOT = Path(__file__).parent.parent.parent
# Leads a group, and has a child that computes as much as it is told; both end with their input.
GROUP = """
import os, subprocess, sys
child = "import sys, time\\nwhile True: time.sleep(3600) if sys.argv[1] == 'idle' else None"
started = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]])
print("started", flush=True)
sys.stdin.read()
started.kill()
"""


def group(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_cores_are_those_of_the_whole_group_and_no_other() -> None:
    busy, idle = group("busy"), group("idle")
    usage = Usage({"CUDA_VISIBLE_DEVICES": ""})
    try:
        assert usage.of(busy.pid, 0).cores is None, "one look has no duration"
        usage.of(idle.pid, 1)
        limit = time.monotonic() + 20
        while True:
            cores, rest = usage.of(busy.pid, 0).cores, usage.of(idle.pid, 1).cores
            if cores is not None and rest is not None and cores >= 0.1:  # as much as other tests leave it
                break
            assert time.monotonic() < limit, (cores, rest)
            time.sleep(0.3)
        assert rest < cores / 2
        assert usage.of(busy.pid, 0).gpu is None
    finally:
        for process in (busy, idle):
            process.communicate()
    time.sleep(1.0)
    assert usage.of(busy.pid, 0).cores is None, "it has ended"


def test_a_process_that_nobody_reaps_uses_nothing() -> None:
    usage = Usage({"CUDA_VISIBLE_DEVICES": ""})
    leader = group("idle")
    try:
        usage.of(leader.pid, 0)
        time.sleep(1.0)
        assert usage.of(leader.pid, 0).cores is not None
        assert leader.stdin is not None
        leader.stdin.close()
        os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
        time.sleep(1.0)
        assert usage.of(leader.pid, 0).cores is None
    finally:
        leader.kill()
        leader.wait()


# A driver's library as NVML's bindings load it: GPU n is busy for 10 n + 7 percent, "GPU-b" for 55.
DRIVER = """
#include <string.h>
typedef struct { unsigned int gpu, memory; } use_t;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int at, void **device) {
    if (at > 3) return 6;
    *device = (void *)(unsigned long)(at + 1);
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *name, void **device) {
    if (strcmp(name, "GPU-b")) return 6;
    *device = (void *)100;
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *device, use_t *use) {
    unsigned long at = (unsigned long)device;
    use->gpu = at == 100 ? 55 : 10 * (unsigned int)(at - 1) + 7;
    return 0;
}
"""
ASK = """
import os
from launch.ranks.usage import Gpus
print([Gpus(os.environ).share(rank) for rank in range(3)])
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or importlib.util.find_spec("pynvml") is None,
    reason="needs a C compiler and nvidia-ml-py",
)
@pytest.mark.parametrize(
    ("visible", "shares"),
    [
        (None, [0.07, 0.17, 0.27]),
        ("2,1", [0.27, 0.17, None]),
        ("GPU-b,9", [0.55, None, None]),
    ],
)
def test_the_gpu_of_a_rank_is_the_one_that_it_sees(
    visible: str | None, shares: list[float | None], tmp_path: Path
) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    said = subprocess.check_output([sys.executable, "-c", ASK], env=environ, text=True)
    assert said.strip() == str(shares)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_driver_there_is_no_gpu() -> None:
    program = "from launch.ranks.usage import Gpus; print(Gpus({}).share(0))"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", program], env=environ, text=True).strip() == "None"
