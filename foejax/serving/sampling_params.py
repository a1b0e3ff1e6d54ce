"""What a request may ask of sampling, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_TOP_LOGPROBS = 20
"""Alternatives a request may ask for at each token, as in OpenAI's API."""


class SamplingParamsError(ValueError):
    """A parameter out of range; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}={message}")
        self.field = field


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
      max_tokens: most tokens to generate; None is as many as the context holds.
      temperature: 0 takes the likeliest token.
      top_k: draw among the k likeliest; 0 is all.
      top_p: draw among the likeliest tokens that together have this probability.
      min_p: leave out tokens less likely than this share of the likeliest one's probability.
      repetition_penalty: logits of tokens that stand in prompt or output are divided by it where positive, multiplied
        where negative (arXiv 1909.05858, section 4.1); 1 is none.
      seed: of the request's draws, which depend on nothing else: neither on what shares its batch nor on preemption.
        None draws one.
      n: continuations of the prompt; continuation i has seed + i.
      stop: the text ends before the first of these strings.
      stop_token_ids: the output ends with the first of these tokens, which counts.
      ignore_eos: go on past the tokenizer's end-of-text token.
      logprobs: log-probabilities of that many likeliest tokens beside the chosen one's; None returns none. They are
        those of the model, before temperature and penalties.
      prompt_logprobs: the same for the prompt's tokens from the second one on, each given those before it.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float | None, float, float], ...] = (
            ("max_tokens", self.max_tokens, 1, math.inf),
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100),
            ("seed", self.seed, -(2**63), 2**63 - 1),
            ("n", self.n, 1, 128),
            ("logprobs", self.logprobs, 0, LARGEST_TOP_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, LARGEST_TOP_LOGPROBS),
        )
        for field, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise SamplingParamsError(field, f"{value} is out of range: choose from {low:g} to {high:g}")
        if not 0 < self.top_p <= 1:
            raise SamplingParamsError("top_p", f"{self.top_p} is out of range: choose above 0, to 1")
        if "" in self.stop:
            raise SamplingParamsError("stop", f"{self.stop} holds an empty string, which every text contains: drop it")
