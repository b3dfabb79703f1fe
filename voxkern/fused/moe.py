"""A layer's mixture of experts through kernels, on the layer's own weights: 5 launches, 6 for many rows.

They are RMSNorm + gate; routing, which also groups tokens by expert (many rows in a launch of its own); RMSNorm + gate
and up of the experts; down; and the sum with the residual. Shared experts ride along as experts of weight 1.
"""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from ..kernels.linear import expect_rows, launch_norm_linear
from ..kernels.moe_experts import (
    PointerTable,
    launch_moe_combine,
    launch_moe_experts_down,
    launch_moe_experts_up,
    pointer_table,
)
from ..kernels.moe_routing import choose_tile_rows, launch_moe_route, tile_count
from ..kernels.operator import on_device
from ..reference.layers import FeedForward
from ..reference.moe import MoEBlock


@dataclass(frozen=True)
class Scratch:
    """Memory between the launches; layers of the same sizes may share one, as they run one after the other.

    Attributes:
        logits: fp32 [R, E] for R = max_rows.
        ids: int32 [R, P], P = k + shared experts; see ``kernels/moe_routing.py`` for it and the next three.
        weights: fp32 [R, P].
        pairs: int32 [R * P].
        tiles: int32 [T, 3].
        gated: [R * P, hidden].
        parts: fp32 [R * P, dim].
    """

    logits: Tensor
    ids: Tensor
    weights: Tensor
    pairs: Tensor
    tiles: Tensor
    gated: Tensor
    parts: Tensor


class FusedMoE:
    """``stream += experts(RMSNorm(stream))`` of one layer: what a dense layer does by norm_swiglu and linear.

    Attributes:
        layer: whose weights it reads; they may be loaded, moved or replaced between runs.
        max_rows: the most tokens of a run.
        phase: "decode", where an expert that is hit is read once; or "prefill", where tiles are as many tokens as an
            expert may get. Settings, and so the last bits of a result, belong to it and to `max_rows`.
        scratch: which other layers' fused mixtures may share.
    """

    def __init__(self, layer: MoEBlock, max_rows: int, phase: str = "decode", scratch: Scratch | None = None) -> None:
        """Prepare for 1..`max_rows` tokens.

        Args:
            layer: the module.
            max_rows: prepared for, 1..512 at decode, where more than 64 make experts be read more than once.
            phase: "decode" or "prefill".
            scratch: that of another layer's FusedMoE with the same sizes, `max_rows` and `phase`; None makes one.

        Raises:
            ValueError: `phase` is unknown, `max_rows` is out of range, or `scratch` is of other sizes.
        """
        expect_rows(1, max_rows, phase)
        self.layer, self.max_rows, self.phase = layer, max_rows, phase
        routing, E = layer.routing, layer.gate.out_features
        self._places = routing.top_k + layer.n_shared
        feeds = [*self._experts, *([layer.shared_experts] if layer.n_shared else [])]
        self._linears = [linear for feed in feeds for linear in (feed.w1, feed.w2, feed.w3)]
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
        """Add the mixture to `stream`, in launches and nothing else once it has run with these weights.

        Args:
            stream: [M, dim] in the weights' dtype, written in place; rows may lie apart.

        Raises:
            ValueError: a shape is wrong, or there are more rows than `max_rows`.
            TypeError: the dtype is not that of the weights.
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
        """The pointer tables of gates, ups and downs, kept so that a captured graph's live as long as this object."""
        addresses = tuple(linear.weight.data_ptr() for linear in self._linears)
        if self._addresses != addresses:
            experts, layer = self._experts, self.layer
            w1, w3, w2 = [e.w1.weight for e in experts], [e.w3.weight for e in experts], [e.w2.weight for e in experts]
            hidden = len(w1[0])
            for i in range(0, layer.n_shared * hidden, hidden):  # they stand side by side in one
                w1.append(layer.shared_experts.w1.weight[i : i + hidden])
                w3.append(layer.shared_experts.w3.weight[i : i + hidden])
                w2.append(layer.shared_experts.w2.weight[:, i : i + hidden])
            self._addresses = addresses
            self._pointer_tables = pointer_table(w1), pointer_table(w3), pointer_table(w2)
        return self._pointer_tables

    def _scratch(self, device: torch.device | str) -> Scratch:
        layer, R, P = self.layer, self.max_rows, self._places
        E, dtype = layer.gate.out_features, layer.gate.weight.dtype
        T = tile_count(R, E, layer.routing.top_k, layer.n_shared, self._tile_rows)
        hidden = self._experts[0].w1.out_features

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return Scratch(
            logits=zeros(R, E, dtype=torch.float32),
            ids=zeros(R, P, dtype=torch.int32),
            weights=zeros(R, P, dtype=torch.float32),
            pairs=zeros(R * P, dtype=torch.int32),
            tiles=zeros(T, 3, dtype=torch.int32),
            gated=zeros(R * P, hidden),
            parts=zeros(R * P, layer.gate.in_features, dtype=torch.float32),
        )
