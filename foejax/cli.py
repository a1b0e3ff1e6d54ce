"""The command `foejax`: thin commands over the Python API that notebooks use.

JAX is imported inside the commands, so that `--help` is quick and `--devices N` can come before JAX starts. A process
that is one of several joins them first; process 0 alone writes to stdout and logs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from foejax.commands.parser import make_parser, split_overrides
from foejax.config import ConfigError
from foejax.devices import avoid_broken_reductions, simulate_devices

EXIT_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: schedulers requeue on it
EXIT_INTERRUPTED = 130

PROCESS_COMMANDS = ("train", "evaluate", "serve")
"""Commands that run in several processes; the others run alone wherever they are started."""
_SIGNS_OF_COMPANY = ("FOEJAX_NUM_PROCESSES", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")
"""Variables of which one is set wherever `sharding.hosts.find_place` finds other processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `report_errors`."""
    return report_errors(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def report_errors(command: Callable[[], int]) -> int:
    """Run a command with our log on stderr and return its exit code.

    Whatever is wrong with the input is told in one line on stderr; FOEJAX_TRACEBACK=1 shows the traceback instead.
    """
    _show_log()
    try:
        return command()
    except KeyboardInterrupt:
        _leave_processes(EXIT_INTERRUPTED, "interrupted")
        return EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        code = _exit_code(error)
        _await_news_of_processes()
        if code is None or os.environ.get("FOEJAX_TRACEBACK"):
            raise
        print(f"foejax: error: {_one_line(error)}", file=sys.stderr)
        _leave_processes(code, _one_line(error))
        return code


def _run(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    options = make_parser().parse_args(arguments)
    if overrides and not options.takes_overrides:
        raise ConfigError(f"--{next(iter(overrides))}: `foejax {options.command}` takes no config overrides")
    avoid_broken_reductions()
    processes = _join_processes(options)
    if getattr(options, "devices", None):
        simulate_devices(options.devices, processes)
    return options.run(options, overrides) or 0


def _join_processes(options: argparse.Namespace) -> int:
    """Join the other processes of this run, where there are any; how many there are in all."""
    if options.command not in PROCESS_COMMANDS or not any(name in os.environ for name in _SIGNS_OF_COMPANY):
        return 1
    from sharding import hosts

    place = hosts.start()
    if place is None:
        return 1
    _keep_stdout_for_results(place.process_id == 0)
    return place.num_processes


def _keep_stdout_for_results(is_first: bool) -> None:
    """Let only what Python prints in process 0 reach stdout: Gloo, in C++, greets every new connection there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    results = os.dup(1) if is_first else nowhere
    sys.stdout = open(results, "w", buffering=1)
    os.dup2(nowhere, 1)
    if not is_first:
        logging.getLogger("foejax").setLevel(logging.ERROR)


def _await_news_of_processes() -> None:
    if hosts := sys.modules.get("sharding.hosts"):
        hosts.await_news()


def _leave_processes(code: int, reason: str) -> None:
    """End here, with the code, where this is one of several processes; they end too."""
    if hosts := sys.modules.get("sharding.hosts"):
        hosts.finish(code, reason)


def _exit_code(error: Exception) -> int | None:
    """Exit code of an error that the user can mend; None for one that is ours."""
    from foejax.training.errors import NonFiniteLoss, Preempted, TrainingError

    if isinstance(error, Preempted):
        return EXIT_PREEMPTED
    if isinstance(error, NonFiniteLoss):
        return EXIT_NON_FINITE
    return EXIT_ERROR if isinstance(error, (ValueError, OSError, TrainingError)) else None


def _one_line(error: Exception) -> str:
    from foejax.training.errors import is_disk_full

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and is_disk_full(error):
        return f"the disk is full: {text}; free some space and start the same command again"
    return text


def _show_log() -> None:
    """Our own log lines on stderr; stdout is for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("foejax", "sharding"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
