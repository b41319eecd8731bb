"""`setformer ckpt ls`, `verify` and `fetch` of copies in an object store."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from checkpoints import layout
from checkpoints.config import check_url
from checkpoints.copies import Copy, list_copies, step_of_copy, verify_copy
from checkpoints.disk import Disk
from checkpoints.fetch import fetched
from checkpoints.objects import Objects
from checkpoints.reader import verified
from checkpoints.together import Together
from launch.ckpt.listing import line_of, row_of, table_of_checkpoints
from launch.ckpt.progress import progress
from launch.ckpt.verify import show_verified
from launch.ranks.lock import held_by_tool
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError, ConfigError


def is_stored(path: str) -> bool:
    """Return whether what a user names is a URL."""
    return "://" in path


def opened(url: str) -> tuple[Objects, str | None]:
    """Return the folder of a run's copies, and the copy that the URL names, if it names one.

    Raises:
        ConfigError: it is not the URL of a folder in an object store.
    """
    try:
        check_url(url)
    except ValueError as error:
        raise ConfigError(f"{Objects(url).shown} {error}") from None
    above, _, last = url.rstrip("/").rpartition("/")
    if step_of_copy(last) is not None:
        return Objects(above), last
    return Objects(url), None


def _chosen(url: str) -> tuple[Objects, list[Copy]]:
    objects, one = opened(url)
    copies = [copy for copy in list_copies(objects) if one in (None, copy.name)]
    if not copies:
        raise CheckpointError(f"{Objects(url).shown} holds no copies: name checkpoint.mirror and the run, joined by /")
    return objects, copies


def list_url(url: str, verify: bool, console: Console, as_json: bool = False) -> int:
    """Print the copies below a URL; return how many cannot be used. What is still being made counts as none.

    Raises:
        CheckpointError: there is none, or the store refuses.
        StorageError: the store does not answer.
    """
    objects, copies = _chosen(url)
    faults = {copy.name: copy.fault for copy in copies}
    if verify:
        faults |= {c.name: "; ".join(verify_copy(objects, c)) or None for c in copies if c.manifest is not None}
    if as_json:
        lines = [line_of(objects.below(copy.name), copy.manifest, faults[copy.name]) for copy in copies]
        print(json.dumps(lines, indent=2))
    else:
        table = table_of_checkpoints()
        for copy in copies:
            row_of(table, copy.name, copy.manifest, faults[copy.name], verify)
        console.print(table)
    return sum(faults[copy.name] is not None for copy in copies if not copy.begun)


def verify_url(url: str, console: Console, as_json: bool = False) -> int:
    """Read every byte of one copy, or of all below a URL; print what is wrong; return how many do not verify.

    Raises:
        CheckpointError: there is none, or the store refuses.
        StorageError: the store does not answer.
    """
    objects, copies = _chosen(url)
    total = sum(copy.manifest.size for copy in copies if copy.manifest is not None)
    answers: list[dict[str, str | None]] = []
    began = time.perf_counter()
    with progress(console, "verify", total, as_json) as advance:
        for copy in copies:
            faults = verify_copy(objects, copy, advance)
            answers.append({"path": objects.below(copy.name), "fault": "; ".join(faults) or None})
    show_verified(answers, total, time.perf_counter() - began, console, as_json)
    begun = {objects.below(copy.name) for copy in copies if copy.begun}
    return sum(answer["fault"] is not None for answer in answers if answer["path"] not in begun)


def fetch(url: str, dest: Path, console: Console) -> None:
    """Fetch the newest copy below a URL that verifies, or the one that it names, into a folder of checkpoints.

    Raises:
        ConfigError: a checkpoint of its step is there already, or the destination is a file.
        CheckpointError: there is none that verifies, or the store refuses.
        StorageError: the store does not answer.
        LaunchError: a run trains in the folder.
    """
    objects, copies = _chosen(url)
    if dest.exists() and not dest.is_dir():
        raise ConfigError(f"{dest} is a file: name the folder in which the step's folder is made")
    newest = next((copy for copy in copies if copy.manifest is not None), None)
    if newest is not None and (there := layout.step_folder(dest, step_of_copy(newest.name) or 0)).exists():
        raise ConfigError(f"{there} already exists: move it away, or name another folder")
    names = {copy.name for copy in copies}
    with held_by_tool(dest):
        for folder in fetched(objects, dest, Together(Alone(), dest), Disk(), lambda copy: copy.name in names):
            verified(folder)
            console.print(f"{folder}: fetched from {objects.shown}, verified", highlight=False, markup=False)
            return
    raise CheckpointError(f"no copy in {objects.shown} verifies: see setformer ckpt verify {objects.shown}")
