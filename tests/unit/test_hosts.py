"""Which hosts, how they are reached, what they say over their pipes, and where they meet."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from launch.hosts.channel import Channel, Command
from launch.hosts.check import code_faults, folder_faults
from launch.hosts.config import LaunchConfig
from launch.hosts.facts import facts
from launch.hosts.link import Link, RemoteHost, ask, close_all, greeted
from launch.hosts.meeting import arrange
from launch.hosts.names import HostSpec, of_slurm, parse_hosts, read_hostfile
from launch.hosts.reach import agent_command, opener, travelling
from launch.hosts.wire import Wire
from launch.machine.hosts import survey
from launch.record.checkout import codes_of
from setformer_dist.core.errors import LaunchError


def names(hosts: list[HostSpec]) -> list[tuple[str, int]]:
    return [(host.name, host.slots) for host in hosts]


def test_hosts_of_the_command_line() -> None:
    assert names(parse_hosts("a:8, b:4,me@node-3.local")) == [("a", 8), ("b", 4), ("me@node-3.local", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:8,a:8", "names host a twice"),
        ("a:0", "has 0 slots"),
        ("a:-1", "has -1 slots"),
        ("a:x", "'x' is not a number of slots"),
        ("", "'' is not a host name"),
        ("-oProxyCommand=x:1", "is not a host name"),
        ("a;rm:1", "is not a host name"),
        ("a,,b", "'' is not a host name"),
    ],
)
def test_hosts_that_are_none(text: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        parse_hosts(text)


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hostfile").write_text(text)
    return folder / "hostfile"


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# ours\nworker-0 slots=4\n\nworker-1 slots=4  # new\nworker-2 slots = 2\n")
    assert names(read_hostfile(path)) == [("worker-0", 4), ("worker-1", 4), ("worker-2", 2)]
    assert names(read_hostfile(path, include="worker-1:0,2@worker-2")) == [("worker-1", 2), ("worker-2", 2)]
    assert names(read_hostfile(path, exclude="worker-1@worker-0:3")) == [("worker-0", 3), ("worker-2", 2)]
    assert names(read_hostfile(path, include="worker-1:0@worker-1:2,0")) == [("worker-1", 2)]
    windows = hostfile(tmp_path, "\ufeffa slots=2 \t\r\nb slots=1\x0bc slots=9\r\n\u2028\n")
    assert names(read_hostfile(windows)) == [("a", 2), ("b", 1)]


def test_a_hostfile_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LaunchError, match="cannot be read: is not a plain file"):
        read_hostfile(tmp_path / "pipe")


def test_a_hostfile_without_end_is_refused() -> None:
    with pytest.raises(LaunchError, match="is not a plain file"):
        read_hostfile(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("a\n", {}, "line 1: 'a' is not of the form HOST slots=N"),
        ("a slots=1\na slots=2\n", {}, "names host a twice"),
        ("", {}, "names no host"),
        ("a slots=0\n", {}, "host a has 0 slots: give 1 or more"),
        ("a slots=-1\n", {}, "host a has -1 slots: give 1 or more"),
        ("a slots=99999\n", {}, "host a has 99999 slots: give at most 4096"),
        ("a slots=99999999999999999999\n", {}, "'99999999999999999999' is not a number of slots"),
        ("a slots=1_0\n", {}, "'1_0' is not a number of slots"),
        ("a slots=\u0663\n", {}, "is not a number of slots"),
        ("2001:db8::1 slots=2\n", {}, "2001:db8::1 is an IPv6 address: give it a name"),
        ("[fe80::1%eth0] slots=2\n", {}, "is an IPv6 address: give it a name"),
        ("a slots=2\n", {"include": "b"}, "--include names host 'b', which is not in the hostfile"),
        ("a slots=2\n", {"include": "a:2"}, "has slots 0 to 1, but 2 is named"),
        ("a slots=2\n", {"exclude": "a"}, "leaves no host"),
        ("a slots=2\n", {"exclude": "a", "include": "a"}, "give one of them"),
    ],
)
def test_hostfiles_that_are_none(tmp_path: Path, text: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        read_hostfile(hostfile(tmp_path, text), **options)
    with pytest.raises(LaunchError, match="cannot be read"):
        read_hostfile(tmp_path / "nothing")


def test_hosts_of_an_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert of_slurm({}) is None
    found = of_slurm({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4(x2),2"})
    assert found is not None
    assert names(found) == [("n1", 4), ("n2", 4), ("n3", 2)]
    with pytest.raises(LaunchError, match="does not fit the 3 hosts"):
        of_slurm({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4"})


def test_how_an_agent_is_reached() -> None:
    here = agent_command("localhost", None)
    assert sys.executable in here
    assert agent_command("far", None)[:2] == ["ssh", "-T"]
    assert agent_command("far", None)[-2] == "far"
    assert agent_command("far", "srun")[:3] == ["srun", "--nodelist", "far"]
    assert agent_command("far", "docker exec -i {host}")[:5] == ["docker", "exec", "-i", "far", "env"]
    assert len(agent_command("far", "ssh -p 7 {host}")) == 5  # one word for the shell at the other end
    with pytest.raises(LaunchError, match="has no place for the host's name"):
        agent_command("far", "docker exec")
    with pytest.raises(LaunchError, match="cannot be split"):
        agent_command("far", "a ' {host}")


def test_what_travels() -> None:
    environ = {"NCCL_IB_HCA": "mlx5", "HOME": "/root", "SECRET": "s3", "CUDA_VISIBLE_DEVICES": "1", "PYTHONPATH": "/x"}
    assert travelling((), environ) == {"NCCL_IB_HCA": "mlx5"}
    assert travelling(("SECRET", "A=b=c"), environ) == {"NCCL_IB_HCA": "mlx5", "SECRET": "s3", "A": "b=c"}
    with pytest.raises(LaunchError, match=r"launch\.env names MISSING, which is not set here"):
        travelling(("MISSING",), environ)
    with pytest.raises(ValueError, match="'not a name' is no name of an environment variable"):
        LaunchConfig(env=("not a name=1",))


def piped() -> tuple[Wire, Wire]:
    (a, b), (c, d) = os.pipe(), os.pipe()
    return Wire(a, d), Wire(c, b)


def test_a_wire_carries_messages_and_keeps_banners_apart() -> None:
    one, other = piped()
    os.write(other._write, b'Welcome to node 7!\n{"json": 1}\nprompt$ ')
    other.send({"is": "facts", "text": "ä\n"})
    assert one.receive() == [{"is": "facts", "text": "ä\n"}]
    assert list(one.strange) == ["Welcome to node 7!", '{"json": 1}']
    assert one.receive() == []
    assert not one.ended
    os.close(other._write)
    assert one.receive() == []
    assert one.ended


def test_a_wire_never_waits_for_a_peer_that_does_not_read() -> None:
    one, _ = piped()
    begun = time.monotonic()
    for _ in range(100):
        one.send({"text": "x" * 100_000})
    assert time.monotonic() - begun < 5
    assert len(one._kept) <= 1 << 20


def test_an_agent_tells_of_its_host_and_ends_with_its_pipe(tmp_path: Path) -> None:
    commands = [Command(name, agent_command("localhost", None)) for name in ("x", "y")]
    links = [Link(name, command, 20.0) for name, command in zip(("x", "y"), commands, strict=True)]
    try:
        greeted(links, 30.0)
        assert [link.lost for link in links] == [None, None]
        here = facts()
        assert all(link.facts["code"] == here["code"] for link in links)
        assert all(link.facts["libraries"] == here["libraries"] for link in links)
        answers = ask(links, [{"do": "forget", "folder": str(tmp_path), "name": "x"}] * 2, 10.0)
        assert all("error" not in answer for answer in answers)
        meeting = arrange(links[:1])
        assert (meeting.address, meeting.interfaces) == ("127.0.0.1", ("lo",))
    finally:
        close_all(links)
    assert all(command._process.returncode is not None for command in commands)


def test_an_agent_that_starts_ranks_for_longer_than_the_silence_limit_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = Link("x", opener(None)("localhost"), 2.0)
    try:
        greeted([link], 30.0)
        host = RemoteHost(link, range(1), lambda number: None)
        own = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        begin = host.begin(["no-such-config"], own, {}, tmp_path, warm=True)  # its interpreter imports for seconds
        begun = time.monotonic()
        [answer] = ask([link], [begin], 120.0)
        assert "error" not in answer
        assert time.monotonic() - begun > 2.0
        host.started(answer)
        limit = time.monotonic() + 60
        while host.members[0].ended_at is None and link.lost is None:
            assert time.monotonic() < limit
            host.poll()
            time.sleep(0.01)
        assert link.lost is None
        assert host.members[0].code == 2
        assert "no-such-config" in capsys.readouterr().err  # rank 0's words are for the terminal
    finally:
        link.close()


def test_a_host_with_another_folder_is_named_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "run.toml"
    page.write_text("")
    links = []
    for name, folder in (("x", "elsewhere"), ("y", "shared"), ("z", "shared")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.py").write_text(f"WHERE = {folder!r}\n")
        monkeypatch.chdir(tmp_path / folder)  # agents work where their supervisor does: a relative path differs
        links.append(Link(name, opener(None)("localhost"), 20.0))
    try:
        greeted(links, 30.0)
        assert folder_faults(links[1:], Path("run"), page) == {}
        assert list(Path("run").iterdir()) == []
        faults = folder_faults(links, Path("run"), page)
        assert faults.keys() == {"x"}
        assert "run of host x is not that of the others" in faults["x"]
        faults = code_faults(links, ["mine.parts", "nowhere"])
        assert faults.keys() == {"x"}
        assert faults["x"].startswith("host x has other code of mine, which run.imports names (files ")
        assert links[1].facts["machine"]["codes"] == codes_of(["mine", "nowhere"])
        (tmp_path / "elsewhere" / "mine.py").unlink()
        assert "(none of it there, files " in code_faults(links, ["mine"])["x"]
        (tmp_path / "elsewhere" / "own.toml").write_text("other")
        Path("own.toml").write_text("ours")
        found = folder_faults([links[1], links[0]], tmp_path / "run", Path("own.toml"))
        assert found == {"x": "host x has another own.toml than host y: copy it there"}
        Path("own.toml").unlink()
        assert "own.toml cannot be read" in folder_faults(links[1:], Path("run"), Path("own.toml"))["y"]
    finally:
        close_all(links)


def test_doctor_compares_the_code_that_a_run_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"WHERE = {name!r}\n")

    def reach(name: str) -> Channel:
        monkeypatch.chdir(tmp_path / name)
        return opener(None)("localhost")

    found = survey([HostSpec("x", 1), HostSpec("y", 1)], None, tmp_path, imports=["mine"], reach=reach)
    [problem] = [finding for finding in found if finding.status == "problem"]
    assert (problem.topic, problem.value) == ("x", "is not like this host")
    assert problem.repair.startswith("host x has other code of mine, which run.imports names (files ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "echo Welcome; echo permission denied >&2; exit 9"], "exit code 9 (permission denied)"),
        (["sh", "-c", "sleep 60"], "did not answer within 1 s: its command may be waiting for a password"),
        (["sh", "-c", "printf 'Password: '; sleep 60"], "did not answer within 1 s (Password:): its command may be"),
        (["sh", "-c", "echo a; printf 'pass? ' >&2; sleep 60"], "within 1 s (pass?): its command may be waiting"),
        (["yes", "no"], "did not answer within 1 s (no): its command may be"),
        (["head", "-c", "100000", "/dev/zero"], "exit code 0 (\0\0"),
        (["sh", "-c", "echo Banner; exec 1>&-; sleep 60"], "(Banner)"),
    ],
)
def test_hosts_that_do_not_answer(command: list[str], said: str) -> None:
    link = Link("far", Command("far", command), 5.0)
    try:
        greeted([link], 1.0)
        assert said in (link.lost or "")
    finally:
        link.close()
    with pytest.raises(LaunchError, match="cannot be run: No such file"):
        Command("far", ["no-such-command"])


SAYS = """
import json, os, sys, time
mark = b"\\x1esetformer "
for line in sys.argv[1:]:
    os.write(1, mark + line.encode() + b"\\n")
