"""Routing for a mixture of experts: each token's experts and weights, and all (token, expert) pairs sorted by expert.

The experts form groups of equal size. A token may use only the experts of its best groups, see `n_groups` and
`n_groups_per_tok` in :func:`moe_route`. From logits [M, E] of M tokens and E experts, ``moe_route`` computes::

    scores  = softmax(logits) or sigmoid(logits)         [M, E]
    order   = logits, or scores + bias                   [M, E], -inf outside the token's best groups
    ids     = top k of order | E, E + 1, ..              [M, P], P = k + n_shared; the last are the shared experts
    weights = scale * scores[ids] | 1, 1, ..             [M, P], the first k may be divided by their sum before `scale`

In the choice of groups and experts, NaN and -inf count as the lowest fp32 number. So the ids of a token always differ
and are in range. The weights are computed from the unchanged scores, so a score of NaN gives a weight of NaN. The pairs
are then sorted::

    pair    = token * P + place                          a token and one of its P places
    pairs   = all pairs, sorted by expert, then token    [M * P]
    tiles   = (expert, first, end)                       [T, 3]: pairs[first:end], at most tile_rows, have this expert

A block routes ROWS tokens and holds all E logits of each token in registers. If ROWS is at least `max_rows`, one block
routes all tokens, and also writes pairs and tiles. Otherwise a second launch, of one block, writes pairs and tiles,
because the index of a pair in `pairs` depends on all tokens.

The launches that compute the experts run over the tiles, and their grid must be known before the routing has run. T is
therefore the most tiles that M tokens can make, and unused tiles are filled with -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import LaunchConfigs
from .operator import expect, operator
from .overlap import OFF, wait_for_launches

__all__ = ["choose_tile_rows", "moe_route", "tile_count"]

# NaN and -inf count as this value in the choice of groups and experts, so that only excluded experts have -inf.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

# For few rows, one block routes all tokens, and writes pairs and tiles in the same launch. With 32 logits per thread,
# the kernel takes some 220 registers. With more warps, the kernel spills 8 bytes on some architectures, although each
# thread holds fewer logits. A block of 64 rows with 256 experts spills with any number of warps.
# For many rows, each block routes 16 rows, and a second launch writes pairs and tiles.
MOE_ROUTE = LaunchConfigs(
    "moe_route",
    """
    rows  N    | ROWS  num_warps  num_stages
    8     *    | 8     4          1
    16    *    | 16    4          1
    32    128  | 32    4          1
    32    256  | 32    8          1
    64    128  | 64    8          1
    *     128  | 16    8          1
    *     *    | 16    16         1
    """,
)

# Here ROWS is the most pairs in a tile, not the tokens of a block as in MOE_ROUTE. The table chooses ROWS by `rows`,
# the number of tokens per expert that the tiles are made for. At decode, `rows` is `max_rows`. On a GPU in bf16 and
# fp16, one tile then holds all tokens of an expert, up to 64, and the expert's weights are read once. At prefill,
# `rows` is twice the mean number of tokens per expert, so that the weights of an expert with many tokens are read only
# a few times.
# On NVIDIA GPUs, fp32 products run on the ordinary FP32 units, which read their operands from registers, so larger fp32
# tiles spill.
MOE_TILE_ROWS = LaunchConfigs(
    "tile_rows",
    """
    arch         dtype  rows | ROWS
    interpreter  *      *    | 16
    *            fp32   *    | 16
    gfx*         *      16   | 16
    gfx*         *      *    | 64
    sm_*         *      8    | 8
    sm_*         *      16   | 16
    sm_*         *      32   | 32
    sm_*         *      *    | 64
    """,
)


@triton.jit
def _comparable(b_values):
    """Return `b_values` with LOWEST in place of NaN and -inf."""
    return tl.where(b_values > LOWEST, b_values, LOWEST)


@triton.jit
def _open_groups(
    b_order, b_ranked, o_e, m_e,
    ROWS: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS_PER_TOK: tl.constexpr,
):  # fmt: skip
    """Return `b_order` [M, E], with -inf in each row for the experts outside that token's best groups.

    A group's score is the sum of its two best values in `b_ranked` [M, E], or its only value. `b_ranked` must come from
    :func:`_comparable`, so it has no NaN and no -inf. The sum of two values of LOWEST is -inf; it counts as LOWEST too.
    """
    SIZE: tl.constexpr = E // N_GROUPS
    o_g = o_e // SIZE
    b_sum = tl.full([ROWS, E_PAD], -float("inf"), tl.float32)  # each element is the score of its expert's group
    for g in range(N_GROUPS):
        m_g = (m_e & (o_g == g))[None, :]
        b_left = tl.where(m_g, b_ranked, -float("inf"))
        b_best = tl.max(b_left, 1)
        if SIZE > 1:
            b_at = tl.min(tl.where(b_left == b_best[:, None], o_e[None, :], E_PAD), 1)
            b_best += tl.max(tl.where(o_e[None, :] == b_at[:, None], -float("inf"), b_left), 1)
        b_sum = tl.where(m_g, b_best[:, None], b_sum)
    b_sum = tl.where(m_e[None, :], _comparable(b_sum), -float("inf"))
    m_open = tl.full([ROWS, E_PAD], 0, tl.int1)
    for _ in range(GROUPS_PER_TOK):
        b_at = tl.min(tl.where(b_sum == tl.max(b_sum, 1)[:, None], o_g[None, :], N_GROUPS), 1)
        m_this = o_g[None, :] == b_at[:, None]
        m_open = m_open | m_this
        b_sum = tl.where(m_this, -float("inf"), b_sum)
    return tl.where(m_open, b_order, -float("inf"))


@triton.jit
def _write_tiles(
    p_tiles, b_count, o_e, M, T,
    TOP_K: tl.constexpr, N_SHARED: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write all T tiles, and return the index in `pairs` where each expert's pairs begin, [E]."""
    b_n = (b_count + TILE - 1) // TILE
    b_tile = tl.cumsum(b_n, 0) - b_n
    b_start = tl.cumsum(b_count, 0) - b_count
    most = (M + TILE - 1) // TILE
    for i in range(most):
        p_tile, m_tile = p_tiles + 3 * (b_tile + i), i < b_n
        tl.store(p_tile, o_e, mask=m_tile)
        tl.store(p_tile + 1, b_start + i * TILE, mask=m_tile)
        tl.store(p_tile + 2, b_start + tl.minimum((i + 1) * TILE, b_count), mask=m_tile)
    n = tl.sum(b_n, 0)
    for s in range(N_SHARED):
        for i in range(most):
            p_tile, first = p_tiles + 3 * (n + s * most + i), (TOP_K + s) * M
            tl.store(p_tile, E + s)
            tl.store(p_tile + 1, first + i * TILE)
            tl.store(p_tile + 2, first + tl.minimum((i + 1) * TILE, M))
    n += N_SHARED * most
    for t in range(0, 3 * T, E_PAD):
        o_t = t + tl.arange(0, E_PAD)
        tl.store(p_tiles + o_t, -1, mask=(o_t >= 3 * n) & (o_t < 3 * T))
    return b_start


