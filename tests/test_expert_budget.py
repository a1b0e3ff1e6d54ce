"""Expert budgets: the set is the best of its size, padding has no say, and neutral settings change nothing."""

from __future__ import annotations

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_for, tiny_config

from foejax.config import ConfigError
from foejax.models import LanguageModel, route
from foejax.models.language_model import QUICK_COMPILE
from foejax.models.router import Routing
from foejax.serving.engine_config import EngineConfig
from foejax.serving.expert_budget import (
    ExpertBudget,
    ExpertSums,
    choose_experts,
    choose_experts_for_drafts,
    expected_distinct_experts,
    keep_only,
    make_select_fn,
    read_expert_sums,
)
from foejax.serving.runner import ModelRunner, StepResult
from foejax.serving.step_plan import Row, SlotLoad, StepPlan
from sharding import Layout
from sharding.races import find_races

ONE_DEVICE = Layout.single_device()
choose = jax.jit(choose_experts, static_argnames=("warm_up", "parts"))
choose_for_drafts = jax.jit(choose_experts_for_drafts, static_argnames=("num_requests", "warm_up", "parts"))


@partial(jax.jit, static_argnames=("k", "budget"))
def routed(logits_SNE: jax.Array, k: int, budget: ExpertBudget | None = None) -> Routing:
    return route(logits_SNE, k, select_fn=make_select_fn(budget, ONE_DEVICE) if budget else None)


def logits(groups: int = 2, tokens: int = 6, experts: int = 8, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(groups, tokens, experts)) * 2, jnp.float32)


def scores(groups: int = 2, tokens: int = 6, experts: int = 8, seed: int = 0) -> jax.Array:
    return jax.nn.softmax(logits(groups, tokens, experts, seed), axis=-1)


def everybody(scores_SNE: jax.Array) -> jax.Array:
    return jnp.ones(scores_SNE.shape[1], bool)


def first_choices(scores_SNE: np.ndarray, count: int) -> np.ndarray:
    """Union of the tokens' first choices [S, E]."""
    order = np.argsort(-scores_SNE, axis=-1, kind="stable")[..., :count]
    return (order[..., None] == np.arange(scores_SNE.shape[-1])).any(axis=(1, 2))


