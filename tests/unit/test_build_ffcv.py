"""Building FFCV: what is run, and what is said where it cannot be built."""

import shutil

import pytest

from launch.machine import build_ffcv as building
from setformer_dist.core.errors import LaunchError


@pytest.fixture
def machine(monkeypatch):
    """A machine on which commands are noted and answered from `codes`; FFCV works once it was installed."""

    class Machine:
        def __init__(self):
            self.commands, self.codes, self.works, self.libraries = [], {}, "", False

        def run(self, command, environment):
            text = " ".join(command)
            self.commands.append((text, dict(environment)))
            return next((code for part, code in self.codes.items() if part in text), 0)

        def problem(self):
            installed = any("ffcv==1.0.2" in text for text, _ in self.commands)
            return self.works if installed else "it is not installed"

    machine = Machine()
    monkeypatch.setattr(building, "ffcv_problem", machine.problem)
    monkeypatch.setattr(building, "has_libraries", lambda: machine.libraries)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return machine


def test_root_gets_system_packages_python_packages_and_ffcv(machine):
    assert building.build_ffcv(machine.run, is_root=True) == "FFCV 1.0.2 was built and works"
    (system, _), (python, _), (ffcv, environment) = machine.commands
    assert system.startswith("apt-get install -y --no-install-recommends g++ pkg-config libturbojpeg0-dev libopencv-")
    assert "numba" in python
    assert "opencv-python-headless" in python
    assert ffcv.endswith("--no-deps ffcv==1.0.2")
    assert "-DOPENCV_ALL_HPP" in environment["CPPFLAGS"]
    assert environment["PKG_CONFIG_PATH"]


def test_what_is_there_is_not_installed_again(machine, monkeypatch):
    machine.libraries = True
    building.build_ffcv(machine.run, is_root=False)
    assert not any("apt-get" in text for text, _ in machine.commands)
    machine.commands = [("ffcv==1.0.2", {})]
    assert building.build_ffcv(machine.run, is_root=False) == "FFCV 1.0.2 works already"


def test_where_it_cannot_be_built_it_says_what_to_do(machine, monkeypatch):
    repair = r"as root, run `apt-get install .*libopencv-imgproc-dev` .* then `make ffcv` again"
    with pytest.raises(LaunchError, match=f"only root can install: {repair}"):
        building.build_ffcv(machine.run, is_root=False)
    machine.codes = {"apt-get": 100}
    with pytest.raises(LaunchError, match=f"apt-get could not install what FFCV needs .*: {repair}"):
        building.build_ffcv(machine.run, is_root=True)
    assert [text.split()[1] for text, _ in machine.commands] == ["install", "update"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match=f"there is no apt-get here: {repair}"):
        building.build_ffcv(machine.run, is_root=True)


def test_a_failed_step_or_a_build_that_does_not_work_is_an_error(machine):
    machine.codes = {"--no-deps": 1}
    with pytest.raises(LaunchError, match=r"FFCV itself could not be installed \(exit code 1"):
        building.build_ffcv(machine.run, is_root=True)
    machine.codes, machine.works = {}, "libturbojpeg.so.0: cannot open shared object file"
    with pytest.raises(LaunchError, match="built but does not work: libturbojpeg"):
        building.build_ffcv(machine.run, is_root=True)
