"""The fused MLP head: a frame in 2 launches a block and one a step, on the head's own weights.

Modulations hang on time and hidden state together, ``silu(time + state)``, so they cannot be split into a table and a
frame's part; but all times are known when a frame begins. One launch makes those of every step, and reads their
weights, two thirds of the network where the blocks are as wide inside as outside, once instead of once a step. Without
a hidden state they depend on weights alone: those are a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..kernels.adaln import launch_adaln_linear_silu, launch_adaln_modulation, launch_gated_linear
from ..kernels.mlp_solver import launch_mlp_finish, launch_mlp_start, launch_mlp_step
from ..reference.mlp_head import FlowMatchingAudioMLP, ResidualBlock
from ..reference.solver import MAX_STEPS
from .flow_head import FusedHead, HeadBuffers, NoiseSource, StepTables


@dataclass(frozen=True)
class MLPHeadBuffers(HeadBuffers):
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
class MLPHeadTables(StepTables):
    """Tables of the times, and memory for what a frame adds to them.

    Attributes:
        projected: [steps, dim], the times' part of the condition.
        modulations: [steps, 1 + max_batch, W], every block's shift, scale and gate and the final layer's shift and
            scale, side by side. The first row of a step is the table, without condition; the others are a frame's.
    """

    projected: Tensor
    modulations: Tensor


class FusedMLPHead(FusedHead[FlowMatchingAudioMLP, MLPHeadBuffers, MLPHeadTables]):
    """Of a head whose velocity network is the MLP."""

    def _make_buffers(self, B: int, common: dict[str, Tensor], zeros: Callable[..., Tensor]) -> MLPHeadBuffers:
        config = self.module.config
        return MLPHeadBuffers(
            **common,
            stream=zeros(2 * B, config.dim),
            gated=zeros(2 * B, config.hidden_dim),
            states=zeros(B, config.dim),
        )

    def _step_table_weights(self) -> list[Tensor]:
        return [*self.module.time_embed.parameters(), self.module.cond_embed.bias, *self._weights, *self._biases]

    def _make_step_tables(self, tables: StepTables, projected: Tensor) -> MLPHeadTables:
        width = sum(map(len, self._weights))
        made = MLPHeadTables(
            **vars(tables),
            projected=projected,
            modulations=projected.new_zeros(len(projected), 1 + self.max_batch, width),
        )
        self._modulate(made, self.module.cond_embed.bias.unsqueeze(0), made.modulations[:, :1])
        return made

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

    @property
    def _eps(self) -> float:
        return self.module.config.norm_eps

    def _modulate(self, tables: MLPHeadTables, states: Tensor, out: Tensor) -> None:
        """Modulations of all steps, [steps, R, W], from the states [R, dim]."""
        # prepared for any number of steps: settings by the steps at hand would be another binary, in mid-service
        max_rows = MAX_STEPS * self.max_batch
        launch_adaln_modulation(out, tables.projected, states, self._weights, self._biases, max_rows)

    def _flow(
        self, b: MLPHeadBuffers, tables: MLPHeadTables, h: Tensor, cfg_alpha: Tensor, noise_source: NoiseSource
    ) -> None:
        module, B = self.module, len(h)
        launch_gated_linear(
            b.states, h, module.cond_embed.weight, module.cond_embed.bias, None, None, 2 * self.max_batch
        )
        self._modulate(tables, b.states, tables.modulations[:, 1 : 1 + B])
        entrance = module.input_proj.weight, module.input_proj.bias
        launch_mlp_start(*noise_source, self._quantiles_on(h.device), *entrance, b.x, b.stream, self.max_batch)
        for step in range(len(tables.dt)):
            modulation = tables.modulations[step, : 1 + B]
            self._run_layers(b, modulation)
            self._step(b, tables, modulation[:, -2 * module.config.dim :], cfg_alpha, step)

    def _run_layers(self, b: MLPHeadBuffers, modulation: Tensor) -> None:
        """All blocks of one evaluation, 2 launches each."""
        dim, max_rows = self.module.config.dim, 2 * self.max_batch
        for i, block in enumerate(self._blocks):
            mine = modulation[:, 3 * i * dim : 3 * (i + 1) * dim]
            up, down = cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
            launch_adaln_linear_silu(b.gated, b.stream, mine, up.weight, up.bias, self._eps, max_rows)
            launch_gated_linear(b.stream, b.gated, down.weight, down.bias, mine[:, 2 * dim :], b.stream, max_rows)

    def _step(self, b: MLPHeadBuffers, tables: MLPHeadTables, modulation: Tensor, cfg_alpha: Tensor, step: int) -> None:
        """The solver's step and the next stream, or the codes."""
        module, dt, ratio = self.module, tables.dt[step], tables.ab2_ratio[step]
        final = module.final_layer.linear
        common = (b.stream, modulation, final.weight, final.bias, self._eps, cfg_alpha, dt, ratio, b.x, b.v_last)
        if step + 1 < len(tables.dt):
            launch_mlp_step(*common, module.input_proj.weight, module.input_proj.bias, self.max_batch)
            return
        launch_mlp_finish((b.codes, b.next_embedding), *common, b.semantic, *self._codebooks, self.max_batch)
