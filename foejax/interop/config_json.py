"""A model's configuration as the config.json of a Hugging Face folder: OLMoE's keys, and our own beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from foejax.config import ModelConfig
from foejax.interop.errors import ExportError, ModelFolderError
from foejax.interop.tensor_names import ModelType

CONFIG_FILE = "config.json"

_SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_hidden_size": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Our field -> OLMoE's key."""

_COMMON_KEYS = ("embedding_scale", "expert_activation", "router_score", "router_scope", "head_dim")

_OWN_KEYS: dict[ModelType, tuple[str, ...]] = {
    "foe": ("num_groups", "merge_scale", *_COMMON_KEYS),
    "mhlmoe": ("num_ffn_heads", "ffn_head_dim", *_COMMON_KEYS),
    "olmoe": (),
}
"""Keys that OLMoE does not have, named as our fields."""

_OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "initializer_range", "expert_activation")
"""Keys that may be absent: OLMoE's defaults are ours (as many key/value heads as query heads; SwiGLU)."""

_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
"""OLMoE options with the one value that our models have; where a key is absent OLMoE's default is that value."""

_IMPLIED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act": ("expert_activation", {"swiglu": "silu", "gelu": "gelu"}),
    "norm_topk_prob": ("router_score", {"softmax": False, "sigmoid": False, "topk_softmax": True}),
}
"""OLMoE's key -> our field that decides it, and how; the gelu of transformers is the exact one."""

