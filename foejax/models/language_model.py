"""The model as users hold it: parameters on a mesh, with loss and logits as ordinary JAX functions.

Shape letters: B sequences, T tokens, N = B * T, V vocabulary, L layers, H groups, E experts of a group, A all experts,
k choices per token and group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import PartitionSpec

from foejax.config import ModelConfig
from foejax.models.cache import PackedSequences
from foejax.models.losses import summed_cross_entropy
from foejax.models.params import cast_to_use, param_specs
from foejax.models.router import RouterStats, Routing, load_balance_loss
from foejax.models.transformer import Remat, Transformer, logits_of
from sharding import Layout

Batch = Mapping[str, jax.Array | np.ndarray]
"""Arrays [B, T]: tokens, targets, positions, segment_ids (int32; segment 0 is padding) and loss_weights (float32)."""


@struct.dataclass
class RoutingTrace:
    """Which experts every token used, over the whole model.

    Attributes:
      experts: int32 [L, H, N, k], expert inside the group or head; tokens in batch order.
      weights: [L, H, N, k], router weight of each choice; 0 where not valid.
      margins: [L, H, N], gap between the last chosen score and the best one left out.
    """

    experts: jax.Array
    weights: jax.Array
    margins: jax.Array


QUICK_COMPILE = {"xla_backend_optimization_level": 0}
"""For the initialisation on CPU: it runs once, in milliseconds, and takes XLA 10 s to optimise."""


class LanguageModel(nnx.Module):
    """A Federation-of-Experts, mixture-of-experts or Multi-Head LatentMoE language model on a device mesh."""

    def __init__(self, transformer: Transformer, config: ModelConfig, layout: Layout) -> None:
        self.transformer = transformer
        self.config = config
        self.layout = layout

    @classmethod
    def create(cls, config: ModelConfig, layout: Layout, key: jax.Array) -> Self:
        """Initialise on the mesh; no device ever holds more than its shards.

        Raises:
          ValueError: the layout does not fit the model.
        """
        _check_layout(config, layout)
        abstract = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
        graphdef, abstract_state = nnx.split(abstract)
        specs = param_specs(abstract_state, layout)

        def init(key: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(nnx.state(Transformer(config, nnx.Rngs(key))))

        shardings = [layout.sharding(spec) for spec in specs]
        options = QUICK_COMPILE if layout.mesh.devices.flat[0].platform == "cpu" else None
        leaves = jax.jit(init, out_shardings=shardings, compiler_options=options)(key)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return cls(nnx.merge(graphdef, state), config, layout)

    @classmethod
    def abstract(cls, config: ModelConfig, layout: Layout) -> Self:
        """The model with shapes and shardings in place of arrays: for lowering, counting and restoring."""
        _check_layout(config, layout)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
        leaves = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))
            for leaf, spec in zip(jax.tree.leaves(state), param_specs(state, layout), strict=True)
        ]
        transformer = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return cls(transformer, config, layout)

    def with_layout(self, layout: Layout) -> Self:
        """The same parameters placed for another layout."""
        _check_layout(self.config, layout)
        graphdef, state = nnx.split(self.transformer)
        shardings = [layout.sharding(spec) for spec in param_specs(state, layout)]
        leaves = jax.device_put(jax.tree.leaves(state), shardings)
        transformer = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return type(self)(transformer, self.config, layout)

    def for_inference(self) -> Self:
        """The same model as its tokens are computed fastest; it can neither be trained nor exported.

        Parameters are in the compute dtype, whole on every data shard and each layer's in arrays of its own.
        """
        model = self.with_layout(replace(self.layout, shard_params=False)) if self.layout.gathers_params else self
        graphdef, state = nnx.split(model.transformer.with_separate_layers(model.layout))
        return type(self)(nnx.merge(graphdef, cast_to_use(state)), model.config, model.layout)

    def loss(
        self,
        batch: Batch,
        *,
        load_balance_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        remat: Remat = "none",
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Training loss of a batch: mean cross-entropy in nats plus the weighted auxiliary losses.

        Args:
          batch: arrays [B, T]; B must be a multiple of the layout's token shards.
          load_balance_coef, z_loss_coef: weights of the router losses; with both at 0 no collective is made for them.
          remat: what the backward pass recomputes.

        Returns:
          The scalar loss and metrics: cross_entropy (mean by loss weight; 0 for a batch of padding),
          load_balance_loss, z_loss, tokens_per_expert [L, A] and num_tokens (active tokens).

        Raises:
          ValueError: a router loss for routers that keep the scores of the chosen experts alone.
        """
        self.config.check_router_loss("load_balance_coef", load_balance_coef)
        self.config.check_router_loss("z_loss_coef", z_loss_coef)
        spec, everywhere = self.layout.batch_spec(None), PartitionSpec()
        aux = load_balance_coef > 0 or z_loss_coef > 0
        metric_specs = {
            name: everywhere for name in ("cross_entropy", "load_balance_loss", "z_loss", "num_tokens", "total_weight")
        }
        metric_specs["tokens_per_expert"] = self.layout.group_spec(1)
        fields = _fit_rows({name: jnp.asarray(batch[name]) for name in BATCH_FIELDS}, self.layout)

        def program(transformer: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return _loss_terms_local(transformer, batch, self.layout, remat=remat, aux=aux)

        terms = self._run(program, {name: spec for name in fields}, metric_specs)(fields)
        total_weight = terms.pop("total_weight")
        terms["cross_entropy"] = terms["cross_entropy"] / jnp.where(total_weight > 0, total_weight, 1.0)
        loss = terms["cross_entropy"] + load_balance_coef * terms["load_balance_loss"] + z_loss_coef * terms["z_loss"]
        return loss, terms

    def logits(self, batch: Batch, *, record_routing: bool = False) -> Any:
        """Logits of every token of packed sequences, [B * T, V] in high precision, split over tokens on the mesh.

        Args:
          batch: tokens, positions and segment_ids, [B, T].
          record_routing: also return the RoutingTrace.
        """
        layout = self.layout
        fields = {name: jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")}
        num_tokens = fields["tokens"].size
        fields = _fit_rows(fields, layout)
        trace_spec: Any = layout.routing_spec
        out_specs: Any = PartitionSpec((*layout.token_axes, *layout.slice_axes), None)
        if record_routing:
            out_specs = (out_specs, RoutingTrace(trace_spec, trace_spec, trace_spec))

        def program(transformer: Transformer, batch: dict[str, jax.Array]) -> Any:
            output = _stack_local(transformer, batch, layout, record_routing=record_routing)
            hidden = transformer.hidden_slice_local(output.streams, layout)
            logits = logits_of(hidden, transformer.head_local(layout, whole_vocab=True))
            if output.routing is None:
                return logits
            return logits, jax.tree.map(layout.routing_slice_local, _trace(output.routing))

        outputs = self._run(program, {name: layout.batch_spec(None) for name in fields}, out_specs)(fields)
        if not record_routing:
            return outputs[:num_tokens]
        logits, trace = outputs
        return logits[:num_tokens], jax.tree.map(lambda x: x[:, :, :num_tokens], trace)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] = (),
        key: jax.Array | None = None,
    ) -> list[list[int]]:
        """New token ids for every prompt; see `foejax.decoding.generate`."""
        from foejax.decoding import Sampling, generate

        sampling = Sampling(temperature, top_k, top_p)
        return generate(self, prompts, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, key=key)

    def _run(self, program: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`program(transformer, *args)` as the program of one device, parameters split as the layout says."""
        return run_on_mesh(self.transformer, self.layout, program, in_specs, out_specs)


BATCH_FIELDS = ("tokens", "targets", "positions", "segment_ids", "loss_weights")


def run_on_mesh(
    transformer: Transformer, layout: Layout, program: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A function of one argument that runs `program(local transformer, argument)` under the layout's shard_map."""
    graphdef, state = nnx.split(transformer)
    leaves, treedef = jax.tree.flatten(state)

    def local(leaves: list[jax.Array], argument: Any) -> Any:
        return program(nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)), argument)

    mapped = layout.shard_map(local, in_specs=(param_specs(state, layout), in_specs), out_specs=out_specs)
    return lambda argument: mapped(leaves, argument)


