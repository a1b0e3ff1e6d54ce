"""Types of values inside a manual `jax.shard_map`: along which mesh axes a value may differ between devices.

With `check_vma=True` (the default) JAX tracks these axes and wants loop carries and cotangents to agree in them.
"""

from __future__ import annotations

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Union of the mesh axes along which the arrays vary; empty outside `shard_map` and under `check_vma=False`."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def cast_to_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same values, typed as varying over `axes` as well; the transpose is a `psum` over the added axes."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
