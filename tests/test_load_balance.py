"""Local activation rate and load discrepancy against routing written down by hand, and of a real model."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import packed_batch, tiny_config, tiny_model

from foejax.analysis.load_balance import load_balance, routing_of
from sharding.mesh import MeshSizes

FOUR = MeshSizes(1, 1, 4)


def routing(*tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One layer, one group: the experts of each token; a negative one is not valid."""
    chosen = np.array(tokens)[None, None]
    return np.maximum(chosen, 0), chosen >= 0


def test_expert_parallelism_by_hand() -> None:
    """Eight experts on four devices, a token on each: two of eight choices stay, device 1 has three rows."""
    experts, valid = routing((0, 2), (2, 5), (3, 7), (6, 0))
    found = load_balance(experts, valid, "ep", FOUR, 8)
    assert found.local_activation_rate == 3 / 8
    assert found.row_discrepancy == found.most_row_discrepancy == 3 / 2
    assert found.token_discrepancy == 3 / 2
    assert found.row_imbalance == 3 / 2
    assert found.expert_discrepancy == 2 / 1
    everywhere = load_balance(experts, valid, "tp", MeshSizes(1, 4, 1), 8)
    assert everywhere.local_activation_rate == 1.0 and everywhere.row_discrepancy == 3 / 2


def test_two_choices_on_a_device_are_one_token_and_two_rows() -> None:
    experts, valid = routing((0, 1), (2, 3), (4, 5), (0, 1))
    found = load_balance(experts, valid, "tp_ep", MeshSizes(1, 4, 1), 8)
    assert found.token_discrepancy == 2.0
    assert found.row_discrepancy == 4 / 2
    assert found.row_imbalance == 4 / 2


def test_padding_counts_nowhere() -> None:
    experts, valid = routing((0, 2), (2, 4), (4, 6), (6, -1))
    found = load_balance(experts, valid, "ep", FOUR, 8)
    assert found.local_activation_rate == 4 / 7
    assert found.row_imbalance == pytest.approx(2 / (7 / 4))


def test_groups_of_real_routing_are_in_balance_and_experts_are_not() -> None:
    model = tiny_model(tiny_config())
    trace = routing_of(model, packed_batch())
    experts, valid = trace
    foe = load_balance(experts, valid, "foe", MeshSizes(1, 8, 1), 32)
    assert (foe.local_activation_rate, foe.token_discrepancy, foe.row_discrepancy) == (1.0, 1.0, 1.0)
    assert foe.expert_discrepancy > 1.0
    spread = load_balance(experts, valid, "foe", MeshSizes(1, 4, 2), 32)
    assert 0.3 < spread.local_activation_rate < 0.7 and spread.row_discrepancy > 1.0
    assert foe.expert_discrepancy == spread.expert_discrepancy


def test_heads_are_in_balance_whatever_they_choose() -> None:
    """Two heads of four experts, four tokens."""
    first, second = ((0, 1), (0, 1), (0, 2), (0, 3)), ((0, 1), (0, 2), (0, 3), (1, 2))
    experts, valid = np.array([[first, second]]), np.ones((1, 2, 4, 2), bool)
    alone = load_balance(experts, valid, "hp", MeshSizes(1, 2, 1), 8)
    assert (alone.token_discrepancy, alone.row_discrepancy, alone.row_imbalance) == (1.0, 1.0, 1.0)
    assert alone.local_activation_rate == 1 / 2 and alone.expert_discrepancy == 4 / 2
    spread = load_balance(experts, valid, "hp", MeshSizes(1, 2, 2), 8)
    # The first head has 6 and 2 rows, the second 5 and 3. Token t is on the device of head t % 2, experts t // 2.
    assert spread.row_imbalance == 6 / 4
    assert spread.local_activation_rate == (2 + 1 + 1 + 1) / 16


def test_meshes_that_do_not_divide_are_refused() -> None:
    experts, valid = routing((0, 2), (2, 4))
    for sizes in (MeshSizes(2, 1, 4), MeshSizes(1, 2, 1), MeshSizes(1, 1, 3)):
        with pytest.raises(ValueError, match="do not fit the foe mesh"):
            load_balance(experts, valid, "foe", sizes, 8)
