"""The engine over several processes: process 0 decides what is computed, all compute it in the same order.

    process 0   Engine -> Leader -> plan -> every other process, and its own ModelRunner
    others      Follower <- plan, and their own ModelRunner

A program over several processes runs only where all of them start it. Requests, scheduler, tokens and clients are
process 0's alone; plans are plain data, and those so far are all that the devices' state depends on, so that following
them keeps caches and slots alike. Between plans nobody runs anything, however long nothing is asked for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from foejax.serving.engine import Runner, Scorer
from foejax.serving.runner import StepResult
from foejax.serving.step_plan import StepPlan
from foejax.serving.token_logprobs import TokenLogprobs
from sharding import hosts
from sharding.broadcast import Receiver, Sender

_PLAN, _PROMPTS, _END = b"p", b"s", b"e"
"""First byte of a message: what the rest is."""


class Leader:
    """Process 0's runner and scorer: it tells the others what to compute and computes its part."""

    def __init__(self, sender: Sender, runner: Runner, scorer: Scorer | None) -> None:
        """
        Args:
          runner, scorer: of this process's devices.
        """
        self._sender, self._runner, self._scorer = sender, runner, scorer
        self._is_apart = False

    def run(self, plan: StepPlan) -> StepResult:
        """Carry a plan out together with the others.

        Raises:
          RuntimeError: an error has left the processes apart before.
        """
        with self._together(_PLAN + plan.to_bytes()):
            return self._runner.run(plan)

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[TokenLogprobs]]:
        """Score prompts together with the others.

        Raises:
          RuntimeError: see `run`.
        """
        assert self._scorer is not None, "nobody scores prompts"
        with self._together(_PROMPTS + json.dumps([list(prompt) for prompt in prompts]).encode()):
            return self._scorer.score(prompts)

    def release(self, result: Any = None) -> None:
        """Let the others return from `Follower.follow`, which gives them `result` (what JSON can express).

        Raises:
          RuntimeError: see `run`.
        """
        self._check_together()
        self._sender.send(_END + json.dumps(result).encode())

    def is_asked_to_end(self) -> bool:
        """Whether another process has been told to end."""
        return self._sender.is_asked_to_end()

    @contextlib.contextmanager
    def _together(self, message: bytes) -> Iterator[None]:
        self._check_together()
        self._is_apart = True  # until all is well; an interrupt counts too
        try:
            self._sender.send(message)
            yield
        except Exception:
            hosts.await_news()
            raise
        self._is_apart = False

    def _check_together(self) -> None:
        if self._is_apart:
            raise RuntimeError("an error has left the processes apart: end all of them and start them anew")


class Follower:
    """Runner and scorer of the other processes, which compute when process 0 says so."""

    def __init__(self, receiver: Receiver, runner: Runner, scorer: Scorer | None) -> None:
        """
        Args:
          runner, scorer: of this process's devices.
        """
        self._receiver, self._runner, self._scorer = receiver, runner, scorer

    def follow(self) -> Any:
        """Compute whatever process 0 computes until it calls `Leader.release`; what it gave that.

        Raises:
          ConnectionError: process 0 has gone.
        """
        while True:
            message = self._receiver.receive()
            kind, rest = message[:1], message[1:]
            if kind == _END:
                return json.loads(rest)
            if kind == _PLAN:
                self._runner.run(StepPlan.from_bytes(rest))
            else:
                assert kind == _PROMPTS and self._scorer is not None, kind
                self._scorer.score(json.loads(rest))

    def ask_to_end(self) -> None:
        """Ask process 0 to end what all do; may be called in a signal handler."""
        self._receiver.ask_to_end()

    def run(self, plan: StepPlan) -> NoReturn:
        """
        Raises:
          RuntimeError: always; requests go to process 0.
        """
        raise RuntimeError("this process computes what process 0 asks for: give requests to the engine of process 0")

    def score(self, prompts: Sequence[Sequence[int]]) -> NoReturn:
        """
        Raises:
          RuntimeError: see `run`.
        """
        raise RuntimeError("this process computes what process 0 asks for: give prompts to the engine of process 0")


def join_processes(runner: Runner, scorer: Scorer | None) -> Leader | Follower | None:
    """This process's part in a run of several; None for a process that is alone.

    All processes call this together, with the same programs compiled.

    Raises:
      ValueError: the processes were not started by `sharding.hosts.start`.
      StartError: a process does not come; names it.
    """
    if jax.process_count() == 1:
        return None
    end = hosts.open_broadcast()
    return Leader(end, runner, scorer) if isinstance(end, Sender) else Follower(end, runner, scorer)
