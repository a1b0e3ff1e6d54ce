"""Programs that the bench times: one call per operand set, in JAX or in torch, and the clocks that read them.

How device time is measured. A program makes one call per operand set, so that no call finds its operands in the L2
cache. In JAX the calls are one compiled program, each waiting for the one before (an `optimization_barrier`, which
costs no kernel) and all of their results returned, so that XLA can neither merge nor drop them. JAX does not hand out
its stream, so no event can be put on it. Its clocks are

  stream: the program is put on the stream 1 + n times in one go and the host waits once; the difference between this
    and a single run, over n, is what the stream spends on a program. Waiting, and starting the first one, cancel out.
    It counts gaps between kernels, as a training step would. Where the host needed nearly all that time to enqueue, the
    device waited for it and the figure is marked as host-bound: the kernels may be faster.
  cupti: the driver's own start and stop of every kernel (JAX's Mosaic profiler), summed; gaps are left out. For
    host-bound programs it is recorded beside the other, and `--timer cupti` uses it throughout.

Torch's calls are captured as one CUDA graph and n replays are timed with a pair of events on the stream; calls that
cannot be captured are made one by one between the events.
The dry run reads the wall clock of single runs instead, of torch's calls on a CPU too.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.operations import Contender, DeviceLost, Operands, Results, first_line, poison

JaxClock = Literal["stream", "cupti"]
Clock = Literal["stream", "cupti", "cuda events", "cuda events, eager", "wall clock"]
_SAMPLE_SECONDS = 0.02
_MOST_REPEATS = 16  # the GPU client lets 32 programs wait on the stream before it blocks
_HOST_BOUND = 0.9
_SLOW_SECONDS = 0.3  # of a program, from which on starting it and waiting for it do not matter


class Sample(NamedTuple):
    """One reading: seconds of one call, and whether the host was too slow to keep the device busy."""

    seconds: float
    host_bound: bool


class Program(Protocol):
    """One call per operand set."""

    clock: Clock

    def run(self) -> list[Results]:
        """The results of all calls, as JAX arrays, once they are there."""
        ...

    def sample(self) -> Sample:
        """Times it once."""
        ...

    def kernel_seconds(self) -> float | None:
        """Seconds of a call that kernels were running, if there is a way to know."""
        ...


def chained(step: Callable[..., Any]) -> Callable[[Sequence[Operands]], list[Any]]:
    """A function of all operand sets that calls `step` on each in turn and returns every result."""
    call = jax.jit(step)  # lowered once, however many calls there are

    def run(sets: Sequence[Operands]) -> list[Any]:
        results: list[Any] = []
        for operands in sets:
            if results:
                operands, _ = jax.lax.optimization_barrier((operands, results[-1]))
            results.append(call(*operands))
        return results

    return run


def abstract(sets: Sequence[Operands]) -> list[Operands]:
    """Shapes and dtypes of operand sets."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), list(sets))


def compile_all(
    contenders: Sequence[Contender], step: str, sets: Sequence[Operands], on_gpu: bool, workers: int
) -> tuple[dict[str, jax.stages.Compiled], dict[str, str]]:
    """Compiles every JAX contender's program, several at a time.

    Returns:
      The programs by contender, and for those that do not compile the reason.
    """
    compiled: dict[str, jax.stages.Compiled] = {}
    failed: dict[str, str] = {}
    waiting: dict[str, Future[jax.stages.Compiled]] = {}
    shapes = abstract(sets)
    with ThreadPoolExecutor(workers) as pool:
        for contender in contenders:
            # Tracing stays in this thread; XLA compiles without Python's lock.
            try:
                lowered = jax.jit(chained(contender.steps[step])).lower(shapes)
            except Exception as error:  # contenders are foreign code: whatever they raise is their reason
                failed[contender.name] = first_line(error)
                continue
            options = dict(contender.compiler_options) if on_gpu else None
            waiting[contender.name] = pool.submit(lowered.compile, options)
        for name, future in waiting.items():
            try:
                compiled[name] = future.result()
            except Exception as error:
                failed[name] = first_line(error)
    return compiled, failed


