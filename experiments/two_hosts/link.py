"""Two hosts on one machine: two network namespaces joined by a veth pair, whose rate is set with `tc`.

Each namespace is held by a process that ends when its standard input does, so that namespaces, host names and veth are
gone with this program however it ends; nothing on the machine itself is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HOSTS = ("host0", "host1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACES = ("veth0", "veth1")
MTU = 9000
"""Of the veth: with jumbo frames headers are 1% of the bytes and not 5%."""
TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv", "mount", "hostname")

_BURST_SECONDS = 0.0005
_QUEUE = "4mb"
# Gloo binds to the address that its host's name resolves to, so each host has its own name and names file. BBR slows
# down by itself now and then, and an idle connection starts slowly again: neither is the link's doing.
_HOLD = """
hostname "$1" && mount --bind "$2" /etc/hosts &&
echo reno > /proc/sys/net/ipv4/tcp_congestion_control &&
echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle &&
ip link set lo up && echo held && exec cat
"""


class LinkError(ValueError):
    """The two hosts cannot be made on this machine; the message says what to do."""


def check_machine(user: int | None = None, search_path: str | None = None) -> None:
    """Refuse a user who may not make namespaces and a machine without the tools.

    Args:
      user: effective user id; None takes this process's.
      search_path: where tools are looked for; None takes PATH.

    Raises:
      LinkError: says which it is.
    """
    if (os.geteuid() if user is None else user) != 0:
        raise LinkError("network namespaces and tc need root: run the same command as root, or with sudo -E")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=search_path) is None]
    if missing:
        raise LinkError(f"{', '.join(missing)} not found: install iproute2 (ip, tc), util-linux and hostname")


class TwoHosts:
    """The two hosts, from entering the context to leaving it."""

    def __enter__(self) -> TwoHosts:
        check_machine()
        self._holders: list[subprocess.Popen[str]] = []
        try:
            for host in HOSTS:
                self._holders.append(_hold(host))
            for command in cable_commands(self.pids):
                _run(command)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            holder.kill()
            holder.communicate()

    @property
    def pids(self) -> list[int]:
        """The process that holds each host."""
        return [holder.pid for holder in self._holders]

    def set_rate(self, mbit: float | None) -> None:
        """Limit both directions to `mbit` (10^6 bits a second, frames' headers included); None lifts the limit."""
        for command in rate_commands(self.pids, mbit):
            _run(command)

    def sent_bytes(self) -> dict[str, int]:
        """Bytes that each host has sent over the veth so far, headers included (not those of the wire's frames)."""
        counted = [Path(f"/proc/{pid}/net/dev").read_text(encoding="ascii") for pid in self.pids]
        return {host: transmitted(text, veth) for host, text, veth in zip(HOSTS, counted, INTERFACES, strict=True)}


def inside(pid: int) -> list[str]:
    """What runs a command on the host that `pid` holds: its network, host name and names file, in this folder.

    The command is killed when the thread that has started it ends.
    """
    enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", "--wd", "--"]
    return [*enter, "setpriv", "--pdeathsig", "KILL"]


def cable_commands(pids: Sequence[int]) -> list[list[str]]:
    """Lay the veth between the hosts and give each end its address."""
    (first, second), (veth0, veth1) = pids, INTERFACES
    peer = ["type", "veth", "peer", "name", veth1, "mtu", str(MTU), "netns", str(second)]
    commands = [["ip", "link", "add", veth0, "mtu", str(MTU), "netns", str(first), *peer]]
    for pid, veth, address in zip(pids, INTERFACES, ADDRESSES, strict=True):
        commands.append([*inside(pid), "ip", "address", "add", f"{address}/24", "dev", veth])
        commands.append([*inside(pid), "ip", "link", "set", veth, "up"])
    return commands


def rate_commands(pids: Sequence[int], mbit: float | None) -> list[list[str]]:
    """Set what each end of the veth may send: a token bucket of two frames, or half a millisecond's where that is more.

    A larger bucket would let the small messages of a decoding step pass as if there were no limit. The queue behind it
    is as long as never to drop anything.
    """
    if mbit is None:
        limit = ["noqueue"]
    else:
        burst = max(2 * (MTU + 50), round(mbit * 1e6 / 8 * _BURST_SECONDS))
        limit = ["tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", f"{burst}b", "limit", _QUEUE]
    return [
        [*inside(pid), "tc", "qdisc", "replace", "dev", veth, "root", *limit]
        for pid, veth in zip(pids, INTERFACES, strict=True)
    ]


def transmitted(text: str, interface: str) -> int:
    """Bytes that an interface has sent, from the text of /proc/net/dev.

    Raises:
      LinkError: the interface is not in it.
    """
    for line in text.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise LinkError(f"{interface} is not among the interfaces of /proc/net/dev: the veth is gone")


def _hold(host: str) -> subprocess.Popen[str]:
    """A process that holds a host's namespaces until its standard input ends."""
    names = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(ADDRESSES, HOSTS, strict=True))]
    with tempfile.NamedTemporaryFile("w", encoding="ascii", prefix="hosts_") as file:
        file.write("\n".join(names) + "\n")
        file.flush()
        # A session of its own keeps the terminal's Ctrl-C away: the context's end is its end.
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", _HOLD, "sh", host, file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None
        answer = holder.stdout.readline().strip()  # from now on the file lives in the host alone
    if answer != "held":
        why = " ".join(holder.communicate()[1].split())
        raise LinkError(f"{host} cannot be made: {why or 'unshare gave no reason'}")
    return holder


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise LinkError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
