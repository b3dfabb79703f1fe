"""Registry entries of the projections to queries, keys and values, at the public model's shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops.linear import phase_of
from bench.ops.registry import ALL_DTYPES, BF16_AND_8_BITS, Args, Case, Entry, TensorMaker
from voxkern.kernels.qkv import norm_qkv, norm_qkv_append
from voxkern.reference.attention import append, rope_table, rotate
from voxkern.reference.layers import rms_norm, upcast
from voxkern.reference.quantized import scaled_linear


def rope_of(positions: int, D: int, device: str) -> Tensor:
    """Return the table of RoPE cosines and sines that the kernels read, fp32 [positions, 2, D / 2]."""
    if device == "meta":
        return torch.empty(positions, 2, D // 2, device="meta")
    return torch.stack(rope_table(torch.arange(positions), D, 1e4), dim=1).float().to(device)


def pages_of(lengths: list[int], PAGE: int, device: str) -> tuple[Tensor, Tensor]:
    """Return int32 `lengths` [B] and an int32 block table [B, max_pages].

    The table uses about half of the pages, in random order. Unused entries of the table are 0.
    """
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(2 * sum(counts) + 1, generator=torch.Generator().manual_seed(7)).int().tolist()
    table = torch.zeros(len(lengths), max(*counts, 1), dtype=torch.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    return torch.tensor(lengths, dtype=torch.int32, device=device), table.to(device)


def lengths_of(s: Any, B: int) -> list[int]:
    """Return B lengths that fall from `s.length` in steps of 17, but not below 1, with 0 (no request) at index 2."""
    return [0 if i == 2 else max(s.length - 17 * i, 1) for i in range(B)]


def cache_of(s: Any, B: int, make: TensorMaker) -> dict[str, Any]:
    """Return a random kv_cache, with the block table and the lengths of B requests."""
    lengths, table = pages_of(lengths_of(s, B), s.PAGE, make.device)
    pages = 2 * sum(-(-length // s.PAGE) for length in lengths_of(s, B)) + 1
    return {"kv_cache": make(pages, 2, s.HKV, s.PAGE, s.D), "block_table": table, "lengths": lengths}


def norm_qkv_reference(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float, q_rows: int, max_rows: int,
    phase: str = "decode", scale_q: Tensor | None = None, scale_k: Tensor | None = None, scale_v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute RMSNorm and three products, and concatenate the products. Queries from row `q_rows` on are 0."""
    n = rms_norm(x, norm, eps)
    q = scaled_linear(n, wq, scale_q)
    is_query_row = torch.arange(len(x), device=x.device).unsqueeze(1) < q_rows
    k, v = scaled_linear(n, wk, scale_k), scaled_linear(n, wv, scale_v)
    return torch.cat((q.where(is_query_row, 0), k, v), dim=1)


def qkv_inputs(M: int, K: int, N: int, N_KV: int, make: TensorMaker) -> dict[str, Any]:
    """Return x, and the weights and scales of the norm and of q, k and v, like those of a trained layer."""
    inputs: dict[str, Any] = {"x": make(M, K), "norm": make(K, mean=1.0, std=0.1)}
    for name, rows in (("q", N), ("k", N_KV), ("v", N_KV)):
        inputs[f"w{name}"], inputs[f"scale_{name}"] = make.weight(rows, K, std=K**-0.5)
    return inputs


def norm_qkv_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of a trained layer; `s.query_thirds` thirds of the rows have queries."""
    return qkv_inputs(s.M, s.K, s.N, s.N_KV, make) | {
        "eps": 1e-5,
        "q_rows": -(-s.M * s.query_thirds // 3),
        "max_rows": s.max_rows,
        "phase": phase_of(s),
    }


def norm_qkv_append_reference(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, rope: Tensor, block_table: Tensor, lengths: Tensor,
    q: Tensor, kv_cache: Tensor, eps: float, max_rows: int,
    scale_q: Tensor | None = None, scale_k: Tensor | None = None, scale_v: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute the part of the reference's layer before attention, rounding after each operation.

    Queries are written to `q`, keys and values to `kv_cache`.
    """
    n, D = rms_norm(x, norm, eps), kv_cache.shape[4]
    live = lengths > 0
    cos, sin = upcast(
        rope[(lengths.long() - 1).clamp(0)].to(x.dtype if x.dtype == torch.float64 else rope.dtype)
    ).unbind(1)
    weights = ((wq, scale_q), (wk, scale_k), (wv, scale_v))
    queries, k, v = (scaled_linear(n, w, scale).unflatten(1, (-1, D)) for w, scale in weights)
    q[live] = rotate(queries, cos, sin).flatten(1)[live]
    append(kv_cache, rotate(k, cos, sin).unsqueeze(1), v.unsqueeze(1), block_table, lengths)


