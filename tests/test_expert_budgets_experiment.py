"""The experiment over expert budgets: what it measures is what decoding would give, and what it writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import plain_batch, tiny_config, tiny_model

from experiments import expert_budgets, expert_budgets_report
from foejax.config import ConfigError
from foejax.models import LanguageModel
from foejax.models.cache import DenseCache
from foejax.models.language_model import QUICK_COMPILE, run_on_mesh
from foejax.models.transformer import Transformer, logits_of
from foejax.serving.expert_budget import ExpertBudget, make_select_fn

ROWS, LENGTH = 4, 6


def held_out() -> dict[str, np.ndarray]:
    """Four rows of text, the last with padding at its end."""
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[-1, -2:] = 0
    return plain_batch(tokens[:, :-1]) | {
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "loss_weights": segments.astype(np.float32),
    }


def decoded_nats(model: LanguageModel, batch: dict[str, np.ndarray], budget: ExpertBudget) -> float:
    """Mean cross-entropy of the text, decoded token by token with a cache."""
    layout, config = model.layout, model.config
    select_fn = make_select_fn(budget, layout)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def step(cache: DenseCache, tokens_B: jax.Array, positions_B: jax.Array, active_B: jax.Array) -> Any:
        def program(transformer: Transformer, inputs: Any) -> Any:
            cache, tokens_B, positions_B, active_B = jax.tree.map(layout.vary_local, inputs)
            cache = cache.at(positions_B[:, None])
            output = transformer.run_stack_local(
                tokens_B, positions_B, cache, layout, active_tokens=active_B, select_fn=select_fn
            )
            hidden_BD = transformer.hidden_rows_local(output.streams, jnp.arange(ROWS, dtype=jnp.int32), layout)
            logits_BV = logits_of(hidden_BD, transformer.head_local(layout, whole_vocab=True))
            return jax.tree.map(layout.max_over_all_local, (output.cache, jax.nn.log_softmax(logits_BV)))

        inputs = cache, tokens_B, positions_B, active_B
        return run_on_mesh(model.transformer, layout, program, PartitionSpec(), PartitionSpec())(inputs)

    cache = DenseCache.empty(
        num_layers=config.num_layers,
        batch=ROWS,
        slots=LENGTH,
        groups=config.num_groups,
        kv_heads=config.num_kv_heads // config.num_groups,
        head_dim=config.head_dim,
        dtype=config.dtype,
    )
    nats = 0.0
    for column in range(LENGTH):
        active_B = batch["segment_ids"][:, column] > 0
        cache, logprobs = step(cache, batch["tokens"][:, column], batch["positions"][:, column], active_B)
        nats -= np.asarray(logprobs)[np.arange(ROWS), batch["targets"][:, column]][active_B].sum()
    return float(nats / batch["loss_weights"].sum())


def test_the_experiment_measures_what_decoding_the_text_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(expert_budgets, "PROMPT_SHARE", 0.0)
    model, policy = tiny_model(tiny_config(num_groups=1, num_layers=2)), expert_budgets.Policy(warm_up=1)
    points = expert_budgets.measure(model, [held_out()], policy, quick=True)
    assert [point.budget for point in points] == [8, 12, 32]
    tight, _, free = points
    np.testing.assert_allclose(tight.nats, decoded_nats(model, held_out(), ExpertBudget(8, warm_up=1)), rtol=1e-5)
    assert tight.standard_error > 1e-3 and tight.nats_over_base == pytest.approx(tight.nats - free.nats)
    assert free.nats_over_base == 0 and free.kept_mass == pytest.approx(1) and tight.kept_mass < 0.95
    assert 8 <= tight.distinct < free.distinct <= 32 and tight.most_on_a_device <= 4
    curve = expert_budgets.curve("moe", model, ROWS, policy, points)
    expert_budgets_report.write({"command": "x", "rows": ROWS, "curves": [curve]}, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.md", "budgets.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| moe | warm-up 1 | 8 | {tight.perplexity_over_base:+.2%} |" in text
    assert "choosing 8 of 32 at random, 4 tokens would read 21.9." in text


def test_budgets_of_the_experiment_fit_their_parts() -> None:
    assert expert_budgets.budgets(32, 8, 1) == [8, 12, 16, 20, 24, 28, 32]
    assert expert_budgets.budgets(32, 8, 8) == [8, 16, 24, 32]
    assert expert_budgets.budgets(64, 8, 8, quick=True) == [8, 16, 64]


def test_the_experiment_finds_models_or_says_so(tmp_path: Path) -> None:
    for name in ("foe", "moe", "compiled"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="holds no model, and none of its folders does"):
        expert_budgets.model_folders(tmp_path)
    for name in ("foe", "moe"):
        (tmp_path / name / "config.yaml").touch()
    assert [path.name for path in expert_budgets.model_folders(tmp_path)] == ["foe", "moe"]
    assert expert_budgets.model_folders(tmp_path / "foe") == [tmp_path / "foe"]
    with pytest.raises(ConfigError, match="--tokens-per-step 9: choose from 1 to --rows 8"):
        expert_budgets.parse([str(tmp_path), "--out", "x", "--tokens-per-step", "9", "--rows", "8"])
