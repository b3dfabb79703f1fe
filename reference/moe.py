"""Mixture of experts: a gate selects a few SwiGLU experts for each token, and shared experts run on every token.

The modules are named as in Mistral's checkpoints, where gate and experts are direct children of the layer:
``layers.L.gate.weight``, ``layers.L.experts.E.w1.weight``, ``layers.L.shared_experts.w1.weight``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, Attention
from .config import MoEConfig
from .layers import FeedForward, RMSNorm, upcast

SCORINGS = ("softmax", "sigmoid")
# NaN and -inf count as this value in the choice of groups and experts: only experts outside a token's groups have -inf
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Routing:
    """The rule that selects a token's experts, and the weights of these experts, from the gate's logits.

    Attributes:
        top_k: number k of routed experts that each token uses.
        scoring: how logits become scores: "softmax" over all experts, or "sigmoid" of each logit.
        n_groups: number of groups of equal size that the experts are split into, in the order of their ids.
        n_groups_per_tok: number of groups that a token's experts may come from. These are the groups with the largest
            sum of their two best scores. If a bias is given, it is added to the scores before they are compared.
        renormalise: whether a token's weights are divided by the sum of these weights.
        scale: factor by which the weights are multiplied after renormalisation.
    """

    top_k: int
    scoring: str = "softmax"
    n_groups: int = 1
    n_groups_per_tok: int = 1
    renormalise: bool = True
    scale: float = 1.0


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Select the experts of each token and compute their weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Without a bias, experts are ordered by logit and groups by score. With a bias, experts and groups are ordered by
    score + bias. The weights come from the scores alone in both cases. Of experts or groups with equal values, the one
    with the lowest id comes first.

    In the choice of experts and groups, NaN and -inf count as the lowest fp32 number. So a token always has k different
    experts, and an expert with NaN comes last. The weights are computed from the scores as they are. With softmax, all
    scores of a token are NaN if one of its logits is NaN or +inf, or if all are -inf. With sigmoid, a score is NaN only
    if its own logit is NaN.

    Args:
        logits: fp32 or fp64 [M, E], the gate's output for M tokens and E experts.
        routing: the routing rule.
        bias: [E], a correction that balances the load of the experts; None means no correction.

    Returns:
        The ids of each token's experts, int64 [M, k], best first, and their weights, [M, k] in the dtype of `logits`.

    Raises:
        ValueError: `routing` does not fit E experts, see :func:`check_routing`.
    """
    check_routing(logits.shape[-1], routing)
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    ranked = _comparable(scores if bias is None else scores + bias.to(scores.dtype))
    order = _comparable(logits) if bias is None else ranked
    if routing.n_groups > 1:
        order = order.masked_fill(~_in_best_groups(ranked, routing), -torch.inf)
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, ids)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.scale


def check_routing(E: int, routing: Routing) -> None:
    """Check that `routing` fits `E` experts.

    Raises:
        ValueError: the scoring is unknown, or the number of groups or of experts per token does not fit `E`.
    """
    if routing.scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {routing.scoring!r}")
    if routing.n_groups < 1 or E % routing.n_groups:
        raise ValueError(f"n_groups is {routing.n_groups} but must divide the {E} experts")
    if not 1 <= routing.n_groups_per_tok <= routing.n_groups:
        raise ValueError(f"n_groups_per_tok is {routing.n_groups_per_tok} but must lie in 1..{routing.n_groups}")
    open_to_each = E // routing.n_groups * routing.n_groups_per_tok
    if not 1 <= routing.top_k <= open_to_each:
        raise ValueError(f"top_k is {routing.top_k} but must lie in 1..{open_to_each}, the experts in a token's groups")


def mix_experts(x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[nn.Module], alone: bool) -> Tensor:
    """Compute each token's weighted sum of its experts' outputs: ``sum_j weights[:, j] * experts[ids[:, j]](x)``.

    The sum is computed in the dtype of `weights`, in the order of j.

    Args:
        x: [M, dim], tokens.
        ids: int64 [M, k], the experts of each token.
        weights: [M, k], the weights of these experts, in the upcast dtype (see
            :func:`voxkern.reference.layers.upcast`).
        experts: modules that compute [rows, dim] -> [rows, dim]; an expert that no token uses does not run.
        alone: True runs an expert only on the tokens that use the expert. False runs each used expert on all M tokens.
            The last bits of a matrix product depend on its number of rows. With False this number is always M, so a
            token's result does not depend on the experts of the other tokens.

    Returns:
        [M, dim] in the dtype of `weights`.

    Raises:
        ValueError: an id is outside 0..E - 1.
    """
    used, where = torch.unique(ids, return_inverse=True)  # ids[m, j] is used[where[m, j]]
    used_ids = used.tolist()
    outside = [i_e for i_e in used_ids if not 0 <= i_e < len(experts)]
    if outside:
        raise ValueError(f"ids has expert {outside[0]} but must have 0..{len(experts) - 1}")
    if alone:
        parts = x.new_zeros(*ids.shape, x.shape[-1])  # [M, k, dim]
        for i_e in used_ids:
            rows, places = (ids == i_e).nonzero(as_tuple=True)
            parts[rows, places] = experts[i_e](x[rows])
    else:
        outputs = torch.stack([experts[i_e](x) for i_e in used_ids])  # [used, M, dim]
        parts = outputs[where, torch.arange(len(x), device=x.device).unsqueeze(1)]
    y = torch.zeros_like(x, dtype=weights.dtype)
    for j in range(ids.shape[1]):
        y = y + weights[:, j : j + 1] * parts[:, j].to(weights.dtype)
    return y


