"""The GPU kernels compiled for an H200 that is not there: they lower, fit, use the tensor cores and do not spill."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from foejax.analysis.comms import lower_train_step
from foejax.config import load_config
from pallas_kernels import backends
from pallas_kernels.deviceless import compile_for_h200, dumped_kernels, h200_mesh
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_swiglu import mosaic_gpu as fused
from pallas_kernels.hopper_tiles import CANDIDATES, SHARED_MEMORY, Tiles, by_rule, swapped_tiles
from sharding import Layout
from sharding.mesh import AXES

pytestmark = pytest.mark.aot

ROWS, EXPERTS, WIDTH, HIDDEN = 16_384, 64, 2048, 1024
TILES = sorted({tiles._replace(snake=8) for tiles in CANDIDATES} | {by_rule(128, HIDDEN), by_rule(64, 384)})


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def weighted_swiglu(
    x: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array, weights: jax.Array, **options: Any
) -> tuple[jax.Array, ...]:
    return fused.swiglu(x, gate, up, sizes, weights_R=weights, **options)


SIZES = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
ROW_WEIGHTS = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
EXPERT_INPUTS = (bf16(ROWS, WIDTH), bf16(EXPERTS, WIDTH, HIDDEN), bf16(EXPERTS, WIDTH, HIDDEN), SIZES)
KERNELS: dict[str, tuple[Callable[..., jax.Array], dict[str, Any], tuple[jax.ShapeDtypeStruct, ...]]] = {
    "forward": (mosaic_gpu.matmul, {}, (bf16(ROWS, WIDTH), bf16(EXPERTS, WIDTH, HIDDEN), SIZES)),
    "dgrad": (
        mosaic_gpu.matmul,
        {"transpose_rhs": True},
        (bf16(ROWS, HIDDEN), bf16(EXPERTS, WIDTH, HIDDEN), SIZES),
    ),
    "wgrad": (mosaic_gpu.weight_gradient, {}, (bf16(ROWS, WIDTH), bf16(ROWS, HIDDEN), SIZES)),
    "swiglu": (weighted_swiglu, {"save_inputs": True}, (*EXPERT_INPUTS, ROW_WEIGHTS)),
    "swiglu of inference": (fused.swiglu, {"save_inputs": False}, EXPERT_INPUTS),
}


def check_compiled(folder: Path, kernel: Callable[..., Any], shapes: Sequence[Any], shared_memory: int) -> str:
    """PTX of one kernel, compiled and checked."""
    with dumped_kernels(folder):
        compile_for_h200(kernel, *shapes)
    ptx, report, resources = (
        next(folder.glob(f"*.{ending}")).read_text() for ending in ("ptx", "ptxas", "resources.txt")
    )
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")]
    assert "serialized" not in report, "wgmma instructions wait for each other"
    assert re.search(r"wgmma\.mma_async\.\S*f32\.bf16\.bf16", ptx)
    assert int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]) <= shared_memory <= SHARED_MEMORY
    return ptx


@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: "x".join(map(str, tiles)))
@pytest.mark.parametrize("name", KERNELS)
def test_every_tile_compiles_without_spills(name: str, tiles: Tiles, tmp_path: Path) -> None:
    kernel, options, shapes = KERNELS[name]
    run = functools.partial(kernel, tiles=tiles, **options)
    if name not in ("forward", "dgrad") and not tiles.suit_every_kernel:
        with pytest.raises(ValueError, match="takes tiles of 128 rows and depth 64 only"):
            compile_for_h200(run, *shapes)
        return
    check_compiled(tmp_path, run, shapes, tiles.shared_memory)


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("matmul", "bfloat16"),
        ("matmul transposed", "bfloat16"),
        ("matmul transposed", "int8"),
        ("matmul transposed", "float8_e4m3fn"),
        ("swiglu", "bfloat16"),
        ("swiglu", "int8"),
        ("swiglu", "float8_e4m3fn"),
    ],
)
def test_swapped_operands_compile_without_spills(name: str, dtype: str, rows: int, tmp_path: Path) -> None:
    quantized, num_weights = dtype != "bfloat16", 2 if name == "swiglu" else 1
    num_rows, itemsize = EXPERTS * min(rows - 7, 32), jnp.dtype(dtype).itemsize
    tiles = swapped_tiles(num_rows, EXPERTS, itemsize, num_weights=num_weights)
    assert tiles is not None
    assert tiles.rows == rows
    transposed = quantized or name == "matmul transposed"
    w = jax.ShapeDtypeStruct((EXPERTS, HIDDEN, WIDTH) if transposed else (EXPERTS, WIDTH, HIDDEN), dtype)
    scales = jax.ShapeDtypeStruct((EXPERTS, HIDDEN), jnp.float32) if quantized else None
    weights = jax.ShapeDtypeStruct((num_rows,), jnp.float32)

    def run(x: jax.Array, w: jax.Array, sizes: jax.Array, scales: jax.Array | None, weights: jax.Array) -> Any:
        if name == "swiglu":
            pair = None if scales is None else (scales, scales)
            return fused.swiglu(x, w, w, sizes, weights_R=weights, scales=pair, save_inputs=False)
        return mosaic_gpu.matmul(x, w, sizes, transpose_rhs=transposed, scales_EN=scales)

    shapes = (bf16(num_rows, WIDTH), w, SIZES, scales, weights)
    ptx = check_compiled(tmp_path, run, shapes, tiles.shared_memory(itemsize, num_weights))
    left = {match[1] for match in re.finditer(r"wgmma\.mma_async\S+ \{[^}]*\}, (\{|%rd)", ptx)}
    assert left == {"{" if quantized else "%rd"}, "weights of 8 bits are the left operand from registers"


@pytest.mark.parametrize(("width", "hidden"), [(768, 384), (2048, 1024), (7168, 2048)])
@pytest.mark.parametrize("num_rows", [512, 16_384])
def test_the_models_shapes_compile_without_spills(num_rows: int, width: int, hidden: int, tmp_path: Path) -> None:
    """FoE-1B, FoE-7B and DeepSeek-V3, prefill and decoding, both ways through the experts."""
    x, gate, down = bf16(num_rows, width), bf16(EXPERTS, width, hidden), bf16(EXPERTS, hidden, width)
    hidden_rows, weights = bf16(num_rows, hidden), jax.ShapeDtypeStruct((num_rows,), jnp.float32)

    def all_kernels(x: Any, gate: Any, down: Any, hidden_rows: Any, sizes: Any, weights: Any) -> list[jax.Array]:
        return [
            mosaic_gpu.matmul(x, gate, sizes),
            mosaic_gpu.matmul(hidden_rows, down, sizes),
            mosaic_gpu.matmul(hidden_rows, gate, sizes, transpose_rhs=True),
            mosaic_gpu.matmul(x, down, sizes, transpose_rhs=True),
            mosaic_gpu.weight_gradient(x, hidden_rows, sizes),
            mosaic_gpu.weight_gradient(hidden_rows, x, sizes),
            *fused.swiglu(x, gate, gate, sizes, weights_R=weights, save_inputs=True),
        ]

    with dumped_kernels(tmp_path):
        compile_for_h200(all_kernels, x, gate, down, hidden_rows, SIZES, weights)
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == 7
    for report in reports:
        assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")]


def test_a_training_step_holds_no_buffer_of_every_expert_times_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole FoE step with the Hopper kernels in it; a dense masked expansion would need [E, R, D]."""
    monkeypatch.setattr(backends, "device_kind", lambda: "hopper")
    rows, length = 4, 512
    vocabulary = {"model.vocab_size": 2048, "data.tokenizer_vocab_size": 2048}
    batch = {"data.batch_size": rows, "data.sequence_length": length, "training.gradient_accumulation": 1}
    config = load_config("foe_1b", {"model.num_layers": 2, "training.remat": "none"} | vocabulary | batch)
    layout = Layout(h200_mesh(AXES, (1, 1, 1)), "foe")
    compiled = lower_train_step(config, layout).compile()
    text, model = compiled.as_text(), config.model
    # gate, up and down of a layer, each with its two gradients, in the two layer loops
    assert text.count('custom_call_target="mosaic_gpu') >= 9
    assert "ragged" not in text
    all_weights = model.num_layers * model.num_experts * model.hidden_size * model.expert_hidden_size
    assert all_weights < model.num_experts * rows * length * model.hidden_size
    assert max(map(_elements, re.findall(r"(?:bf16|f32)\[([\d,]+)\]", text))) <= all_weights


def _elements(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(","))