class JaxProgram:
    """A compiled `chained` program on its operand sets."""

    def __init__(self, compiled: Callable[..., list[Any]], sets: Sequence[Operands], clock: Clock, cupti: bool) -> None:
        self.clock, self._cupti = clock, cupti
        self._compiled, self._sets = compiled, list(sets)
        self._repeats: int | None = None

    def run(self) -> list[Results]:
        return [tuple(jax.tree.leaves(results)) for results in jax.block_until_ready(self._compiled(self._sets))]

    def sample(self) -> Sample:
        if self.clock == "cupti":
            seconds = self.kernel_seconds()
            if seconds is None:
                raise RuntimeError("CUPTI saw no kernel")
            return Sample(seconds, host_bound=False)
        once, _ = self._elapsed(1)
        if self.clock == "wall clock" or once > _SLOW_SECONDS:
            return Sample(once / len(self._sets), host_bound=False)
        if self._repeats is None:
            self._repeats = min(max(math.ceil(_SAMPLE_SECONDS / once), 2), _MOST_REPEATS)
        total, enqueued = self._elapsed(1 + self._repeats)
        return Sample((total - once) / (self._repeats * len(self._sets)), enqueued > _HOST_BOUND * total)

    def _elapsed(self, times: int) -> tuple[float, float]:
        """Seconds until `times` runs are done, and until they were enqueued."""
        start = time.perf_counter()
        for _ in range(times):
            # The earlier results are let go at once, so that at most two programs' results are alive.
            results = self._compiled(self._sets)
        enqueued = time.perf_counter() - start
        jax.block_until_ready(results)
        return time.perf_counter() - start, enqueued

    def kernel_seconds(self) -> float | None:
        if not self._cupti:
            return None
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.Cupti().measure(self._compiled)(self._sets)
        return None if milliseconds is None else milliseconds / 1e3 / len(self._sets)


class TorchProgram:
    """A torch function on each operand set, captured as one CUDA graph; the operands share JAX's memory."""

    def __init__(self, contender: Contender, step: str, sets: Sequence[Operands]) -> None:
        import torch

        self._torch = torch
        function = contender.steps[step]
        jax.block_until_ready(list(sets))
        tensors = [contender.prepare(step, jax.tree.map(torch.from_dlpack, operands)) for operands in sets]
        self._calls = [functools.partial(function, *operands) for operands in tensors]
        self._repeats: int | None = None
        self.clock: Clock = "cuda events"
        if tensors[0][0].is_cuda:
            self._capture()
        else:
            self.clock, self._results, self._replay = "wall clock", self._call_all(), self._call_again

    def _capture(self) -> None:
        cuda = self._torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up on first use, which a graph cannot hold
                for call in self._calls:
                    call()
        cuda.synchronize()
        try:
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                self._results = self._call_all()
            self._replay = graph.replay
        except RuntimeError:
            cuda.synchronize()
            self.clock, self._results, self._replay = "cuda events, eager", self._call_all(), self._call_again

    def _call_all(self) -> list[tuple[Any, ...]]:
        results = (call() for call in self._calls)
        return [result if isinstance(result, tuple) else (result,) for result in results]

    def _call_again(self) -> None:
        self._results = []  # so that the allocator puts the new results where these were
        self._results = self._call_all()

    def run(self) -> list[Results]:
        for results in self._results:
            for result in results:
                result.fill_(math.nan if result.is_floating_point() else -1)
        self._replay()
        if self.clock != "wall clock":
            self._torch.cuda.synchronize()
        return [tuple(map(self._to_jax, results)) for results in self._results]

    def _to_jax(self, result: Any) -> jax.Array:
        narrow = result.int() if result.dtype == self._torch.int64 else result  # JAX keeps 32 bits
        return jnp.from_dlpack(narrow.contiguous())

    def sample(self) -> Sample:
        if self.clock == "wall clock":
            start = time.perf_counter()
            self._replay()
            return Sample((time.perf_counter() - start) / len(self._calls), host_bound=False)
        if self._repeats is None:
            once = self._elapsed(1)
            self._repeats = min(max(math.ceil(_SAMPLE_SECONDS / once), 2), _MOST_REPEATS)
        return Sample(self._elapsed(self._repeats) / (self._repeats * len(self._calls)), host_bound=False)

    def _elapsed(self, times: int) -> float:
        start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is still at this replay when the event is enqueued, so that it never waits for the host.
        self._replay()
        start.record()
        for _ in range(times):
            self._replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def kernel_seconds(self) -> float | None:
        return None


def build(
    contender: Contender, step: str, sets: Sequence[Operands], compiled: Mapping[str, Any], clock: Clock, cupti: bool
) -> Program:
    """The contender's program on these operands."""
    if contender.framework == "torch":
        return TorchProgram(contender, step, sets)
    return JaxProgram(compiled[contender.name], sets, clock, cupti)


def raise_if_lost(name: str, reason: str) -> None:
    """After an error: raises DeviceLost if the device cannot add any more."""
    one = np.ones((), np.int32)
    try:
        alive = int(jnp.asarray(one) + jnp.asarray(one)) == 2
    except RuntimeError:
        alive = False
    if not alive:
        raise DeviceLost(f"{name} took the device down ({reason}): give the same command again, it goes on without")


def fill_free_memory_with_poison(results: Sequence[jax.ShapeDtypeStruct], count: int) -> None:
    """Writes NaN (or -1) where the next such results are likely to be put, so that an unwritten element shows."""
    jax.block_until_ready([poison(result) for result in results for _ in range(count)])
