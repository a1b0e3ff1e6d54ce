"""One command in several processes of one machine: `python -m foejax.launch --nproc N -- train foe_tiny ...`.

Every process gets its share of the GPUs, or simulates `--devices-per-process` CPU devices. Each line of output is led
by the number of its process. The first SIGTERM or Ctrl-C asks all of them to stop (`train` saves, `serve` finishes what
runs), the second one ends them. When one process ends in any way but well, the others end too, and its exit status is
the launcher's.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from foejax.cli import EXIT_ERROR, EXIT_PREEMPTED, PROCESS_COMMANDS
from foejax.devices import simulated_environment

EXIT_LOST = 69
"""Of a process that ended because another one had: `sharding.roll_call`."""
_COMMANDS = f"{', '.join(PROCESS_COMMANDS[:-1])} or {PROCESS_COMMANDS[-1]}"
GRACE = 20.0
"""Seconds in which the others end by themselves, and say why, after one process has ended badly."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in all processes and return the exit status of the one that ended badly first, else 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, command = _split(arguments)
    options = _parser().parse_args(own)
    try:
        if not command or command[0] not in PROCESS_COMMANDS:
            raise ValueError(f"command {command[:1]} does not run in several processes: give {_COMMANDS} after --")
        environments = process_environments(options.nproc, options.devices_per_process, os.environ)
    except ValueError as error:
        print(f"foejax.launch: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    if options.start_timeout is not None:
        environments = [each | {"FOEJAX_START_TIMEOUT": str(options.start_timeout)} for each in environments]
    return _Processes([sys.executable, "-m", "foejax", *command], environments).run()


def process_environments(
    num_processes: int, devices_per_process: int | None, environment: os._Environ[str] | dict[str, str]
) -> list[dict[str, str]]:
    """The whole environment of every process.

    Args:
      devices_per_process: CPU devices that each simulates; None shares out the GPUs, or takes the CPU where there are
        none.

    Raises:
      ValueError: the GPUs do not divide over the processes.
    """
    devices: list[dict[str, str]] = [{} for _ in range(num_processes)]
    gpus = [] if devices_per_process else visible_gpus(environment)
    if devices_per_process:
        devices = [simulated_environment(devices_per_process)] * num_processes
    elif gpus:
        if len(gpus) % num_processes:
            raise ValueError(
                f"nproc={num_processes} does not divide the {len(gpus)} GPUs {','.join(gpus)}: choose a divisor, or "
                "fewer GPUs with CUDA_VISIBLE_DEVICES"
            )
        share = len(gpus) // num_processes
        devices = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(num_processes)]
    shared = {"FOEJAX_COORDINATOR": f"127.0.0.1:{_free_port()}", "FOEJAX_NUM_PROCESSES": str(num_processes)}
    return [
        {**environment, **shared, **own, "FOEJAX_PROCESS_ID": str(rank), "PYTHONUNBUFFERED": "1"}
        for rank, own in enumerate(devices)
    ]


def visible_gpus(environment: os._Environ[str] | dict[str, str]) -> list[str]:
    """GPUs that CUDA programs may use here, as CUDA_VISIBLE_DEVICES names them."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60.0)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(index) for index in range(count)] if listed.returncode == 0 else []


class _Processes:
    """The processes of one launch, from their start until all have ended."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self._command, self._environments = command, environments
        self._children: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._signals = 0

    def run(self) -> int:
        """Start all, wait for all, and return the exit status."""
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for rank, environment in enumerate(self._environments):
                self._start(rank, environment)
            return self._wait()
        finally:
            self._send(signal.SIGKILL)
            for reader in self._readers:
                reader.join()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, rank: int, environment: dict[str, str]) -> None:
        # A session of its own keeps the terminal's Ctrl-C away: the launcher passes it on.
        child = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._children.append(child)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            reader = threading.Thread(target=self._copy, args=(rank, source, target), daemon=True)
            self._readers.append(reader)
            reader.start()
        threading.Thread(target=lambda: self._ended.put((rank, child.wait())), daemon=True).start()

    def _copy(self, rank: int, source: IO[bytes], target: IO[str]) -> None:
        for line in source:
            with self._writing:
                target.write(f"[{rank}] {line.decode(errors='replace').rstrip()}\n")
                target.flush()

    def _wait(self) -> int:
        statuses: list[int] = []
        running, deadline = len(self._children), float("inf")
        while running:
            try:
                rank, status = self._ended.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() > deadline:
                    self._say(f"{running} processes have not ended within {GRACE:.0f} s: they are killed")
                    self._send(signal.SIGKILL)
                    deadline = float("inf")
                continue
            running -= 1
            if status:
                if {status, *statuses} - {EXIT_PREEMPTED, EXIT_LOST} == {status}:  # the first of its kind
                    self._say(f"process {rank} {_describe(status)}")
                deadline = deadline if statuses else time.monotonic() + GRACE
                statuses.append(status)
        return _first_cause(statuses)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signals += 1
        self._send(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for child in self._children:
            child.send_signal(number)  # does nothing to a process that has ended

    def _say(self, text: str) -> None:
        with self._writing:
            print(f"foejax.launch: {text}", file=sys.stderr, flush=True)


def _first_cause(statuses: Sequence[int]) -> int:
    """Exit status for those that processes ended with, in this order: the first that is not for another's sake."""
    causes = [status for status in statuses if status != EXIT_LOST] or list(statuses)
    return 0 if not causes else causes[0] if causes[0] > 0 else 128 - causes[0]


def _describe(status: int) -> str:
    if status >= 0:
        return f"has ended with exit code {status}"
    return f"is lost: it was ended by {signal.Signals(-status).name}"


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments and, after `--`, the command."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m foejax.launch",
        usage="%(prog)s --nproc N [--devices-per-process M] [--start-timeout S] -- COMMAND ...",
        description=f"Run `foejax COMMAND` ({_COMMANDS}) in several processes of this machine.",
        epilog="example: python -m foejax.launch --nproc 2 --devices-per-process 4 -- train foe_tiny --run-dir runs/2",
    )
    parser.add_argument("--nproc", type=_positive, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "--devices-per-process",
        type=_positive,
        metavar="M",
        help="CPU devices that each process simulates; without it the GPUs are shared out",
    )
    parser.add_argument(
        "--start-timeout", type=_positive, metavar="S", help="seconds that processes wait for each other; default: 300"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive: choose at least 1")
    return value


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


if __name__ == "__main__":
    raise SystemExit(main())
