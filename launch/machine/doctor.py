"""Reports what this machine can do for a run, what is missing, and how to get it.

`diagnose` looks and returns findings, `render` prints them as a table and returns an exit code: non-zero if and
only if an ordinary training run could not start here. `check_package_origins` is also called at start-up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dataloaders.ffcv.check import FFCV_VERSION, REPAIR, ffcv_problem
from launch.ranks.environment import has_gpu, usable_cores
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.terminal import open_console, open_table

OUR_PACKAGES = ("setformer_dist", "dataloaders", "checkpoints", "launch", "configs", "setformer")

# Distribution to the lowest version that works; the same bounds as in pyproject.toml.
REQUIRED: Mapping[str, str] = {
    "torch": "2.11",
    "torchvision": "0.26",
    "timm": "1.0.20",
    "deepspeed": "0.19.8",
    "pydantic": "2.10",
    "typer": "0.15",
    "rich": "13",
    "safetensors": "0.5",
    "simplejpeg": "1.8",
    "pillow": "11",
    "tensorboard": "2.18",
    "matplotlib": "3.9",
    "jinja2": "3.1",
    "scipy": "1.13",
    "faster-coco-eval": "1.8",
    "tokenizers": "0.22",
}
# Distribution to what it is for; each is a `pip install` away and a run does without.
OPTIONAL: Mapping[str, str] = {
    "wandb": "logging.wandb",
    "mlflow-skinny": "logging.mlflow",
    "tifffile": "TIFF files of other pixels than RGB of 8 bits",
    "imagecodecs": "the same, and PNG files of 16 bits",
    "openslide-python": "whole-slide images",
    "ray": "sweeps, scheduling and the reference refresh service",
    "sqlalchemy": "the queue",
    "psycopg": "the queue, with PostgreSQL",
    "fastapi": "the queue's page",
    "uvicorn": "the queue's page",
    "pot": "comparison of the transport plans with POT",
    "webdataset": "comparison of the loader with WebDataset's own",
    "hypothesis": "the tests",
    "pytest": "the tests",
}
# Distributions that come with an extra of ours.
EXTRAS: Mapping[str, str] = {"sqlalchemy": "queue", "psycopg": "queue", "fastapi": "queue", "uvicorn": "queue"}
PROGRAMS: Mapping[str, str] = {
    "g++": "the compiled attention of CPUs",
    "pdsh": "starting on several hosts by DeepSpeed's launcher",
    "ssh": "starting on several hosts",
}

_MIB = 2**20
_FREE_NEEDED_MIB = 256  # a small run's checkpoints and logs; below this nothing useful can be kept
_FREE_ADVISED_MIB = 5 * 1024
_SHM_ADVISED_MIB = 256
_PROBE_TIMEOUT_S = 180
_PROBE = "from launch.machine.doctor import print_accelerator; print_accelerator()"
_LEFTOVERS = "deepspeed_allreduce_buffer_*"

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        topic: what was looked at.
        value: what was found.
        status: "note" for what a run can do without, "problem" for what it cannot.
        repair: what to do about it, "" where nothing needs doing.
    """

    topic: str
    value: str
    status: Status = "ok"
    repair: str = ""


def diagnose(run_folder: Path) -> list[Finding]:
    """Look at versions, devices, space, programs and package origins; takes some seconds.

    Args:
        run_folder: where runs are to be kept; need not exist yet.
    """
    return [
        _python(),
        _origins(),
        *(_required(name, lowest) for name, lowest in REQUIRED.items()),
        *(_optional(name, purpose) for name, purpose in OPTIONAL.items()),
        _ffcv(),
        *_accelerator(),
        _host(),
        *_space(run_folder),
        *(_program(name, purpose) for name, purpose in PROGRAMS.items()),
    ]


def render(findings: list[Finding], console: Console | None = None) -> int:
    """Print the findings and return 0, or 1 if one of them is a problem."""
    console = console or open_console()
    table = open_table("", "what", "found", "what to do", title="setformer doctor", title_justify="left")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], *map(_escaped, (finding.topic, finding.value, finding.repair)))
    console.print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    console.print(f"{problems} problem{'s' * (problems != 1)}" if problems else "A training run can start here.")
    return min(problems, 1)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def check_package_origins(names: tuple[str, ...] = OUR_PACKAGES) -> Path:
    """Return the folder that all our top-level packages come from.

    Names like `launch` and `configs` are common: another distribution, or a folder in the working directory,
    may own one of them, and Python would mix the two silently.

    Raises:
        LaunchError: one comes from elsewhere or is not found; both places are named.
    """
    places = {name: _origin(name) for name in names}
    home = places[names[0]]
    for name, place in places.items():
        if place is None:
            raise LaunchError(f"package {name!r} is not found next to {home}: install setformer_dist again")
        if place != home:
            raise LaunchError(
                f"package {name!r} comes from {place} but {names[0]!r} from {home}: uninstall or rename the other "
                f"{name!r}, or start Python elsewhere"
            )
    assert home is not None
    return home


