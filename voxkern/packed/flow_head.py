"""Compute the reference's transformer flow head on a CPU, and reuse what does not change between evaluations.

- The t (time) tokens and their queries, keys and values in the first layer are kept in a table. They depend only on
  the weights, the solver and the number of steps.
- The h (hidden state) tokens and their queries, keys and values in the first layer are computed once per frame. In
  guidance's branch without the hidden state, all of these are zero.
- Before the first layer, the x (flow state) token is the same in both branches, so it is computed once.
- In the last layer, the t and h tokens need only keys and values. Everything else is computed for x alone.

Activations are fp32 (fp64 in an fp64 model), which most packed products take and return. A layer with a 16-bit product
rounds its input and its output itself.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..reference.attention import TransformerBlock, attention
from ..reference.flow_head import guide
from ..reference.layers import upcast
from ..reference.solver import integrate, time_grid
from ..reference.transformer_head import FlowMatchingAudioTransformer
from ..validation import refuse_gradients
from .linear import weights_version
from .norm import norm

QKV = Sequence[Tensor]  # queries [..., H * D], keys and values [..., Hkv * D]


class PackedHead:
    """Replaces ``solve`` of a transformer flow head, with the same arguments and, up to rounding, the same result.

    Attributes:
        module: the flow head; its 16-bit linear layers but the time projection are packed. Each frame reads the
            module's current weights.
    """

    def __init__(self, module: FlowMatchingAudioTransformer) -> None:
        self.module = module
        self._time_tables: dict[tuple[str, int], tuple[Hashable, Tensor, QKV]] = {}

    def solve(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """Integrate the flow from noise to the acoustic latents; see :meth:`FlowHead.solve`.

        Returns:
            fp32 (fp64 in an fp64 model) [B, K].

        Raises:
            ValueError: `solver` is unknown or `steps` is not in 1..64.
            RuntimeError: a gradient is needed.
        """
        refuse_gradients("flow head", h, self.module.norm.weight)
        times = time_grid(solver, steps)
        t_tokens, t_qkv = self._time_table(solver, times)
        h_tokens = self.module.project_hidden(upcast(h))  # [B, dim]
        h_qkv = [_with_zeros(part) for part in _qkv(self._layers[0], h_tokens)]
        h_tokens = _with_zeros(h_tokens)

        def velocity(x: Tensor, k: int) -> Tensor:
            t_qkv_of_step = [part[k] for part in t_qkv]
            return guide(self._velocity(x, t_tokens[k], h_tokens, t_qkv_of_step, h_qkv), cfg_alpha)

        return integrate(velocity, noise.to(h_tokens.dtype), solver, times)

    def _velocity(self, x: Tensor, t_token: Tensor, h_tokens: Tensor, t_qkv: QKV, h_qkv: QKV) -> Tensor:
        """Evaluate the velocity network in both branches, x [B, K] -> [2B, K].

        `t_token` is [dim] and `h_tokens` is [2B, dim]. `t_qkv` and `h_qkv` are the queries, keys and values of these
        tokens in the first layer.
        """
        first, *others = self._layers
        x = self.module.input_projection(x)
        tokens = _stacked(x, t_token, h_tokens)
        q, k, v = (_stacked(*parts) for parts in zip(_qkv(first, x), t_qkv, h_qkv, strict=True))
        tokens = _finish(first, tokens, q, k, v) if others else _finish(first, tokens[:, :1], q[:, :1], k, v)
        for layer in others:
            n_queries = 1 if layer is others[-1] else 3
            q, k, v = _qkv(layer, tokens, n_queries)
            tokens = _finish(layer, tokens[:, :n_queries], q, k, v)
        return self.module.acoustic_codebook_output(norm(self.module.norm, tokens[:, 0]))  # type: ignore[no-any-return]

    def _time_table(self, solver: str, times: list[float]) -> tuple[Tensor, QKV]:
        """Return the t tokens of a solver's steps, [steps, dim], and their queries, keys and values in the first layer.

        They are computed again if a weight that they depend on has changed.
        """
        first = self._layers[0]
        version = weights_version(self.module.time_projection, first.attention_norm, first.attention)
        known = self._time_tables.get((solver, len(times)))
        if known is None or known[0] != version:
            with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be used outside it
                t = torch.tensor(times[:-1], dtype=torch.float64, device=self.module.time_projection.weight.device)
                tokens = upcast(self.module.project_time(t))
                known = self._time_tables[solver, len(times)] = version, tokens, _qkv(first, tokens)
        return known[1:]

    @property
    def _layers(self) -> list[TransformerBlock]:
        return list(self.module.layers)  # type: ignore[arg-type]


def _qkv(layer: TransformerBlock, u: Tensor, n_queries: int | None = None) -> QKV:
    """Return a layer's queries of the first `n_queries` of u's tokens, and the keys and values of all tokens."""
    n = norm(layer.attention_norm, u)
    return layer.attention.wq(n[:, :n_queries]), layer.attention.wk(n), layer.attention.wv(n)


def _with_zeros(rows: Tensor) -> Tensor:
    """Append the rows of guidance's branch without the hidden state, [B, W] -> [2B, W]."""
    return torch.cat((rows, torch.zeros_like(rows)))


def _stacked(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Return the three tokens' parts, x [B, W], t [W] and h [2B, W], as one tensor [2B, 3, W]."""
    return torch.stack((torch.cat((x, x)), t.expand_as(h), h), dim=1)


def _finish(layer: TransformerBlock, u: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend, and add the results of the attention and of the feed-forward to `u`.

    `u` and `q` have the same number of tokens, [2B, T, dim] and [2B, T, H * D]; `k` and `v` have three.
    """
    D = layer.attention.head_dim
    q, k, v = (part.view(*part.shape[:2], part.shape[2] // D, D) for part in (q, k, v))
    u = u + layer.attention.wo(attention(q, k, v, causal=False).flatten(-2))
    return u + layer.feed_forward(norm(layer.ffn_norm, u))  # type: ignore[no-any-return]
