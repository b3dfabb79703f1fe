"""The fused mixture of experts: it runs one layer's mixture through kernels, on the layer's weights.

A run takes five launches:

1. RMSNorm and the router's gate.
2. Routing, which also groups the tokens by expert. Grouping is a sixth launch for a `max_rows` of more than 64 with up
   to 128 experts, or of more than 32 with up to 256.
3. RMSNorm, and the gate and up projections of the experts.
4. The down projections of the experts.
5. The sum of the experts' results and the residual.

A shared expert runs in the same launches, as an expert that every token uses with weight 1.
"""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from ..kernels.linear import expect_rows
from ..kernels.moe_experts import (
    PointerTable,
    launch_moe_combine,
    launch_moe_experts_down,
    launch_moe_experts_up,
    pointer_table,
)
from ..kernels.moe_routing import choose_tile_rows, launch_moe_route, tile_count
from ..kernels.norm_linear import launch_norm_linear
from ..kernels.operator import on_device
from ..reference.layers import FeedForward
from ..reference.moe import MoEBlock
from ..reference.quantized import QuantizedLinear, scale_of


@dataclass(frozen=True)
class Scratch:
    """The memory between the launches. Layers of the same sizes may share it, because layers run one after the other.

    R = max_rows, E = routed experts, P = experts of a token, including shared experts, and T = the most tiles. A pair
    is a token and one of its P experts. See ``kernels/moe_routing.py`` for `ids`, `weights`, `pairs` and `tiles`.

    Attributes:
        logits: fp32 [R, E], the router's logits.
        ids: int32 [R, P], the experts of each token.
        weights: fp32 [R, P], the experts' weights.
        pairs: int32 [R * P], the numbers of the pairs, grouped by expert.
        tiles: int32 [T, 3], each tile's expert, its first index in `pairs`, and the index after its last.
        gated: [R * P, hidden], the experts' hidden activations.
        parts: fp32 [R * P, dim], the experts' weighted results.
    """

    logits: Tensor
    ids: Tensor
    weights: Tensor
    pairs: Tensor
    tiles: Tensor
    gated: Tensor
    parts: Tensor


