"""Several processes on one or many hosts as one machine: start-up, topology, what may cross hosts, the end.

    hosts.start()     # before JAX is used; does nothing in a process that is alone
    ...               # the program, the same in every process
    hosts.finish()    # at the end; done by itself where the interpreter ends

JAX supplies the processes' devices (`jax.distributed`, over NCCL on GPUs and Gloo on CPUs); `roll_call` says by name
who has not come and who is lost.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.broadcast import Receiver, Sender
from sharding.collectives import vary_local
from sharding.relay import relay_to
from sharding.roll_call import FAILURE_GRACE, RollCall, RollCallServer, is_loopback, listen

logger = logging.getLogger(__name__)

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "FOEJAX_COORDINATOR", "FOEJAX_NUM_PROCESSES", "FOEJAX_PROCESS_ID"
HOST, START_TIMEOUT = "FOEJAX_HOST", "FOEJAX_START_TIMEOUT"
DEFAULT_START_TIMEOUT = 300.0
"""Seconds that a process waits for the others at the start and at the end."""

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class ProcessPlace:
    """Which process of how many this is.

    Attributes:
      coordinator: `host:port` at which process 0 is reached.
      num_processes: number of all processes.
      process_id: from 0 to num_processes - 1.
      local_device_ids: GPUs of this host that are this process's; None takes all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None


@dataclass
class _Joined:
    place: ProcessPlace
    roll_call: RollCall
    timeout: float
    meetings: itertools.count[int]


_joined: _Joined | None = None


def find_place(environment: Mapping[str, str] = os.environ) -> ProcessPlace | None:
    """This process's place by its environment; None for a process that is alone.

    The variables FOEJAX_COORDINATOR, FOEJAX_NUM_PROCESSES and FOEJAX_PROCESS_ID come first; without them, Slurm (under
    srun), Open MPI and Kubernetes (indexed Jobs and JobSets, with `pip install jax[k8s]`) are recognised as JAX does.

    Raises:
      ValueError: some of the three variables are missing, or one has no number.
    """
    given = {name: environment[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name in environment}
    if given:
        return _explicit_place(given)
    counts = [environment[name] for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if name in environment]
    clusters = [names for names in (_SLURM, _OPEN_MPI, _KUBERNETES) if all(name in environment for name in names)]
    if not clusters or counts[:1] == ["1"]:
        return None
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(_start_timeout()))
    coordinator, num_processes, process_id, local_device_ids = found
    if coordinator is None or num_processes is None or process_id is None or num_processes == 1:
        return None
    return ProcessPlace(coordinator, num_processes, process_id, local_device_ids)


def _explicit_place(given: Mapping[str, str]) -> ProcessPlace | None:
    missing = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} set and {', '.join(missing)} not: set all three, or none of them")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not given[name].isdecimal():
            raise ValueError(f"{name}={given[name]!r} is not a number: processes count from 0")
    num_processes, process_id = int(given[NUM_PROCESSES]), int(given[PROCESS_ID])
    if process_id >= num_processes:
        raise ValueError(f"{PROCESS_ID}={process_id} is outside 0..{num_processes - 1}: choose another process id")
    return None if num_processes == 1 else ProcessPlace(given[COORDINATOR], num_processes, process_id)


