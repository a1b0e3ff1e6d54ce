"""The Triton kernel of grouped_swiglu; `triton.py` says with which arguments it starts.

Sizes are constants of the compilation and offsets of whole blocks int64, as in `grouped_matmul/triton_kernels.py`.

Shape letters: X tokens or rows, R rows, K width, F expert hidden size, E experts, L listed tasks. A block has BM rows,
BK contracted and BF hidden features. M, K and F at the end of a name are a block's axes, 1 an axis of length one.
"""

import triton
import triton.language as tl

from pallas_kernels.grouped_matmul.triton_kernels import find_task, load_slice


@triton.jit
def activate_rows(
    x_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    gate_scales_ptr: tl.tensor,
    up_scales_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    stops_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    gate_inputs_ptr: tl.tensor,
    up_inputs_ptr: tl.tensor,
    num_tasks: tl.constexpr,
    num_experts: tl.constexpr,
    num_tokens: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    w_stride_K: tl.constexpr,
    w_stride_F: tl.constexpr,
    has_scales: tl.constexpr,
    has_tokens: tl.constexpr,
    has_weights: tl.constexpr,
    saves_inputs: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    tasks_side_by_side: tl.constexpr,
) -> None:
    """Writes one block of hidden [R, F]: weight * silu(x gate_e) * (x up_e) for the rows of one task.

    Tasks [L], gate, up and their scales as in `multiply_rows`, of which gate and up are w. tokens [R] int32 says which
    row of x [X, K] each row is, weights [R] float32 is a factor of each row. With `saves_inputs` what the activation
    was given is written to gate_inputs and up_inputs [R, F]. Rows of no token give zeros, as tasks of expert E do.
    """
    expert, start, stop, first_F = find_task(experts_ptr, starts_ptr, stops_ptr, num_tasks, F, BF, tasks_side_by_side)
    if start >= stop:
        return
    row_M1 = tl.arange(0, BM)[:, None]
    feature_1F = tl.arange(0, BF)[None, :]
    index_K = tl.arange(0, BK)
    in_use_M1 = row_M1 < stop - start
    inside_1F = feature_1F < F - first_F
    is_live_M1 = in_use_M1 & (expert < num_experts)
    source_M1 = start.to(tl.int64) + row_M1
    if has_tokens:
        source_M1 = tl.load(tokens_ptr + source_M1, mask=is_live_M1, other=-1).to(tl.int64)
        is_live_M1 = is_live_M1 & (source_M1 >= 0) & (source_M1 < num_tokens)
    x_ptrs = x_ptr + source_M1 * K + index_K[None, :]
    block = expert.to(tl.int64) * (K * F) + first_F.to(tl.int64) * w_stride_F
    offset_KF = index_K[:, None] * w_stride_K + feature_1F * w_stride_F
    gate_ptrs = gate_ptr + block + offset_KF
    up_ptrs = up_ptr + block + offset_KF
    row_type: tl.constexpr = x_ptr.dtype.element_ty
    gate_MF = tl.zeros((BM, BF), tl.float32)
    up_MF = tl.zeros((BM, BF), tl.float32)
    for done in range(0, tl.where(expert < num_experts, K, 0), BK):
        x_MK = load_slice(x_ptrs, is_live_M1, index_K[None, :], K - done, row_type, K, BK)
        gate_KF = load_slice(gate_ptrs, inside_1F, index_K[:, None], K - done, row_type, K, BK)
        up_KF = load_slice(up_ptrs, inside_1F, index_K[:, None], K - done, row_type, K, BK)
        gate_MF = tl.dot(x_MK, gate_KF, gate_MF, input_precision="ieee")
        up_MF = tl.dot(x_MK, up_KF, up_MF, input_precision="ieee")
        x_ptrs += BK
        gate_ptrs += BK * w_stride_K
        up_ptrs += BK * w_stride_K
    if has_scales:
        scale_1F = expert.to(tl.int64) * F + first_F + feature_1F
        has_scale_1F = inside_1F & (expert < num_experts)
        gate_MF *= tl.load(gate_scales_ptr + scale_1F, mask=has_scale_1F, other=0)
        up_MF *= tl.load(up_scales_ptr + scale_1F, mask=has_scale_1F, other=0)
    result_MF = start.to(tl.int64) * F + first_F + row_M1 * F + feature_1F
    if saves_inputs:
        tl.store(gate_inputs_ptr + result_MF, gate_MF.to(row_type), mask=in_use_M1 & inside_1F)
        tl.store(up_inputs_ptr + result_MF, up_MF.to(row_type), mask=in_use_M1 & inside_1F)
    hidden_MF = gate_MF / (1 + tl.exp(-gate_MF)) * up_MF
    if has_weights:
        hidden_MF *= tl.load(weights_ptr + start + row_M1, mask=is_live_M1, other=0)
    tl.store(hidden_ptr + result_MF, hidden_MF.to(row_type), mask=in_use_M1 & inside_1F)
