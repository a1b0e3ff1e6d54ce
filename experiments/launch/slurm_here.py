"""A Slurm cluster of two nodes on this machine, for as long as a `with` block: real daemons, real job steps.

Each node is a set of namespaces (network, host name, mounts, processes) joined to the other by a virtual cable. All of
it, every process of every job too, ends with the block; nothing of the system's own Slurm is read or changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

NODES = {"node0": "10.77.5.1", "node1": "10.77.5.2"}
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "munged",
    "mungekey",
    "setpriv",
    "unshare",
    "nsenter",
    "ip",
)

_SLURM_CONF = """
ClusterName=here
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=5
ReturnToService=2
NodeName=node[0-1] CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


class SlurmError(RuntimeError):
    """A command of Slurm has failed, or a job has not come to where it should."""


def missing() -> str:
    """What this machine lacks for a cluster, in one line; empty where nothing is missing."""
    lacking = [] if os.geteuid() == 0 else ["root"]
    lacking += [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return ", ".join(lacking)


class SlurmHere:
    """Two nodes, `node0` and `node1`; commands run on `node0`.

    Attributes:
      folder: everything that the daemons write; removed at the end.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_here_"))
        # A job of another Slurm may be what runs this.
        foreign = ("SLURM", "SBATCH", "SRUN")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmHere:
        try:
            self._write_files()
            self._make_nodes()
            self._start_daemons()
        except SlurmError as error:
            said = self._last_words()
            self._end()
            raise SlurmError(f"{error}; {said}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def run(self, *command: str, variables: Mapping[str, str] | None = None) -> str:
        """What a command prints that runs on `node0`, in the cluster's folder, in our environment and these variables.

        Raises:
          SlurmError: it has failed; tells what it said.
        """
        done = subprocess.run(
            [*self._inside(0), "env", f"--chdir={self.folder}", *command],
            env={**self._environment, **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SlurmError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job: JobState, Restarts, RunTime, ..."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for_end(self, job_id: str, seconds: float) -> str:
        """The state in which a job ends: COMPLETED, FAILED, CANCELLED, ...

        Raises:
          SlurmError: it has not ended after so many seconds.
        """
        wait_until(lambda: self.job(job_id)["JobState"] not in _UNFINISHED, seconds, f"job {job_id} to end")
        return self.job(job_id)["JobState"]

    def _write_files(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NODES.items())
        )
        (self.folder / "slurm.conf").write_text(_SLURM_CONF.format(folder=self.folder, cpus=os.cpu_count()))

    def _make_nodes(self) -> None:
        # A node dies with this process, however that ends.
        unshare = ("setpriv", "--pdeathsig=KILL", "unshare", "--fork", "--kill-child")
        spaces = ("--net", "--uts", "--mount", "--pid", "--mount-proc")
        for name in NODES:
            setup = f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && ip link set lo up"
            stay = f"touch {self.folder}/{name}.up && exec sleep infinity"
            self._nodes.append(self._begin((*unshare, *spaces, "sh", "-c", f"{setup} && {stay}"), name))
        wait_until(self._nodes_are_up, 30, "the nodes' namespaces")
        pids = [str(node.pid) for node in self._nodes]
        _check(["ip", "link", "add", "eth0", "netns", pids[0], "type", "veth", "peer", "eth0", "netns", pids[1]])
        for index, address in enumerate(NODES.values()):
            _check([*self._inside(index), "ip", "addr", "add", f"{address}/24", "dev", "eth0"])
            _check([*self._inside(index), "ip", "link", "set", "eth0", "up"])

    def _start_daemons(self) -> None:
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        _check(["mungekey", "--create", f"--keyfile={key}"])
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._daemon(0, "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", *files)
        wait_until(socket.exists, 30, "munged")
        self._daemon(0, "slurmctld", "-D", "-c")
        for index, name in enumerate(NODES):
            self._daemon(index, "slurmd", "-D", "-N", name)
        wait_until(self._all_idle, 60, "slurmctld to see both nodes idle")

    def _daemon(self, index: int, *command: str) -> None:
        self._daemons.append(self._begin([*self._inside(index), *command], f"{command[0]}{index}"))

    def _begin(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        """Start a command in the background; what it prints goes to NAME.out."""
        with (self.folder / f"{name}.out").open("w") as output:
            return subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _nodes_are_up(self) -> bool:
        if any(node.poll() is not None for node in self._nodes):
            raise SlurmError("a node has ended at its start")
        return all((self.folder / f"{name}.up").exists() for name in NODES)

    def _all_idle(self) -> bool:
        try:
            return self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))]
        except SlurmError:
            return False

    def _last_words(self) -> str:
        """The last line of every log."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "; ".join(f"{log.name}: {text.splitlines()[-1]}" for log in logs if (text := log.read_text()))

    def _inside(self, index: int) -> list[str]:
        """Prefix of a command that is to run on a node."""
        pid = self._nodes[index].pid
        return ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]

    def _end(self) -> None:
        for node in self._nodes:
            node.kill()  # and with it whatever runs on the node
        for process in [*self._nodes, *self._daemons]:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def search_path() -> str:
    """PATH on which `python` is this one, and daemons are found too."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _check(command: Sequence[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "PATH": search_path()}, capture_output=True, text=True)
    if done.returncode:
        raise SlurmError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until the condition holds.

    Raises:
      SlurmError: it does not after so many seconds; says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)
