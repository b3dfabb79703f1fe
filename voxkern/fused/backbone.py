"""The fused backbone: it runs a backbone's layers through kernels, on the backbone's weights and a paged KV cache.

A decode step runs one token of each request, in memory that is allocated once. A layer takes five launches, or eight or
nine if the layer has experts. A prefill runs many tokens of several requests, concatenated, with tiles as large as the
matrix units need. The launch configs depend on the phase, decode or prefill, but never on the number of rows in a call.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from ..kernels.linear import launch_linear, linear_shares
from ..kernels.norm_linear import launch_norm_swiglu, norm_swiglu_shares
from ..kernels.operator import on_device
from ..kernels.paged_attention import (
    PAGE_SIZES,
    launch_paged_attention,
    launch_prefill_attention,
    paged_attention_scratch,
)
from ..kernels.qkv import launch_norm_qkv, launch_norm_qkv_append
from ..kernels.rms_norm import launch_rms_norm
from ..kernels.rope import launch_rope_append
from ..kernels.shares import Scratch, Shares, new_scratch
from ..reference.attention import PagedCache, TransformerBlock, rope_table
from ..reference.backbone import Backbone
from ..reference.moe import MoEBlock
from ..reference.quantized import scale_of, scales_of_qkv
from ..validation import refuse_gradients
from .moe import FusedMoE

MAX_BATCH = 64
MAX_SEQ_LEN = 16_384  # 64 attention spans of 256 tokens; 20 minutes of speech
PREFILL_ROWS = 1 << 20  # max_rows of a prefill's launches; no launch config of the prefill phase depends on it
MOE_ROWS = 1024  # a prefill runs the experts on at most this many tokens at a time
NAME = "the accelerated backbone"
PAGE_SIZE = 64  # tokens per page of the cache that a call without a cache allocates


@dataclass(frozen=True)
class BackboneBuffers:
    """The memory that one decode step of B requests needs: views of the memory for `max_batch` requests.

    Attributes:
        stream: [B, dim], the residual stream.
        q: [B, H * D], the rotated queries.
        attended: [B, H * D], the result of the attention.
        gated: [B, hidden], the feed-forward's hidden activations.
        hidden: [B, dim], the result, after the final norm.
        scratch: scratch memory of the attention, see
            :func:`voxkern.kernels.paged_attention.paged_attention_scratch`.
        shares: memory for parts of tiles that blocks share.
    """

    stream: Tensor
    q: Tensor
    attended: Tensor
    gated: Tensor
    hidden: Tensor
    scratch: tuple[Tensor, Tensor]
    shares: Scratch


@dataclass(frozen=True)
class TokenBatch:
    """The new tokens of B requests, concatenated into R rows.

    Attributes:
        n_new: number of new tokens of each request.
        cu_seqlens: int32 [B + 1], the first row of each request, and R at the end.
        request_ids: int32 [R], the request of each row.
        positions: int32 [R], the position of each row in its request; -1 marks a row without a request.
        lengths: int32 [B], tokens of each request including the new ones; 0 marks an unused entry.
    """

    n_new: list[int]
    cu_seqlens: Tensor
    request_ids: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, n_new: list[int], lengths: list[int], device: torch.device) -> "TokenBatch":
        """Make a batch from the new tokens and the total tokens of each request, with tensors on `device`."""
        request_ids = [b for b, n in enumerate(n_new) for _ in range(n)]
        positions = [
            length - n + t if length else -1 for n, length in zip(n_new, lengths, strict=True) for t in range(n)
        ]
        lists = ([0, *accumulate(n_new)], request_ids, positions, lengths)
        return cls(n_new, *(torch.tensor(one, dtype=torch.int32, device=device) for one in lists))


class FusedBackbone:
    """Replaces a backbone's ``hidden_states``, with the same arguments and, up to rounding, the same results.

    Attributes:
        module: the backbone. Every call reads the weights that the module holds at that time.
        max_batch: the most requests of a decode step. The launch configs, and thus a result's last bits, depend on it.
        max_seq_len: the most tokens of a request. The spans of attention and a result's last bits depend on this
            number.
    """

    def __init__(self, module: Backbone, max_batch: int, max_seq_len: int | None = None) -> None:
        """Prepare for a backbone.

        Args:
            module: the backbone.
            max_batch: the most requests of a decode step, 1..64.
            max_seq_len: the most tokens of a request, at least 1. None takes the config's number, or 16,384 if that is
                less.

        Raises:
            ValueError: `max_batch` or `max_seq_len` is out of range.
        """
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must be in 1..{MAX_BATCH}, got {max_batch}")
        self.module, self.max_batch = module, max_batch
        self.max_seq_len = min(module.backbone_config.max_seq_len, MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
        if self.max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
        self._key: tuple[torch.dtype, torch.device] | None = None
        self._buffers: dict[int, BackboneBuffers] = {}
        self._moe_layers: dict[tuple[str, torch.dtype, torch.device], dict[MoEBlock, FusedMoE]] = {}
        self._rope: Tensor | None = None

    def __call__(self, u: Tensor, cache: PagedCache | None = None) -> Tensor:
        """Run the layers over T tokens of each request, see :meth:`Backbone.hidden_states`.

        A call with T = 1 is always a decode step, even for the last token of a prompt in parts. A decode step sums in
        other tiles than a prefill, so the last bits of the two differ. :meth:`prefill` runs any number of tokens, 1
        included, and gives the same bits for a prompt in parts as for the whole prompt.

        Raises:
            RuntimeError: a gradient is needed.
            ValueError: a shape is wrong, or there are more requests than `max_batch` or tokens than `max_seq_len`.
            TypeError: a dtype is wrong.
        """
        if u.ndim != 3 or u.shape[2] != self.module.backbone_config.dim:
            raise ValueError(f"u must be [B, T, {self.module.backbone_config.dim}], got {list(u.shape)}")
        B, T, dim = u.shape
        cache = self._own_cache(B, T, u) if cache is None else cache
        table = cache.block_table.to(torch.int32)
        if T == 1:
            u = u[:, 0].contiguous()
            return self.decode(u, cache.kv, table, cache.lengths.to(torch.int32)).clone().unsqueeze(1)
        batch = TokenBatch.of([T] * B, cache.lengths.tolist(), u.device)
        states = self.prefill(u.reshape(B * T, dim), batch, cache.kv, table)
        return self.norm(states).view(B, T, dim)

    def decode(self, u: Tensor, kv: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None) -> Tensor:
        """Run one token of each request.

        The first call with B requests allocates memory; later calls with B requests only launch kernels.

        Args:
            u: [B, dim], embeddings in the weights' dtype.
            kv: [layers, pages, 2, Hkv, PAGE, D], the cache; the tokens' keys and values are written to it.
            block_table: int32 [B, max_pages], the pages of each request in order.
            lengths: int32 [B], tokens of each request including the new one; 0 marks a row without a request.
            out: contiguous [B, dim], the memory for the result; None uses this object's own memory.

        Returns:
            [B, dim] after the final norm. Without `out`, the next call with B requests overwrites it. The values of
            rows of length 0 are undefined.

        Raises:
            RuntimeError: a gradient is needed.
            ValueError: a shape is wrong, or there are more requests than `max_batch` or tokens than `max_seq_len`.
            TypeError: a dtype is wrong.
        """
        self._check(u, kv, block_table, lengths)
        if len(u) > self.max_batch:
            raise ValueError(f"u has {len(u)} rows, the backbone is prepared for 1..{self.max_batch} (max_batch)")
        with on_device(NAME, u):
            b, rope, stream = self.buffers(u, kv), self.rope(u.device), u
            for layer, layer_kv in zip(self._blocks, kv, strict=True):
                attention = layer.attention
                launch_norm_qkv_append(
                    stream, layer.attention_norm.weight,
                    attention.wq.weight, attention.wk.weight, attention.wv.weight,
                    rope, block_table, lengths, b.q, layer_kv, self._eps, self.max_batch,
                    *scales_of_qkv(attention),
                )  # fmt: skip
                launch_paged_attention(b.attended, b.q, layer_kv, block_table, lengths, 0, self.max_seq_len, b.scratch)
                launch_linear(
                    b.stream, b.attended, attention.wo.weight, None, None, stream, self.max_batch,
                    scale=scale_of(attention.wo), scratch=b.shares,
                )  # fmt: skip
                stream = b.stream
                self._feed_forward(layer, stream, b.gated, self.max_batch, "decode", b.shares)
            out = b.hidden if out is None else out
            launch_rms_norm(out, stream, self.module.norm.weight, self._eps)
        return out

    def prefill(self, u: Tensor, batch: TokenBatch, kv: Tensor, block_table: Tensor) -> Tensor:
        """Run many tokens of several requests, in six launches per layer (more if the layer has experts).

        Every call allocates its memory. A prompt may be run in parts: the result has the same bits as in one call.

        Args:
            u: [R, dim], embeddings in the weights' dtype.
            batch: the requests and positions of the rows.
            kv: [layers, pages, 2, Hkv, PAGE, D], the cache; the tokens' keys and values are written to it.
            block_table: int32 [B, max_pages], the pages of each request in order.

        Returns:
            [R, dim] before the final norm, because usually only a prompt's last row is needed; see :meth:`norm`.

        Raises:
            RuntimeError: a gradient is needed.
            ValueError: a shape is wrong, or there are more tokens than `max_seq_len`.
            TypeError: a dtype is wrong.
        """
        self._check(u, kv, block_table, batch.lengths)
        config, R, many = self.module.backbone_config, len(u), (PREFILL_ROWS, "prefill")
        with on_device(NAME, u):
            rope, stream = self.rope(u.device), u
            qkv = u.new_empty(R, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
            attended = u.new_empty(R, config.n_heads * config.head_dim)
            gated, out = u.new_empty(R, config.hidden_dim), torch.empty_like(u)
            for layer, layer_kv in zip(self._blocks, kv, strict=True):
                attention = layer.attention
                launch_norm_qkv(
                    qkv, stream, layer.attention_norm.weight,
                    attention.wq.weight, attention.wk.weight, attention.wv.weight, self._eps, R, *many,
                    *scales_of_qkv(attention),
                )  # fmt: skip
                launch_rope_append(rope, batch.request_ids, batch.positions, block_table, qkv, layer_kv)
                launch_prefill_attention(
                    attended,
                    qkv,
                    layer_kv,
                    block_table,
                    batch.cu_seqlens,
                    batch.lengths,
                    0,
                    max(batch.n_new),
                    config.n_heads,
                )
                wo, scale = attention.wo.weight, scale_of(attention.wo)
                launch_linear(out, attended, wo, None, None, stream, *many, scale)
                stream = out
                self._feed_forward(layer, stream, gated, *many, None)
        return stream

    def _feed_forward(
        self, layer: TransformerBlock | MoEBlock, stream: Tensor, gated: Tensor, max_rows: int, phase: str,
        shares: Scratch | None,
    ) -> None:  # fmt: skip
        """Compute ``stream += feed_forward(RMSNorm(stream))``. In decode, `shares` is scratch memory."""
        if isinstance(layer, MoEBlock):
            mixture = self._fused_moe(layer, max_rows, phase)
            for start in range(0, len(stream), mixture.max_rows):
                mixture.run(stream[start : start + mixture.max_rows])
            return
        feed, norm = layer.feed_forward, layer.ffn_norm.weight
        launch_norm_swiglu(
            gated, stream, norm, feed.w1.weight, feed.w3.weight, self._eps, max_rows, phase,
            scale_of(feed.w1), scale_of(feed.w3), shares,
        )  # fmt: skip
        launch_linear(stream, gated, feed.w2.weight, None, None, stream, max_rows, phase, scale_of(feed.w2), shares)

    def _fused_moe(self, layer: MoEBlock, max_rows: int, phase: str) -> FusedMoE:
        """Return the fused mixture of a layer with experts; all layers share one scratch memory per phase."""
        weight = layer.gate.weight
        kind = (phase, weight.dtype, weight.device)
        layers = self._moe_layers.setdefault(kind, {})
        if layer not in layers:
            scratch = next((fused.scratch for fused in layers.values()), None)
            layers[layer] = FusedMoE(layer, min(max_rows, MOE_ROWS), phase, scratch)
        return layers[layer]

    def norm(self, states: Tensor) -> Tensor:
        """Compute the final norm of rows that :meth:`prefill` returned: [rows, dim] -> [rows, dim]."""
        out = torch.empty_like(states)
        with on_device(NAME, states):
            launch_rms_norm(out, states, self.module.norm.weight, self._eps)
        return out

    def buffers(self, u: Tensor, kv: Tensor) -> BackboneBuffers:
        """Return the memory for a decode step with the rows of `u`.

        The first call allocates the memory for `max_batch` requests; all calls return views of it.
        """
        config, key = self.module.backbone_config, (u.dtype, u.device)
        if self._key != key:
            q = u.new_zeros(self.max_batch, config.n_heads * config.head_dim)
            stream = u.new_zeros(self.max_batch, config.dim)
            self._key, self._buffers = key, {}
            self._whole = BackboneBuffers(
                stream=stream,
                q=q,
                attended=torch.zeros_like(q),
                gated=u.new_zeros(self.max_batch, config.hidden_dim),
                hidden=torch.zeros_like(stream),
                scratch=paged_attention_scratch(q, kv[0], self.max_seq_len),
                shares=new_scratch(q, self._shares(u.dtype)),
            )
        B, b = len(u), self._whole
        if B not in self._buffers:
            partial, arrived = b.scratch
            views = (b.stream[:B], b.q[:B], b.attended[:B], b.gated[:B], b.hidden[:B])
            self._buffers[B] = BackboneBuffers(*views, scratch=(partial[:B], arrived[:B]), shares=b.shares)
        return self._buffers[B]

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        """Return how the launches of a decode step divide their tiles, with activations of `dtype`."""
        found = []
        for layer in self._blocks:
            found.append(linear_shares(layer.attention.wo.weight, dtype, self.max_batch))
            if not isinstance(layer, MoEBlock):
                found.append(norm_swiglu_shares(layer.feed_forward.w1.weight, dtype, self.max_batch))
                found.append(linear_shares(layer.feed_forward.w2.weight, dtype, self.max_batch))
        return found

    def rope(self, device: torch.device) -> Tensor:
        """Return the table of RoPE's cosines and sines, fp32 [positions, 2, D / 2].

        The first call computes the table in fp64. A request may fill its last page beyond `max_seq_len`, so the table
        has `max_seq_len` positions rounded up to whole pages of the largest size.
        """
        if self._rope is None or self._rope.device != device:
            config, rows = self.module.backbone_config, -(-self.max_seq_len // PAGE_SIZES[-1]) * PAGE_SIZES[-1]
            positions = torch.arange(rows, device=device)
            self._rope = torch.stack(rope_table(positions, config.head_dim, config.rope_theta), dim=1).float()
        return self._rope

    @property
    def _blocks(self) -> list[TransformerBlock | MoEBlock]:
        return cast(list[TransformerBlock | MoEBlock], list(self.module.layers))

    @property
    def _eps(self) -> float:
        return self.module.backbone_config.norm_eps

    def _own_cache(self, B: int, T: int, u: Tensor) -> PagedCache:
        """Allocate a cache for a call without one: B requests of T tokens, from position 0."""
        config, pages = self.module.backbone_config, -(-T // PAGE_SIZE)
        shape = (config.n_layers, B * pages, 2, config.n_kv_heads, PAGE_SIZE, config.head_dim)
        table = torch.arange(B * pages, dtype=torch.int32, device=u.device).view(B, pages)
        return PagedCache(u.new_zeros(shape), table, torch.full((B,), T, device=u.device))

    def _check(self, u: Tensor, kv: Tensor, block_table: Tensor, lengths: Tensor) -> None:
        weight, config = self.module.norm.weight, self.module.backbone_config
        refuse_gradients("backbone", u, weight)
        if u.ndim != 2 or u.shape[1] != config.dim or not u.is_contiguous():
            raise ValueError(f"u must be contiguous [rows, {config.dim}], got {list(u.shape)}, strides {u.stride()}")
        if u.dtype != weight.dtype or u.device != weight.device or kv.dtype != weight.dtype:
            raise TypeError(f"u is {u.dtype} on {u.device} and kv is {kv.dtype}, but the weights are {weight.dtype}")
        layer = [config.n_layers, kv.shape[1], 2, config.n_kv_heads, *kv.shape[4:5], config.head_dim]
        if kv.ndim != 6 or list(kv.shape) != layer:
            raise ValueError(f"kv must be [layers, pages, 2, Hkv, PAGE, D] = {layer}, got {list(kv.shape)}")
        if kv.shape[4] not in PAGE_SIZES:
            raise ValueError(f"kv has pages of {kv.shape[4]} tokens but must have 16, 32, 64 or 128")
        if block_table.dtype != torch.int32 or lengths.dtype != torch.int32 or len(block_table) != len(lengths):
            raise ValueError(
                f"block_table and lengths must be int32 with the same number of rows, got {block_table.dtype} "
                f"{list(block_table.shape)} and {lengths.dtype} {list(lengths.shape)}"
            )
        if (block_table.shape[1] - 1) * kv.shape[4] >= self.max_seq_len:
            raise ValueError(
                f"block_table has {block_table.shape[1]} pages of {kv.shape[4]} tokens per request, but the backbone "
                f"is prepared for {self.max_seq_len} tokens (max_seq_len)"
            )
