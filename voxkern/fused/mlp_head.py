"""The fused MLP head: it runs the velocity MLP through kernels, on the head's weights.

An evaluation takes two launches per block, and one launch for the solver's step.

The modulations (shift, scale and gate) depend on the time and the hidden state together, as ``silu(time + state)``. The
modulations can therefore not be split into a table for the times and a part per frame. But all times are known when a
frame begins, so one launch computes the modulations of every step. That launch reads the modulations' weights once per
frame instead of once per step. These weights are about two thirds of a network with three blocks and equal `dim` and
`hidden_dim`. In the branch without a hidden state, the modulations do not change from frame to frame, so they are kept
in a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.adaln import launch_adaln_linear_silu, launch_adaln_modulation
from ..kernels.flow import launch_flow_start
from ..kernels.linear import launch_linear, linear_shares
from ..kernels.shares import Shares
from ..reference.mlp_head import FlowMatchingAudioMLP, ResidualBlock
from ..reference.solver import MAX_STEPS
from .flow_head import FusedHead, HeadBuffers, NoiseSource, StepTables


@dataclass(frozen=True)
class MLPHeadBuffers(HeadBuffers):
    """The memory that one frame of B requests needs. Of 2B rows, the first B have the hidden state.

    Attributes:
        stream: [2B, dim], the residual stream.
        gated: [2B, hidden], the hidden activations of a block.
        states: [B, dim], the projected hidden states, to which the projected times are added.
    """

    stream: Tensor
    gated: Tensor
    states: Tensor


class FusedMLPHead(FusedHead):
    """The fused head of a velocity network that is a residual MLP with adaptive layer norm."""

    module: FlowMatchingAudioMLP

    def _make_buffers(self, B: int, common: dict[str, Any], zeros: Callable[..., Tensor]) -> MLPHeadBuffers:
        config = self.module.config
        return MLPHeadBuffers(
            **common,
            stream=zeros(2 * B, config.dim),
            gated=zeros(2 * B, config.hidden_dim),
            states=zeros(B, config.dim),
        )

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        down = cast(nn.Linear, self._blocks[0].mlp[2])
        weights = (self.module.cond_embed.weight, down.weight)
        return [linear_shares(weight, dtype, 2 * self.max_batch) for weight in weights]

    def _step_table_weights(self) -> list[Tensor]:
        return [*self.module.time_embed.parameters(), self.module.cond_embed.bias, *self._weights, *self._biases]

    def _make_network_tables(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected times and the modulations; compute those of the branch without a hidden state.

        Returns:
            projected: [steps, dim], the projected times, to which the projected hidden states are added.
            modulations: [steps, 1 + max_batch, W], the concatenated shift, scale and gate of every block, then shift
                and scale of the final layer. The first row of each step is the table for the branch without a hidden
                state. The other rows belong to the requests, and every frame overwrites them.
        """
        modulations = projected.new_zeros(len(projected), 1 + self.max_batch, sum(map(len, self._weights)))
        self._modulate(projected, self.module.cond_embed.bias.unsqueeze(0), modulations[:, :1])
        return projected, modulations

    @property
    def _hidden_projection(self) -> nn.Linear:
        return self.module.cond_embed

    @property
    def _blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.module.res_blocks))

    @property
    def _modulators(self) -> list[nn.Linear]:
        chains = [block.adaLN_modulation for block in self._blocks] + [self.module.final_layer.adaLN_modulation]
        return [cast(nn.Linear, chain[1]) for chain in chains]

    @property
    def _weights(self) -> list[Tensor]:
        return [linear.weight for linear in self._modulators]

    @property
    def _biases(self) -> list[Tensor]:
        return [linear.bias for linear in self._modulators]

    def _modulate(self, projected: Tensor, states: Tensor, out: Tensor) -> None:
        """Compute the modulations of all steps, `out` [steps, R, W].

        `projected` [steps, dim] are the projected times, and `states` [R, dim] the projected hidden states.
        """
        # The launch is prepared for MAX_STEPS steps. If the launch config depended on the number of steps, Triton would
        # compile another binary while requests run.
        max_rows = MAX_STEPS * self.max_batch
        launch_adaln_modulation(out, projected, states, self._weights, self._biases, max_rows)

    def _flow(
        self, b: HeadBuffers, tables: StepTables, h: Tensor, cfg_alpha: Tensor, noise_source: NoiseSource
    ) -> None:
        assert isinstance(b, MLPHeadBuffers)
        module, B = self.module, len(h)
        projected, modulations = tables.network
        projection, rows = module.cond_embed, 2 * self.max_batch
        launch_linear(b.states, h, projection.weight, projection.bias, None, None, rows, scratch=b.scratch)
        self._modulate(projected, b.states, modulations[:, 1 : 1 + B])
        linear, w_in, b_in = module.final_layer.linear, module.input_proj.weight, module.input_proj.bias
        launch_flow_start(*noise_source, self._quantiles_on(h.device), w_in, b_in, None, b.x, b.stream, self.max_batch)
        for step in range(len(tables.dt)):
            modulation = modulations[step, : 1 + B]
            self._run_layers(b, modulation)
            final = b.stream, None, modulation[:, -2 * module.config.dim :], linear.weight, linear.bias
            self._solver_step(b, tables, step, cfg_alpha, final, (w_in, b_in, None, b.stream))

    def _run_layers(self, b: MLPHeadBuffers, modulation: Tensor) -> None:
        """Run all blocks of one evaluation, two launches per block."""
        dim, max_rows = self.module.config.dim, 2 * self.max_batch
        for i, block in enumerate(self._blocks):
            mine = modulation[:, 3 * i * dim : 3 * (i + 1) * dim]
            up, down = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
            launch_adaln_linear_silu(b.gated, b.stream, mine, up.weight, up.bias, self._eps, max_rows)
            gate = mine[:, 2 * dim :]
            launch_linear(b.stream, b.gated, down.weight, down.bias, gate, b.stream, max_rows, scratch=b.scratch)
