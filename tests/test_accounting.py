"""Parameters, FLOPs and memory from shapes; the big configs are never allocated."""

from __future__ import annotations

import pytest
from tiny import with_heads

from foejax.analysis.accounting import account, activation_bytes, flops_per_token
from foejax.config import MeshConfig, RunConfig, load_config, override_config
from foejax.training.run import make_layout
from sharding import Layout
from sharding.mesh import MeshSizes

HEADS = 8
SIZES = ("tiny", "1b", "7b")


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("foe_1b", 1.022, 0.229), ("moe_1b", 1.022, 0.229), ("foe_7b", 6.852, 1.215), ("moe_7b", 6.852, 1.215)],
)
def test_big_models_have_the_papers_size(name: str, billions: float, active: float) -> None:
    """Table 8 of arXiv 2605.06206 gives 1.02 B and 6.85 B; spec/foe.md section 3 works them out."""
    found = account(load_config(name), Layout.single_device("foe"))
    assert round(found.parameters / 1e9, 3) == billions
    assert round(found.active_parameters / 1e9, 3) == active


@pytest.mark.parametrize(("size", "layers", "width"), [("1b", 16, 768), ("7b", 16, 2048)])
def test_foe_adds_the_input_norms_of_the_other_groups_and_nothing_else(size: str, layers: int, width: int) -> None:
    foe, moe = (account(load_config(f"{kind}_{size}"), Layout.single_device("foe")) for kind in ("foe", "moe"))
    assert foe.parameters - moe.parameters == (8 - 1) * layers * width
    assert foe.parameters_by_part["norms"] - moe.parameters_by_part["norms"] == (8 - 1) * layers * width


@pytest.mark.parametrize("size", SIZES)
def test_matched_configs_differ_in_groups_and_layout_only(size: str) -> None:
    foe, moe = (load_config(f"{kind}_{size}").model_dump() for kind in ("foe", "moe"))
    assert moe["model"].pop("num_groups") == 1
    assert foe["model"].pop("num_groups") > 1
    if size == "tiny":  # each has what learns best for it: the merge, which the MoE has not, and the learning rate
        for config in (foe, moe):
            config["model"].pop("merge_scale")
            config["training"].pop("learning_rate")
    for section in ("model", "data", "training"):
        assert foe[section] == moe[section]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("tiny", 0.01, 0.01), ("1b", 0.01, 0.01), ("tiny_fine", 0.011, 0.02), ("1b_fine", 0.01, 0.01)],
)
def test_heads_of_experts_weigh_what_the_moe_does(name: str, total: float, active: float) -> None:
    """The finer ones have larger routers, which count in a tiny model."""
    heads, moe = (
        account(load_config(config), Layout.single_device("fsdp"))
        for config in (f"mhlmoe_{name}", f"moe_{name.removesuffix('_fine')}")
    )
    assert heads.parameters == pytest.approx(moe.parameters, rel=total)
    assert heads.active_parameters == pytest.approx(moe.active_parameters, rel=active)


@pytest.mark.parametrize("name", ["foe_1b", "moe_7b", "foe_tiny"])
def test_matmul_flops_are_twice_the_active_weights(name: str) -> None:
    config = load_config(name)
    found = account(config, Layout.single_device("foe"))
    weights = found.active_parameters - found.parameters_by_part["embedding"] - found.parameters_by_part["norms"]
    assert found.flops.forward - found.flops.attention == 2 * weights


def test_attention_flops_grow_with_the_sequence() -> None:
    model = load_config("foe_7b").model
    # 16 layers; scores and values are 2 x 2 FLOPs for each of 16 heads x 128 and each of (T + 1) / 2 keys.
    assert flops_per_token(model, 1).attention == 16 * 4 * 16 * 128
    assert flops_per_token(model, 2047).attention == 16 * 4 * 16 * 128 * 1024


def test_one_device_holds_sixteen_bytes_a_parameter() -> None:
    found = account(load_config("moe_1b"), Layout.single_device("ep"))
    memory = found.memory
    scalars = memory.optimizer - 8 * found.parameters  # step counters of the optimizer
    assert 0 < scalars < 100
    bias = memory.parameters - 4 * found.parameters  # selection bias of the router, [16, 64] float32
    assert bias == 16 * 64 * 4
    assert memory.gradients == 4 * found.parameters


def test_eight_devices_hold_their_groups_and_what_is_shared() -> None:
    config = load_config("foe_1b")
    memory = account(config, make_layout(config.model, config.mesh)).memory
    parts = account(config, Layout.single_device("foe")).parameters_by_part
    shared_norms = (16 + 1) * 768  # one post-attention norm a layer and the last one
    shared = parts["embedding"] + parts["router"] + shared_norms
    assert memory.gradients == 4 * (shared + (sum(parts.values()) - shared) / 8)


