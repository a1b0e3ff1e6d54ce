"""What the Hopper kernels (sm_90a, Pallas Mosaic GPU) share: how they start, load, wait and store.

A kernel is one persistent grid. In every thread block one warpgroup issues TMA loads, and two compute warpgroups
multiply what has arrived. Row tiles start at multiples of 8 rows, because a TMA load into swizzled shared memory
must; a tile that also holds rows of its neighbours stores its own rows alone.

Shape letters: R rows, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, PARTIAL_COLUMNS, STORE_COLUMNS
from pallas_kernels.varying import cast_to_varying, varying_axes

ROW_ALIGNMENT = 8
_MEMORY_REGISTERS = 40
"""Registers a thread of the TMA warpgroup keeps; the compute warpgroups share the rest."""
_HOPPER_MULTIPROCESSORS = 132


def refusal(dtype: jax.typing.DTypeLike, num_rows: int, features: Sequence[int]) -> str | None:
    """Why the kernels, forward and backward, cannot take such operands, or None.

    Args:
      features: sizes of the weights' contracted and output dimensions.
    """
    if jax.__version_info__ < (0, 11, 1):
        return f"mosaic_gpu needs jax >= 0.11.1, not {jax.__version__}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"mosaic_gpu takes bfloat16 only, not {jnp.dtype(dtype)}"
    for size in features:
        if size % 128:
            return f"mosaic_gpu takes features in multiples of 128 only, not {size}"
    return None if num_rows else "mosaic_gpu takes at least one row"


def num_multiprocessors() -> int:
    """Thread blocks of a persistent grid: one a multiprocessor of the GPU at hand, or of an H200 if there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _HOPPER_MULTIPROCESSORS


def pad_rows(x_RK: jax.Array, height: int) -> jax.Array:
    """At least `height` rows, and a multiple of the alignment; no copy where they are."""
    rows = max(height, -(-x_RK.shape[0] // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    return jnp.pad(x_RK, ((0, rows - x_RK.shape[0]), (0, 0))) if rows > x_RK.shape[0] else x_RK


def launch(body: Callable[..., None], shapes: Any, arguments: Sequence[jax.Array]) -> Any:
    """Run a kernel `body(*argument refs, *result refs)`; results are bf16 of `shapes`, a pytree of shape tuples.

    In `body` the mesh axes are "block" and "warpgroup"; the last warpgroup is the loading one.
    """
    is_shape = lambda node: isinstance(node, tuple) and all(isinstance(size, int) for size in node)  # noqa: E731
    kernel = plgpu.kernel(
        body,
        out_type=jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes, is_leaf=is_shape),
        grid=(num_multiprocessors(),),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    axes = varying_axes(*arguments)
    return jax.tree.map(lambda result: cast_to_varying(result, axes), kernel(*arguments))


def tiled_memory(*shape: int, columns: int = 64) -> Any:
    """Shared memory for TMA and wgmma: bf16 rows of `columns` elements, swizzled over their bytes."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_swizzled(columns))


def _swizzled(columns: int) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]


def pipeline(
    body: Callable[..., Any], compute: Callable[..., Any], steps: Any, blocks: Sequence[Any], stages: int
) -> Any:
    """The warp-specialised pipeline over `steps`: one swizzled block of each operand a step.

    Call `await_drained` behind it, and arrive at its barrier in `compute` once the sums are read.

    Args:
      blocks: (shape, index map) of each operand.
    """
    specs = [
        plgpu.BlockSpec(shape, index_map, transforms=_swizzled(64), delay_release=1) for shape, index_map in blocks
    ]
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=_MEMORY_REGISTERS,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTE_WARPGROUPS,
        max_concurrent_steps=stages,
        compute_context=compute,
    )


def num_steps(contracted: int, depth: int) -> jax.Array:
    """Steps of a pipeline along a contraction, [1], to be read in the kernel.

    It is data because the compiler unrolls a loop that it knows to be short, and then spills.
    """
    return jnp.full((1,), contracted // depth, jnp.int32)


def weight_block(columns: int, depth: int, *, transposed: bool) -> Any:
    """(shape, index map) of the weights' block in a step along the contraction; stored [K, N], or [N, K] transposed."""
    if transposed:
        return (columns, depth), lambda step: (0, step)
    return (depth, columns), lambda step: (step, 0)


def weight_columns(w_EKN: Any, expert: Any, column: Any, width: int, *, transposed: bool) -> Any:
    """`width` output features of one expert's weights, from `column` on."""
    span = pl.ds(column, width)
    return w_EKN.at[expert, span] if transposed else w_EKN.at[expert, :, span]


def nothing(*_: Any, **__: Any) -> None:
    """Stands in where only a pipeline's allocations are asked for."""


def drain_barrier() -> Any:
    """The barrier of `await_drained`."""
    return plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)


def await_drained(drained: Any) -> None:
    """Keep the loads of the next tile away from the last stage of this one, whose release the pipeline leaves out."""

    @pl.when(lax.axis_index("warpgroup") == COMPUTE_WARPGROUPS)
    def _() -> None:
        plgpu.barrier_wait(drained)


def store_memory(rows: int) -> tuple[Any, Any]:
    """Shared memory of `store_rows`, for tiles of `rows` rows of each compute warpgroup: (whole, partial)."""
    whole = tiled_memory(COMPUTE_WARPGROUPS, rows, STORE_COLUMNS, columns=STORE_COLUMNS)
    return whole, plgpu.SMEM((COMPUTE_WARPGROUPS, rows, PARTIAL_COLUMNS), jnp.bfloat16)


def store_tile(memory: Any, values: Any, target: Any) -> None:
    """Store a tile through swizzled memory, `STORE_COLUMNS` columns at a time; `target` is its place in the result."""
    for offset in range(0, values.shape[1], STORE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        memory[...] = values[:, offset : offset + STORE_COLUMNS]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, target.at[:, pl.ds(offset, STORE_COLUMNS)])


def store_rows(
    y_RN: Any, *, memory: Sequence[Any], values: Any, first: Any, column: Any, start: Any, stop: Any
) -> None:
    """Store rows [start, stop) of a tile whose corner is row `first`, column `column` of y; none where stop <= start.

    A whole tile goes through swizzled memory. Rows of a partial one go through plain memory, where TMA may start at any
    row, in runs of powers of two, because the height of a TMA store is static.

    Args:
      memory: this warpgroup's part of `store_memory`.
      values: the tile, in registers.
    """
    whole, partial = memory
    rows, width = values.shape
    live = stop - start

    @pl.when(live == rows)
    def _() -> None:
        store_tile(whole, values, y_RN.at[pl.ds(first, rows), pl.ds(column, width)])

    @pl.when((live > 0) & (live < rows))
    def _() -> None:
        for offset in range(0, width, PARTIAL_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            partial[...] = values[:, offset : offset + PARTIAL_COLUMNS]
            plgpu.commit_smem()
            run = rows // 2
            while run:

                @pl.when((live & run) != 0)
                def _(run: int = run, offset: int = offset) -> None:
                    row = start + live // (2 * run) * (2 * run)
                    plgpu.copy_smem_to_gmem(
                        partial.at[pl.ds(row - first, run)],
                        y_RN.at[pl.ds(row, run), pl.ds(column + offset, PARTIAL_COLUMNS)],
                        commit_group=False,
                    )

                run //= 2
            plgpu.commit_smem_to_gmem_group()
