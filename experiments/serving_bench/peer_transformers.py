"""Hugging Face transformers as a contender; runs in a Python that has torch and transformers, and needs no other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from experiments.serving_bench.line_protocol import Stopwatch, answer_commands

_EXPERTS = ("eager", "grouped_mm", "batched_mm")
_CACHES = ("dynamic", "static")


class Transformers:
    """One batch of all requests, left-padded to equal length; on a GPU also its continuous batching."""

    def __init__(self, options: dict[str, Any]) -> None:
        """
        Args:
          options: folder, requests, prompt_tokens, output_tokens, dtypes, memory_bytes (that a setting may take),
            threads (0 leaves torch's own).
        """
        self._options = options
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.get("threads"):
            torch.set_num_threads(options["threads"])
        self._model: Any = None
        self._setting: dict[str, Any] = {}
        torch.manual_seed(0)

    def facts(self) -> dict[str, Any]:
        """Device and versions."""
        name = torch.cuda.get_device_name() if self._device == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"device": name, "threads": torch.get_num_threads(), **versions}

    def settings(self) -> list[dict[str, Any]]:
        """Every dtype with every implementation of the experts and both caches."""
        found = [
            {"dtype": dtype, "experts": experts, "cache": cache}
            for dtype in self._options["dtypes"]
            for experts in _EXPERTS
            for cache in _CACHES
        ]
        if self._device == "cuda":
            found += [
                {"dtype": dtype, "experts": experts, "cache": "continuous batching"}
                for dtype in self._options["dtypes"]
                for experts in ("eager", "grouped_mm")
            ]
        return found

    def prepare(self, setting: dict[str, Any]) -> None:
        """Load in the setting's dtype and choose the experts' implementation."""
        if self._model is None or setting["dtype"] != self._setting.get("dtype"):
            self._model = None
            gc.collect()
            dtype = getattr(torch, setting["dtype"])
            self._model = AutoModelForCausalLM.from_pretrained(self._options["folder"], dtype=dtype).to(self._device)
            self._model.eval()
        self._check_memory(setting)
        self._model.set_experts_implementation(setting["experts"])
        self._setting = setting

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, Any]:
        """Continue all prompts greedily."""
        if self._setting["cache"] == "continuous batching":
            return self._run_continuously(prompts, output_tokens)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            cache_implementation="static" if self._setting["cache"] == "static" else None,
        )
        longest = max(map(len, prompts))
        with Stopwatch() as watch, torch.inference_mode():
            padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            tokens = self._model.generate(
                padded.to(self._device), attention_mask=mask.to(self._device), generation_config=config
            )
            outputs = tokens[:, longest:].tolist()
        return watch.figures(outputs)

    def _run_continuously(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, Any]:
        config = GenerationConfig(
            do_sample=False, max_new_tokens=output_tokens, eos_token_id=-1, pad_token_id=0, use_cuda_graph=True
        )
        with Stopwatch() as watch:
            results = self._model.generate_batch(inputs=[list(prompt) for prompt in prompts], generation_config=config)
        outputs = [result.generated_tokens for result in results.values()]
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(prompts) - len(outputs)} of {len(prompts)} requests did not come back")
        return watch.figures(outputs)

    def _check_memory(self, setting: dict[str, Any]) -> None:
        """`batched_mm` copies an expert's weights for every token and choice of the prompts."""
        if setting["experts"] != "batched_mm":
            return
        config = self._model.config
        choices = self._options["requests"] * self._options["prompt_tokens"] * config.num_experts_per_tok
        needed = choices * 2 * config.hidden_size * config.intermediate_size * self._model.dtype.itemsize
        if needed > self._options["memory_bytes"]:
            raise MemoryError(f"batched_mm copies {needed / 2**30:.0f} GiB of weights for the prompts of one batch")


if __name__ == "__main__":
    answer_commands(Transformers)
