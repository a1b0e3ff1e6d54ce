"""Our engine as a contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from experiments.serving_bench.line_protocol import Stopwatch, answer_commands
from foejax.api import load
from foejax.devices import avoid_broken_reductions
from foejax.serving.engine_config import EngineConfig
from foejax.serving.llm import LLM
from foejax.serving.sampling_params import SamplingParams


class Ours:
    """The engine in its default setting, with as many slots as requests."""

    def __init__(self, options: dict[str, Any]) -> None:
        """
        Args:
          options: folder, requests, prompt_tokens, output_tokens, dtypes, engine (fields of EngineConfig).
        """
        self._options = options
        self._llm: LLM | None = None

    def facts(self) -> dict[str, Any]:
        """Device and versions."""
        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def settings(self) -> list[dict[str, Any]]:
        """One for each dtype."""
        return [{"dtype": dtype} for dtype in self._options["dtypes"]]

    def prepare(self, setting: dict[str, Any]) -> None:
        """Load and compile."""
        self._llm = None
        self._llm = make_llm(self._options, setting["dtype"])

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, Any]:
        """Continue all prompts greedily, all there from the start."""
        assert self._llm is not None, "prepare first"
        self._llm.engine = self._llm.make_engine()  # without the prefixes of earlier runs
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        with Stopwatch() as watch:
            completions = self._llm.generate(prompts, params)
        return watch.figures([completion.continuations[0].tokens for completion in completions])


def make_llm(options: dict[str, Any], dtype: str) -> LLM:
    """The model of a folder in an engine that holds all requests at once."""
    config = EngineConfig(
        **{
            "max_sequences": options["requests"],
            "context": options["prompt_tokens"] + options["output_tokens"],
            **options["engine"],
        }
    )
    return LLM(load(options["folder"], devices=1, dtype=dtype), config, progress=False)


if __name__ == "__main__":
    avoid_broken_reductions()
    answer_commands(Ours)
