"""Collectives that may run beside a loop of collectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from foejax.analysis.comms import lower_train_step
from foejax.config import load_config
from foejax.training.run import make_layout
from sharding.races import Race, find_races

PROGRAM = """HloModule program, is_scheduled=true, num_partitions=2

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %joined = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %step = s32[] get-tuple-element(%carry), index=0
  %value = f32[4]{0} get-tuple-element(%carry), index=1
  %called = f32[4]{0} call(%value), to_apply=%inner
  ROOT %next = (s32[], f32[4]{0}) tuple(%step, %called)
}

%condition (carry.1: (s32[], f32[4])) -> pred[] {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[4], q: f32[4]) -> (f32[4], f32[4]) {
  %p = f32[4]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %before = f32[4]{0} all-reduce(%q), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %start = (s32[], f32[4]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  %result = f32[4]{0} get-tuple-element(%loop), index=1
  %doubled = f32[4]{0} add(%result, %result)
  %mixed = f32[4]{0} add(%result, %before)
  %behind = f32[4]{0} all-reduce(%OPERAND), channel_id=1, replica_groups=%GROUPS, metadata={op_name="jit(f)/psum"}
  ROOT %out = (f32[4]{0}, f32[4]{0}) tuple(%doubled, %behind)
}
"""


def races_behind_the_loop(operand: str, groups: str = "{{0,1}}") -> list[Race]:
    text = PROGRAM.replace("%OPERAND", f"%{operand}").replace("%GROUPS", groups)
    return find_races(text.replace("channel_id=1,", "channel_id=1, use_global_device_ids=true,"))


@pytest.mark.parametrize(
    ("operand", "races"), [("q", 1), ("before", 1), ("doubled", 0), ("mixed", 0)], ids=lambda value: str(value)
)
def test_a_collective_behind_a_loop_must_need_its_result(operand: str, races: int) -> None:
    found = races_behind_the_loop(operand)
    assert [(race.loop, race.collective, race.op_name) for race in found] == [("loop", "behind", "jit(f)/psum")] * races


def test_a_collective_of_one_device_waits_for_nobody() -> None:
    assert not races_behind_the_loop("q", groups="{{0},{1}}")


def test_two_loops_of_collectives_race() -> None:
    mesh = jax.make_mesh((4,), ("group",), axis_types=(AxisType.Auto,))

    def chain(x: jax.Array) -> jax.Array:
        def add_up(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = jax.lax.psum(jnp.sin(x), "group")
            return jax.lax.pcast(total, "group", to="varying"), None

        return jax.lax.scan(add_up, x, length=5)[0]

    def races(function: object) -> int:
        spec = PartitionSpec("group")
        program = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))
        return len(find_races(program.lower(np.ones(64, np.float32)).compile().as_text()))

    assert races(lambda x: chain(chain(x))) == 0
    assert races(lambda x: chain(x) + chain(x + 1)) == 1


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("foe_tiny", {}),
        ("moe_tiny", {}),
        pytest.param("foe_tiny", {"mesh.group": 4, "mesh.data": 2, "training.remat": "full"}, marks=SLOW),
        pytest.param("foe_tiny", {"training.gradient_accumulation": 2}, marks=SLOW),
        pytest.param("moe_tiny", {"mesh.expert": 4, "mesh.data": 2, "training.remat": "dots"}, marks=SLOW),
        pytest.param("foe_tiny", {"mesh.group": 4, "mesh.expert": 2}, marks=SLOW),
        pytest.param("moe_tiny", {"mesh.layout": "tp"}, marks=SLOW),
        pytest.param("moe_tiny", {"mesh.layout": "tp_ep", "mesh.data": 2, "training.remat": "dots"}, marks=SLOW),
        pytest.param("moe_tiny", {"mesh.layout": "fsdp", "training.router_bias_rate": 0.001}, marks=SLOW),
    ],
    ids=str,
)
def test_training_steps_have_no_race(config: str, overrides: dict[str, object]) -> None:
    run = load_config(config, {"model.num_layers": 3} | overrides)
    lowered = lower_train_step(run, make_layout(run.model, run.mesh))
    assert not find_races(lowered.compile().as_text())
