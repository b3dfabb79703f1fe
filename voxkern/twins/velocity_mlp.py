"""The velocity MLP's twin: a frame in 2 launches a block and one a step, on the host's own weights.

Modulations hang on time and hidden state together, ``silu(time + state)``, so they cannot be split into a table and a
frame's part; but all times are known when a frame begins. One launch makes those of every step, and reads their
weights, two thirds of the network where the blocks are as wide inside as outside, once instead of once a step. Without
a hidden state they depend on weights alone: those are a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..kernels.modulated import launch_gated_linear, launch_modulated_silu, launch_modulations
from ..kernels.velocity_mlp import launch_mlp_finish, launch_mlp_start, launch_mlp_step
from ..reference.flow import MAX_STEPS
from ..reference.velocity_mlp import FlowMatchingAudioMLP, ResidualBlock
from .head import Buffers, HeadTwin, Start, Times


@dataclass(frozen=True)
class MLPBuffers(Buffers):
    """Memory of a frame; of 2B rows those with condition come first.

    Attributes:
        stream: [2B, dim], the residual stream.
        gated: [2B, hidden], inside a block.
        states: [B, dim], the hidden states' part of the condition.
    """

    stream: Tensor
    gated: Tensor
    states: Tensor


@dataclass(frozen=True)
class MLPTimes(Times):
    """Tables of the times, and room for what a frame adds to them.

    Attributes:
        projected: [steps, dim], the times' part of the condition.
        modulations: [steps, 1 + max_batch, W], every block's shift, scale and gate and the final layer's shift and
            scale, side by side. The first row of a step is the table, without condition; the others are a frame's.
    """

    projected: Tensor
    modulations: Tensor


class MLPTwin(HeadTwin[FlowMatchingAudioMLP, MLPBuffers, MLPTimes]):
    """Of a head whose velocity network is the MLP."""

    def _make_buffers(self, B: int, common: dict[str, Tensor], zeros: Callable[..., Tensor]) -> MLPBuffers:
        config = self.host.config
        return MLPBuffers(
            **common,
            stream=zeros(2 * B, config.dim),
            gated=zeros(2 * B, config.hidden_dim),
            states=zeros(B, config.dim),
        )

    def _weights_of_times(self) -> list[Tensor]:
        return [*self.host.time_embed.parameters(), self.host.cond_embed.bias, *self._weights, *self._biases]

    def _make_times(self, times: Times, projected: Tensor) -> MLPTimes:
        width = sum(map(len, self._weights))
        made = MLPTimes(
            **vars(times),
            projected=projected,
            modulations=projected.new_zeros(len(projected), 1 + self.max_batch, width),
        )
        self._modulate(made, self.host.cond_embed.bias.unsqueeze(0), made.modulations[:, :1])
        return made

    @property
    def _hidden_projection(self) -> nn.Linear:
        return self.host.cond_embed

    @property
    def _blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.host.res_blocks))

    @property
    def _modulators(self) -> list[nn.Linear]:
        chains = [block.adaLN_modulation for block in self._blocks] + [self.host.final_layer.adaLN_modulation]
        return [cast(nn.Linear, chain[1]) for chain in chains]

    @property
    def _weights(self) -> list[Tensor]:
        return [linear.weight for linear in self._modulators]

    @property
    def _biases(self) -> list[Tensor]:
        return [linear.bias for linear in self._modulators]

    @property
    def _eps(self) -> float:
        return self.host.config.norm_eps

    def _modulate(self, times: MLPTimes, states: Tensor, out: Tensor) -> None:
        """Modulations of all steps, [steps, R, W], from the states [R, dim]."""
        # prepared for any number of steps: settings by the steps at hand would be another binary, in mid-service
        max_rows = MAX_STEPS * self.max_batch
        launch_modulations(out, times.projected, states, self._weights, self._biases, max_rows)

    def _flow(self, b: MLPBuffers, times: MLPTimes, h: Tensor, cfg_alpha: Tensor, start: Start) -> None:
        host, B = self.host, len(h)
        launch_gated_linear(b.states, h, host.cond_embed.weight, host.cond_embed.bias, None, None, 2 * self.max_batch)
        self._modulate(times, b.states, times.modulations[:, 1 : 1 + B])
        entrance = host.input_proj.weight, host.input_proj.bias
        launch_mlp_start(*start, self._quantiles_on(h.device), *entrance, b.x, b.stream, self.max_batch)
        for step in range(len(times.lengths)):
            modulation = times.modulations[step, : 1 + B]
            self._layers(b, modulation)
            self._step(b, times, modulation[:, -2 * host.config.dim :], cfg_alpha, step)

    def _layers(self, b: MLPBuffers, modulation: Tensor) -> None:
        """All blocks of one evaluation, 2 launches each."""
        dim, max_rows = self.host.config.dim, 2 * self.max_batch
        for i, block in enumerate(self._blocks):
            mine = modulation[:, 3 * i * dim : 3 * (i + 1) * dim]
            up, down = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
            launch_modulated_silu(b.gated, b.stream, mine, up.weight, up.bias, self._eps, max_rows)
            launch_gated_linear(b.stream, b.gated, down.weight, down.bias, mine[:, 2 * dim :], b.stream, max_rows)

    def _step(self, b: MLPBuffers, times: MLPTimes, modulation: Tensor, cfg_alpha: Tensor, step: int) -> None:
        """The solver's step and the next stream, or the codes."""
        host, dt, ratio = self.host, times.lengths[step], times.ratios[step]
        final = host.final_layer.linear
        common = (b.stream, modulation, final.weight, final.bias, self._eps, cfg_alpha, dt, ratio, b.x, b.v_last)
        if step + 1 < len(times.lengths):
            launch_mlp_step(*common, host.input_proj.weight, host.input_proj.bias, self.max_batch)
            return
        launch_mlp_finish((b.codes, b.following), *common, b.semantic, *self._codebooks, self.max_batch)
