"""Several hosts on one machine: network namespaces joined by a bridge, a real sshd in each. For drills and tests.

To ssh, pdsh, gloo and NCCL they are hosts with addresses of their own; they share the file system, as the hosts of a
cluster share a folder. It takes root, `ip` and `sshd`. Whatever was made is removed, also after an error; what a killed
process left is removed by the next one that makes hosts.

    with Cluster(2) as cluster:
        setformer train demo --hosts a:1,b:1 --via cluster.via
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_TOOLS = ("ip", "ssh", "sshd", "ssh-keygen", "unshare", "tc", "nft")
_READY_S = 20.0
_ROUNDS = 100
_FOLDER, _OWNER = "sf-hosts-", "owner"  # the process that made the hosts: pid, start, tag, names
_TAG = re.compile(r"s[0-9a-f]{4}")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def why_impossible() -> str | None:
    """Return why no hosts can be made here, None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces take root on Linux"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, openssh-server, openssh-client, nftables)"
    name = f"sf{secrets.token_hex(3)}"
    made = _try("ip", "netns", "add", name)
    if made:
        _try("ip", "netns", "del", name)
    return None if made else "network namespaces cannot be made here"


class Cluster:
    """Hosts `a`, `b`, `c` … until the end of a with statement.

    Args:
        hosts: how many.
        own: an empty folder that is another one, on a disk of its own as it were, on each host; None for none. Here
            too it is another one; `disk` returns where those of the hosts are.

    Attributes:
        names: of the hosts.
        via: a prefix for `--via` that logs in to them.
        folder: with the keys and the ssh config.
    """

    def __init__(self, hosts: int, own: Path | None = None) -> None:
        self._own = own
        self.names = [chr(ord("a") + at) for at in range(hosts)]
        self._tag = f"s{secrets.token_hex(2)}"
        self._net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        self.config = self.folder / "config"
        self.via = f"ssh -F {self.config} {{host}}"

    def address(self, name: str) -> str:
        """Return a host's address."""
        return f"{self._net}.{self.names.index(name) + 1}"

    def disk(self, name: str) -> Path:
        """Return where the files of a host's own folder are."""
        return self.folder / f"disk-{name}"

    def namespace(self, name: str) -> str:
        """Return a host's network namespace."""
        return f"{self._tag}-{name}"

    def __enter__(self) -> Cluster:
        _remove_what_is_left()
        (self.folder / _OWNER).write_text(" ".join((str(os.getpid()), _began(os.getpid()), self._tag, *self.names)))
        try:
            self._bridge()
            self._keys()
            for name in self.names:
                self._host(name)
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bridge(self) -> None:
        _do("ip", "link", "add", self._tag, "type", "bridge")
        _do("ip", "addr", "add", f"{self._net}.254/24", "dev", self._tag)
        _do("ip", "link", "set", self._tag, "up")

    def _keys(self) -> None:
        for key in ("user", "host"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        host_key = " ".join((self.folder / "host.pub").read_text().split()[:2])
        (self.folder / "known").write_text("".join(f"{self.address(n)} {host_key}\n" for n in self.names))
        lines = [f"Host {n}\n  HostName {self.address(n)}" for n in self.names]
        common = (
            f"Host *\n  User root\n  IdentityFile {self.folder / 'user'}\n  IdentitiesOnly yes\n  BatchMode yes\n"
            f"  UserKnownHostsFile {self.folder / 'known'}\n  StrictHostKeyChecking yes\n  ConnectTimeout 10\n"
            "  LogLevel ERROR\n"
        )
        self.config.write_text("\n".join([*lines, common]))
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder / 'host'}\nAuthorizedKeysFile {self.folder / 'authorized'}\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
        )

    def _host(self, name: str) -> None:
        space, inside = self.namespace(name), f"{self._tag}{name}"
        _do("ip", "netns", "add", space)
        _do("ip", "link", "add", inside, "type", "veth", "peer", "name", "eth0", "netns", space)
        _do("ip", "link", "set", inside, "master", self._tag, "up")
        _do("ip", "-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", space, "link", "set", device, "up")
        self.boot(name)

    def boot(self, name: str) -> None:
        """Start a host's sshd, the first time or after `kill`."""
        sshd = shutil.which("sshd", path=_PATH)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd leaves its privileges
        start = f"hostname {name} && exec {sshd} -D -e -f {self.folder / 'sshd_config'}"
        if self._own is not None:
            self.disk(name).mkdir()
            start = f"mount --bind {self.disk(name)} {self._own} && {start}"
        with (self.folder / f"sshd-{name}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self.namespace(name), "unshare", "--uts", "--mount", "sh", "-c", start],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip

    def _wait(self) -> None:
        limit = time.monotonic() + _READY_S
        for name in self.names:
            while not _try("ssh", "-F", str(self.config), name, "true"):
                if time.monotonic() > limit:
                    raise RuntimeError((self.folder / f"sshd-{name}.log").read_text())
                time.sleep(0.1)

    def processes(self, name: str) -> list[int]:
        """Return the processes of a host but its sshd."""
        listed = _output("ip", "netns", "pids", self.namespace(name)).split()
        daemons = {daemon.pid for daemon in self._daemons}
        return [pid for pid in map(int, listed) if pid not in daemons and not _is_sshd(pid)]

    def cut(self, name: str) -> None:
        """Cut a host's link, without a word to anybody."""
        _do("ip", "link", "set", f"{self._tag}{name}", "nomaster")

    def join(self, name: str) -> None:
        """Put a host's link back."""
        _do("ip", "link", "set", f"{self._tag}{name}", "master", self._tag)

    def mute(self, name: str) -> None:
        """Drop whatever a host sends; it hears all."""
        self._rule(name, "output", "drop")

    def lose(self, name: str, share: float) -> None:
        """Drop a share of the packets that a host sends and gets, drawn at random. Takes nftables."""
        for way in ("input", "output"):
            self._rule(name, way, "numgen", "random", "mod", "1000", "<", str(round(1000 * share)), "drop")

    def slow(self, name: str, kbit: int) -> None:
        """Limit the bandwidth of a host's link, both ways."""
        burst = max(16, kbit // 2000)  # kB: what a timer of 4 ms lets through at once
        limit = ("tbf", "rate", f"{kbit}kbit", "burst", f"{burst}kb", "latency", "200ms")
        _do("tc", "qdisc", "replace", "dev", f"{self._tag}{name}", "root", *limit)
        _do("tc", "-n", self.namespace(name), "qdisc", "replace", "dev", "eth0", "root", *limit)

    def mend(self, name: str) -> None:
        """End what `mute`, `lose` and `slow` have done to a host."""
        _try("ip", "netns", "exec", self.namespace(name), "nft", "delete", "table", "inet", "drill")
        _try("tc", "qdisc", "del", "dev", f"{self._tag}{name}", "root")
        _try("tc", "-n", self.namespace(name), "qdisc", "del", "dev", "eth0", "root")

    def _rule(self, name: str, way: str, *rule: str) -> None:
        nft = ("ip", "netns", "exec", self.namespace(name), "nft", "add")
        _do(*nft, "table", "inet", "drill")
        _do(*nft, "chain", "inet", "drill", way, f"{{ type filter hook {way} priority 0; }}")
        _do(*nft, "rule", "inet", "drill", way, "oifname" if way == "output" else "iifname", "eth0", *rule)

    def kill(self, name: str) -> None:
        """Kill everything on a host, its sshd too: its power is gone."""
        _kill_all_in({Path(f"/run/netns/{self.namespace(name)}").stat().st_ino})

    def close(self) -> None:
        """Remove all hosts."""
        _remove(self._tag, self.names, self.folder)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


def _kill_all_in(spaces: set[int]) -> None:
    """Kill all processes of some network namespaces, which inodes name, and what they still start meanwhile."""
    spaces = spaces - {_space_of("self")}
    for _ in range(_ROUNDS):
        found = [pid for pid in _all_processes() if _space_of(pid) in spaces]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _all_processes() -> list[str]:
    """Return the ids of the processes that are no zombies."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if _text(path)]


def _space_of(pid: str) -> int:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0


def _spaces(tag: str, names: Sequence[str], folder: Path) -> set[int]:
    """Return the namespaces of hosts: by their names, and by their sshd where the names are gone."""
    config = str(folder / "sshd_config")
    found = {_space_of(pid) for pid in _all_processes() if config in _text(Path(f"/proc/{pid}/cmdline"))}
    for name in names:
        with contextlib.suppress(OSError):
            found.add(Path(f"/run/netns/{tag}-{name}").stat().st_ino)
    return found - {0}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _remove(tag: str, names: Sequence[str], folder: Path) -> None:
    """Remove hosts, and the folder that says whose they are at last."""
    _kill_all_in(_spaces(tag, names, folder))
    for name in names:
        _try("ip", "netns", "del", f"{tag}-{name}")
        _try("ip", "link", "del", f"{tag}{name}")
    _try("ip", "link", "del", tag)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_what_is_left() -> None:
    """Remove the hosts of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError, ValueError):
            if folder.stat().st_uid != os.geteuid():
                continue  # somebody else's words name nothing of ours
            pid, began, tag, *names = (folder / _OWNER).read_text().split()
            if _began(int(pid)) != began and _TAG.fullmatch(tag) and all(len(name) == 1 for name in names):
                _remove(tag, names, folder)


def _began(pid: int) -> str:
    """Return when a process began, in ticks of the clock; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sshd", "sshd-session")
    except OSError:
        return True  # it has ended


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=30)


def _output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout


def _try(*words: str) -> bool:
    try:
        return subprocess.run(words, check=False, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
