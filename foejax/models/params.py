"""Parameters as trees: where each one lives on the mesh and how it enters a layer."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from sharding import Layout


def param_specs(state: nnx.State, layout: Layout) -> list[PartitionSpec]:
    """Partition of every leaf of a model's state, in the order of `jax.tree.leaves`.

    Arrays of stacked blocks have a leading layer dimension that their logical axes do not name.
    """
    specs = []
    for variable in _variables(state):
        axes = variable.logical_axes
        stacked = variable.get_value().ndim - len(axes)
        specs.append(layout.spec((None,) * stacked + axes))
    return specs


def enter_params_local(state: nnx.State, layout: Layout) -> nnx.State:
    """One layer's parameters as the layer computes with them: gathered, cast, marked as varying."""
    return jax.tree.map(
        lambda variable: variable.replace(
            layout.enter_param_local(variable[...], layout.spec(variable.logical_axes), variable.use_dtype)
        ),
        state,
        is_leaf=_is_variable,
    )


def cast_to_use(state: nnx.State) -> nnx.State:
    """The parameters in the dtype in which layers use them, which spares every pass the cast."""
    return jax.tree.map(
        lambda variable: variable.replace(variable.get_value().astype(variable.use_dtype)), state, is_leaf=_is_variable
    )


def unstack(state: nnx.State, layout: Layout) -> list[nnx.State]:
    """The states of single blocks, in the dtypes in which layers use them, out of that of stacked ones."""
    variables, treedef = jax.tree.flatten(state, is_leaf=_is_variable)

    def layers_of(variable: Any) -> list[Any]:
        sharding = layout.sharding(layout.spec(variable.logical_axes))
        separate = jax.jit(_separate, static_argnames="dtype", out_shardings=sharding)
        return [variable.replace(layer) for layer in separate(variable.get_value(), dtype=variable.use_dtype)]

    layers = zip(*map(layers_of, variables), strict=True)
    return [jax.tree.unflatten(treedef, layer) for layer in layers]


def _separate(stacked: jax.Array, dtype: Any) -> list[jax.Array]:
    """Cast and taken apart in one program, so that no cast stack stands in memory between the two."""
    return list(stacked.astype(dtype))


def _variables(state: nnx.State) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
