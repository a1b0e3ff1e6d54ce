"""vLLM as a contender; runs in a Python that has vllm, and needs no other."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its processor time is then known
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
import vllm

from experiments.serving_bench.line_protocol import Stopwatch, answer_commands


class Vllm:
    """Its offline engine, which batches continuously."""

    def __init__(self, options: dict[str, Any]) -> None:
        """
        Args:
          options: folder, requests, prompt_tokens, output_tokens, dtypes.
        """
        self._options = options
        self._llm: Any = None

    def facts(self) -> dict[str, Any]:
        """Device and versions."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"device": device, "torch": torch.__version__, "vllm": vllm.__version__}

    def settings(self) -> list[dict[str, Any]]:
        """Every dtype; on a GPU with its graphs."""
        eager = (False,) if torch.cuda.is_available() else (True, False)
        return [
            {"dtype": dtype, "enforce_eager": enforce_eager}
            for dtype in self._options["dtypes"]
            for enforce_eager in eager
        ]

    def prepare(self, setting: dict[str, Any]) -> None:
        """Load."""
        self._llm = None
        gc.collect()
        self._llm = vllm.LLM(
            model=self._options["folder"],
            skip_tokenizer_init=True,
            dtype=setting["dtype"],
            enforce_eager=setting["enforce_eager"],
            max_model_len=self._options["prompt_tokens"] + self._options["output_tokens"],
            max_num_seqs=self._options["requests"],
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,
            disable_log_stats=True,
        )

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, Any]:
        """Continue all prompts greedily, all there from the start."""
        params = vllm.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with Stopwatch() as watch:
            results = self._llm.generate(inputs, params, use_tqdm=False)
        return watch.figures([list(result.outputs[0].token_ids) for result in results])


if __name__ == "__main__":
    answer_commands(Vllm)