def _origin(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return Path(spec.origin).resolve().parent if spec and spec.origin else None
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def print_accelerator() -> None:
    """Print what DeepSpeed runs on as one line of JSON; for the process that `diagnose` starts."""
    # Not at the top: importing DeepSpeed takes seconds, compiles probes and writes to stdout.
    torch: Any = importlib.import_module("torch")
    accelerator: Any = importlib.import_module("deepspeed.accelerator").get_accelerator()
    name = accelerator.device_name()
    count = accelerator.device_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(count)] if name == "cuda" else []
    answer = {
        "name": name,
        "devices": gpus or [name],
        "backend": accelerator.communication_backend_name(),
        "bf16": bool(accelerator.is_bf16_supported()),
        "fp16": bool(accelerator.is_fp16_supported()),
        "cuda_build": torch.version.cuda,
    }
    print("\n" + json.dumps(answer))


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", found, "problem", "use Python 3.11, 3.12 or 3.13")
    return Finding("Python", found)


def _origins() -> Finding:
    try:
        return Finding("our packages", f"all from {check_package_origins()}")
    except LaunchError as error:
        return Finding("our packages", str(error), "problem", "see left")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _required(name: str, lowest: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding(name, "missing", "problem", f'pip install "{name}>={lowest}"')
    if _numbers(found) < _numbers(lowest):
        return Finding(name, found, "problem", f'too old: pip install "{name}>={lowest}"')
    return Finding(name, found)


def _optional(name: str, purpose: str) -> Finding:
    found = _version(name)
    if found:
        return Finding(name, found)
    install = f"'setformer_dist[{EXTRAS[name]}]'" if name in EXTRAS else name
    return Finding(name, "missing", "note", f"pip install {install}: for {purpose}")


def _ffcv() -> Finding:
    problem = ffcv_problem()
    if problem:
        return Finding("ffcv", problem, "note", f'for data.engine = "ffcv": {REPAIR}')
    return Finding("ffcv", f'{FFCV_VERSION}; data.engine = "ffcv" can be used')


def _program(name: str, purpose: str) -> Finding:
    found = shutil.which(name) or _beside_python(name)
    if found:
        return Finding(name, found)
    package = {"ssh": "openssh-client"}.get(name, name)
    return Finding(name, "missing", "note", f"apt-get install {package}: for {purpose}")


def _beside_python(name: str) -> str | None:
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else None


def _accelerator() -> list[Finding]:
    answer, fault = _probe()
    if answer is None:
        return [Finding("accelerator", fault, "problem", "DeepSpeed must import: see the line to the left")]
    devices = answer["devices"]
    findings = [
        Finding("accelerator", f"{answer['name']} ({len(devices)} × {devices[0]}), backend {answer['backend']}")
    ]
    for kind in ("bf16", "fp16"):
        if answer[kind]:
            findings.append(Finding(kind, "supported"))
        else:
            findings.append(Finding(kind, "not supported here", "note", f'choose another precision than "{kind}"'))
    return findings


def _probe() -> tuple[dict[str, Any] | None, str]:
    """Ask in a process of its own: DeepSpeed prints at import, and a broken build must not take us along."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109 — a string is needed
    if not has_gpu(env):
        env.setdefault("DS_ACCELERATOR", "cpu")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            env=env,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer from DeepSpeed within {_PROBE_TIMEOUT_S} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return None, said[-1] if said else f"the check ended with exit code {done.returncode}"
    answer = json.loads(lines[-1])
    assert isinstance(answer, dict)
    return answer, ""


def _host() -> Finding:
    cores = f"{usable_cores()} cores"
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return Finding("host", cores)
    gib = {key: int(kib) / 2**20 for key, kib in re.findall(r"(\w+):\s+(\d+) kB", meminfo.read_text())}
    return Finding("host", f"{cores}, {gib['MemAvailable']:.1f} of {gib['MemTotal']:.1f} GiB memory free")


def _space(run_folder: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> list[Finding]:
    existing = next(p for p in (run_folder.absolute(), *run_folder.absolute().parents) if p.exists())
    findings = [_free(f"space in {run_folder}", existing, _FREE_NEEDED_MIB, _FREE_ADVISED_MIB, usage)]
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        findings.append(Finding(f"writing in {run_folder}", "not allowed", "problem", "choose another run folder"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        findings.append(_free("space in /dev/shm", shared, 0, _SHM_ADVISED_MIB, usage))
        findings += _shared_leftovers(shared)
    return findings


def _free(topic: str, place: Path, needed: int, advised: int, usage: Callable[[Path], Any]) -> Finding:
    free = usage(place).free // _MIB
    value = f"{free:,} MiB free"
    if free < needed:
        return Finding(topic, value, "problem", f"make room: {needed} MiB is the least a run needs")
    if free < advised:
        return Finding(topic, value, "note", f"{advised:,} MiB are advisable")
    return Finding(topic, value)


def _shared_leftovers(shared: Path) -> list[Finding]:
    sizes = [path.stat().st_size for path in shared.glob(_LEFTOVERS)]
    if not sizes:
        return []
    value = f"{len(sizes)} buffers of ended DeepSpeed jobs, {sum(sizes) // _MIB:,} MiB"
    return [Finding("leftovers", value, "note", f"with no job running: rm {shared}/{_LEFTOVERS}")]
