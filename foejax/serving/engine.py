"""The engine: requests in, pieces of their continuations out, one step at a time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import Protocol

from foejax.serving.expert_budget import ExpertReads
from foejax.serving.runner import StepResult
from foejax.serving.sampling_params import SamplingParams, SamplingParamsError
from foejax.serving.scheduler import Scheduler
from foejax.serving.sequence import FinishReason, Sequence
from foejax.serving.step_plan import StepPlan
from foejax.serving.text import Decode, TextStream
from foejax.serving.token_logprobs import TokenLogprobs


class Runner(Protocol):
    """What carries plans out: `runner.ModelRunner`, or a stand-in."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan's step."""


class Scorer(Protocol):
    """What knows log-probabilities of prompts: `scoring.PromptScorer`, or a stand-in."""

    def score(self, prompts: Sized[Sized[int]]) -> list[list[TokenLogprobs]]:
        """Of every prompt those of its tokens from the second one on."""


class PromptError(ValueError):
    """A prompt that the model cannot continue."""


@dataclass(frozen=True)
class Piece:
    """What a step added to one continuation of a request.

    Attributes:
      request_id: of the request.
      index: which of its `n` continuations.
      text: new text, without what may become a stop string; "" where the engine has no tokenizer.
      tokens: new token ids.
      logprobs: one for each token, or None.
      finish_reason: None while it goes on.
      prompt_logprobs: of the prompt's tokens from the second one on, where asked for, in one piece that comes before
        all others of the request and holds nothing else.
    """

    request_id: str
    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(eq=False)
class _Continuation:
    """A sequence and what is known of it to the caller."""

    request_id: str
    index: int
    sequence: Sequence
    text: TextStream | None


