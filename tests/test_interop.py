"""Hugging Face folders: what is in them, what survives a round trip, what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from model_folders import arrays_of, assert_same, edit_config, edit_tensors
from random_models import random_model
from safetensors.numpy import load_file

from foejax.config import ModelConfig
from foejax.data import Tokenizer
from foejax.data.tokenizer import train_bpe
from foejax.interop import (
    ExportError,
    ModelFolderError,
    export_model,
    import_config,
    import_model,
    import_tokenizer_path,
)
from foejax.models import LanguageModel
from sharding import Layout

FOE = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=2,
    num_query_heads=8,
    num_kv_heads=4,
    head_dim=6,
    num_experts=8,
    experts_per_token=4,
    expert_hidden_size=10,
    num_groups=4,
    max_seq_len=32,
    rope_base=20000.0,
    rope_scaling_factor=2.0,
    norm_eps=1e-4,
    merge_scale="rsqrt",
    embedding_scale=0.5,
    router_scope="group",
    init_std=0.3,
)
MOE = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=4,
    experts_per_token=2,
    expert_hidden_size=10,
    max_seq_len=32,
    rope_base=10000.0,
    dtype="float32",
)


@pytest.fixture(scope="module")
def foe() -> LanguageModel:
    layout = Layout.create("foe", num_groups=4, num_devices=8)
    return random_model(FOE, seed=1, layout=layout, selection_bias=True)


@pytest.fixture(scope="module")
def moe() -> LanguageModel:
    return random_model(MOE, seed=2)


@pytest.fixture
def foe_folder(foe: LanguageModel, tmp_path: Path) -> Path:
    return export_model(foe, tmp_path / "foe")


@pytest.fixture
def moe_folder(moe: LanguageModel, tmp_path: Path) -> Path:
    return export_model(moe, tmp_path / "moe")


def test_foe_folder_has_the_tensors_of_olmoe(foe: LanguageModel, foe_folder: Path) -> None:
    """Names and shapes, and group h as the h-th contiguous slice of heads and experts."""
    tensors, params = load_file(foe_folder / "model.safetensors"), arrays_of(foe)
    layer = {
        "input_layernorm.weight": (4, 24),
        "post_attention_layernorm.weight": (24,),
        "self_attn.q_proj.weight": (48, 24),
        "self_attn.k_proj.weight": (24, 24),
        "self_attn.v_proj.weight": (24, 24),
        "self_attn.o_proj.weight": (24, 48),
        "self_attn.q_norm.weight": (48,),
        "self_attn.k_norm.weight": (24,),
        "mlp.gate.weight": (8, 24),
        "mlp.gate.e_score_correction_bias": (8,),
    }
    for expert in range(8):
        layer |= {f"mlp.experts.{expert}.{part}_proj.weight": (10, 24) for part in ("gate", "up")}
        layer[f"mlp.experts.{expert}.down_proj.weight"] = (24, 10)
    expected = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,), "lm_head.weight": (40, 24)}
    assert {name: value.shape for name, value in tensors.items()} == expected

    group, head, expert = 2, 1, 1  # of 4 groups, 2 query heads a group, 2 experts a group
    rows = slice((group * 2 + head) * 6, (group * 2 + head + 1) * 6)
    one = "model.layers.1."
    query = params["layers.attention.q_SDQK"][1, group, :, head, :]
    np.testing.assert_array_equal(tensors[one + "self_attn.q_proj.weight"][rows], query.T)
    output = params["layers.attention.o_SQKD"][1, group, head]
    np.testing.assert_array_equal(tensors[one + "self_attn.o_proj.weight"][:, rows], output.T)
    number = group * 2 + expert
    np.testing.assert_array_equal(
        tensors[one + "mlp.gate.weight"][number], params["layers.router.w_DHE"][1, :, group, expert]
    )
    np.testing.assert_array_equal(
        tensors[f"{one}mlp.experts.{number}.down_proj.weight"],
        params["layers.experts.down_SEFD"][1, group, expert].T,
    )


def test_config_json_of_both_kinds(foe_folder: Path, moe_folder: Path) -> None:
    foe = json.loads((foe_folder / "config.json").read_text())
    assert (foe["model_type"], foe["architectures"]) == ("foe", ["FoeForCausalLM"])
    own = {key: foe[key] for key in ("num_groups", "merge_scale", "embedding_scale", "router_score", "router_scope")}
    assert own == {
        "num_groups": 4,
        "merge_scale": "rsqrt",
        "embedding_scale": 0.5,
        "router_score": "softmax",
        "router_scope": "group",
    }
    assert foe["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}
    assert (foe["rope_theta"], foe["rope_scaling"]["type"], foe["rope_scaling"]["factor"]) == (20000.0, "linear", 2.0)

    moe = json.loads((moe_folder / "config.json").read_text())
    assert (moe["model_type"], moe["architectures"]) == ("olmoe", ["OlmoeForCausalLM"])
    assert moe["intermediate_size"] == 10 and moe["num_experts_per_tok"] == 2 and moe["num_key_value_heads"] == 2
    assert moe["norm_topk_prob"] is False and moe["tie_word_embeddings"] is False and moe["dtype"] == "float32"
    assert not own.keys() & moe.keys()
    shapes = {name: value.shape for name, value in load_file(moe_folder / "model.safetensors").items()}
    assert shapes["model.layers.0.input_layernorm.weight"] == (24,)
    assert not any("bias" in name for name in shapes)
    assert import_config(foe_folder) == FOE and import_config(moe_folder) == MOE
    assert import_config(foe_folder, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_foe_round_trip_is_exact(devices: int, foe: LanguageModel, foe_folder: Path) -> None:
    layout = Layout.create("foe", num_groups=4, num_devices=devices)
    model = import_model(foe_folder, layout)
    assert model.config == FOE
    assert_same(model, foe)
    wanted = nnx.to_flat_state(nnx.state(LanguageModel.abstract(FOE, layout).transformer))
    for (path, variable), (_, place) in zip(nnx.to_flat_state(nnx.state(model.transformer)), wanted, strict=True):
        assert variable.get_value().sharding == place.get_value().sharding, path


@pytest.mark.parametrize("kind", ["fsdp", "ep", "tp"])
def test_moe_round_trip_is_exact(kind: Any, moe: LanguageModel, moe_folder: Path) -> None:
    layout = Layout.create(kind, num_experts=4, num_kv_heads=2, num_devices=4)
    assert_same(import_model(moe_folder, layout), moe)


@pytest.mark.parametrize(
    "changes", [{"router_score": "sigmoid"}, {"router_score": "topk_softmax", "expert_activation": "gelu"}]
)
def test_one_group_as_foe_carries_what_olmoe_cannot(changes: dict[str, Any], tmp_path: Path) -> None:
    config = MOE.model_copy(update={"embedding_scale": 2.0, "head_dim": 8} | changes)
    model = random_model(config, seed=3, selection_bias=True)
    folder = export_model(model, tmp_path / "out", model_type="foe")
    assert import_config(folder) == config
    assert_same(import_model(folder, Layout.single_device("fsdp")), model)


def test_shards_hold_what_one_file_holds(foe: LanguageModel, foe_folder: Path, tmp_path: Path) -> None:
    folder = export_model(foe, tmp_path / "sharded", max_shard_bytes=12_000)
    whole, files = load_file(foe_folder / "model.safetensors"), sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and not (folder / "model.safetensors").exists()
    assert [file.name for file in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(value.nbytes for value in tensors.values()) <= 12_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(np.array_equal(found[name], value) for name, value in whole.items())
    assert_same(import_model(folder, Layout.create("foe", num_groups=4, num_devices=2)), foe)


def test_stored_dtype(foe: LanguageModel, foe_folder: Path, tmp_path: Path) -> None:
    """bfloat16 halves the file; the parameters come back rounded, in float32."""
    import ml_dtypes

    folder = export_model(foe, tmp_path / "half", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, foe_folder)]
    assert 0.45 < sizes[0] / sizes[1] < 0.75
    back = arrays_of(import_model(folder, Layout.single_device()))
    for name, value in arrays_of(foe).items():
        np.testing.assert_array_equal(back[name], value.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text to learn from " * 9], 280)
    model = random_model(MOE.model_copy(update={"vocab_size": 280}), seed=4)
    folder = export_model(model, tmp_path / "a", tokenizer=tokenizer)
    path = import_tokenizer_path(folder)
    assert Tokenizer.from_file(path).digest() == tokenizer.digest()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    again = export_model(model, tmp_path / "b", tokenizer=path)
    assert (again / "tokenizer.json").read_bytes() == path.read_bytes()


def test_older_olmoe_keys_are_read(moe_folder: Path) -> None:
    scaling = {"type": "linear", "factor": 8.0}
    old = {"rope_parameters": "absent", "rope_theta": 5000.0, "rope_scaling": scaling, "torch_dtype": "float16"}
    edit_config(moe_folder, **old, dtype="absent", compute_dtype="absent", num_key_value_heads=None)
    config = import_config(moe_folder)
    assert (config.rope_base, config.rope_scaling_factor) == (5000.0, 8.0)
    assert (config.num_kv_heads, config.dtype) == (4, "float32")


@pytest.mark.parametrize(
    ("changes", "selection_bias", "message"),
    [
        ({"router_score": "sigmoid"}, False, "router_score=sigmoid"),
        ({"router_score": "topk_softmax"}, False, "router_score=topk_softmax"),
        ({"expert_activation": "gelu"}, False, "expert_activation=gelu"),
        ({"embedding_scale": 0.5}, False, "embedding_scale=0.5"),
        ({"head_dim": 8}, False, r"num_query_heads \* head_dim=32 .* hidden_size=24"),
        ({}, True, "selection bias"),
        ({"num_groups": 2}, False, "num_groups=2"),
    ],
)
def test_what_olmoe_cannot_express_is_refused(
    changes: dict[str, Any], selection_bias: bool, message: str, tmp_path: Path
) -> None:
    model = random_model(MOE.model_copy(update=changes), seed=5, selection_bias=selection_bias)
    with pytest.raises(ExportError, match=f"{message}.*model_type foe"):
        export_model(model, tmp_path / "out", model_type="olmoe")
    assert not list(tmp_path.iterdir())


def test_mhlmoe_is_for_heads_of_experts(moe: LanguageModel, foe: LanguageModel, tmp_path: Path) -> None:
    for model in (moe, foe):
        with pytest.raises(ExportError, match="num_ffn_heads=0 .* mhlmoe, which has at least one: export with .* foe"):
            export_model(model, tmp_path / "out", model_type="mhlmoe")
    assert not list(tmp_path.iterdir())


def test_unusable_targets_and_arguments_are_refused(moe: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an empty folder"):
        export_model(moe, tmp_path / "full")
    with pytest.raises(ExportError, match="not an empty folder"):
        export_model(moe, tmp_path / "full" / "thesis.txt")
    with pytest.raises(ExportError, match="cannot be written"):
        export_model(moe, tmp_path / "full" / "thesis.txt" / "out")
    with pytest.raises(ExportError, match="dtype='int8'"):
        export_model(moe, tmp_path / "out", dtype="int8")
    with pytest.raises(ExportError, match="vocab_size=40"):
        export_model(moe, tmp_path / "out", tokenizer=train_bpe(["text"], 257))
    with pytest.raises(ExportError, match="made by for_inference"):
        export_model(moe.for_inference(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert (export_model(moe, tmp_path / "empty") / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing_behind(moe: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ExportError, match="disk of .*out is full"):
        export_model(moe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'.*foe or olmoe or mhlmoe"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": "absent", "rope_theta": "absent"}, "rope_theta missing"),
        ({"num_experts": "absent", "vocab_size": None}, "vocab_size, num_experts missing"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9"),
        ({"hidden_size": -24}, "hidden_size=-24"),
    ],
)
def test_configurations_we_do_not_have_are_refused(changes: dict[str, Any], message: str, moe_folder: Path) -> None:
    edit_config(moe_folder, **changes)
    with pytest.raises(ModelFolderError, match=message):
        import_config(moe_folder)


def test_foe_keys_are_required_and_checked(foe_folder: Path) -> None:
    edit_config(foe_folder, num_groups=3)
    with pytest.raises(ModelFolderError, match="num_groups=3"):
        import_config(foe_folder)
    edit_config(foe_folder, num_groups=4, expert_activation="absent")
    assert import_config(foe_folder) == FOE, "folders that were written before there was a choice"
    edit_config(foe_folder, num_groups="absent")
    with pytest.raises(ModelFolderError, match="num_groups missing"):
        import_config(foe_folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight are missing"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight are missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "extra are not part of the olmoe model"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.weight": np.zeros((4, 23), np.float32)}),
            r"mlp.gate.weight has shape \(4, 23\) and config.json asks for \(4, 24\)",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int32)}), "model.norm.weight has dtype I32"),
    ],
    ids=["missing", "missing-expert", "unexpected", "shape", "integers"],
)
def test_tensors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, np.ndarray]], object], message: str, moe_folder: Path
) -> None:
    edit_tensors(moe_folder, edit)
    with pytest.raises(ModelFolderError, match=message):
        import_model(moe_folder, Layout.single_device("fsdp"))


def test_damaged_and_incomplete_folders_are_refused(moe: LanguageModel, moe_folder: Path, tmp_path: Path) -> None:
    layout = Layout.single_device("fsdp")
    file = moe_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match="not a whole safetensors file"):
        import_model(moe_folder, layout)
    file.unlink()
    with pytest.raises(ModelFolderError, match="model.safetensors is missing"):
        import_model(moe_folder, layout)
    with pytest.raises(ModelFolderError, match="tokenizer.json is missing"):
        import_tokenizer_path(moe_folder)
    (moe_folder / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="not readable JSON"):
        import_model(moe_folder, layout)
    with pytest.raises(ModelFolderError, match="config.json is missing"):
        import_model(tmp_path / "nowhere", layout)

    sharded = export_model(moe, tmp_path / "sharded", max_shard_bytes=12_000)
    (sharded / "model.safetensors.index.json").rename(sharded / "index")
    with pytest.raises(ModelFolderError, match="model.safetensors is missing"):
        import_model(sharded, layout)
    shutil.move(sharded / "index", sharded / "model.safetensors.index.json")
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(ModelFolderError, match="model-00002-of-.* is missing"):
        import_model(sharded, layout)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelFolderError, match="not a safetensors index"):
        import_model(sharded, layout)
