"""Who may read and act, decided before anything else of a request is looked at.

    Host         an IP address, localhost, this machine's name or one of queue.toml; a name of an attacker that resolves
                 to this machine (DNS rebinding) is refused
    no token     everybody who can reach the page may read (it listens on loopback alone), nobody may act
    a token      everything but the login form needs it: as a bearer, or as a session that the login form has begun
    acting       POST alone. The JSON API wants the bearer, which no browser sends by itself; a form wants the session,
                 its CSRF token, and an Origin that is the page's own

The token is compared in constant time. A session is a random number in a cookie, of which the server keeps a hash.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import time
import urllib.parse
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 256
LARGEST_BODY = 4 << 20  # bytes
_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,300}")
OPEN = ("/login", "/files/")  # what needs no token

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer", a form would send the Origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


@dataclass
class Session:
    """What a login began.

    Attributes:
        csrf: stands in every form.
        ends: monotonic time.
        said: one sentence that the next page shows.
    """

    csrf: str
    ends: float
    said: str = ""


@dataclass
class Access:
    """The rules of one page.

    Attributes:
        token: None for a page that can only be read.
        names: host names under which it may be asked for, besides IP addresses and localhost.
        cookie: name of the session's cookie.
    """

    token: str | None
    names: frozenset[str] = frozenset()
    cookie: str = "setformer_queue"
    _sessions: OrderedDict[str, Session] = field(default_factory=OrderedDict)

    def is_token(self, given: str) -> bool:
        """Return whether a text is the token; takes the same time wherever they differ."""
        return self.token is not None and hmac.compare_digest(_hash(given), _hash(self.token))

    def begin(self) -> str:
        """Begin a session; return the value of its cookie."""
        value = secrets.token_urlsafe(32)
        self._sessions[_hash(value)] = Session(secrets.token_urlsafe(32), time.monotonic() + _SESSION_S)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return value

    def session(self, cookie: str | None) -> Session | None:
        """Return the session of a cookie's value, None where there is none or it is over."""
        found = self._sessions.get(_hash(cookie or ""))
        return found if found is not None and time.monotonic() < found.ends else None

    def end(self, cookie: str | None) -> None:
        """End a session."""
        self._sessions.pop(_hash(cookie or ""), None)

    def is_own_name(self, host: str) -> bool:
        """Return whether a Host header names this server."""
        if not _HOST.fullmatch(host):
            return False
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in ("localhost", *self.names) or _is_address(name)


def own_names() -> set[str]:
    """Return the names of this machine."""
    return {socket.gethostname().lower(), socket.getfqdn().lower()}


def is_csrf(session: Session, given: str) -> bool:
    """Return whether a form's token is the session's."""
    return hmac.compare_digest(_hash(given), _hash(session.csrf))


class Guard:
    """The ASGI application in front of all others; applies the rules and adds the headers of `HEADERS`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        if (refused := self._refusal(scope, headers)) is not None:
            await _answer(with_headers, scope["path"], *refused)
            return
        await self._app(scope, _bounded(receive), with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Return status and sentence for a request that goes no further; otherwise note its session in the scope."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.is_own_name(hosts[0]):
            return 421, "this page is asked for under a name that it does not know: add it to page.names of queue.toml"
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > LARGEST_BODY:
            return 413, f"a request has at most {LARGEST_BODY >> 20} MiB"
        state = scope.setdefault("state", {})
        cookie = cookie_parser(headers.get("cookie", "")).get(self._access.cookie)
        session, bearer = self._access.session(cookie), self._bears(headers)
        state.update(session=session, cookie=cookie, acts=session is not None, bearer=bearer)
        reads, path = scope["method"] in ("GET", "HEAD"), scope["path"]
        is_open = any(path == name or (name.endswith("/") and path.startswith(name)) for name in OPEN)
        if self._access.token is None:
            return None if reads else (403, "this page is read-only: start it with a token, and it may act")
        if not (is_open or session or bearer):
            return 401, "this page wants its token: log in, or send it as a bearer"
        if reads:
            return None
        if path.startswith("/api/"):
            return None if bearer else (403, "the JSON API acts for a bearer of the token alone")
        if headers.get("origin", "").partition("://")[2] != hosts[0]:
            return 403, "this form was not sent by the page itself: open the page, and send it again"
        return None

    def _bears(self, headers: Headers) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._access.is_token(value.strip())


async def _answer(send: Send, path: str, status: int, said: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    body = said.encode() + b"\n"
    if path.startswith("/api/"):
        headers, body = [(b"content-type", b"application/json")], json.dumps({"error": said}).encode()
    elif status == 401 and path != "/metrics":
        status, headers, body = 303, [(b"location", b"/login")], b""
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _bounded(receive: Receive) -> Receive:
    """Return `receive` that ends a request whose body is longer than it may be, whatever its headers say."""
    came = 0

    async def bounded() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        return message if came <= LARGEST_BODY else {"type": "http.disconnect"}

    return bounded


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
