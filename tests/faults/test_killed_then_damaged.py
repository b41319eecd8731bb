"""A process killed within a commit, then a file damaged: what still verifies is what the run continues with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import layout
from checkpoints.config import CheckpointConfig
from checkpoints.digest import digest_of
from checkpoints.errors import DamagedError
from checkpoints.identity import Identity, digest_json
from checkpoints.manager import CheckpointManager
from checkpoints.strictjson import parse
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.store import Snapshot


def save(root: Path, step: int, value: float) -> Path:
    manager = CheckpointManager(root, Alone(), CheckpointConfig())
    return manager.save(
        Snapshot(step, [Fragment("w", "param", 0, (100,), torch.full((100,), value))], {"v": value}, {}),
        Identity(model="m"),
    )


def newest(root: Path) -> tuple[int, float] | None:
    found = CheckpointManager(root, Alone(), CheckpointConfig()).newest()
    return None if found is None else (found.step, found.trainer["v"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FILES = (layout.rank_file(0, 1), layout.TRAINER, layout.MANIFEST)


@pytest.fixture
def replacing(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Killed after the new folder took the name and before the old one was deleted: (root, new, old)."""
    old = save(tmp_path / "old", 2, 2.0)
    root = tmp_path / "checkpoints"
    save(root, 1, 1.0)
    new = save(root, 2, 3.0)
    waiting = layout.replaced_folder(root, 2, "5f0c21aa")
    shutil.copytree(old, waiting)
    return root, new, waiting


@pytest.mark.parametrize("file", FILES)
def test_the_old_copy_is_taken_back_where_the_new_one_is_damaged(replacing: tuple[Path, Path, Path], file: str) -> None:
    root, new, _ = replacing
    flip(new / file)
    assert newest(root) == (2, 2.0)
    (aside,) = [path for path in (root / "aside").iterdir() if path.is_dir()]
    assert aside.name.startswith("step-00000002")


@pytest.mark.parametrize("file", FILES)
def test_the_new_copy_stays_where_the_old_one_is_damaged(replacing: tuple[Path, Path, Path], file: str) -> None:
    root, _, old = replacing
    flip(old / file)
    assert newest(root) == (2, 3.0)
    assert not old.exists()


def test_where_both_are_damaged_both_are_kept_and_an_older_step_is_taken(replacing: tuple[Path, Path, Path]) -> None:
    root, new, old = replacing
    flip(new / FILES[0])
    flip(old / FILES[0])
    assert newest(root) == (1, 1.0)
    assert len([path for path in (root / "aside").iterdir() if path.is_dir()]) == 2


def test_a_link_in_the_old_ones_place_stops_no_resume(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 2, 3.0)
    (root / ".replaced-step-00000002-5f0c21aa").symlink_to(tmp_path)
    (root / ".replaced-aside-5f0c21aa").mkdir()
    assert newest(root) == (2, 3.0)
    assert tmp_path.exists()


@pytest.mark.parametrize("file", FILES)
def test_killed_before_the_commit_then_the_checkpoint_before_damaged(tmp_path: Path, file: str) -> None:
    root = tmp_path / "checkpoints"
    before, complete = save(root, 1, 1.0), save(root, 2, 2.0)
    complete.rename(layout.temporary_folder(root, 2, "5f0c21aa"))
    shutil.copytree(root, tmp_path / "sound")
    assert newest(tmp_path / "sound") == (1, 1.0)  # while there is another, what was not committed does not count
    flip(before / file)
    assert newest(root) == (2, 2.0)


def reseal(folder: Path, name: str, data: bytes) -> None:
    """Rewrite a file of a checkpoint, and its manifest to match, as a forger would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    for record in manifest["files"]:
        if record["name"] == name:
            record |= {"size": len(data), "digest": digest_of(data)}
    manifest.pop("sha256")
    (folder / layout.MANIFEST).write_text(json.dumps(manifest | {"sha256": digest_json(manifest)}))


def accept(found) -> None:
    """What a run's store asks, in small."""
    if found.trainer["v"] < 0:
        raise CheckpointError("of another run")
    found.check_holds({"w": (100,)}, ["param"])


@pytest.mark.parametrize(
    "text", ["[1]", "[" * 100, '{"v": 1, "v": 2}', '{"v": "\\ud800"}', "{}", '{"v": null}', '{"v": -1}', "nonsense"]
)
def test_a_crafted_newest_step_is_skipped_and_its_name_is_free_again(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1, 1.0)
    crafted = save(tmp_path, 2, 2.0)
    reseal(crafted, layout.TRAINER, text.encode())
    manager = CheckpointManager(tmp_path, Alone(), CheckpointConfig())
    found = manager.newest(accept)
    assert found is not None
    assert found.step == 1
    assert [skipped.path for skipped in manager.skipped] == [crafted]
    assert not crafted.exists()
    assert any(path.is_dir() for path in (tmp_path / "aside").iterdir())


@pytest.mark.parametrize("name", ["\\ud800", "x", "more"])
def test_a_header_that_names_other_parameters_is_skipped(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, 1.0)
    crafted = save(tmp_path, 2, 2.0)
    file = layout.rank_file(0, 1)
    data = (crafted / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["shapes"] = '{"w": [100], "NAME": [281474976710656]}'.replace("NAME", name)
    if name == "x":
        header["__metadata__"]["shapes"] = '{"x": [100]}'
    text = json.dumps(header).encode()
    reseal(crafted, file, len(text).to_bytes(8, "little") + text + data[8 + length :])
    found = CheckpointManager(tmp_path, Alone(), CheckpointConfig()).newest(accept)
    assert found is not None
    assert found.step == 1


def test_where_no_checkpoint_is_accepted_it_is_an_error_and_nothing_is_moved(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, -1.0)
    with pytest.raises(CheckpointError, match="of another run"):
        CheckpointManager(tmp_path, Alone(), CheckpointConfig()).newest(accept)
    assert folder.exists()


def test_a_file_changed_in_place_with_its_time_put_back_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 1.0)
    found = CheckpointManager(tmp_path, Alone(), CheckpointConfig()).newest()
    assert found is not None
    path = folder / layout.rank_file(0, 1)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedError, match="not the file that was verified"):
        found.read_full()


@pytest.mark.parametrize("text", [b"[" + b"[]," * 1_000_000 + b"[]]", b'{"a":' * 9_000 + b"1" + b"}" * 9_000])
def test_text_of_lists_and_objects_alone_is_refused_before_it_is_parsed(text: bytes) -> None:
    with pytest.raises(DamagedError, match=r"lists and objects|nested"):
        parse(text, "crafted")
