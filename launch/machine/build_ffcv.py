"""Builds FFCV into this Python's environment, for `data.engine = "ffcv"`; `make ffcv` calls it.

FFCV 1.0.2 comes as source alone, and even pip's look at its metadata fails where OpenCV and libturbojpeg are missing,
so it is no dependency and no extra of this package. What is done here, each step measured on Debian 12:

    system packages   core and imgproc of OpenCV, 49 MB, in place of all of it, 689 MB
    opencv4.pc        written here, since the small packages bring none and FFCV's build asks for it
    OPENCV_ALL_HPP    defined, so that `opencv2/opencv.hpp` does not ask for the modules that are not there
    --no-deps         FFCV's own list wants OpenCV with a window system, and packages that it never imports here
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dataloaders.ffcv.check import FFCV_VERSION, ffcv_problem
from setformer_dist.core.errors import LaunchError

SYSTEM_PACKAGES = ("g++", "pkg-config", "libturbojpeg0-dev", "libopencv-core-dev", "libopencv-imgproc-dev")
PYTHON_PACKAGES = ("numba>=0.61", "opencv-python-headless>=4.10", "tqdm", "pillow")

_APT = ("apt-get", "install", "-y", "--no-install-recommends", *SYSTEM_PACKAGES)
_INCLUDES = Path("/usr/include/opencv4")
_PC = """Name: opencv4
Description: core and imgproc
Version: 4
Cflags: -I{includes}
Libs: -lopencv_imgproc -lopencv_core
"""
_PROBE = "#include <turbojpeg.h>\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n"

Run = Callable[[Sequence[str], Mapping[str, str]], int]


def build_ffcv(run: Run | None = None, is_root: bool | None = None) -> str:
    """Build FFCV unless it works already; return what there is to say.

    Args:
        run: runs a command in an environment and returns its exit code.
        is_root: whether system packages may be installed; None looks.

    Raises:
        LaunchError: system packages are missing and cannot be installed here, or a step failed.
    """
    run = run or _run
    if not (problem := ffcv_problem()):
        return f"FFCV {FFCV_VERSION} works already"
    print(f"FFCV does not work yet: {problem}", flush=True)
    _system_packages(run, os.geteuid() == 0 if is_root is None else is_root)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _step(run, [*pip, *PYTHON_PACKAGES], "its Python packages")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "opencv4.pc").write_text(_PC.format(includes=_INCLUDES))
        paths = [folder, *filter(None, [os.environ.get("PKG_CONFIG_PATH")])]
        flags = ["-DOPENCV_ALL_HPP", "-include", "opencv2/imgproc.hpp", os.environ.get("CPPFLAGS", "")]
        environment = {"PKG_CONFIG_PATH": ":".join(paths), "CPPFLAGS": " ".join(flags).strip()}
        _step(run, [*pip, "--no-deps", f"ffcv=={FFCV_VERSION}"], "FFCV itself", environment)
    if problem := ffcv_problem():
        raise LaunchError(f"FFCV was built but does not work: {problem}")
    return f"FFCV {FFCV_VERSION} was built and works"


def _system_packages(run: Run, is_root: bool) -> None:
    if has_libraries():
        return
    repair = f"as root, run `{' '.join(_APT)}` (or what your system calls these), then `make ffcv` again"
    if not shutil.which("apt-get"):
        raise LaunchError(f"FFCV needs a C++ compiler, libturbojpeg and OpenCV, and there is no apt-get here: {repair}")
    if not is_root:
        raise LaunchError(f"FFCV needs a C++ compiler, libturbojpeg and OpenCV, which only root can install: {repair}")
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    if run(_APT, environment) and (run(("apt-get", "update"), environment) or run(_APT, environment)):
        raise LaunchError(f"apt-get could not install what FFCV needs (see above): {repair}")


def has_libraries() -> bool:
    """Return whether g++ and pkg-config are here, and g++ finds the headers of libturbojpeg and OpenCV."""
    if not (shutil.which("g++") and shutil.which("pkg-config")):
        return False
    command = ["g++", "-E", "-x", "c++", f"-I{_INCLUDES}", "-o", os.devnull, "-"]
    return subprocess.run(command, input=_PROBE, text=True, capture_output=True, check=False).returncode == 0


def _step(run: Run, command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    if code := run(command, environment or {}):
        raise LaunchError(f"{what} could not be installed (exit code {code}, see above): `{' '.join(command)}`")


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    print("+", *command, flush=True)
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def main() -> int:
    """Build and say so."""
    try:
        print(build_ffcv())
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
