"""Registry entry of the codec's windowed attention, at the shapes of the public model."""

from typing import Any

from torch import Tensor

from bench.ops.codec import chunk_inputs
from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.codec_attention import codec_attention
from voxkern.reference.codec_stream import Chunk, attend_chunk
from voxkern.reference.layers import rms_norm


def codec_attention_reference(
    out: Tensor,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    kv_window: Tensor,
    past_frames: Tensor,
    new_frames: Tensor,
    parity: Tensor,
    rate: int,
    eps: float,
    n_heads: int,
) -> None:
    """Compute the norms of queries and keys, each rounded, then attention over a chunk with the reference's function.

    The results are written to `out`, and the last keys and values to `kv_window`.
    """
    B, now = len(past_frames), int(parity)
    q, k, v = qkv.view(B, -1, qkv.shape[1]).chunk(3, dim=2)
    parts = (rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v)
    q, k, v = (part.unflatten(2, (n_heads, -1)) for part in parts)  # [B, T, H, D]
    kv_window[1 - now] = kv_window[now]
    chunk = Chunk((past_frames == 0).view(-1, 1, 1), past_frames * rate, new_frames * rate)
    kept = kv_window[1 - now].unflatten(-1, (n_heads, -1))
    out.copy_(attend_chunk(kept, chunk, q, k, v).flatten(2).flatten(0, 1))


def codec_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with scores of standard deviation 1."""
    W = s.H * s.D
    return {
        "out": make(s.B * s.T * s.rate, W),
        "qkv": make(s.B * s.T * s.rate, 3 * W),
        "q_norm": make(W, mean=1.0, std=0.1),
        "k_norm": make(W, mean=1.0, std=0.1),
        "kv_window": make(2, 2, s.B, s.window, W),
        "rate": s.rate,
        "eps": 1e-6,
        "n_heads": s.H,
        **chunk_inputs(s, make),
    }


LAST = {"rate": 8, "H": 8, "D": 128, "window": 16}

ENTRIES = [
    Entry(
        op=codec_attention,
        reference=codec_attention_reference,
        inputs=codec_attention_inputs,
        cases=(
            Case("odd", {"B": 3, "T": 5, "rate": 4, "H": 3, "D": 24, "window": 4}),
            Case("odd-window", {"B": 5, "T": 3, "rate": 8, "H": 2, "D": 40, "window": 16}),
            Case("odd-first", {"B": 4, "T": 1, "rate": 1, "H": 5, "D": 16, "window": 2}),
            Case("b1", {"B": 1, "T": 1, **LAST}, public=True),
            Case("b32", {"B": 32, "T": 1, **LAST}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
    ),
]
