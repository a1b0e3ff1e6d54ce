"""One sequence of requests that engines in one and in several processes get, and all that is seen of it.

python -m serving_scenario KIND SIZES FOLDER     (in every process; SIZES like {"group": 2}; writes FOLDER/RANK.json)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from tiny import tiny_config

from foejax.api import LoadedModel
from foejax.config import load_config
from foejax.models import LanguageModel
from foejax.serving.engine_config import EngineConfig
from foejax.serving.llm import LLM
from foejax.serving.processes import Follower
from foejax.serving.sampling_params import SamplingParams
from sharding import Layout, LayoutKind, hosts
from sharding.races import find_races

CONTEXT = 40
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 11, 12], list(range(30)), [63], [5] * 20, [9, 8] * 7]
"""Two begin alike; the third is longer than the prompt tokens of a step."""
PARAMS = [
    SamplingParams(max_tokens=8, temperature=0, logprobs=2),
    SamplingParams(max_tokens=6, seed=3, n=2, logprobs=1),
    SamplingParams(max_tokens=7, temperature=0, prompt_logprobs=2),
    SamplingParams(max_tokens=9, seed=5, top_k=20, top_p=0.9),
    SamplingParams(max_tokens=12, temperature=0, repetition_penalty=1.2),
    SamplingParams(max_tokens=5, seed=8, min_p=0.05),
]


def make_llm(kind: LayoutKind, num_layers: int, sizes: dict[str, int]) -> LLM:
    """A tiny model and an engine whose cache is too small for all that may run."""
    groups = 8 if kind == "foe" else 1
    layout = Layout.create(kind, num_groups=groups, num_experts=32, num_kv_heads=8, shard_params=False, **sizes)
    hosts.connect(layout.mesh)
    model = LanguageModel.create(tiny_config(num_groups=groups, num_layers=num_layers), layout, jax.random.key(0))
    shards = layout.num_token_shards
    engine = EngineConfig(
        max_sequences=2 * shards,
        context=CONTEXT,
        cache_tokens=48 * shards,
        block_size=4,
        prefill_tokens=16,
        decode_steps=2,
        score_prompts=True,
        report_experts=True,
    )
    return LLM(LoadedModel(model, None, load_config("foe_tiny"), Path("nowhere")), engine, progress=False)


def see(llm: LLM) -> dict[str, Any]:
    """What this process sees: in process 0 all, in others what `generate` returns."""
    seen: dict[str, Any] = {"completions": [asdict(completion) for completion in llm.generate(PROMPTS, PARAMS)]}
    programs = [*llm.runner._programs.values(), llm.scorer._program]
    seen["races"] = [race.op_name for program in programs for race in find_races(program.as_text())]
    if isinstance(llm.part, Follower):
        llm.follow()
        return seen
    seen |= _see_abort(llm)
    llm.release()
    scheduler = llm.engine.scheduler
    return seen | {
        "num_preemptions": scheduler.num_preemptions,
        "num_prefix_tokens": scheduler.num_prefix_tokens,
        "held_share": scheduler.held_share,
    }


def _see_abort(llm: LLM) -> dict[str, Any]:
    """Two requests of which one is aborted on its way, and one that comes later."""
    engine, tokens, reads = llm.engine, {name: [] for name in "abc"}, []
    engine.add("a", PROMPTS[0], PARAMS[0])
    engine.add("b", PROMPTS[4], PARAMS[4])
    for number in range(40):
        if number == 3:
            engine.abort("b")
            engine.add("c", PROMPTS[1], PARAMS[3])
        for piece in engine.step():
            tokens[piece.request_id].extend(piece.tokens)
        if engine.expert_reads is not None:
            reads.append(engine.expert_reads.tokens_TCLA.sum(axis=(0, 1)).tolist())
    assert not engine.num_unfinished
    return {"tokens": tokens, "reads": reads}


def main() -> None:
    """Join the others, see, and write it."""
    kind, num_layers, sizes, folder = sys.argv[1:]
    hosts.start()
    seen = see(make_llm(kind, int(num_layers), json.loads(sizes)))  # type: ignore[arg-type]
    seen["others"] = hosts.processes_that_differ(f"process {jax.process_index()}")
    (Path(folder) / f"{jax.process_index()}.json").write_text(json.dumps(seen), encoding="utf-8")
    hosts.finish()


if __name__ == "__main__":
    main()
