"""Which sequences the next step works on: first come, first served.

Plain Python, without devices. In every step the running sequences decode one token each, and chunks of prompts are
computed beside them. Where blocks run out, the sequence that came last gives its own back and computes them again
later. So the first one always advances, and every one is the first some time.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from foejax.serving.blocks import BlockPool, chain_key
from foejax.serving.sequence import FinishReason, Sequence
from foejax.serving.step_plan import Row, SlotLoad, StepPlan


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes of the engine, each for one shard.

    Attributes:
      num_shards: parts of the devices that hold sequences of their own.
      max_sequences: slots, so sequences that run at the same time.
      num_blocks: blocks of the cache.
      block_size: tokens of a block.
      prefill_shapes: (rows, tokens a row) of the prompt chunks of a step, of which one is taken; a long chunk is
        several rows.
      decode_steps: how many steps in a row decoding may take where nobody waits, ascending from 1.
      reuse_prefixes: let sequences that begin alike share blocks.
      reuse_outputs: blocks with generated tokens too; not where decoding computes other keys and values than a prompt
        would, as under an expert budget.
    """

    num_shards: int
    max_sequences: int
    num_blocks: int
    block_size: int
    prefill_shapes: tuple[tuple[int, int], ...]
    decode_steps: tuple[int, ...] = (1,)
    reuse_prefixes: bool = True
    reuse_outputs: bool = True


@dataclass
class StepTokens:
    """What a step sampled, in the order of the plan's rows.

    Attributes:
      decode: of every shard and row, a token for each step that the row took part in.
      prefill: of every shard and row, the token after the chunk; without meaning where the row does not sample.
    """

    decode: list[list[list[int]]]
    prefill: list[list[int]]


@dataclass
class _Draft:
    """A plan in the making."""

    decode: list[list[tuple[Sequence, Row]]]
    prefill: list[list[tuple[Sequence, Row]]]
    loads: list[SlotLoad] = field(default_factory=list)
    prefill_length: int = 0


