"""Models on two processes of four devices equal the same models on one device, forward and gradient, in float32."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jax
import pytest
from flax import nnx
from process_runs import run_processes
from sharded_equality import compare
from tiny import config_for, tiny_model

from sharding import LayoutKind

# Every process places its shards of the given parameters; process 0 writes what the model computes.
PROGRAM = """
import json, pickle, sys
import jax, numpy as np
from flax import nnx
from sharded_equality import loss_gradient_logits
from tiny import config_for, layout_for
from foejax.models import LanguageModel
from sharding import hosts
given, found, kind, sizes = sys.argv[1:]
hosts.start()
config = config_for(kind, num_layers=2)
layout = layout_for(kind, config, **json.loads(sizes))
hosts.connect(layout.mesh)
model = LanguageModel.abstract(config, layout)
graphdef, state = nnx.split(model.transformer)
leaves, structure = jax.tree.flatten(state)
with open(given, "rb") as file:
    values = pickle.load(file)
placed = [
    jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, value=value: value[index])
    for leaf, value in zip(leaves, values, strict=True)
]
model = LanguageModel(nnx.merge(graphdef, jax.tree.unflatten(structure, placed)), config, layout)
results, trace = loss_gradient_logits(model)
if jax.process_index() == 0:
    with open(found, "wb") as file:
        pickle.dump((jax.tree.leaves(results), trace), file)
hosts.finish()
"""

LAYOUTS: list[tuple[LayoutKind, dict[str, int]]] = [
    ("foe", {"data": 1, "group": 4, "expert": 2}),
    ("foe", {"data": 1, "group": 8}),
    ("foe", {"data": 2, "group": 4}),
    ("foe", {"data": 2, "group": 2, "expert": 2}),
    ("ep", {"data": 1, "expert": 8}),
    ("ep", {"data": 2, "expert": 4}),
    ("tp", {"data": 1, "group": 8}),
    ("tp", {"data": 2, "group": 4}),
    ("tp_ep", {"data": 1, "group": 8}),
    ("tp_ep", {"data": 2, "group": 4}),
    ("fsdp", {"data": 8}),
    ("hp", {"data": 1, "group": 8}),
]


def case(kind: LayoutKind, sizes: dict[str, int]) -> object:
    """The first one, in which both groups and experts are split, runs every time."""
    name = "-".join([kind, *(f"{axis}{size}" for axis, size in sizes.items())])
    return pytest.param(kind, sizes, id=name, marks=[pytest.mark.slow] * ((kind, sizes) != LAYOUTS[0]))


@pytest.mark.parametrize(("kind", "sizes"), [case(*layout) for layout in LAYOUTS])
def test_two_processes_equal_one_device(kind: LayoutKind, sizes: dict[str, int], tmp_path: Path) -> None:
    config = config_for(kind, num_layers=2)
    given, found = tmp_path / "given", tmp_path / "found"
    given.write_bytes(pickle.dumps(jax.device_get(jax.tree.leaves(nnx.state(tiny_model(config).transformer)))))
    arguments = [str(given), str(found), kind, json.dumps(sizes)]
    for ended in run_processes(PROGRAM, arguments, 2, 4):
        assert ended.code == 0, ended.output
    compare(config, pickle.loads(found.read_bytes()))