time.sleep(60)
"""


def agent_that_says(*lines: str) -> Link:
    return Link("far", Command("far", [sys.executable, "-S", "-c", SAYS, *lines]), 20.0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"is": "facts"}', "a message of kind 'facts' with another 'code'"),
        ('{"is": "facts", "code": [1]}', "with another 'code'"),
        ('{"is": [1]}', "a message of kind '[1]'"),
        ('{"is": "news"}', "a message of kind 'news'"),
        ('{"is": "asked", "signal": "15"}', "a message of kind 'asked' with another 'signal'"),
        ('{"is": "asked", "signal": true}', "with another 'signal'"),
        ('{"is": "output", "stream": 1, "text": 7}', "with another 'text'"),
        ('{"is": "beats", "ranks": [[0, 1]]}', "with another 'ranks.0.2'"),
        ('{"is": "ended", "ranks": [[-1, 0, "", []]]}', "with another 'ranks.0.0'"),
        ('{"is": "answer", "to": ["look"]}', "an answer to nothing"),
        ('{"is": "answer", "to": "listen", "port": 70000, "interface": null}', "with another 'port'"),
        ("[" * 90_000, "a message that cannot be read"),
        ('{"is": "facts", "code": ' + "9" * 9_000 + "}", "a message that cannot be read"),
        ("[]", "a message that cannot be read"),
    ],
)
def test_an_agent_that_says_what_none_of_ours_says_is_lost_in_one_sentence(line: str, said: str) -> None:
    link = agent_that_says(line)
    try:
        greeted([link], 20.0)
        assert link.lost is not None
        assert said in link.lost
        assert link.lost.startswith("host far is lost: its agent sent ")
        assert "install the same version of this project there" in link.lost
        assert link.poll() == []
    finally:
        link.close()


def test_what_an_agent_says_of_others_ranks_loses_it_and_unknown_keys_do_not() -> None:
    whole = json.dumps({"is": "facts", **facts(), "new": [{}]})
    beats = json.dumps({"is": "beats", "ranks": [[5, 1, 0, "data", 0.0, 0, False, None, None, None]]})
    link = agent_that_says(whole, json.dumps({"is": "asked", "signal": 15}), beats)
    asked: list[int] = []
    try:
        greeted([link], 20.0)
        assert link.lost is None
        assert link.facts["code"] == facts()["code"]
        limit = time.monotonic() + 20
        host = RemoteHost(link, range(2, 4), asked.append)
        while link.lost is None:
            assert time.monotonic() < limit
            host.poll()
        assert asked == [15], "a signal that comes with the greeting is not lost"
        assert "its agent sent news of rank 5, which it does not have" in link.lost
    finally:
        link.close()


def test_a_peer_that_never_stops_is_not_read_for_ever() -> None:
    flood = "import os\nwhile True: os.write(1, b'y' * 65536)"
    command = Command("far", [sys.executable, "-S", "-c", flood])
    link = Link("far", command, 20.0)
    try:
        begun = time.monotonic()
        greeted([link], 20.0)
        assert time.monotonic() - begun < 15
        assert "its agent sent a line of more than 1 MiB" in (link.lost or "")
        assert len(link._wire._came) <= 8 << 20
    finally:
        link.close()
