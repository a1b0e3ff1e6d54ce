"""One program, any binding: models on many devices equal the same models on one."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import pytest
from sharded_equality import TOLERANCE, check_equal
from tiny import config_for, layout_for, tiny_config

from sharding import Layout, LayoutKind

IN_EVERY_RUN = {(8, 4, "float64"), (4, 2, "float64"), (2, 4, "float64"), (8, 8, "float32")}
"""Besides each number of groups on eight devices in float64; `make test-slow` runs the rest of the product."""


def binding(groups: int, devices: int, dtype: str) -> Any:
    fast = (groups, devices, dtype) in IN_EVERY_RUN or (devices == 8 and dtype == "float64")
    marks = [pytest.mark.xdist_group(f"{groups} groups"), *([] if fast else [pytest.mark.slow])]
    return pytest.param(groups, devices, dtype, marks=marks)


EVERY_BINDING = [binding(*case) for case in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), TOLERANCE)]


@pytest.mark.parametrize(("groups", "devices", "dtype"), EVERY_BINDING)
def test_foe_sharded_equals_unsharded(groups: int, devices: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        config = tiny_config(num_groups=groups, dtype=dtype, num_layers=2)
        check_equal(config, Layout.create("foe", num_groups=groups, num_devices=devices))


SLOW = pytest.mark.slow
GROUP_SOFTMAX = {"router_score": "softmax", "router_scope": "group"}


@pytest.mark.parametrize(
    ("kind", "sizes", "remat", "dtype"),
    [
        ("ep", {"expert": 8, "data": 1}, "none", "float64"),
        ("ep", {"expert": 8, "data": 1}, "full", "float32"),
        ("ep", {"expert": 4, "data": 2}, "dots", "float64"),
        ("foe", {"group": 4, "data": 2}, "full", "float64"),
        ("foe", {"group": 2, "data": 4}, "dots", "float32"),
        ("foe", {"group": 2, "expert": 2, "data": 2}, "full", "float32"),
        ("tp", {"group": 4, "data": 2}, "full", "float32"),
        ("tp_ep", {"group": 4, "data": 2}, "full", "float32"),
        ("hp", {"group": 8, "data": 1}, "none", "float32"),
        ("hp", {"group": 4, "data": 2}, "full", "float32"),
        pytest.param("ep", {"expert": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("ep", {"expert": 4, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 1, "expert": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 1, "expert": 4, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 2, "expert": 2, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("foe", {"group": 4, "expert": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 2, "expert": 4, "data": 1}, "none", "float64", marks=SLOW),
        pytest.param("tp", {"group": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("tp", {"group": 4, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("tp", {"group": 8, "data": 1}, "none", "float64", marks=SLOW),
        pytest.param("tp_ep", {"group": 2, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("tp_ep", {"group": 4, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("tp_ep", {"group": 8, "data": 1}, "none", "float64", marks=SLOW),
        pytest.param("hp", {"group": 1, "data": 1}, "full", "float32", marks=SLOW),
        pytest.param("hp", {"group": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("hp", {"group": 4, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("hp", {"group": 2, "data": 4}, "none", "float64", marks=SLOW),
    ],
)
def test_layouts_and_remat_policies(kind: LayoutKind, sizes: dict[str, int], remat: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        config = config_for(kind, dtype=dtype, num_layers=2)
        check_equal(config, layout_for(kind, config, **sizes), remat)


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        ("hp", {"group": 4, "expert": 2}, {"num_ffn_heads": 4, "expert_activation": "swiglu"}),
        ("hp", {"group": 4, "data": 2}, GROUP_SOFTMAX | {"experts_per_token": 8}),
        pytest.param("hp", {"group": 4, "data": 2}, {"router_score": "sigmoid"}, marks=SLOW),
        pytest.param("fsdp", {"data": 8}, {}, marks=SLOW),
    ],
)
def test_heads_with_other_experts_and_routers(kind: LayoutKind, sizes: dict[str, int], options: dict[str, Any]) -> None:
    """Also with the experts of each head over two devices, and with all heads on each of eight."""
    config = config_for("hp", num_layers=2, **options)
    check_equal(config, layout_for(kind, config, **sizes))


@pytest.mark.parametrize("options", [{"merge_scale": "sum"}, {"router_score": "sigmoid"}, {"router_scope": "group"}])
def test_options_are_independent_of_the_binding(options: dict[str, str]) -> None:
    config = tiny_config(num_layers=2, embedding_scale=0.5, **options)
    check_equal(config, Layout.create("foe", num_groups=8, num_devices=8))
