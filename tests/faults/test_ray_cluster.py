"""A Ray cluster of our own: what it listens on, who may connect, and that nothing of it outlives its owner."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from ray.core.generated.gcs_service_pb2 import InternalKVGetReply
from ray.core.generated.gcs_service_pb2_grpc import (
    InternalKVGcsServiceServicer,
    add_InternalKVGcsServiceServicer_to_server,
)

from launch.ray.cluster import authentication, check_versions, connected, foreign, own_cluster
from launch.ray.installed import require_ray
from launch.testing.commands import ROOT, running
from setformer_dist.core.errors import LaunchError

HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # 127.0.0.1 is meant

# Starts a cluster, is its driver, says where it is, and waits.
OWNER = """
import os, sys, ray
from launch.ray.cluster import connected, own_cluster
with own_cluster(cpus=2) as cluster, connected(cluster.address, cluster.environment):
    print(cluster.address, cluster.environment["RAY_AUTH_TOKEN"], int(ray.cluster_resources()["CPU"]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.communicate()


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def scratch_of(processes: list[psutil.Process]) -> Path:
    head, *_ = running(processes, "launch.ray.head")
    words = head.cmdline()
    return Path(words[words.index("--folder") + 1])


def all_gone(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        left = running(processes)
        if not left:
            return []
        time.sleep(0.1)
    return left


@pytest.mark.parametrize("ended", ["left", "SIGKILL"])
def test_nothing_of_a_cluster_outlives_its_owner(owner, tmp_path, ended):
    address, token, cpus = owner.stdout.readline().split()
    assert cpus == "2"
    processes = descendants(owner.pid)
    names = " ".join(p.name() for p in processes)
    assert "gcs_server" in names
    assert "raylet" in names
    folder = scratch_of(processes)
    assert folder.is_dir()
    if ended == "left":
        # It is nobody else's: it listens on the loopback interface alone, and takes no other token.
        listening = [
            c.laddr.ip for p in running(processes) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        ]
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        assert not any(token in " ".join(p.cmdline()) for p in running(processes))
        with (
            pytest.raises(LaunchError, match="does not accept this process's token"),
            connected(
                address,
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            ),
        ):
            pass
        owner.communicate()
        assert owner.returncode == 0
        limit_s = 0.0
    else:
        owner.send_signal(signal.SIGKILL)
        limit_s = 10.0
    assert not all_gone(processes, limit_s + 1.0)
    limit = time.monotonic() + 5
    while folder.exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not folder.exists()
    assert not (tmp_path / ".ray").exists()  # no token is left for others to find
    assert not list(Path("/dev/shm").glob("plasma*"))


def test_a_cluster_that_cannot_start_says_so(monkeypatch):
    with (
        pytest.raises(LaunchError, match=r"Ray cannot be started on this machine: .*object"),
        own_cluster(cpus=1, object_store_bytes=1),
    ):
        pass


def test_the_length_of_a_temporary_folder_is_told(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 60)
    with pytest.raises(LaunchError, match="set it to a path of at most"), own_cluster():
        pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 .*: start one there with ray start --head --port 1"),
        ("nowhere.invalid:6379", "no Ray cluster answers at nowhere.invalid:6379"),
        ("here", "'here' is no address of a Ray cluster: give HOST:PORT, or auto"),
        ("here:0", "'here:0' is no address of a Ray cluster"),
        ("ray://127.0.0.1:10001", "'ray://127.0.0.1:10001' is no address of a Ray cluster: give HOST:PORT, or auto"),
        ("here:70000", "'here:70000' is no address of a Ray cluster"),
    ],
)
def test_an_address_where_no_cluster_is(address, said):
    with pytest.raises(LaunchError, match=said), connected(address):
        pass


@pytest.mark.parametrize("named", ["ray://127.0.0.1:10001", "here"])
def test_an_address_in_the_environment_is_named(named, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", named)
    with pytest.raises(LaunchError, match=f"RAY_ADDRESS='{named}' is no address of a Ray cluster"), connected("auto"):
        pass


def test_one_of_several_clusters_is_not_taken_by_chance(tmp_path):
    """Ray knows the clusters of a machine by the command lines of their nodes, whoever has started them."""
    with contextlib.ExitStack() as stack:
        for address in ("192.0.2.7:1", "192.0.2.7:2"):
            words = ["raylet", "-c", "import sys; sys.stdin.read()", f"--gcs-address={address}"]
            stack.enter_context(
                subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE, start_new_session=True)
            )
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        found = subprocess.run(
            [sys.executable, "-P", "-m", "launch.ray.cluster", "auto"],
            env={**environment, "RAY_TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.returncode == 5
    assert "several Ray clusters run on this machine" in found.stderr
    assert "192.0.2.7:1, 192.0.2.7:2" in found.stderr


@pytest.fixture
def open_folder():
    """A folder that other users may enter, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="sf-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_the_socket_of_another_users_node_is_told(open_folder):
    """Ray aborts the process of a driver that may not connect to it."""
    theirs, closed = open_folder / "socket", open_folder / "closed"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(theirs))
    theirs.chmod(0o755)
    closed.mkdir(0o700)
    assert not foreign(theirs)
    assert not foreign(open_folder / "nosuch")
    if os.getuid():
        pytest.skip("only root can become another user")
    child = os.fork()
    if not child:
        os.setuid(65534)
        os._exit(foreign(theirs) + 2 * foreign(closed / "socket") + 4 * foreign(open_folder / "nosuch"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_what_is_no_cluster_is_told_from_one():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        environment = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LaunchError, match=f"no Ray cluster answers at {address}"), connected(address, environment):
            pass
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_TOKEN_PATH": "nosuch"}])
def test_a_token_that_is_not_there_is_told(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(LaunchError, match="RAY_AUTH_MODE is token, and there is no token: set RAY_AUTH_TOKEN"),
        connected("127.0.0.1:1", {"RAY_AUTH_MODE": "token", **given}),
    ):
        pass


class OpenStore(InternalKVGcsServiceServicer):
    """Answers anybody, as the head of a cluster without authentication does."""

    def InternalKVGet(self, request, context):  # noqa: N802 - Ray's name
        versions = {"ray_version": ray.__version__, "python_version": sys.version.split()[0]}
        return InternalKVGetReply(value=json.dumps(versions).encode())


def test_a_token_is_not_shown_to_a_cluster_that_takes_none():
    """Ray's workers there would end without a word, and the token would have gone to whoever listens."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    add_InternalKVGcsServiceServicer_to_server(OpenStore(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with (
            pytest.raises(LaunchError, match="has no authentication, and this process has a token"),
            connected(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, **HERE}),
        ):
            pass
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("theirs", [("2.9.0", "3.11.0"), ("2.60.0", "3.8.1")])
def test_versions_that_differ(theirs):
    ours = (ray.__version__, sys.version.split()[0])
    check_versions("a:1", ours)
    theirs = (theirs[0], ours[1]) if theirs[0] != ours[0] else theirs
    with pytest.raises(LaunchError, match=r"the Ray cluster at a:1 has (Ray 2.9.0|Python 3.8.1), and this process"):
        check_versions("a:1", theirs)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"Ray is not installed: pip install 'setformer_dist\[ray\]'"):
        require_ray()


def test_authentication_leaves_nothing_to_guess(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert authentication({}) == {"RAY_AUTH_MODE": "disabled"}
    assert authentication({"RAY_AUTH_TOKEN": "a"}) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a"}
    assert authentication({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "a"})["RAY_AUTH_MODE"] == "disabled"
    with pytest.raises(LaunchError, match="RAY_AUTH_MODE='tokn' is no way to authenticate: set it to token or"):
        authentication({"RAY_AUTH_MODE": "tokn"})  # Ray would go without
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("b")
    assert authentication({}) == {"RAY_AUTH_MODE": "token"}
