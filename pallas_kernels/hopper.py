"""What the Hopper kernels (sm_90a, Pallas Mosaic GPU) share: how they start, load, wait and store.

A kernel is one persistent grid. In every thread block one warpgroup issues TMA loads, and two compute warpgroups
multiply what has arrived. Row tiles start at multiples of 8 rows, because a TMA load into swizzled shared memory
must; a tile that also holds rows of its neighbours stores its own rows alone.

Shape letters: R rows, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, PARTIAL_COLUMNS, STORE_COLUMNS
from pallas_kernels.varying import cast_to_varying, varying_axes

ROW_ALIGNMENT = 8
_SWIZZLE = 128
"""Bytes of a row of shared memory that TMA and wgmma read as one."""
_MEMORY_REGISTERS = 40
"""Registers a thread of the TMA warpgroup keeps; the compute warpgroups share the rest."""
_HOPPER_MULTIPROCESSORS = 132
_QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")


def refusal(
    dtype: jax.typing.DTypeLike,
    num_rows: int,
    features: Sequence[int],
    *,
    transpose_rhs: bool = False,
    weight_dtype: jax.typing.DTypeLike | None = None,
) -> str | None:
    """Why the kernels, forward and backward, cannot take such operands, or None.

    Args:
      features: sizes of the weights' contracted and output dimensions.
      weight_dtype: of quantised weights; None where they have the rows' dtype.
    """
    if jax.__version_info__ < (0, 11, 1):
        return f"mosaic_gpu needs jax >= 0.11.1, not {jax.__version__}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"mosaic_gpu takes bfloat16 only, not {jnp.dtype(dtype)}"
    if weight_dtype is not None and jnp.dtype(weight_dtype).name not in _QUANTIZED_DTYPES:
        return f"mosaic_gpu takes weights of {' or '.join(_QUANTIZED_DTYPES)}, not {jnp.dtype(weight_dtype)}"
    if weight_dtype is not None and not transpose_rhs:
        return "mosaic_gpu takes weights of 8 bits with the contracted axis last only"
    for size in features:
        if size % 128:
            return f"mosaic_gpu takes features in multiples of 128 only, not {size}"
    return None if num_rows else "mosaic_gpu takes at least one row"


def num_multiprocessors() -> int:
    """Thread blocks of a persistent grid: one a multiprocessor of the GPU at hand, or of an H200 if there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _HOPPER_MULTIPROCESSORS


