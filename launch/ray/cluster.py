"""A Ray cluster: connect to one by its address, or start one on this machine that ends with its owner.

    with own_cluster() as cluster, connected(cluster.address): ...     nothing of it is left afterwards
    with connected("auto"): ...                                        one that runs, left as it is

`launch.ray.installed.require_ray` comes first where the package may be missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest, InternalKVGetRequest
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub, NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from launch.ranks.environment import usable_cores
from launch.ranks.orphans import Guardian
from launch.ranks.processes import die_with_parent
from setformer_dist.core.errors import LaunchError

HEAD_MODULE = "launch.ray.head"
NAMESPACE = "setformer"
OBJECT_STORE_BYTES = 128 << 20
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_ADDRESS = "RAY_ADDRESS"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_HOME = Path(__file__).resolve().parents[2]
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
_START_S = 120.0  # imports from the storage of a busy cluster take their time
_END_S = 10.0
_REACH_S = 5.0
_LONGEST_BASE = 30  # bytes of TMPDIR: a socket's path has 107, and Ray takes some 70 of them


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        address: host:port.
        own: whether this process has started it, and ends it.
        environment: what a process must have in its environment to connect: how it proves who it is.
    """

    address: str
    own: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def authentication(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return how this process proves who it is, in words that leave Ray nothing to guess.

    By itself, Ray takes a token where it finds one and goes without where it does not, in each process anew.

    Args:
        environ: of this process; what it says of RAY_AUTH_MODE stays.

    Raises:
        LaunchError: it says of RAY_AUTH_MODE what Ray takes for "disabled" without a word.
    """
    if _MODE in environ:
        if environ[_MODE].lower() not in ("token", "disabled"):
            raise LaunchError(f"{_MODE}={environ[_MODE]!r} is no way to authenticate: set it to token or disabled")
        return {name: environ[name] for name in (_MODE, _TOKEN, _TOKEN_PATH) if name in environ}
    stored = Path.home() / ".ray" / "auth_token"
    given = {name: environ[name] for name in (_TOKEN, _TOKEN_PATH) if name in environ}
    return {_MODE: "token" if given or stored.is_file() else "disabled", **given}


@contextlib.contextmanager
def own_cluster(
    cpus: int | None = None, gpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[Cluster]:
    """Start a cluster of one node on this machine, for as long as the context lasts.

    It listens on the loopback interface alone, at free ports, and knows its owner by a token that nobody else has. It
    has no dashboard and reports nothing to anybody. However this process ends, its processes end and its files are
    removed within seconds. Call it from the main thread: its processes die with the thread that has started them.

    Args:
        cpus: that it lends; by default those of this machine.
        gpus: likewise.
        object_store_bytes: shared memory for objects.

    Raises:
        LaunchError: it cannot be started.
    """
    if len(tempfile.gettempdir()) > _LONGEST_BASE:
        raise LaunchError(
            f"TMPDIR ({tempfile.gettempdir()}) is too long for Ray's sockets: set it to a path of at most "
            f"{_LONGEST_BASE} characters"
        )
    environment = {_MODE: "token", _TOKEN: secrets.token_hex(32)}
    with Guardian() as guardian:
        words = ["--folder", str(guardian.folder), "--cpus", str(cpus or usable_cores())]
        words += ["--gpus", str(gpus)] if gpus is not None else []
        words += ["--object-store", str(object_store_bytes)]
        process = _start_head(words, environment)
        guardian.watch(process.pid)
        try:
            address = _address_of(process)
            # The address of the loopback interface is not to be taken for one of another.
            yield Cluster(address, True, {**environment, **_loopback()})
        finally:
            _end(process)


def _loopback() -> dict[str, str]:
    """Return what has Ray bind to 127.0.0.1 and take it for an address; by default it does that on a laptop alone."""
    return {_CLUSTERS: "0"}


def _start_head(words: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if name not in (_TOKEN_PATH, _ADDRESS)}
    path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", HEAD_MODULE, *words],
        env={**inherited, **environment, **_loopback(), **_QUIET, "RAY_worker_niceness": "0", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


def _address_of(process: subprocess.Popen[bytes]) -> str:
    """Wait until a head has said its address.

    Raises:
        LaunchError: it has ended instead, or says nothing.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    os.set_blocking(process.stdout.fileno(), False)
    limit = time.monotonic() + _START_S
    came = b""
    while time.monotonic() < limit:
        came += process.stdout.read() or b""
        if b"\n" in came:
            return came.decode().strip()
        if process.poll() is not None:
            lines = process.stderr.read().decode(errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
            raise LaunchError(f"Ray cannot be started on this machine: {said}")
        time.sleep(0.05)
    raise LaunchError(f"Ray did not start on this machine within {_START_S:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a head and all processes of its session."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # its owner has no more use for it
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    limit = time.monotonic() + _END_S
    while (left := _session(process.pid)) and time.monotonic() < limit:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    process.wait()
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def _session(session: int) -> list[int]:
    """Return the processes of a session that still run. Ray gives its workers groups of their own, not sessions."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
    return found


@contextlib.contextmanager
def connected(address: str, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Be a driver of a cluster for as long as the context lasts.

    Args:
        address: host:port, or "auto" for the one that runs on this machine or that RAY_ADDRESS names.
        environment: of a cluster of our own; by default what `authentication` finds.

    Raises:
        LaunchError: no cluster is there, it is of another version, or it does not take the token.
    """
    given = authentication() if environment is None else environment
    with _set({**given, **_QUIET}):
        found = _resolved(address)
        named = found if address == "auto" else address
        check_versions(named, cluster_versions(found, named))
        _check_sockets(found, named)
        try:
            _become_driver(found)
        except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes; each is a reason not to be connected
            ray.shutdown()
            said = " ".join(str(error).split())[:200]
            raise LaunchError(f"the Ray cluster at {named} cannot be used from here: {said}") from None
        try:
            yield Cluster(found, environment=given)
        finally:
            ray.shutdown()


def _become_driver(address: str) -> None:
    """Connect to a cluster, as a process of this machine.

    Ray keeps a machine's address in the folder of its session. If machines share that folder (`--temp-dir` on a shared
    file system), a driver takes the head's address for its own, and no actor can fetch its objects.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}
    ray.init(address=address, namespace=NAMESPACE, **quiet)
    if ray.util.get_node_ip_address() in _addresses_here():
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # sends nothing
        host, _, port = address.rpartition(":")
        way.connect((host, int(port)))
        own = way.getsockname()[0]
    if own in [node["NodeManagerAddress"] for node in ray.nodes()]:
        ray.shutdown()
        ray.init(address=address, namespace=NAMESPACE, _node_ip_address=own, **quiet)


@contextlib.contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """Set variables that Ray reads, and have it read them again: it does so once, when it is imported."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(_CLUSTERS) != "0"
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _resolved(address: str) -> str:
    """Return host:port of an address.

    Raises:
        LaunchError: it is none, or no cluster runs here.
    """
    told = ""
    if address == "auto":
        named = os.environ.get(_ADDRESS, "")
        address, told = (named, f"{_ADDRESS}=") if named not in ("", "auto") else (_here(), "")
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise LaunchError(f"{told}{address!r} is no address of a Ray cluster: give HOST:PORT, or auto")
    return str(services.canonicalize_bootstrap_address(address))


def _here() -> str:
    """Return host:port of the cluster that runs on this machine.

    Raises:
        LaunchError: none does, or several do and none of them is the one that `ray start` has noted.
    """
    running = sorted(services.find_gcs_addresses())
    if len(running) > 1 and services.find_bootstrap_address(None) is None:  # Ray would take any of them
        raise LaunchError(f"several Ray clusters run on this machine ({', '.join(running)}): give the HOST:PORT of one")
    try:
        found = services.canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise LaunchError(
            "no Ray cluster runs on this machine (auto): start one with ray start --head, or give its HOST:PORT"
        )
    return str(found)


def cluster_versions(address: str, named: str) -> tuple[str, str]:
    """Return the versions of Ray and of Python that a cluster was started with.

    Ray's own client would try for a minute and more, whatever the reason, and print each try.

    Args:
        address: host:port.
        named: the same, as the user knows it.

    Raises:
        LaunchError: nobody answers there, it is no Ray cluster, it does not take the token, or it takes none.
    """
    token = _token()
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            if token and _takes_anybody(channel):
                raise LaunchError(
                    f"the Ray cluster at {named} has no authentication, and this process has a token, with which Ray "
                    f"cannot use it: set {_MODE}=disabled, or start the cluster with {_MODE}=token"
                )
            found = json.loads(_metadata(channel, token))
            return str(found["ray_version"]), str(found["python_version"])
        except grpc.RpcError as error:
            raise LaunchError(_why_not(named, error)) from None
        except (ValueError, LookupError, TypeError):
            raise LaunchError(f"what answers at {named} does not say its version: is it a Ray cluster?") from None


def _token() -> Mapping[str, str]:
    """Return the header that proves who this process is; none without authentication.

    Raises:
        LaunchError: there is to be a token, and there is none.
    """
    try:
        return dict(AuthenticationTokenLoader.instance().get_token_for_http_header())
    except AuthenticationError:
        raise LaunchError(
            f"{_MODE} is token, and there is no token: set {_TOKEN}, or {_TOKEN_PATH} to a file that holds it, to that "
            "of the cluster"
        ) from None


def _metadata(channel: grpc.Channel, token: Mapping[str, str]) -> bytes:
    request = InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=ray_constants.KV_NAMESPACE_CLUSTER)
    header = [(name.lower(), value) for name, value in token.items()]
    return bytes(InternalKVGcsServiceStub(channel).InternalKVGet(request, timeout=_REACH_S, metadata=header).value)


def _takes_anybody(channel: grpc.Channel) -> bool:
    """Return whether a cluster answers without a token."""
    try:
        _metadata(channel, {})
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise
    return True


def check_versions(address: str, theirs: tuple[str, str]) -> None:
    """Check that this process has the versions of a cluster; Ray takes any difference for an error.

    Raises:
        LaunchError: it has not.
    """
    ours = (str(ray.__version__), sys.version.split()[0])
    for name, here, there in zip(("Ray", "Python"), ours, theirs, strict=True):
        if here != there:
            raise LaunchError(
                f"the Ray cluster at {address} has {name} {there}, and this process {name} {here}: install the same "
                "version here and on all nodes"
            )


def _check_sockets(address: str, named: str) -> None:
    """Check that this user may talk to the node of this machine; Ray would abort the process.

    Raises:
        LaunchError: the node is another user's.
    """
    token = [(name.lower(), value) for name, value in _token().items()]
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            nodes = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
                GetAllNodeInfoRequest(), timeout=_REACH_S, metadata=token
            )
        except grpc.RpcError as error:
            raise LaunchError(_why_not(named, error)) from None
    ours = _addresses_here()
    for node in nodes.node_info_list:
        if node.state != GcsNodeInfo.ALIVE or node.node_manager_address not in ours:
            continue
        for name in (node.object_store_socket_name, node.raylet_socket_name):
            if foreign(Path(name)):
                raise LaunchError(
                    f"the node of the Ray cluster at {named} on this machine belongs to another user, and takes no "
                    "drivers of this one: use a cluster of your own, or start this command as that user"
                )


def foreign(path: Path) -> bool:
    """Return whether a socket is there, and this user may not connect to it."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return not os.access(path, os.W_OK)


def _addresses_here() -> set[str]:
    return {each.address for interface in psutil.net_if_addrs().values() for each in interface}


def _why_not(address: str, error: grpc.RpcError) -> str:
    """Say in one sentence why a cluster does not answer, and what to do."""
    code, said = error.code(), " ".join(str(error.details()).split())
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return (
            f"the Ray cluster at {address} does not accept this process's token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, to that of the cluster"
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return (
            f"no Ray cluster answers at {address} ({said[:120]}): start one there with "
            f"ray start --head --port {address.rpartition(':')[2]}, or give the address of another"
        )
    return f"what answers at {address} is no Ray cluster ({code.name}: {said[:120]}): give the address of its head"


def main() -> int:
    """Be a driver of the cluster at the address that is the only argument, for a moment."""
    try:
        with connected(sys.argv[1]):
            return 0
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
