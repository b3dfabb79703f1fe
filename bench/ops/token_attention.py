"""Registry entries of the attention over the flow head's three tokens, at the shapes of the public model."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.registry import Args, Case, Entry, TensorMaker
from voxkern.kernels.token_attention import token_attention, token_attention_linear
from voxkern.reference.attention import attention
from voxkern.reference.quantized import scaled_linear


def token_attention_reference(qkv: Tensor, n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int) -> Tensor:
    """Collect the three tokens of each pair of branch and request, and compute plain attention over them."""
    heads = torch.stack(qkv.chunk(3), dim=1).unflatten(-1, (n_heads + 2 * n_kv_heads, -1))  # [2B, 3, heads, D]
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=2)
    return attention(q[:, :n_tokens], k, v, causal=False).transpose(0, 1).flatten(2).flatten(0, 1)


def token_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with scores of standard deviation 1."""
    return {
        "qkv": make(6 * s.B, (s.H + 2 * s.HKV) * s.D),
        "n_heads": s.H,
        "n_kv_heads": s.HKV,
        "n_tokens": s.n_tokens,
        "max_batch": s.max_batch,
    }


def token_attention_linear_reference(
    qkv: Tensor, wo: Tensor, residual: Tensor, n_heads: int, n_kv_heads: int, scale: Tensor | None = None
) -> Tensor:
    """Compute attention, the product with wo and the sum with the residual, rounding after each operation."""
    o = token_attention_reference(qkv, n_heads, n_kv_heads, len(residual) // 2, 1)
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


def used_elements(args: Args) -> int:
    """Return how many elements of q | k | v are needed. With `n_tokens` = 1, the queries are those of x alone."""
    qkv, H, HKV = args["qkv"], args["n_heads"], args["n_kv_heads"]
    rows = args["n_tokens"] * len(qkv) // 3 if "n_tokens" in args else len(args["residual"])
    heads = rows * H + len(qkv) * 2 * HKV
    return int(heads * qkv.shape[1] // (H + 2 * HKV))


ENTRIES = [
    Entry(
        op=token_attention,
        reference=token_attention_reference,
        inputs=token_attention_inputs,
        cases=(
            Case("odd", {"B": 5, "max_batch": 6, "n_tokens": 3, "H": 6, "HKV": 2, "D": 16}),
            Case("odd-first", {"B": 3, "max_batch": 3, "n_tokens": 3, "H": 4, "HKV": 1, "D": 24}),
            Case("odd-last", {"B": 3, "max_batch": 3, "n_tokens": 1, "H": 3, "HKV": 3, "D": 64}),
            Case("middle-b1", {"B": 1, "max_batch": 1, "n_tokens": 3, **PUBLIC}, public=True),
            Case("middle-b32", {"B": 32, "max_batch": 32, "n_tokens": 3, **PUBLIC}, public=True),
            Case("last-b32", {"B": 32, "max_batch": 32, "n_tokens": 1, **PUBLIC}, public=True),
        ),
        rows="B",
        stage=lambda c: (
            2 * c["BLOCK_B"] * c["D"] * (c["N_TOKENS"] * (c["H"] // c["HKV"]) + 6)
        ),  # all that a block loads
        read_once=(),
        partly={"qkv": used_elements},
        uses_matrix_unit=False,
    ),
    Entry(
        op=token_attention_linear,
        reference=token_attention_linear_reference,
        inputs=token_attention_linear_inputs,
        cases=(
            Case(
                "odd",
                {"n_tokens": 3, "N": 75, "H": 6, "HKV": 2, "D": 16, **ONE_REQUEST},
                dtypes=("bf16", "int8", "fp8", "fp16"),
            ),
            Case(
                "odd-first",
                {"n_tokens": 3, "N": 40, "H": 4, "HKV": 1, "D": 24, **ONE_REQUEST},
                dtypes=("bf16", "fp16"),
            ),
            Case(
                "odd-last",
                {"n_tokens": 1, "N": 70, "H": 3, "HKV": 3, "D": 64, **ONE_REQUEST},
                dtypes=("bf16", "fp16"),
            ),
            Case(
                "wo-b1",
                {"n_tokens": 3, "N": 3072, **PUBLIC, **ONE_REQUEST},
                public=True,
                dtypes=("bf16", "int8", "fp8", "fp16"),
            ),
        ),
        rows="B",
        stage=lambda c: c["BLOCK_N"] * c["D"] * (c["H"] // c["HKV"]),
        read_once=("wo",),
        partly={"qkv": used_elements},
        multiply_adds=lambda args: len(args["residual"]) * args["wo"].numel(),
    ),
]