@triton.jit
def _write_pairs(p_pairs, b_place, b_start, o_m, M, TOP_K: tl.constexpr, N_SHARED: tl.constexpr):
    """Write the pairs of rows `o_m`, and return where the pairs of the next rows begin, [E].

    `b_place` [M, E] is the place that each expert has among the token's experts, or -1. `b_start` [E] is where each
    expert's pairs of these rows begin.
    """
    P: tl.constexpr = TOP_K + N_SHARED
    b_hit = (b_place >= 0).to(tl.int32)
    b_before = tl.cumsum(b_hit, 0) - b_hit
    tl.store(p_pairs + b_start[None, :] + b_before, o_m[:, None] * P + b_place, mask=b_place >= 0)
    for s in range(N_SHARED):
        tl.store(p_pairs + (TOP_K + s) * M + o_m, o_m * P + TOP_K + s, mask=o_m < M)
    return b_start + tl.sum(b_hit, 0)


@triton.jit(do_not_specialize=["M", "T"])
def _moe_route_kernel(
    p_logits, p_bias, p_ids, p_weights, p_pairs, p_tiles,
    M, T, scale,
    E: tl.constexpr, E_PAD: tl.constexpr, P_PAD: tl.constexpr, TOP_K: tl.constexpr, N_SHARED: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS_PER_TOK: tl.constexpr,
    TILE: tl.constexpr, SORT_BY_EXPERT: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    P: tl.constexpr = TOP_K + N_SHARED
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_e, o_p = tl.arange(0, E_PAD), tl.arange(0, P_PAD)
    m_m, m_e = o_m < M, o_e < E
    scale = tl.full([], scale, tl.float32)
    b_logits = tl.load(p_logits + o_m[:, None] * E + o_e[None, :], mask=m_m[:, None] & m_e[None, :], other=0.0)
    b_logits = tl.where(m_e[None, :], b_logits, -float("inf"))
    if SIGMOID:
        b_scores = 1.0 / (1.0 + tl.exp(-b_logits))
    else:
        b_scores = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
        b_scores = b_scores / tl.sum(b_scores, 1)[:, None]
    b_order, b_ranked = b_logits, b_scores
    if p_bias is not None:
        b_ranked = b_scores + tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        b_order = b_ranked
    b_ranked = _comparable(b_ranked)
    b_order = tl.where(m_e[None, :], _comparable(b_order), -float("inf"))
    if N_GROUPS > 1:
        b_order = _open_groups(b_order, b_ranked, o_e, m_e, ROWS, E, E_PAD, N_GROUPS, GROUPS_PER_TOK)

    b_ids = tl.zeros([ROWS, P_PAD], dtype=tl.int32)
    b_weights = tl.zeros([ROWS, P_PAD], dtype=tl.float32)
    b_place = tl.full([ROWS, E_PAD], -1, tl.int32)
    for j in range(TOP_K):
        # Experts that are already chosen, or outside the best groups, have -inf. At least one other expert is left and
        # has LOWEST or more, because the best groups have TOP_K experts or more. b_id is therefore in 0..E-1.
        b_id = tl.min(tl.where(b_order == tl.max(b_order, 1)[:, None], o_e[None, :], E_PAD), 1)
        m_id, m_j = o_e[None, :] == b_id[:, None], (o_p == j)[None, :]
        b_weights = tl.where(m_j, tl.sum(tl.where(m_id, b_scores, 0.0), 1)[:, None], b_weights)
        b_ids = tl.where(m_j, b_id[:, None], b_ids)
        b_place = tl.where(m_id, j, b_place)
        b_order = tl.where(m_id, -float("inf"), b_order)
    if RENORMALISE:
        b_weights = b_weights / (tl.sum(b_weights, 1) + 1e-20)[:, None]
    m_shared, m_p = (o_p >= TOP_K)[None, :], m_m[:, None] & (o_p < P)[None, :]
    o_out = o_m[:, None] * P + o_p[None, :]
    tl.store(p_ids + o_out, tl.where(m_shared, E + (o_p - TOP_K)[None, :], b_ids), mask=m_p)
    tl.store(p_weights + o_out, tl.where(m_shared, 1.0, b_weights * scale), mask=m_p)
    if SORT_BY_EXPERT:
        b_place = tl.where(m_m[:, None], b_place, -1)
        b_count = tl.sum((b_place >= 0).to(tl.int32), 0)
        b_start = _write_tiles(p_tiles, b_count, o_e, M, T, TOP_K, N_SHARED, E, E_PAD, TILE)
        _write_pairs(p_pairs, b_place, b_start, o_m, M, TOP_K, N_SHARED)


@triton.jit
def _places(p_ids, o_m, o_e, M, P: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, E_PAD: tl.constexpr):
    """Return the place that each expert has among each token's experts, or -1: [M, E]."""
    b_place = tl.full([ROWS, E_PAD], -1, tl.int32)
    for j in range(TOP_K):
        b_id = tl.load(p_ids + o_m * P + j, mask=o_m < M, other=-1)
        b_place = tl.where(o_e[None, :] == b_id[:, None], j, b_place)
    return b_place


@triton.jit(do_not_specialize=["M", "T"])
def _moe_group_kernel(
    p_ids, p_pairs, p_tiles,
    M, T,
    E: tl.constexpr, E_PAD: tl.constexpr, TOP_K: tl.constexpr, N_SHARED: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    # one block makes two passes over the ids: the first counts each expert's pairs, the second writes them
    P: tl.constexpr = TOP_K + N_SHARED
    o_rows, o_e = tl.arange(0, ROWS), tl.arange(0, E_PAD)
    b_count = tl.zeros([E_PAD], dtype=tl.int32)
    for m in range(0, M, ROWS):
        b_place = _places(p_ids, m + o_rows, o_e, M, P, TOP_K, ROWS, E_PAD)
        b_count += tl.sum((b_place >= 0).to(tl.int32), 0)
    b_start = _write_tiles(p_tiles, b_count, o_e, M, T, TOP_K, N_SHARED, E, E_PAD, TILE)
    for m in range(0, M, ROWS):
        b_place = _places(p_ids, m + o_rows, o_e, M, P, TOP_K, ROWS, E_PAD)
        b_start = _write_pairs(p_pairs, b_place, b_start, m + o_rows, M, TOP_K, N_SHARED)


def choose_tile_rows(E: int, top_k: int, dtype: torch.dtype, max_rows: int, phase: str) -> int:
    """Return the most pairs that a tile may hold.

    Args:
        E: the number of experts of the layer, without the shared experts.
        top_k: the number of experts of a token, without the shared experts.
        dtype: the dtype of the experts' weights.
        max_rows: the most tokens that the layer is prepared for.
        phase: "decode" or "prefill".

    Raises:
        ValueError: `phase` is neither "decode" nor "prefill".
    """
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase is {phase!r} but must be 'decode' or 'prefill'")
    rows = max_rows if phase == "decode" else 2 * triton.cdiv(max_rows * top_k, E)
    return int(MOE_TILE_ROWS(N=E, K=top_k, dtype=dtype, rows=rows)["ROWS"])


def tile_count(M: int, E: int, top_k: int, n_shared: int, tile_rows: int) -> int:
    """Return T, the most tiles that `M` tokens can make, whichever experts the tokens are routed to.

    Args:
        M: the number of tokens.
        E: the number of experts, without the shared experts.
        top_k: the number of experts of a token, without the shared experts.
        n_shared: the number of shared experts.
        tile_rows: the most pairs in a tile, see :func:`choose_tile_rows`.
    """
    pairs, each = M * top_k, triton.cdiv(M, tile_rows)
    hit = min(pairs, E)
    return int(min((pairs + hit * (tile_rows - 1)) // tile_rows, hit * each) + n_shared * each)


def launch_moe_route(
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_shared: int,
    scoring: str,
    n_groups: int,
    n_groups_per_tok: int,
    renormalise: bool,
    scale: float,
    tile_rows: int,
    max_rows: int,
) -> None:
    """Run :func:`moe_route` into `out`, its four results, without checking the arguments.

    This is one launch if one block can route `max_rows` tokens (up to 64 for 128 experts), otherwise two.
    """
    ids, weights, pairs, tiles = out
    (M, E), T = logits.shape, len(tiles)
    constants = MOE_ROUTE(N=E, K=top_k, dtype=torch.float32, rows=max_rows)
    constants |= {"E": E, "E_PAD": triton.next_power_of_2(E), "TOP_K": top_k, "N_SHARED": n_shared, "TILE": tile_rows}
    one_launch = constants["ROWS"] >= max_rows
    how = {
        "P_PAD": triton.next_power_of_2(top_k + n_shared), "SIGMOID": scoring == "sigmoid", "RENORMALISE": renormalise,
        "N_GROUPS": n_groups, "GROUPS_PER_TOK": n_groups_per_tok, "SORT_BY_EXPERT": one_launch,
    }  # fmt: skip
    grid = (triton.cdiv(M, constants["ROWS"]),)
    _moe_route_kernel[grid](logits, bias, ids, weights, pairs, tiles, M, T, scale, **constants | how)
    if not one_launch:
        _moe_group_kernel[(1,)](ids, pairs, tiles, M, T, **constants)


@operator(launch_moe_route)
def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_shared: int,
    scoring: str,
    n_groups: int,
    n_groups_per_tok: int,
    renormalise: bool,
    scale: float,
    tile_rows: int,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the experts of each token and their weights, and sort the (token, expert) pairs by expert.

    Experts are ordered by their logits. With a bias, experts are ordered by score + bias, and weighted by the score
    alone (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Of experts or groups with equal values, the lowest id comes
    first.

    In the choice of experts and groups, NaN and -inf count as the lowest fp32 number. So a token always has k different
    experts, and an expert with NaN comes last. The weights are computed from the unchanged scores. With softmax, all
    scores of a token are NaN if one of its logits is NaN or +inf, or if all are -inf. With sigmoid, a score is NaN only
    if its own logit is NaN.

    Args:
        logits: fp32 [M, E], contiguous.
        bias: fp32 [E], or None.
        top_k: k, the number of experts of a token, without the shared experts.
        n_shared: the number of shared experts. Every token has all shared experts, with weight 1.
        scoring: "softmax" or "sigmoid".
        n_groups: the number of groups; each group has E / n_groups consecutive experts.
        n_groups_per_tok: the number of groups that a token may use. These are the groups with the largest sum of their
            two best scores. If `bias` is given, it is added to the scores before they are compared.
        renormalise: whether a token's k weights are divided by their sum.
        scale: the factor on the k weights, applied last.
        tile_rows: the most pairs in a tile, a power of 2; see :func:`choose_tile_rows`.
        max_rows: the most tokens that the operator is prepared for. The launch config depends on this number, so a
            token's experts depend neither on M nor on the other tokens.

    Returns:
        ids int32 [M, P] and weights fp32 [M, P] with P = k + n_shared; pairs int32 [M * P]; tiles int32 [T, 3] with
        T = :func:`tile_count`. The file's docstring defines all four.

    Raises:
        ValueError: M is not in 1..max_rows, `scoring` is unknown, or a number is out of range for E experts.
    """
    M, E = expect("logits", logits, ("M", "E"), dtype=torch.float32)
    if bias is not None:
        expect("bias", bias, (E,), like=logits)
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r} but must be 'softmax' or 'sigmoid'")
    if n_groups < 1 or E % n_groups:
        raise ValueError(f"n_groups is {n_groups} but must divide the {E} experts")
    if not 1 <= n_groups_per_tok <= n_groups:
        raise ValueError(f"n_groups_per_tok is {n_groups_per_tok} but must lie in 1..{n_groups}")
    open_to_each = E // n_groups * n_groups_per_tok
    if not 1 <= top_k <= open_to_each:
        raise ValueError(f"top_k is {top_k} but must lie in 1..{open_to_each}, the experts in a token's groups")
    if n_shared < 0:
        raise ValueError(f"n_shared is {n_shared} but must not be negative")
    if tile_rows < 1 or tile_rows & (tile_rows - 1):
        raise ValueError(f"tile_rows is {tile_rows} but must be a power of 2")
    if not 1 <= M <= max_rows:
        raise ValueError(f"logits has {M} rows but must have 1..{max_rows} (max_rows)")
    P, T = top_k + n_shared, tile_count(M, E, top_k, n_shared, tile_rows)
    shapes = (((M, P), torch.int32), ((M, P), torch.float32), ((M * P,), torch.int32), ((T, 3), torch.int32))
    ids, weights, pairs, tiles = (logits.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return ids, weights, pairs, tiles
