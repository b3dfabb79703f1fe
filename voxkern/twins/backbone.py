"""The backbone's twin: five launches a layer (eight with experts), on the host's own weights, over the paged KV cache.

Decode is one token a request, in memory that is made once; a prefill is many tokens of several requests side by side,
with tiles as large as the matrix units want them. Which of the two it is decides the settings, never the rows at hand.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.attention import PAGES, attention_scratch, launch_paged_attention, launch_prefill_attention
from ..kernels.backbone import launch_rms_norm
from ..kernels.linear import launch_linear, launch_norm_swiglu
from ..kernels.operator import on_device
from ..kernels.qkv import launch_norm_qkv, launch_norm_qkv_append, launch_rope_append
from ..reference.attention import PagedCache, TransformerBlock, rope_table
from ..reference.backbone import Backbone
from ..reference.moe import MoEBlock
from .moe import MoETwin

MAX_BATCH = 64
MAX_TOKENS = 16_384  # 20 minutes of speech: as many as 64 spans of 256 tokens hold
PREFILL_ROWS = 1 << 20  # prepared for: in a prefill the settings depend on no rows at all
MIXTURE_ROWS = 1024  # tokens of a prefill that go through the experts at once
NAME = "the accelerated backbone"
PAGE = 64  # of a cache made for a call without one


@dataclass(frozen=True)
class Buffers:
    """Memory of one token each of B requests: views of what `max_batch` take.

    Attributes:
        stream: [B, dim], the residual stream.
        q: [B, H * D].
        attended: [B, H * D].
        gated: [B, hidden].
        hidden: [B, dim], the result, after the final norm.
        scratch: of the attention, see :func:`voxkern.kernels.attention.attention_scratch`.
    """

    stream: Tensor
    q: Tensor
    attended: Tensor
    gated: Tensor
    hidden: Tensor
    scratch: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rows:
    """New tokens of several requests, side by side.

    Attributes:
        new: how many of each request.
        starts: int32 [B + 1], each request's first row.
        requests: int32 [R], each row's request.
        positions: int32 [R], each row's place in its request, -1 for one that holds nothing.
        lengths: int32 [B], tokens of each request with the new ones.
    """

    new: list[int]
    starts: Tensor
    requests: Tensor
    positions: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, new: list[int], lengths: list[int], device: torch.device) -> "Rows":
        """`new` tokens of each request, which then has `lengths`; length 0 holds no request."""
        requests = [b for b, n in enumerate(new) for _ in range(n)]
        places = [length - n + t if length else -1 for n, length in zip(new, lengths, strict=True) for t in range(n)]
        lists = ([0, *accumulate(new)], requests, places, lengths)
        return cls(new, *(torch.tensor(one, dtype=torch.int32, device=device) for one in lists))


class BackboneTwin:
    """Stands in for a host's ``hidden_states``: same arguments, same states up to rounding.

    Attributes:
        host: whose weights it reads, anew in every call.
        max_batch: requests that it is prepared for.
        max_tokens: tokens a request that it is prepared for. How attention is split, and so a last bit, belongs to it.
    """

    def __init__(self, host: Backbone, max_batch: int, max_tokens: int | None = None) -> None:
        """`max_tokens`: None takes the config's ``max_seq_len``, or 16,384 where that is more.

        Raises:
            ValueError: a number is out of range.
        """
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must lie in 1..{MAX_BATCH}, got {max_batch}")
        self.host, self.max_batch = host, max_batch
        self.max_tokens = min(host.backbone_config.max_seq_len, MAX_TOKENS) if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._key: tuple[torch.dtype, torch.device] | None = None
        self._buffers: dict[int, Buffers] = {}
        self._mixtures: dict[tuple[str, torch.dtype, torch.device], dict[MoEBlock, MoETwin]] = {}
        self._rope: Tensor | None = None

    def __call__(self, u: Tensor, cache: PagedCache | None = None) -> Tensor:
        """Run the layers over T tokens of each request, as :meth:`Backbone.hidden_states` says it.

        One token a request is always a decode, though it be the last of a prompt in parts: its bits are a decode's,
        summed in other tiles than a prefill's. :meth:`prefill` takes any number of tokens and has the whole's bits.

        Raises:
            RuntimeError: gradients are asked for.
            ValueError: a shape is wrong, or there are more requests than `max_batch` or tokens than `max_tokens`.
            TypeError: a dtype is wrong.
        """
        if u.ndim != 3 or u.shape[2] != self.host.backbone_config.dim:
            raise ValueError(f"u must be [B, T, {self.host.backbone_config.dim}], got {list(u.shape)}")
        B, T, dim = u.shape
        cache = self._own_cache(B, T, u) if cache is None else cache
        table = cache.block_table.to(torch.int32)
        if T == 1:
            u = u[:, 0].contiguous()
            return self.decode(u, cache.pool, table, cache.lengths.to(torch.int32)).clone().unsqueeze(1)
        rows = Rows.of([T] * B, cache.lengths.tolist(), u.device)
        states = self.prefill(u.reshape(B * T, dim), rows, cache.pool, table)
        return self.norm(states).view(B, T, dim)

    def decode(
        self, u: Tensor, pool: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """One token a request, in launches and nothing else once a call of as many requests has been made.

        Args:
            u: [B, dim], embeddings, in the weights' dtype.
            pool: [layers, pages, 2, Hkv, PAGE, D].
            block_table: int32 [B, max_pages].
            lengths: int32 [B], with the new token; 0 holds no request.
            out: contiguous [B, dim], takes the result.

        Returns:
            [B, dim] after the final norm: `out`, or memory that the next call of as many requests writes again. Rows of
            length 0 hold nothing of meaning.
        """
        self._check(u, pool, block_table, lengths)
        if len(u) > self.max_batch:
            raise ValueError(f"u has {len(u)} rows, the backbone is prepared for 1..{self.max_batch} (max_batch)")
        with on_device(NAME, u):
            b, rope, stream = self.buffers(u, pool), self.rope(u.device), u
            for layer, cache in zip(self._blocks, pool, strict=True):
                attention = layer.attention
                launch_norm_qkv_append(
                    stream, layer.attention_norm.weight,
                    attention.wq.weight, attention.wk.weight, attention.wv.weight,
                    rope, block_table, lengths, b.q, cache, self._eps, self.max_batch,
                )  # fmt: skip
                launch_paged_attention(b.attended, b.q, cache, block_table, lengths, 0, self.max_tokens, b.scratch)
                launch_linear(b.stream, b.attended, attention.wo.weight, None, stream, self.max_batch)
                stream = b.stream
                self._feed(layer, stream, b.gated, self.max_batch, "decode")
            out = b.hidden if out is None else out
            launch_rms_norm(out, stream, self.host.norm.weight, self._eps)
        return out

    def prefill(self, u: Tensor, rows: Rows, pool: Tensor, block_table: Tensor) -> Tensor:
        """Many tokens of several requests, in launches but for the memory they need; six launches a layer.

        A prompt may come in parts: the result is that of the whole, bit by bit.

        Args:
            u: [R, dim], embeddings.
            rows: whose they are.
            pool: [layers, pages, 2, Hkv, PAGE, D].
            block_table: int32 [B, max_pages].

        Returns:
            [R, dim], before the final norm: mostly a prompt's last row alone is wanted.
        """
        self._check(u, pool, block_table, rows.lengths)
        config, R, many = self.host.backbone_config, len(u), (PREFILL_ROWS, "prefill")
        with on_device(NAME, u):
            rope, stream = self.rope(u.device), u
            qkv = u.new_empty(R, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
            attended = u.new_empty(R, config.n_heads * config.head_dim)
            gated, out = u.new_empty(R, config.hidden_dim), torch.empty_like(u)
            for layer, cache in zip(self._blocks, pool, strict=True):
                attention = layer.attention
                launch_norm_qkv(
                    qkv, stream, layer.attention_norm.weight,
                    attention.wq.weight, attention.wk.weight, attention.wv.weight, self._eps, R, *many,
                )  # fmt: skip
                launch_rope_append(rope, rows.requests, rows.positions, block_table, qkv, cache)
                launch_prefill_attention(
                    attended, qkv, cache, block_table, rows.starts, rows.lengths, 0, max(rows.new), config.n_heads
                )
                launch_linear(out, attended, attention.wo.weight, None, stream, *many)
                stream = out
                self._feed(layer, stream, gated, *many)
        return stream

    def _feed(self, layer: TransformerBlock | MoEBlock, stream: Tensor, gated: Tensor, *prepared: Any) -> None:
        """``stream += feed_forward(RMSNorm(stream))``; `prepared` for so many rows, and the phase."""
        if isinstance(layer, MoEBlock):
            mixture = self._mixture(layer, *prepared)
            for start in range(0, len(stream), mixture.max_rows):
                mixture.run(stream[start : start + mixture.max_rows])
            return
        feed, norm = layer.feed_forward, layer.ffn_norm.weight
        launch_norm_swiglu(gated, stream, norm, feed.w1.weight, feed.w3.weight, self._eps, *prepared)
        launch_linear(stream, gated, feed.w2.weight, None, stream, *prepared)

    def _mixture(self, layer: MoEBlock, max_rows: int, phase: str) -> MoETwin:
        """Of a layer with experts; all of a phase share the memory between their launches."""
        weight = layer.gate.weight
        kind = (phase, weight.dtype, weight.device)
        twins = self._mixtures.setdefault(kind, {})
        if layer not in twins:
            scratch = next((twin.scratch for twin in twins.values()), None)
            twins[layer] = MoETwin(layer, min(max_rows, MIXTURE_ROWS), phase, scratch)
        return twins[layer]

    def norm(self, states: Tensor) -> Tensor:
        """The final norm of what :meth:`prefill` returns, or of some of its rows."""
        out = torch.empty_like(states)
        with on_device(NAME, states):
            launch_rms_norm(out, states, self.host.norm.weight, self._eps)
        return out

    def buffers(self, u: Tensor, pool: Tensor) -> Buffers:
        """The memory of as many requests as `u` has rows; made at the first call, for any number of them."""
        config, key = self.host.backbone_config, (u.dtype, u.device)
        if self._key != key:
            q = u.new_zeros(self.max_batch, config.n_heads * config.head_dim)
            stream = u.new_zeros(self.max_batch, config.dim)
            self._key, self._buffers = key, {}
            self._whole = Buffers(
                stream=stream,
                q=q,
                attended=torch.zeros_like(q),
                gated=u.new_zeros(self.max_batch, config.hidden_dim),
                hidden=torch.zeros_like(stream),
                scratch=attention_scratch(q, pool[0], self.max_tokens),
            )
        B, b = len(u), self._whole
        if B not in self._buffers:
            partial, arrived = b.scratch
            views = (b.stream[:B], b.q[:B], b.attended[:B], b.gated[:B], b.hidden[:B])
            self._buffers[B] = Buffers(*views, scratch=(partial[:B], arrived[:B]))
        return self._buffers[B]

    def rope(self, device: torch.device) -> Tensor:
        """The table of rotations, fp32 [positions, 2, D / 2]; made at the first call, in fp64.

        It ends where the last page may, of the largest there are: a cache has whole pages, and a request may fill its
        last beyond `max_tokens`.
        """
        if self._rope is None or self._rope.device != device:
            config, rows = self.host.backbone_config, -(-self.max_tokens // PAGES[-1]) * PAGES[-1]
            positions = torch.arange(rows, device=device)
            self._rope = torch.stack(rope_table(positions, config.head_dim, config.rope_theta), dim=1).float()
        return self._rope

    @property
    def _blocks(self) -> list[TransformerBlock | MoEBlock]:
        return cast(list[TransformerBlock | MoEBlock], list(self.host.layers))

    @property
    def _eps(self) -> float:
        return self.host.backbone_config.norm_eps

    def _own_cache(self, B: int, T: int, u: Tensor) -> PagedCache:
        """For a call without one: requests of T tokens, from position 0."""
        config, pages = self.host.backbone_config, -(-T // PAGE)
        shape = (config.n_layers, B * pages, 2, config.n_kv_heads, PAGE, config.head_dim)
        table = torch.arange(B * pages, dtype=torch.int32, device=u.device).view(B, pages)
        return PagedCache(u.new_zeros(shape), table, torch.full((B,), T, device=u.device))

    def _check(self, u: Tensor, pool: Tensor, block_table: Tensor, lengths: Tensor) -> None:
        weight, config = self.host.norm.weight, self.host.backbone_config
        if torch.is_grad_enabled() and (u.requires_grad or weight.requires_grad):
            raise RuntimeError(
                "gradients are asked of an accelerated backbone, and kernels have none: call it under "
                "torch.inference_mode(), or voxkern.restore() the model to train it"
            )
        if u.ndim != 2 or u.shape[1] != config.dim or not u.is_contiguous():
            raise ValueError(f"u must be contiguous [rows, {config.dim}], got {list(u.shape)}, strides {u.stride()}")
        if u.dtype != weight.dtype or u.device != weight.device or pool.dtype != weight.dtype:
            raise TypeError(f"u is {u.dtype} on {u.device} and pool {pool.dtype}, the weights are {weight.dtype}")
        layer = [config.n_layers, pool.shape[1], 2, config.n_kv_heads, *pool.shape[4:5], config.head_dim]
        if pool.ndim != 6 or list(pool.shape) != layer:
            raise ValueError(f"pool must be [layers, pages, 2, Hkv, PAGE, D] = {layer}, got {list(pool.shape)}")
        if pool.shape[4] not in PAGES:
            raise ValueError(f"pool has pages of {pool.shape[4]} tokens but must have 16, 32, 64 or 128")
        if block_table.dtype != torch.int32 or lengths.dtype != torch.int32 or len(block_table) != len(lengths):
            raise ValueError(
                f"block_table and lengths must be int32 of as many rows, got {block_table.dtype} "
                f"{list(block_table.shape)} and {lengths.dtype} {list(lengths.shape)}"
            )
        if (block_table.shape[1] - 1) * pool.shape[4] >= self.max_tokens:
            raise ValueError(
                f"block_table has {block_table.shape[1]} pages of {pool.shape[4]} tokens a request, the backbone is "
                f"prepared for {self.max_tokens} tokens (max_tokens)"
            )
