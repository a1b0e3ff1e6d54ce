"""What arXiv 2605.06206 measured with its 7B models on hosts of 8 H100, and what its own engine must have reached."""

from __future__ import annotations

from typing import NamedTuple

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.matched import Candidate
from foejax.analysis.cost_model.step import prefill_step

FORWARD_SECONDS = {
    1: (0.06106, 0.05849),
    2: (0.06646, 0.06644),
    8: (0.06878, 0.07161),
    128: (0.06886, 0.06831),
    512: (0.07545, 0.07782),
    1024: (0.07485, 0.08095),
    2048: (0.08855, 0.06826),
    4096: (0.16541, 0.07569),
    8192: (0.46442, 0.12948),
    12288: (0.97771, 0.21813),
    16384: (1.64213, 0.33635),
    20480: (2.49477, 0.48566),
    24576: (3.48559, 0.66934),
}
"""Table 9: seconds of a forward pass of so many prompt tokens, MoE and FoE. How the tokens fall into sequences and how
many hosts there were is not said."""


class Latency(NamedTuple):
    """Mean seconds of the requests of a run: to the first token, between tokens, to the last one."""

    ttft: float
    tbt: float
    e2e: float


SERVING = {
    (1, 0.5): (Latency(3.710, 0.780, 202.7), Latency(1.394, 0.566, 145.7)),
    (1, 0.75): (Latency(3.233, 0.841, 217.7), Latency(1.041, 0.458, 117.9)),
    (1, 1.5): (Latency(2.264, 0.371, 96.9), Latency(0.790, 0.334, 86.0)),
    (2, 0.5): (Latency(3.883, 0.736, 191.5), Latency(1.128, 0.543, 139.5)),
    (2, 0.75): (Latency(3.403, 0.876, 226.7), Latency(0.939, 0.449, 115.4)),
}
"""Tables 5 and 6: by number of hosts and mean seconds between arrivals, MoE and FoE. Prompts have about 9,000 tokens,
outputs 256; the number of requests and the engine's limits are not said."""

PROMPT_TOKENS, OUTPUT_TOKENS = 9000, 256


def fit_paper_engine(cluster: Cluster, moe: Candidate) -> Cluster:
    """The cluster with the two figures that make the paper's MoE come out at its smallest and largest batch.

    `layer_floor` is the time of a single token over the layers; `attention_fraction` makes one prompt of the largest
    batch take what Table 9 says. All other cells of the table, and all of FoE's, are predictions then.

    Args:
      moe: the MoE with expert parallelism, whose one prompt is attended to on one device.
    """
    fewest, most = min(FORWARD_SECONDS), max(FORWARD_SECONDS)
    floored = cluster.model_copy(update={"layer_floor": FORWARD_SECONDS[fewest][0] / moe.model.num_layers})
    shards = moe.layout.num_token_shards

    def seconds(fraction: float) -> float:
        tried = floored.model_copy(update={"attention_fraction": fraction})
        return moe.predict(prefill_step(most, shards), tried).seconds

    low, high = 1e-4, 1.0
    for _ in range(40):  # the time falls with the fraction
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) > FORWARD_SECONDS[most][0] else (low, middle)
    return floored.model_copy(update={"attention_fraction": high})
