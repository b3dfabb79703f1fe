"""Registry entry of ``norm_qkv_attention``, at the shapes of the public model."""

from typing import Any

from torch import Tensor

from bench.ops.qkv import norm_qkv_reference, qkv_inputs
from bench.ops.registry import Args, Case, Entry, TensorMaker
from bench.ops.token_attention import token_attention_reference, used_elements
from voxkern.kernels.norm_qkv_attention import norm_qkv_attention


def norm_qkv_attention_reference(
    qkv: Tensor, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float,
    n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int,
) -> Tensor:  # fmt: skip
    """Compute RMSNorm and three products, then plain attention over the three tokens."""
    rows = n_tokens * len(x) // 3
    new = norm_qkv_reference(x, norm, wq, wk, wv, eps, rows, len(x))
    qkv[:rows] = new[:rows]
    qkv[rows:, len(wq) :] = new[rows:, len(wq) :]
    return token_attention_reference(new, n_heads, n_kv_heads, n_tokens, max_batch)


def norm_qkv_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of a trained layer."""
    M, N, N_KV = 6 * s.B, s.H * s.D, s.HKV * s.D
    weights = {name: arg for name, arg in qkv_inputs(M, s.K, N, N_KV, make).items() if "scale" not in name}
    return (
        {"qkv": make(M, N + 2 * N_KV)}
        | weights
        | {
            "eps": 1e-5,
            "n_heads": s.H,
            "n_kv_heads": s.HKV,
            "n_tokens": s.n_tokens,
            "max_batch": s.max_batch,
        }
    )


def multiply_adds(args: Args) -> int:
    """Return the multiply-adds of the products with the weights. With `n_tokens` = 1, only x tokens have queries."""
    return used_elements(args) * int(args["wq"].shape[1])


HALF = ("bf16", "fp16")
PUBLIC = {"H": 32, "HKV": 8, "D": 128, "K": 3072}
ENTRIES = [
    Entry(
        op=norm_qkv_attention,
        reference=norm_qkv_attention_reference,
        inputs=norm_qkv_attention_inputs,
        cases=(
            Case("odd", {"B": 9, "max_batch": 10, "n_tokens": 3, "K": 99, "H": 3, "HKV": 1, "D": 64}, dtypes=HALF),
            Case("odd-last", {"B": 3, "max_batch": 4, "n_tokens": 1, "K": 99, "H": 2, "HKV": 2, "D": 64}, dtypes=HALF),
            Case(
                "odd-many", {"B": 17, "max_batch": 17, "n_tokens": 3, "K": 99, "H": 1, "HKV": 1, "D": 128}, dtypes=HALF
            ),
            Case("b4", {"B": 4, "max_batch": 4, "n_tokens": 3, **PUBLIC}, public=True, dtypes=HALF),
            Case("last-b4", {"B": 4, "max_batch": 4, "n_tokens": 1, **PUBLIC}, public=True, dtypes=HALF),
            Case("b8", {"B": 8, "max_batch": 8, "n_tokens": 3, **PUBLIC}, public=True, dtypes=HALF),
            Case("last-b8", {"B": 8, "max_batch": 8, "n_tokens": 1, **PUBLIC}, public=True, dtypes=HALF),
            Case("b32", {"B": 32, "max_batch": 32, "n_tokens": 3, **PUBLIC}, public=True, dtypes=HALF),
            Case("last-b32", {"B": 32, "max_batch": 32, "n_tokens": 1, **PUBLIC}, public=True, dtypes=HALF),
        ),
        rows="B",
        read_once=("wq", "wk", "wv"),
        partly={"qkv": used_elements},
        ordered_by=("p_arrived",),
        multiply_adds=multiply_adds,
    ),
]
