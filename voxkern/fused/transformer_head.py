"""The fused transformer head: it computes the reference head's result with kernels, from the same weights.

One evaluation of the public model takes 13 launches: four for each of the three layers, and one for the solver step. It
takes 16 if the weights are fp32 or the head is prepared for more than one request. The fused head also computes less
than the reference head:

- The t (time) tokens and their queries, keys and values in the first layer are kept in a table. The table depends only
  on the weights, the solver and the number of steps.
- The h (hidden state) tokens and their queries, keys and values in the first layer are computed once per frame. In
  guidance's branch without the hidden state, all of these are exactly zero.
- Before the first layer, the x (flow state) token is the same in both branches, so it is computed once. Its queries,
  keys and values are computed from the flow state itself, 36 numbers in the public model. Their weights are multiplied
  before the first frame (kernels/state_qkv.py). A frame reads the first layer's wq, wk and wv once, for the h tokens.
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
from ..kernels.qkv import launch_norm_qkv, norm_qkv_shares
from ..kernels.shares import Shares
from ..kernels.state_qkv import fold_state_qkv, launch_state_qkv
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
        x_qkv: [B, W], q | k | v of the x tokens in the first layer.
        h_qkv: [2B, W], q | k | v of the h tokens in the first layer; the last B rows are always zero.
        qkv: [6B, W], q | k | v of all tokens in the later layers.
        attended: [6B, H * D], the result of the attention.
        gated: [6B, hidden], the feed-forward's hidden activations.
    """

    tokens: Tensor
    stream: Tensor
    x_qkv: Tensor
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
            x_qkv=zeros(B, width),
            h_qkv=zeros(2 * B, width),
            qkv=zeros(6 * B, width),
            attended=zeros(6 * B, config.n_heads * config.head_dim),
            gated=zeros(6 * B, config.hidden_dim),
        )

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        shares = [linear_shares(self.module.llm_projection.weight, dtype, self.max_batch)]
        for layer in self._blocks:
            attention, feed = layer.attention, layer.feed_forward
            for rows in (self.max_batch, self._max_rows):
                shares += [norm_qkv_shares(attention.wq.weight, attention.wk.weight, dtype, rows)]
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

        The folded weights are the results of :func:`voxkern.kernels.state_qkv.fold_state_qkv`.
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
            launch_state_qkv(b.x, weight, root, self._eps, b.x_qkv, self.max_batch)
            self._run_layers(b, t_qkv[step : step + 1])
            next_time = t_tokens[step + 1] if step + 1 < len(tables.dt) else None
            entrance = module.input_projection.weight, None, next_time, b.tokens
            self._solver_step(b, tables, step, cfg_alpha, final, entrance)

    def _start(self, b: TransformerHeadBuffers, t_token: Tensor, h: Tensor, noise_source: NoiseSource) -> None:
        """Compute the h tokens and their q | k | v, the noise, and the first x and t tokens, in three launches."""
        module, B = self.module, len(h)
        hidden = b.tokens[4 * B : 5 * B]
        projection = module.llm_projection.weight
        launch_linear(hidden, h, projection, None, None, None, self._prepared(b, B), scratch=b.scratch)
        self._qkv(b, b.h_qkv[:B], hidden, self._blocks[0], B)
        w_in, quantiles = module.input_projection.weight, self._quantiles_on(h.device)
        launch_flow_start(*noise_source, quantiles, w_in, None, t_token, b.x, b.tokens, self.max_batch)

    def _qkv(self, b: TransformerHeadBuffers, out: Tensor, x: Tensor, layer: TransformerBlock, q_rows: int) -> None:
        attention = layer.attention
        launch_norm_qkv(
            out, x, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
            self._eps, q_rows, self._prepared(b, len(x)), "decode", *scales_of_qkv(attention), scratch=b.scratch,
        )  # fmt: skip

    def _run_layers(self, b: TransformerHeadBuffers, t_qkv: Tensor | None) -> None:
        """Run all layers of one evaluation.

        A layer takes four launches, or five if the weights are fp32 or the head is prepared for more than one request.
        If `t_qkv`, a row of the table, is given, the first layer reads ``b.tokens``, ``b.x_qkv`` and ``b.h_qkv``, so it
        takes one launch less. If `t_qkv` is None, the first layer computes q | k | v of all tokens from ``b.stream``.
        """
        B, layers = len(b.x), self._blocks
        for i, layer in enumerate(layers):
            rows = 2 * B if i == len(layers) - 1 else 6 * B  # the last layer needs only the queries of the x tokens
            if i == 0 and t_qkv is not None:
                self._attend(b, b.tokens[:rows], b.x_qkv, t_qkv, b.h_qkv, layer)
            else:
                self._qkv(b, b.qkv, b.stream, layer, rows)
                x_qkv, t_qkv, h_qkv = b.qkv[: 2 * B], b.qkv[2 * B : 4 * B], b.qkv[4 * B :]
                self._attend(b, b.stream[:rows], x_qkv, t_qkv, h_qkv, layer)
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

    def _fuses_attention(self, dtype: torch.dtype) -> bool:
        """Return whether attention and wo are one launch."""
        config = self.module.config
        columns = config.n_heads // config.n_kv_heads * config.head_dim
        return self.max_batch == 1 and dtype != torch.float32 and columns <= MAX_FUSED_COLUMNS

    def _attend(
        self,
        b: TransformerHeadBuffers,
        residual: Tensor,
        x_qkv: Tensor,
        t_qkv: Tensor,
        h_qkv: Tensor,
        layer: TransformerBlock,
    ) -> None:
        """Compute ``stream = residual + wo(attention)`` for the first ``len(residual)`` rows."""
        config, rows = self.module.config, len(residual)
        wo, scale = layer.attention.wo.weight, scale_of(layer.attention.wo)
        heads = (config.n_heads, config.n_kv_heads)
        if self._fuses_attention(residual.dtype):
            launch_token_attention_linear(b.stream[:rows], x_qkv, t_qkv, h_qkv, wo, residual, *heads, scale)
            return
        attended = b.attended[:rows]
        launch_token_attention(attended, x_qkv, t_qkv, h_qkv, *heads, rows // len(h_qkv), self.max_batch)
        prepared = self._prepared(b, rows)
        launch_linear(b.stream[:rows], attended, wo, None, None, residual, prepared, scale=scale, scratch=b.scratch)
