"""The fused transformer head: it computes the reference head's result with kernels, from the same weights.

One evaluation of the public model takes 13 launches: four for each of the three layers, and one for the solver step. It
takes two more if attention can be fused neither with q, k and v nor with wo, for example with fp32 weights. The fused
head also computes less than the reference head:

- The t (time) tokens and their queries, keys and values in the first layer are kept in a table. The table depends only
  on the weights, the solver and the number of steps.
- The h (hidden state) tokens and their queries, keys and values in the first layer are computed once per frame. In
  guidance's branch without the hidden state, all of these are exactly zero.
- Before the first layer, the x (flow state) token is the same in both branches, so it is computed once. Its queries,
  keys and values are computed from the flow state itself, 36 numbers in the public model. Their weights are multiplied
  before the first frame (kernels/state_attention.py). A frame reads the first layer's wq, wk and wv once, for the h
  tokens.
- In the last layer, the t and h tokens need only keys and values. Everything else is computed for x alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.flow import launch_flow_start
from ..kernels.linear import launch_linear, linear_shares
from ..kernels.norm_linear import launch_norm_swiglu, norm_swiglu_shares
from ..kernels.norm_qkv_attention import can_fuse_attention, launch_norm_qkv_attention, norm_qkv_attention_shares
from ..kernels.qkv import launch_norm_qkv, norm_qkv_shares
from ..kernels.shares import Shares
from ..kernels.state_attention import fold_state_qkv, launch_state_attention
from ..kernels.token_attention import MAX_FUSED_COLUMNS, launch_token_attention, launch_token_attention_linear
from ..reference.attention import TransformerBlock
from ..reference.quantized import scale_of, scales_of_qkv
from ..reference.transformer_head import FlowMatchingAudioTransformer
from .flow_head import FusedHead, HeadBuffers, NoiseSource, StepTables


@dataclass(frozen=True)
class TransformerHeadBuffers(HeadBuffers):
    """The memory that one frame of B requests needs.

    Rows are token-major: row = token * 2B + branch * B + request. Tokens are x, t and h. Branch 0 has the hidden state,
    and branch 1 has zeros in its place. W = (H + 2 Hkv) * D.

    Attributes:
        tokens: [6B, dim], the input of the first layer. The last B rows, the h tokens of branch 1, are always zero.
        stream: [6B, dim], the residual stream of the layers.
        h_qkv: [B, W], q | k | v of the h tokens of branch 0 in the first layer.
        qkv: [6B, W], q | k | v of all tokens in the later layers.
        attended: [6B, H * D], the result of the attention.
        gated: [6B, hidden], the feed-forward's hidden activations.
    """

    tokens: Tensor
    stream: Tensor
    h_qkv: Tensor
    qkv: Tensor
    attended: Tensor
    gated: Tensor


class FusedTransformerHead(FusedHead):
    """The fused head of the public model's velocity network, a transformer over the tokens x, t and h."""

    module: FlowMatchingAudioTransformer

    def _make_buffers(self, B: int, common: dict[str, Any], zeros: Callable[..., Tensor]) -> TransformerHeadBuffers:
        config = self.module.config
        width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        return TransformerHeadBuffers(
            **common,
            tokens=zeros(6 * B, config.dim),
            stream=zeros(6 * B, config.dim),
            h_qkv=zeros(B, width),
            qkv=zeros(6 * B, width),
            attended=zeros(6 * B, config.n_heads * config.head_dim),
            gated=zeros(6 * B, config.hidden_dim),
        )

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        shares = [linear_shares(self.module.llm_projection.weight, dtype, self.max_batch)]
        for layer in self._blocks:
            attention, feed = layer.attention, layer.feed_forward
            wq, wk = attention.wq.weight, attention.wk.weight
            shares += [norm_qkv_shares(wq, wk, dtype, rows) for rows in (self.max_batch, self._max_rows)]
            if self._fuses_qkv(layer, dtype):
                shares += [norm_qkv_attention_shares(wq, wk, dtype, self._heads[1], self.max_batch)]
            for rows in (2 * self.max_batch, self._max_rows):
                shares += [norm_swiglu_shares(feed.w1.weight, dtype, rows)]
                shares += [linear_shares(weight, dtype, rows) for weight in (attention.wo.weight, feed.w2.weight)]
        return shares

    def _step_table_weights(self) -> list[Tensor]:
        attention, norm = self._blocks[0].attention, self._blocks[0].attention_norm.weight
        weights = [layer.weight for layer in (attention.wq, attention.wk, attention.wv)]
        scales = [scale for scale in scales_of_qkv(attention) if scale is not None]
        return [self.module.time_projection.weight, self.module.input_projection.weight, norm, *weights, *scales]

    def _make_network_tables(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the t tokens, [steps, dim], their q | k | v in the first layer, [steps, W], and the folded weights.

        The folded weights are the results of :func:`voxkern.kernels.state_attention.fold_state_qkv`.
        """
        attention, norm = self._blocks[0].attention, self._blocks[0].attention_norm.weight
        wq, wk, wv = attention.wq.weight, attention.wk.weight, attention.wv.weight
        steps, scales = len(projected), scales_of_qkv(attention)
        qkv = projected.new_empty(steps, len(wq) + len(wk) + len(wv))
        for first in range(0, steps, self._max_rows):
            rows = projected[first : first + self._max_rows]
            out = qkv[first : first + self._max_rows]
            launch_norm_qkv(
                out,
                rows,
                norm,
                wq,
                wk,
                wv,
                self._eps,
                len(rows),
                self._max_rows,
                "decode",
                *scales,
            )
        return projected, qkv, *fold_state_qkv((wq, wk, wv), scales, norm, self.module.input_projection.weight)

    @property
    def _hidden_projection(self) -> nn.Linear:
        return self.module.llm_projection

    @property
    def _blocks(self) -> list[TransformerBlock]:
        return cast(list[TransformerBlock], list(self.module.layers))

    @property
    def _heads(self) -> tuple[int, int]:
        return self.module.config.n_heads, self.module.config.n_kv_heads

    @property
    def _max_rows(self) -> int:
        return 6 * self.max_batch

    def _flow(
        self, b: HeadBuffers, tables: StepTables, h: Tensor, cfg_alpha: Tensor, noise_source: NoiseSource
    ) -> None:
        assert isinstance(b, TransformerHeadBuffers)
        module, (t_tokens, t_qkv, weight, root) = self.module, tables.network
        final = b.stream, module.norm.weight, None, module.acoustic_codebook_output.weight, None
        self._start(b, t_tokens[0], h, noise_source)
        for step in range(len(tables.dt)):
            launch_state_attention(
                b.attended, b.x, weight, root, t_qkv[step : step + 1], b.h_qkv, self._eps, *self._heads, self.max_batch
            )
            self._run_layers(b, is_attended=True)
            next_time = t_tokens[step + 1] if step + 1 < len(tables.dt) else None
            entrance = module.input_projection.weight, None, next_time, b.tokens
            self._solver_step(b, tables, step, cfg_alpha, final, entrance)

    def _start(self, b: TransformerHeadBuffers, t_token: Tensor, h: Tensor, noise_source: NoiseSource) -> None:
        """Compute the h tokens and their q | k | v, the noise, and the first x and t tokens, in three launches."""
        module, B = self.module, len(h)
        hidden = b.tokens[4 * B : 5 * B]
        projection = module.llm_projection.weight
        launch_linear(hidden, h, projection, None, None, None, self._prepared(b, B), scratch=b.scratch)
        self._qkv(b, b.h_qkv, hidden, self._blocks[0], B)
        w_in, quantiles = module.input_projection.weight, self._quantiles_on(h.device)
        launch_flow_start(*noise_source, quantiles, w_in, None, t_token, b.x, b.tokens, self.max_batch)

    def _qkv(self, b: TransformerHeadBuffers, out: Tensor, x: Tensor, layer: TransformerBlock, q_rows: int) -> None:
        attention = layer.attention
        launch_norm_qkv(
            out, x, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
            self._eps, q_rows, self._prepared(b, len(x)), "decode", *scales_of_qkv(attention), scratch=b.scratch,
        )  # fmt: skip

    def _run_layers(self, b: TransformerHeadBuffers, is_attended: bool) -> None:
        """Run all layers of one evaluation.

        If `is_attended`, the first layer's attention is already in ``b.attended``, and the layer's input is
        ``b.tokens``. Otherwise its input is ``b.stream``, as in the other layers.
        """
        B, layers = len(b.x), self._blocks
        for i, layer in enumerate(layers):
            rows = 2 * B if i == len(layers) - 1 else 6 * B  # the last layer needs only the queries of the x tokens
            if i == 0 and is_attended:
                self._project(b, b.tokens[:rows], layer)
            else:
                self._attend(b, layer, rows)
            feed, stream, gated = layer.feed_forward, b.stream[:rows], b.gated[:rows]
            norm, prepared = layer.ffn_norm.weight, self._prepared(b, rows)
            launch_norm_swiglu(
                gated, stream, norm, feed.w1.weight, feed.w3.weight, self._eps, prepared,
                scale1=scale_of(feed.w1), scale3=scale_of(feed.w3), scratch=b.scratch,
            )  # fmt: skip
            launch_linear(
                stream, gated, feed.w2.weight, None, None, stream, prepared, scale=scale_of(feed.w2), scratch=b.scratch
            )

    def _prepared(self, b: TransformerHeadBuffers, rows: int) -> int:
        """Return the most rows of a launch that has `rows` rows for the requests of `b`."""
        return rows // len(b.x) * self.max_batch

    def _fuses_qkv(self, layer: TransformerBlock, dtype: torch.dtype) -> bool:
        """Return whether attention is in the launch of q, k and v."""
        wq = layer.attention.wq.weight
        return self.max_batch > 1 and can_fuse_attention(wq, dtype, *self._heads, self.max_batch)

    def _fuses_wo(self, dtype: torch.dtype) -> bool:
        """Return whether attention and wo are one launch."""
        n_heads, n_kv_heads = self._heads
        columns = n_heads // n_kv_heads * self.module.config.head_dim
        return self.max_batch == 1 and dtype != torch.float32 and columns <= MAX_FUSED_COLUMNS

    def _attend(self, b: TransformerHeadBuffers, layer: TransformerBlock, rows: int) -> None:
        """Compute ``stream += wo(attention)`` for the first `rows` rows, from q | k | v of ``b.stream``."""
        attention, attended, n_tokens = layer.attention, b.attended[:rows], rows // (2 * len(b.x))
        if self._fuses_qkv(layer, b.stream.dtype):
            launch_norm_qkv_attention(
                attended, b.qkv, b.stream, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight,
                attention.wv.weight, self._eps, *self._heads, n_tokens, self.max_batch, scratch=b.scratch,
            )  # fmt: skip
        else:
            self._qkv(b, b.qkv, b.stream, layer, rows)
            if self._fuses_wo(b.stream.dtype):
                stream, wo = b.stream[:rows], attention.wo
                launch_token_attention_linear(stream, b.qkv, wo.weight, stream, *self._heads, scale_of(wo))
                return
            launch_token_attention(attended, b.qkv, *self._heads, n_tokens, self.max_batch)
        self._project(b, b.stream[:rows], layer)

    def _project(self, b: TransformerHeadBuffers, residual: Tensor, layer: TransformerBlock) -> None:
        """Compute ``stream = residual + wo(attended)`` for the first ``len(residual)`` rows."""
        wo, rows = layer.attention.wo, len(residual)
        launch_linear(
            b.stream[:rows], b.attended[:rows], wo.weight, None, None, residual, self._prepared(b, rows),
            scale=scale_of(wo), scratch=b.scratch,
        )  # fmt: skip
