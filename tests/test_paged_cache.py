"""Attention over blocks against plain attention over each sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foejax.serving.paged_cache import PagedCache, Section
from pallas_kernels.paged_attention import api, xla

LAYERS, BLOCKS, SIZE, GROUPS, KV_HEADS, QUERIES, HEAD = 2, 20, 4, 2, 2, 4, 8
DECODE, PREFILL = [(13, 1), (0, 1), None, (4, 1)], [(0, 6), (9, 3)]
"""(first position, tokens) of each row; None is padding."""


TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 2e-2}


def softmax_attention(q_TQK: np.ndarray, k_CK: np.ndarray, v_CK: np.ndarray, first: int) -> np.ndarray:
    """One key/value head in float64; token t sees positions up to first + t."""
    logits = np.einsum("tqk,ck->tqc", q_TQK, k_CK) * HEAD**-0.5
    seen = np.arange(len(k_CK))[None] <= first + np.arange(len(q_TQK))[:, None]
    logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("tqc,ck->tqk", weights / weights.sum(-1, keepdims=True), v_CK)


def make_sections(random: np.random.Generator) -> tuple[tuple[Section, ...], list[tuple[int, int, int, np.ndarray]]]:
    """Sections with random distinct blocks, and (first flat token, first position, tokens, blocks) of every row."""
    free = list(random.permutation(BLOCKS))
    sections, rows, flat = [], [], 0
    for section, length in ((DECODE, 1), (PREFILL, 7)):
        positions, table = np.full((len(section), length), -1), np.full((len(section), 5), 99)
        for index, row in enumerate(section):
            if row is not None:
                first, count = row
                positions[index, :count] = first + np.arange(count)
                blocks = [free.pop() for _ in range((first + count - 1) // SIZE + 1)]
                table[index, : len(blocks)] = blocks
                rows.append((flat + index * length, first, count, np.asarray(blocks)))
        flat += positions.size
        sections.append(Section(jnp.asarray(positions, jnp.int32), jnp.asarray(table, jnp.int32)))
    return tuple(sections), rows


@pytest.mark.parametrize(
    ("dtype", "tolerance", "turn"),
    [
        *((dtype, tolerance, turn) for dtype, tolerance in TOLERANCES.items() for turn in (SIZE, 3 * SIZE, 64)),
        *((dtype, TOLERANCES[dtype], None) for dtype in ("float32", "bfloat16")),
    ],
)
def test_every_token_sees_its_sequence_up_to_itself(
    dtype: str, tolerance: float, turn: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With XLA's loop, so many tokens a turn, or with the kernel of the CPU."""
    if turn is not None:
        monkeypatch.setattr(api, "_PREFERRED", {})
        monkeypatch.setattr(xla, "tokens_per_turn", lambda: turn)
    random = np.random.default_rng(0)
    sections, rows = make_sections(random)
    shape = (LAYERS * BLOCKS, GROUPS, KV_HEADS, SIZE, HEAD)
    with jax.enable_x64(dtype == "float64"):
        k, v = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
        tokens = sum(section.positions_RT.size for section in sections)
        q_new = jnp.asarray(random.normal(size=(tokens, GROUPS, QUERIES, HEAD)), dtype)
        k_new, v_new = (jnp.asarray(random.normal(size=(tokens, GROUPS, KV_HEADS, HEAD)), dtype) for _ in range(2))

        @jax.jit
        def step(cache: PagedCache, layer: jax.Array) -> tuple[PagedCache, jax.Array]:
            cache = cache.write(layer, k_new, v_new)
            return cache, cache.attend(layer, q_new, k_new, v_new)

        cache, out = step(PagedCache(k, v, sections, LAYERS), jnp.int32(1))
    written = {name: np.asarray(getattr(cache, name)).astype(np.float64) for name in ("k_XSGCK", "v_XSGCK")}
    before = {"k_XSGCK": np.array(k, np.float64), "v_XSGCK": np.array(v, np.float64)}
    real = np.zeros(tokens, bool)
    for flat, first, count, blocks in rows:
        real[flat : flat + count] = True
        for name, new in (("k_XSGCK", k_new), ("v_XSGCK", v_new)):
            for index in range(count):
                block, offset = blocks[(first + index) // SIZE], (first + index) % SIZE
                before[name][BLOCKS + block, :, :, offset] = np.asarray(new[flat + index]).astype(np.float64)
    for name, expected in before.items():
        np.testing.assert_array_equal(written[name], expected)
    found = np.asarray(out).astype(np.float64)
    assert not found[~real].any()
    for flat, first, count, blocks in rows:
        for group in range(GROUPS):
            for head in range(KV_HEADS):
                k_CK, v_CK = (array[BLOCKS + blocks, group, head].reshape(-1, HEAD) for array in before.values())
                own = np.s_[flat : flat + count, group, 2 * head : 2 * head + 2]
                expected = softmax_attention(np.asarray(q_new[own]).astype(np.float64), k_CK, v_CK, first)
                np.testing.assert_allclose(found[own], expected, atol=tolerance, rtol=tolerance)