class Scheduler:
    """Queues of waiting and running sequences, both in order of arrival, and the blocks that they hold.

    Attributes:
      num_preemptions: sequences that gave their blocks back.
      num_prompt_tokens: tokens of the prompts that were admitted, each continuation of a prompt counted.
      num_prefix_tokens: those of them that the cache held already.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pools = [
            BlockPool(limits.num_blocks, limits.block_size, reuse_prefixes=limits.reuse_prefixes)
            for _ in range(limits.num_shards)
        ]
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._free_slots = [list(range(limits.max_sequences))[::-1] for _ in range(limits.num_shards)]
        self._row_counts: dict[int, list[int]] = {}
        for rows, length in sorted(limits.prefill_shapes):
            self._row_counts.setdefault(length, []).append(rows)
        self._most_rows = {length: rows[-1] for length, rows in self._row_counts.items()}
        self._draft = self._new_draft()
        self._num_plans = 0
        self.num_preemptions = self.num_prompt_tokens = self.num_prefix_tokens = 0

    @property
    def held_share(self) -> float:
        """Share of the cache's blocks that sequences hold, 0 to 1."""
        return 1 - sum(pool.num_free for pool in self.pools) / (self.limits.num_blocks * self.limits.num_shards)

    def check(self, last_length: int) -> None:
        """Refuse what no step could carry out; from any thread.

        Raises:
          ValueError: a sequence that may grow to `last_length` tokens can outgrow the cache.
        """
        needed, there = self.pools[0].blocks_for(last_length), self.limits.num_blocks
        if needed > there:
            raise ValueError(
                f"a sequence of up to {last_length} tokens needs {needed} cache blocks and there are {there}: "
                "lower max_tokens, shorten the prompt or give the cache more memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; see `check`."""
        self.check(sequence.last_length)
        bisect.insort(self.waiting, sequence, key=_arrival)

    def planned_sequences(self) -> tuple[list[list[Sequence]], list[list[Sequence]]]:
        """Whose the decode and the prompt rows of the last plan are."""
        decode, prefill = (
            [[sequence for sequence, _ in rows] for rows in shards]
            for shards in (self._draft.decode, self._draft.prefill)
        )
        return decode, prefill

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, waiting or running, and take back what it holds; a finished one stays as it is."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._stop_running(sequence)

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline has passed, and return them."""
        late = [s for s in (*self.waiting, *self.running) if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self.finish(sequence, FinishReason.DEADLINE)
        return late

    def plan(self) -> StepPlan | None:
        """The next step, or None where nothing is left to do. Follow it by `update`."""
        self._draft = draft = self._new_draft()
        steps = self._num_decode_steps()
        # Whoever has to make room came later than the sequence at hand, so it has no row yet.
        for sequence in list(self.running):
            if sequence.slot >= 0:
                self._plan_running(sequence, steps)
        if steps == 1:
            self._admit()
        if not any(draft.decode) and not any(draft.prefill):
            return None
        self._num_plans += 1
        return StepPlan(
            number=self._num_plans,
            loads=tuple(draft.loads),
            decode=tuple(tuple(row for _, row in rows) for rows in draft.decode),
            prefill=tuple(tuple(row for _, row in rows) for rows in draft.prefill),
            prefill_length=draft.prefill_length,
            decode_steps=steps,
            logprobs=any(
                sequence.params.logprobs is not None
                for rows in (*draft.decode, *draft.prefill)
                for sequence, row in rows
                if row.samples
            ),
        )

    def update(self, tokens: StepTokens) -> list[tuple[Sequence, list[int]]]:
        """Record what the last plan's step computed; the sequences that grew, with their new tokens.

        Those that end now are finished, those finished since the plan are left out.
        """
        draft, self._draft = self._draft, self._new_draft()
        grown: list[tuple[Sequence, list[int]]] = []
        for rows, sampled in zip(draft.decode, tokens.decode, strict=True):
            for (sequence, _), new in zip(rows, sampled, strict=True):
                if sequence.finish_reason is None:
                    kept = sequence.until_its_end(new)
                    self._advance(sequence, len(kept), kept)
                    grown.append((sequence, kept))
        for rows, last in zip(draft.prefill, tokens.prefill, strict=True):
            for (sequence, row), token in zip(rows, last, strict=True):
                if sequence.finish_reason is None:
                    self._advance(sequence, row.length, [token] if row.samples else [])
                    if row.samples:
                        grown.append((sequence, [token]))
        return grown

    def _new_draft(self) -> _Draft:
        shards = range(self.limits.num_shards)
        return _Draft([[] for _ in shards], [[] for _ in shards])

    def _num_decode_steps(self) -> int:
        """Steps in a row: several where no prompt can be computed and no block has to be taken back for them.

        More than half of them are taken by some sequence; the rest, without tokens for attention and experts, costs
        less than further launches.
        """
        somebody_waits = self.waiting and any(self._free_slots)
        if not self.running or somebody_waits or any(s.num_uncomputed > 1 for s in self.running):
            return 1
        longest = max(sequence.num_left for sequence in self.running)
        for steps in reversed(self.limits.decode_steps):
            if steps == 1 or (steps < 2 * longest and self._blocks_suffice(steps)):
                return steps
        return 1

    def _blocks_suffice(self, steps: int) -> bool:
        needed = [0] * self.limits.num_shards
        for sequence in self.running:
            length = sequence.num_computed + min(steps, sequence.num_left)
            needed[sequence.shard] += self.pools[sequence.shard].blocks_for(length) - len(sequence.blocks)
        return all(count <= pool.num_free for count, pool in zip(needed, self.pools, strict=True))

    def _plan_running(self, sequence: Sequence, steps: int) -> None:
        if sequence.num_uncomputed == 1:
            self._plan_decode(sequence, min(steps, sequence.num_left))
        elif self._prefill_has_room(sequence):
            self._plan_chunk(sequence)

    def _plan_decode(self, sequence: Sequence, length: int) -> None:
        start = sequence.num_computed
        if self._ensure_blocks(sequence, start + length):
            row = Row(sequence.slot, start, length, tuple(sequence.blocks), samples=True)
            self._draft.decode[sequence.shard].append((sequence, row))

    def _plan_chunk(self, sequence: Sequence) -> None:
        """As much of a prompt as the rows that are left take."""
        rows, length = self._draft.prefill[sequence.shard], self._draft.prefill_length
        first, last = sequence.num_computed, len(sequence.tokens)
        end = min(last, first + length * (self._most_rows[length] - len(rows)))
        if self._ensure_blocks(sequence, end):
            blocks = tuple(sequence.blocks)
            for start in range(first, end, length):
                stop = min(start + length, end)
                rows.append((sequence, Row(sequence.slot, start, stop - start, blocks, samples=stop == last)))

    def _prefill_has_room(self, sequence: Sequence) -> bool:
        """Whether its shard takes another chunk; the first one of a step decides on the shape."""
        draft = self._draft
        draft.prefill_length = draft.prefill_length or self._choose_prefill_length()
        return len(draft.prefill[sequence.shard]) < self._most_rows[draft.prefill_length]

    def _choose_prefill_length(self) -> int:
        """Tokens of a row with which the step computes most of the prompts, then with least padding, then the larger.

        An estimate: it takes the shards' rows as one pool.
        """
        if len(self._most_rows) == 1:
            return next(iter(self._most_rows))
        prompts, shards = self._prompts_at_hand(), self.limits.num_shards

        def merits(length: int) -> tuple[int, int, int]:
            free, total = self._most_rows[length] * shards, 0
            for prompt in prompts:
                rows = min(-(-prompt // length), free)
                free, total = free - rows, total + min(prompt, rows * length)
            used = -(-(self._most_rows[length] * shards - free) // shards)
            padded = next(rows for rows in self._row_counts[length] if rows >= used) * length
            return total, -padded, length

        return max(self._most_rows, key=merits)

    def _prompts_at_hand(self) -> list[int]:
        """Uncomputed tokens of the prompts that run or could be admitted, as many as fill a step."""
        running = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        prompts = [sequence.num_uncomputed for sequence in running]
        shards = [shard for shard, slots in enumerate(self._free_slots) if slots]
        num_slots = sum(map(len, self._free_slots))
        blocks_for = self.pools[0].blocks_for
        num_blocks = sum(pool.num_free for pool in self.pools)
        num_blocks -= sum(blocks_for(len(sequence.tokens)) - len(sequence.blocks) for sequence in running)
        most_tokens = self.limits.num_shards * max(rows * length for rows, length in self.limits.prefill_shapes)
        for sequence in self.waiting:
            if num_slots == 0 or sum(prompts) >= most_tokens:
                break
            if _awaits_parent(sequence):
                continue
            known = max(len(self._known_prefix(sequence, shard)) for shard in shards)
            num_slots -= 1
            num_blocks -= blocks_for(len(sequence.tokens)) - known
            if num_blocks < 0:
                break
            prompts.append(sequence.num_uncomputed - known * self.limits.block_size)
        return prompts

    def _admit(self) -> None:
        """Let waiting sequences enter free slots, in order; one that has to wait holds up those behind it."""
        for sequence in list(self.waiting):
            if _awaits_parent(sequence):
                continue
            if not self._enter_slot(sequence):
                return

    def _enter_slot(self, sequence: Sequence) -> bool:
        """Place a sequence and plan its first row; False, and nothing done, where there is no room."""
        shards = [shard for shard, slots in enumerate(self._free_slots) if slots]
        if self._draft.prefill_length:
            most = self._most_rows[self._draft.prefill_length]
            shards = [shard for shard in shards if len(self._draft.prefill[shard]) < most]
        if not shards:
            return False
        prefixes = {shard: self._known_prefix(sequence, shard) for shard in shards}
        shard = min(shards, key=lambda shard: self._cost(len(prefixes[shard]), shard))
        pool, prefix = self.pools[shard], prefixes[shard]
        pool.hold(prefix)
        if pool.blocks_for(len(sequence.tokens)) - len(prefix) > pool.num_free:
            pool.release(prefix)
            return False
        self.waiting.remove(sequence)
        sequence.shard, sequence.slot = shard, self._free_slots[shard].pop()
        sequence.blocks, sequence.num_computed = prefix, len(prefix) * pool.block_size
        sequence.num_cached = sequence.num_computed
        if not sequence.num_preemptions:
            self.num_prompt_tokens += sequence.prompt_length
            self.num_prefix_tokens += sequence.num_cached
        self._extend_keys(sequence)
        bisect.insort(self.running, sequence, key=_arrival)
        self._draft.loads.append(_load(sequence))
        if sequence.num_uncomputed == 1:
            self._plan_decode(sequence, 1)
        elif self._prefill_has_room(sequence):
            self._plan_chunk(sequence)
        return True

    def _cost(self, num_known: int, shard: int) -> tuple[int, int, int]:
        """Smaller is the better shard: not crowded, then with more of the prompt known, then with fewer sequences."""
        free = [len(slots) for slots in self._free_slots]
        crowded = max(free) - free[shard] > self.limits.max_sequences // 4
        return int(crowded), -num_known, -free[shard]

    def _known_prefix(self, sequence: Sequence, shard: int) -> list[int]:
        """Blocks of that shard that hold the beginning of the sequence: its parent's, or anybody's."""
        pool, parent = self.pools[shard], sequence.parent
        found = pool.find_prefix(sequence.tokens)
        if parent is None or parent.slot < 0 or parent.shard != shard:
            return found
        shared = parent.blocks[: (sequence.prompt_length - 1) // pool.block_size]
        return shared if len(shared) > len(found) else found

    def _ensure_blocks(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it blocks for so many tokens, if need be from those that came last; False if that is itself."""
        pool = self.pools[sequence.shard]
        needed = max(pool.blocks_for(num_tokens) - len(sequence.blocks), 0)
        while (taken := pool.take(needed)) is None:
            victim = max((s for s in self.running if s.shard == sequence.shard), key=_arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(taken)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, sequence, key=_arrival)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pools[sequence.shard].release(sequence.blocks)
        self._free_slots[sequence.shard].append(sequence.slot)
        sequence.slot, sequence.num_computed = -1, 0
        sequence.blocks, sequence.keys = [], []

    def _advance(self, sequence: Sequence, num_computed: int, new_tokens: list[int]) -> None:
        sequence.num_computed += num_computed
        sequence.tokens.extend(new_tokens)
        self._extend_keys(sequence)
        if new_tokens and new_tokens[-1] in sequence.stop_tokens:
            self.finish(sequence, FinishReason.STOP)
        elif sequence.num_left == 0:
            self.finish(sequence, FinishReason.LENGTH)

    def _extend_keys(self, sequence: Sequence) -> None:
        """Let others find the blocks that have become full."""
        pool = self.pools[sequence.shard]
        size = pool.block_size
        for index in range(len(sequence.keys), sequence.num_computed // size):
            parent = sequence.keys[-1] if sequence.keys else b""
            key = chain_key(parent, sequence.tokens[index * size : (index + 1) * size])
            if self.limits.reuse_outputs or (index + 1) * size <= sequence.prompt_length:
                pool.publish(sequence.blocks[index], key)
            sequence.keys.append(key)


def _arrival(sequence: Sequence) -> int:
    return sequence.id


def _awaits_parent(sequence: Sequence) -> bool:
    """Whether the first continuation of its prompt is still computing what this one will share."""
    parent = sequence.parent
    return parent is not None and parent.finish_reason is None and parent.num_computed < parent.prompt_length


def _load(sequence: Sequence) -> SlotLoad:
    params = sequence.params
    return SlotLoad(
        shard=sequence.shard,
        slot=sequence.slot,
        tokens=tuple(sequence.tokens),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=sequence.seed,
    )