def assert_same_routing(found: Routing, expected: Routing) -> None:
    """To the bit."""
    for name in ("indices_SNk", "weights_SNk", "valid_SNk"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("warm_up", [0, 1, 2])
@pytest.mark.parametrize("budget", [1, 3, 5, 8])
def test_no_other_set_of_that_size_with_the_warm_up_has_a_larger_sum(budget: int, warm_up: int) -> None:
    x = scores(tokens=3)
    kept = np.asarray(choose(x, everybody(x), budget, warm_up=warm_up))
    gate_SE, first_SE = np.asarray(x, np.float64).sum(1), first_choices(np.asarray(x), warm_up)
    for gate, chosen, first in zip(gate_SE, kept, first_SE, strict=True):
        assert chosen.sum() == max(budget, first.sum()) and chosen[first].all()
        rivals = [
            gate[list(members)].sum()
            for members in itertools.combinations(range(8), int(chosen.sum()))
            if set(np.flatnonzero(first)) <= set(members)
        ]
        assert rivals and gate[chosen].sum() >= max(rivals) - 1e-6


def test_ties_go_to_the_lower_index() -> None:
    x = jnp.full((1, 2, 6), 0.5)
    assert np.flatnonzero(choose(x, everybody(x), 2)[0]).tolist() == [0, 1]
    assert np.flatnonzero(choose(x, everybody(x), 2, parts=2)[0]).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("budget", [ExpertBudget(8), ExpertBudget(4, parts=2), ExpertBudget(3, warm_up=3)])
def test_budgets_that_keep_everything_change_nothing(budget: ExpertBudget) -> None:
    """m = E, in one part or in two, and k0 = k."""
    x = logits()
    limited = routed(x, 3, budget)
    assert_same_routing(limited, routed(x, 3))
    tight = routed(x, 3, ExpertBudget(3))
    assert np.any(np.asarray(tight.indices_SNk) != np.asarray(limited.indices_SNk)), "the case shows nothing"


def test_top_one_in_every_group_with_a_warm_up_of_one_is_plain_routing() -> None:
    """FoE with as many groups as choices."""
    x = logits(groups=8, experts=4)
    plain = routed(x, 1)
    assert_same_routing(routed(x, 1, ExpertBudget(1, warm_up=1)), plain)
    limited = routed(x, 1, ExpertBudget(1))
    assert all(len(set(group)) == 1 for group in np.asarray(limited.indices_SNk)[..., 0].tolist())
    assert np.any(np.asarray(limited.indices_SNk) != np.asarray(plain.indices_SNk))


def test_a_token_alone_keeps_its_choices() -> None:
    x = logits(tokens=1)
    for budget in (3, 5):
        assert_same_routing(routed(x, 3, ExpertBudget(budget)), routed(x, 3))
    below = routed(x, 3, ExpertBudget(2))
    assert not np.any(np.asarray(below.valid_SNk)[..., 2])


@pytest.mark.parametrize("warm_up", [0, 2])
def test_every_part_keeps_its_own_budget_but_for_the_warm_up(warm_up: int) -> None:
    x = scores(groups=1, tokens=5, experts=12)
    kept = np.asarray(choose(x, everybody(x), 2, warm_up=warm_up, parts=3)).reshape(3, 4)
    first, gate = first_choices(np.asarray(x), warm_up).reshape(3, 4), np.asarray(x).sum((0, 1)).reshape(3, 4)
    for part in range(3):
        by_gate = sorted(range(4), key=lambda expert: (not first[part, expert], -gate[part, expert]))
        assert np.flatnonzero(kept[part]).tolist() == sorted(by_gate[: max(2, first[part].sum())])
    assert (kept.sum(1).max() > 2) == (warm_up > 0), "the case shows nothing"
    whole = np.asarray(choose(x, everybody(x), 6)).reshape(3, 4)
    assert whole.sum(1).max() > 2, "the case shows nothing"


def test_padding_has_no_say() -> None:
    x, padding = scores(tokens=4), 100 * scores(tokens=3, seed=1)
    active = jnp.asarray([True] * 4 + [False] * 3)
    joint = jnp.concatenate([x, padding], axis=1)
    for warm_up in (0, 1):
        alone = choose(x, everybody(x), 3, warm_up=warm_up)
        np.testing.assert_array_equal(choose(joint, active, 3, warm_up=warm_up), alone)
        heard = choose(joint, everybody(joint), 3, warm_up=warm_up)
        assert np.any(np.asarray(heard) != np.asarray(alone)), "the case shows nothing"


def test_kept_mass_is_of_the_choices_without_a_budget() -> None:
    x, active = logits(), jnp.asarray([True] * 5 + [False])
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 8)), jnp.float32)
    plain = route(x, 3, selection_bias=bias, active_tokens=active)
    select_fn = make_select_fn(ExpertBudget(4), ONE_DEVICE)
    limited = route(x, 3, selection_bias=bias, active_tokens=active, select_fn=select_fn)
    assert plain.unrestricted_SN is None and limited.unrestricted_SN is not None
    np.testing.assert_allclose(limited.unrestricted_SN, plain.weights_SNk.sum(-1), rtol=1e-6)
    assert limited.weights_SNk.sum() < 0.99 * plain.weights_SNk.sum()


def drafts(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Three requests of four drafted tokens."""
    return scores(groups=2, tokens=12, experts=16, seed=seed), jnp.repeat(jnp.arange(3, dtype=jnp.int32), 4)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_drafts_of_one_request_or_without_a_request_budget_choose_as_a_batch(warm_up: int) -> None:
    x, request = drafts()
    flat = choose(x, everybody(x), 6, warm_up=warm_up)
    choose_drafts = partial(choose_for_drafts, x, everybody(x), part_size=6, warm_up=warm_up)
    np.testing.assert_array_equal(choose_drafts(request, num_requests=3, request_size=16), flat)
    np.testing.assert_array_equal(choose_drafts(jnp.zeros_like(request), num_requests=1, request_size=2), flat)


@pytest.mark.parametrize("seed", range(3))
def test_drafts_fill_the_budget_from_what_requests_chose(seed: int) -> None:
    x, request = drafts(seed)
    active = jnp.asarray([True] * 8 + [False] * 4)
    gates = np.asarray(x).reshape(2, 3, 4, 16).sum(2)[:, :2]
    chosen = gates >= np.sort(gates, -1)[..., -3:].min(-1, keepdims=True)
    for budget in (2, 4, 8):
        kept = choose_for_drafts(x, active, request, budget, num_requests=3, request_size=3)
        # Whom no request chose comes after all others, by its sum.
        joint = np.where(chosen.any(1), np.where(chosen, gates, 0).sum(1), 1e-5 * gates.sum(1))
        expected = np.argsort(-joint, axis=-1)[:, :budget]
        assert [np.flatnonzero(row).tolist() for row in np.asarray(kept)] == np.sort(expected).tolist()
    first = first_choices(np.asarray(x)[:, :8], 1)
    kept = np.asarray(choose_for_drafts(x, active, request, 2, num_requests=3, request_size=3, warm_up=1))
    assert kept[first].all() and kept.sum(1).tolist() == np.maximum(2, first.sum(1)).tolist()


def test_drafts_keep_what_one_request_wants_over_what_all_half_want() -> None:
    """Expert 0 is second to each request; only inside a request's own budget of one does that not count."""
    rows = [[0.4, 0.6, 0, 0], [0.4, 0, 0.5, 0.1], [0.4, 0, 0, 0.5]]
    x = jnp.asarray(np.repeat(rows, 2, axis=0)[None], jnp.float32)
    request = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 2)
    flat = choose(x, everybody(x), 1)
    kept = choose_for_drafts(x, everybody(x), request, 1, num_requests=3, request_size=1)
    assert np.flatnonzero(flat[0]).tolist() == [0] and np.flatnonzero(kept[0]).tolist() == [1]


