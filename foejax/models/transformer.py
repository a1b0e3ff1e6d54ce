"""The stack of blocks between embedding and head, as the program of one device.

Shape letters: L layers, S groups on this device, N tokens on this device, M rows asked for, D width, V vocabulary,
E experts of a group, k choices per token and group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct

from foejax.config import ModelConfig
from foejax.models.attention import HEAD_SQUARES
from foejax.models.block import MERGED_RESIDUAL, WHOLE_TOKENS, Block, Streams, layer_merge_scale, merge_scales
from foejax.models.cache import AttentionCache
from foejax.models.expert_parallel import EXCHANGED
from foejax.models.layers import high_precision, make_norm, make_param, rms_norm, rotary_angles
from foejax.models.params import enter_params_local, unstack
from foejax.models.router import RouterStats, Routing, SelectFn
from pallas_kernels.grouped_swiglu.api import PREACTIVATIONS
from pallas_kernels.stacked_matmul import stacked_matmul
from sharding import Layout

Remat = Literal["none", "dots", "full"]
LayerFn = Callable[[Any, Any], tuple[Any, Any]]


@struct.dataclass
class StackOutput:
    """What the layers leave behind.

    Attributes:
      streams: state after the last layer, not yet merged.
      cache: the cache with every layer written.
      stats: router sums, leading dimension L.
      routing: choices of every layer (leading dimension L), or None when not asked for.
    """

    streams: Streams
    cache: AttentionCache
    stats: RouterStats
    routing: Routing | None


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and untied head.

    Attributes:
      layers: the blocks as one whose parameters have a leading layer dimension, which a scan goes through: one layer to
        compile and to differentiate; see `with_separate_layers` for the other form.
    """

    layers: Block | nnx.List[Block]

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        init, vocab, width = nnx.initializers.normal(config.init_std), config.vocab_size, config.hidden_size
        self.embedding_VD = make_param(
            rngs, init, (None, "embed"), (vocab, width), config.dtype, high_precision_use=True
        )
        self.layers = _stacked_blocks(config, rngs)
        self.final_norm_D = make_norm(rngs, (None,), (width,), config.dtype)
        self.head_DV = make_param(rngs, init, ("embed", "vocab"), (width, vocab), config.dtype)

    def run_stack_local(
        self,
        tokens_N: jax.Array,
        positions_N: jax.Array,
        cache: AttentionCache,
        layout: Layout,
        *,
        active_tokens: jax.Array,
        remat: Remat = "none",
        record_routing: bool = False,
        select_fn: SelectFn | None = None,
    ) -> StackOutput:
        """Embed flat tokens and run every layer; parameters are this device's shards.

        Args:
          tokens_N, positions_N: int32; the cache knows how they fall into sequences.
          active_tokens: [N] bool, False for padding.
          remat: what the backward pass recomputes; merged residuals and exchanged tokens are always saved.
          record_routing: return every layer's choices.
        """
        config = self.config
        embedding_VD = self._param("embedding_VD", layout)
        embedded_ND = jnp.take(embedding_VD, tokens_N, axis=0) * config.embedding_scale
        residual_ND = layout.own_tokens_local(embedded_ND.astype(config.dtype))
        active_tokens = layout.routed_tokens_local(layout.own_tokens_local(active_tokens))
        graphdef = nnx.graphdef(self._first_block)
        streams = Streams(residual_ND, jnp.zeros_like(residual_ND, shape=(self.local_heads[0], *residual_ND.shape)))
        streams = jax.tree.map(layout.vary_local, streams)
        angles_NK = rotary_angles(positions_N, config.head_dim, config.rope_base, config.rope_scaling_factor)

        def run_layer(
            carry: tuple[Streams, AttentionCache], inputs: tuple[jax.Array, nnx.State]
        ) -> tuple[tuple[Streams, AttentionCache], tuple[RouterStats, Routing | None]]:
            (streams, cache), (layer, params) = carry, inputs
            block = nnx.merge(graphdef, enter_params_local(params, layout))
            streams, cache, stats, routing = block(
                streams,
                layer,
                angles_NK,
                cache,
                layout,
                merge_scale=layer_merge_scale(config, layer),
                active_tokens=active_tokens,
                select_fn=select_fn,
            )
            return (streams, cache), (stats, routing if record_routing else None)

        run = _with_remat(run_layer, remat, layout)
        (streams, cache), (stats, routing) = self._for_each_layer(run, (streams, cache))
        return StackOutput(streams, cache, stats, routing)

    def with_separate_layers(self, layout: Layout) -> Transformer:
        """The same, with every layer's parameters in arrays of their own and in the dtypes of their use.

        A scan copies a layer's parameters out of the stack before it uses them. Beside the many tokens of a training
        step that is little; while decoding it is more than the layer itself.
        """
        if not isinstance(self.layers, Block):
            return self
        graphdef, stack = nnx.split(self.layers)
        graphdef_of_all, state = nnx.split(self)
        separate = nnx.merge(graphdef_of_all, state)
        separate.layers = nnx.List(nnx.merge(graphdef, layer) for layer in unstack(stack, layout))
        return separate

    @property
    def local_heads(self) -> tuple[int, int]:
        """Groups on this device, and key/value heads of each here."""
        groups, _, heads, _ = self._first_block.attention.k_SDGK[...].shape[-4:]
        return groups, heads

    @property
    def _first_block(self) -> Block:
        return self.layers if isinstance(self.layers, Block) else self.layers[0]

    def _for_each_layer(self, run_layer: LayerFn, carry: Any) -> tuple[Any, Any]:
        """`lax.scan` over the layers' numbers and parameters, or the same written out where they are separate."""
        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        if isinstance(self.layers, Block):
            return jax.lax.scan(run_layer, carry, (numbers, nnx.state(self.layers)))
        outputs = []
        for number, block in enumerate(self.layers):
            carry, output = run_layer(carry, (numbers[number], nnx.state(block)))
            outputs.append(output)
        return carry, jax.tree.map(lambda *fields: jnp.stack(fields), *outputs)

    def hidden_slice_local(self, streams: Streams, layout: Layout) -> jax.Array:
        """Merge the streams a last time; each device of a group axis gets its slice of the tokens [M, D], normed."""
        merged_MD = layout.last_merge_slice_local(streams.expert_out_SND)
        return self._norm(self._add(layout.residual_slice_local(streams.residual_ND), merged_MD), layout)

    def hidden_rows_local(self, streams: Streams, rows_M: jax.Array, layout: Layout) -> jax.Array:
        """Merge the streams a last time at the rows asked for: [M, D] on every device, normed."""
        if layout.slices_tokens:
            whole_ND = self._add(streams.residual_ND, layout.last_merge_local(streams.expert_out_SND))
            return self._norm(layout.pick_rows_local(whole_ND, rows_M), layout)
        merged_MD = layout.last_merge_local(streams.expert_out_SND[:, rows_M])
        return self._norm(self._add(streams.residual_ND[rows_M], merged_MD), layout)

    def head_local(self, layout: Layout, *, whole_vocab: bool) -> jax.Array:
        """Head weight [D, V], or this device's part of the vocabulary."""
        head_DV = self._param("head_DV", layout)
        return layout.gather_vocab_local(head_DV, dim=1) if whole_vocab else head_DV

    def _add(self, residual: jax.Array, merged: jax.Array) -> jax.Array:
        return residual + jnp.asarray(merge_scales(self.config)[1], residual.dtype) * merged

    def _norm(self, hidden: jax.Array, layout: Layout) -> jax.Array:
        return rms_norm(hidden, self._param("final_norm_D", layout)[None], self.config.norm_eps)

    def _param(self, name: str, layout: Layout) -> jax.Array:
        variable = getattr(self, name)
        return layout.enter_param_local(variable[...], layout.spec(variable.logical_axes), variable.use_dtype)


