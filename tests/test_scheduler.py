"""The scheduler and its blocks, with devices that are not there: in milliseconds, over random schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
from serving_fakes import END, FakeDevices, continuation

from foejax.serving.blocks import BlockPool, chain_key
from foejax.serving.sampling_params import SamplingParams, SamplingParamsError
from foejax.serving.scheduler import Scheduler, SchedulerLimits
from foejax.serving.sequence import FinishReason, Sequence
from foejax.serving.step_plan import StepPlan

LIMITS = SchedulerLimits(
    num_shards=1, max_sequences=4, num_blocks=32, block_size=4, prefill_shapes=((4, 8), (1, 32)), decode_steps=(1, 4)
)


def make_sequence(number: int, prompt: list[int], max_tokens: int, **fields: object) -> Sequence:
    return Sequence(
        id=number,
        tokens=list(prompt),
        prompt_length=len(prompt),
        last_length=len(prompt) + max_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        stop_tokens=frozenset({END}),
        seed=number,
        **fields,
    )


def run(
    scheduler: Scheduler, watch: Callable[[StepPlan], None] = lambda plan: None, max_plans: int = 10_000
) -> list[StepPlan]:
    """Work until nothing is left to do, and return the plans."""
    devices, plans = FakeDevices(scheduler.limits.block_size), []
    while (plan := scheduler.plan()) is not None:
        assert len(plans) < max_plans, "no end in sight"
        assert StepPlan.from_bytes(plan.to_bytes()) == plan
        check_shapes(plan, scheduler.limits)
        watch(plan)
        scheduler.update(devices.run(plan))
        plans.append(plan)
    return plans


def check_shapes(plan: StepPlan, limits: SchedulerLimits) -> None:
    """The plan fits the few shapes that programs are compiled for."""
    assert len(plan.decode) == len(plan.prefill) == limits.num_shards
    assert plan.decode_steps in limits.decode_steps
    assert all(len(rows) <= limits.max_sequences for rows in plan.decode)
    chunks = [row for rows in plan.prefill for row in rows]
    if chunks:
        rows = max(rows for rows, length in limits.prefill_shapes if length == plan.prefill_length)
        assert all(len(shard) <= rows for shard in plan.prefill)
        assert all(1 <= row.length <= plan.prefill_length for row in chunks)
        assert plan.decode_steps == 1
    for rows in plan.decode:
        assert all(1 <= row.length <= plan.decode_steps and row.samples for row in rows)


def assert_nothing_held(scheduler: Scheduler) -> None:
    assert not scheduler.waiting and not scheduler.running
    for pool, slots in zip(scheduler.pools, scheduler._free_slots, strict=True):
        assert pool.num_free == pool.num_blocks
        assert sorted(slots) == list(range(scheduler.limits.max_sequences))


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[list[int], int, int]]:
    """(prompt, most tokens, plan at which it arrives); many prompts begin alike."""
    start = draw(st.lists(st.integers(0, 49), min_size=12, max_size=12))
    prompts = st.builds(lambda kept, rest: start[:kept] + rest, st.integers(0, 12), st.lists(st.integers(0, 49)))
    one = st.tuples(prompts.filter(bool), st.integers(1, 14), st.integers(0, 20))
    return draw(st.lists(one, min_size=1, max_size=14))


limits = st.builds(
    SchedulerLimits,
    num_shards=st.integers(1, 3),
    max_sequences=st.integers(1, 5),
    num_blocks=st.integers(12, 30),
    block_size=st.integers(2, 5),
    prefill_shapes=st.sampled_from([((2, 4),), ((4, 4), (1, 16)), ((3, 9), (2, 3)), ((5, 2), (1, 2))]),
    decode_steps=st.sampled_from([(1,), (1, 4), (1, 2, 8)]),
    reuse_prefixes=st.booleans(),
)


@hypothesis.given(limits=limits, requests=requests(), aborted=st.dictionaries(st.integers(0, 30), st.integers(0, 13)))
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_any_schedule_gives_what_each_request_alone_would_get(
    limits: SchedulerLimits, requests: list[tuple[list[int], int, int]], aborted: dict[int, int]
) -> None:
    """And leaks no block, frees none twice, and lets the first in line into every step."""
    scheduler, devices, sequences = Scheduler(limits), FakeDevices(limits.block_size), []
    capacity = limits.num_blocks * limits.block_size
    arrivals = sorted((request for request in requests if len(request[0]) + request[1] <= capacity), key=lambda r: r[2])
    now = 0
    while arrivals or scheduler.waiting or scheduler.running:
        while arrivals and arrivals[0][2] <= now:
            prompt, max_tokens, _ = arrivals.pop(0)
            sequences.append(make_sequence(len(sequences), prompt, max_tokens))
            scheduler.add(sequences[-1])
        if aborted.get(now, 99) < len(sequences):
            scheduler.finish(sequences[aborted[now]], FinishReason.ABORT)
        first = min((s for s in sequences if s.finish_reason is None), key=lambda s: s.id, default=None)
        plan = scheduler.plan()
        assert (plan is None) == (first is None)
        if plan is not None:
            check_shapes(plan, limits)
            assert first.slot in {row.slot for row in (*plan.decode[first.shard], *plan.prefill[first.shard])}
            assert StepPlan.from_bytes(plan.to_bytes()) == plan
            scheduler.update(devices.run(plan))
        now += 1
        assert now < 3000, "no end in sight"
    assert_nothing_held(scheduler)
    for sequence in sequences:
        output = sequence.tokens[sequence.prompt_length :]
        expected = continuation(sequence.tokens[: sequence.prompt_length], sequence.params.max_tokens)
        if sequence.finish_reason == FinishReason.ABORT:
            assert output == expected[: len(output)]
        else:
            assert output == expected
            assert sequence.finish_reason == (FinishReason.STOP if END in output else FinishReason.LENGTH)


@hypothesis.given(limits=limits, family=st.integers(2, 5), prompt=st.lists(st.integers(0, 49), min_size=1, max_size=20))
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_continuations_of_one_prompt_share_its_blocks(limits: SchedulerLimits, family: int, prompt: list[int]) -> None:
    scheduler = Scheduler(replace(limits, num_blocks=30))
    parent = make_sequence(0, prompt, 9)
    children = [make_sequence(number, prompt, 9, parent=parent) for number in range(1, family)]
    for sequence in (*children[::-1], parent):
        scheduler.add(sequence)
    run(scheduler)
    assert_nothing_held(scheduler)
    for sequence in (parent, *children):
        assert sequence.tokens[len(prompt) :] == continuation(prompt, 9)


def test_children_wait_for_the_prompt_and_then_hold_its_full_blocks() -> None:
    scheduler = Scheduler(replace(LIMITS, reuse_prefixes=False))
    parent = make_sequence(0, list(range(10, 20)), 9)
    child = make_sequence(1, list(range(10, 20)), 9, parent=parent)
    scheduler.add(parent)
    scheduler.add(child)
    devices = FakeDevices(4)
    scheduler.update(devices.run(scheduler.plan()))
    assert child.slot < 0
    scheduler.plan()
    assert child.blocks[:2] == parent.blocks[:2] and child.blocks[2] != parent.blocks[2]
    assert child.num_cached == 8


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(LIMITS)
    prompt = list(range(10, 23))
    scheduler.add(make_sequence(0, prompt, 3))
    run(scheduler)
    again = make_sequence(1, prompt, 3)
    scheduler.add(again)
    plan = scheduler.plan()
    assert again.num_cached == 12
    assert plan.decode[0][0].start == 12 and not plan.prefill[0]


def test_a_conversation_finds_the_answer_too() -> None:
    scheduler = Scheduler(LIMITS)
    first = make_sequence(0, [1, 2, 3], 10)
    scheduler.add(first)
    run(scheduler)
    following = make_sequence(1, [*first.tokens, 4, 5], 2)
    scheduler.add(following)
    scheduler.plan()
    assert following.num_cached == (len(first.tokens) - 1) // 4 * 4 > 3


def test_outputs_stay_private_where_they_are_computed_otherwise() -> None:
    scheduler = Scheduler(replace(LIMITS, reuse_outputs=False))
    first = make_sequence(0, [1, 2, 3, 4, 5], 10)
    scheduler.add(first)
    run(scheduler)
    following = make_sequence(1, [*first.tokens, 4, 5], 2)
    scheduler.add(following)
    scheduler.plan()
    assert len(first.tokens) > 8 and following.num_cached == 4


def test_whoever_came_last_gives_its_blocks_back() -> None:
    scheduler = Scheduler(replace(LIMITS, num_blocks=8, decode_steps=(1,), reuse_prefixes=False))
    old, young = make_sequence(0, [1] * 12, 20), make_sequence(1, [2] * 14, 17)
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler)
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.tokens[14:] == continuation([2] * 14, 17)


def test_decoding_takes_several_steps_in_a_row_where_nobody_waits() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(make_sequence(0, [1, 2, 3, 4, 5], 10))
    steps = [plan.decode_steps for plan in run(scheduler)]
    assert steps == [1, 4, 4, 1]
    scheduler.add(make_sequence(6, [9] * 5, 8))
    last = run(scheduler)[-1]
    assert (last.decode_steps, last.decode[0][0].length) == (4, 3)
    for number in range(1, 6):
        scheduler.add(make_sequence(number, [number] * 6, 9))
    plans = run(scheduler)
    while_one_waits_for_a_slot = [plan for plan in plans if len(plan.decode[0]) == 4 and plan.decode_steps == 4]
    assert while_one_waits_for_a_slot


def test_nobody_gives_blocks_back_for_steps_in_a_row() -> None:
    """Both have the blocks for the next token, but not for the next four."""
    scheduler = Scheduler(replace(LIMITS, num_blocks=7, reuse_prefixes=False))
    for number in range(2):
        scheduler.add(make_sequence(number, [number + 1] * 10, 5))
    third = run(scheduler)[2]
    assert third.decode_steps == 1 and len(third.decode[0]) == 2


def test_prompt_chunks_and_decoding_share_a_step() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(make_sequence(0, [1, 2, 3], 30))
    devices = FakeDevices(4)
    scheduler.update(devices.run(scheduler.plan()))
    scheduler.add(make_sequence(1, [3] * 50, 2))
    chunks = []
    for _ in range(2):
        plan = scheduler.plan()
        assert len(plan.decode[0]) == 1
        chunks.extend(row.length for row in plan.prefill[0])
        scheduler.update(devices.run(plan))
    assert chunks == [32, 18]


def test_a_long_prompt_takes_the_rows_that_are_left() -> None:
    scheduler = Scheduler(replace(LIMITS, prefill_shapes=((4, 8), (1, 8))))
    for number, length in enumerate((20, 10, 5)):
        scheduler.add(make_sequence(number, [number] * length, 2))
    plan = scheduler.plan()
    assert [(row.slot, row.start, row.length, row.samples) for row in plan.prefill[0]] == [
        (0, 0, 8, False),
        (0, 8, 8, False),
        (0, 16, 4, True),
        (1, 0, 8, False),
    ]


@pytest.mark.parametrize(
    ("prompts", "length"), [([40], 32), ([32, 32], 32), ([8, 8, 8], 8), ([20, 12], 8), ([24, 8], 8), ([5], 32)]
)
def test_a_step_takes_the_rows_that_compute_most_of_the_prompts(prompts: list[int], length: int) -> None:
    scheduler = Scheduler(LIMITS)
    for number, prompt in enumerate(prompts):
        scheduler.add(make_sequence(number, [number] * prompt, 2))
    assert scheduler.plan().prefill_length == length


SHORT_AND_LONG_ROWS = replace(LIMITS, num_blocks=64, prefill_shapes=((1, 32), (2, 32), (16, 8)))


def test_rows_are_chosen_for_what_the_cache_does_not_hold() -> None:
    scheduler, prefix = Scheduler(SHORT_AND_LONG_ROWS), [number % 6 for number in range(60)]
    scheduler.add(make_sequence(0, [*prefix, 9], 1))
    run(scheduler)
    for number in (1, 2):
        scheduler.add(make_sequence(number, [*prefix, number, 8, 8], 2))
    plan = scheduler.plan()
    assert [row.length for row in plan.prefill[0]] == [3, 3] and plan.prefill_length == 32


@pytest.mark.parametrize(("num_blocks", "length"), [(27, 8), (26, 32)])
def test_rows_are_chosen_for_those_who_find_room(num_blocks: int, length: int) -> None:
    """The second prompt needs 25 blocks beside the two of the first."""
    scheduler = Scheduler(replace(SHORT_AND_LONG_ROWS, num_blocks=num_blocks))
    scheduler.add(make_sequence(0, [1] * 5, 2))
    scheduler.add(make_sequence(1, [2] * 98, 2))
    assert scheduler.plan().prefill_length == length


def test_a_deadline_ends_a_sequence_wherever_it_is() -> None:
    scheduler = Scheduler(replace(LIMITS, max_sequences=1))
    running, waiting = (make_sequence(number, [1, 2], 9, deadline=5.0 + number) for number in range(2))
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.plan()
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(6.0) == [waiting, running]
    assert running.finish_reason == waiting.finish_reason == FinishReason.DEADLINE
    assert_nothing_held(scheduler)


def test_a_sequence_that_can_outgrow_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 130 tokens needs 33 cache blocks and there are 32: lower max_tokens"):
        Scheduler(LIMITS).add(make_sequence(0, [1] * 100, 30))


def test_the_least_recently_released_block_is_handed_out_first() -> None:
    pool = BlockPool(3, 2)
    first, second, third = pool.take(3)
    pool.publish(first, chain_key(b"", [1, 2]))
    pool.publish(second, chain_key(chain_key(b"", [1, 2]), [3, 4]))
    pool.release([first, second, third])
    assert pool.find_prefix([1, 2, 3, 4, 5]) == [first, second]
    assert pool.find_prefix([1, 2, 3, 4]) == [first], "the last token is always computed"
    assert pool.take(2) == [third, second]
    assert pool.find_prefix([1, 2, 3, 4, 5]) == [first]
    assert pool.take(2) is None and pool.num_free == 1


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="block 0 is released and has no holder"):
        pool.release(blocks)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens=0 is out of range: choose from 1 to inf"),
        ("temperature", float("nan"), "temperature=nan is out of range"),
        ("top_p", 0.0, "top_p=0.0 is out of range: choose above 0, to 1"),
        ("min_p", 1.5, "min_p=1.5 is out of range"),
        ("n", 1000, "n=1000 is out of range: choose from 1 to 128"),
        ("logprobs", 21, "logprobs=21 is out of range: choose from 0 to 20"),
        ("stop", ("",), "stop=\\('',\\) holds an empty string"),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(SamplingParamsError, match=message) as error:
        SamplingParams(**{field: value})
    assert error.value.field == field
