"""The codec's streaming decoder: dequantisation and causal convolutions on chunks of frames, and their state.

For B requests with T rows each, row = request * T + t::

    codec_dequantise   z = embedding_sum[c] / max(cluster_usage[c], 1e-5) | 2 c_k / (levels - 1) - 1    [B T, dim + K]
    codec_conv         y[t] = sum over i = 0..n of W_i @ x[t - n + i]     [B T, N], x [B T, K], W_i [N, K]
                       x[-n..-1] of a request = conv_state[parity]        the n rows before the chunk, or padding
                       conv_state[1 - parity] = the request's last n rows for the next chunk
    codec_update_state past_frames += new_frames, parity = 1 - parity

where c is the semantic code of a row and c_k are its K acoustic codes. In ``codec_conv``, K is the number of input
channels instead.

A convolution of n + 1 taps is one matrix product over (n + 1) K columns. A block computes BLOCK_M rows by BLOCK_N
columns of y. As in ``linear.py``, which gives the reason, the weight's rows are the first axis of a tile. One more
column of blocks writes the state.

The state is double-buffered. A launch reads one half and writes the other, so that no block reads a value that another
block has overwritten. ``codec_update_state`` flips the parity at the end of a chunk.

A row's bits do not depend on the row's place in the chunk. Audio therefore has the same bits however the frames are
divided into chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs, launch_options
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches

__all__ = ["codec_conv", "codec_dequantise", "codec_update_state"]

PAD_MODES = ("zero", "replicate", "reflect")  # how the rows before a request's first row are filled

# A request has 1 to 8 rows per frame, so up to 200 rows in a chunk of 25 frames. Tiles of 32 rows are a compromise: one
# frame fills only a part of a tile, and 200 rows need seven tiles, each of which reads the weights again. The table's
# fp32 entries also serve the last convolution of a bf16 or fp16 codec, which computes fp32 samples. On sm_120, the
# first and the last convolution spill registers on four warps.
CODEC_CONV = LaunchConfigs(
    "codec_conv",
    """
    arch         dtype | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *     | 16       32       64       4          1
    gfx*         fp32  | 16       32       32       4          2
    gfx*         *     | 32       32       64       4          2
    sm_12?       fp32  | 16       32       32       8          4
    sm_*         fp32  | 16       32       32       4          4
    sm_12?       *     | 32       32       64       8          6
    sm_*         *     | 32       32       64       4          6
    """,
)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["p_codes", "p_new_frames"])
def _codec_dequantise_kernel(
    p_codes, p_new_frames, p_sum, p_usage, p_z, T, scale,
    DIM: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PAD_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_valid = i_t < tl.load(p_new_frames + i_b)  # codes of later frames may be anything, so code 0 is used
    p_code, p_row = p_codes + i_b * (1 + K) * T + i_t, p_z + (i_b * T + i_t) * (DIM + K)
    scale = tl.full([], scale, tl.float32)
    o_d, o_k = tl.arange(0, COLUMNS), tl.arange(0, PAD_K)
    semantic = tl.where(is_valid, tl.load(p_code), 0)
    usage = tl.maximum(tl.load(p_usage + semantic).to(tl.float32), 1e-5)
    b_sum = tl.load(p_sum + semantic * DIM + o_d, mask=o_d < DIM, other=0.0).to(tl.float32)
    tl.store(p_row + o_d, cast(b_sum / usage, p_z.dtype.element_ty), mask=o_d < DIM)
    b_code = tl.where(is_valid, tl.load(p_code + (1 + o_k).to(tl.int64) * T, mask=o_k < K, other=0), 0)
    tl.store(p_row + DIM + o_k, cast(b_code.to(tl.float32) * scale - 1.0, p_z.dtype.element_ty), mask=o_k < K)


def launch_codec_dequantise(
    out: Tensor, codes: Tensor, new_frames: Tensor, embedding_sum: Tensor, cluster_usage: Tensor, levels: int
) -> None:
    """Run :func:`codec_dequantise` into `out`, contiguous [B T, dim + K], without checking the arguments."""
    (B, K, T), dim = codes.shape, embedding_sum.shape[1]
    constants = launch_options() | {"DIM": dim, "K": K - 1, "num_warps": 4}
    constants |= {"COLUMNS": triton.next_power_of_2(dim), "PAD_K": triton.next_power_of_2(K - 1)}
    _codec_dequantise_kernel[(T, B)](
        codes, new_frames, embedding_sum, cluster_usage, out, T, 2 / (levels - 1), **constants
    )


@operator(launch_codec_dequantise)
def codec_dequantise(
    codes: Tensor, new_frames: Tensor, embedding_sum: Tensor, cluster_usage: Tensor, levels: int
) -> Tensor:
    """Turn codes into latents: each semantic code into its vector, and each acoustic code into a number in -1..1.

    The vectors of the semantic codes are ``embedding_sum / max(cluster_usage, 1e-5)``.

    Args:
        codes: int64 [B, 1 + K, T] without the offset of 2, the semantic code first. The codes of a request's first
            `new_frames` frames must be in range, which is not checked.
        new_frames: int64 [B], the number of frames of each request, 0..T. The codes of later frames are ignored.
        embedding_sum: [size, dim] fp32, bf16 or fp16. Row c is the moving average, over training, of the sum of the
            vectors assigned to semantic code c. Divided by ``cluster_usage[c]``, it is the code's vector.
        cluster_usage: [size]. Element c is the moving average of the number of vectors assigned to code c.
        levels: the number of levels of an acoustic code.

    Returns:
        [B T, dim + K] in the dtype of `embedding_sum`, row = request * T + t.
    """
    B, K, T = expect("codes", codes, ("B", "1 + K", "T"), dtype=torch.int64)
    expect("new_frames", new_frames, (B,), like=codes)
    size, dim = expect("embedding_sum", embedding_sum, ("size", "dim"))
    expect("cluster_usage", cluster_usage, (size,), like=embedding_sum)
    return embedding_sum.new_empty(B * T, dim + K - 1)


@triton.jit
def _load_rows(
    p_x, p_old, i_b, b_t, b_fresh, o_c, m, T, C: tl.constexpr, N_PAST: tl.constexpr, PAD_MODE: tl.constexpr
):  # fmt: skip
    """Load some columns of R rows, [R, columns].

    A row before the chunk comes from `p_old`, or is padding if the chunk is the request's first.

    Args:
        p_x: the chunk, [B T, C].
        p_old: the rows before the chunk, [B, N_PAST, C].
        i_b: int64 [R] or scalar, the request of each row.
        b_t: int [R], row numbers within the chunk; rows before the chunk are negative.
        b_fresh: bool [R], whether the chunk is the request's first.
        o_c: int [columns], the columns.
        m: bool [R, columns], the elements to load; others are 0.
        T: rows of a request in the chunk.
        C: columns of `p_x`.
        N_PAST: rows of a request that are kept between chunks.
        PAD_MODE: an index of PAD_MODES.
    """
    b_padded = b_t * 0
    if PAD_MODE == 2:
        b_padded = -b_t
    b_row = tl.where(b_t < 0, b_padded, b_t)
    m_old = (b_t < 0) & (b_fresh == 0)
    m_new = b_t == b_t
    if PAD_MODE == 0:
        m_new = b_t >= 0
    # two loads, because Triton 3.6 cannot compile a choice between pointers of two tensors for AMD
    p_new_row, p_old_row = p_x + (i_b * T + b_row) * C, p_old + (i_b * N_PAST + N_PAST + b_t) * C
    b_new = tl.load(p_new_row[:, None] + o_c[None, :], mask=m & (m_new & (m_old == 0))[:, None], other=0.0)
    b_old = tl.load(p_old_row[:, None] + o_c[None, :], mask=m & m_old[:, None], other=0.0)
    return tl.where(m_old[:, None], b_old, b_new)


@triton.jit(
    do_not_specialize=["B", "T", "rate"],
    do_not_specialize_on_alignment=["p_past", "p_new_frames", "p_parity"],
)
def _codec_conv_kernel(
    p_x, p_w, p_state, p_past, p_new_frames, p_parity, p_y,
    B, T, rate,
    N: tl.constexpr, K: tl.constexpr, N_PAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PAD_MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_rows(p_w, o_n, N, 0, (N_PAST + 1) * K, OVERLAP)
    wait_for_launches(OVERLAP)
    parity = tl.load(p_parity).to(tl.int64)
    p_old, p_new = p_state + parity * B * N_PAST * K, p_state + (1 - parity) * B * N_PAST * K
    if i_n == tl.num_programs(1) - 1:  # the last column of blocks writes the rows that the next chunk needs
        o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        for i in range(i_m, B, tl.num_programs(0)):
            i_b = tl.full([], i, tl.int64)
            b_fresh = tl.load(p_past + i_b) + o_r * 0 == 0
            b_t = tl.load(p_new_frames + i_b) * rate - N_PAST + o_r
            for c in range(0, K, COLUMNS):
                m_c = (o_r < N_PAST)[:, None] & (c + o_c < K)[None, :]
                b_x = _load_rows(p_x, p_old, i_b, b_t, b_fresh, c + o_c, m_c, T, K, N_PAST, PAD_MODE)
                tl.store(p_new + (i_b * N_PAST + o_r)[:, None] * K + (c + o_c)[None, :], b_x, mask=m_c)
        return
    m_m, m_n, o_k = o_m < B * T, o_n < N, tl.arange(0, BLOCK_K)
    i_b, b_t = o_m // T, o_m % T
    b_fresh = tl.load(p_past + i_b, mask=m_m, other=0) == 0
    valid = tl.load(p_new_frames + i_b, mask=m_m, other=0) * rate
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(0, (N_PAST + 1) * STEPS):
        tap = step // STEPS
        k = (step - tap * STEPS) * BLOCK_K
        m_k = k + o_k < K
        p_w_tile = p_w + o_n[:, None] * ((N_PAST + 1) * K) + (tap * K + k + o_k)[None, :]
        b_w = tl.load(p_w_tile, mask=m_n[:, None] & m_k[None, :], other=0.0)
        m_x = m_m[:, None] & m_k[None, :]
        b_x = _load_rows(p_x, p_old, i_b, b_t - N_PAST + tap, b_fresh, k + o_k, m_x, T, K, N_PAST, PAD_MODE)  # [M, K]
        b_acc = dot(b_w, tl.trans(b_x.to(b_w.dtype)), b_acc)  # [N, M]
    b_acc = tl.where((b_t < valid)[None, :], b_acc, 0.0)
    tl.store(p_y + o_m[None, :] * N + o_n[:, None], cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_codec_conv(
    y: Tensor, x: Tensor, weight: Tensor, conv_state: Tensor, past_frames: Tensor, new_frames: Tensor, parity: Tensor,
    rate: int, pad_mode: str,
) -> None:  # fmt: skip
    """Run :func:`codec_conv` without checking the arguments."""
    (M, K), N, B, n_past = x.shape, weight.shape[0], conv_state.shape[1], conv_state.shape[2]
    constants = CODEC_CONV(N=N, K=K, dtype=weight.dtype, rows=1) | {"N": N, "K": K}
    constants |= {"N_PAST": n_past, "ROWS": triton.next_power_of_2(n_past), "PAD_MODE": PAD_MODES.index(pad_mode)}
    constants["COLUMNS"] = min(512, triton.next_power_of_2(K))
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]) + 1)
    _codec_conv_kernel[grid](x, weight, conv_state, past_frames, new_frames, parity, y, B, M // B, rate, **constants)


@operator(launch_codec_conv, mutates=("y", "conv_state"))
def codec_conv(
    y: Tensor, x: Tensor, weight: Tensor, conv_state: Tensor, past_frames: Tensor, new_frames: Tensor, parity: Tensor,
    rate: int, pad_mode: str,
) -> None:  # fmt: skip
    """Compute a causal convolution of a chunk: multiply a weight by each row and the n rows before that row.

    A transposed convolution of stride s is such a convolution with N = s * channels: row t of y holds s output rows,
    side by side.

    Args:
        y: [B T, N], written. The rows after a request's first `new_frames * rate` rows are zeros.
        x: [B T, K] fp32, bf16 or fp16.
        weight: [N, (n + 1) K], the taps side by side, the oldest first; in x's dtype or in fp32. `y` has the dtype of
            `weight`.
        conv_state: [2, B, n, K]. Index `parity` holds the n rows before the chunk; the last n rows are written to the
            other index, for the next chunk.
        past_frames: int64 [B], frames decoded before the chunk. Where `past_frames` is 0, `pad_mode` decides the
            rows before the chunk.
        new_frames: int64 [B], frames of the chunk, 0..T / rate.
        parity: int32 [1], 0 or 1.
        rate: rows per frame.
        pad_mode: "zero", "replicate" (the first row), or "reflect" (about the first row; needs a rate above n).

    Raises:
        ValueError: B is not in 1..64, T is not a multiple of `rate`, `pad_mode` is unknown, or `rate` is not above n
            and `pad_mode` is "reflect".
    """
    M, K = expect("x", x, ("B T", "K"))
    _, B, n, _ = expect("conv_state", conv_state, (2, "B", "n", K), like=x)
    expect_chunk("x", M, B, rate, past_frames, new_frames, parity)
    like = x if weight.dtype == x.dtype else weight
    expect("weight", weight, ("N", (n + 1) * K), like=like, dtype=like.dtype if like is x else torch.float32)
    expect("y", y, (M, weight.shape[0]), like=weight)
    if pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode must be one of {', '.join(PAD_MODES)}, got {pad_mode!r}")
    if pad_mode == "reflect" and rate <= n:
        raise ValueError(f"rate is {rate} but must be more than {n}, the number of rows reflected about the first row")


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_new_frames", "p_past", "p_parity"])
def _codec_update_state_kernel(
    p_new_frames, p_past, p_parity, B, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    o_b = tl.arange(0, ROWS)
    b_past = tl.load(p_past + o_b, mask=o_b < B, other=0) + tl.load(p_new_frames + o_b, mask=o_b < B, other=0)
    tl.store(p_past + o_b, b_past, mask=o_b < B)
    tl.store(p_parity, 1 - tl.load(p_parity))


def launch_codec_update_state(new_frames: Tensor, past_frames: Tensor, parity: Tensor) -> None:
    """Run :func:`codec_update_state` without checking the arguments."""
    constants = launch_options() | {"ROWS": 64, "num_warps": 1}
    _codec_update_state_kernel[(1,)](new_frames, past_frames, parity, len(past_frames), **constants)


@operator(launch_codec_update_state, mutates=("past_frames", "parity"))
def codec_update_state(new_frames: Tensor, past_frames: Tensor, parity: Tensor) -> None:
    """Finish a chunk: add its frames to `past_frames`, and flip the parity.

    Args:
        new_frames: int64 [B], frames of the chunk.
        past_frames: int64 [B], frames decoded before the chunk, updated.
        parity: int32 [1], 0 or 1, updated.

    Raises:
        ValueError: B is not in 1..64.
    """
    (B,) = expect("past_frames", past_frames, ("B",), dtype=torch.int64)
    expect_batch("past_frames", B, 1, 64)
    expect("new_frames", new_frames, (B,), like=past_frames)
    expect("parity", parity, (1,), like=past_frames, dtype=torch.int32)


def expect_chunk(
    name: str, rows: int, B: int, rate: int, past_frames: Tensor, new_frames: Tensor, parity: Tensor
) -> None:
    """Check that a chunk has whole frames for each of B requests, and that the state tensors are for B requests.

    Args:
        name: the argument that holds the chunk, for the error message.
        rows: rows of the chunk, a multiple of B * rate, not 0.
        B: the number of requests, 1..64, which the caller read from the shape of its state tensor.
        rate: rows per frame, 1 or more.
        past_frames: int64 [B].
        new_frames: int64 [B].
        parity: int32 [1].

    Raises:
        ValueError: `rows` is 0 or no multiple of B * rate, `rate` is below 1, or B is not in 1..64.
    """
    expect("past_frames", past_frames, (B,), dtype=torch.int64)
    expect_batch("past_frames", B, 1, 64)
    expect("new_frames", new_frames, (B,), like=past_frames)
    expect("parity", parity, (1,), like=past_frames, dtype=torch.int32)
    if rate < 1 or rows % (B * rate) or not rows:
        raise ValueError(
            f"{name} has {rows} rows, but each of {B} requests must have 1 or more frames of {rate} rows (rate >= 1)"
        )
