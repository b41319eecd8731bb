"""Start ranks from an interpreter that has imported everything: a fork takes a moment, an import 8 seconds of a core.

    supervisor or agent --socket--> server (imports once) --fork--> python -m launch.entry … (each rank, each attempt)

What runs is an ordinary process, with an id, signals, a session and an end of its own. It differs from a cold start by
what lies in memory, which its siblings share, and by its command line in `ps`. A machine with a GPU starts every rank
cold, as CUDA must not be forked; so does `launch.warm = false`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.ranks.environment import has_gpu
from setformer_dist.core.exits import leave
from setformer_dist.core.heartbeat import FD_VARIABLE

_NUMBER = 8  # bytes of a process id or an exit code on the way back
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_LOOK_S = 0.2
_HOME = Path(__file__).resolve().parents[2]

Server = subprocess.Popen[bytes]


def possible(environ: Mapping[str, str]) -> bool:
    """Return whether ranks may be forked here: Linux, and no GPU."""
    return sys.platform == "linux" and not has_gpu(environ)


def start_server(module: str, environ: Mapping[str, str], **options: Any) -> tuple[socket.socket, Server]:
    """Start a module that calls `serve`; return the socket for requests, and the process.

    Args:
        module: run with the server's end of the socket as its argument.
        environ: of the server, and of what it imports.
        options: of `subprocess.Popen`.
    """
    mine, its = socket.socketpair()
    # One thread each, libraries included: a process with threads cannot be forked safely.
    environment = {**environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    # DeepSpeed imports mlflow where it is installed, that pandas, and that pyarrow, whose allocator starts a thread.
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    path = os.pathsep.join(filter(None, (str(_HOME), environ.get("PYTHONPATH"))))
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(its.fileno())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[its.fileno()],
        start_new_session=True,  # Ctrl-C in a terminal is not for it
        **options,
    )
    its.close()
    return mine, server


def ask_for_process(requests: socket.socket, request: Mapping[str, object], descriptors: Sequence[int]) -> int:
    """Ask a server for a process; return the descriptor on which it tells the process's id, and then its end.

    Args:
        requests: from `start_server`.
        request: JSON, for the `begin` of `serve`.
        descriptors: the process's output, its errors, and others that it keeps.

    Raises:
        OSError: the server is gone.
    """
    status, its = os.pipe()
    body, remote = socket.socketpair()
    try:
        socket.send_fds(requests, [b"\0"], [remote.fileno(), *descriptors, its])
        remote.close()
        body.sendall(json.dumps(request).encode())
    except OSError:
        os.close(status)
        raise
    finally:
        for end in (remote, body):
            end.close()
        os.close(its)
    return status


class ForkServer:
    """The supervisor's end of a server of ranks; it ends when this process does.

    Args:
        environ: of the server, and of what it imports.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        die = functools.partial(die_with, os.getpid())
        self._requests, self._server = start_server(
            "launch.ranks.forkserver", environ, stderr=subprocess.DEVNULL, preexec_fn=die
        )

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        out: int,
        err: int,
        pulse: int,
        until: Callable[[], object],
    ) -> Forked | None:
        """Start a rank.

        Args:
            command: of a cold start, `python … -m MODULE ARGUMENTS`.
            env: of the rank.
            out: descriptor of its standard output.
            err: likewise of its errors.
            pulse: likewise of its heartbeat.
            until: asked several times a second while the server still imports; true where the rank is not wanted.

        Returns:
            The process; None where the server is gone, or the rank is not wanted any more.
        """
        args = list(command[list(command).index("-m") + 1 :])
        request = {"args": args, "env": dict(env), "cwd": str(Path.cwd())}
        try:
            status = ask_for_process(self._requests, request, [out, err, pulse])
        except OSError:
            return None
        try:
            while not select.select([status], [], [], _LOOK_S)[0]:
                if until():
                    self.close()  # it would still start the rank
                    raise EOFError
            return Forked(args, status)
        except EOFError:
            os.close(status)
            return None

    def close(self) -> None:
        """End the server, and what it has started."""
        self._requests.close()
        try:
            self._server.wait(5.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


class Forked:
    """A process that a server has forked; the part of `subprocess.Popen` that a host uses.

    Attributes:
        pid: its id.
        args: module and arguments.
        returncode: None while it runs, then the exit code or minus the number of a signal.
    """

    def __init__(self, args: Sequence[str], status: int) -> None:
        self.args = list(args)
        self.returncode: int | None = None
        self._status = status
        self.pid = self._number()

    def _number(self) -> int:
        data = b""
        while len(data) < _NUMBER and (more := os.read(self._status, _NUMBER - len(data))):
            data += more
        if len(data) < _NUMBER:
            raise EOFError("the server of ranks is gone")
        return int.from_bytes(data, "little", signed=True)

    def poll(self) -> int | None:
        """Return the exit code if it has ended."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            try:
                self.returncode = self._number()
            except EOFError:  # the server was killed, and its ranks with it
                self.returncode = -signal.SIGKILL
            os.close(self._status)
        return self.returncode

    def readable(self) -> int:
        """Return a descriptor that has something to read when it has ended."""
        return self._status

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that: no signal will come
        os._exit(1)


# ------------------------------------------------------------------------------------------------- the server's side


def serve(
    requests: socket.socket, preloaded: Sequence[str], begin: Callable[[dict[str, object], Sequence[int]], NoReturn]
) -> None:
    """Fork a process for each request until the other end is closed, and kill what then still runs.

    Args:
        requests: the server's end of the socket of `start_server`.
        preloaded: modules to import first.
        begin: becomes the process: of a request, and of the numbers of the descriptors that it keeps.
    """
    gc.disable()  # a million objects that stay, looked through a dozen times: 1 of 5 s
    for module in preloaded:
        importlib.import_module(module)
    gc.freeze()  # nor does a collection in a rank write to the memory that they share
    gc.enable()
    assert threads() == 1, "an import starts threads, with which a process cannot be forked safely"
    wake, waker = socket.socketpair()
    for end in (wake, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, wake], [], [])
        if wake in ready:
            wake.recv(4096)
            _report(running)
        if requests not in ready:
            continue
        mark, given, _, _ = socket.recv_fds(requests, 1, 5)
        if not mark:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        body, out, err, *kept, status = given
        with socket.socket(fileno=body) as sock:
            request = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
        pid = fork(
            lambda: begin(request, kept),  # noqa: B023 - called before the next request
            {0: os.open(os.devnull, os.O_RDONLY), 1: out, 2: err},
            kept,
        )
        for fd in (out, err, *kept):
            os.close(fd)
        running[pid] = status
        os.write(status, pid.to_bytes(_NUMBER, "little", signed=True))


def _begin_rank(server: int, request: dict[str, Any], kept: Sequence[int]) -> NoReturn:
    """Become a rank, `python -m args`, that dies with the server."""
    os.setsid()
    die_with(server)
    os.chdir(request["cwd"])
    env = {**request["env"], FD_VARIABLE: str(kept[0])}
    set_environment(env)
    name = f"rank {env.get('RANK', '')}"  # what ps and top show next to the server's command line
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)
    run_module(request["args"])


def threads() -> int:
    """Return the threads of this process, those of libraries included."""
    return len(list(Path("/proc/self/task").iterdir()))


def _report(running: dict[int, int]) -> None:
    """Tell the end of each process that has ended to the process that asked for it."""
    for pid in list(running):
        found, raw = os.waitpid(pid, os.WNOHANG)
        if found:
            status = running.pop(pid)
            code = os.waitstatus_to_exitcode(raw).to_bytes(_NUMBER, "little", signed=True)
            with contextlib.suppress(BrokenPipeError):  # no process waits for it any more
                os.write(status, code)
            os.close(status)


def fork(begin: Callable[[], NoReturn], fds: dict[int, int], kept: Sequence[int] = ()) -> int:
    """Fork a process that has these descriptors and no others, default signals, and runs `begin`; return its id.

    Args:
        begin: never returns; how it ends is the process's end.
        fds: its 0, 1 and 2 where they are not those of this process. That of /dev/null is closed here.
        kept: descriptors that keep their numbers.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    gc.freeze()  # objects of this process that own descriptors must not be collected there, and close others' numbers
    # A signal to a process that still has our handlers would be lost; so it waits until there are default ones.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(fds[0])
        return pid
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):
                ours = {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL)
                ignored = number in (signal.SIGPIPE, signal.SIGXFSZ)  # as Python has it at its start
                signal.signal(number, signal.SIG_IGN if ignored else ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for place, fd in fds.items():
            os.dup2(fd, place)
            if place:  # the stream that is inherited believes to have another kind of file
                _open_stream(place)
        edges = [2, *sorted(kept), 1 << 16]
        for below, above in itertools.pairwise(edges):
            os.closerange(below + 1, above)
        begin()
    except BaseException:  # noqa: BLE001 - any error ends here
        traceback.print_exc()
    os._exit(1)


def _open_stream(place: int) -> None:
    """Recreate standard output (1) or error (2) as an interpreter does at its start."""
    lines = place == 2 or os.isatty(place)
    stream = open(  # noqa: SIM115 - it is a descriptor, and open as long as the process
        place,
        "w",
        buffering=1 if lines else -1,
        encoding="utf-8",
        errors="backslashreplace" if place == 2 else "strict",
        closefd=False,
    )
    setattr(sys, "stderr" if place == 2 else "stdout", stream)


def set_environment(env: Mapping[str, str]) -> None:
    """Have this environment and no other."""
    os.environ.clear()
    os.environ.update(env)


def run_module(args: Sequence[str]) -> NoReturn:
    """Run a module as the interpreter would, from its start to its exit code."""
    sys.argv = list(args)
    sys.modules.pop(args[0], None)  # it is run as the main module, not imported
    try:
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException:  # noqa: BLE001 - any error ends here
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    leave(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, ("launch.entry",), functools.partial(_begin_rank, os.getpid()))
