"""Registry entries of the attention over the flow head's three tokens, at the shapes of the public model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops.registry import Args, Case, Entry, TensorMaker
from voxkern.kernels.token_attention import token_attention, token_attention_linear
from voxkern.reference.attention import attention
from voxkern.reference.quantized import scaled_linear


def token_attention_reference(
    x_qkv: Tensor, t_qkv: Tensor, h_qkv: Tensor, n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int
) -> Tensor:
    """Collect the three tokens of each pair of branch and request, and compute plain attention over them."""
    i = torch.arange(len(h_qkv), device=h_qkv.device)
    qkv = torch.stack((x_qkv[i % len(x_qkv)], t_qkv[i % len(t_qkv)], h_qkv), dim=1)  # [2B, 3, W]
    heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    return attention(q[:, :n_tokens], k, v, causal=False).transpose(0, 1).flatten(2).flatten(0, 1)


def token_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with scores of standard deviation 1.

    With `s.n_x` = 1, both branches share the rows of the x tokens. With `s.n_t` = 0, all pairs of branch and request
    share one row for the t token.
    """
    W = (s.H + 2 * s.HKV) * s.D
    return {
        "x_qkv": make(s.B * s.n_x, W),
        "t_qkv": make(2 * s.B if s.n_t else 1, W),
        "h_qkv": make(2 * s.B, W),
        "n_heads": s.H,
        "n_kv_heads": s.HKV,
        "n_tokens": s.n_tokens,
        "max_batch": s.max_batch,
    }


def token_attention_linear_reference(
    x_qkv: Tensor,
    t_qkv: Tensor,
    h_qkv: Tensor,
    wo: Tensor,
    residual: Tensor,
    n_heads: int,
    n_kv_heads: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute attention, the product with wo and the sum with the residual, rounding after each operation."""
    n_tokens = len(residual) // len(h_qkv)
    o = token_attention_reference(x_qkv, t_qkv, h_qkv, n_heads, n_kv_heads, n_tokens, 1)
    return residual + scaled_linear(o, wo, scale)


def token_attention_linear_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments like :func:`token_attention_inputs` of one request; the residual has 2 * `s.n_tokens` rows."""
    inputs = token_attention_inputs(s, make)
    del inputs["max_batch"]
    K = s.H * s.D
    inputs["wo"], inputs["scale"] = make.weight(s.N, K, std=K**-0.5)
    inputs["residual"] = make(inputs.pop("n_tokens") * 2 * s.B, s.N)
    return inputs


PUBLIC = {"H": 32, "HKV": 8, "D": 128}
ONE_REQUEST = {"B": 1, "max_batch": 1}


def keys_and_values(name: str) -> Callable[[Args], int]:
    """Return a function that counts the elements used of `name`: without the queries if only the x tokens have some."""

    def count(args: Args) -> int:
        rows, columns = args[name].shape
        H, HKV = args["n_heads"], args["n_kv_heads"]
        all_tokens = args.get("n_tokens", 3) == 3 and len(args.get("residual", ())) != len(args["h_qkv"])
        return int(rows * (columns if all_tokens else columns * 2 * HKV // (H + 2 * HKV)))

    return count


ENTRIES = [
    Entry(
        op=token_attention,
        reference=token_attention_reference,
        inputs=token_attention_inputs,
        cases=(
            Case("odd", {"B": 5, "max_batch": 6, "n_x": 2, "n_t": 1, "n_tokens": 3, "H": 6, "HKV": 2, "D": 16}),
            Case("odd-first", {"B": 3, "max_batch": 3, "n_x": 1, "n_t": 0, "n_tokens": 3, "H": 4, "HKV": 1, "D": 24}),
            Case("odd-last", {"B": 3, "max_batch": 3, "n_x": 2, "n_t": 1, "n_tokens": 1, "H": 3, "HKV": 3, "D": 64}),
            Case("middle-b1", {"B": 1, "max_batch": 1, "n_x": 2, "n_t": 1, "n_tokens": 3, **PUBLIC}, public=True),
            Case("first-b32", {"B": 32, "max_batch": 32, "n_x": 1, "n_t": 0, "n_tokens": 3, **PUBLIC}, public=True),
            Case("middle-b32", {"B": 32, "max_batch": 32, "n_x": 2, "n_t": 1, "n_tokens": 3, **PUBLIC}, public=True),
            Case("last-b32", {"B": 32, "max_batch": 32, "n_x": 2, "n_t": 1, "n_tokens": 1, **PUBLIC}, public=True),
        ),
        rows="B",
        stage=lambda c: 0,
        read_once=(),
        partly={name: keys_and_values(name) for name in ("t_qkv", "h_qkv")},
        uses_matrix_unit=False,
    ),
    Entry(
        op=token_attention_linear,
        reference=token_attention_linear_reference,
        inputs=token_attention_linear_inputs,
        cases=(
            Case(
                "odd",
                {"n_x": 2, "n_t": 1, "n_tokens": 3, "N": 75, "H": 6, "HKV": 2, "D": 16, **ONE_REQUEST},
                dtypes=("bf16", "int8", "fp8", "fp16"),
            ),
            Case(
                "odd-first",
                {"n_x": 1, "n_t": 0, "n_tokens": 3, "N": 40, "H": 4, "HKV": 1, "D": 24, **ONE_REQUEST},
                dtypes=("bf16", "fp16"),
            ),
            Case(
                "odd-last",
                {"n_x": 2, "n_t": 1, "n_tokens": 1, "N": 70, "H": 3, "HKV": 3, "D": 64, **ONE_REQUEST},
                dtypes=("bf16", "fp16"),
            ),
            Case(
                "wo-b1",
                {"n_x": 2, "n_t": 1, "n_tokens": 3, "N": 3072, **PUBLIC, **ONE_REQUEST},
                public=True,
                dtypes=("bf16", "int8", "fp8", "fp16"),
            ),
        ),
        rows="B",
        stage=lambda c: c["BLOCK_N"] * c["D"] * (c["H"] // c["HKV"]),
        read_once=("wo",),
        partly={name: keys_and_values(name) for name in ("t_qkv", "h_qkv")},
        multiply_adds=lambda args: len(args["residual"]) * args["wo"].numel(),
    ),
]
