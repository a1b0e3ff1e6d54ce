"""Plans: which layouts are compared, what serving in simulated time does, what the command prints and refuses."""

from __future__ import annotations

import json

import pytest
from tiny import with_heads

from foejax.analysis.cost_model.cluster import read_cluster
from foejax.analysis.cost_model.matched import candidates, matched_models
from foejax.analysis.cost_model.paper import FORWARD_SECONDS, fit_paper_engine
from foejax.analysis.cost_model.serving import simulate_serving, step_of
from foejax.analysis.cost_model.step import Row, prefill_step
from foejax.analysis.plan import Workload, find, make_plan, ratio_parts
from foejax.analysis.plan_report import format_plan
from foejax.cli import main
from foejax.commands.parser import make_parser
from foejax.commands.plan import workload_of
from foejax.config import ConfigError, MeshConfig, RunConfig, load_config
from foejax.serving.engine_config import EngineConfig
from foejax.serving.load.trace import Lengths, make_trace
from foejax.serving.scheduler import SchedulerLimits
from foejax.serving.step_plan import Row as PlannedRow
from foejax.serving.step_plan import StepPlan
from sharding import Layout
from sharding.mesh import MeshSizes

FOE = load_config("foe_7b")
ONE_HOST, TWO_HOSTS = read_cluster("8xH100"), read_cluster("2x8xH100")


def test_two_hosts_are_compared_in_every_layout() -> None:
    found, left_out = candidates(FOE, TWO_HOSTS, 1.64)
    assert not left_out
    assert [candidate.name for candidate in found] == [
        "foe data=2 x group=8",
        "foe group=8 x expert=2",
        "ep expert=16",
        "ep data=2 x expert=8",
        "tp data=2 x group=8",
        "tp_ep data=2 x group=8",
        "data data=16",
        "ep expert=16, a copy per device",
        "ep expert=16, a copy per expert",
    ]
    assert {candidate.model.num_groups for candidate in found} == {1, 8}
    shared = {candidate.name for candidate in found if candidate.imbalance > 1}
    assert shared == {candidate.name for candidate in found} - {"foe data=2 x group=8", "data data=16"}


def heads_config(heads: int = 8, **changes: object) -> RunConfig:
    """moe_7b with as many experts and choices in each of its heads."""
    config = load_config("moe_7b", {"training.load_balance_coef": 0.0, "training.z_loss_coef": 0.0})
    return config.model_copy(update={"model": with_heads(config.model, heads, **changes), "mesh": MeshConfig()})


def test_heads_of_experts_are_compared_with_the_moe_of_the_same_weight() -> None:
    config = heads_config()
    found, left_out = candidates(config, TWO_HOSTS, 1.64)
    assert not left_out
    assert [candidate.name for candidate in found] == [
        "hp data=2 x group=8",
        "hp group=8 x expert=2",
        "data data=16",
        "ep expert=16",
        "ep data=2 x expert=8",
        "ep expert=16, a copy per device",
        "ep expert=16, a copy per expert",
    ]
    moe = load_config("moe_7b").model.model_copy(update={"router_score": "topk_softmax", "expert_activation": "gelu"})
    for candidate in found:
        assert candidate.model == (moe if candidate.layout.kind == "ep" else config.model)
    assert [candidate.name for candidate in found if candidate.imbalance > 1 and candidate.model != moe] == [
        "hp group=8 x expert=2"
    ]
    sixteen, _ = candidates(heads_config(16), TWO_HOSTS, 1.0)
    assert [made.name for made in sixteen if made.layout.kind == "hp"] == ["hp group=16", "hp data=2 x group=8"]


def test_what_has_no_meaning_for_heads_is_refused_or_left_out() -> None:
    with pytest.raises(ConfigError, match="num_ffn_heads=8: no FoE model differs"):
        matched_models(heads_config().model)
    found, left_out = candidates(heads_config(ffn_head_dim=128), ONE_HOST, 1.0)
    assert "8 sub-tokens of 128 are not hidden_size=2048" in left_out["ep"]
    assert [made.name for made in found] == ["hp group=8", "data data=8"]
    _, left_out = candidates(heads_config(ffn_head_dim=4), ONE_HOST, 1.0)
    assert "ffn_head_dim=4 is not divisible by mesh.data=8" in left_out["fsdp"]


