"""Registry entries of the experts' kernels, at the shapes of Mistral Small 4.

That model is 4096 wide, and its experts have 2048 hidden columns. A token uses 4 of 128 experts, and a shared expert.
The public cases have fewer experts, and their tokens use all of these (in ``small-4-b32``, 62 of 65). The bytes of a
launch are therefore known.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.moe_routing import PLAIN, moe_route_inputs, moe_route_reference
from bench.ops.registry import ALL_DTYPES, BF16_AND_8_BITS, Case, Entry, TensorMaker
from voxkern.kernels.moe_experts import moe_combine, moe_experts_down, moe_experts_up
from voxkern.kernels.moe_routing import choose_tile_rows, moe_route
from voxkern.reference.layers import rms_norm, upcast
from voxkern.reference.quantized import scaled_linear


def _routing(s: Any, make: TensorMaker) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, pairs and tiles of random tokens; on the meta device these tensors have shapes only."""
    s.tile_rows = choose_tile_rows(s.E, s.top_k, make.dtype, s.max_rows, "decode" if s.decode else "prefill")
    for name, value in PLAIN.items():
        setattr(s, name, value)
    args = moe_route_inputs(s, make)
    _, *routing = moe_route.declare(**args) if make.device == "meta" else moe_route_reference(**args)
    weights, pairs, tiles = routing
    return weights, pairs, tiles


def _rows(pairs: Tensor, tiles: Tensor) -> list[tuple[int, Tensor]]:
    """Return (expert, pairs) of every tile in use."""
    return [(expert, pairs[first:end].long()) for expert, first, end in tiles.tolist() if expert >= 0]


