"""Who races in the grouped matmul: our backends, the peers that are installed, and the bound of even groups.

Steps and their operands: "forward" (x_RK, w_EKN, group_sizes_E) -> y_RN, "dgrad" (dy_RN, w_EKN, group_sizes_E) ->
dx_RK, "wgrad" (x_RK, dy_RN, group_sizes_E) -> dw_EKN. Weights are stored [E, K, N] in every step and for every
contender, and the operands' random bfloat16 values are the same arrays for all.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts, T rows of an even group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernel_bench.contenders import NEEDS_GPU, Steps, own_backend, torch_peer
from experiments.kernel_bench.operations import Contender, Operands, first_line
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import DecodeShape

_CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False}

_ROWS_BY_WEIGHTS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_ROWS_BY_WEIGHTS_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_ROWS_BY_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    return (
        *(_ours(name, on_gpu) for name in ("mosaic_gpu", "triton", "xla")),
        _torch(on_gpu),
        *_tokamax(on_gpu),
        *_jax_example(on_gpu),
        _ragged_dot(),
        _even_groups(on_gpu),
    )


def _ours(name: str, on_gpu: bool) -> Contender:
    product = functools.partial(grouped_matmul, implementation=name)  # type: ignore[call-arg, arg-type, unused-ignore]

    def steps(backend: ModuleType) -> Steps:
        return {
            "forward": product,
            "dgrad": functools.partial(product, transpose_rhs=True),
            "wgrad": backend.weight_gradient,
        }

    def refuses(backend: ModuleType, step: str, dims: Any) -> str | None:
        refusal = getattr(backend, "refusal", None)
        if refusal is None:
            return None
        rows, weights = (dims.rows, dims.contracted), (dims.experts, dims.contracted, dims.features)
        if step == "dgrad":
            return refusal((dims.rows, dims.features), weights, "bfloat16", transpose_rhs=True)
        return refusal(rows, weights, "bfloat16", transpose_rhs=False)

    remark = "starts from the group sizes, as a layer would"
    return own_backend("grouped_matmul", name, on_gpu, steps, refuses, remark)


def _ragged_dot_steps(general: Callable[..., Any]) -> Mapping[str, Callable[..., Any]]:
    """The three products as one ragged_dot_general; they are what its own gradients call."""

    def step(numbers: jax.lax.RaggedDotDimensionNumbers) -> Callable[..., Any]:
        def product(left: jax.Array, right: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
            return general(left, right, group_sizes_E, numbers, preferred_element_type=left.dtype)

        return product

    numbers = {"forward": _ROWS_BY_WEIGHTS, "dgrad": _ROWS_BY_WEIGHTS_TRANSPOSED, "wgrad": _ROWS_BY_ROWS}
    return {name: step(value) for name, value in numbers.items()}


def _ragged_dot() -> Contender:
    return Contender("jax.lax.ragged_dot", "peer", _ragged_dot_steps(jax.lax.ragged_dot_general))


def _tokamax(on_gpu: bool) -> tuple[Contender, ...]:
    names = {implementation: f"tokamax {implementation}" for implementation in ("mosaic", "triton")}
    try:
        import tokamax

        general = tokamax.ragged_dot_general
    except Exception as error:  # its own imports fail in many ways
        return tuple(Contender(name, "peer", {}, missing=first_line(error)) for name in names.values())
    return tuple(
        Contender(
            name,
            "peer",
            _ragged_dot_steps(functools.partial(general, implementation=implementation)),
            missing=None if on_gpu else NEEDS_GPU,
            remark="tiles by its own rule, not autotuned",
        )
        for implementation, name in names.items()
    )


def _jax_example(on_gpu: bool) -> tuple[Contender, ...]:
    """JAX's example kernels with two tiles each; the faster one is the peer to beat."""
    tiles = ((128, 128, 4), (64, 128, 5))  # rows and columns of a tile, pipeline steps
    names = [f"jax ragged_dot_mgpu {rows}x{columns}" for rows, columns, _ in tiles]
    try:
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu
    except Exception as error:  # moves between JAX versions
        return tuple(Contender(name, "peer", {}, missing=first_line(error)) for name in names)
    missing = None if on_gpu else NEEDS_GPU
    depth = 64

    def contender(name: str, rows: int, columns: int, stages: int) -> Contender:
        def options(features: int) -> dict[str, Any]:
            # The example wants its column blocks to divide the features.
            snake = next(width for width in (8, 4, 2, 1) if features // columns % width == 0)
            return {
                "block_m": rows, "block_n": columns, "block_k": depth,
                "max_concurrent_steps": stages, "grid_block_n": snake,
            }  # fmt: skip

        def product(left_RK: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transpose_rhs: bool) -> jax.Array:
            features = w.shape[1 if transpose_rhs else 2]
            return ragged_dot_mgpu.ragged_dot(
                left_RK, w, group_sizes=sizes_E, transpose_rhs=transpose_rhs, **options(features)
            )

        def gradient(x_RK: jax.Array, dy_RN: jax.Array, sizes_E: jax.Array) -> jax.Array:
            return transposed_ragged_dot_mgpu.transposed_ragged_dot(
                x_RK, dy_RN, group_sizes=sizes_E, **options(dy_RN.shape[1])
            )

        def refuses(step: str, dims: Any) -> str | None:
            contracted, features = dims.contracted, dims.features
            if step == "dgrad":
                contracted, features = features, contracted
            wanted = (features, columns), (contracted, rows if step == "wgrad" else depth)
            odd = [f"{size} by {block}" for size, block in wanted if size % block]
            return f"does not divide {' or '.join(odd)}" if odd else None

        steps: dict[str, Callable[..., Any]] = {
            "forward": functools.partial(product, transpose_rhs=False),
            "dgrad": functools.partial(product, transpose_rhs=True),
            "wgrad": gradient,
        }
        remark = "tiles fixed, not tuned"
        return Contender(name, "peer", steps, missing=missing, refuses=refuses, remark=remark)

    return tuple(contender(name, *shape) for name, shape in zip(names, tiles, strict=True))


def _torch(on_gpu: bool) -> Contender:
    def steps(torch: Any) -> Steps:
        multiply = torch._grouped_mm
        return {
            "forward": lambda x_RK, w_EKN, ends_E: multiply(x_RK, w_EKN, offs=ends_E),
            "dgrad": lambda dy_RN, w_EKN, ends_E: multiply(dy_RN, w_EKN.transpose(-2, -1), offs=ends_E),
            "wgrad": lambda x_RK, dy_RN, ends_E: multiply(x_RK.t(), dy_RN, offs=ends_E),
        }

    return torch_peer(
        "torch._grouped_mm",
        on_gpu,
        steps,
        needs="_grouped_mm",
        prepare=sum_up_sizes,
        remark="group ends are summed up outside the timed region",
    )


def sum_up_sizes(torch: Any, step: str, operands: Operands) -> Operands:
    """The operands with the groups' ends, which `torch._grouped_mm` takes, in the place of their sizes."""
    left, right, sizes_E = operands
    return left, right, sizes_E.cumsum(0, dtype=torch.int32)


def _even_groups(on_gpu: bool) -> Contender:
    """One batched matmul over equal groups, by cuBLAS on a GPU: nothing ragged about it."""

    def even(rows_RK: jax.Array, experts: int) -> jax.Array:
        return rows_RK.reshape(experts, -1, rows_RK.shape[1])

    def product(left_RK: jax.Array, w: jax.Array, sizes_E: jax.Array, *, einsum: str) -> jax.Array:
        out_ETN = jnp.einsum(einsum, even(left_RK, w.shape[0]), w)
        return out_ETN.reshape(left_RK.shape[0], -1)

    def gradient(x_RK: jax.Array, dy_RN: jax.Array, sizes_E: jax.Array) -> jax.Array:
        experts = sizes_E.shape[0]
        return jnp.einsum("etk,etn->ekn", even(x_RK, experts), even(dy_RN, experts))

    def refuses(step: str, dims: Any) -> str | None:
        if isinstance(dims, DecodeShape):
            return "decoding is held against the copy ceiling"
        if dims.rows % dims.experts:
            return f"{dims.rows} rows do not split evenly over {dims.experts} experts"
        return None

    return Contender(
        "even groups, cuBLAS" if on_gpu else "even groups",
        "bound",
        {
            "forward": functools.partial(product, einsum="etk,ekn->etn"),
            "dgrad": functools.partial(product, einsum="etn,ekn->etk"),
            "wgrad": gradient,
        },
        refuses=refuses,
        remark="one batched matmul of equal groups, nothing ragged: an upper bound, no peer",
        sizes=("uniform",),
        compiler_options=_CUBLAS_ONLY,
    )
