"""The choice of a backend for paged attention, and the kernel of the CPU against XLA's loop where shapes are awkward.

`test_paged_cache.py` compares both with plain attention.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import host_kernel, paged_attention

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def make_operands(
    rows: int, length: int, queries: int, kv_heads: int, head: int, block: int, dtype: str = "float32"
) -> Operands:
    """Rows of 7 to 40 tokens in shuffled blocks, the last row padding; what no token may see is NaN."""
    random = np.random.default_rng(0)
    groups, blocks = 2, -(-40 // block)
    last = random.integers(7, 40, size=rows)
    positions = last[:, None] - np.arange(length)[::-1]
    positions[-1] = -1
    table = random.permutation(rows * blocks).reshape(rows, blocks)
    shape = (rows * blocks, groups, kv_heads, block, head)
    k, v = (random.normal(size=shape) for _ in range(2))
    for row in range(rows):
        for position in range(positions[row, -1] + 1, blocks * block):
            k[table[row, position // block], :, :, position % block] = np.nan
            v[table[row, position // block], :, :, position % block] = np.nan
    q = random.normal(size=(rows, length, groups, queries, head))
    arrays = [jnp.asarray(array, dtype) for array in (q, k, v)]
    return *arrays, jnp.asarray(table, jnp.int32), jnp.asarray(positions, jnp.int32)  # type: ignore[return-value]


def clean(operands: Operands) -> Operands:
    """With zeros for NaN: XLA's loop multiplies what no token may see by a weight of zero."""
    q, k, v, *rest = operands
    return (q, jnp.nan_to_num(k), jnp.nan_to_num(v), *rest)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2, 2, 16, 8), (4, 5, 6, 2, 80, 16), (3, 3, 4, 1, 24, 5), (2, 2, 1, 1, 136, 40)],
    ids=["decoding", "shared_heads", "odd_sizes", "long_blocks"],
)
def test_kernel_equals_the_loop(shape: tuple[int, int, int, int, int, int]) -> None:
    operands = make_operands(*shape)
    run = functools.partial(paged_attention, first_block=jnp.int32(0))
    found = jax.jit(functools.partial(run, implementation="cpu"))(*operands)
    expected = jax.jit(functools.partial(run, implementation="xla"))(*clean(operands))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not np.any(found[-1])


def test_large_logits_do_not_overflow() -> None:
    q, k, v, table, positions = make_operands(3, 1, 2, 2, 16, 8)
    found = paged_attention(1e4 * q, k, v, table, positions, first_block=jnp.int32(0), implementation="cpu")
    assert np.isfinite(found).all() and np.abs(found[0]).max() > 0.1


def test_the_backend_is_picked_logged_and_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operands = make_operands(2, 3, 2, 1, 8, 9)
    run = functools.partial(paged_attention, first_block=jnp.int32(0))
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        run(*operands)
        assert caplog.records[-1].message.endswith(": cpu")
        monkeypatch.setattr(host_kernel, "register", lambda source, name: "no C++ compiler")
        run(*make_operands(2, 4, 2, 1, 8, 9))
        assert caplog.records[-1].message.endswith(": xla; cpu has no kernel here (no C++ compiler)")
    with pytest.raises(ValueError, match=r"'cpu': cpu has no kernel here \(no C\+\+ compiler\); these can: xla"):
        run(*operands, implementation="cpu")
    with pytest.raises(ValueError, match="'cuda': choose one of"):
        run(*operands, implementation="cuda")