def test_expected_number_of_experts_at_random() -> None:
    """Figures of the paper's notes."""
    found = [expected_distinct_experts(128, 4, tokens) for tokens in (4, 8, 16, 32, 64)]
    np.testing.assert_allclose(found, [15.3, 28.7, 51.0, 81.7, 111.2], atol=0.05)


CONTEXT, STEPS = 12, 2
SLOW = pytest.mark.slow


@cache
def make_runner(kind: str, groups: int, devices: int, budget: ExpertBudget | None) -> ModelRunner:
    """A runner that can decode, and nothing else."""
    config = tiny_config(num_groups=groups, num_layers=2)
    layout = Layout.create(
        kind, num_groups=groups, num_experts=32, num_kv_heads=8, num_devices=devices, shard_params=False
    )
    sizes = EngineConfig(max_sequences=max(4, 3 * devices), context=CONTEXT, block_size=4, decode_steps=STEPS)
    model = LanguageModel.create(config, layout, jax.random.key(0))
    limits = sizes.limits(config, layout)
    runner = ModelRunner(model, limits, context=CONTEXT, expert_budget=budget, report_experts=True)
    runner._load = runner._lower_load().compile(QUICK_COMPILE)
    shape = next(s for s in runner._shapes() if s[:3] == (limits.max_sequences, STEPS, 0))
    runner._programs[shape] = runner._lower(shape).compile(QUICK_COMPILE)
    return runner


def decode(runner: ModelRunner, launches: int = 3) -> list[StepResult]:
    """Greedy continuations of prompts of one token; the last row of every shard is padding."""
    shards, count = runner.limits.num_shards, runner.limits.max_sequences - 1
    results = []
    for launch in range(launches):
        loads = [
            SlotLoad(shard, slot, ((5 + shard + 7 * slot) % 64,), 0.0, 0, 1.0, 0.0, 1.0, 0)
            for shard in range(shards)
            for slot in range(count)
        ]
        blocks = [tuple(range(3 * slot, 3 * slot + 3)) for slot in range(count)]
        rows = tuple(Row(slot, STEPS * launch, STEPS, blocks[slot], True) for slot in range(count))
        nobody: tuple[tuple[Row, ...], ...] = ((),) * shards
        plan = StepPlan(launch, tuple(loads) if launch == 0 else (), (rows,) * shards, nobody, 0, STEPS, True)
        results.append(runner.run(plan))
    return results


