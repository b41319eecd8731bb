"""The git state of a folder of code: commit, branch, and the uncommitted changes.

git is optional, is never waited for long, and never runs what a repository configures for display (pagers, external
diffs, file monitors). A folder that its repository ignores, such as site-packages in a project, has no state.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from setformer_dist.core.secrets import redacted, redacted_source

_LIMIT_S = 5.0
_HOME = Path(__file__).resolve().parents[2]
_SAVED = 256 << 10  # bytes of a diff that is kept
_CODE = (".py", ".pyx", ".c", ".cpp", ".cu", ".h")
_UNTRACKED = 50  # files of code that no commit knows and that a diff shows
_SAFE = ("-c", "core.fsmonitor=false", "-c", "core.quotepath=off", "--no-pager")


class _GitError(Exception):
    """git is not there, did not answer, or refused."""


@dataclass(frozen=True)
class Checkout:
    """The state of a repository.

    Attributes:
        state: what a record holds: "commit", "branch", "remote", "dirty", "diff" (sha256 of the changes, None without
            any), "masked" (whether secrets were taken out of them), or "fault".
        diff: the changes as `git apply` takes them, where they are small enough to keep.
    """

    state: dict[str, object]
    diff: str | None = None


def checkout_of(place: Path) -> Checkout | None:
    """Return the git state of the repository that a file or folder of code belongs to; None where it is in none.

    Args:
        place: of a package or a module.
    """
    folder = place if place.is_dir() else place.parent
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    except _GitError:
        return None
    try:
        if _is_ignored(root, place):
            return None
        return _state(root)
    except _GitError as error:
        return Checkout({"fault": str(error)})


def _state(root: Path) -> Checkout:
    said = dict(_headers(_git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=no")))
    commit = said.get("branch.oid", "(initial)")
    state: dict[str, object] = {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if (branch := said.get("branch.head")) == "(detached)" else branch,
        "remote": _remote(root),
    }
    against = "HEAD" if state["commit"] else _git(root, "hash-object", "-t", "tree", "/dev/null").strip()
    diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", against)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    code = [name for name in untracked if name.endswith(_CODE)]
    diff += "".join(_added(root, name) for name in code[:_UNTRACKED])
    kept = redacted_source(diff)
    state |= {"dirty": bool(diff), "diff": None, "masked": kept != diff}
    if diff:
        state["diff"] = hashlib.sha256(kept.encode(errors="surrogateescape")).hexdigest()
    return Checkout(state, kept if diff and len(kept) <= _SAVED else None)


def _headers(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith("# "):
            key, _, value = line[2:].partition(" ")
            yield key, value


def _remote(root: Path) -> str | None:
    try:
        return redacted(_git(root, "remote", "get-url", "origin").strip())
    except _GitError:
        return None


def _added(root: Path, name: str) -> str:
    """Return the diff that adds a file which is in no commit."""
    return _git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--no-index", "--",
                "/dev/null", name, well=(0, 1))  # fmt: skip


def _is_ignored(root: Path, place: Path) -> bool:
    try:
        _git(root, "check-ignore", "-q", "--", str(place))
    except _GitError:
        return False
    return True


def _git(folder: Path, *words: str, well: tuple[int, ...] = (0,)) -> str:
    """Return what git says.

    Raises:
        _GitError: it is not there, takes too long, or ends with another exit code.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env = {**kept, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *_SAFE, *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _GitError(f"git did not answer within {_LIMIT_S:g} s") from None
    except OSError as error:
        raise _GitError(f"git cannot be run: {error.strerror}") from None
    if done.returncode not in well:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _GitError(redacted(said[0]) if said else f"git ended with exit code {done.returncode}")
    return done.stdout.decode(errors="surrogateescape")


def places_of(modules: Iterable[str]) -> dict[str, Path | None]:
    """Return where the packages of modules lie, without importing them: what `run.imports` names.

    Args:
        modules: dotted names; those of one package have one place.
    """
    tops = dict.fromkeys(module.partition(".")[0] for module in modules)
    return {top: _place(top) for top in tops}


def codes_of(modules: Iterable[str]) -> dict[str, dict[str, object]]:
    """Return of this project, under "", and of the packages of modules: "files", a digest, and "git", the state.

    Both are None where there is nothing.

    Args:
        modules: as in `places_of`.
    """
    found: dict[str, dict[str, object]] = {}
    for name, place in {"": _HOME / "launch", **places_of(modules)}.items():
        checkout = checkout_of(place) if place is not None else None
        files = _digest_of(place) if place is not None and name else None  # our own: `machine.code_digest`
        found[name] = {"files": files, "git": checkout.state if checkout is not None else None}
    return found


def _digest_of(place: Path) -> str:
    """Return a digest of the code of a package or a module."""
    digest = hashlib.sha256()
    for path in filter(Path.is_file, sorted(place.rglob("*.py")) if place.is_dir() else [place]):
        digest.update(path.name.encode(errors="surrogateescape") + b"\0")
        with contextlib.suppress(OSError):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _place(name: str) -> Path | None:
    spec: ModuleSpec | None = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
    spec = spec or PathFinder.find_spec(name, [str(Path.cwd())])  # as `launch.run.own_code.bring` finds it
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.has_location else None