def norm_qkv_append_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of a trained layer, and a random cache."""
    inputs = qkv_inputs(s.M, s.K, s.N, s.HKV * s.D, make) | {
        "rope": rope_of(s.length, s.D, make.device),
        "q": make(s.M, s.N),
        "eps": 1e-5,
        "max_rows": s.max_rows,
    }
    return inputs | cache_of(s, s.M, make)


QKV = {"N": 4096, "N_KV": 1024, "K": 3072}
ODD_QKV = {"N": 75, "N_KV": 40, "K": 150}
CODEC = {"N": 1024, "N_KV": 1024, "K": 1024, "query_thirds": 3, "codec": 1}
BACKBONE = {"N": 4096, "K": 3072, "HKV": 8, "D": 128, "PAGE": 64, "length": 400}
HEADS = {"H": 32, "HKV": 8, "D": 128, "PAGE": 64}


def _queries(args: Args, each: int) -> int:
    """Return `each` times the number of queries that are computed."""
    return int(args["q_rows"] * len(args["wq"]) * each)


def one_token_each(rows: str) -> dict[str, Callable[[Args], int]]:
    """Return the elements of the cache and the rope table that a call uses: those of one token for each row."""
    return {
        "kv_cache": lambda args: len(args[rows]) * 2 * args["kv_cache"].shape[2] * args["kv_cache"].shape[4],
        "rope": lambda args: len(args[rows]) * args["kv_cache"].shape[4],
    }


ENTRIES = [
    Entry(
        op=norm_qkv,
        reference=norm_qkv_reference,
        inputs=norm_qkv_inputs,
        cases=(
            Case("odd", {"M": 19, **ODD_QKV, "query_thirds": 3, "max_rows": 19}, dtypes=ALL_DTYPES),
            Case(
                "odd-some-queries",
                {"M": 70, **ODD_QKV, "query_thirds": 1, "max_rows": 100},
                dtypes=("bf16", "int8", "fp16", "fp32"),
            ),
            Case("b1", {"M": 6, **QKV, "query_thirds": 3, "max_rows": 6}, public=True, dtypes=ALL_DTYPES),
            *(
                Case(
                    f"b{B}",
                    {"M": 6 * B, **QKV, "query_thirds": 3, "max_rows": 6 * B},
                    public=True,
                    dtypes=BF16_AND_8_BITS,
                )
                for B in (2, 4, 8, 10, 16, 32)
            ),
            Case(
                "prefill",
                {"M": 230, **QKV, "query_thirds": 3, "max_rows": 230, "prefill": 1},
                public=True,
                dtypes=BF16_AND_8_BITS,
            ),
            *(
                Case(f"codec-b{B}", {"M": 8 * B, **CODEC, "max_rows": 8 * B}, public=True, dtypes=("bf16",))
                for B in (1, 8, 16, 32)
            ),
            Case(
                "last-b32",
                {"M": 192, **QKV, "query_thirds": 1, "max_rows": 192},
                public=True,
                dtypes=BF16_AND_8_BITS,
            ),
        ),
        read_once=("wq", "wk", "wv"),
        ordered_by=("p_arrived",),
        regular_grid=False,
        # queries of the first q_rows rows only
        partly={"out": lambda args: _queries(args, 1) + len(args["x"]) * 2 * len(args["wk"])},
        multiply_adds=lambda args: _queries(args, args["x"].shape[1]) + len(args["x"]) * 2 * args["wk"].numel(),
    ),
    Entry(
        op=norm_qkv_append,
        reference=norm_qkv_append_reference,
        inputs=norm_qkv_append_inputs,
        cases=(
            Case(
                "odd",
                {"M": 19, "N": 120, "K": 150, "HKV": 2, "D": 20, "PAGE": 16, "length": 300, "max_rows": 19},
                dtypes=ALL_DTYPES,
            ),
            Case(
                "odd-heads",
                {"M": 21, "N": 144, "K": 129, "HKV": 3, "D": 24, "PAGE": 64, "length": 650, "max_rows": 64},
            ),
            Case("b1", {"M": 1, **BACKBONE, "max_rows": 1}, public=True, dtypes=ALL_DTYPES),
            *(
                Case(f"b{B}", {"M": B, **BACKBONE, "max_rows": B}, public=True, dtypes=BF16_AND_8_BITS)
                for B in (16, 32, 64)
            ),
        ),
        read_once=("wq", "wk", "wv"),
        regular_grid=False,
        partly=one_token_each("x"),
    ),
]