class FusedMoE:
    """Computes ``stream += experts(RMSNorm(stream))`` of one layer: the feed-forward of a layer with experts.

    Attributes:
        layer: the module. The module's weights may be loaded, moved or replaced between runs.
        max_rows: the most tokens of a run. The launch configs and a result's last bits depend on `max_rows` and
            `phase`.
        phase: "decode" or "prefill". In decode, a tile has space for `max_rows` tokens, so that the weights of a used
            expert are read once. In prefill, a tile has about twice an expert's mean number of tokens. In both phases a
            tile has at most 64 tokens, or 16 if the weights are fp32.
        scratch: the memory between the launches, which the fused mixtures of other layers may share.
    """

    def __init__(self, layer: MoEBlock, max_rows: int, phase: str = "decode", scratch: Scratch | None = None) -> None:
        """Prepare for a layer.

        Args:
            layer: the module.
            max_rows: the most tokens of a run, 1..512 in decode. In decode with more than 64 tokens (16 if the
                weights are fp32), an expert's weights may be read more than once.
            phase: "decode" or "prefill".
            scratch: memory of another layer's FusedMoE with the same sizes, `max_rows` and `phase`; None allocates
                memory.

        Raises:
            ValueError: `phase` is unknown, `max_rows` is out of range, or `scratch` has other sizes.
        """
        expect_rows(1, max_rows, phase)
        self.layer, self.max_rows, self.phase = layer, max_rows, phase
        routing, E = layer.routing, layer.gate.out_features
        self._places = routing.top_k + layer.n_shared
        feeds = [*self._experts, *([layer.shared_experts] if layer.n_shared else [])]
        self._linears = [linear for feed in feeds for linear in (feed.w1, feed.w2, feed.w3)]
        self._quantized = [linear for linear in self._linears if isinstance(linear, QuantizedLinear)]
        self._addresses: tuple[int, ...] = ()
        self._tile_rows = choose_tile_rows(E, routing.top_k, layer.gate.weight.dtype, max_rows, phase)
        made = self._scratch("meta")
        self.scratch = self._scratch(layer.gate.weight.device) if scratch is None else scratch
        for field in fields(Scratch):
            mine, given = getattr(made, field.name), getattr(self.scratch, field.name)
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"scratch.{field.name} is {given.dtype} {list(given.shape)} but this layer needs {mine.dtype} "
                    f"{list(mine.shape)}"
                )

    def run(self, stream: Tensor) -> None:
        """Add the mixture's result to `stream`.

        The first run, and the first run after weights have moved, build tables of the weights' addresses. Other runs
        only launch kernels.

        Args:
            stream: [M, dim] in the weights' dtype, written in place; the last dimension must have stride 1.

        Raises:
            ValueError: a shape is wrong, or M is not in 1..max_rows.
            TypeError: `stream` or the weights have another dtype than the weights had at preparation.
        """
        layer, gate, norm = self.layer, self.layer.gate, self.layer.ffn_norm
        if stream.ndim != 2 or stream.shape[1] != gate.in_features or stream.stride(1) != 1:
            raise ValueError(f"stream is {list(stream.shape)} but must be [M, {gate.in_features}], rows of stride 1")
        if not stream.dtype == gate.weight.dtype == self.scratch.gated.dtype:
            raise TypeError(
                f"stream is {stream.dtype} and the weights are {gate.weight.dtype}, but both must be "
                f"{self.scratch.gated.dtype}, as the fused layer was prepared"
            )
        M, r, s = len(stream), layer.routing, self.scratch
        expect_rows(M, self.max_rows, self.phase)
        w1, w3, w2 = self._weights()
        T = tile_count(M, gate.out_features, r.top_k, layer.n_shared, self._tile_rows)
        n_pairs = M * self._places
        logits, weights, pairs, tiles = s.logits[:M], s.weights[:M], s.pairs[:n_pairs], s.tiles[:T]
        gated, parts = s.gated[:n_pairs], s.parts[:n_pairs]
        with on_device("the mixture of experts", stream):
            launch_norm_linear(logits, stream, norm.weight, gate.weight, norm.eps, self.max_rows, self.phase)
            launch_moe_route(
                (s.ids[:M], weights, pairs, tiles), logits, gate.e_score_correction_bias, r.top_k, layer.n_shared,
                r.scoring, r.n_groups, r.n_groups_per_tok, r.renormalise, r.scale, self._tile_rows, self.max_rows,
            )  # fmt: skip
            launch_moe_experts_up(gated, stream, norm.weight, w1, w3, pairs, tiles, norm.eps, self._tile_rows)
            launch_moe_experts_down(parts, gated, w2, weights, pairs, tiles, self._tile_rows)
            launch_moe_combine(stream, parts)

    @property
    def _experts(self) -> list[FeedForward]:
        return cast(list[FeedForward], list(self.layer.experts))

    def _weights(self) -> tuple[PointerTable, PointerTable, PointerTable]:
        """Return the pointer tables of w1, w3 and w2; captured graphs read the same tables until an address changes."""
        addresses = tuple(linear.weight.data_ptr() for linear in self._linears)
        addresses += tuple(linear.qscale_weight.data_ptr() for linear in self._quantized)
        if self._addresses != addresses:
            self._addresses = addresses
            self._pointer_tables = self._table("w1"), self._table("w3"), self._table("w2")
        return self._pointer_tables

    def _table(self, name: str) -> PointerTable:
        """Return the pointer table of a linear layer of all experts: "w1", "w2" or "w3"."""
        layers = [getattr(expert, name) for expert in self._experts]
        weights, scales, hidden = [one.weight for one in layers], [scale_of(one) for one in layers], self._hidden
        for i in range(0, self.layer.n_shared * hidden, hidden):  # one tensor holds all shared experts
            shared, mine = getattr(self.layer.shared_experts, name), slice(i, i + hidden)
            scale = scale_of(shared)
            weights.append(shared.weight[:, mine] if name == "w2" else shared.weight[mine])
            scales.append(scale if scale is None or name == "w2" else scale[mine])
        return pointer_table(weights, [scale for scale in scales if scale is not None])

    @property
    def _hidden(self) -> int:
        return self._experts[0].w1.out_features

    def _scratch(self, device: torch.device | str) -> Scratch:
        layer, R, P = self.layer, self.max_rows, self._places
        E, dtype = layer.gate.out_features, layer.gate.weight.dtype
        T = tile_count(R, E, layer.routing.top_k, layer.n_shared, self._tile_rows)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return Scratch(
            logits=zeros(R, E, dtype=torch.float32),
            ids=zeros(R, P, dtype=torch.int32),
            weights=zeros(R, P, dtype=torch.float32),
            pairs=zeros(R * P, dtype=torch.int32),
            tiles=zeros(T, 3, dtype=torch.int32),
            gated=zeros(R * P, self._hidden),
            parts=zeros(R * P, layer.gate.in_features, dtype=torch.float32),
        )
