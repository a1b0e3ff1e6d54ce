"""Two engines in alternating order on the same prompts, each in its best setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.serving_bench.line_protocol import ContenderFailed, ContenderProcess

Prompts = list[list[int]]


@dataclass(frozen=True)
class Workload:
    """All requests are there from the start.

    Attributes:
      requests: how many.
      prompt_tokens, output_tokens: of each.
      vocab_size: prompts hold ids below it.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int

    def prompts(self, seed: int) -> Prompts:
        """Random prompts; each seed has others, so that no engine finds them in its cache."""
        drawn = np.random.default_rng(seed).integers(0, self.vocab_size, (self.requests, self.prompt_tokens))
        prompts: Prompts = drawn.tolist()
        return prompts


@dataclass
class Contender:
    """One engine of the race.

    Attributes:
      trials: settings tried, each with tokens a second, or why it did not run.
      setting: the fastest of them.
      runs: of the race itself, what `Stopwatch.figures` says.
    """

    name: str
    process: ContenderProcess
    facts: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)


def find_best_setting(
    contender: Contender, workload: Workload, trial_tokens: int, timeout: float, say: Callable[[str], None]
) -> None:
    """Try every setting with fewer output tokens, warm, and prepare the fastest.

    A setting's tokens a second are those of the whole workload, from its time for the prompts and its time a token.

    Raises:
      ContenderFailed: none runs.
    """
    contender.facts = contender.process.ask("facts")
    settings: list[dict[str, Any]] = contender.process.ask("settings")
    for setting in settings:
        trial: dict[str, Any] = {"setting": setting, "tokens_per_second": None, "reason": None}
        try:
            if len(settings) > 1:
                trial["tokens_per_second"] = _try(contender.process, setting, workload, trial_tokens, timeout)
            else:
                contender.process.ask("prepare", {"setting": setting}, timeout=timeout)
        except ContenderFailed as failure:
            trial["reason"] = str(failure)
        contender.trials.append(trial)
        say(f"{contender.name} {describe(setting)}: {trial['reason'] or _rate(trial)}")
    running = [trial for trial in contender.trials if trial["reason"] is None]
    if not running:
        raise ContenderFailed(f"{contender.name}: no setting runs; the last one: {contender.trials[-1]['reason']}")
    contender.setting = max(running, key=lambda trial: trial["tokens_per_second"] or 0.0)["setting"]
    contender.process.ask("prepare", {"setting": contender.setting})


def _try(
    process: ContenderProcess, setting: Mapping[str, Any], workload: Workload, trial_tokens: int, timeout: float
) -> float:
    process.ask("prepare", {"setting": setting}, timeout=timeout)

    def seconds(output_tokens: int) -> float:
        arguments = {"prompts": workload.prompts(seed=output_tokens), "output_tokens": output_tokens}
        return float(process.ask("run", arguments, timeout=timeout)["seconds"])

    seconds(2)  # warm
    prompts = min(seconds(1), seconds(1))
    whole = min(seconds(trial_tokens), seconds(trial_tokens))
    if whole <= prompts:
        raise ContenderFailed(f"{trial_tokens} tokens took less time than 1: the machine is too busy to tell")
    token = (whole - prompts) / (trial_tokens - 1)
    return workload.requests * workload.output_tokens / (prompts + token * (workload.output_tokens - 1))


def race(
    contenders: Sequence[Contender],
    workload: Workload,
    repeats: int,
    load: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Fill in `runs`: a warm-up each, then all in turns, the order reversed from one repeat to the next.

    Raises:
      ContenderFailed: a run failed or gave fewer tokens than asked for.
    """
    for contender in contenders:
        contender.process.ask("run", {"prompts": workload.prompts(10_000), "output_tokens": workload.output_tokens})
    for repeat in range(repeats):
        for contender in contenders if repeat % 2 == 0 else contenders[::-1]:
            before = load()
            arguments = {"prompts": workload.prompts(20_000 + repeat), "output_tokens": workload.output_tokens}
            figures = contender.process.ask("run", arguments)
            if figures["fewest"] < workload.output_tokens:
                raise ContenderFailed(f"{contender.name} gave a request {figures['fewest']} tokens only")
            contender.runs.append({**figures, "load": (before + load()) / 2})
            say(f"{contender.name}: {figures['output_tokens'] / figures['seconds']:.1f} tokens/s")


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _rate(trial: Mapping[str, Any]) -> str:
    return "the only setting" if trial["tokens_per_second"] is None else f"{trial['tokens_per_second']:.1f} tokens/s"
