"""The flow-matching head: noise to 36 acoustic codes in a few Euler steps, and the semantic code beside them.

The public model's velocity network is a small bidirectional transformer over three tokens [x, t, h]: the state of the
flow, the time, and the backbone's hidden state; another one is in ``velocity_mlp.py``. Either is evaluated with and
without the hidden state (classifier-free guidance), both in one batch. (Voxtral TTS, arXiv 2603.25551; flow matching,
arXiv 2210.02747; guidance, arXiv 2207.12598.)
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .attention import TransformerBlock, attention
from .config import (
    EMPTY_AUDIO,
    END_AUDIO,
    N_SPECIAL_CODES,
    AcousticTransformerConfig,
    AudioModelConfig,
    VelocityMLPConfig,
)
from .linear import RMSNorm, wide

MAX_STEPS = 64
SOLVERS = ("euler", "ab2")


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the flow time: ``[cos(t w), sin(t w)]`` with ``w_j = 10000^(-j / (dim / 2))``.

    Args:
        t: [...], in 0..1.
        dim: even.

    Returns:
        fp64 [..., dim].
    """
    half = dim // 2
    w = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64, device=t.device))
    angle = t.to(torch.float64).unsqueeze(-1) * w
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def guide(v: Tensor, cfg_alpha: Tensor) -> Tensor:
    """Classifier-free guidance: ``a v_cond + (1 - a) v_uncond``.

    Args:
        v: [2B, K], the conditional rows first.
        cfg_alpha: [B].
    """
    v_cond, v_uncond = v.chunk(2)
    alpha = cfg_alpha.to(v.dtype).unsqueeze(1)
    return alpha * v_cond + (1 - alpha) * v_uncond


def euler_step(x: Tensor, v: Tensor, dt: float) -> Tensor:
    """``x + dt v``."""
    return x + dt * v


def time_grid(solver: str, steps: int) -> list[float]:
    """The steps + 1 times from 0 to 1 that a solver stands at.

    Euler's are evenly spaced, as the public model is served. The two-step solver's are warped towards the end, where
    the field bends most: ``1 - (1 - k / steps)^1.5``.

    Raises:
        ValueError: an unknown solver, or `steps` not in 1..64.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie in 1..{MAX_STEPS}, got {steps}")
    if solver == "euler":
        return [k / steps for k in range(steps + 1)]
    return [1 - (1 - k / steps) ** 1.5 for k in range(steps + 1)]


def step_ratios(solver: str, times: list[float]) -> list[float]:
    """What each step adds of the velocity's last change: ``dt_k / (2 dt_{k-1})`` for two-step Adams-Bashforth.

    Zero for a first step, and for Euler.
    """
    if solver == "euler":
        return [0.0] * (len(times) - 1)
    lengths = [end - start for start, end in itertools.pairwise(times)]
    return [0.0] + [now / (2 * before) for before, now in itertools.pairwise(lengths)]


def integrate(velocity: Callable[[Tensor, int], Tensor], x: Tensor, solver: str, times: list[float]) -> Tensor:
    """Follow a velocity field from the first of `times` to the last, evaluating it once a step.

    ``x += dt (v + r (v - v_last))`` with r of :func:`step_ratios`: Euler's method, or the two-step Adams-Bashforth
    method on uneven steps (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5).

    Args:
        velocity: (state, number of the step) -> the velocity there.
        x: the state at the first time.
        solver: "euler" or "ab2".
        times: increasing.
    """
    last = torch.zeros_like(x)
    ratios = step_ratios(solver, times)
    for k, (start, end) in enumerate(itertools.pairwise(times)):
        v = velocity(x, k)
        x = euler_step(x, v + ratios[k] * (v - last), end - start)
        last = v
    return x


def quantise(x: Tensor, levels: int) -> Tensor:
    """The level of each coordinate: -1 is 0, +1 is ``levels - 1``, half rounds to even.

    Args:
        x: [..., K], clamped to -1..1 here; NaN is level 0.
        levels: 21 in the public model.

    Returns:
        int64 [..., K].
    """
    return ((x.clamp(-1, 1) + 1) / 2 * (levels - 1)).nan_to_num(nan=0.0).round().long()


def lowest_argmax(logits: Tensor) -> Tensor:
    """Index of the largest of the last dimension, the lowest one where several are equal (argmax promises none)."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    is_max = logits == logits.amax(-1, keepdim=True)
    return torch.where(is_max, index, logits.shape[-1]).amin(-1)


