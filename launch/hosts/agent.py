"""One host's end of a run: it starts its ranks, tells of their lives, and ends them when nobody listens any more.

    python -m launch.hosts.agent      a supervisor starts it, on its own machine or behind ssh, srun or any prefix

It speaks JSON lines over its standard input and output. There is no listening port, no daemon and no file: when the
pipe ends, or nothing is heard for a while, the ranks are killed and the agent ends. torch is not imported.

    comes   {"do": "warm" | "start" | "terminate" | "stacks" | "kill" | "listen" | "reach" | "look" | "forget" | "code",
            ...}, {"alive": true}
    goes    {"is": "facts" | "beats" | "asked" | "ended" | "killed" | "output" | "answer", ...}
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch.hosts.facts import facts
from launch.hosts.wire import ALIVE_S, Message, Wire, alive_s
from launch.ranks import forkserver
from launch.ranks.environment import rank_environment
from launch.ranks.forkserver import ForkServer
from launch.ranks.network import interface_of
from launch.ranks.processes import LocalHost, LocalRank, rank_command
from launch.ranks.signals import Received, stop_signals
from launch.record.checkout import codes_of
from setformer_dist.core.errors import LaunchError
from setformer_dist.core.files import read_plain

SILENCE_S = 60.0  # until the supervisor says otherwise
_REACH_S = 10.0
_CHUNK = 1 << 16


class Agent:
    """Answers one supervisor."""

    def __init__(self, wire: Wire, received: Received) -> None:
        self._wire = wire
        self._received = received
        self._host: LocalHost | None = None
        self._told: set[int] = set()
        self._silence_s = SILENCE_S
        self._listening: socket.socket | None = None
        self._outputs: dict[int, int] = {}  # descriptor of rank 0's output -> 1 or 2
        self._beat_s, self._beaten_at = ALIVE_S, 0.0
        self._asked = False
        self._server: ForkServer | None = None
        self._slow: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def serve(self) -> None:
        """Serve until the supervisor goes away."""
        self._wire.send({"is": "facts", **facts()})
        while True:
            self._received.wait(ALIVE_S / 2, [0, *self._outputs])
            messages = self._wire.receive()  # first: what came while ranks were started is no silence
            if self._wire.ended or self._wire.silence() > self._silence_s:
                break
            for message in messages:
                self._obey(message)
            self._forward_output()
            self._tell_of_ranks()
            while not self._slow.empty():
                self._wire.send(self._slow.get())
            if self._received.stop and not self._asked:  # the supervisor decides what that means
                self._asked = True
                self._wire.send({"is": "asked", "signal": self._received.stop[0]})
            self._wire.show_life()
        self.close()

    def close(self) -> None:
        """End whatever this agent has started."""
        if self._host is not None:
            self._host.close()
            self._host = None
        self._stop_listening()
        for descriptor in self._outputs:
            os.close(descriptor)
        self._outputs = {}

    def end_server(self) -> None:
        """End the interpreter from which ranks are forked."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _stop_listening(self) -> None:
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # whoever waits in accept wakes up
            self._listening.close()
            self._listening = None

    def _obey(self, message: Message) -> None:
        do = message.get("do")
        if do is None:
            return
        acts: dict[str, Callable[[Message], dict[str, object] | None]] = {
            "warm": self._warm,
            "start": self._start,
            "terminate": lambda _: self._with_ranks(LocalHost.terminate),
            "stacks": lambda _: self._with_ranks(LocalHost.write_stacks),
            "kill": self._kill,
            "listen": self._listen,
            "reach": _reach,
            "look": _look,
            "forget": _forget,
            "code": self._code,
        }
        try:
            answer = acts[do](message)
        except (LaunchError, OSError) as error:
            answer = {"error": str(error)}
        if answer is not None:
            self._wire.send({"is": "answer", "to": do, **(answer or {"done": True})})

    def _with_ranks(self, act: Callable[[LocalHost], None]) -> None:
        if self._host is not None:
            act(self._host)

    def _start(self, message: Message) -> dict[str, object]:
        self.close()
        self._silence_s, self._beat_s = float(message["silence_s"]), float(message["beat_s"])
        self._wire.alive_s = alive_s(self._silence_s)
        self._told = set()
        ranks = range(*message["ranks"])
        base = rank_environment(len(ranks), 0, None, {**os.environ, **message["env"]}) | message["own"]
        log_dir = Path(message["log_dir"])
        log_dir.mkdir(parents=True, exist_ok=True)
        writing = self._open_outputs() if 0 in ranks else None
        if message["warm"]:
            self._begin_server(base)
        try:
            self._host = LocalHost(
                rank_command(message["args"], message["module"]),
                ranks,
                base,
                log_dir,
                output=writing,
                server=self._server,
                until=self._unwanted,
            )
        finally:
            for descriptor in writing or ():
                os.close(descriptor)
        return {"ranks": [{"rank": m.rank, "log": str(m.log), "pid": m.process.pid} for m in self._host.members]}

    def _warm(self, message: Message) -> None:
        """Begin to import what ranks need, long before they start: a host that stands by then takes part at once."""
        self._begin_server(rank_environment(1, 0, None, {**os.environ, **message["env"]}))

    def _begin_server(self, base: dict[str, str]) -> None:
        if self._server is None and forkserver.possible(base):
            self._server = ForkServer(base)

    def _unwanted(self) -> bool:
        """Show life while ranks are started, and return whether nobody is there to see it."""
        self._wire.show_life()
        return self._wire.hung_up()

    def _open_outputs(self) -> tuple[int, int]:
        (out, out_write), (err, err_write) = os.pipe(), os.pipe()
        self._outputs = {out: 1, err: 2}
        for descriptor in self._outputs:
            os.set_blocking(descriptor, False)
        return out_write, err_write

    def _kill(self, message: Message) -> None:
        if self._host is not None:
            self._host.kill()
        self._forward_output()
        self._tell_of_ranks()
        self._wire.send({"is": "killed"})

    def _listen(self, message: Message) -> dict[str, object]:
        """Hold a port for the rendezvous until the ranks start."""
        self._stop_listening()
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listening.bind((message["address"], message.get("port") or 0))
        self._listening.listen(1024)
        threading.Thread(target=_swallow, args=(self._listening,), daemon=True).start()
        return {"port": self._listening.getsockname()[1], "interface": interface_of(message["address"])}

    def _code(self, message: Message) -> None:
        """Find the state of the code that runs here. Aside: git may take longer than a silence may last."""

        def work() -> None:
            self._slow.put({"is": "answer", "to": "code", "packages": codes_of(message["imports"])})

        threading.Thread(target=work, daemon=True).start()

    def _forward_output(self) -> None:
        for descriptor, stream in list(self._outputs.items()):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(descriptor, _CHUNK):
                    self._wire.send({"is": "output", "stream": stream, "text": data.decode(errors="replace")})
                os.close(descriptor)
                del self._outputs[descriptor]

    def _tell_of_ranks(self) -> None:
        if self._host is None:
            return
        self._host.poll()
        ended = [m for m in self._host.members if m.ended_at is not None and m.rank not in self._told]
        if ended or time.monotonic() - self._beaten_at > self._beat_s:
            self._beaten_at = time.monotonic()
            running = [m for m in self._host.members if m.rank not in self._told]
            self._wire.send({"is": "beats", "ranks": [_beat(m) for m in running]})
        if ended:
            self._told.update(m.rank for m in ended)
            told = [[m.rank, m.code, m.said(), m.last_lines()] for m in ended]
            self._wire.send({"is": "ended", "ranks": told})


