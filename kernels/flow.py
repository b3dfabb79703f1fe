"""The launches of a frame around the layers of a flow head: start, solver steps, and the last step with its codes.

The device functions are in ``solver.py``. There are B requests and K acoustic codebooks. The velocity network, a
transformer or an MLP, has width dim. For classifier-free guidance, each request has two branches: branch 0 (cond) has
the backbone's hidden state h, and branch 1 (uncond) has zeros in its place::

    flow_start    x = noise                                        fp32 [B, K]
                  x tokens = w_in @ x + b_in                       [2B, dim], equal in both branches
                  t tokens = time                                  [2B, dim], only for a transformer
    (layers)      y                                                [2B, dim], y_cond and then y_uncond
    flow_step     n = a * norm(y_cond) + (1 - a) * norm(y_uncond)  [B, dim], a = cfg_alpha
                  v = w_out @ n + b_out                            [B, K]
                  x = x + dt * (v + ab2_ratio * (v - v_last)), v_last = v
                  x and t tokens of the next step, as in flow_start
    flow_finish   the last step, then codes [B, 1 + K] and the sum of their embeddings [B, E]

A transformer ends in an RMSNorm, y / sqrt(mean(y^2) + eps) * weight. Its tokens are stored as [6B, dim], row = token *
2B + branch * B + request. Token 0 is x, 1 is t and 2 is h.

An MLP ends in a modulated layer norm, (y - mean) / sqrt(variance + eps) * (1 + scale) + shift. It has only x tokens.
These tokens are its residual stream, and after the last layer they are its output y.

One block computes a whole step of one request, so that no block waits for another. The block reads both projections,
221 KB each in the public model. flow_start needs no velocity, so several blocks serve one request, each with some rows
of w_in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, wait_for_launches
from .solver import guided_step, init_noise, project_in, write_codes, write_time_tokens

__all__ = ["flow_finish", "flow_start", "flow_step"]

FLOW_START = LaunchConfigs(
    "flow_start",
    """
    arch         | BLOCK_N  num_warps
    interpreter  | 64       4
    *            | 64       4
    """,
)
# A block runs alone on a multiprocessor, which can load some 64 bytes per cycle. The block reaches this rate only with
# enough bytes in flight. In the public model, a tile of four whole rows of w_out has 24 KB in bf16, and 32 KB with the
# columns padded to a power of two. Four stages keep three such tiles in shared memory. These fit into 101,376
# bytes, the limit of a block on sm_86, sm_89 and sm_120. sm_80, sm_90 and sm_100 have more, and so more stages.
# On AMD GPUs, the next tile of w_out is held in registers. A tile of 16 rows loads 96 KB in bf16. In fp16, a kernel
# with 16 rows spills registers, so a tile has 8 rows.
FLOW_STEP = LaunchConfigs(
    "flow_step",
    """
    arch         dtype N    | BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *     *    | 64       4        4          1
    gfx*         fp32  *    | 128      4        8          2
    gfx*         fp16  *    | 128      8        8          2
    gfx*         *     *    | 128      16       16         2
    sm_*         fp32  4096 | 64       2        16         4
    sm_80        *     4096 | 128      4        16         6
    sm_90        *     4096 | 128      4        16         8
    sm_10?       *     4096 | 128      4        16         8
    sm_*         *     4096 | 128      4        16         4
    sm_*         *     *    | 64       2        16         2
    """,
)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_seed", "p_frame"])
def _flow_start_kernel(
    p_seed, p_frame, p_noise, p_quantiles, p_w_in, p_b_in, p_time, p_x, p_tokens,
    B,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b_x = init_noise(p_seed, p_frame, p_noise, p_quantiles, i_b, K, PAD_K)
    if i_n == 0:
        o_k = tl.arange(0, PAD_K)
        tl.store(p_x + i_b * K + o_k, b_x, mask=o_k < K)
        if p_time is not None:
            write_time_tokens(p_time, p_tokens, i_b, B, N, PAD_N)
    project_in(p_w_in, p_b_in, p_tokens, b_x, i_b, i_n * BLOCK_N, B, N, K, PAD_K, BLOCK_N)


def launch_flow_start(
    seed: Tensor | None, frame: Tensor | None, noise: Tensor | None, quantiles: Tensor, w_in: Tensor,
    b_in: Tensor | None, time: Tensor | None, x: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`flow_start` without checking the arguments; `seed` and `frame` may be None if `noise` is given."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_START(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | _padded(N, K)
    _flow_start_kernel[(B, triton.cdiv(N, constants["BLOCK_N"]))](
        seed, frame, noise, quantiles, w_in, b_in, time, x, tokens, B, **constants
    )


@operator(launch_flow_start, mutates=("x", "tokens"))
def flow_start(
    seed: Tensor,
    frame: Tensor,
    noise: Tensor | None,
    quantiles: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    time: Tensor | None,
    x: Tensor,
    tokens: Tensor,
    max_batch: int,
) -> None:
    """Begin a frame: set x to noise, and write the x and t tokens of the first step.

    Args:
        seed: int64 [B], one seed per request. A request's noise depends only on the request's seed and frame.
        frame: int64 [B], the number of each request's frame, counted from 0.
        noise: fp32 [B, K], the initial state, or None to draw it from `seed` and `frame`.
        quantiles: fp32 [65536], the quantiles of the standard normal at (i + 1/2) / 65536.
        w_in: [dim, K] fp32, bf16 or fp16, the input projection.
        b_in: [dim], the bias of the input projection, or None for 0.
        time: [dim], the projected time of the first step, or None if the network has no t tokens.
        x: fp32 [B, K], the flow's state, written.
        tokens: [6B, dim], token-major (row = token * 2B + branch * B + request). The first 4B rows, the x and t tokens,
            are written. The tokens of the hidden state are left unchanged. Without `time`, [2B, dim], all written.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Raises:
        ValueError: B is not in 1..max_batch, or `max_batch` is not in 1..64.
    """
    B, K = _expect_entrance(w_in, b_in, time, x, tokens, max_batch)
    expect("seed", seed, (B,), like=w_in, dtype=torch.int64)
    expect("frame", frame, (B,), like=w_in, dtype=torch.int64)
    expect("quantiles", quantiles, (65536,), like=w_in, dtype=torch.float32)
    if noise is not None:
        expect("noise", noise, (B, K), like=w_in, dtype=torch.float32)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha"])
def _flow_step_kernel(
    p_y, p_norm, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, p_w_in, p_b_in, p_time, p_tokens,
    B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_b = tl.program_id(0).to(tl.int64)
    if p_time is not None:
        write_time_tokens(p_time, p_tokens, i_b, B, N, PAD_N)
    b_x = guided_step(
        p_y, p_norm, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
        N, K, PAD_N, PAD_K, BLOCK_K, PIPE,
    )  # fmt: skip
    if p_time is None:
        tl.debug_barrier()  # y may be the tokens themselves: all warps must have read y before its rows are overwritten
    for n in tl.range(0, N, BLOCK_N, num_stages=PIPE):
        project_in(p_w_in, p_b_in, p_tokens, b_x, i_b, n, B, N, K, PAD_K, BLOCK_N)


def launch_flow_step(
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, eps: float,
    cfg_alpha: Tensor, dt: float, ab2_ratio: float, x: Tensor, v_last: Tensor, w_in: Tensor, b_in: Tensor | None,
    time: Tensor | None, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`flow_step` without checking the arguments."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_STEP(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | _padded(N, K)
    constants["PIPE"] = constants["num_stages"]
    _flow_step_kernel[(B,)](
        y, norm, modulation, w_out, b_out, cfg_alpha, x, v_last, w_in, b_in, time, tokens,
        B, _row_stride(modulation), eps, dt, ab2_ratio, **constants,
    )  # fmt: skip


@operator(launch_flow_step, mutates=("x", "v_last", "tokens"))
def flow_step(
    y: Tensor,
    norm: Tensor | None,
    modulation: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    eps: float,
    cfg_alpha: Tensor,
    dt: float,
    ab2_ratio: float,
    x: Tensor,
    v_last: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    time: Tensor | None,
    tokens: Tensor,
    max_batch: int,
) -> None:
    """Run a solver step, ``x += dt * (v + ab2_ratio * (v - v_last))``, and write the x and t tokens of the next step.

    Guidance combines two velocities: ``v = a * v_cond + (1 - a) * v_uncond``. With an `ab2_ratio` of 0, the step is
    Euler's; see ``voxkern.reference.solver.integrate``.

    Args:
        y: [2B or more, dim] fp32, bf16 or fp16, the output of the last layer. The first 2B rows are the x tokens, and
            among them the B rows of branch 0 (with h) come first.
        norm: [dim], the weight of the final RMSNorm, or None for a layer norm with `modulation`.
        modulation: [1 + B, 2 dim], shift | scale of the final layer norm, or None for RMSNorm; only its last dimension
            must be contiguous. Row 0 belongs to branch 1 (without h) of all requests. Row 1 + i belongs to branch 0 of
            request i.
        w_out: [K, dim], the projection of the velocity.
        b_out: [K], the bias of that projection, or None for 0.
        eps: added to the mean square or the variance.
        cfg_alpha: fp32 [B], the strength a of the guidance; 1 means no guidance.
        dt: the length of the step.
        ab2_ratio: the factor on the change of the velocity since the previous step.
        x: fp32 [B, K], the flow's state, updated.
        v_last: fp32 [B, K], the velocity of the previous step, replaced by this step's velocity. If `ab2_ratio` is
            0, the velocity of the previous step is not used.
        w_in: [dim, K], the input projection.
        b_in: [dim], the bias of the input projection, or None for 0.
        time: [dim], the projected time of the next step, or None if the network has no t tokens.
        tokens: the x and t tokens, written as in :func:`flow_start`. Without `time`, `tokens` may be `y` itself.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Raises:
        ValueError: B is not in 1..max_batch, `max_batch` is not in 1..64, or `norm` and `modulation` are both given or
            both None.
    """
    B, _ = _expect_entrance(w_in, b_in, time, x, tokens, max_batch)
    _expect_exit(y, norm, modulation, w_out, b_out, cfg_alpha, v_last, B)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha", "p_semantic"])
def _flow_finish_kernel(
    p_y, p_norm, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, p_semantic, p_embeddings, p_codes, p_next,
    B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    PAD_N: tl.constexpr, PAD_K: tl.constexpr, PAD_E: tl.constexpr,
    LEVELS: tl.constexpr, SEMANTIC_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_b = tl.program_id(0).to(tl.int64)
    b_x = guided_step(
        p_y, p_norm, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
        N, K, PAD_N, PAD_K, BLOCK_K, PIPE,
    )  # fmt: skip
    write_codes(
        b_x, p_semantic, p_embeddings, p_codes, p_next, i_b, K, E, PAD_K, PAD_E, LEVELS, SEMANTIC_SIZE, BLOCK_K, PIPE
    )


def launch_flow_finish(
    out: tuple[Tensor, Tensor],
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, eps: float,
    cfg_alpha: Tensor, dt: float, ab2_ratio: float, x: Tensor, v_last: Tensor, semantic: Tensor, levels: int,
    embeddings: Tensor | None, semantic_size: int, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`flow_finish` into `out`, codes [B, 1 + K] and next [B, E], without checking the arguments."""
    codes, next_embedding = out
    B, (K, N), E = x.shape[0], w_out.shape, next_embedding.shape[1]
    constants = FLOW_STEP(N=max(N, E), K=K, dtype=w_out.dtype, rows=max_batch) | _padded(N, K)
    constants |= {"E": E, "PAD_E": triton.next_power_of_2(max(E, 1)), "PIPE": constants["num_stages"]}
    constants |= {"LEVELS": levels, "SEMANTIC_SIZE": semantic_size}
    del constants["BLOCK_N"]  # a size of the input projection, which this kernel does not compute
    _flow_finish_kernel[(B,)](
        y, norm, modulation, w_out, b_out, cfg_alpha, x, v_last, semantic, embeddings, codes, next_embedding,
        B, _row_stride(modulation), eps, dt, ab2_ratio, **constants,
    )  # fmt: skip