def test_a_plan_of_heads_has_their_layouts_alone() -> None:
    plan = make_plan(heads_config(), ONE_HOST, Workload(requests=1, interarrival=(1.0,)))
    text = format_plan(plan)
    assert "hp and data: 8 heads, each with 8 of 64 experts a token. ep: the MoE" in text
    assert "sub-tokens to their heads | all-to-all over group of 8" in text
    assert "| tokens | ep expert=8, a copy per expert | hp group=8 | data data=8 | ep / hp |" in text
    assert "MoE / FoE" not in text and "merge of the groups" not in text
    assert [row.candidate for row in plan.serving] == ["ep expert=8, a copy per expert", "hp group=8"]
    row = plan.forward["one prompt"][-1]
    assert row.ratio is None and row.seconds["ep expert=8, a copy per expert"] > row.seconds["hp group=8"]


def test_the_configs_own_mesh_comes_first_and_must_fit() -> None:
    config = load_config("moe_7b", {"mesh.layout": "tp", "mesh.group": 4})
    found, _ = candidates(config, ONE_HOST, 1.0)
    assert found[0].name == "tp data=2 x group=4"
    with pytest.raises(ValueError, match="mesh.expert=16 would cross hosts of 8 devices"):
        changes = {"model.num_groups": 2, "mesh.expert": 16, "mesh.group": 1}
        candidates(load_config("foe_7b", changes), TWO_HOSTS, 1.0)
    with pytest.raises(ValueError, match="num_groups=8 neither divides the 15 devices"):
        candidates(FOE, read_cluster("3x5xH100"), 1.0)


def test_the_matched_foe_of_an_moe_has_as_many_groups_as_divide_it() -> None:
    foe, moe = matched_models(load_config("moe_7b").model)
    assert (foe.num_groups, moe.num_groups) == (8, 1)
    assert foe == FOE.model
    odd = load_config("moe_7b", {"model.experts_per_token": 7}).model
    with pytest.raises(ConfigError, match="no FoE model matches"):
        matched_models(odd)


def test_two_cells_of_the_papers_table_predict_its_other_moe_cells() -> None:
    found, _ = candidates(FOE, ONE_HOST, 1.64)
    moe = find(found, "ep")
    assert moe is not None
    fitted = fit_paper_engine(ONE_HOST, moe)
    assert fitted.layer_floor == 0.06106 / 16 and 0.005 < fitted.attention_fraction < 0.05
    seconds = {tokens: moe.predict(prefill_step(tokens, 8), fitted).seconds for tokens in FORWARD_SECONDS}
    assert seconds[24576] == pytest.approx(FORWARD_SECONDS[24576][0], rel=1e-4)
    for tokens in (8192, 12288, 16384, 20480):
        assert seconds[tokens] == pytest.approx(FORWARD_SECONDS[tokens][0], rel=0.12)


def test_a_ratio_is_the_product_of_its_parts() -> None:
    found, _ = candidates(FOE, ONE_HOST, 1.64)
    ratio = ratio_parts(found, ONE_HOST, 24576, 0)
    ep, foe = find(found, "ep"), find(found, "foe")
    assert ratio is not None and ep is not None and foe is not None
    seconds = [
        candidate.predict(prefill_step(24576, candidate.layout.num_token_shards), ONE_HOST).seconds
        for candidate in (ep, foe)
    ]
    assert ratio.whole == pytest.approx(seconds[0] / seconds[1])
    assert ratio.spread == 1.0 and ratio.attention > 3 and 0.9 < ratio.collectives < 1.2
    assert ratio_parts([foe], ONE_HOST, 1024, 0) is None


