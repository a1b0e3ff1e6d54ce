"""One thread that owns an engine, and streams of pieces for the asyncio code that waits for them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from foejax.serving.engine import Engine, Piece
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.sequence import FinishReason
from foejax.serving.statistics import Statistics

logger = logging.getLogger(__name__)


class Refused(RuntimeError):
    """The engine takes or continues no request; another server or a later try may."""


class QueueFull(Refused):
    """As many continuations wait as may."""


class Draining(Refused):
    """What runs is finished and nothing new is taken."""


class EngineStopped(Refused):
    """Stopped before the request was done."""


class EngineFailed(Refused):
    """The engine raised an error and is of no use any more."""


class PieceStream:
    """Pieces of one or several requests in the order in which they were made.

    Iterate in the event loop in which it was made. `close` it when no more pieces are wanted: that aborts what still
    runs.

    Attributes:
      request_ids: of the pieces, one for each prompt.
    """

    def __init__(self, request_ids: Sequence[str], num_continuations: int, abort: Callable[[PieceStream], None]):
        self.request_ids = tuple(request_ids)
        self.loop = asyncio.get_running_loop()
        self._unfinished = num_continuations  # of those that the consumer has seen
        self._unmade = num_continuations  # of those that the engine has made; its thread counts
        self._abort = abort
        self._arrived: deque[Piece] = deque()
        self._error: Refused | None = None
        self._changed = asyncio.Event()

    def __aiter__(self) -> PieceStream:
        return self

    async def __anext__(self) -> Piece:
        """
        Raises:
          EngineFailed, EngineStopped: before the last piece.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        piece = self._arrived.popleft()
        self._unfinished -= piece.finish_reason is not None
        return piece

    def close(self) -> None:
        """Abort what still runs."""
        if self._unfinished and self._error is None:
            self._abort(self)
        self._unfinished = 0
        self._arrived.clear()

    def _take(self, piece: Piece) -> None:
        if self._unfinished:
            self._arrived.append(piece)
            self._changed.set()

    def _fail(self, error: Refused) -> None:
        self._error = error
        self._changed.set()


@dataclass(eq=False)
class _Request:
    """What the thread knows of a request.

    Attributes:
      arrival: seconds.
      unfinished: continuations.
      last_tokens: when each continuation got tokens the last time.
    """

    stream: PieceStream
    arrival: float
    unfinished: int
    last_tokens: dict[int, float] = field(default_factory=dict)


