"""Runs a trace against an engine in this process, in real time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from foejax.serving.engine import Engine
from foejax.serving.load.latency import RequestRecord
from foejax.serving.load.trace import Trace
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.sequence import FinishReason


def run_in_process(
    engine: Engine,
    trace: Trace,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    timeout: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[RequestRecord]:
    """One record for each request of the trace, in its order; greedy, past the end of the text.

    Requests enter between two steps. A burst is what a step added to a request, timed when the step has returned.

    Args:
      engine: idle, on the same clock.
      encode: token ids of a text; needed where prompts are texts.
      timeout: seconds after its arrival at which a request fails.
      clock, sleep: seconds.
    """
    assert not engine.num_unfinished, "the engine is at work"
    prompts = [_token_ids(request.prompt, encode) for request in trace.requests]
    records = [RequestRecord(request.arrival, request.output_tokens) for request in trace.requests]
    start, coming = clock(), 0
    while coming < len(records) or engine.num_unfinished:
        now = clock() - start
        while coming < len(records) and records[coming].arrival <= now:
            _add(engine, coming, prompts[coming], records[coming], start + records[coming].arrival + timeout)
            records[coming].sent = now
            if records[coming].failure:
                records[coming].finished = now
            coming += 1
        if not engine.num_unfinished:
            if coming < len(records):
                sleep(max(0.0, records[coming].arrival - (clock() - start)))
            continue
        pieces = engine.step()
        now = clock() - start
        for piece in pieces:
            record = records[int(piece.request_id)]
            if piece.tokens:
                record.bursts.append((now, len(piece.tokens)))
            if piece.finish_reason is not None:
                record.finished = now
                record.failure = _failure(piece.finish_reason, record)
    return records


def _token_ids(prompt: str | tuple[int, ...], encode: Callable[[str], Sequence[int]] | None) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    assert encode is not None, "texts need `encode`"
    return encode(prompt)


def _add(engine: Engine, index: int, prompt: Sequence[int], record: RequestRecord, deadline: float) -> None:
    record.prompt_tokens = len(prompt)
    params = SamplingParams(max_tokens=record.wanted_tokens, temperature=0, ignore_eos=True)
    try:
        engine.add(str(index), prompt, params, deadline=None if deadline == float("inf") else deadline)
    except ValueError as error:  # a prompt that does not fit is a failure, as it is over HTTP
        record.failure = f"refused: {error}"


def _failure(reason: FinishReason, record: RequestRecord) -> str:
    if reason in (FinishReason.ABORT, FinishReason.DEADLINE):
        return {"abort": "aborted", "deadline": "timed out"}[reason.value]
    return "" if record.bursts else "no token came"
