"""Mixture of experts: a gate chooses a few SwiGLU experts for each token; shared experts serve every token.

The names are those of Mistral's checkpoints, in which gate and experts stand in the layer itself:
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
LOWEST = torch.finfo(torch.float32).min  # what orders experts is at least this; NaN counts as this


@dataclass(frozen=True)
class Routing:
    """How logits become experts and weights.

    Attributes:
        top_k: experts of a token.
        scoring: "softmax" over all experts, or "sigmoid" of each by itself.
        n_groups: equal groups, in order, that the experts stand in.
        n_groups_per_tok: groups that a token's experts may come from: those whose two best scores have the largest sum.
        renormalise: a token's weights are divided by their sum.
        scale: factor on the weights, after that.
    """

    top_k: int
    scoring: str = "softmax"
    n_groups: int = 1
    n_groups_per_tok: int = 1
    renormalise: bool = True
    scale: float = 1.0


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Experts are ordered by their logits; where there is a bias, by score + bias, while weights are of the scores alone.
    Equal ones are taken lowest id first.

    Args:
        logits: [M, E], fp32 or fp64.
        routing: how.
        bias: [E], the correction that keeps experts equally busy.

    Returns:
        ids int64 [M, k] from the best on, and weights [M, k] in the dtype of `logits`.

    Raises:
        ValueError: k, groups or scoring do not fit E experts.
    """
    check_routing(logits.shape[-1], routing)
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    order = logits if bias is None else scores + bias.to(scores.dtype)
    of_groups = scores if bias is None else order
    order = _ordered(order)
    if routing.n_groups > 1:
        order = order.masked_fill(~_in_best_groups(of_groups, routing), -torch.inf)
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, ids)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routing.scale


def check_routing(E: int, routing: Routing) -> None:
    """Raise unless `routing` fits `E` experts.

    Raises:
        ValueError: it does not.
    """
    if routing.scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {routing.scoring!r}")
    if routing.n_groups < 1 or E % routing.n_groups:
        raise ValueError(f"n_groups is {routing.n_groups} but must divide the {E} experts")
    if not 1 <= routing.n_groups_per_tok <= routing.n_groups:
        raise ValueError(f"n_groups_per_tok is {routing.n_groups_per_tok} but must lie in 1..{routing.n_groups}")
    open_to_each = E // routing.n_groups * routing.n_groups_per_tok
    if not 1 <= routing.top_k <= open_to_each:
        raise ValueError(f"top_k is {routing.top_k} but must lie in 1..{open_to_each}, the experts open to a token")


def mix_experts(x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[nn.Module], alone: bool) -> Tensor:
    """``sum_j weights[:, j] * experts[ids[:, j]](x)``, summed wide in the order of j.

    Args:
        x: [M, dim].
        ids: int64 [M, k].
        weights: [M, k].
        experts: [M, dim] -> [M, dim] each; those that no token asks for are not run.
        alone: an expert sees its own tokens only. Otherwise it sees all M, and what it makes of a token does not depend
            on how many others ask for it: products of another number of rows have other last bits.

    Returns:
        [M, dim] in the dtype of `weights`.

    Raises:
        ValueError: an id is not that of an expert.
    """
    outside = ids[(ids < 0) | (ids >= len(experts))]
    if len(outside):
        raise ValueError(f"ids has expert {int(outside[0])} but must have 0..{len(experts) - 1}")
    parts = x.new_zeros(*ids.shape, x.shape[-1])  # [M, k, dim]
    for i_e in sorted(set(ids.flatten().tolist())):
        rows, places = (ids == i_e).nonzero(as_tuple=True)
        parts[rows, places] = experts[i_e](x[rows]) if alone else experts[i_e](x)[rows]
    y = torch.zeros_like(x, dtype=weights.dtype)
    for j in range(ids.shape[1]):
        y = y + weights[:, j : j + 1] * parts[:, j].to(weights.dtype)
    return y


class Gate(nn.Linear):
    """Logits of the experts, wide: rounded to bf16, two experts of 128 would often tie."""

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, n_experts: int, correction: bool = False) -> None:
        """`correction`: with the bias of DeepSeek-V3, which orders experts and is no part of their weights."""
        super().__init__(dim, n_experts, bias=False)
        zeros = nn.Parameter(torch.zeros(n_experts)) if correction else None
        self.register_parameter("e_score_correction_bias", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., E]."""
        return F.linear(upcast(x), upcast(self.weight))


class MoEBlock(nn.Module):
    """Pre-norm block: attention, then a mixture of experts, each added to the stream."""

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
        """`scoring` and `correction` have no key in Mistral's params.json: its models have softmax and no bias.

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
        if self.n_shared:  # several stand side by side in one, as in the checkpoint
            self.shared_experts = FeedForward(dim, self.n_shared * moe.expert_hidden_dim)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)

    def forward(self, u: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """[B, T, dim] -> [B, n_queries, dim]; tokens past `n_queries` serve as keys and values only."""
        u = u[:, :n_queries] + self.attention(self.attention_norm(u), attend, n_queries)
        return u + self.mixture(self.ffn_norm(u))

    def mixture(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim].

        Requests of several tokens run one at a time, and those of one token together, every expert on all of them: so
        a request's bits do not depend on its neighbours.
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


def _ordered(order: Tensor) -> Tensor:
    return order.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)


def _in_best_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """bool [M, E]: whether an expert stands in one of its token's groups."""
    groups = ranked.view(len(ranked), routing.n_groups, -1)  # [M, groups, E / groups]
    best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
    chosen = _ordered(best).sort(dim=-1, descending=True, stable=True).indices[:, : routing.n_groups_per_tok]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return kept.repeat_interleave(groups.shape[-1], dim=-1)
