"""The Triton kernels of grouped_matmul, and what those of other operations on sorted rows share with them.

Every size is a constant of the compilation, as shapes are in JAX: Triton then knows how far addresses are aligned.
Offsets of a whole block are int64 (an array may hold more than 2^31 numbers), offsets within a block int32.

Shape letters: R rows, K contracted features, N output features, E experts, L listed tasks. A block has BM rows, BK
contracted and BN output features. M, K and N at the end of a name are a block's axes, 1 an axis of length one.
"""

import triton
import triton.language as tl


@triton.jit
def find_task(
    experts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    stops_ptr: tl.tensor,
    num_tasks: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    tasks_side_by_side: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's task as expert, first row and one past its last row, and the first of its output features.

    Programs that run at the same time share a few tasks' rows and a few blocks of weights, which stay in L2.
    """
    blocks_N: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    task, block_N = tl.swizzle2d(program // blocks_N, program % blocks_N, num_tasks, blocks_N, tasks_side_by_side)
    return tl.load(experts_ptr + task), tl.load(starts_ptr + task), tl.load(stops_ptr + task), block_N * BN


@triton.jit
def load_slice(
    ptrs: tl.tensor,
    inside: tl.tensor,
    index_K: tl.tensor,
    left: tl.tensor,
    dtype: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """BK contracted features of a block, as `dtype`; 0 where not `inside`, and past the `left` features until K ends.

    Numbers of 8 bits convert exactly to either dtype of rows.
    """
    if K % BK != 0:
        inside = inside & (index_K < left)
    block = tl.load(ptrs, mask=inside, other=0.0)
    if block.dtype == tl.float8e4nv:
        # To bfloat16 in one step, Hopper would take an instruction for each number that others take for two.
        block = block.to(tl.float16).to(tl.float32)
    return block.to(dtype)


@triton.jit
def multiply_rows(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    stops_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_tasks: tl.constexpr,
    num_experts: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    w_stride_K: tl.constexpr,
    w_stride_N: tl.constexpr,
    has_scales: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    tasks_side_by_side: tl.constexpr,
) -> None:
    """Writes one block of y [R, N]: the rows of one task by BN of their expert's output features.

    experts, starts and stops [L] int32 hold each task's expert, first row and one past its last row. Tasks of expert E
    write zeros; tasks without rows do nothing. w is [E, K, N] or [E, N, K], as its strides say, of the rows' dtype or
    with `scales` [E, N] float32 of 8 bits.
    """
    expert, start, stop, first_N = find_task(experts_ptr, starts_ptr, stops_ptr, num_tasks, N, BN, tasks_side_by_side)
    if start >= stop:
        return
    row_M1 = tl.arange(0, BM)[:, None]
    feature_1N = tl.arange(0, BN)[None, :]
    in_use_M1 = row_M1 < stop - start
    inside_1N = feature_1N < N - first_N
    index_K = tl.arange(0, BK)
    x_ptrs = x_ptr + start.to(tl.int64) * K + row_M1 * K + index_K[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * (K * N) + first_N.to(tl.int64) * w_stride_N
    w_ptrs = w_ptrs + index_K[:, None] * w_stride_K + feature_1N * w_stride_N
    row_type: tl.constexpr = x_ptr.dtype.element_ty
    sum_MN = tl.zeros((BM, BN), tl.float32)
    for done in range(0, tl.where(expert < num_experts, K, 0), BK):
        x_MK = load_slice(x_ptrs, in_use_M1, index_K[None, :], K - done, row_type, K, BK)
        w_KN = load_slice(w_ptrs, inside_1N, index_K[:, None], K - done, row_type, K, BK)
        sum_MN = tl.dot(x_MK, w_KN, sum_MN, input_precision="ieee")
        x_ptrs += BK
        w_ptrs += BK * w_stride_K
    if has_scales:
        scales_ptrs = scales_ptr + expert.to(tl.int64) * N + first_N + feature_1N
        sum_MN *= tl.load(scales_ptrs, mask=inside_1N & (expert < num_experts), other=0)
    y_ptrs = y_ptr + start.to(tl.int64) * N + first_N + row_M1 * N + feature_1N
    tl.store(y_ptrs, sum_MN.to(y_ptr.dtype.element_ty), mask=in_use_M1 & inside_1N)


@triton.jit
def contract_rows(
    x_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    blocks_side_by_side: tl.constexpr,
) -> None:
    """Writes one block of dw [E, K, N]: x times dy, summed over the rows of one expert; zeros for one without rows.

    bounds [E + 1] int32 holds the row at which each expert starts and, last, the row at which the last one ends.
    """
    blocks_K: tl.constexpr = (K + BK - 1) // BK
    blocks_N: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    expert = program // (blocks_K * blocks_N)
    block = program % (blocks_K * blocks_N)
    block_K, block_N = tl.swizzle2d(block // blocks_N, block % blocks_N, blocks_K, blocks_N, blocks_side_by_side)
    start = tl.load(bounds_ptr + expert)
    size = tl.load(bounds_ptr + expert + 1) - start
    first_K = block_K * BK
    first_N = block_N * BN
    feature_K1 = tl.arange(0, BK)[:, None]
    feature_1N = tl.arange(0, BN)[None, :]
    row_M = tl.arange(0, BM)
    inside_K1 = feature_K1 < K - first_K
    inside_1N = feature_1N < N - first_N
    x_ptrs = x_ptr + start.to(tl.int64) * K + first_K + row_M[None, :] * K + feature_K1
    dy_ptrs = dy_ptr + start.to(tl.int64) * N + first_N + row_M[:, None] * N + feature_1N
    sum_KN = tl.zeros((BK, BN), tl.float32)
    rows_in_whole_blocks = size // BM * BM
    for _ in range(0, rows_in_whole_blocks, BM):
        x_KM = tl.load(x_ptrs, mask=inside_K1, other=0.0)
        dy_MN = tl.load(dy_ptrs, mask=inside_1N, other=0.0)
        sum_KN = tl.dot(x_KM, dy_MN, sum_KN, input_precision="ieee")
        x_ptrs += BM * K
        dy_ptrs += BM * N
    left = size - rows_in_whole_blocks
    if left > 0:
        # Both sides are masked: the rows after the expert's last one may hold NaN, and zero times NaN is NaN.
        x_KM = tl.load(x_ptrs, mask=inside_K1 & (row_M[None, :] < left), other=0.0)
        dy_MN = tl.load(dy_ptrs, mask=inside_1N & (row_M[:, None] < left), other=0.0)
        sum_KN = tl.dot(x_KM, dy_MN, sum_KN, input_precision="ieee")
    dw_ptrs = dw_ptr + expert.to(tl.int64) * (K * N) + first_K.to(tl.int64) * N + first_N
    dw_ptrs = dw_ptrs + feature_K1 * N + feature_1N
    tl.store(dw_ptrs, sum_KN.to(dw_ptr.dtype.element_ty), mask=inside_K1 & inside_1N)
