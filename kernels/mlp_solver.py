"""The launches of a frame around the MLP head's blocks: start, solver steps, and the last step with its codes.

For B requests, K acoustic codebooks and a network of width dim; the device functions are in ``solver.py``::

    mlp_start    x = noise                                         fp32 [B, K]
                 stream = w_in @ x + b_in                          [2B, dim], equal with and without the condition
    (blocks)     stream                                            [2B, dim], updated in place
    mlp_step     n = layer_norm(stream) * (1 + scale) + shift      [2B, dim]
                 v = w_out @ (a * n_cond + (1 - a) * n_uncond) + b_out        [B, K], a = cfg_alpha
                 x = x + dt * (v + ab2_ratio * (v - v_last)), v_last = v
                 stream of the next step, as in mlp_start
    mlp_finish   the last step, then codes [B, 1 + K] and the sum of their embeddings [B, E]

where layer_norm(x) = (x - mean) / sqrt(variance + eps). As in ``transformer_solver.py``, one block computes a whole
step of one request, so that no block waits for another. The launch configs are those of ``transformer_solver.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operator import expect, expect_batch, operator
from .solver import expect_codes, init_noise, load_state, padded, project_in, project_out, solver_step, write_codes
from .transformer_solver import FLOW_START, FLOW_STEP

__all__ = ["mlp_finish", "mlp_start", "mlp_step"]


@triton.jit
def _modulated_norm(p_x, p_mod, eps, N: tl.constexpr, PAD_N: tl.constexpr):
    """Return ``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift`` of one row: fp32 [PAD_N], zeros past N.

    `p_mod` points to the row's shift [N]; the row's scale [N] follows directly.
    """
    o_n = tl.arange(0, PAD_N)
    m_n = o_n < N
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_x = tl.where(m_n, b_x - tl.sum(b_x, 0) / N, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_shift = tl.load(p_mod + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_scale = tl.load(p_mod + N + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_x * (1 + b_scale) + b_shift


@triton.jit
def _guided_step(
    p_y, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Run a solver step of one request with its guided velocity, and return the new x: fp32 [PAD_K], zeros past K.

    Guidance and projection are both linear, so the two rows are combined before the projection. The projection's bias
    is added once, because the guidance weights a and 1 - a sum to 1.
    """
    eps = tl.full([], eps, tl.float32)  # torch.compile passes eps as fp64
    o_k = tl.arange(0, PAD_K)
    b_x, b_last = load_state(p_x, p_last, i_b, K, PAD_K)
    alpha = tl.load(p_alpha + i_b)
    b_y = alpha * _modulated_norm(p_y + i_b * N, p_mod + (1 + i_b) * stride_mod, eps, N, PAD_N)
    b_y += (1 - alpha) * _modulated_norm(p_y + (B + i_b) * N, p_mod, eps, N, PAD_N)
    b_v = project_out(p_w_out, b_y, N, K, PAD_N, PAD_K, BLOCK_K, PIPE)
    b_v += tl.load(p_b_out + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return solver_step(p_x, p_last, b_x, b_last, b_v, i_b, dt, ab2_ratio, K, PAD_K)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_seed", "p_frame"])
def _mlp_start_kernel(
    p_seed, p_frame, p_noise, p_quantiles, p_w_in, p_b_in, p_x, p_stream,
    B,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b_x = init_noise(p_seed, p_frame, p_noise, p_quantiles, i_b, K, PAD_K)
    if i_n == 0:
        o_k = tl.arange(0, PAD_K)
        tl.store(p_x + i_b * K + o_k, b_x, mask=o_k < K)
    project_in(p_w_in, p_b_in, p_stream, b_x, i_b, i_n * BLOCK_N, B, N, K, PAD_K, BLOCK_N)


def launch_mlp_start(
    seed: Tensor | None, frame: Tensor | None, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, b_in: Tensor,
    x: Tensor, stream: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`mlp_start` without checking the arguments; `seed` and `frame` may be None if `noise` is given."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_START(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | padded(N, K)
    _mlp_start_kernel[(B, triton.cdiv(N, constants["BLOCK_N"]))](
        seed, frame, noise, quantiles, w_in, b_in, x, stream, B, **constants
    )


@operator(launch_mlp_start, mutates=("x", "stream"))
def mlp_start(
    seed: Tensor,
    frame: Tensor,
    noise: Tensor | None,
    quantiles: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    x: Tensor,
    stream: Tensor,
    max_batch: int,
) -> None:
    """Begin a frame: set x to noise, and the residual stream to the input projection of x.

    Args:
        seed: int64 [B], one seed per request. A request's noise depends only on the request's seed and frame.
        frame: int64 [B], the number of each request's frame, counted from 0.
        noise: fp32 [B, K], the initial state, or None to draw it from `seed` and `frame`.
        quantiles: fp32 [65536], the quantiles of the standard normal at (i + 1/2) / 65536.
        w_in: [dim, K] fp32, bf16 or fp16, the input projection.
        b_in: [dim], the bias of the input projection.
        x: fp32 [B, K], the flow's state, written.
        stream: [2B, dim], the residual stream, written: B rows for the branch with the condition, then B equal rows for
            the branch without the condition.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Raises:
        ValueError: B is not in 1..max_batch, or `max_batch` is not in 1..64.
    """
    B = _expect_entrance(w_in, b_in, x, stream, max_batch)
    K = w_in.shape[1]
    expect("seed", seed, (B,), like=w_in, dtype=torch.int64)
    expect("frame", frame, (B,), like=w_in, dtype=torch.int64)
    expect("quantiles", quantiles, (65536,), like=w_in, dtype=torch.float32)
    if noise is not None:
        expect("noise", noise, (B, K), like=w_in, dtype=torch.float32)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha"])
def _mlp_step_kernel(
    p_stream, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, p_w_in, p_b_in,
    B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_x = _guided_step(
        p_stream, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
        N, K, PAD_N, PAD_K, BLOCK_K, PIPE,
    )  # fmt: skip
    tl.debug_barrier()  # all warps must have read the stream before its rows are overwritten
    for n in tl.range(0, N, BLOCK_N, num_stages=PIPE):
        project_in(p_w_in, p_b_in, p_stream, b_x, i_b, n, B, N, K, PAD_K, BLOCK_N)


def launch_mlp_step(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, w_in: Tensor, b_in: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`mlp_step` without checking the arguments."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_STEP(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | padded(N, K)
    constants["PIPE"] = constants["num_stages"]
    _mlp_step_kernel[(B,)](
        stream, modulation, w_out, b_out, cfg_alpha, x, v_last, w_in, b_in, B, modulation.stride(0), eps, dt, ab2_ratio,
        **constants,
    )  # fmt: skip


@operator(launch_mlp_step, mutates=("stream", "x", "v_last"))
def mlp_step(
    stream: Tensor,
    modulation: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    eps: float,
    cfg_alpha: Tensor,
    dt: float,
    ab2_ratio: float,
    x: Tensor,
    v_last: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    max_batch: int,
) -> None:
    """Run a solver step, ``x += dt * (v + ab2_ratio * (v - v_last))``, and write the residual stream of the next step.

    The final layer computes a velocity from ``layer_norm(stream) * (1 + scale) + shift`` for each branch. Guidance
    combines the two velocities: ``v = a * v_cond + (1 - a) * v_uncond``. With an `ab2_ratio` of 0, the step is Euler's;
    see ``voxkern.reference.solver.integrate``.

    Args:
        stream: [2B, dim] fp32, bf16 or fp16, the output of the last block, the rows with the condition first. The input
            projection of the new x replaces this output.
        modulation: [1 + B, 2 dim], shift | scale; only its last dimension must be contiguous. Row 0 belongs to the
            branch without the condition, row 1 + i to request i.
        w_out: [K, dim], the projection of the velocity.
        b_out: [K], the bias of that projection.
        eps: added to the variance.
        cfg_alpha: fp32 [B], the strength a of the guidance; 1 means no guidance.
        dt: the length of the step.
        ab2_ratio: the factor on the change of the velocity since the last step.
        x: fp32 [B, K], the flow's state, updated.
        v_last: fp32 [B, K], the velocity of the last step, replaced by this step's velocity. If `ab2_ratio` is 0, the
            velocity of the last step is not used.
        w_in: [dim, K], the input projection.
        b_in: [dim], the bias of the input projection.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Raises:
        ValueError: B is not in 1..max_batch, or `max_batch` is not in 1..64.
    """
    B = _expect_entrance(w_in, b_in, x, stream, max_batch)
    _expect_final(stream, modulation, w_out, b_out, cfg_alpha, v_last, B)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha", "p_semantic"])
def _mlp_finish_kernel(
    p_stream, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, p_semantic, p_embeddings, p_codes, p_next,
    B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    PAD_N: tl.constexpr, PAD_K: tl.constexpr, PAD_E: tl.constexpr,
    LEVELS: tl.constexpr, SEMANTIC_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_x = _guided_step(
        p_stream, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
        N, K, PAD_N, PAD_K, BLOCK_K, PIPE,
    )  # fmt: skip
    write_codes(
        b_x, p_semantic, p_embeddings, p_codes, p_next, i_b, K, E, PAD_K, PAD_E, LEVELS, SEMANTIC_SIZE, BLOCK_K, PIPE
    )


def launch_mlp_finish(
    out: tuple[Tensor, Tensor],
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, semantic: Tensor, levels: int, embeddings: Tensor | None,
    semantic_size: int, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`mlp_finish` into `out`, codes [B, 1 + K] and next [B, E], without checking the arguments."""
    codes, next_embedding = out
    B, (K, N) = x.shape[0], w_out.shape
    E = next_embedding.shape[1]
    constants = FLOW_STEP(N=max(N, E), K=K, dtype=w_out.dtype, rows=max_batch) | padded(N, K)
    constants |= {"E": E, "PAD_E": triton.next_power_of_2(max(E, 1)), "PIPE": constants["num_stages"]}
    constants |= {"LEVELS": levels, "SEMANTIC_SIZE": semantic_size}
    del constants["BLOCK_N"]  # a size of the input projection, which this kernel does not compute
    _mlp_finish_kernel[(B,)](
        stream, modulation, w_out, b_out, cfg_alpha, x, v_last, semantic, embeddings, codes, next_embedding,
        B, modulation.stride(0), eps, dt, ab2_ratio, **constants,
    )  # fmt: skip


@operator(launch_mlp_finish, mutates=("x", "v_last"))
def mlp_finish(
    stream: Tensor,
    modulation: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    eps: float,
    cfg_alpha: Tensor,
    dt: float,
    ab2_ratio: float,
    x: Tensor,
    v_last: Tensor,
    semantic: Tensor,
    levels: int,
    embeddings: Tensor | None,
    semantic_size: int,
    max_batch: int,
) -> tuple[Tensor, Tensor]:
    """Run the last solver step of a frame, and return the frame's codes and the sum of their embeddings.

    The sum is the backbone's next input.

    Args:
        stream: [2B, dim], see :func:`mlp_step`, also for the next nine arguments. `stream` is not changed here.
        modulation: [1 + B, 2 dim], shift | scale.
        w_out: [K, dim], the projection of the velocity.
        b_out: [K], the bias of that projection.
        eps: added to the variance.
        cfg_alpha: fp32 [B], the strength of the guidance.
        dt: the length of the step.
        ab2_ratio: the factor on the change of the velocity since the last step.
        x: fp32 [B, K], the flow's state, updated and not clamped.
        v_last: fp32 [B, K], the velocity of the last step, replaced by this step's velocity.
        semantic: int64 [B], the semantic codes with the offset of 2. For a semantic code of 1 (END), all acoustic codes
            of the request are 2.
        levels: the number of levels of an acoustic code. x = -1 is level 0, and x = 1 is level ``levels - 1``. A value
            halfway between two levels rounds to the even level.
        embeddings: [rows, E], see :func:`voxkern.kernels.transformer_solver.flow_finish`. With
            None there is no sum, and E = 0.
        semantic_size: the number of codes in the semantic codebook, without the 2 special codes.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Returns:
        The codes with the offset of 2, int64 [B, 1 + K], and the sum of their embeddings, [B, E], summed in fp32 and
        rounded once.

    Raises:
        ValueError: B is not in 1..max_batch, or `embeddings` has too few rows for `levels` and `semantic_size`.
    """
    K, N = expect("w_out", w_out, ("K", "dim"))
    B, _ = expect("x", x, ("B", K), like=w_out, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    expect("stream", stream, (2 * B, N), like=w_out)
    _expect_final(stream, modulation, w_out, b_out, cfg_alpha, v_last, B)
    return expect_codes(B, w_out, semantic, levels, embeddings, semantic_size)


def _expect_entrance(w_in: Tensor, b_in: Tensor, x: Tensor, stream: Tensor, max_batch: int) -> int:
    """Check the arguments of the input projection and the stream, and return B."""
    N, K = expect("w_in", w_in, ("dim", "K"))
    expect("b_in", b_in, (N,), like=w_in)
    B, _ = expect("x", x, ("B", K), like=w_in, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    expect("stream", stream, (2 * B, N), like=w_in)
    return B


def _expect_final(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, cfg_alpha: Tensor, v_last: Tensor, B: int
) -> None:
    """Check the arguments of :func:`_guided_step`, except `stream` and x."""
    K, N = expect("w_out", w_out, ("K", stream.shape[1]), like=stream)
    expect("b_out", b_out, (K,), like=w_out)
    expect("modulation", modulation, (1 + B, 2 * N), like=w_out, contiguous=False)
    expect("v_last", v_last, (B, K), like=w_out, dtype=torch.float32)
    expect("cfg_alpha", cfg_alpha, (B,), like=w_out, dtype=torch.float32)
