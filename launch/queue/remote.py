"""A queue as its server's JSON API has it: what the command line uses where --queue is a URL."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import urllib3

from launch.queue.store import Row
from launch.queue.submit import Request, user_here
from launch.queue.token import VARIABLE
from launch.run.config import load_run, shipped
from setformer_dist.core import strictjson
from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.secrets import redacted
from setformer_dist.core.words import plain

_LARGEST = 256 << 20  # bytes of an answer
_TIMEOUT_S = 60.0


class Remote:
    """The queue of a server; every call as `Source` has it.

    Args:
        url: of the server, such as http://head:8765.
        token: of the server; None where it asks for none.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._shown = redacted(url)
        self._headers = {"Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        timeout = urllib3.Timeout(connect=10.0, read=_TIMEOUT_S)
        self._pool = urllib3.PoolManager(retries=False, timeout=timeout)

    def leader(self) -> Row | None:
        """As `Source`."""
        found: Row | None = self._get("/cluster")["leader"]
        return found

    def fault(self) -> str:
        """As `Source`."""
        return str(self._get("/cluster").get("fault", ""))

    def nodes(self) -> list[Row]:
        """As `Source`."""
        return list(self._get("/cluster")["nodes"])

    def jobs(self, everything: bool) -> list[Row]:
        """As `Source`."""
        return list(self._get("/jobs", all=everything, limit=1_000_000)["jobs"])

    def job(self, number: int) -> Row:
        """As `Source`."""
        return self._get(f"/jobs/{number}")

    def events(self, since: int) -> list[Row]:
        """As `Source`."""
        return list(self._get("/events", since=since)["events"])

    def output(self, number: int, attempt: int, start: int) -> Row:
        """As `Source`."""
        return self._get(f"/jobs/{number}/logs", attempt=attempt, start=start)

    def cancel(self, number: int) -> str:
        """As `Source`."""
        return str(self._post(f"/jobs/{number}/cancel")["said"])

    def hold(self, number: int) -> str:
        """As `Source`."""
        return str(self._post(f"/jobs/{number}/hold")["said"])

    def release(self, number: int) -> str:
        """As `Source`."""
        return str(self._post(f"/jobs/{number}/release")["said"])

    def move(self, number: int, priority: int) -> str:
        """As `Source`."""
        return str(self._post(f"/jobs/{number}/move", {"priority": priority})["said"])

    def drain(self, node: str, why: str | None, vacate: bool = False) -> None:
        """As `Source`."""
        path = f"/nodes/{urllib.parse.quote(node, safe='')}"
        if why is None:
            self._post(f"{path}/undrain")
        else:
            self._post(f"{path}/drain", {"why": why, "vacate": vacate})

    def submit(self, request: Request) -> int:
        """As `Source`; the run config is read and checked here first, and sent as a whole."""
        assert isinstance(request.config, Path)
        if request.sweep:
            raise LaunchError("a sweep is submitted on the machine of the queue's server: name the queue by its folder")
        run = load_run(shipped(request.config), request.overrides)
        body = {
            "config": run.model_dump(mode="json"),
            "directory": str(request.directory or Path.cwd()),
            "ranks": request.ranks,
            "nodes": request.nodes,
            "ranks_per_node": request.per_node,
            "priority": request.priority,
            "user": request.user or user_here(),
            "name": request.name,
            "max_retries": request.max_retries,
            "time_limit": request.limit,
            "after": list(request.after),
            "hold": request.held,
        }
        return int(self._post("/jobs", body)["job"])

    def _get(self, path: str, **fields: int) -> Row:
        query = urllib.parse.urlencode({name: int(value) for name, value in fields.items()})
        return self._ask("GET", f"{path}?{query}" if query else path)

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> Row:
        return self._ask("POST", path, json.dumps(body or {}).encode())

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Row:
        """Return the server's answer.

        Raises:
            ConfigError, LaunchError: what the server said, or that it does not answer.
        """
        headers = {**self._headers, **({"Content-Type": "application/json"} if body is not None else {})}
        try:
            url = f"{self._url}/api{path}"
            answer = self._pool.request(method, url, body=body, headers=headers, redirect=False, preload_content=False)
            data = answer.read(_LARGEST)
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise LaunchError(
                f"the queue's server {self._shown} does not answer ({_short(error)}): see that `setformer queue serve "
                "--page` runs there"
            ) from None
        try:
            found = strictjson.parse(data)
            assert isinstance(found, dict)
        except (ValueError, AssertionError):
            raise LaunchError(f"{self._shown} is no server of a queue (HTTP {answer.status}): check the URL") from None
        if answer.status == 200:
            return found
        said = plain(found.get("error", f"HTTP {answer.status}"))
        if answer.status == 401:
            raise LaunchError(f"{self._shown} wants its token: set {VARIABLE}")
        raise (ConfigError if found.get("exit_code") == ConfigError.exit_code else LaunchError)(said)


def _short(error: Exception) -> str:
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    return plain(redacted(text.rsplit(": ", 1)[-1]))[:200]
