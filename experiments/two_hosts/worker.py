"""One of the two processes: four simulated devices that compile a case's programs and run them on command.

Started by `experiments.two_hosts.measure` with FOEJAX_COORDINATOR, FOEJAX_NUM_PROCESSES and FOEJAX_PROCESS_ID set.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments.serving_bench.line_protocol import answer_commands
from experiments.timed_programs import Program, TimedProgram, make_program
from experiments.two_hosts.cases import Case, Sizes, run_config
from foejax.analysis.accounting import account
from foejax.config import RunConfig, override_config
from foejax.devices import avoid_broken_reductions
from foejax.training.run import make_layout
from sharding import Layout, hosts
from sharding.audit import Collective, audit
from sharding.crossing import host_egress_bytes


class Worker:
    """Answers commands; see `answer_commands`."""

    def __init__(self, case: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        avoid_broken_reductions()
        hosts.start()
        self._sizes = Sizes(**sizes)
        self._config = run_config(Case(**case), self._sizes)
        self._layout = make_layout(self._config.model, self._config.mesh)
        self._programs: dict[str, TimedProgram] = {}

    def facts(self) -> dict[str, str]:
        """Versions."""
        return {"python": platform.python_version(), "jax": jax.__version__}

    def prepare(self, program: Program) -> dict[str, Any]:
        """Compile a program; what its collectives send, by the audit of this very program.

        Raises:
          ValueError: a program whose bytes are not known before it runs, or that may race.
        """
        sizes = self._sizes
        prepared = self._programs[program] = make_program(
            program, self._config, self._layout, sequences=sizes.sequences, context=sizes.context
        )
        collectives = audit(prepared.lowered, self._layout.mesh, compiled=prepared.compiled)
        rows = [_row(each, self._layout, self._host_of_device()) for each in collectives]
        return {"collectives": _merged(rows), "flops": _flops(self._config, sizes, self._layout, program)}

    def run(self, program: str) -> tuple[float, float]:
        """Run a step and say when it began and ended, by the clock that all processes of a machine share."""
        prepared = self._programs[program]
        started = time.monotonic()
        prepared.step()
        return started, time.monotonic()

    def _host_of_device(self) -> list[str]:
        names = hosts.host_names()
        return [names[device.process_index] for device in self._layout.mesh.devices.flat]


def _row(collective: Collective, layout: Layout, host_of_device: list[str]) -> dict[str, Any]:
    """What one collective sends; with `branch` where it is one of the sizes that an exchange of tokens may take.

    `payload_bytes` and `egress_bytes` are those of all its `arrays`, which the compiler may have put together.

    Raises:
      ValueError: how often it runs is decided while it runs, or it does not travel in the dtype that was written.
    """
    if collective.in_loop_of_unknown_length:
        raise ValueError(f"{collective.op} at {collective.op_name} runs as often as the tokens have it")
    if collective.dtype != collective.compiled_dtype:
        raise ValueError(f"{collective.op} at {collective.op_name} travels as {collective.compiled_dtype}: use float32")
    return {
        "op": collective.op,
        "axes": list(collective.axes),
        "group_size": collective.group_size,
        "count": collective.count,
        "arrays": len(collective.shapes),
        "payload_bytes": collective.payload_bytes,
        "dtype": collective.dtype,
        "egress_bytes": host_egress_bytes(collective, layout.mesh, host_of_device),
    } | ({"branch": int(collective.branches[-1].rpartition(":")[2])} if collective.branches else {})


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal rows as one, their counts added."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = str({name: value for name, value in row.items() if name != "count"})
        merged[key] = row | {"count": row["count"] + merged.get(key, {"count": 0})["count"]}
    return list(merged.values())


def _flops(config: RunConfig, sizes: Sizes, layout: Layout, program: str) -> float:
    """Useful floating-point operations of one device in one step; see `foejax.analysis.accounting.Flops`."""
    if program != "decode_step":
        return account(config, layout).step_flops_per_device / (1 if program == "train_step" else 3)
    # A token that sees the whole context costs what the mean one of a sequence of almost twice its length does.
    length = 2 * sizes.context - 1
    changes = {"data.sequence_length": length, "data.batch_size": sizes.sequences, "model.max_seq_len": length}
    return account(override_config(config, changes), layout).step_flops_per_device / (3 * length)


if __name__ == "__main__":
    answer_commands(Worker)
