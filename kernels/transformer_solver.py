"""What surrounds the flow head's layers: noise and tokens at the start of a frame, a solver's step, codes at its end.

The velocity's projection and the input projection of the next x, which one block does for one request, are 221 KB each
in the public model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .solver import expect_codes, init_noise, load_state, padded, project_in, project_out, solver_step, write_codes

__all__ = ["flow_finish", "flow_start", "flow_step"]

FLOW_START = LaunchConfigs(
    "flow_start",
    """
    arch         | BLOCK_N  num_warps
    interpreter  | 64       4
    *            | 64       4
    """,
)
# A block has its multiprocessor to itself, and one multiprocessor draws some 64 bytes a cycle: what counts is how many
# are under way. A tile of BLOCK_K whole rows of w_out is 24 KB of bf16 in the public model (32 KB with the columns up
# to a power of two), and three of them fit into the 101,376 bytes of sm_86, 89 and 120.
FLOW_STEP = LaunchConfigs(
    "flow_step",
    """
    arch         dtype N    | BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *     *    | 64       4        4          1
    gfx*         *     *    | 128      4        8          2
    sm_*         fp32  4096 | 64       2        16         4
    sm_*         *     4096 | 128      4        16         4
    sm_*         *     *    | 64       2        16         2
    """,
)


@triton.jit
def _velocity(
    p_y, p_norm, p_w_out, p_alpha, i_b, B, eps,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """The guided velocity of one request, from the last layer's x tokens: fp32 [PAD_K].

    Guidance is linear and so is the projection: combining the two normalised rows first halves the multiply-adds.
    """
    o_n = tl.arange(0, PAD_N)
    m_n = o_n < N
    b_cond = tl.load(p_y + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_uncond = tl.load(p_y + (B + i_b) * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_n, mask=m_n, other=0.0).to(tl.float32)
    alpha = tl.load(p_alpha + i_b)
    b_cond *= alpha * tl.rsqrt(tl.sum(b_cond * b_cond, 0) / N + eps)
    b_uncond *= (1 - alpha) * tl.rsqrt(tl.sum(b_uncond * b_uncond, 0) / N + eps)
    b_y = (b_cond + b_uncond) * b_norm  # [N]
    return project_out(p_w_out, b_y, N, K, PAD_N, PAD_K, BLOCK_K, PIPE)


@triton.jit
def _guided_step(
    p_y, p_norm, p_w_out, p_alpha, p_x, p_last, i_b, B, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """``x += dt * (v + ab2_ratio * (v - v_last))`` in memory, v_last = v, and the new x: fp32 [PAD_K], zeros past K."""
    eps = tl.full([], eps, tl.float32)  # torch.compile passes it as fp64
    b_x, b_last = load_state(p_x, p_last, i_b, K, PAD_K)
    b_v = _velocity(p_y, p_norm, p_w_out, p_alpha, i_b, B, eps, N, K, PAD_N, PAD_K, BLOCK_K, PIPE)
    return solver_step(p_x, p_last, b_x, b_last, b_v, i_b, dt, ab2_ratio, K, PAD_K)


@triton.jit
def _write_time_tokens(p_time, p_tokens, i_b, B, N: tl.constexpr, PAD_N: tl.constexpr):
    """Write a request's t tokens, both branches."""
    o_n = tl.arange(0, PAD_N)
    b_time = tl.load(p_time + o_n, mask=o_n < N, other=0.0)
    tl.store(p_tokens + (2 * B + i_b) * N + o_n, b_time, mask=o_n < N)
    tl.store(p_tokens + (3 * B + i_b) * N + o_n, b_time, mask=o_n < N)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_seed", "p_frame"])