def pad_rows(x: jax.Array, height: int) -> jax.Array:
    """At least `height` rows, and a multiple of the alignment; no copy where they are."""
    rows = max(height, -(-x.shape[0] // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    return jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1))) if rows > x.shape[0] else x


def launch(name: str, kernel: Callable[..., None], shapes: Any, operands: Any) -> Any:
    """Run `kernel(operands, *results)`, where references to them stand for the arrays.

    In `kernel` the mesh axes are "block" and "warpgroup"; the last warpgroup is the loading one.

    Args:
      shapes: of the results, which are bfloat16; a pytree of tuples.
      operands: a pytree of arrays.
    """
    arrays, structure = jax.tree.flatten(operands)
    is_shape = lambda node: isinstance(node, tuple) and all(isinstance(size, int) for size in node)  # noqa: E731

    def body(*refs: Any) -> None:
        kernel(jax.tree.unflatten(structure, refs[: len(arrays)]), *refs[len(arrays) :])

    body.__name__ = name
    run = plgpu.kernel(
        body,
        out_type=jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes, is_leaf=is_shape),
        grid=(num_multiprocessors(),),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    axes = varying_axes(*arrays)
    return jax.tree.map(lambda result: cast_to_varying(result, axes), run(*arrays))


def tiled_memory(*shape: int, columns: int) -> Any:
    """Shared memory for TMA: bfloat16 rows of `columns` elements, swizzled over their bytes."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_swizzled(2 * columns, jnp.bfloat16))


def _swizzled(row_bytes: int, dtype: jax.typing.DTypeLike) -> tuple[Any, ...]:
    tile = 8, row_bytes // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(row_bytes)  # type: ignore[abstract]


class Block(NamedTuple):
    """What a step of a pipeline loads of one operand: a shape, where it lies by the step's indices, the dtype."""

    shape: tuple[Any, ...]
    index_map: Callable[..., tuple[Any, ...]]
    dtype: jax.typing.DTypeLike = jnp.bfloat16


def pipeline(
    body: Callable[..., Any],
    compute: Callable[..., Any],
    steps: tuple[Any, ...],
    blocks: Sequence[Block],
    stages: int,
    *,
    delay_release: int,
) -> Any:
    """The warp-specialised pipeline over a grid of `steps`.

    Args:
      steps: read from data: the compiler unrolls a loop that it knows to be short, and then spills.
      delay_release: 0 if `body` awaits its products; 1 if it leaves one step's running: then call `await_drained`
        behind the pipeline, and arrive at its barrier in `compute` once the sums are read.
    """
    specs = [
        plgpu.BlockSpec(
            block.shape,
            block.index_map,
            transforms=_swizzled(_SWIZZLE, block.dtype),
            delay_release=delay_release,
        )
        for block in blocks
    ]
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=steps,
        memory_registers=_MEMORY_REGISTERS,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=COMPUTE_WARPGROUPS,
        max_concurrent_steps=stages,
        compute_context=compute,
    )


def nothing(*_: Any, **__: Any) -> None:
    """Stands in where only a pipeline's allocations are asked for."""


def for_each_tile(grid: tuple[int, int, int], snake: int, scratch: dict[str, Any]) -> Callable[..., None]:
    """Decorates `body(*indices, **scratch)`, to run for every tile of a grid; the thread blocks take them in turn.

    Args:
      grid: a number of planes, each of rows by columns of tiles.
      snake: rows of tiles of a plane that are visited before the next column, for reuse in L2.
      scratch: types of the memory and barriers that a thread block keeps throughout.
    """
    planes, rows, columns = grid

    def decorate(body: Callable[..., None]) -> None:
        def run(**scratch: Any) -> None:
            @plgpu.nd_loop((planes * rows * columns,), collective_axes="block")
            def _(loop: Any) -> None:
                (index,) = loop.index
                plane, index = lax.div(index, rows * columns), lax.rem(index, rows * columns)
                body(plane, *plgpu.planar_snake(index, (rows, columns), 0, snake), **scratch)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(run, **scratch, collective_axes="warpgroup")

    return decorate


def swiglu(gate: Any, up: Any) -> Any:
    """silu(gate) * up, of float32 sums."""
    return gate / (1.0 + jnp.exp(-gate)) * up


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

    A whole tile goes through swizzled memory, the rows of a partial one through plain memory, see `store_runs`.

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
            store_runs(y_RN, partial, first=first, column=column + offset, start=start, stop=stop, longest=rows // 2)


def store_runs(y_RN: Any, memory: Any, *, first: Any, column: Any, start: Any, stop: Any, longest: int) -> None:
    """Store rows [start, stop) of plain memory that holds rows of y from `first` on, columns from `column` on.

    They go in runs of powers of two, because the height of a TMA store is static; from plain memory, because from
    swizzled memory TMA starts at every eighth row only.

    Args:
      longest: run; `stop` - `start` is less than twice as much.
    """
    live, run = stop - start, longest
    while run:

        @pl.when((live & run) != 0)
        def _(run: int = run) -> None:
            row = start + live // (2 * run) * (2 * run)
            plgpu.copy_smem_to_gmem(
                memory.at[pl.ds(row - first, run)],
                y_RN.at[pl.ds(row, run), pl.ds(column, memory.shape[1])],
                commit_group=False,
            )

        run //= 2
    plgpu.commit_smem_to_gmem_group()