def start(place: ProcessPlace | None = None, *, timeout: float | None = None) -> ProcessPlace | None:
    """Join the other processes of the run; before the first use of JAX's devices.

    From here on the process ends, with a message that names the process, when another one is lost.

    Args:
      place: None takes `find_place()`.
      timeout: seconds to wait for the others; None takes FOEJAX_START_TIMEOUT, else 300.

    Returns:
      The place; None for a process that is alone, for which nothing is done.

    Raises:
      StartError: processes are missing after the timeout; names them.
    """
    global _joined
    if _joined is not None:
        return _joined.place
    place = place or find_place()
    if place is None:
        return None
    timeout = _start_timeout() if timeout is None else timeout
    is_first = place.process_id == 0
    if is_first:
        RollCallServer(listen(place.coordinator), place.num_processes, timeout)
    host = os.environ.get(HOST) or socket.gethostname()
    roll_call = RollCall.join(place.coordinator, place.process_id, place.num_processes, host, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator_host = place.coordinator.rpartition(":")[0].strip("[]")
    jax.distributed.initialize(
        place.coordinator if is_first else relay_to(place.coordinator, timeout),
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        coordinator_bind_address=place.coordinator if is_loopback(coordinator_host) else None,
    )
    _joined = _Joined(place, roll_call, timeout, itertools.count())
    atexit.register(_finish_at_exit)
    return place


def finish(code: int = 0, reason: str = "") -> None:
    """Leave the run together with the other processes; what a program calls last.

    Waits until all leave: as long as at the start, or seconds where this process has failed. Unless all is well the
    process ends here and now with the code, since JAX's own shutdown would wait for processes that never come.

    Args:
      code: exit code to come.
      reason: for one that is not 0, what the other processes say when they end for it.
    """
    global _joined
    if _joined is None:
        return
    joined, _joined = _joined, None
    all_left = joined.roll_call.leave(code, reason, FAILURE_GRACE + 5.0 if code else joined.timeout)
    if code or not all_left:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def await_news(seconds: float = 2.0) -> None:
    """Wait a moment before an error is told: where it comes of a lost process, this one ends here, naming that."""
    if _joined is not None:
        time.sleep(seconds)


def _finish_at_exit() -> None:
    error = getattr(sys, "last_value", None)  # what has ended the program, if anything
    if error is None:
        finish()
    else:
        await_news()
        finish(1, f"{type(error).__name__}: {error}")


def _start_timeout() -> float:
    text = os.environ.get(START_TIMEOUT, str(DEFAULT_START_TIMEOUT))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{START_TIMEOUT}={text!r} is no time in seconds: give a number") from None


def host_names() -> list[str]:
    """Name of the host of every process; of processes that have not called `start`, no two share one."""
    if _joined is not None:
        return _joined.roll_call.hosts
    if jax.process_count() == 1:
        return [socket.gethostname()]
    return [f"host of process {index}" for index in range(jax.process_count())]


def hosts_crossed(mesh: Mesh, axis: str, names: Sequence[str]) -> list[str]:
    """Hosts between which devices of one line along `axis` are spread, for the first line that is; else none.

    Args:
      names: host of every process.
    """
    lines = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
    for line in lines.reshape(-1, lines.shape[-1]):
        found = list(dict.fromkeys(names[device.process_index] for device in line))
        if len(found) > 1:
            return found
    return []


def check_hosts(mesh: Mesh, kind: str, names: Sequence[str] | None = None) -> None:
    """Refuse a mesh that some process has no device in, and an FoE mesh whose `expert` axis crosses hosts.

    Of other layouts a crossing `expert` axis is worth a warning.

    Args:
      kind: the layout.
      names: host of every process; None takes `host_names()`.

    Raises:
      ValueError: names the processes or the hosts.
    """
    names = host_names() if names is None else names
    if len(names) == 1:
        return
    idle = sorted(set(range(len(names))) - {device.process_index for device in mesh.devices.flat})
    if idle:
        raise ValueError(
            f"mesh of {mesh.devices.size} devices leaves nothing to process {', '.join(map(str, idle))} of "
            f"{len(names)}: use all devices (mesh.devices=0), or start fewer processes"
        )
    crossed = hosts_crossed(mesh, "expert", names)
    if not crossed:
        return
    what = f"mesh.expert={mesh.shape['expert']} crosses the hosts {', '.join(crossed)}"
    if kind == "foe":
        raise ValueError(
            f"{what}, and a group's tokens would go between them in every layer: choose mesh.expert as a divisor of "
            "the devices of a host, so that a group stays on one"
        )
    if jax.process_index() == 0:
        logger.warning("%s: every layer's all-to-alls go between hosts", what)


def describe(mesh: Mesh, names: Sequence[str] | None = None) -> str:
    """One line: hosts with their devices, and which mesh axis crosses what."""
    names = host_names() if names is None else names
    devices = list(mesh.devices.flat)
    hosts = {name: sum(names[device.process_index] == name for device in devices) for name in dict.fromkeys(names)}
    listed = ", ".join(f"{count} devices on {name}" for name, count in itertools.islice(hosts.items(), 8))
    more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    by_process = [f"process {index}" for index in range(len(names))]
    crossing = []
    for axis, size in mesh.shape.items():
        if size > 1:
            inside = "crosses processes" if hosts_crossed(mesh, axis, by_process) else "stays inside a process"
            crossing.append(f"{axis}={size} {'crosses hosts' if hosts_crossed(mesh, axis, names) else inside}")
    return f"{len(names)} processes: {listed}{more}; {', '.join(crossing) or 'one device'}"


def connect(mesh: Mesh) -> None:
    """Bring all processes together and let their devices connect along every set of mesh axes.

    Devices that reduce together for the first time must do so within 30 s (Gloo), and processes are that much apart
    once they have read data or compiled. With several processes, process 0 logs the topology. On CPUs JAX's
    compilation cache is not used from here on: a training step read back from it has stood still in its collectives.

    Raises:
      StartError: some process did not come within the start timeout; names it.
    """
    if jax.process_count() == 1:
        return
    _meet("mesh")
    if mesh.devices.flat[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    subsets = [subset for size in range(1, len(axes) + 1) for subset in itertools.combinations(axes, size)]

    def meet_local(x: jax.Array) -> jax.Array:
        for subset in subsets:
            x = vary_local(jax.lax.pmean(x, subset), mesh.axis_names)
        return jax.lax.pmean(x, mesh.axis_names)

    spec = PartitionSpec(mesh.axis_names)
    meet = jax.jit(jax.shard_map(meet_local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    sharding = NamedSharding(mesh, spec)
    jax.block_until_ready(meet(jax.make_array_from_callback((mesh.devices.size,), sharding, lambda _: np.ones(1))))
    multihost_utils.broadcast_one_to_all(np.zeros(()))
    multihost_utils.sync_global_devices("connected")
    if jax.process_index() == 0:
        logger.info("%s", describe(mesh))


def processes_that_differ(text: str) -> list[int]:
    """Processes whose text is not that of process 0; all processes of the run call this together.

    Raises:
      StartError: a process does not come within the start timeout; names it.
    """
    _meet("check")
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.atleast_2d(multihost_utils.process_allgather(digest))
    return [index for index, found in enumerate(digests) if not np.array_equal(found, digests[0])]


def open_broadcast() -> Sender | Receiver:
    """The way from process 0, which gets its Sender, to all others; all processes of the run call this together.

    Raises:
      ValueError: the processes were not started by `start`.
      StartError: a process does not come within the start timeout; names it.
    """
    if _joined is None:
        raise ValueError("these processes have not met by name: call sharding.hosts.start() before JAX is used")
    _meet("broadcast")
    place, timeout = _joined.place, _joined.timeout
    host = place.coordinator.rpartition(":")[0]
    if place.process_id == 0:
        listener, key = listen(f"{host}:0"), secrets.randbits(31)
        multihost_utils.broadcast_one_to_all(np.array([listener.getsockname()[1], key], np.int32))
        return Sender(listener, place.num_processes, key, timeout)
    port, key = map(int, multihost_utils.broadcast_one_to_all(np.zeros(2, np.int32)))
    return Receiver(f"{host}:{port}", place.process_id, key, timeout)


def _meet(why: str) -> None:
    """Wait for all processes; devices that wait for each other instead may give up sooner, and name nobody."""
    if _joined is not None:
        _joined.roll_call.wait_for_all(f"{why} {next(_joined.meetings)}", _joined.timeout)