def _beat(member: LocalRank) -> list[object]:
    beat, use = member.beat(), member.use()
    return [member.rank, beat.count, beat.step, beat.phase, beat.age, beat.stop, member.is_suspended(),
            member.memory_mib(), use.cores, use.gpu]  # fmt: skip


def _swallow(listening: socket.socket) -> None:
    """Take what others send, until nobody listens any more; one byte says that all has come."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_REACH_S)
                while connection.recv(_CHUNK):
                    pass
                connection.sendall(b"\0")


def _reach(message: Message) -> dict[str, object]:
    """Try to reach another host's port, and tell by which interface that goes."""
    begun = time.monotonic()
    address, port = message["address"], message["port"]
    try:
        with socket.create_connection((address, port), timeout=_REACH_S) as connection:
            mine = connection.getsockname()[0]
            seconds = time.monotonic() - begun
            bulk = _sent(connection, message.get("bulk", 0))
    except OSError as error:
        raise LaunchError(f"{address} port {port} cannot be reached: {error.strerror or error}") from None
    interface = "lo" if mine.startswith("127.") or mine == address else interface_of(mine)
    return {"address": mine, "interface": interface, "seconds": seconds, **bulk}


def _sent(connection: socket.socket, count: int) -> dict[str, object]:
    """Send bytes for some seconds at most, until the other end, which counts them, has them all."""
    if not count:
        return {}
    begun, sent, block = time.monotonic(), 0, b"\0" * _CHUNK
    while sent < count and time.monotonic() - begun < _REACH_S:
        connection.sendall(block)
        sent += len(block)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    return {"bulk_bytes": sent, "bulk_seconds": time.monotonic() - begun}


def _look(message: Message) -> dict[str, object]:
    """Make a file in the run's folder, see which ones other hosts have made there, and read the run config."""
    folder, config = Path(message["folder"]), Path(message["config"]) if message["config"] else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / message["name"]).touch()
        names = sorted(path.name for path in folder.glob(f"{message['prefix']}*"))
    except OSError as error:
        raise LaunchError(f"run folder {folder.absolute()} cannot be written: {error.strerror}") from None
    digest = None
    if config is not None:
        try:
            digest = hashlib.sha256(read_plain(config)).hexdigest()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise LaunchError(f"run config {config.absolute()} cannot be read: {why}") from None
    seen = hashlib.sha256("\n".join(names).encode()).hexdigest()  # thousands of hosts see thousands of names
    return {"seen": seen, "config": digest}


def _forget(message: Message) -> dict[str, object]:
    """Remove the file that `_look` has made here."""
    with contextlib.suppress(OSError):
        (Path(message["folder"]) / message["name"]).unlink()
    return {}


def main() -> int:
    """Serve the supervisor at the other end of standard input and output."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--directory", default=".", help="where the ranks work")
    directory = parser.parse_args().directory
    try:
        os.chdir(directory)
    except OSError as error:
        print(f"there is no folder {directory} here ({error.strerror})", file=sys.stderr)
        return LaunchError.exit_code
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    # Nothing but messages may reach standard output: ranks and libraries get standard error instead.
    out = os.dup(1)
    os.dup2(2, 1)
    with stop_signals() as received:
        agent = Agent(Wire(0, out), received)
        try:
            agent.serve()
        finally:
            agent.close()
            agent.end_server()
    return 0


if __name__ == "__main__":
    sys.exit(main())