@operator(launch_flow_finish, mutates=("x", "v_last"))
def flow_finish(
    y: Tensor,
    norm: Tensor | None,
    modulation: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
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

    The sum is the backbone's next input. The arguments up to `v_last` are those of :func:`flow_step`.

    Args:
        y: [2B or more, dim], the output of the last layer.
        norm: [dim], the weight of the final RMSNorm, or None.
        modulation: [1 + B, 2 dim], shift | scale of the final layer norm, or None.
        w_out: [K, dim], the projection of the velocity.
        b_out: [K], the bias of that projection, or None for 0.
        eps: added to the mean square or the variance.
        cfg_alpha: fp32 [B], the strength of the guidance.
        dt: the length of the step.
        ab2_ratio: the factor on the change of the velocity since the previous step.
        x: fp32 [B, K], the flow's state, updated and not clamped.
        v_last: fp32 [B, K], the velocity of the previous step, replaced by this step's velocity.
        semantic: int64 [B], the semantic codes with the offset of 2. For a semantic code of 1 (END), all acoustic codes
            of the request are 2. NOT_FINITE (-1) marks a frame that has NaN or infinity.
        levels: the number of levels of an acoustic code. x = -1 is level 0, and x = 1 is level ``levels - 1``. A value
            halfway between two levels rounds to the even level.
        embeddings: [rows, E]: ``semantic_size + 2`` rows, then ``levels + 2`` rows for each acoustic codebook. With
            None, no sum is computed, and E = 0.
        semantic_size: the number of codes in the semantic codebook, without the 2 special codes.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Returns:
        The codes with the offset of 2, int64 [B, 1 + K], and the sum of their embeddings, [B, E], summed in fp32 and
        rounded once. If the new `x` of a request has NaN or infinity, its semantic code is NOT_FINITE. The other
        results of a request with NOT_FINITE mean nothing, but its acoustic codes are in range.

    Raises:
        ValueError: as in :func:`flow_step`, or `embeddings` has too few rows for `levels` and `semantic_size`.
    """
    K, _ = expect("w_out", w_out, ("K", "dim"))
    B, _ = expect("x", x, ("B", K), like=w_out, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    _expect_exit(y, norm, modulation, w_out, b_out, cfg_alpha, v_last, B)
    return _expect_codes(B, w_out, semantic, levels, embeddings, semantic_size)


def _padded(N: int, K: int) -> dict[str, int]:
    """Return the kernel constants N, K, PAD_N and PAD_K.

    PAD_N and PAD_K are N and K, rounded up to powers of two. PAD_K is at least 4, because noise is drawn for four
    codebooks at once.
    """
    return {"N": N, "K": K, "PAD_N": triton.next_power_of_2(N), "PAD_K": max(4, triton.next_power_of_2(K))}


def _row_stride(modulation: Tensor | None) -> int:
    return 0 if modulation is None else modulation.stride(0)


def _expect_entrance(
    w_in: Tensor, b_in: Tensor | None, time: Tensor | None, x: Tensor, tokens: Tensor, max_batch: int
) -> tuple[int, int]:
    """Check the arguments of the input projection and the tokens, and return B and K."""
    N, K = expect("w_in", w_in, ("dim", "K"))
    for name, vector in (("b_in", b_in), ("time", time)):
        if vector is not None:
            expect(name, vector, (N,), like=w_in)
    B, _ = expect("x", x, ("B", K), like=w_in, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    expect("tokens", tokens, (2 * B if time is None else 6 * B, N), like=w_in)
    return B, K


def _expect_exit(
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, cfg_alpha: Tensor,
    v_last: Tensor, B: int,
) -> None:  # fmt: skip
    """Check the arguments of a guided step, except x."""
    K, N = expect("w_out", w_out, ("K", "dim"))
    rows, _ = expect("y", y, ("rows", N), like=w_out)
    if rows < 2 * B:
        raise ValueError(f"y has {rows} rows but must have 2B = {2 * B} or more")
    if (norm is None) == (modulation is None):
        raise ValueError("norm and modulation are both given or both None, but exactly one must be given")
    if norm is not None:
        expect("norm", norm, (N,), like=w_out)
    if modulation is not None:
        expect("modulation", modulation, (1 + B, 2 * N), like=w_out, contiguous=False)
    if b_out is not None:
        expect("b_out", b_out, (K,), like=w_out)
    expect("v_last", v_last, (B, K), like=w_out, dtype=torch.float32)
    expect("cfg_alpha", cfg_alpha, (B,), like=w_out, dtype=torch.float32)


def _expect_codes(
    B: int, w_out: Tensor, semantic: Tensor, levels: int, embeddings: Tensor | None, semantic_size: int
) -> tuple[Tensor, Tensor]:
    """Check the arguments of :func:`write_codes`, and allocate its results.

    Args:
        B: requests.
        w_out: [K, dim], the projection of the velocity, with the dtype and device of the embeddings.
        semantic: int64 [B], semantic codes with the offset of 2.
        levels: the number of levels of an acoustic code, 2 or more.
        embeddings: [rows, E], or None.
        semantic_size: the number of codes in the semantic codebook, without the 2 special codes, 1 or more.

    Returns:
        Two uninitialised tensors: the codes, int64 [B, 1 + K], and the sums of embeddings, [B, E], where E = 0 if
        `embeddings` is None.

    Raises:
        ValueError: `embeddings` has too few rows for all codes, or `levels` or `semantic_size` is too small.
    """
    K = len(w_out)
    for name, value, low in (("levels", levels, 2), ("semantic_size", semantic_size, 1)):
        if value < low:
            raise ValueError(f"{name} is {value} but must be {low} or more")
    expect("semantic", semantic, (B,), like=w_out, dtype=torch.int64)
    codes = w_out.new_empty((B, 1 + K), dtype=torch.int64)
    if embeddings is None:
        return codes, w_out.new_empty(B, 0)
    rows, E = expect("embeddings", embeddings, ("rows", "E"), like=w_out)
    least = semantic_size + 2 + K * (levels + 2)
    if rows < least:
        raise ValueError(
            f"embeddings has {rows} rows but must have {least} or more: semantic_size + 2 = {semantic_size + 2} for "
            f"semantic codes, and K * (levels + 2) = {K * (levels + 2)} for acoustic codes"
        )
    return codes, w_out.new_empty(B, E)
