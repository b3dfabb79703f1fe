"""The flow-matching head, which computes a frame's semantic code and turns noise into the frame's acoustic codes.

The acoustic codes come from a few steps of an ODE solver, which evaluates a velocity network once per step. The public
model's network (``transformer_head.py``) is a small bidirectional transformer over three tokens [x, t, h]: the flow's
state, the time, and the backbone's hidden state. An alternative network, a residual MLP, is in ``mlp_head.py``.

For classifier-free guidance, each evaluation runs the network with and without the hidden state, both in one batch.
Sources: Voxtral TTS, arXiv 2603.25551; flow matching, arXiv 2210.02747; guidance, arXiv 2207.12598.
"""

import math

import torch
from torch import Tensor, nn

from .config import (
    EMPTY_AUDIO,
    END_AUDIO,
    N_SPECIAL_CODES,
    NOT_FINITE,
    AcousticTransformerConfig,
    AudioModelConfig,
    VelocityMLPConfig,
)
from .layers import upcast
from .solver import integrate, time_grid


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sinusoids of the flow time: ``[cos(t w), sin(t w)]`` with ``w_j = 10000^(-j / (dim / 2))``.

    Args:
        t: [...], flow times in 0..1.
        dim: number of sinusoids, which must be even.

    Returns:
        fp64 [..., dim].
    """
    half = dim // 2
    w = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64, device=t.device))
    angle = t.to(torch.float64).unsqueeze(-1) * w
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def guide(v: Tensor, cfg_alpha: Tensor) -> Tensor:
    """Apply classifier-free guidance: ``a v_cond + (1 - a) v_uncond``.

    Args:
        v: [2B, K], the conditional velocities v_cond, then the unconditional velocities v_uncond.
        cfg_alpha: [B], the guidance strength ``a`` of each request.

    Returns:
        [B, K] in the dtype of `v`.
    """
    v_cond, v_uncond = v.chunk(2)
    alpha = cfg_alpha.to(v.dtype).unsqueeze(1)
    return alpha * v_cond + (1 - alpha) * v_uncond


def quantise(x: Tensor, levels: int) -> Tensor:
    """Quantise each value to a level: -1 becomes 0, +1 becomes ``levels - 1``, and halves round to even.

    Args:
        x: [..., K]; a value outside -1..1 is clamped, and NaN becomes level 0.
        levels: number of levels, 21 in the public model.

    Returns:
        int64 [..., K].
    """
    return ((x.clamp(-1, 1) + 1) / 2 * (levels - 1)).nan_to_num(nan=0.0).round().long()


def lowest_argmax(logits: Tensor) -> Tensor:
    """Return the index of the largest value along the last dimension, [..., N] -> int64 [...].

    If several values equal the largest, the lowest index among them is returned. The kernels use the same rule.
    """
    index = torch.arange(logits.shape[-1], device=logits.device)
    is_max = logits == logits.amax(-1, keepdim=True)
    return torch.where(is_max, index, logits.shape[-1]).amin(-1)


class FlowHead(nn.Module):
    """The base class of the flow heads, which turn each hidden state into one frame of codes.

    A subclass adds the velocity network. It defines ``semantic_codebook_output``, :meth:`project_time`,
    :meth:`project_hidden` and ``_velocity``. In all shapes, K is the number of acoustic codes per frame, 36 in the
    public model.
    """

    config: AcousticTransformerConfig | VelocityMLPConfig
    audio: AudioModelConfig
    semantic_codebook_output: nn.Linear

    def semantic_logits(self, h: Tensor) -> Tensor:
        """Compute the logits of the semantic codes; the logits of EMPTY and of the padding rows are -inf.

        Args:
            h: [B, input_dim], the backbone's hidden state.

        Returns:
            fp32 (fp64 in an fp64 model) [B, semantic_rows].
        """
        logits = upcast(self.semantic_codebook_output(h))
        n_codes = self.audio.semantic_codebook_size + N_SPECIAL_CODES
        index = torch.arange(logits.shape[-1], device=h.device)
        return logits.masked_fill((index == EMPTY_AUDIO) | (index >= n_codes), -torch.inf)

    def velocity(self, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Evaluate the velocity network once, without guidance, for training and for analysis.

        Args:
            x: [B, K], the flow's state.
            t: [B] or [], the flow time in 0..1.
            h: [B, input_dim], the backbone's hidden state; zeros for the unconditional branch.

        Returns:
            fp32 (fp64 in an fp64 model) [B, K].
        """
        return self._velocity(x, self.project_time(t), self.project_hidden(h))

    def project_time(self, t: Tensor) -> Tensor:
        """Project flow times in 0..1 to inputs of the velocity network, [...] -> [..., dim]."""
        raise NotImplementedError

    def project_hidden(self, h: Tensor) -> Tensor:
        """Project hidden states to inputs of the velocity network, [B, input_dim] -> [B, dim]."""
        raise NotImplementedError

    def solve(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """Integrate the flow from noise (t = 0) to the acoustic latents (t = 1).

        :meth:`forward` quantises these latents. Models without quantisation, unlike the public one, use them directly.
        The unconditional branch gets hidden states of zeros. :meth:`project_hidden` maps them to zeros, or to its bias
        if it has one.

        Args:
            h: [B, input_dim], the backbone's hidden state.
            cfg_alpha: [B], the guidance strength; 1 means no guidance.
            noise: [B, K], standard normals.
            steps: number of evaluations, 1..64; one evaluation computes both branches of the guidance.
            solver: "euler" or "ab2", see :func:`voxkern.reference.solver.integrate`.

        Returns:
            fp32 (fp64 in an fp64 model) [B, K], not clamped.

        Raises:
            ValueError: `solver` is unknown or `steps` is not in 1..64.
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
        """Generate one frame of codes for each request.

        Args:
            h: [B, input_dim], the backbone's hidden state after its final norm.
            cfg_alpha: [B], the guidance strength; 1 means no guidance.
            noise: [B, K], standard normals; None draws them from torch's default generator.
            steps: number of evaluations, 1..64; None means the config's ``n_decoding_steps``.
            solver: "euler" or "ab2", see :func:`voxkern.reference.solver.integrate`.

        Returns:
            The codes, int64 [B, 1 + K] with the +2 offset. If the semantic code is END (1), all acoustic codes are 2.
            If a request's hidden state, its logits or its latents have NaN or infinity, its semantic code is NOT_FINITE
            (-1). The acoustic codes of such a frame are in range but mean nothing.

        Raises:
            ValueError: a tensor has another shape, `solver` is unknown or `steps` is not in 1..64.
        """
        n_acoustic = self.audio.n_acoustic_codebook
        if h.ndim != 2 or h.shape[1] != self.config.input_dim:
            raise ValueError(f"h must be [B, {self.config.input_dim}], got {list(h.shape)}")
        if cfg_alpha.shape != h.shape[:1]:
            raise ValueError(f"cfg_alpha must be [{h.shape[0]}], got {list(cfg_alpha.shape)}")
        if noise is None:
            noise = torch.randn(h.shape[0], n_acoustic, dtype=torch.float32, device=h.device)
        elif noise.shape != (h.shape[0], n_acoustic):
            raise ValueError(f"noise must be [{h.shape[0]}, {n_acoustic}], got {list(noise.shape)}")
        x = self.solve(h, cfg_alpha, noise, self.config.n_decoding_steps if steps is None else steps, solver)
        semantic = self._semantic_code(h).where(x.isfinite().all(-1), NOT_FINITE).unsqueeze(1)  # [B, 1]
        acoustic = quantise(x, self.audio.acoustic_codebook_size) + N_SPECIAL_CODES
        return torch.cat((semantic, acoustic.where(semantic != END_AUDIO, N_SPECIAL_CODES)), dim=1)

    def _semantic_code(self, h: Tensor) -> Tensor:
        """Return the semantic codes, int64 [B].

        If a logit is NaN or infinite, other than the masked logits, the code is NOT_FINITE. A hidden state with NaN or
        infinity has no finite logit.
        """
        logits = self.semantic_logits(h)
        of_codes = logits[:, END_AUDIO : self.audio.semantic_codebook_size + N_SPECIAL_CODES]  # without masked logits
        return lowest_argmax(logits).where(of_codes.isfinite().all(-1), NOT_FINITE)

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        """Evaluate the velocity network.

        Args:
            x: [B, K], the flow's state.
            time: [dim] or [B, dim], from :meth:`project_time`.
            hidden: [B, dim], from :meth:`project_hidden`.

        Returns:
            fp32 (fp64 in an fp64 model) [B, K].
        """
        raise NotImplementedError