def logits_of(hidden_MD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Logits in high precision."""
    with jax.named_scope("head"):
        return stacked_matmul(hidden_MD[None], head_DV[None], dtype=high_precision(hidden_MD.dtype))[0]


def _stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """Independently initialised blocks as one Block whose parameters have a leading layer dimension."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), config.num_layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(Block(config, nnx.Rngs(key))))(keys))


def _with_remat(run_layer: LayerFn, remat: Remat, layout: Layout) -> LayerFn:
    """Wrap the body of the layer scan in the chosen checkpoint policy."""
    policies = jax.checkpoint_policies
    collective_results = (MERGED_RESIDUAL, WHOLE_TOKENS, HEAD_SQUARES, EXCHANGED)
    if remat == "none":
        return jax.checkpoint(run_layer, policy=_keep_activations) if layout.gathers_params else run_layer
    if remat == "dots":
        policy = policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(*collective_results, PREACTIVATIONS)
        )
    else:
        policy = policies.save_only_these_names(*collective_results)
    return jax.checkpoint(run_layer, policy=policy)


def _keep_activations(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep everything but gathered parameters and views of them: the backward pass gathers again, as ZeRO-3 does."""
    return primitive.name not in _PARAMETER_PRIMITIVES


_PARAMETER_PRIMITIVES = frozenset({"all_gather", "reshape", "transpose", "convert_element_type", "squeeze"})
