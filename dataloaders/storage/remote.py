"""Files behind URLs (`Storage`).

    HttpStorage      http and https: range requests over kept connections
    FsspecStorage    every other URL that fsspec knows (s3, gs, az, hf, ...), by the client that the user installed

Tried again are resets, time-outs, short reads, 429 and 5xx; 404, 403 and 401 are not. Passwords and signatures that a
URL may carry are never shown.
"""

from __future__ import annotations

import base64
import functools
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import urllib3

from dataloaders.storage.base import (
    BLOCK,
    DeniedError,
    FileFacts,
    LocalFolder,
    MissingError,
    NoRangesError,
    RetriableError,
    UnreadableError,
    insist,
)
from setformer_dist.core.bounded import TooLongError, bounded

T = TypeVar("T")

# Statuses that pass: request time-out, too many requests, and all 5xx but "not implemented" and its like.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524})


class HttpStorage:
    """A folder behind http or https (`Storage`).

    Args:
        url: of the folder; a user and password in it are sent as basic authorisation, a query with every request.
        timeout: seconds that a read may take, all tries together; a whole file, without any byte coming.
        sleep: waits so many seconds between tries.
    """

    def __init__(self, url: str, timeout: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url = url
        self._timeout = timeout
        self._sleep = sleep
        self._pool: urllib3.PoolManager | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The URL, without what is secret in it."""
        return shown_url(self._url)

    def shown(self, name: str) -> str:
        """Return the URL of a file, without what is secret in it."""
        return shown_url(join_url(self._url, name))

    def facts(self, name: str) -> FileFacts:
        """Return a file's size and entity tag or date."""

        def attempt() -> FileFacts:
            response = self._request("HEAD", name)
            if response.status in (400, 403, 405, 501):  # a signature for GET alone, a server that knows no HEAD
                response = self._request("GET", name, {"Range": "bytes=0-0"})
            self._check(name, response)
            response.close()
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            length = total or response.headers.get("Content-Length", "")
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            return FileFacts(int(length) if length.isdecimal() else -1, version)

        return insist(self.shown(name), attempt, self._sleep, self._timeout)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes by one range request, or several tries at it."""
        deadline = time.monotonic() + self._timeout

        def attempt() -> bytes:
            response = self._request("GET", name, {"Range": f"bytes={offset}-{offset + size - 1}"})
            try:
                self._check(name, response, offset)
                parts, got = [], 0
                for block in self._body(response):
                    parts.append(block)
                    got += len(block)
                    if got > size or time.monotonic() > deadline:
                        break
                if got != size:
                    raise RetriableError(f"{got} of {size} bytes at offset {offset}")
                response.release_conn()
                return b"".join(parts)
            except BaseException:
                response.close()
                raise

        return insist(self.shown(name), attempt, self._sleep, self._timeout)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes; a connection that breaks is taken up again where it broke."""
        known: FileFacts | None = None
        done = 0
        while True:
            start = functools.partial(self._from, name, done, known)
            blocks, known = insist(self.shown(name), start, self._sleep, self._timeout)
            before, problem = done, ""
            try:
                for block in blocks:
                    done += len(block)
                    if done > known.size >= 0:
                        break
                    yield block
            except RetriableError as error:
                problem = str(error)
            if (known.size < 0 and not problem) or done == known.size:
                return
            if done == before or done > known.size >= 0:
                said = problem or f"{done} of {known.size} bytes"
                raise UnreadableError(self.shown(name), f"ended too early ({said}): check the server, or restore it")

    def names(self, pattern: str) -> list[str]:
        """Refuse: http has no listing."""
        raise UnreadableError(
            self.shown(pattern), "is a pattern, but http lists no files: name the shards as train-{0000..0146}.tar"
        )

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.clear()

    def _from(self, name: str, offset: int, known: FileFacts | None) -> tuple[Iterator[bytes], FileFacts]:
        """Begin to read at an offset; the first block is there when this returns, and size and version are known."""
        response = self._request("GET", name, {"Range": f"bytes={offset}-"} if offset else {})
        try:
            self._check(name, response, offset or None)
            length = response.headers.get("Content-Length", "")
            size = offset + int(length) if length.isdecimal() else -1
            now = FileFacts(size, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
            if known not in (None, now):
                raise UnreadableError(self.shown(name), "was replaced while it was read: start again")
            first = next(self._body(response), b"")
        except BaseException:
            response.close()
            raise

        def rest() -> Iterator[bytes]:
            try:
                yield first
                yield from self._body(response)
            finally:
                response.close()

        return rest(), now

    def _body(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """Yield what comes, as it comes."""
        try:
            while block := response.read1(BLOCK):
                yield block
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RetriableError(_reason(error)) from None

    def _request(self, method: str, name: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        url, own = _without_user(join_url(self._url, name))
        self._check_address(name, url)
        try:
            return self._connections().request(
                method,
                url,
                headers={"Accept-Encoding": "identity", **own, **(headers or {})},
                # A stalled connection leaves time for another try.
                timeout=urllib3.Timeout(connect=min(10.0, self._timeout / 3), read=self._timeout / 3),
                retries=urllib3.Retry(total=None, connect=0, read=0, redirect=5, status=0, other=0),
                preload_content=False,
                decode_content=False,
            )
        except (urllib3.exceptions.LocationValueError, ValueError, UnicodeError):
            # Of the server's answer: the URL itself was read above.
            raise UnreadableError(
                self.shown(name), "is redirected to an address that cannot be read: check the server"
            ) from None
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.ResponseError):
                raise UnreadableError(self.shown(name), "is redirected too often: check the server") from None
            raise RetriableError(_reason(error)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RetriableError(_reason(error)) from None

    def _check_address(self, name: str, url: str) -> None:
        """Raise for a URL, or a proxy's, that cannot be read: a later fault of this kind is the server's."""
        try:
            parsed = urllib3.util.parse_url(url)
            if not parsed.host:
                raise ValueError("it has no host")
            parsed.host.encode("idna")
            urllib.parse.urlsplit(url)
        except (urllib3.exceptions.LocationValueError, ValueError):
            raise UnreadableError(
                self.shown(name), "is no address that can be read: check its host, and its port (1 to 65535)"
            ) from None
        try:
            self._connections()
        except (urllib3.exceptions.LocationValueError, ValueError):
            raise UnreadableError(
                self.shown(name), "has a proxy whose address cannot be read: check http_proxy and https_proxy"
            ) from None

    def _connections(self) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                parts = urllib.parse.urlsplit(self._url)
                proxy = urllib.request.getproxies().get(parts.scheme)
                if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
                    self._pool = urllib3.ProxyManager(proxy, maxsize=16)
                else:
                    self._pool = urllib3.PoolManager(maxsize=16)
            return self._pool

    def _check(self, name: str, response: urllib3.BaseHTTPResponse, offset: int | None = None) -> None:
        """Raise for any answer but the file, or the range from `offset` on where one was asked for."""
        status = response.status
        if status in (404, 410):
            raise MissingError(self.shown(name), f"is not there (status {status}): check the URL, or restore the file")
        if status in (401, 403, 407):
            raise DeniedError(
                self.shown(name), f"may not be read (status {status}): check the URL's user, password or signature"
            )
        if status in _TRANSIENT:
            asked = response.headers.get("Retry-After", "")
            raise RetriableError(f"status {status}", float(asked) if asked.isdecimal() else 0.0)
        if status not in (200, 206):
            raise UnreadableError(self.shown(name), f"is answered with status {status}: check the URL")
        if offset is None:
            return
        if status == 200:
            raise NoRangesError(
                self.shown(name),
                "is served without byte ranges: set data.cache to a folder for whole shards, or "
                'data.access = "sequential"',
            )
        said = response.headers.get("Content-Range", "")
        if not said.startswith(f"bytes {offset}-"):
            raise RetriableError(f"bytes from {offset} on were requested, the server sent {said!r}")

    def __reduce__(self) -> tuple[object, ...]:
        return HttpStorage, (self._url, self._timeout, self._sleep)


class FsspecStorage:
    """A folder behind a URL that fsspec knows (`Storage`); its client has credentials, and time-outs, of its own.

    Args:
        url: of the folder.
        timeout: seconds after which an answer of the client is waited for no longer, whatever its own time-outs are.
        sleep: waits so many seconds between tries.
    """

    def __init__(self, url: str, timeout: float = 60.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url = url
        self._timeout = timeout
        self._sleep = sleep
        self._opened: tuple[object, str] | None = None

    @property
    def name(self) -> str:
        """The URL, without what is secret in it."""
        return shown_url(self._url)

    def shown(self, name: str) -> str:
        """Return the URL of a file, without what is secret in it."""
        return shown_url(join_url(self._url, name))

    def facts(self, name: str) -> FileFacts:
        """Return a file's size and entity tag or date."""
        found = self._do(name, lambda files, path: files.info(path))
        version = next((str(found[key]) for key in _VERSION_KEYS if found.get(key)), "")
        size = found.get("size")
        return FileFacts(-1 if size is None else int(size), version)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a range of bytes."""

        def work(files: Any, path: str) -> bytes:
            data: bytes = files.cat_file(path, start=offset, end=offset + size)
            if len(data) != size:
                raise RetriableError(f"{len(data)} of {size} bytes at offset {offset}")
            return data

        return self._do(name, work)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes from end to end."""
        file = self._do(name, lambda files, path: files.open(path, "rb"))
        with file:
            while block := self._do(name, lambda files, path: file.read(BLOCK)):
                yield block

    def names(self, pattern: str) -> list[str]:
        """Return the files that match a pattern below the folder."""
        found: list[str] = self._do(pattern, lambda files, path: files.glob(path))
        _, root = self._files()
        return sorted(path.removeprefix(root).lstrip("/") for path in found)

    def close(self) -> None:
        """Forget the client; fsspec keeps its connections."""
        self._opened = None

    def _files(self) -> tuple[object, str]:
        if self._opened is None:
            try:
                files, path = within(self._timeout, lambda: fsspec.core.url_to_fs(self._url))
            except (ImportError, ValueError, LookupError, TypeError) as error:
                raise UnreadableError(self.name, f"cannot be opened: {error}") from None
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise MissingError(self.name, "is not there: check the URL, or restore the file") from None
            except PermissionError as error:
                raise DeniedError(self.name, f"may not be opened ({_reason(error)}): check the credentials") from None
            except RetriableError:
                raise
            except Exception as error:  # noqa: BLE001 - some clients log in as they are made, with errors of their own
                raise RetriableError(_reason(error)) from None
            self._opened = files, path.rstrip("/")
        return self._opened

    def _do(self, name: str, work: Callable[[Any, str], T]) -> T:
        def attempt() -> T:
            files, root = self._files()
            try:
                return within(self._timeout, lambda: work(files, f"{root}/{name}" if name else root))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise MissingError(self.shown(name), "is not there: check the URL, or restore the file") from None
            except PermissionError as error:
                raise DeniedError(
                    self.shown(name), f"may not be read ({_reason(error)}): check the credentials"
                ) from None
            except (NotImplementedError, ValueError) as error:
                raise NoRangesError(
                    self.shown(name), f'cannot be read in parts ({error}): set data.access = "sequential"'
                ) from None
            except RetriableError:
                raise
            # Each client has errors of its own, few of them distinguished; the worst that a wrong guess costs is 8 s.
            except Exception as error:  # noqa: BLE001
                raise RetriableError(_reason(error)) from None

        return insist(self.shown(name), attempt, self._sleep, self._timeout)

    def __reduce__(self) -> tuple[object, ...]:
        return FsspecStorage, (self._url, self._timeout, self._sleep)


def within(limit: float, work: Callable[[], T]) -> T:
    """Return what some work returns, done by a thread that is left behind where it hangs.

    Args:
        limit: seconds to wait for it.
        work: to be done.

    Raises:
        RetriableError: it did not end in time.
    """
    try:
        return bounded(limit, work)
    except TooLongError:
        raise RetriableError(f"nothing came for {limit:g} s") from None


_VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


def is_url(text: str) -> bool:
    """Return whether a text is a URL and not a path."""
    return "://" in text


def open_storage(root: str, timeout: float) -> LocalFolder | HttpStorage | FsspecStorage:
    """Return the storage of a folder or URL."""
    if not is_url(root):
        return LocalFolder(Path(root))
    scheme, _, rest = root.partition("://")
    if scheme == "file":
        return LocalFolder(Path(rest))
    return HttpStorage(root, timeout) if scheme in ("http", "https") else FsspecStorage(root, timeout)


def join_url(url: str, name: str) -> str:
    """Return the URL of a name below a folder's; a query stays at the end."""
    if not name:
        return url
    base, mark, query = url.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def shown_url(url: str) -> str:
    """Return a URL for messages: without user, password and query."""
    scheme, mark, rest = url.partition("?")[0].partition("://")
    if not mark:
        return scheme
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without user and password, and the header that says them."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@")
    if not at:
        return url, {}
    secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return f"{scheme}{mark}{host}{slash}{path}", {"Authorization": f"Basic {secret}"}


def _reason(error: Exception) -> str:
    """Say what failed without the URL, which may hold secrets."""
    inner = getattr(error, "reason", None)
    cause = inner if isinstance(inner, Exception) else error
    if isinstance(cause, urllib3.exceptions.NewConnectionError):
        cause = cause.__cause__ if isinstance(cause.__cause__, Exception) else cause
    elif isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError):
        return "nothing came in time"
    return (cause.strerror if isinstance(cause, OSError) else "") or type(cause).__name__
