"""Made-up runs of two hosts, whose times follow from known rates."""

from __future__ import annotations

from typing import Any

import numpy as np

from foejax.analysis.calibration import Calibration, measurement_of
from foejax.analysis.cost_model.step import forward_step
from foejax.analysis.cost_model.work import layer_parts
from foejax.analysis.expected_collectives import expected_collectives
from foejax.config import load_config
from sharding import Layout
from sharding.mesh import LayoutKind, MeshSizes

WEIGHTS = {
    "flops: forward": 3e-11,
    "flops: decode_step": 5e-11,
    "step": 0.004,
    "collectives": 0.002,
    "bytes sent": 2e-9,
    "wire: all-reduces": 1.1,
    "wire: gathers and scatters": 1.3,
    "wire: all-to-alls": 1.9,
}
RATES = (50, 100, 200, 500, 1000, None)
LAYOUTS: list[tuple[str, LayoutKind, MeshSizes]] = [
    ("foe_tiny", "foe", MeshSizes(1, 8, 1)),
    ("foe_tiny", "foe", MeshSizes(2, 4, 1)),
    ("moe_tiny", "ep", MeshSizes(1, 1, 8)),
    ("moe_tiny", "ep", MeshSizes(2, 1, 4)),
    ("moe_tiny", "tp", MeshSizes(1, 8, 1)),
    ("moe_tiny", "tp_ep", MeshSizes(1, 8, 1)),
]


def make_runs(noise: float = 0.0, overlap: float = 0.0) -> list[dict[str, Any]]:
    """Two programs of every layout at every rate, as in `two_hosts.json`.

    Args:
      noise: standard deviation of the times, relative.
    """
    truth, random = Calibration(WEIGHTS, overlap, 0), np.random.default_rng(0)
    runs = []
    for config, kind, sizes in LAYOUTS:
        model, layout = load_config(config).model, Layout.abstract(kind, sizes)
        for program, length in (("decode_step", 64), ("forward", 256)):
            step = forward_step(16, length, layout.num_token_shards)
            rows = expected_collectives(model, layout, step.device_tokens)
            rows = [row for row in rows if row.get("branch", 0) == 0]
            flops = model.num_layers * sum(part.flops for part in layer_parts(model, layout, step))
            run = {"name": f"{kind} {sizes}", "kind": kind, "mesh": sizes._asdict(), "program": program}
            run |= {"flops": flops, "collectives": rows, "seconds": 1.0, "tokens": 16 * length}
            for rate in RATES:
                run["rate_mbit"] = rate
                at_8 = measurement_of(run | {"rate_mbit": 8}).terms  # a second takes a megabyte
                crossing = sum(value for name, value in at_8.items() if "wire" in name)
                exact = truth.predict(measurement_of(run))
                seconds = exact * (1 + noise * random.standard_normal())
                sent = {"host0": crossing * 1e6, "host1": crossing * 1e6}
                runs.append(
                    run
                    | {
                        "seconds": seconds,
                        "audited_egress_bytes": sent,
                        "egress_bytes": sent,
                        "audited_bounds": [max(sent.values())] * 2,
                    }
                )
    return runs