def moe_experts_up_reference(
    x: Tensor,
    norm: Tensor,
    w1: list[Tensor],
    w3: list[Tensor],
    pairs: Tensor,
    tiles: Tensor,
    eps: float,
    tile_rows: int,
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
) -> Tensor:
    """Compute each expert's feed-forward up to the gated product, tile by tile, rounding after each operation."""
    n, P = rms_norm(x, norm, eps), len(pairs) // len(x)
    y = x.new_zeros(len(pairs), len(w1[0]))
    for expert, rows in _rows(pairs, tiles):
        gate = scaled_linear(n[rows // P], w1[expert], None if scale1 is None else scale1[expert])
        y[rows] = F.silu(gate) * scaled_linear(n[rows // P], w3[expert], None if scale3 is None else scale3[expert])
    return y


def _experts(n: int, N: int, K: int, make: TensorMaker) -> tuple[list[Tensor], Tensor | None]:
    """Return n weights [N, K], and their scales [n, N], or None if weights are not quantised."""
    weights, scales = zip(*(make.weight(N, K, std=K**-0.5) for _ in range(n)), strict=True)
    return list(weights), None if make.weights is None else torch.stack(scales)


def moe_experts_up_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of trained experts: the products have RMS 1."""
    _, pairs, tiles = _routing(s, make)
    x, norm = make(s.M, s.K), make(s.K, mean=1.0, std=0.1)
    (w1, scale1), (w3, scale3) = (_experts(s.E + s.n_shared, s.N, s.K, make) for _ in range(2))
    return {
        "x": x,
        "norm": norm,
        "w1": w1,
        "w3": w3,
        "pairs": pairs,
        "tiles": tiles,
        "eps": 1e-5,
        "tile_rows": s.tile_rows,
        "scale1": scale1,
        "scale3": scale3,
    }


def moe_experts_down_reference(
    x: Tensor, w2: list[Tensor], weights: Tensor, pairs: Tensor, tiles: Tensor, tile_rows: int,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute each expert's down projection tile by tile, round it, and multiply by the routing weights in fp32."""
    y = torch.zeros(len(x), len(w2[0]), dtype=weights.dtype, device=x.device)
    for expert, rows in _rows(pairs, tiles):
        part = scaled_linear(x[rows], w2[expert], None if scale is None else scale[expert])
        y[rows] = upcast(part) * weights.flatten()[rows, None]
    return y


def moe_experts_down_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of trained experts.

    The shared experts are slices of one tensor, as in a checkpoint, so the rows of their weights are not contiguous.
    """
    weights, pairs, tiles = _routing(s, make)
    w2, scale = _experts(s.E, s.N, s.K, make)
    shared, shared_scale = make.weight(s.N, max(s.n_shared, 1) * s.K, std=s.K**-0.5)
    if scale is not None and shared_scale is not None:
        scale = torch.cat((scale, shared_scale.expand(s.n_shared, -1)))
    return {
        "x": make(len(pairs), s.K),
        "w2": w2 + [shared[:, i * s.K : (i + 1) * s.K] for i in range(s.n_shared)],
        "weights": weights,
        "pairs": pairs,
        "tiles": tiles,
        "tile_rows": s.tile_rows,
        "scale": scale,
    }


def moe_combine_reference(stream: Tensor, parts: Tensor) -> None:
    """Add the parts one after the other, then the stream, and write the sum to `stream`, rounded once.

    Sums are computed in fp32, or in fp64 for fp64 parts.
    """
    y = torch.zeros_like(parts[: len(stream)])
    for part in parts.view(len(stream), -1, stream.shape[1]).unbind(1):
        y = y + part
    stream.copy_(upcast(stream) + y)


def moe_combine_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return a random stream and random parts, fp32 like those of ``moe_experts_down``."""
    return {"stream": make(s.M, s.N), "parts": make(s.M * s.P, s.N).float()}


ODD = {"M": 19, "E": 5, "top_k": 2, "n_shared": 2, "max_rows": 20, "decode": 1, "N": 75, "K": 150}
ODD_ONE = {"M": 37, "E": 2, "top_k": 1, "n_shared": 0, "max_rows": 40, "decode": 0, "N": 97, "K": 129}
B1 = {"M": 1, "E": 4, "top_k": 4, "n_shared": 1, "max_rows": 1, "decode": 1}
B32 = {"M": 32, "E": 64, "top_k": 4, "n_shared": 1, "max_rows": 32, "decode": 1}
PREFILL = {
    "M": 64,
    "E": 4,
    "top_k": 4,
    "n_shared": 1,
    "max_rows": 64,
    "decode": 0,
}  # 64 rows per tile, as for 1024 tokens and 128 experts
UP, DOWN = {"N": 2048, "K": 4096}, {"N": 4096, "K": 2048}

ENTRIES = [
    Entry(
        op=moe_experts_up,
        reference=moe_experts_up_reference,
        inputs=moe_experts_up_inputs,
        cases=(
            Case("odd", ODD, dtypes=ALL_DTYPES),
            Case("odd-one", ODD_ONE),
            Case("small-4-b1", B1 | UP, public=True, dtypes=BF16_AND_8_BITS),
            Case("small-4-b32", B32 | UP, public=True, dtypes=BF16_AND_8_BITS),
            Case("small-4-prefill-b1", PREFILL | UP, public=True, dtypes=BF16_AND_8_BITS),
        ),
        stage=lambda c: 2 * c["BLOCK_N"] * c["BLOCK_K"],
        read_once=(),  # the data decides which experts are read: tests/test_moe_experts.py counts them
        regular_grid=False,
        weight_names=("w1", "w3"),
        multiply_adds=lambda args: len(args["pairs"]) * 2 * args["w1"][0].numel(),
    ),
    Entry(
        op=moe_experts_down,
        reference=moe_experts_down_reference,
        inputs=moe_experts_down_inputs,
        cases=(
            Case("odd", ODD, dtypes=ALL_DTYPES),
            Case("odd-one", ODD_ONE),
            Case("small-4-b1", B1 | DOWN, public=True, dtypes=BF16_AND_8_BITS),
            Case("small-4-b32", B32 | DOWN, public=True, dtypes=BF16_AND_8_BITS),
            Case("small-4-prefill-b1", PREFILL | DOWN, public=True, dtypes=BF16_AND_8_BITS),
        ),
        read_once=(),
        regular_grid=False,
        weight_names=("w2",),
        multiply_adds=lambda args: len(args["pairs"]) * args["w2"][0].numel(),
    ),
    Entry(
        op=moe_combine,
        reference=moe_combine_reference,
        inputs=moe_combine_inputs,
        cases=(
            Case("odd", {"M": 19, "P": 3, "N": 150}),
            Case("odd-one", {"M": 5, "P": 1, "N": 75}),
            Case("small-4-b1", {"M": 1, "P": 5, "N": 4096}, public=True, dtypes=("bf16",)),
            Case("small-4-b32", {"M": 32, "P": 5, "N": 4096}, public=True, dtypes=("bf16",)),
        ),
        stage=lambda c: 0,
        read_once=(),
        uses_matrix_unit=False,
    ),
]