def _flow_start_kernel(
    p_seed, p_frame, p_noise, p_quantiles, p_w_in, p_time, p_x, p_tokens,
    B,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b_x = init_noise(p_seed, p_frame, p_noise, p_quantiles, i_b, K, PAD_K)
    if i_n == 0:
        o_k = tl.arange(0, PAD_K)
        tl.store(p_x + i_b * K + o_k, b_x, mask=o_k < K)
        _write_time_tokens(p_time, p_tokens, i_b, B, N, PAD_N)
    project_in(p_w_in, None, p_tokens, b_x, i_b, i_n * BLOCK_N, B, N, K, PAD_K, BLOCK_N)


def launch_flow_start(
    seed: Tensor | None, frame: Tensor | None, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, time: Tensor,
    x: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Fill `x` and the first 4B rows of `tokens`; the arguments are those of :func:`flow_start`, unchecked."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_START(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | padded(N, K)
    _flow_start_kernel[(B, triton.cdiv(N, constants["BLOCK_N"]))](
        seed, frame, noise, quantiles, w_in, time, x, tokens, B, **constants
    )


@operator(launch_flow_start, mutates=("x", "tokens"))
def flow_start(
    seed: Tensor,
    frame: Tensor,
    noise: Tensor | None,
    quantiles: Tensor,
    w_in: Tensor,
    time: Tensor,
    x: Tensor,
    tokens: Tensor,
    max_batch: int,
) -> None:
    """Begin a frame: x is noise, and the x and t tokens of the first step are written.

    Args:
        seed: int64 [B], a request's own; with `frame` it decides the noise, whatever the batch.
        frame: int64 [B], counted from 0 in each request.
        noise: fp32 [B, K] to begin with instead, or None to draw it.
        quantiles: fp32 [65536], the normal's quantiles at (i + 1/2) / 65536.
        w_in: [dim, K] fp32, bf16 or fp16, the input projection.
        time: [dim], the projected time of the first step.
        x: fp32 [B, K], written: the flow's state.
        tokens: [6B, dim], token-major (row = token * 2B + branch * B + request). The first 4B rows are written, those
            of x and t; those of the hidden state are left alone.
        max_batch: the most requests this is prepared for; B may be any of 1..max_batch.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, or B is not in 1..max_batch.
    """
    B = _expect_entrance(w_in, time, x, tokens, max_batch)
    K = w_in.shape[1]
    expect("seed", seed, (B,), like=w_in, dtype=torch.int64)
    expect("frame", frame, (B,), like=w_in, dtype=torch.int64)
    expect("quantiles", quantiles, (65536,), like=w_in, dtype=torch.float32)
    if noise is not None:
        expect("noise", noise, (B, K), like=w_in, dtype=torch.float32)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha"])
def _flow_step_kernel(
    p_y, p_norm, p_w_out, p_alpha, p_x, p_last, p_w_in, p_time, p_tokens,
    B, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    _write_time_tokens(p_time, p_tokens, i_b, B, N, PAD_N)
    b_x = _guided_step(
        p_y, p_norm, p_w_out, p_alpha, p_x, p_last, i_b, B, eps, dt, ab2_ratio, N, K, PAD_N, PAD_K, BLOCK_K, PIPE
    )
    for n in tl.range(0, N, BLOCK_N, num_stages=PIPE):
        project_in(p_w_in, None, p_tokens, b_x, i_b, n, B, N, K, PAD_K, BLOCK_N)


def launch_flow_step(
    y: Tensor, norm: Tensor, w_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float, ab2_ratio: float,
    x: Tensor, v_last: Tensor, w_in: Tensor, time: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Update `x` and the first 4B rows of `tokens`; the arguments are those of :func:`flow_step`, unchecked."""
    B, (N, K) = x.shape[0], w_in.shape
    constants = FLOW_STEP(N=N, K=K, dtype=w_in.dtype, rows=max_batch) | padded(N, K)
    constants["PIPE"] = constants["num_stages"]
    _flow_step_kernel[(B,)](
        y, norm, w_out, cfg_alpha, x, v_last, w_in, time, tokens, B, eps, dt, ab2_ratio, **constants
    )


@operator(launch_flow_step, mutates=("x", "v_last", "tokens"))
def flow_step(
    y: Tensor,
    norm: Tensor,
    w_out: Tensor,
    eps: float,
    cfg_alpha: Tensor,
    dt: float,
    ab2_ratio: float,
    x: Tensor,
    v_last: Tensor,
    w_in: Tensor,
    time: Tensor,
    tokens: Tensor,
    max_batch: int,
) -> None:
    """A solver's step, ``x += dt * (v + ab2_ratio * (v - v_last))``, and the x and t tokens of the next one.

    The velocity is guided, ``v = a v_cond + (1 - a) v_uncond``; ab2_ratio 0 is Euler's step, see
    ``voxkern.reference.solver.integrate``.

    Args:
        y: [2B or more rows, dim] fp32, bf16 or fp16, what the last layer gives; the first 2B rows are the x tokens,
            the conditional ones first.
        norm: [dim], the final RMSNorm's weight.
        w_out: [K, dim], the velocity's projection.
        eps: added to the mean square.
        cfg_alpha: fp32 [B], strength of the guidance a; 1 is none.
        dt: length of the step.
        ab2_ratio: of the velocity's last change, that is added to it.
        x: fp32 [B, K], the flow's state, updated.
        v_last: fp32 [B, K], the last step's velocity, replaced by this one's; not used where `ab2_ratio` is 0.
        w_in: [dim, K], the input projection.
        time: [dim], the projected time of the next step.
        tokens: [6B, dim], as in :func:`flow_start`: the first 4B rows are written.
        max_batch: the most requests this is prepared for; B may be any of 1..max_batch.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, or B is not in 1..max_batch.
    """
    B = _expect_entrance(w_in, time, x, tokens, max_batch)
    _expect_head(y, norm, w_out, cfg_alpha, v_last, B)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_alpha", "p_semantic"])
def _flow_finish_kernel(
    p_y, p_norm, p_w_out, p_alpha, p_x, p_last, p_semantic, p_embeddings, p_codes, p_next,
    B, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    PAD_N: tl.constexpr, PAD_K: tl.constexpr, PAD_E: tl.constexpr,
    LEVELS: tl.constexpr, SEMANTIC_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_x = _guided_step(
        p_y, p_norm, p_w_out, p_alpha, p_x, p_last, i_b, B, eps, dt, ab2_ratio, N, K, PAD_N, PAD_K, BLOCK_K, PIPE
    )
    write_codes(
        b_x, p_semantic, p_embeddings, p_codes, p_next, i_b, K, E, PAD_K, PAD_E, LEVELS, SEMANTIC_SIZE, BLOCK_K, PIPE
    )


def launch_flow_finish(
    out: tuple[Tensor, Tensor],
    y: Tensor, norm: Tensor, w_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float, ab2_ratio: float,
    x: Tensor, v_last: Tensor, semantic: Tensor, levels: int, embeddings: Tensor | None, semantic_size: int,
    max_batch: int,
) -> None:  # fmt: skip
    """Fill `out`, codes [B, 1 + K] and next [B, E], update `x` and `v_last`; the rest is :func:`flow_finish`'s."""
    codes, following = out
    B, (K, N) = x.shape[0], w_out.shape
    E = following.shape[1]
    constants = FLOW_STEP(N=max(N, E), K=K, dtype=w_out.dtype, rows=max_batch) | padded(N, K)
    constants |= {"E": E, "PAD_E": triton.next_power_of_2(max(E, 1)), "PIPE": constants["num_stages"]}
    constants |= {"LEVELS": levels, "SEMANTIC_SIZE": semantic_size}
    del constants["BLOCK_N"]  # of the input projection, which is not done here
    _flow_finish_kernel[(B,)](
        y, norm, w_out, cfg_alpha, x, v_last, semantic, embeddings, codes, following, B, eps, dt, ab2_ratio, **constants
    )


@operator(launch_flow_finish, mutates=("x", "v_last"))
def flow_finish(
    y: Tensor,
    norm: Tensor,
    w_out: Tensor,
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
    """The last step, its codes, and what they are to the backbone: the sum of their embeddings.

    Args:
        y: as in :func:`flow_step`, and so are the next six.
        norm: [dim].
        w_out: [K, dim].
        eps: added to the mean square.
        cfg_alpha: fp32 [B].
        dt: length of the step.
        ab2_ratio: as there.
        v_last: fp32 [B, K], as there.
        x: fp32 [B, K], updated; what is left in it is not clamped.
        semantic: int64 [B], the semantic codes with the offset of 2; where one is 1 (END) all acoustic codes are 2.
        levels: of an acoustic code: -1 is level 0, +1 is level ``levels - 1``, half rounds to even.
        embeddings: [rows, E]: ``semantic_size + 2`` rows, then ``levels + 2`` for each acoustic codebook. None:
            no sum is made, E = 0.
        semantic_size: codes of the semantic codebook, without the 2 special ones.
        max_batch: the most requests this is prepared for; B may be any of 1..max_batch.

    Returns:
        int64 [B, 1 + K], the codes with the offset of 2; [B, E], summed in fp32 and rounded once.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride, device or size is wrong, or B is not in 1..max_batch.
    """
    K, _ = expect("w_out", w_out, ("K", "dim"))
    B, _ = expect("x", x, ("B", K), like=w_out, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    _expect_head(y, norm, w_out, cfg_alpha, v_last, B)
    return expect_codes(B, w_out, semantic, levels, embeddings, semantic_size)


def _expect_entrance(w_in: Tensor, time: Tensor, x: Tensor, tokens: Tensor, max_batch: int) -> int:
    """Check what is written for the next step, and read for it; B."""
    N, K = expect("w_in", w_in, ("dim", "K"))
    expect("time", time, (N,), like=w_in)
    B, _ = expect("x", x, ("B", K), like=w_in, dtype=torch.float32)
    expect_batch("x", B, 1, max_batch)
    expect("tokens", tokens, (6 * B, N), like=w_in)
    return B


def _expect_head(y: Tensor, norm: Tensor, w_out: Tensor, cfg_alpha: Tensor, v_last: Tensor, B: int) -> None:
    """Check what :func:`_guided_step` reads."""
    K, N = expect("w_out", w_out, ("K", "dim"))
    expect("v_last", v_last, (B, K), like=w_out, dtype=torch.float32)
    rows, _ = expect("y", y, ("rows", N), like=w_out)
    if rows < 2 * B:
        raise ValueError(f"y has {rows} rows but must have 2B = {2 * B} or more")
    expect("norm", norm, (N,), like=w_out)
    expect("cfg_alpha", cfg_alpha, (B,), like=w_out, dtype=torch.float32)
