"""Rows sorted by expert: the two ways to sort, and what a plan promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foejax.models import rows
from foejax.models.rows import plan_rows

GROUPS, TOKENS, K, EXPERTS = 2, 13, 3, 5


def random_choices(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts of every token and group, some of them not valid."""
    random = np.random.default_rng(seed)
    indices = np.stack([random.permutation(EXPERTS)[:K] for _ in range(GROUPS * TOKENS)])
    return indices.reshape(GROUPS, TOKENS, K), random.random((GROUPS, TOKENS, K)) < 0.7


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "sorted"])
@pytest.mark.parametrize("seed", range(3))
def test_every_valid_choice_has_one_row_in_order_of_group_expert_and_choice(
    seed: int, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "largest_counted", lambda: GROUPS * TOKENS * K if counted else 0)
    indices, valid = random_choices(seed)
    kept = int(valid.sum()) + 2
    plan = plan_rows(jnp.asarray(indices, jnp.int32), jnp.asarray(valid), EXPERTS, kept)
    experts = indices + EXPERTS * np.arange(GROUPS)[:, None, None]
    choices = sorted(np.flatnonzero(valid), key=lambda choice: (experts.flat[choice], choice))
    dead = kept - len(choices)
    assert np.asarray(plan.choice_R).tolist() == [*choices, *[valid.size] * dead]
    assert np.asarray(plan.token_R).tolist() == [*[choice // K % TOKENS for choice in choices], *[TOKENS] * dead]
    expected_rows = np.full(valid.size, kept)
    expected_rows[choices] = np.arange(len(choices))
    np.testing.assert_array_equal(np.ravel(plan.row_SNk), expected_rows)
    np.testing.assert_array_equal(plan.group_sizes, np.bincount(experts[valid], minlength=GROUPS * EXPERTS))


def test_small_batches_are_not_sorted() -> None:
    def program(tokens: int) -> str:
        indices = jnp.zeros((1, tokens, 8), jnp.int32)
        return str(jax.make_jaxpr(lambda i, v: plan_rows(i, v, 64))(indices, indices == 0))

    largest = rows.largest_counted() // 8
    assert "sort" not in program(largest) and "scatter" not in program(largest)
    assert "sort" in program(largest + 1)
