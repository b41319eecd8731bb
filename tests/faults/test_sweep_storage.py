"""The journal of a sweep on a disk that fills up, and a clone that a kill left half made."""

from __future__ import annotations

import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.layout import MANIFEST, step_folder
from launch.sweep.journal import Journal, read_events
from launch.sweep.trial import LOG, Command, TrialProcess, hand_over, no_room, why_ended
from setformer_dist.core.errors import TransientError
from setformer_dist.core.files import write_text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; making one needs rights that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_driver_and_the_journal_goes_on_after_making_room(small_disk: Path) -> None:
    journal = Journal(small_disk)
    journal.append({"event": "opened", "time": 0.0})
    ballast = small_disk / "other"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass
    events = ({"event": "reported", "trial": n, "step": 1, "value": 0.5, "note": "x" * 500} for n in range(1000))
    with pytest.raises(TransientError, match="make room, and start the sweep again"):
        deque(map(journal.append, events))
    written = len(journal.events) - 1
    journal.close()
    assert written < 1000
    assert len(read_events(small_disk)) == 1 + written
    ballast.unlink()
    again = Journal(small_disk)
    again.append({"event": "opened", "time": 9.0})
    again.close()
    found = read_events(small_disk)
    assert [found[0]["time"], found[-1]["time"], len(found)] == [0.0, 9.0, 2 + written]


def test_a_page_that_finds_no_room_leaves_nothing_and_is_named(small_disk: Path) -> None:
    page = small_disk / "report.html"
    write_text(page, "as it was")
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(page, "x" * (1 << 20))
    assert caught.value.filename == str(page)
    assert [path.name for path in small_disk.iterdir()] == ["report.html"]
    assert page.read_text() == "as it was"


def test_a_full_disk_is_told_from_what_is_wrong_with_a_trial(small_disk: Path, tmp_path: Path) -> None:
    assert no_room(small_disk, "exit code 4")  # the trial could not say why
    assert not no_room(tmp_path, "data.root = 'nosuch' holds no data")
    assert no_room(tmp_path, "could not write the checkpoint: OSError: [Errno 28] No space left on device")
    log = tmp_path / "trial-0000" / LOG
    assert "is gone, as its folder was removed" in why_ended(log, 9)
    log.parent.mkdir()
    log.write_text("")
    assert why_ended(log, 9) == "exit code 9"
    log.write_text("error: first\nerror: last\nsome line\n")
    assert why_ended(log, 9) == "last"


def checkpoint(run: Path, step: int, whole: bool = True) -> None:
    folder = step_folder(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "rank-00000-of-00001.safetensors").write_bytes(b"weights of %d" % step)
    if whole:
        (folder / MANIFEST).write_text("{}")


def test_a_clone_gets_the_newest_whole_checkpoint_and_what_is_left_of_an_earlier_try_goes(tmp_path: Path) -> None:
    source, clone = tmp_path / "source", tmp_path / "clone"
    assert hand_over(source, clone) is None
    checkpoint(source, 5)
    checkpoint(source, 10)
    checkpoint(source, 15, whole=False)  # being removed
    checkpoint(clone, 7)  # of a driver that was killed before it wrote the clone down
    assert hand_over(source, clone) == 10
    found = sorted(path.relative_to(clone).as_posix() for path in clone.rglob("*") if path.is_file())
    assert found == [f"checkpoints/step-00000010/{name}" for name in (MANIFEST, "rank-00000-of-00001.safetensors")]
    assert (clone / found[1]).read_bytes() == b"weights of 10"
    assert (step_folder(source / "checkpoints", 10) / MANIFEST).exists()


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    log = tmp_path / "elsewhere" / "trial.log"
    process = TrialProcess(Command(("--version",), 1, False, str(log), str(tmp_path)))
    assert "must be on storage that all nodes share" in str(process.poll())
    assert str(log) in str(process.poll())
    process.stop()
    log.parent.mkdir()
    process = TrialProcess(Command(("--version",), 1, False, str(log), str(tmp_path)))
    while process.poll() is None:
        time.sleep(0.05)
    assert process.poll() == 0
    assert log.read_text().startswith("setformer_dist ")
