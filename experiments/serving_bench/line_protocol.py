"""Commands to a process and its answers, one JSON object a line; the standard library alone, for any Python.

A contender is an object with two methods, both of which may raise:
  prepare(setting) -> None       make ready for runs with a setting, a dict from `settings()`;
  run(prompts, output_tokens) -> see `Stopwatch.figures`
and `settings()`, the list of settings worth a try, and `facts()`, versions and device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

_REPOSITORY = Path(__file__).resolve().parents[2]


def answer_commands(make: Callable[..., Any]) -> None:
    """Be a contender's process: make it from the options of the first line, then carry out commands until the end.

    What libraries print goes to stderr; stdout is for answers.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contender = None
    for line in sys.stdin:
        command = json.loads(line)
        name, arguments = command["do"], command.get("with", {})
        try:
            if name == "start":
                contender = make(**arguments)
                answer = None
            else:
                answer = getattr(contender, name)(**arguments)
            reply = {"answer": answer}
        except Exception as error:  # the other side decides what an error of a contender means
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class Stopwatch:
    """Wall-clock and processor seconds of what runs inside."""

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started[0]
        self._cpu_seconds = time.process_time() - self._started[1]

    def figures(self, outputs: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What a run answers: `outputs` are the new tokens of every request."""
        return {
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "output_tokens": sum(map(len, outputs)),
            "fewest": min(map(len, outputs), default=0),
        }


class ContenderFailed(Exception):
    """A contender raised, took too long, or its process ended."""


class AnsweringProcess:
    """A process whose program calls `answer_commands`; a context manager that ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it in the repository's folder, which it also imports from, with `environment` beside our own.

        Raises:
          ContenderFailed: there is no such program.
        """
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                command,
                cwd=_REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            raise ContenderFailed(f"{command[0]} does not start: {error}") from error

    def ask(self, command: str, arguments: Mapping[str, Any] = {}, *, timeout: float = 3600.0) -> Any:
        """The answer to a command.

        Raises:
          ContenderFailed: see there; after a time-out the process is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": command, "with": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        if not line:
            why = f"took more than {timeout:.0f} s" if timed_out else f"ended; its last words: {self._last_words()}"
            raise ContenderFailed(f"{command}: {why}")
        reply = json.loads(line)
        if "error" in reply:
            raise ContenderFailed(f"{command}: {reply['error']}")
        return reply["answer"]

    def kill(self) -> None:
        """End the process; whoever waits for an answer is told that it has ended."""
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._process.wait(timeout=20)
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"none (exit status {self._process.returncode})"


class ContenderProcess(AnsweringProcess):
    """A contender in a Python of its own; a context manager that ends it."""

    def __init__(
        self, module: str, python: str, options: Mapping[str, Any], *, threads: int, environment: Mapping[str, str] = {}
    ) -> None:
        """Start it and load its model.

        Args:
          module: of this package, its file calls `answer_commands`.
          threads: cores that it may use, 0 for all.

        Raises:
          ContenderFailed: the Python, a package or the model is not there.
        """
        self.name = module
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads}
        super().__init__([python, "-m", f"experiments.serving_bench.{module}"], {**limits, **environment})
        os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[: threads or None])
        self.ask("start", {"options": dict(options)})