def test_a_budget_of_all_experts_gives_the_tokens_and_log_probabilities_of_the_base_engine() -> None:
    base = decode(make_runner("fsdp", 1, 1, None))
    for found, expected in zip(decode(make_runner("fsdp", 1, 1, ExpertBudget(32))), base, strict=True):
        assert found.tokens == expected.tokens and found.logprobs == expected.logprobs
        assert found.experts is not None and expected.experts is not None
        np.testing.assert_array_equal(found.experts.tokens_TCLA, expected.experts.tokens_TCLA)
        assert np.all(found.experts.tokens_TCLA.sum(-1) == 3 * 8) and found.experts.distinct.min() > 8
        assert expected.experts.kept_mass_TCL.tolist() == [[[1.0] * 2]] * STEPS
        np.testing.assert_allclose(found.experts.kept_mass_TCL, 1.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ep", pytest.param("tp", marks=SLOW), pytest.param("tp_ep", marks=SLOW)])
def test_an_engine_reads_no_more_experts_than_its_budget_on_any_device(kind: str) -> None:
    """Two of a device's four experts, whatever tokens any device holds; and its collectives do not race."""
    runner = make_runner(kind, 1, 8, ExpertBudget(2, parts=8))
    rows = runner.limits.num_shards * (runner.limits.max_sequences - 1)
    for result in decode(runner):
        assert result.experts is not None
        tokens = result.experts.tokens_TCLA
        assert tokens.shape == (STEPS, 1, 2, 32)
        assert np.all(tokens.sum(-1) == rows * 8), "padding is counted, or a choice is lost"
        assert (tokens.reshape(STEPS, 1, 2, 8, 4) > 0).sum(-1).max() == 2 and result.experts.distinct.max() == 16
        assert np.all((result.experts.kept_mass_TCL > 0.3) & (result.experts.kept_mass_TCL < 1))
    for program in runner._programs.values():
        assert not find_races(program.as_text())


def test_reports_of_devices_are_joined_by_copies_of_the_experts() -> None:
    """Two copies, each on two devices; of the second copy nobody had a token."""
    tokens = np.asarray([[3, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).reshape(4, 1, 1, 1, 3)
    kept, base = (np.asarray(x, np.float32).reshape(4, 1, 1, 1) for x in ([1, 2, 0, 0], [2, 4, 0, 0]))
    reads = read_expert_sums(ExpertSums(tokens, kept, base), 2)  # type: ignore[arg-type]
    assert reads.tokens_TCLA.tolist() == [[[[4, 0, 1]], [[0, 0, 0]]]]
    assert reads.distinct.tolist() == [[[2], [0]]] and reads.kept_mass_TCL.tolist() == [[[0.5], [1.0]]]


def budget_of(groups: int = 1, devices: int = 1, **settings: int) -> ExpertBudget | None:
    config = tiny_config(num_groups=groups)
    layout = Layout.create("ep" if groups == 1 else "foe", num_groups=groups, num_experts=32, num_devices=devices)
    return EngineConfig(**settings).expert_budget_of(config, layout)


def test_settings_become_budgets_of_the_parts() -> None:
    assert budget_of(expert_budget=12) == ExpertBudget(12)
    assert budget_of(expert_budget=12, expert_warm_up=2) == ExpertBudget(12, 2)
    assert budget_of(groups=8, expert_budget=16) == ExpertBudget(2)
    assert budget_of(groups=8, devices=8, expert_budget=16) == ExpertBudget(2)
    assert budget_of(devices=8, expert_budget=16, expert_warm_up=1) == ExpertBudget(2, 1, parts=8)


def test_neutral_settings_have_no_budget() -> None:
    assert budget_of() is None
    assert budget_of(expert_budget=32) is None and budget_of(expert_budget=99) is None
    assert budget_of(expert_budget=8, expert_warm_up=8) is None
    assert budget_of(groups=8, expert_budget=8, expert_warm_up=1) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_budget": -1}, "expert_budget=-1: choose at least 0"),
        ({"expert_warm_up": 1}, "expert_warm_up=1 needs a budget .*: set expert_budget too"),
        ({"expert_budget": 7}, "expert_budget=7 is less than the experts_per_token=8 .*: choose at least 8"),
        ({"groups": 8, "expert_budget": 12}, "expert_budget=12 is not divisible by num_groups=8: choose a multiple"),
        ({"devices": 4, "expert_budget": 10}, "not divisible by the 4 devices that share the experts: choose a mult"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget_of(**settings)


def test_budgets_of_heads_are_split_over_them_and_need_scores() -> None:
    layout = Layout.create("hp", num_ffn_heads=8, num_experts=64, num_devices=1)
    scored = config_for("hp", router_score="softmax", router_scope="group")
    assert EngineConfig(expert_budget=32).expert_budget_of(scored, layout) == ExpertBudget(4)
    with pytest.raises(ConfigError, match="expert_budget=20 is not divisible by num_ffn_heads=8"):
        EngineConfig(expert_budget=20).expert_budget_of(scored, layout)
    with pytest.raises(ConfigError, match="router_score=topk_softmax has none before experts are chosen"):
        EngineConfig(expert_budget=32).expert_budget_of(config_for("hp"), layout)


def test_experts_outside_the_set_cannot_be_chosen() -> None:
    x = scores()
    kept = choose(x, everybody(x), 3)
    masked = np.asarray(keep_only(x, kept))
    outside = np.broadcast_to(~np.asarray(kept)[:, None], masked.shape)
    assert np.all(masked[outside] == -np.inf) and np.all(masked[~outside] == np.asarray(x)[~outside])
