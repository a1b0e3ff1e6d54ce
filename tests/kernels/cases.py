"""The cases that every grouped-matmul kernel is held against, and the plain NumPy they are held against."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Case(NamedTuple):
    """R rows of which the first sum(group_sizes) belong to the groups, K contracted and N output features."""

    rows: int
    contracted: int
    features: int
    group_sizes: tuple[int, ...]


CASES = {
    "uneven": Case(256, 128, 256, (37, 64, 129, 26)),
    "empty_experts_and_padding": Case(264, 256, 128, (0, 70, 0, 0, 101, 0)),
    "one_expert_has_all": Case(200, 128, 128, (0, 0, 200)),
    "sizes_of_one": Case(64, 128, 128, (1,) * 17),
    "rows_no_multiple_of_eight": Case(201, 128, 128, (8, 0, 100, 91)),
    "fewer_rows_than_a_tile": Case(5, 128, 128, (2, 3)),
    "one_expert": Case(192, 128, 384, (150,)),
    "only_padding": Case(72, 128, 128, (0, 0)),
    "sum_above_rows": Case(96, 128, 128, (60, 60, 60)),
    "many_experts": Case(256, 128, 128, tuple(int(size) for size in np.diff(np.r_[0, np.arange(1, 257) ** 2 // 280]))),
}


class Operands(NamedTuple):
    x_RK: np.ndarray
    w_EKN: np.ndarray
    dy_RN: np.ndarray
    group_sizes_E: np.ndarray


class Expected(NamedTuple):
    y_RN: np.ndarray
    dx_RK: np.ndarray
    dw_EKN: np.ndarray


def make_operands(case: Case, dtype: str) -> Operands:
    """Random operands, rounded to `dtype`; rows of x and dy past the last group are NaN."""
    random = np.random.default_rng(case.rows)
    experts, live = len(case.group_sizes), sum(case.group_sizes)
    x_RK, dy_RN = random.normal(size=(case.rows, case.contracted)), random.normal(size=(case.rows, case.features))
    x_RK[live:] = dy_RN[live:] = np.nan
    w_EKN = random.normal(size=(experts, case.contracted, case.features))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return Operands(*(array.astype(kind) for array in (x_RK, w_EKN, dy_RN)), np.asarray(case.group_sizes, np.int32))


def expected_results(operands: Operands) -> Expected:
    """Product and gradients in float64, expert by expert."""
    x_RK, w_EKN, dy_RN = (array.astype(np.float64) for array in operands[:3])
    y_RN, dx_RK, dw_EKN = np.zeros(dy_RN.shape), np.zeros(x_RK.shape), np.zeros(w_EKN.shape)
    start = 0
    for expert, size in enumerate(operands.group_sizes_E):
        rows = slice(start, min(start + int(size), len(x_RK)))
        y_RN[rows] = x_RK[rows] @ w_EKN[expert]
        dx_RK[rows] = dy_RN[rows] @ w_EKN[expert].T
        dw_EKN[expert] = x_RK[rows].T @ dy_RN[rows]
        start += int(size)
    return Expected(y_RN, dx_RK, dw_EKN)


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """One rounding of `dtype` away, and the error of a float32 sum; exactly zero where the result is."""
    assert actual.shape == expected.shape
    found = np.asarray(actual).astype(np.float64)
    relative = {"bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    slack = 4e-6 * np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=relative, atol=slack)
    assert not np.any(found[expected == 0])
