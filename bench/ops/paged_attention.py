"""Registry entries of the attention over the paged KV cache, at the shapes of the public model's backbone."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.qkv import lengths_of, pages_of
from bench.ops.registry import Args, Case, Entry, TensorMaker
from voxkern.kernels.paged_attention import paged_attention, prefill_attention
from voxkern.reference import attention as reference


def poisoned(kv_cache: Tensor, block_table: Tensor, lengths: list[int]) -> Tensor:
    """Return a copy of `kv_cache` with NaN at all positions that store no token of a request."""
    if kv_cache.device.type == "meta":
        return kv_cache
    PAGE, kept = kv_cache.shape[3], torch.full_like(kv_cache, torch.nan)
    for pages, length in zip(block_table.tolist(), lengths, strict=True):
        for position in range(length):
            page, slot = pages[position // PAGE], position % PAGE
            kept[page, :, :, slot] = kv_cache[page, :, :, slot]
    return kept


def paged_attention_reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, window: int, max_seq_len: int
) -> Tensor:
    """Compute paged attention of one new token per request with the reference model's function."""
    heads = q.unflatten(1, (1, -1, kv_cache.shape[4]))  # [B, 1, H, D]
    return reference.paged_attention(heads, kv_cache, block_table, lengths, window).flatten(1)


def paged_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with scores of standard deviation 1. Lengths fall from request to request; the third is 0."""
    wanted = lengths_of(s, s.B)
    lengths, table = pages_of(wanted, s.PAGE, make.device)
    pages = 2 * sum(-(-length // s.PAGE) for length in wanted) + 1
    return {
        "q": make(s.B, s.H * s.D),
        "kv_cache": poisoned(make(pages, 2, s.HKV, s.PAGE, s.D), table, wanted),
        "block_table": table,
        "lengths": lengths,
        "window": s.window,
        "max_seq_len": s.max_seq_len,
    }


def prefill_attention_reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, lengths: Tensor, window: int, max_new: int,
    n_heads: int,
) -> Tensor:  # fmt: skip
    """Compute attention request by request with the reference model's function. Rows of no request are zero."""
    D, out = kv_cache.shape[4], q.new_zeros(len(q), n_heads * kv_cache.shape[4])
    for b, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        if end > start:
            heads = q[None, start:end, : n_heads * D].unflatten(2, (-1, D))
            one = reference.paged_attention(heads, kv_cache, block_table[b : b + 1], lengths[b : b + 1], window)
            out[start:end] = one[0].flatten(1)
    return out


def prefill_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with R rows q | k | v of three requests. The first also has `s.past` tokens in the cache."""
    new = [s.R - s.R // 3 - s.R // 2, s.R // 3, s.R // 2]
    lengths = [n + (s.past if i == 0 else 0) for i, n in enumerate(new)]
    on_device, table = pages_of(lengths, s.PAGE, make.device)
    pages = 2 * sum(-(-length // s.PAGE) for length in lengths) + 1
    cu_seqlens = torch.tensor([0, *new]).cumsum(0).int()
    return {
        "q": make(s.R, (s.H + 2 * s.HKV) * s.D),
        "kv_cache": poisoned(make(pages, 2, s.HKV, s.PAGE, s.D), table, lengths),
        "block_table": table,
        "cu_seqlens": cu_seqlens.to(make.device),
        "lengths": on_device,
        "window": s.window,
        "max_new": max(*new, 1),
        "n_heads": s.H,
    }


PUBLIC = {"H": 32, "HKV": 8, "D": 128, "PAGE": 64, "window": 0}


def cached(args: Args) -> int:
    """Return the number of elements in the requests' keys and values. The cases' caches also have unused pages."""
    _, _, HKV, _, D = args["kv_cache"].shape
    return seen(args) * 2 * HKV * D


def seen(args: Args) -> int:
    """Return the number of tokens that one new token of each request attends to."""
    window = args["window"] or args["max_seq_len"]
    return int(args["lengths"].clamp(max=window).sum())


ENTRIES = [
    Entry(
        op=paged_attention,
        reference=paged_attention_reference,
        inputs=paged_attention_inputs,
        cases=(
            Case(
                "odd", {"B": 5, "H": 6, "HKV": 2, "D": 20, "PAGE": 16, "length": 300, "window": 0, "max_seq_len": 400}
            ),
            Case(
                "odd-one", {"B": 4, "H": 3, "HKV": 3, "D": 64, "PAGE": 64, "length": 65, "window": 0, "max_seq_len": 70}
            ),
            Case(
                "odd-six", {"B": 4, "H": 6, "HKV": 1, "D": 24, "PAGE": 32, "length": 64, "window": 7, "max_seq_len": 64}
            ),
            Case("b1", {"B": 1, **PUBLIC, "length": 400, "max_seq_len": 4096}, public=True),
            Case("b32", {"B": 32, **PUBLIC, "length": 1000, "max_seq_len": 4096}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 2 * c["BLOCK_N"] * c["D"],
        read_once=(),
        regular_grid=False,
        partly={"kv_cache": cached, "scratch": lambda args: 0},  # of many spans only; bench/static/frame.py counts it
        ordered_by=("p_arrived",),
        multiply_adds=lambda args: seen(args) * 2 * args["q"].shape[1],
    ),
    Entry(
        op=prefill_attention,
        reference=prefill_attention_reference,
        inputs=prefill_attention_inputs,
        cases=(
            Case("odd", {"R": 100, "H": 6, "HKV": 2, "D": 20, "PAGE": 16, "past": 37, "window": 0}),
            Case("odd-window", {"R": 75, "H": 4, "HKV": 1, "D": 64, "PAGE": 64, "past": 70, "window": 7}),
            Case("b1", {"R": 230, **PUBLIC, "past": 0}, public=True),
            Case("b32", {"R": 1024, **PUBLIC, "past": 0}, public=True, dtypes=("bf16",)),
        ),
        rows="R",
        stage=lambda c: 2 * c["BLOCK_N"] * c["D"],
        read_once=(),
        regular_grid=False,
        partly={"q": lambda args: len(args["q"]) * args["n_heads"] * args["kv_cache"].shape[4]},
    ),
]