def _fit_rows(batch: dict[str, jax.Array], layout: Layout) -> dict[str, jax.Array]:
    """Append padding rows (segment 0, weight 0) until rows and tokens split evenly over the mesh."""
    rows, length = batch["tokens"].shape
    step = layout.num_token_shards * (layout.num_token_slices // math.gcd(layout.num_token_slices, length))
    pad = -rows % step
    return {name: jnp.pad(value, ((0, pad), (0, 0))) for name, value in batch.items()} if pad else batch


def _stack_local(
    transformer: Transformer,
    batch: dict[str, jax.Array],
    layout: Layout,
    *,
    remat: Remat = "none",
    record_routing: bool = False,
) -> Any:
    batch = {name: layout.vary_local(value) for name, value in batch.items()}
    cache = PackedSequences(batch["positions"], batch["segment_ids"])
    return transformer.run_stack_local(
        batch["tokens"].reshape(-1),
        batch["positions"].reshape(-1),
        cache,
        layout,
        active_tokens=batch["segment_ids"].reshape(-1) != 0,
        remat=remat,
        record_routing=record_routing,
    )


def _loss_terms_local(
    transformer: Transformer, batch: dict[str, jax.Array], layout: Layout, *, remat: Remat, aux: bool
) -> dict[str, jax.Array]:
    """Sums over the whole batch from which the loss is made, the same on every device."""
    config = transformer.config
    output = _stack_local(transformer, batch, layout, remat=remat)
    hidden = transformer.hidden_slice_local(output.streams, layout)
    head = transformer.head_local(layout, whole_vocab=True)
    targets, weights, segments = (
        layout.token_slice_local(layout.vary_local(batch[name].reshape(-1)))
        for name in ("targets", "loss_weights", "segment_ids")
    )
    nats = summed_cross_entropy(hidden, head, targets, weights)
    # One sum of three: a collective of its own for a figure that needs nothing from the layers would race with theirs
    # on CPU (sharding.races).
    sums = jnp.stack([nats, jnp.sum(weights).astype(nats.dtype), jnp.sum(segments != 0).astype(nats.dtype)])
    terms = dict(zip(("cross_entropy", "total_weight", "num_tokens"), layout.sum_over_all_local(sums), strict=True))
    return terms | _router_terms_local(output.stats, terms["num_tokens"], config, layout, aux=aux)


def _router_terms_local(
    stats: RouterStats, num_tokens: jax.Array, config: ModelConfig, layout: Layout, *, aux: bool
) -> dict[str, jax.Array]:
    """Auxiliary losses, averaged over layers and counted once however many groups there are."""
    tokens_LSE = layout.sum_over_tokens_local(jax.lax.stop_gradient(stats.tokens_SE))
    terms = {"tokens_per_expert": tokens_LSE.reshape(config.num_layers, -1)}
    if not aux:
        zero = jnp.zeros((), tokens_LSE.dtype)
        return terms | {"load_balance_loss": zero, "z_loss": zero}
    probability_LSE = layout.sum_over_tokens_local(stats.probability_SE)
    balance_L = load_balance_loss(
        tokens_LSE, probability_LSE, num_tokens=num_tokens, num_experts=config.num_experts, k=config.experts_per_token
    )
    z_L = layout.sum_over_tokens_local(stats.z) / num_tokens
    return terms | {
        "load_balance_loss": layout.sum_over_groups_local(jnp.mean(balance_L)),
        "z_loss": layout.mean_over_groups_local(jnp.mean(z_L)),
    }


def _trace(routing: Routing) -> RoutingTrace:
    return RoutingTrace(routing.indices_SNk, routing.weights_SNk, routing.margin_SN)


def _check_layout(config: ModelConfig, layout: Layout) -> None:
    sizes = layout.sizes
    if layout.exchanges_heads != bool(config.num_ffn_heads) and layout.mesh.size > sizes.data:
        fitting = "use mesh.layout=hp (or fsdp)" if config.num_ffn_heads else "set num_ffn_heads, or use another layout"
        raise ValueError(f"num_ffn_heads={config.num_ffn_heads} does not fit mesh.layout={layout.kind}: {fitting}")
    if layout.exchanges_heads and sizes.expert > 1 and sizes.group != config.num_ffn_heads:
        raise ValueError(
            f"mesh.expert={sizes.expert} splits the experts of a head, and mesh.group={sizes.group} leaves several of "
            f"num_ffn_heads={config.num_ffn_heads} on a device: set mesh.group={config.num_ffn_heads}"
        )
    if layout.splits_heads and config.num_groups > 1:
        raise ValueError(
            f"num_groups={config.num_groups} does not fit mesh.layout={layout.kind}, which splits the heads of one "
            "group: use mesh.layout=foe"
        )
    for axis, field, count in _split_sizes(config, layout):
        size = getattr(sizes, axis)
        if count % size:
            raise ValueError(
                f"{field}={count} is not divisible by mesh.{axis}={size}: choose {field} as a multiple of {size}, or a "
                f"smaller mesh.{axis}"
            )


def _split_sizes(config: ModelConfig, layout: Layout) -> list[tuple[str, str, int]]:
    """Mesh axis, name and size of everything that the layout splits."""
    split = [("data", "hidden_size", config.hidden_size)] if layout.shard_params else []
    if config.num_ffn_heads:
        split += [("data", "ffn_head_dim", config.expert_width)] if layout.shard_params else []
        experts = config.num_experts // config.num_ffn_heads
        return [
            *split,
            ("group", "num_ffn_heads", config.num_ffn_heads),
            ("expert", "num_experts / num_ffn_heads", experts),
        ]
    split.append(("group", "vocab_size", config.vocab_size))
    if layout.splits_heads:
        return [*split, ("group", "num_kv_heads", config.num_kv_heads), ("group", "num_experts", config.num_experts)]
    experts = config.num_experts // config.num_groups
    return [*split, ("group", "num_groups", config.num_groups), ("expert", "num_experts / num_groups", experts)]