class Gate(nn.Linear):
    """The linear layer that computes the experts' logits in fp32 (fp64 in an fp64 model).

    If logits were rounded to bf16, two of 128 experts would often have equal logits.

    Args:
        dim: number of elements of a token.
        n_experts: number of experts E.
        correction: whether to create DeepSeek-V3's bias, which affects the order of experts but not their weights.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, n_experts: int, correction: bool = False) -> None:
        super().__init__(dim, n_experts, bias=False)
        zeros = nn.Parameter(torch.zeros(n_experts)) if correction else None
        self.register_parameter("e_score_correction_bias", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits, [..., dim] -> [..., E]."""
        return F.linear(upcast(x), upcast(self.weight))


class MoEBlock(nn.Module):
    """A pre-norm layer of the backbone: attention, then a mixture of experts, both residual."""

    def __init__(
        self,
        dim: int,
        moe: MoEConfig,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        scoring: str = "softmax",
        correction: bool = False,
    ) -> None:
        """Create the layer.

        Args:
            dim: number of elements of a token.
            moe: sizes of the mixture of experts.
            n_heads: number of query heads.
            n_kv_heads: number of key and value heads.
            head_dim: number of elements of a head.
            norm_eps: constant that the RMSNorms add to the mean square.
            scoring: "softmax" or "sigmoid", see :class:`Routing`. Mistral's models use softmax, and their params.json
                has no key for the scoring.
            correction: whether the gate has DeepSeek-V3's bias, see :class:`Gate`. Mistral's models have no bias, and
                their params.json has no key for a bias.

        Raises:
            ValueError: `scoring` is unknown, or `moe` contradicts itself.
        """
        super().__init__()
        self.routing = Routing(
            moe.num_experts_per_tok, scoring, moe.num_expert_groups, moe.num_expert_groups_per_tok,
            scale=moe.routed_scale,
        )  # fmt: skip
        check_routing(moe.num_experts, self.routing)
        self.n_shared = moe.num_shared_experts
        self.attention = Attention(dim, n_heads, n_kv_heads, head_dim)
        self.gate = Gate(dim, moe.num_experts, correction)
        self.experts = nn.ModuleList(FeedForward(dim, moe.expert_hidden_dim) for _ in range(moe.num_experts))
        if self.n_shared:  # one wide feed-forward holds all shared experts, as in the checkpoint
            self.shared_experts = FeedForward(dim, self.n_shared * moe.expert_hidden_dim)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)

    def forward(self, u: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """Run the layer on `u` [B, T, dim] and return the output of the first `n_queries` tokens [B, n_queries, dim].

        The remaining tokens contribute only keys and values. `attend` and `n_queries` are those of
        :meth:`voxkern.reference.attention.Attention.forward`.
        """
        u = u[:, :n_queries] + self.attention(self.attention_norm(u), attend, n_queries)
        return u + self.mixture(self.ffn_norm(u))

    def mixture(self, x: Tensor) -> Tensor:
        """Apply the mixture of experts, [B, T, dim] -> [B, T, dim].

        If T > 1, the requests run one at a time. If T = 1, all B requests run together, and each selected expert runs
        on all B tokens. For a given B, the bits of a request's result therefore do not depend on the other requests.
        """
        if x.shape[1] == 1:
            return self._mixture(x[:, 0], alone=False).unsqueeze(1)
        return torch.stack([self._mixture(one, alone=True) for one in x])

    def _mixture(self, x: Tensor, alone: bool) -> Tensor:
        ids, weights = route(self.gate(x), self.routing, self.gate.e_score_correction_bias)
        y = mix_experts(x, ids, weights, list(self.experts), alone)
        if self.n_shared:
            y = y + self.shared_experts(x).to(y.dtype)
        return y.to(x.dtype)


def _comparable(values: Tensor) -> Tensor:
    """Return `values` with LOWEST in place of NaN, -inf and all values below LOWEST."""
    return values.where(values > LOWEST, LOWEST)


def _in_best_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """Return bool [M, E]: whether each expert is in one of the groups selected for the token."""
    groups = ranked.view(len(ranked), routing.n_groups, -1)  # [M, groups, E / groups]
    best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
    chosen = _comparable(best).sort(dim=-1, descending=True, stable=True).indices[:, : routing.n_groups_per_tok]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return kept.repeat_interleave(groups.shape[-1], dim=-1)