def test_plans_of_the_scheduler_become_padded_steps() -> None:
    limits = SchedulerLimits(2, 16, 100, 16, ((1, 128), (4, 128), (16, 32)))
    blocks = (0, 1)
    decode = ((PlannedRow(0, 40, 4, blocks, True),), ())
    plan = StepPlan(1, (), decode, ((), ()), 0, 4, False)
    step = step_of(plan, limits)
    assert step.shards == ((Row(1, 42),), ()) and (step.device_tokens, step.logits_rows) == (2, 2)
    prefill = ((PlannedRow(1, 0, 128, blocks, False), PlannedRow(1, 128, 30, blocks, True)), ())
    step = step_of(StepPlan(2, (), decode, prefill, 128, 1, False), limits)
    assert step.shards[0][1:] == (Row(128, 0), Row(30, 128))
    assert (step.device_tokens, step.logits_rows) == (16 + 4 * 128, 16 + 4)


def test_serving_in_simulated_time_takes_what_the_steps_take() -> None:
    """One request alone: its prompt's chunks one after the other, then one step a token."""
    found, _ = candidates(FOE, ONE_HOST, 1.64)
    foe = find(found, "foe")
    assert foe is not None
    trace = make_trace(1, 1.0, Lengths("fixed", 17), seed=0, prompt=Lengths("fixed", 4000), vocab_size=100)
    summary = simulate_serving(foe, ONE_HOST, trace, EngineConfig(max_sequences=8, decode_steps=1))
    chunks = [foe.predict(prefill_step(2048, 1), ONE_HOST).seconds] * 2
    assert summary.completed == 1 and summary.short == 0
    assert summary.ttft.mean == pytest.approx(sum(chunks), rel=0.1)
    floor = 16 * ONE_HOST.layer_floor
    assert floor < summary.tbt.mean < 1.2 * floor
    again = simulate_serving(foe, ONE_HOST, trace, EngineConfig(max_sequences=8, decode_steps=1))
    assert again == summary


def test_weights_must_fit_the_memory() -> None:
    small = read_cluster("8xH100").model_copy(
        update={"accelerator": ONE_HOST.accelerator.model_copy(update={"memory": 1e9})}
    )
    found, _ = candidates(FOE, small, 1.0)
    trace = make_trace(1, 1.0, Lengths("fixed", 2), seed=0, prompt=Lengths("fixed", 8), vocab_size=100)
    with pytest.raises(ConfigError, match=r"weights of [\d.]+ GB a device do not fit the 1 GB of H100"):
        simulate_serving(found[0], small, trace, EngineConfig())


def test_a_plan_of_a_small_model_leaves_serving_out_and_says_why() -> None:
    plan = make_plan(load_config("foe_tiny"), ONE_HOST, Workload(tokens=256, context=255, requests=2))
    assert not plan.serving and "longer than model.max_seq_len=256" in plan.left_out["serving"]
    assert plan.paper_cluster is None and all(row.measured is None for row in plan.forward["one prompt"])
    with pytest.raises(ConfigError, match="a prompt of 8192 tokens is longer"):
        make_plan(load_config("foe_tiny"), ONE_HOST)


def test_the_command_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "foe_7b", "--cluster", "2x8xH100", "--requests", "1", "--interarrival", "0.5"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in ("2x8xH100, predicted; nothing was run", "merge of the groups", "| 24,576 |", "## Serving"):
        assert part in text
    assert main(["plan", "foe_7b", "--cluster", "8xH100", "--requests", "0", "--json", "--cluster.overlap", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["overlap"] == 0.5 and found["serving"] == []
    assert found["steps"]["foe group=8"]["prefill"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "8xB900"], "B900 is not known"),
        (["--cluster", "8xH100", "--cluster.overlap", "2"], "cluster overlap='2' is refused"),
        (["--cluster", "8xH100", "--imbalance", "0.5"], "imbalance=0.5"),
        (["--cluster", "8xH100", "--prompt-tokens", "many"], "write N, LOW:HIGH"),
        ([], "--cluster"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "foe_7b", *arguments]) == 2
    error = capsys.readouterr().err
    assert message.removeprefix("cluster ") in error and error.count("\n") == 1


def test_layouts_on_paper_need_no_devices() -> None:
    layout = Layout.abstract("foe", MeshSizes(64, 8, 2))
    assert layout.mesh.size == 1024 and layout.num_token_shards == 128


def test_the_commands_defaults_are_those_of_python() -> None:
    options = make_parser().parse_args(["plan", "foe_7b", "--cluster", "8xH100"])
    assert workload_of(options, FOE) == Workload()
