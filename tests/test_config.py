"""The typed configuration: what it accepts, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from foejax.config import ConfigError, find_config, load_config, override_config, parse_config, save_config


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid() -> None:
    config = parse_config({})
    assert config.model.num_groups == 1
    assert config.mesh.layout == "auto"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"num_group": 4}}, ["model.num_group=4", "did you mean num_groups?"]),
        ({"trainning": {}}, ["trainning={}", "did you mean training?"]),
        ({"data": {"zzz": 1}}, ["data.zzz=1", "known keys:", "batch_size"]),
    ],
)
def test_unknown_key_names_the_known_one(values: dict[str, Any], parts: list[str]) -> None:
    message = refusal(values)
    for part in parts:
        assert part in message


HEADS = {"num_ffn_heads": 8, "num_experts": 64, "experts_per_token": 16, "router_score": "topk_softmax"}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"num_groups": 3}, ["num_kv_heads=8", "num_groups=3", "multiple of 3"]),
        ({"num_query_heads": 6, "num_kv_heads": 4}, ["num_query_heads=6", "num_kv_heads=4"]),
        ({"num_groups": 4, "num_experts": 30}, ["num_experts=30", "num_groups=4"]),
        ({"num_groups": 8, "experts_per_token": 4}, ["experts_per_token=4", "num_groups=8"]),
        ({"num_experts": 4, "experts_per_token": 8}, ["experts_per_token=8", "num_experts=4"]),
        ({"head_dim": 15}, ["head_dim=15", "even"]),
        ({"router_score": "sigmoid", "router_scope": "group"}, ["router_scope=group", "router_score=sigmoid"]),
        ({"hidden_size": 0}, ["model.hidden_size=0"]),
        ({"rope_base": float("inf")}, ["model.rope_base=inf"]),
        ({"merge_scale": "median"}, ["model.merge_scale='median'", "mean"]),
        (HEADS | {"hidden_size": 100}, ["hidden_size=100", "num_ffn_heads=8"]),
        (HEADS | {"num_experts": 60}, ["num_experts=60", "num_ffn_heads=8"]),
        (HEADS | {"experts_per_token": 12}, ["experts_per_token=12", "num_ffn_heads=8"]),
        (HEADS | {"num_experts": 8, "experts_per_token": 16}, ["experts_per_token=16", "num_experts=8"]),
        (HEADS | {"experts_per_token": 8}, ["experts_per_token=8", "router_score=topk_softmax", "twice as many"]),
        (HEADS | {"num_groups": 8}, ["num_ffn_heads=8", "num_groups=8"]),
        (HEADS | {"router_score": "softmax"}, ["router_scope=global", "num_ffn_heads=8", "router_scope=group"]),
        ({"ffn_head_dim": 96}, ["ffn_head_dim=96", "num_ffn_heads"]),
    ],
)
def test_impossible_models_are_refused(model: dict[str, Any], parts: list[str]) -> None:
    message = refusal({"model": model})
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"data": {"sequence_length": 4096}}, ["data.sequence_length=4096", "model.max_seq_len=2048"]),
        ({"data": {"tokenizer_vocab_size": 60_000}}, ["data.tokenizer_vocab_size=60000", "model.vocab_size=50304"]),
        ({"training": {"gradient_accumulation": 3}}, ["data.batch_size=128", "training.gradient_accumulation=3"]),
        ({"mesh": {"layout": "ep"}, "model": {"num_groups": 2}}, ["mesh.layout=ep", "model.num_groups=2"]),
        ({"mesh": {"layout": "tp_ep"}, "model": {"num_groups": 2}}, ["mesh.layout=tp_ep", "model.num_groups=2"]),
        ({"mesh": {"layout": "hp"}}, ["mesh.layout=hp", "model.num_ffn_heads=0"]),
        ({"mesh": {"layout": "ep"}, "model": HEADS}, ["mesh.layout=ep", "model.num_ffn_heads=8", "hp"]),
        ({"model": HEADS}, ["training.load_balance_coef=0.01", "router_score=topk_softmax", "router_bias_rate"]),
    ],
)
def test_sections_must_fit_each_other(values: dict[str, Any], parts: list[str]) -> None:
    message = refusal(values)
    for part in parts:
        assert part in message


def test_wsd_schedule_keeps_its_order() -> None:
    bounds = {"num_steps": 10, "warmup_steps": 2, "decay_start_step": 8}
    for edge in (2, 10):
        assert parse_config({"training": bounds | {"decay_start_step": edge}}).training.decay_start_step == edge
    for outside in (1, 11):
        message = refusal({"training": bounds | {"decay_start_step": outside}})
        assert f"decay_start_step={outside}" in message and "num_steps=10" in message
    assert "warmup_steps=11" in refusal({"training": bounds | {"schedule": "cosine", "warmup_steps": 11}})
    assert parse_config({"training": bounds | {"schedule": "cosine", "decay_start_step": 99}})


def test_overrides_are_read_as_yaml_scalars() -> None:
    config = load_config(
        "foe_tiny",
        {
            "model.num_groups": "4",
            "training.learning_rate": "3e-4",
            "training.weight_decay": "1E-1",
            "data.corpus": "some/folder",
            "mesh.layout": "foe",
            "training.seed": 7,
        },
    )
    assert config.model.num_groups == 4
    assert config.training.learning_rate == 3e-4
    assert config.training.weight_decay == 0.1
    assert config.data.corpus == "some/folder"
    assert config.mesh.layout == "foe"
    assert config.training.seed == 7


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"num_groups": "4"}, "'num_groups' names no field"),
        ({"model.num_groups": "many"}, "model.num_groups='many'"),
        ({"model.num_groups": "[1"}, "model.num_groups='[1' is not a YAML value"),
        ({"model.n_groups": "4"}, "did you mean num_groups?"),
        ({"model.num_groups": "3"}, "num_groups=3"),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("foe_tiny", overrides)
    assert part in str(error.value)


def test_override_config_validates_again_and_leaves_the_original() -> None:
    config = parse_config({})
    changed = override_config(config, {"model.num_groups": 8})
    assert (config.model.num_groups, changed.model.num_groups) == (1, 8)
    with pytest.raises(ConfigError, match="num_groups=3"):
        override_config(config, {"model.num_groups": 3})


def test_saved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config("foe_tiny", {"training.learning_rate": "1e-5", "training.adam_eps": "1e-12"})
    save_config(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config


def test_config_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"training": {"seed": 3}}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_config(own) == own
    assert load_config("own.yaml").training.seed == 3
    assert find_config("foe_tiny") == find_config("foe_tiny.yaml") == find_config("configs/foe_tiny.yaml")
    for missing in ("foe_tinny", "elsewhere/foe_tiny.yaml"):
        with pytest.raises(ConfigError, match="foe_tiny"):
            find_config(missing)


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"model: [", "own.yaml is not readable as YAML"), (b"- 1\n- 2\n", "a list"), (b"model: \xff\xfe", "own.yaml")],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert part in str(error.value)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing set\n", encoding="utf-8")
    assert load_config(path) == parse_config({})
