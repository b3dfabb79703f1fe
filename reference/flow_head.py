"""The flow-matching head: noise to 36 acoustic codes in a few Euler steps, and the semantic code beside them.

The public model's velocity network is a small bidirectional transformer over three tokens [x, t, h]: the state of the
flow, the time, and the backbone's hidden state; another one is in ``mlp_head.py``. Either is evaluated with and
without the hidden state (classifier-free guidance), both in one batch. (Voxtral TTS, arXiv 2603.25551; flow matching,
arXiv 2210.02747; guidance, arXiv 2207.12598.)
"""

import math

import torch
from torch import Tensor, nn

from .config import (
    EMPTY_AUDIO,
    END_AUDIO,
    N_SPECIAL_CODES,
    AcousticTransformerConfig,
    AudioModelConfig,
    VelocityMLPConfig,
)
from .layers import upcast
from .solver import integrate, time_grid


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
        logits = upcast(self.semantic_codebook_output(h))
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

        return integrate(velocity, noise.to(upcast(h).dtype), solver, times)

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
