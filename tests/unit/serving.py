"""A real http server over a folder, which can misbehave on request."""

import socket
import threading
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves `folder`.

    Attributes:
        ranges: whether ranges are served.
        no_head: answer HEAD with 403, as signatures for GET alone do.
        say_length: whether answers have a Content-Length.
        faults: path -> what to do to the next requests for it, in this order: ("status", code[, headers]),
            ("stall",), ("short", bytes) breaks off after so many bytes, ("slow", seconds) takes so long, ("reset",).
        always: path -> one such fault for every request.
        log: (method, path, range header) of every request.
        secrets: Authorization headers seen.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.ranges, self.no_head, self.say_length = True, False, True
        self.faults, self.always, self.log, self.secrets = defaultdict(list), {}, [], []
        self.ended = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, name, method="GET"):
        return [entry for entry in self.log if entry[0] == method and entry[1] == f"/{name}"]

    def handle_error(self, request, client_address):
        """Say nothing of connections that clients break."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else the second waits 40 ms for an acknowledgement

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.log.append((self.command, path, self.headers.get("Range")))
        if secret := self.headers.get("Authorization"):
            server.secrets.append(secret)
        if not body and server.no_head:
            return self._status(403)
        fault = server.always.get(path) or (server.faults[path].pop(0) if body and server.faults[path] else None)
        if fault and fault[0] == "status":
            return self._status(*fault[1:])
        if fault and fault[0] == "reset":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault and fault[0] == "stall":
            server.ended.wait(20)
            return self.connection.shutdown(socket.SHUT_RDWR)
        file = server.folder / path.lstrip("/")
        if not file.is_file():
            return self._status(404)
        data, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        asked = self.headers.get("Range")
        if asked and server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            if first >= len(data):
                return self._status(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.say_length:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if body and fault and fault[0] == "short":
            self.wfile.write(data[: fault[1]])
            self.wfile.flush()
            return self.connection.shutdown(socket.SHUT_RDWR)
        if body and fault and fault[0] == "slow":
            for piece in range(30):
                server.ended.wait(fault[1] / 30)
                self.wfile.write(data[len(data) * piece // 30 : len(data) * (piece + 1) // 30])
                self.wfile.flush()
        elif body:
            self.wfile.write(data)
        return None

    def _status(self, code, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def served(folder):
    """Yield a server of a folder, gone afterwards."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