_ARCHITECTURES: dict[ModelType, str] = {
    "foe": "FoeForCausalLM",
    "mhlmoe": "MhlmoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}


def choose_model_type(config: ModelConfig, asked: ModelType | None, *, selection_bias: bool) -> ModelType:
    """The kind of folder for a model: the one asked for, or mhlmoe for heads of experts, olmoe for one group, else foe.

    Raises:
      ExportError: that kind cannot express the model.
    """
    heads, width = config.num_ffn_heads, config.num_query_heads * config.head_dim
    own: ModelType = "mhlmoe" if heads else "foe"
    chosen: ModelType = asked or ("olmoe" if own == "foe" and config.num_groups == 1 else own)
    if chosen == own:
        return chosen
    for field, value, wrong, only in (
        ("num_ffn_heads", heads, "mhlmoe" in (own, chosen), "none" if heads else "at least one"),
        ("num_groups", config.num_groups, config.num_groups != 1, "one group"),
        ("embedding_scale", config.embedding_scale, config.embedding_scale != 1.0, "1"),
        ("expert_activation", config.expert_activation, config.expert_activation != "swiglu", "swiglu"),
        ("router_score", config.router_score, config.router_score != "softmax", "softmax"),
        ("the routers' selection bias", "non-zero", selection_bias, "none"),
        ("num_query_heads * head_dim", width, width != config.hidden_size, f"hidden_size={config.hidden_size}"),
    ):
        if wrong:
            raise ExportError(
                f"{field}={value} cannot be expressed by model_type {chosen}, which has {only}: "
                f"export with model_type {own}, which transformers does not know but foejax imports"
            )
    return chosen


def to_config_json(config: ModelConfig, model_type: ModelType, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json for a model stored in `dtype`.

    The rotary embedding stands there three times: `rope_parameters` is read by transformers >= 5, `rope_theta` and
    `rope_scaling` by older ones. `compute_dtype` is ours; `dtype` and `torch_dtype` describe the stored tensors.
    """
    fields = config.model_dump()
    if config.num_ffn_heads:
        fields["ffn_head_dim"] = config.expert_width  # the size itself, also where it was left to be derived
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    content: dict[str, Any] = {"model_type": model_type, "architectures": [_ARCHITECTURES[model_type]]}
    content |= {key: fields[field] for field, key in _SHARED_KEYS.items()}
    content |= {key: fields[key] for key in _OWN_KEYS[model_type]}
    content |= {key: values[fields[field]] for key, (field, values) in _IMPLIED.items()}
    content |= {key: value for key, value in _FIXED.items() if key != "sliding_window"}
    return content | {
        "rope_parameters": scaling | {"rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "rope_scaling": None if factor == 1.0 else scaling | {"type": "linear"},
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "compute_dtype": config.dtype,
        "use_cache": True,
    }


def read_config_json(folder: Path) -> tuple[ModelType, dict[str, Any]]:
    """The kind of model in a folder and the whole content of its config.json.

    Raises:
      ModelFolderError: no config.json, not JSON, or another kind of model.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFolderError(f"{path} is missing: give the folder of an exported model") from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} is not readable JSON ({error}): copy the folder again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in get_args(ModelType):
        supported = " or ".join(get_args(ModelType))
        raise ModelFolderError(f"{path}: model_type={kind!r} is not one we read: give a folder of {supported}")
    return cast(ModelType, kind), content


def from_config_json(folder: Path, dtype: str | None) -> ModelConfig:
    """The model configuration in a folder; `dtype` replaces the compute dtype it names.

    Raises:
      ModelFolderError: config.json is missing, incomplete, inconsistent, or asks for what our models do not have.
    """
    model_type, content = read_config_json(folder)
    where = f"{folder / CONFIG_FILE}:"
    own_keys = _OWN_KEYS[model_type]
    for key, value in _FIXED.items():
        if content.get(key, value) != value:
            raise ModelFolderError(f"{where} {key}={content[key]!r} is not supported, only {key}={value!r}")
    needed = [*_SHARED_KEYS.values(), *own_keys]
    missing = [key for key in needed if content.get(key) is None and key not in _OPTIONAL]
    if missing:
        raise ModelFolderError(f"{where} {', '.join(missing)} missing: take the config.json the model was saved with")
    fields = {field: content[key] for field, key in _SHARED_KEYS.items() if content.get(key) is not None}
    fields.setdefault("num_kv_heads", content["num_attention_heads"])
    fields |= {key: content[key] for key in own_keys if content.get(key) is not None}
    if model_type == "mhlmoe" and not fields["num_ffn_heads"]:
        raise ModelFolderError(f"{where} num_ffn_heads=0 does not fit model_type='mhlmoe': correct the config.json")
    if model_type == "olmoe":
        fields["head_dim"] = _olmoe_head_dim(content, where)
    fields["rope_base"], fields["rope_scaling_factor"] = _rotary(content, where)
    fields["dtype"] = dtype or _compute_dtype(content)
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = f"{field}={first['input']!r}: {first['msg']}" if field else first["msg"]
        raise ModelFolderError(f"{where} {message.removeprefix('Value error, ')}") from None
    _check_implied(content, config, where)
    return config


def _check_implied(content: dict[str, Any], config: ModelConfig, where: str) -> None:
    for key, (field, values) in _IMPLIED.items():
        ours = getattr(config, field)
        if content.get(key, values[ours]) != values[ours]:
            raise ModelFolderError(
                f"{where} {key}={content[key]!r} is not supported with {field}={ours!r}, only {key}={values[ours]!r}"
            )


def _olmoe_head_dim(content: dict[str, Any], where: str) -> int:
    width, heads = content["hidden_size"], content["num_attention_heads"]
    if width % heads or content.get("head_dim") not in (None, width // heads):
        raise ModelFolderError(
            f"{where} num_attention_heads={heads} and head_dim={content.get('head_dim')!r} do not make up "
            f"hidden_size={width}, as they do in every OLMoE: correct the config.json"
        )
    return width // heads


def _rotary(content: dict[str, Any], where: str) -> tuple[float, float]:
    """Base and linear scaling factor, from either form of the keys."""
    rotary = content.get("rope_scaling") or content.get("rope_parameters") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ModelFolderError(f"{where} rope_type={kind!r} is not supported, only default and linear")
    base = rotary.get("rope_theta", content.get("rope_theta"))
    if base is None:
        raise ModelFolderError(f"{where} rope_theta missing: take the config.json the model was saved with")
    return base, rotary.get("factor", 1.0) if kind == "linear" else 1.0


def _compute_dtype(content: dict[str, Any]) -> str:
    dtype = content.get("compute_dtype") or content.get("dtype") or content.get("torch_dtype") or "float32"
    return "float32" if dtype == "float16" else dtype  # we do not compute in float16; float32 holds its values