class EngineThread:
    """Runs an engine in a daemon thread, which sleeps while there is nothing to do.

    All methods may be called from any thread; `submit` needs a running event loop.

    Attributes:
      failure: the error that ended the engine; None while it is well.
      statistics: of all requests so far.
      most_open: continuations that run or wait at the same time; more are refused.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        """
        Args:
          engine: nothing else uses it from now on, and its clock is `time.monotonic`.
          max_waiting: continuations that may wait beside those that run.
        """
        self.engine = engine
        self.statistics = Statistics()
        self.failure: Exception | None = None
        limits = engine.scheduler.limits
        self.most_open = limits.num_shards * limits.max_sequences + max_waiting
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._streams: set[PieceStream] = set()
        self._num_open = self._num_requests = 0
        self._draining = self._stopping = False
        self._requests: dict[str, _Request] = {}
        self._thread = threading.Thread(target=self._run, name="foejax-engine", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Continuations in a slot."""
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for a slot."""
        return max(self._num_open - self.num_running, 0)

    @property
    def is_idle(self) -> bool:
        """Whether every request is done."""
        return not self._num_open

    def check_open(self, num_continuations: int = 1) -> None:
        """
        Raises:
          QueueFull, Draining, EngineStopped, EngineFailed: there is no place for so many now.
        """
        if self.failure is not None:
            raise EngineFailed(f"the engine has failed ({type(self.failure).__name__}): restart the server")
        if self._stopping:
            raise EngineStopped("the server is stopping")
        if self._draining:
            raise Draining("the server is draining: it finishes what runs and takes nothing new")
        if self._num_open + num_continuations > self.most_open:
            raise QueueFull(
                f"{self._num_open} continuations run or wait and {self.most_open} may: try again in a moment"
            )

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, timeout: float | None = None
    ) -> PieceStream:
        """Queue one request for each prompt, all or none.

        Args:
          prompts: token ids.
          timeout: seconds after which the requests end with what they have.

        Raises:
          Refused: see `check_open`.
          PromptError, SamplingParamsError, ValueError: see `Engine.add`; or more continuations than `most_open`.
        """
        for prompt in prompts:
            self.engine.check(prompt, params)
        count = len(prompts) * params.n
        if count > self.most_open:
            raise ValueError(f"{count} continuations in one request are too many: ask for at most {self.most_open}")
        with self._changed:
            self.check_open(count)
            request_ids = [str(self._num_requests + index) for index in range(len(prompts))]
            stream = PieceStream(request_ids, count, self._abort)
            self._num_requests += len(prompts)
            self._num_open += count
            self._streams.add(stream)
            self._commands.append(partial(self._add, stream, prompts, params, time.monotonic(), timeout))
            self._changed.notify()
        return stream

    def drain(self) -> None:
        """Finish what runs and waits, and refuse everything else."""
        self._draining = True

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the step at hand; streams that are not done get `EngineStopped`.

        Args:
          timeout: seconds to wait for the end of the thread.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _abort(self, stream: PieceStream) -> None:
        with self._changed:
            self._commands.extend(partial(self.engine.abort, request_id) for request_id in stream.request_ids)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._obey():
                self._deliver(self.engine.step())
            reason: Refused = EngineStopped("the server stopped before the request was done")
        except Exception as error:
            logger.exception("the engine failed")
            self.failure = error
            reason = EngineFailed(f"the engine failed ({type(error).__name__}) before the request was done")
        with self._changed:
            self._stopping, self._num_open = True, 0
            streams, self._streams = self._streams, set()
        self._requests.clear()
        for stream in streams:
            _call_in(stream.loop, partial(stream._fail, reason))

    def _obey(self) -> bool:
        """Wait until there is something to do and carry out what others asked for; False to stop."""
        with self._changed:
            while not (self._commands or self.engine.num_unfinished or self._stopping):
                self._changed.wait()
            commands, self._commands = self._commands, []
            if self._stopping:
                return False
        for command in commands:
            command()
        return True

    def _add(
        self,
        stream: PieceStream,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        arrival: float,
        timeout: float | None,
    ) -> None:
        deadline = None if timeout is None else arrival + timeout
        for request_id, prompt in zip(stream.request_ids, prompts, strict=True):
            self.engine.add(request_id, prompt, params, deadline=deadline)
            self._requests[request_id] = _Request(stream, arrival, params.n)

    def _deliver(self, pieces: Sequence[Piece]) -> None:
        now = time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[PieceStream, Piece]]] = defaultdict(list)
        finished: list[PieceStream] = []
        for piece in pieces:
            request = self._requests[piece.request_id]
            stream = request.stream
            by_loop[stream.loop].append((stream, piece))
            self._count(request, piece, now)
            if piece.finish_reason is not None:
                finished.append(stream)
                stream._unmade -= 1
                request.unfinished -= 1
                if not request.unfinished:
                    del self._requests[piece.request_id]
        if finished:
            with self._changed:
                self._num_open -= len(finished)
                self._streams.difference_update(stream for stream in finished if not stream._unmade)
        for loop, batch in by_loop.items():
            _call_in(loop, partial(_hand_over, batch))

    def _count(self, request: _Request, piece: Piece, now: float) -> None:
        statistics, count = self.statistics, len(piece.tokens)
        if count:
            before = request.last_tokens.get(piece.index)
            if before is not None:
                statistics.time_between_tokens.observe((now - before) / count, count)
            elif not request.last_tokens:
                statistics.time_to_first_token.observe(now - request.arrival)
            request.last_tokens[piece.index] = now
            statistics.generated_tokens += count
        if piece.finish_reason is not None:
            statistics.finished[piece.finish_reason] += 1
            if request.unfinished == 1 and piece.finish_reason != FinishReason.ABORT:
                statistics.request_time.observe(now - request.arrival)


def _hand_over(batch: Sequence[tuple[PieceStream, Piece]]) -> None:
    for stream, piece in batch:
        stream._take(piece)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed: nobody waits there any more
        pass
