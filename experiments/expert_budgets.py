"""What a trained model loses and what it need not read when the tokens of a step share a budget of experts.

Usage:
    python -m experiments.expert_budgets runs/demo --out FOLDER                 # FoE and MoE of `make demo`
    python -m experiments.expert_budgets runs/first --out FOLDER --tokens-per-step 8 32 --rows 128
    python -m experiments.expert_budgets runs/demo --out FOLDER --quick         # the same code in a minute

Each folder is a run, an exported model, or holds several of them. FOLDER receives results.json, report.md, budgets.png.

How quality is measured. Rows of the held-out text stand for sequences that are being decoded at the same time: B rows
make a batch, and column t of it, one token a row, is one decoding step. The budget is chosen anew for every column and
layer from its B tokens alone, by the engine's own code (foejax/serving/expert_budget.py). All columns are computed in
one forward pass; since attention is causal, that is what decoding the text token by token gives, up to the order of
summation. The first quarter of each row is the prompt: computed without a budget, as the engine does, and not
scored. On the rest, every token is computed under the budget and the tokens after it are those of the text, not the
model's own. So the perplexity says how much worse the model predicts, not how far its own writing would drift.

Distinct experts and kept weight are means over the scored columns and the layers. Beside them stands what tokens that
choose at random would read: E[N_a] = N (1 - (1 - k / N)^B).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foejax.cli import report_errors
from foejax.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from foejax.api import LoadedModel
    from foejax.models import LanguageModel
    from foejax.models.router import SelectFn

PROMPT_SHARE = 0.25
"""Of each row, computed without a budget."""
DEVICES = 8
"""Over so many the experts of an MoE are taken to be spread where budgets are per device."""
STEPS_OF_BUDGETS = 8
"""About so many budgets from the fewest to all experts."""


@dataclass(frozen=True)
class Policy:
    """A way to spend a budget.

    Attributes:
      warm_up: choices of every token in each group that stay.
      parts: devices with a budget each, into which every group is split.
    """

    warm_up: int = 0
    parts: int = 1

    def label(self) -> str:
        """For tables and plots."""
        where = f", a budget for each of {self.parts} devices" if self.parts > 1 else ""
        return f"warm-up {self.warm_up}{where}"


@dataclass(frozen=True)
class Point:
    """What one budget did.

    Attributes:
      budget: experts of a layer over all groups.
      nats: mean cross-entropy of the scored tokens.
      nats_over_base, standard_error: above that without a budget, on the same tokens; the error is over rows.
      perplexity_over_base: relative increase.
      distinct: experts read, mean over steps and layers.
      most_on_a_device: of `DEVICES` equal runs of the layer's experts, those read in the fullest; mean likewise.
      kept_mass: weight of the choices over that without a budget.
    """

    budget: int
    nats: float
    nats_over_base: float
    standard_error: float
    perplexity_over_base: float
    distinct: float
    most_on_a_device: float
    kept_mass: float


class Sums(NamedTuple):
    """Of one batch, on the scored columns: nats [B], targets [B], and sums over steps and layers."""

    nats_B: Any
    targets_B: Any
    steps: Any
    distinct: Any
    most_on_a_device: Any
    kept: Any
    base: Any


def main(argv: Sequence[str]) -> int:
    """Measure every model and write the three files."""
    options = parse(argv)
    from experiments import expert_budgets_report as report
    from foejax.api import load
    from foejax.serving.expert_budget import check_scores

    folders = {path.name: path for folder in options.folders for path in model_folders(folder)}
    curves: list[dict[str, Any]] = []
    for name, folder in folders.items():
        loaded = load(folder, devices=1)
        check_scores(loaded.model.config)
        for tokens in options.tokens_per_step:
            batches = list(held_out_batches(loaded, tokens, options.rows))
            for policy in policies(loaded.model, quick=options.quick):
                print(f"{name}, {tokens} tokens a step, {policy.label()}", flush=True)
                points = measure(loaded.model, batches, policy, quick=options.quick)
                curves.append(curve(name, loaded.model, tokens, policy, points))
    command = "python -m experiments.expert_budgets " + " ".join(argv)
    report.write({"command": command, "rows": options.rows, "curves": curves}, options.out)
    print((options.out / "report.md").read_text(encoding="utf-8"))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `--quick` takes 8 rows, 4 tokens a step and two budgets beside all experts.

    Raises:
      ConfigError: numbers that cannot work.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL", help="run or exported folder, or of several")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[8, 32], metavar="B", help="default: 8 32")
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="of held-out text (default: 128)")
    parser.add_argument("--quick", action="store_true", help="shows that it works; its figures are noise")
    options = parser.parse_args(argv)
    if options.quick:
        options.rows, options.tokens_per_step = 8, [4]
    for tokens in options.tokens_per_step:
        if tokens < 1 or options.rows < tokens:
            raise ConfigError(f"--tokens-per-step {tokens}: choose from 1 to --rows {options.rows}")
    return options


def model_folders(folder: Path) -> list[Path]:
    """The folder itself, or the models right inside it.

    Raises:
      ConfigError: there is none.
    """
    found = [path for path in (folder, *sorted(folder.glob("*/"))) if _is_model(path)]
    if not found:
        raise ConfigError(f"{folder} holds no model, and none of its folders does: train one, or give another folder")
    return found[:1] if found[0] == folder else found


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "config.json"))


def held_out_batches(loaded: LoadedModel, tokens: int, rows: int) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches of `tokens` rows from the beginning of the held-out text, so the same text for every size."""
    from foejax.data import open_dataset

    data = loaded.config.data.model_copy(update={"tokenizer": str(loaded.folder / "tokenizer.json")})
    dataset = open_dataset(data, vocab_size=loaded.model.config.vocab_size)
    return dataset.validation_batches(tokens, limit=rows // tokens)


def policies(model: LanguageModel, *, quick: bool) -> list[Policy]:
    """Without and with a warm-up, and for an MoE a budget a device; a warm-up of all choices would change nothing."""
    config = model.config
    found = [Policy()]
    if quick:
        return found
    if config.experts_per_stack > 1:
        found.append(Policy(warm_up=1))
    if config.num_stacks == 1 and config.num_experts % DEVICES == 0:
        found.append(Policy(parts=DEVICES))
    return found


def budgets(num_experts: int, k: int, parts: int, *, quick: bool = False) -> list[int]:
    """From the fewest that serve k choices to all, in multiples of `parts`."""
    step = parts * max(1, round(num_experts / STEPS_OF_BUDGETS / parts))
    found = [budget for budget in range(step, num_experts, step) if budget >= k]
    return [*(found[:2] if quick else found), num_experts]


def measure(
    model: LanguageModel, batches: Sequence[Mapping[str, np.ndarray]], policy: Policy, *, quick: bool = False
) -> list[Point]:
    """A point for every budget, the last one for all experts, against which the others are held.

    Args:
      model: on one device.
      batches: arrays [B, T]; column t of a batch is a step.
    """
    import jax
    import numpy as np
    from flax import nnx

    config = model.config
    parts = config.num_stacks * policy.parts
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, batch, size: batch_sums(nnx.merge(graphdef, state), batch, size, policy))
    found: dict[int, Sums] = {}
    for budget in budgets(config.num_experts, config.experts_per_token, parts, quick=quick):
        sums = [jax.device_get(run(state, batch, np.int32(budget // parts))) for batch in batches]
        rows = [np.concatenate([np.asarray(x[field], np.float64) for x in sums]) for field in range(2)]
        found[budget] = Sums(*rows, *(float(sum(x[field] for x in sums)) for field in range(2, len(Sums._fields))))
    base = found[config.num_experts]
    return [_point(budget, sums, base) for budget, sums in found.items()]


def _point(budget: int, sums: Sums, base: Sums) -> Point:
    import numpy as np

    targets = sums.targets_B.sum()
    more_B = sums.nats_B - base.nats_B
    more = float(more_B.sum() / targets)
    # Of a ratio of sums over rows: the spread of what rows add beyond their share of targets.
    spread = float(np.std(more_B - more * sums.targets_B, ddof=1)) if more_B.size > 1 else math.nan
    return Point(
        budget=budget,
        nats=float(sums.nats_B.sum() / targets),
        nats_over_base=more,
        standard_error=spread * math.sqrt(more_B.size) / float(targets),
        perplexity_over_base=math.expm1(more),
        distinct=sums.distinct / sums.steps,
        most_on_a_device=sums.most_on_a_device / sums.steps,
        kept_mass=sums.kept / sums.base,
    )


def batch_sums(model: LanguageModel, batch: Mapping[str, Any], part_size: Any, policy: Policy) -> Sums:
    """Run a batch with a budget of `part_size` experts in every part, chosen for each column (traceable)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from foejax.models.cache import PackedSequences
    from foejax.models.language_model import run_on_mesh
    from foejax.models.transformer import Transformer, logits_of

    layout, (rows, length) = model.layout, batch["tokens"].shape
    prompt = math.ceil(PROMPT_SHARE * length)
    fields = {name: jnp.asarray(batch[name]) for name in ("tokens", "targets", "positions", "segment_ids")}
    weights_BT = jnp.asarray(batch["loss_weights"]) > 0

    def program(transformer: Transformer, inputs: tuple[dict[str, jax.Array], jax.Array]) -> Any:
        fields, part_size = jax.tree.map(layout.vary_local, inputs)
        output = transformer.run_stack_local(
            fields["tokens"].reshape(-1),
            fields["positions"].reshape(-1),
            PackedSequences(fields["positions"], fields["segment_ids"]),
            layout,
            active_tokens=fields["segment_ids"].reshape(-1) != 0,
            record_routing=True,
            select_fn=_select_by_column(rows, prompt, part_size, policy),
        )
        hidden_ND = transformer.hidden_rows_local(output.streams, jnp.arange(rows * length, dtype=jnp.int32), layout)
        logprobs_NV = jax.nn.log_softmax(logits_of(hidden_ND, transformer.head_local(layout, whole_vocab=True)))
        own_N1 = jnp.take_along_axis(logprobs_NV, fields["targets"].reshape(-1, 1), axis=1)
        return jax.tree.map(layout.max_over_all_local, (-own_N1.reshape(rows, length), output.routing))

    spec = PartitionSpec()
    nats_BT, routing = run_on_mesh(model.transformer, layout, program, spec, spec)((fields, part_size))
    scored_BT = weights_BT & (jnp.arange(length, dtype=jnp.int32) >= prompt)[None]
    reads_LTHE = _reads(routing.indices_SNk, routing.valid_SNk, rows, model.config)[:, prompt:]
    by_device = reads_LTHE.reshape(*reads_LTHE.shape[:2], min(DEVICES, model.config.num_experts), -1)
    free_LST = routing.unrestricted_SN.reshape(*routing.unrestricted_SN.shape[:2], rows, length)
    kept_LST = routing.weights_SNk.sum(-1).reshape(free_LST.shape)
    return Sums(
        jnp.where(scored_BT, nats_BT, 0.0).sum(1),
        scored_BT.sum(1, dtype=jnp.int32),
        jnp.any(reads_LTHE, axis=(-2, -1)).sum(dtype=jnp.int32),
        reads_LTHE.sum(dtype=jnp.int32),
        by_device.sum(-1, dtype=jnp.int32).max(-1).sum(dtype=jnp.int32),
        kept_LST[..., prompt:].sum(),
        free_LST[..., prompt:].sum(),
    )


def _select_by_column(rows: int, prompt: int, part_size: Any, policy: Policy) -> SelectFn:
    """The engine's choice for every column of [B, T] tokens by itself; the prompt's columns keep all experts."""
    import jax
    import jax.numpy as jnp

    from foejax.serving.expert_budget import choose_experts

    def select(scores_SNE: jax.Array, active_N: jax.Array) -> jax.Array:
        groups, tokens, experts = scores_SNE.shape
        length = tokens // rows
        # Columns beside the groups: [S * T, B, E].
        columns = scores_SNE.reshape(groups, rows, length, experts).swapaxes(1, 2).reshape(-1, rows, experts)
        active = jnp.tile(active_N.reshape(rows, length).T, (groups, 1))
        kept = choose_experts(columns, active, part_size, warm_up=policy.warm_up, parts=policy.parts)
        kept_STE = kept.reshape(groups, length, experts)
        kept_STE |= (jnp.arange(length, dtype=jnp.int32) < prompt)[None, :, None]
        kept_SBTE = jnp.broadcast_to(kept_STE[:, None], (groups, rows, length, experts))
        return jnp.where(kept_SBTE.reshape(scores_SNE.shape), scores_SNE, -jnp.inf)

    return select


def _reads(indices_LSNk: Any, valid_LSNk: Any, rows: int, config: Any) -> Any:
    """Whether each expert of each group was read in a layer and column: bool [L, T, H, E]."""
    import jax.numpy as jnp

    layers, groups, tokens, k = indices_LSNk.shape
    length, experts = tokens // rows, config.num_experts // groups
    # One place beyond the last expert takes the choices that do not count.
    expert = jnp.where(valid_LSNk, indices_LSNk, experts).reshape(layers, groups, rows, length, k)
    layer, group, column = jnp.ogrid[:layers, :groups, :length]
    at = (layer[:, :, None, :, None], column[:, :, None, :, None], group[:, :, None, :, None], expert)
    return jnp.zeros((layers, length, groups, experts + 1), bool).at[at].set(True)[..., :experts]


def curve(name: str, model: LanguageModel, tokens: int, policy: Policy, points: Sequence[Point]) -> dict[str, Any]:
    """All that is known of one line of the plot."""
    from foejax.serving.expert_budget import expected_distinct_experts

    config = model.config
    return {
        "model": name,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "num_groups": config.num_groups,
        "tokens_per_step": tokens,
        "warm_up": policy.warm_up,
        "devices_with_a_budget": config.num_stacks * policy.parts,
        "label": policy.label(),
        "expected_distinct_at_random": expected_distinct_experts(config.num_experts, config.experts_per_token, tokens),
        "points": [asdict(point) for point in points],
    }


if __name__ == "__main__":
    raise SystemExit(report_errors(lambda: main(sys.argv[1:])))
