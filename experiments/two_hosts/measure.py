"""Times every program of every case at every rate, and reads what it has sent."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from experiments.serving_bench.line_protocol import AnsweringProcess, ContenderFailed
from experiments.timed_programs import PROGRAMS
from experiments.two_hosts.cases import DEVICES_PER_HOST, Case, Sizes, as_options
from experiments.two_hosts.link import ADDRESSES, HOSTS, TwoHosts, inside
from foejax.devices import simulated_environment

CASE_SECONDS = 600.0
"""A case that takes longer is given up, and the run with it."""
_PORT = 7700

Ask = Callable[..., list[Any]]
"""`ask(command, **arguments)`: the answers of both processes."""


def measure_case(
    hosts: TwoHosts, case: Case, sizes: Sizes, rates: Sequence[float | None], repeats: int
) -> Iterator[dict[str, Any]]:
    """The runs of one case, as `two_hosts.json` holds them: for every program and rate, `repeats` steps after one more.

    Raises:
      ContenderFailed: a process failed or ended, or the case took more than CASE_SECONDS.
    """
    with _processes(hosts, case, sizes) as ask:
        for program in PROGRAMS:
            hosts.set_rate(None)
            prepared = ask("prepare", program=program)[0]
            ask("run", program=program)
            for rate in rates:
                hosts.set_rate(rate)
                ask("run", program=program)
                before = hosts.sent_bytes()
                seconds = [step_seconds(ask("run", program=program)) for _ in range(repeats)]
                after = hosts.sent_bytes()
                counted = {host: (after[host] - before[host]) / repeats for host in HOSTS}
                collectives, bounds = those_that_ran(prepared["collectives"], counted)
                run = {
                    "name": case.name,
                    "kind": case.kind,
                    "mesh": case.mesh,
                    "program": program,
                    "tokens": sizes.tokens(program),
                    "rate_mbit": rate,
                    "seconds": statistics.median(seconds),
                    "seconds_all": seconds,
                    "egress_bytes": counted,
                    "audited_egress_bytes": audited_egress(collectives),
                    "audited_bounds": bounds,
                    **prepared,
                    "collectives": collectives,
                }
                print(_line(run), file=sys.stderr, flush=True)
                yield run


def step_seconds(times: Sequence[Sequence[float]]) -> float:
    """From the first process's beginning to the last one's end."""
    return max(ended for _, ended in times) - min(started for started, _ in times)


def audited_egress(collectives: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes that each host sends to the other in one step, all collectives added up."""
    return {host: sum(row["count"] * row["egress_bytes"][host] for row in collectives) for host in HOSTS}


def those_that_ran(
    collectives: Sequence[Mapping[str, Any]], counted: Mapping[str, float]
) -> tuple[list[Mapping[str, Any]], tuple[float, float]]:
    """The collectives of a step, and the least and the most bytes that the busier host may send with them.

    An exchange of tokens takes one of two buffer sizes, in each layer as its tokens have it. How many take the larger
    one is read off the counters, and `count` becomes that share of it; without such a choice both bounds are the same.

    Raises:
      ValueError: more than two sizes.
    """
    branches = sorted({row["branch"] for row in collectives if "branch" in row})
    if len(branches) > 2:
        raise ValueError(f"an exchange has {len(branches)} buffer sizes, and the counters tell two apart")
    sides = [[row for row in collectives if row.get("branch") in (None, side)] for side in branches or [None]]
    low, high = (max(audited_egress(rows).values()) for rows in (sides[0], sides[-1]))
    large = min(max((max(counted.values()) - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    shares = dict(zip(branches, (1.0 - large, large), strict=False))
    ran = [row | {"count": row["count"] * shares[row["branch"]]} if "branch" in row else row for row in collectives]
    return [row for row in ran if row["count"]], (low, high)


@contextmanager
def _processes(hosts: TwoHosts, case: Case, sizes: Sizes) -> Iterator[Ask]:
    """A process on each host, which have met; gone when the context is left."""
    end = time.monotonic() + CASE_SECONDS
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                AnsweringProcess(
                    [*inside(pid), sys.executable, "-m", "experiments.two_hosts.worker"], worker_environment(index)
                )
            )
            for index, pid in enumerate(hosts.pids)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(processes)))

        def ask(command: str, **arguments: Any) -> list[Any]:
            left = max(1.0, end - time.monotonic())
            asked = [pool.submit(process.ask, command, arguments, timeout=left) for process in processes]
            return [answer.result() for answer in asked]

        try:
            ask("start", **as_options(case, sizes))
            yield ask
        except ContenderFailed as error:
            raise ContenderFailed(f"{case.name}: {error}") from error
        finally:
            for process in processes:  # before the pool waits for whoever still asks one
                process.kill()


def worker_environment(index: int) -> dict[str, str]:
    """What makes a process one of the two."""
    return {
        **simulated_environment(DEVICES_PER_HOST),
        "FOEJAX_COORDINATOR": f"{ADDRESSES[0]}:{_PORT}",
        "FOEJAX_NUM_PROCESSES": str(len(HOSTS)),
        "FOEJAX_PROCESS_ID": str(index),
        "FOEJAX_HOST": HOSTS[index],
        "FOEJAX_START_TIMEOUT": "120",
    }


def _line(run: Mapping[str, Any]) -> str:
    rate = "unlimited" if run["rate_mbit"] is None else f"{run['rate_mbit']:g} Mbit/s"
    sent = max(run["egress_bytes"].values())
    return f"{run['name']}, {run['program']}, {rate}: {run['seconds']:.3f} s, {sent / 1e6:.3f} MB sent a step"
