"""How every Triton kernel here starts: through jax-triton, one program a block, its results typed as its operands vary.

Needs the extra `foejax[triton]`, so only the modules `<operation>/triton.py` import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton

from pallas_kernels.varying import cast_to_varying, varying_axes


def launch(
    kernel: Any,
    operands: Sequence[jax.Array | int | None],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int | None = None,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """What the kernel writes; zeros, without a start, where an operand or a result holds no numbers.

    Call it under `jax.jit`: in an eager `shard_map` the results would have lost the other devices' values already.

    Args:
      kernel: a function under `triton.jit`; its parameters are the operands, the results and the constants.
      operands: arrays, scalars, and None for an array that these constants make the kernel leave alone.
      results: shape and dtype of each.
      name: shown by profilers.
      grid: number of programs along up to three axes.
      num_warps: warps of a program.
      num_stages: blocks of operands in flight in a loop; None leaves it to Triton.
      constants: the `tl.constexpr` parameters.
    """
    arrays = [operand for operand in operands if isinstance(operand, jax.Array)]
    axes = varying_axes(*arrays)
    if any(array.size == 0 for array in arrays) or any(result.size == 0 for result in results):
        return tuple(cast_to_varying(jnp.zeros(result.shape, result.dtype), axes) for result in results)
    written = jax_triton.triton_call(
        *(arrays[0] if operand is None else operand for operand in operands),
        kernel=kernel,
        out_shape=list(results),
        grid=grid,
        name=name,
        num_warps=num_warps,
        num_stages=num_stages,
        **constants,
    )
    # jax-triton types results as equal on all devices, but they vary as the operands do.
    return tuple(cast_to_varying(result, axes) for result in written)