def test_data_shards_split_the_parameters() -> None:
    config = override_config(load_config("moe_1b"), {"mesh.layout": "fsdp"})
    whole = account(config, Layout.single_device("fsdp")).memory.gradients
    shard = account(config, make_layout(config.model, config.mesh)).memory.gradients
    assert whole / 8 < shard < whole / 7.9  # norms stay whole


def test_flops_of_a_step_divide_over_the_devices_but_for_the_router() -> None:
    config = load_config("foe_1b")
    one = account(config, Layout.single_device("foe"))
    eight = account(config, make_layout(config.model, config.mesh))
    assert one.step_flops_per_device == one.step_tokens * one.flops.training
    extra = 3 * one.step_tokens * one.flops.router * (1 - 1 / 8)
    assert eight.step_flops_per_device == pytest.approx(one.step_flops_per_device / 8 + extra)


def test_remat_and_fewer_streams_keep_less() -> None:
    def kept(name: str, remat: str) -> int:
        config: RunConfig = override_config(load_config(name), {"training.remat": remat})
        return activation_bytes(config, Layout.single_device("foe"))

    assert kept("foe_1b", "full") < kept("foe_1b", "dots") < kept("foe_1b", "none")
    logits = 2 * 2048 * 50304 * 4
    # Full remat keeps H + 2 arrays of the residual's size a layer: 10 for FoE with 8 groups, 3 for the MoE.
    assert (kept("foe_1b", "full") - logits) / (kept("moe_1b", "full") - logits) == pytest.approx(10 / 3)


def heads_config(**training: object) -> RunConfig:
    """moe_1b with as many experts and choices in each of eight heads."""
    config = load_config("moe_1b", {"training.load_balance_coef": 0.0, "training.z_loss_coef": 0.0})
    changed = config.model_copy(update={"model": with_heads(config.model, HEADS), "mesh": MeshConfig()})
    return override_config(changed, {f"training.{name}": value for name, value in training.items()})


def test_heads_weigh_what_the_moe_does_and_their_projections() -> None:
    config = heads_config()
    found = account(config, Layout.single_device("hp"))
    moe = account(load_config("moe_1b", {"model.expert_activation": "gelu"}), Layout.single_device("foe"))
    projections = 16 * 2 * 768 * 768
    assert found.parameters_by_part == moe.parameters_by_part | {"sub_tokens": projections}
    assert found.active_parameters == moe.active_parameters + projections
    assert found.flops.experts == moe.flops.experts == 16 * 8 * 4 * 768 * 384
    weights = found.active_parameters - found.parameters_by_part["embedding"] - found.parameters_by_part["norms"]
    assert found.flops.forward - found.flops.attention == 2 * weights
    assert found.flops.sub_tokens == 2 * projections


def test_gated_experts_have_three_matrices() -> None:
    model = heads_config().model
    gated = model.model_copy(update={"expert_activation": "swiglu"})
    assert flops_per_token(gated, 8).experts == 1.5 * flops_per_token(model, 8).experts


def test_devices_of_heads_share_experts_and_routers_and_no_token() -> None:
    config = heads_config()
    one = account(config, Layout.single_device("hp"))
    eight = account(config, make_layout(config.model, config.mesh))
    assert eight.mesh == {"data": 1, "group": 8, "expert": 1}
    assert eight.step_flops_per_device == one.step_flops_per_device / 8
    parts = one.parameters_by_part
    owned = parts["router"] + parts["experts"]
    assert eight.memory.gradients == 4 * (one.parameters - owned + owned / 8)


def test_exchanged_sub_tokens_are_kept() -> None:
    config = heads_config(remat="full")
    tokens = config.data.batch_size // config.training.gradient_accumulation * config.data.sequence_length // 8
    kept = [
        activation_bytes(config, Layout.abstract(kind, sizes))
        for kind, sizes in (("hp", MeshSizes(1, 8, 1)), ("hp", MeshSizes(8, 1, 1)))
    ]
    assert kept[0] - kept[1] == tokens * 16 * 2 * 768 * 2


def test_scores_that_are_never_written_are_not_kept() -> None:
    config = heads_config(remat="none")
    scored = override_config(config, {"model.router_score": "softmax", "model.router_scope": "group"})
    layout = Layout.single_device("hp")
    tokens = config.data.batch_size // config.training.gradient_accumulation * config.data.sequence_length
    assert activation_bytes(scored, layout) - activation_bytes(config, layout) == tokens * 16 * 8 * 64 * 2
