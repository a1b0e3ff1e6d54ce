"""Multi-Head LatentMoE in Hugging Face folders: what is in them, what survives a round trip, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from model_folders import arrays_of, assert_same, edit_config
from random_models import random_model
from safetensors.numpy import load_file

import foejax
from foejax.config import ModelConfig
from foejax.interop import ExportError, ModelFolderError, ModelType, export_model, import_config, import_model
from foejax.models import LanguageModel
from sharding import Layout

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=8,
    experts_per_token=4,
    expert_hidden_size=10,
    expert_activation="gelu",
    num_ffn_heads=2,
    ffn_head_dim=6,
    router_score="topk_softmax",
    embedding_scale=0.5,
    max_seq_len=32,
    rope_base=10000.0,
    dtype="float32",
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model(MODEL, seed=7, selection_bias=True)


@pytest.fixture
def folder(model: LanguageModel, tmp_path: Path) -> Path:
    return export_model(model, tmp_path / "model")


def test_folder_has_a_projection_on_either_side_of_the_experts(model: LanguageModel, folder: Path) -> None:
    """Names and shapes, no gates for GELU, and head h as the h-th contiguous slice of sub-tokens and experts."""
    tensors, params = load_file(folder / "model.safetensors"), arrays_of(model)
    layer = {
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "self_attn.q_proj.weight": (24, 24),
        "self_attn.k_proj.weight": (12, 24),
        "self_attn.v_proj.weight": (12, 24),
        "self_attn.o_proj.weight": (24, 24),
        "self_attn.q_norm.weight": (24,),
        "self_attn.k_norm.weight": (12,),
        "mlp.in_proj.weight": (12, 24),
        "mlp.out_proj.weight": (24, 12),
        "mlp.gate.weight": (8, 6),
        "mlp.gate.e_score_correction_bias": (8,),
    }
    for expert in range(8):
        layer |= {f"mlp.experts.{expert}.up_proj.weight": (10, 6), f"mlp.experts.{expert}.down_proj.weight": (6, 10)}
    expected = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,), "lm_head.weight": (40, 24)}
    assert {name: value.shape for name, value in tensors.items()} == expected

    head, part, expert, number = 1, slice(6, 12), 2, 4 + 2  # of 2 heads, sub-tokens of 6, 4 experts a head
    mlp = "model.layers.1.mlp."
    ours = {name.removeprefix("layers.heads."): value[1] for name, value in params.items() if "heads" in name}
    for tensor, param in (
        (tensors[mlp + "in_proj.weight"][part], ours["in_DHK"][:, head].T),
        (tensors[mlp + "out_proj.weight"][:, part], ours["out_HKD"][head].T),
        (tensors[mlp + "gate.weight"][number], ours["router.w_SKE"][head, :, expert]),
        (tensors[mlp + "gate.e_score_correction_bias"][number], ours["router.selection_bias_SE"][head, expert]),
        (tensors[f"{mlp}experts.{number}.up_proj.weight"], ours["experts.up_SEDF"][head, expert].T),
        (tensors[f"{mlp}experts.{number}.down_proj.weight"], ours["experts.down_SEFD"][head, expert].T),
    ):
        np.testing.assert_array_equal(tensor, param)


def test_config_json_of_mhlmoe(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "mhlmoe",
        "architectures": ["MhlmoeForCausalLM"],
        "hidden_act": "gelu",
        "expert_activation": "gelu",
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "intermediate_size": 10,
        "num_ffn_heads": 2,
        "ffn_head_dim": 6,
        "router_score": "topk_softmax",
        "router_scope": "global",
        "embedding_scale": 0.5,
        "head_dim": 6,
    }
    assert {key: content[key] for key in expected} == expected
    assert "merge_scale" not in content and "num_groups" not in content
    assert import_config(folder) == MODEL
    # A size of sub-tokens that was left to be derived is written out.
    derived = random_model(MODEL.model_copy(update={"ffn_head_dim": 0}), seed=8)
    other = export_model(derived, tmp_path / "other")
    assert import_config(other) == MODEL.model_copy(update={"ffn_head_dim": 12})
    assert not any("bias" in name for name in load_file(other / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({}, {"num_devices": 1}),
        ({}, {"group": 2, "expert": 4, "num_devices": 8}),
        (
            {"expert_activation": "swiglu", "router_score": "softmax", "router_scope": "group"},
            {"data": 2, "group": 2},
        ),
    ],
    ids=["gelu", "gelu-shared-heads", "swiglu"],
)
def test_round_trip_is_exact(changes: dict[str, Any], axes: dict[str, int], tmp_path: Path) -> None:
    config = ModelConfig.model_validate(MODEL.model_dump() | changes)
    model = random_model(config, seed=9, selection_bias=True)
    layout = Layout.create("hp", num_ffn_heads=2, num_experts=8, **axes)
    first = import_model(export_model(model, tmp_path / "a"), layout)
    assert first.config == config
    assert_same(first, model)
    again = export_model(first, tmp_path / "b")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_a_folder_is_loaded_as_it_is(model: LanguageModel, folder: Path) -> None:
    """As every command loads it: heads over the devices, and no router losses, for which there are no scores."""
    loaded = foejax.load(folder, devices=2)
    assert loaded.model.layout.kind == "hp" and loaded.model.layout.sizes == (1, 2, 1)
    assert_same(loaded.model, model)
    assert loaded.config.training.load_balance_coef == loaded.config.training.z_loss_coef == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ffn_heads": "absent"}, "num_ffn_heads missing"),
        ({"num_ffn_heads": 0}, "num_ffn_heads=0 does not fit model_type='mhlmoe'"),
        ({"num_ffn_heads": 3}, "num_experts=8 is not divisible by num_ffn_heads=3"),
        ({"router_score": "softmax"}, "router_scope=global has no meaning"),
        ({"hidden_act": "silu"}, "hidden_act='silu' .* expert_activation='gelu', only hidden_act='gelu'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False .* router_score='topk_softmax', only norm_topk_prob=True"),
        ({"expert_activation": "absent"}, "hidden_act='gelu' .* expert_activation='swiglu'"),
        ({"expert_activation": "relu"}, "expert_activation='relu'"),
    ],
)
def test_keys_are_required_and_checked(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelFolderError, match=message):
        import_config(folder)


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    layout = Layout.single_device("hp")
    edit_config(folder, expert_activation="swiglu", hidden_act="silu")
    with pytest.raises(ModelFolderError, match=r"experts.0.gate_proj.weight, .* are missing"):
        import_model(folder, layout)
    edit_config(folder, expert_activation="gelu", hidden_act="gelu", ffn_head_dim=5)
    with pytest.raises(ModelFolderError, match=r"in_proj.weight has shape \(12, 24\) and .* asks for \(10, 24\)"):
        import_model(folder, layout)


def test_other_kinds_cannot_express_heads(model: LanguageModel, tmp_path: Path) -> None:
    for kind in get_args(ModelType):
        if kind != "mhlmoe":
            with pytest.raises(ExportError, match=f"num_ffn_heads=2 .* {kind}, which has none: export with .* mhlmoe"):
                export_model(model, tmp_path / "out", model_type=kind)
    assert not list(tmp_path.iterdir())
