"""Registry entry of ``rope_append``, at the public model's shapes."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.qkv import HEADS, one_token_each, pages_of, rope_of
from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.rope import rope_append
from voxkern.reference.attention import rotate


def rope_append_reference(
    rope: Tensor, request_ids: Tensor, positions: Tensor, block_table: Tensor, qkv: Tensor, kv_cache: Tensor
) -> None:
    """Rotate queries in place, and append rotated keys and values to the cache, row by row."""
    _, _, HKV, PAGE, D = kv_cache.shape
    heads = qkv.unflatten(1, (-1, D))
    for i, (request, position) in enumerate(zip(request_ids.tolist(), positions.tolist(), strict=True)):
        if position < 0:
            continue
        cos, sin = (part.to(torch.promote_types(part.dtype, qkv.dtype)) for part in rope[position])
        page = int(block_table[request, position // PAGE])
        q, k, v = heads[i].split((heads.shape[1] - 2 * HKV, HKV, HKV))
        kv_cache[page, 0, :, position % PAGE], kv_cache[page, 1, :, position % PAGE] = rotate(k, cos, sin), v
        q.copy_(rotate(q, cos, sin))


def rope_append_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with R rows of three requests in turn; the row at index 2 has no request."""
    _, table = pages_of([s.length] * 3, s.PAGE, make.device)
    rows = torch.arange(s.R)
    positions = (rows // 3).where(rows != 2, -1).int()
    return {
        "rope": rope_of(s.length, s.D, make.device),
        "request_ids": (rows % 3).int().to(make.device),
        "positions": positions.to(make.device),
        "block_table": table,
        "qkv": make(s.R, (s.H + 2 * s.HKV) * s.D),
        "kv_cache": make(6 * -(-s.length // s.PAGE) + 1, 2, s.HKV, s.PAGE, s.D),
    }


ENTRIES = [
    Entry(
        op=rope_append,
        reference=rope_append_reference,
        inputs=rope_append_inputs,
        cases=(
            Case("odd", {"R": 31, "H": 6, "HKV": 2, "D": 20, "PAGE": 16, "length": 19}),
            Case("odd-one-head", {"R": 7, "H": 3, "HKV": 3, "D": 64, "PAGE": 32, "length": 40}),
            Case("b1", {"R": 1, **HEADS, "length": 230}, public=True),
            Case("prefill-b32", {"R": 512, **HEADS, "length": 230}, public=True, dtypes=("bf16",)),
        ),
        rows="R",
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
        uses_matrix_unit=False,
        partly=one_token_each("qkv"),
    ),
]