class FlowHead(nn.Module):
    """What every head shares: hidden state in, one frame of 37 codes out, by any velocity network.

    A network is a subclass with a ``semantic_codebook_output`` that adds :meth:`project_time`, :meth:`project_hidden`
    and ``_velocity``.
    """

    config: AcousticTransformerConfig | VelocityMLPConfig
    audio: AudioModelConfig
    semantic_codebook_output: nn.Linear

    def semantic_logits(self, h: Tensor) -> Tensor:
        """Logits of the semantic codebook, [B, dim] -> wide [B, rows]; EMPTY and the padding rows are -inf."""
        logits = wide(self.semantic_codebook_output(h))
        n_codes = self.audio.semantic_codebook_size + N_SPECIAL_CODES
        index = torch.arange(logits.shape[-1], device=h.device)
        return logits.masked_fill((index == EMPTY_AUDIO) | (index >= n_codes), -torch.inf)

    def velocity(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """The velocity field, for training and for looking at it.

        Args:
            x: [B, K], the flow's state.
            t: [B] or [], in 0..1.
            h: [B, input_dim], the backbone's hidden state; zeros for the unconditional branch.

        Returns:
            wide [B, K].
        """
        return self._velocity(x, self.project_time(t), self.project_hidden(h))

    def project_time(self, t: Tensor) -> Tensor:
        """What the network takes for a flow time: [...] in 0..1 -> [..., dim]."""
        raise NotImplementedError

    def project_hidden(self, h: Tensor) -> Tensor:
        """What it takes for a hidden state: [B, input_dim] -> [B, dim]."""
        raise NotImplementedError

    def solve(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """Integrate from noise (t = 0) to acoustic latents (t = 1): what :meth:`forward` quantises.

        A model of continuous latents takes these. The branch without condition is given hidden states of zero, and
        they are projected as any other: to zero, or to the projection's bias where it has one.

        Args:
            h: [B, input_dim], the backbone's hidden state.
            cfg_alpha: [B].
            noise: [B, K].
            steps: evaluations of the velocity, 1..64; each is one pass for both branches of the guidance.
            solver: "euler", on evenly spaced times, or "ab2"; see :func:`integrate`.

        Returns:
            wide [B, K], not clamped.
        """
        times = time_grid(solver, steps)
        projected = self.project_time(torch.tensor(times[:-1], dtype=torch.float64, device=h.device))  # [steps, dim]
        hidden = self.project_hidden(torch.cat((h, torch.zeros_like(h))))  # [2B, dim]

        def velocity(x: Tensor, k: int) -> Tensor:
            return guide(self._velocity(torch.cat((x, x)), projected[k], hidden), cfg_alpha)

        return integrate(velocity, noise.to(wide(h).dtype), solver, times)

    def forward(
        self,
        h: Tensor,
        cfg_alpha: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """One frame of codes.

        Args:
            h: [B, input_dim], the backbone's hidden state after its final norm.
            cfg_alpha: [B], strength of the guidance; 1 is none.
            noise: [B, K] standard normals; None draws them from torch's generator.
            steps: evaluations of the velocity; None takes the config's.
            solver: "euler" or "ab2", see :func:`integrate`.

        Returns:
            int64 [B, 1 + K] with the +2 offset. Where the semantic code is END (1) the acoustic ones are 2.
        """
        n_acoustic = self.audio.n_acoustic_codebook
        if h.ndim != 2 or h.shape[1] != self.config.input_dim:
            raise ValueError(f"h must be [B, {self.config.input_dim}], got {list(h.shape)}")
        if cfg_alpha.shape != h.shape[:1]:
            raise ValueError(f"cfg_alpha must be [{h.shape[0]}], got {list(cfg_alpha.shape)}")
        if noise is None:
            noise = torch.randn(h.shape[0], n_acoustic, device=h.device)
        elif noise.shape != (h.shape[0], n_acoustic):
            raise ValueError(f"noise must be [{h.shape[0]}, {n_acoustic}], got {list(noise.shape)}")
        semantic = self._semantic_code(h).unsqueeze(1)  # [B, 1]
        x = self.solve(h, cfg_alpha, noise, self.config.n_decoding_steps if steps is None else steps, solver)
        acoustic = quantise(x, self.audio.acoustic_codebook_size) + N_SPECIAL_CODES
        return torch.cat((semantic, acoustic.where(semantic != END_AUDIO, N_SPECIAL_CODES)), dim=1)

    def _semantic_code(self, h: Tensor) -> Tensor:
        """[B]; a request whose logits are all NaN ends, and costs the others nothing."""
        logits = self.semantic_logits(h).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return lowest_argmax(logits).where(logits.amax(-1) > -torch.inf, END_AUDIO)

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        """Wide [B, K] from the state [B, K] and the projected time [dim] or [B, dim] and hidden state [B, dim]."""
        raise NotImplementedError


class FlowMatchingAudioTransformer(FlowHead):
    """The public model's head: its velocity network is a transformer."""

    config: AcousticTransformerConfig

    def __init__(self, config: AcousticTransformerConfig, audio: AudioModelConfig) -> None:
        """Names as in the checkpoint's ``acoustic_transformer``."""
        super().__init__()
        self.config, self.audio = config, audio
        self.input_projection = nn.Linear(audio.n_acoustic_codebook, config.dim, bias=False)
        self.time_projection = nn.Linear(config.dim, config.dim, bias=False)
        self.llm_projection = nn.Linear(config.input_dim, config.dim, bias=False)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.dim, config.hidden_dim, config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
            )
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.semantic_codebook_output = nn.Linear(config.dim, audio.semantic_rows, bias=False)
        self.acoustic_codebook_output = nn.Linear(config.dim, audio.n_acoustic_codebook, bias=False)

    def project_time(self, t: Tensor) -> Tensor:
        """The t token."""
        weight = self.time_projection.weight
        return self.time_projection(time_embedding(t, self.config.dim).to(weight.dtype))  # type: ignore[no-any-return]

    def project_hidden(self, h: Tensor) -> Tensor:
        """The h token; there is no bias, so zeros give zeros."""
        return self.llm_projection(h)  # type: ignore[no-any-return]

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        x = self.input_projection(x.to(hidden.dtype))
        tokens = torch.stack((x, time.expand_as(x), hidden), dim=1)  # [B, 3, dim]
        *layers, last = self.layers
        attend = partial(attention, causal=False)
        for layer in layers:
            tokens = layer(tokens, attend)
        tokens = last(tokens, attend, n_queries=1)  # only the x token is read
        return wide(self.acoustic_codebook_output(self.norm(tokens[:, 0])))