class Engine:
    """Continues many requests at once.

    Not thread-safe: one thread adds requests and calls `step`.

    Attributes:
      expert_reads: which experts the last step read; None where the runner does not report them.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        context: int,
        vocab_size: int,
        eos_id: int | None = None,
        decode: Decode | None = None,
        scorer: Scorer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          context: longest sequence, prompt and output.
          eos_id: token that ends a continuation.
          decode: text of token ids; None gives tokens alone.
          scorer: None refuses requests for log-probabilities of prompts.
          clock: seconds, for deadlines.
        """
        self.runner, self.scheduler = runner, scheduler
        self.context, self.vocab_size, self.eos_id = context, vocab_size, eos_id
        self.expert_reads: ExpertReads | None = None
        self._decode, self._scorer, self._clock = decode, scorer, clock
        self._requests: dict[str, list[_Continuation]] = {}
        self._continuations: dict[int, _Continuation] = {}
        self._num_sequences = 0
        self._unscored: dict[str, list[Sequence]] = {}
        self._pieces: list[Piece] = []

    @property
    def num_unfinished(self) -> int:
        """Requests that are not done."""
        return len(self._requests)

    def add(
        self, request_id: str, prompt: Sized[int], params: SamplingParams, *, deadline: float | None = None
    ) -> None:
        """Queue a request.

        Args:
          prompt: token ids.
          deadline: on the engine's clock; the request ends there with what it has.

        Raises:
          PromptError: an empty prompt, one that fills the context, or an id outside the vocabulary.
          SamplingParamsError: stop strings without a tokenizer.
          ValueError: the id is in use, or the request can outgrow the cache.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is running: choose another id")
        self.check(prompt, params)
        sequences = self._make_sequences(prompt, params, deadline)
        open_ones = self._requests[request_id] = []
        for index, sequence in enumerate(sequences):
            text = TextStream(self._decode, params.stop) if self._decode else None
            continuation = _Continuation(request_id, index, sequence, text)
            self._continuations[sequence.id] = continuation
            open_ones.append(continuation)
        if params.prompt_logprobs is not None:
            self._unscored[request_id] = sequences
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def check(self, prompt: Sized[int], params: SamplingParams) -> None:
        """Refuse a request that `add` would refuse whatever runs; this alone may be called from any thread.

        Raises:
          PromptError, SamplingParamsError, ValueError: see `add`.
        """
        self._check_prompt(prompt)
        if params.stop and self._decode is None:
            raise SamplingParamsError("stop", f"{params.stop} needs a tokenizer: use stop_token_ids")
        if params.prompt_logprobs is not None and self._scorer is None:
            raise SamplingParamsError(
                "prompt_logprobs", f"{params.prompt_logprobs} needs an engine that scores prompts: set score_prompts"
            )
        self.scheduler.check(self._last_length(prompt, params))

    def abort(self, request_id: str) -> None:
        """End a request; unknown and finished ones are let be. The next `step` returns its last pieces."""
        for sequence in self._unscored.pop(request_id, ()):
            sequence.finish_reason = FinishReason.ABORT
        for continuation in list(self._requests.get(request_id, ())):
            self.scheduler.finish(continuation.sequence, FinishReason.ABORT)
            self._emit(continuation.sequence, [], None)

    def step(self) -> list[Piece]:
        """Carry out one step, if there is anything to do, and return what it added."""
        for sequence in self.scheduler.expire(self._clock()):
            self._emit(sequence, [], None)
        self._score_prompts()
        plan = self.scheduler.plan()
        if plan is not None:
            result = self.runner.run(plan)
            self.expert_reads = result.experts
            logprobs = self._logprobs_by_sequence(result)
            for sequence, tokens in self.scheduler.update(result.tokens):
                self._emit(sequence, tokens, logprobs.get(sequence.id))
        pieces, self._pieces = self._pieces, []
        return pieces

    def _score_prompts(self) -> None:
        """Score as many prompts as go at once and queue their requests; others do not wait long for it."""
        request_ids = list(self._unscored)[: self.scheduler.limits.num_shards]
        if not request_ids or self._scorer is None:
            return
        batch = [self._unscored.pop(request_id) for request_id in request_ids]
        scores = self._scorer.score([sequences[0].tokens for sequences in batch])
        for request_id, sequences, found in zip(request_ids, batch, scores, strict=True):
            kept = tuple(logprobs.first(sequences[0].params.prompt_logprobs or 0) for logprobs in found)
            self._pieces.append(Piece(request_id, 0, "", (), None, None, kept))
            for sequence in sequences:
                self.scheduler.add(sequence)

    def _make_sequences(self, prompt: Sized[int], params: SamplingParams, deadline: float | None) -> list[Sequence]:
        length = self._last_length(prompt, params)
        stops = {*params.stop_token_ids, *(() if self.eos_id is None or params.ignore_eos else (self.eos_id,))}
        seed = secrets.randbits(31) if params.seed is None else params.seed
        sequences: list[Sequence] = []
        for index in range(params.n):
            sequences.append(
                Sequence(
                    id=self._num_sequences + index,
                    tokens=[int(token) for token in prompt],
                    prompt_length=len(prompt),
                    last_length=length,
                    params=params,
                    stop_tokens=frozenset(stops),
                    seed=(seed + index) % 2**31,
                    deadline=deadline,
                    parent=sequences[0] if sequences else None,
                )
            )
        self._num_sequences += params.n
        return sequences

    def _last_length(self, prompt: Sized[int], params: SamplingParams) -> int:
        most = self.context - len(prompt)
        return len(prompt) + (most if params.max_tokens is None else min(params.max_tokens, most))

    def _check_prompt(self, prompt: Sized[int]) -> None:
        if not len(prompt):
            raise PromptError("the prompt has no tokens: give at least one")
        if len(prompt) >= self.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}: shorten it to at most "
                f"{self.context - 1}"
            )
        outside = [token for token in prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise PromptError(
                f"token {outside[0]} is outside the vocabulary: choose ids from 0 to {self.vocab_size - 1}"
            )

    def _logprobs_by_sequence(self, result: StepResult) -> dict[int, list[TokenLogprobs]]:
        if result.logprobs is None:
            return {}
        decode, prefill = result.logprobs
        planned = self.scheduler.planned_sequences()
        found = {}
        for sequences, values in zip(planned, (decode, [[[row] for row in rows] for rows in prefill]), strict=True):
            for shard, rows in zip(sequences, values, strict=True):
                found.update({sequence.id: row for sequence, row in zip(shard, rows, strict=True)})
        return found

    def _emit(self, sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        """Turn new tokens into a piece, and let go of a continuation that has ended."""
        continuation = self._continuations[sequence.id]
        text, new_text = continuation.text, ""
        if text is not None:
            shown = tokens[:-1] if tokens and tokens[-1] in sequence.stop_tokens else tokens
            if text.append(shown) and sequence.finish_reason in (None, FinishReason.LENGTH):
                self.scheduler.finish(sequence, FinishReason.STOP)
                sequence.finish_reason = FinishReason.STOP
            elif sequence.finish_reason is not None:
                text.finish()
            new_text = text.take(finished=sequence.finish_reason is not None)
        wanted = sequence.params.logprobs
        self._pieces.append(
            Piece(
                continuation.request_id,
                continuation.index,
                new_text,
                tuple(tokens),
                None if wanted is None else tuple(value.first(wanted) for value in (logprobs or [])[: len(tokens)]),
                sequence.finish_reason,
            )
        )
        if sequence.finish_reason is not None:
            del self._continuations[sequence.id]
            open_ones = self._requests[continuation.request_id]
            open_ones.remove(continuation)
            if not open_ones:
                del self._requests[continuation.request_id]
