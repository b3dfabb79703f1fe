"""Fused flow heads for public servers, with methods that take the arguments of the servers' own methods.

A server passes its tensors in the weights' dtype, for any number of requests, and receives the codes of one frame. The
server still decides its noise, its guidance and its CUDA graphs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..fused.flow_head import NoiseSource
from ..fused.transformer_head import FusedTransformerHead, TransformerHeadBuffers
from ..kernels.linear import launch_linear, linear_shares
from ..kernels.norm_linear import launch_norm_linear, norm_linear_shares
from ..kernels.operator import on_device
from ..kernels.shares import Shares
from ..reference.config import END_AUDIO
from ..reference.quantized import QuantizedLinear, quantize_weight
from ..reference.transformer_head import FlowMatchingAudioTransformer


class FusedServerHead(FusedTransformerHead):
    """Runs a server's flow head through kernels; a batch above `max_batch` runs in groups of at most `max_batch`.

    Attributes:
        server: the server's module.
        module: a reference module made of the server's layers, see
            :func:`voxkern.integrations.server_heads.as_reference`.
        quantize: the format of the large weights of `module`, "int8" or "fp8", or None if they are the server's.
    """

    def __init__(
        self, module: FlowMatchingAudioTransformer, server: nn.Module, max_batch: int, quantize: str | None = None
    ) -> None:
        super().__init__(module, max_batch)
        self.server: Any = server
        self.quantize = quantize

    @torch.inference_mode(False)  # copies made in inference mode could not be written outside of it
    @torch.no_grad()
    def prepare(self) -> None:
        """Rebuild tables and 8-bit copies from the current weights, and compile the kernels by running each once.

        Raises:
            RuntimeError: the weights are on a device on which kernels cannot run.
        """
        self._quantize_again()
        self.refresh()
        weight = self._hidden_projection.weight
        h, tokens = weight.new_zeros(1, self.module.config.input_dim), weight.new_zeros(2, self.module.config.dim)
        x = weight.new_zeros(2, self.module.audio.n_acoustic_codebook)
        self.generate_codes(h, h.new_ones(1, dtype=torch.float32), noise=x[:1].float())
        self.velocity_of_projected(x, tokens, tokens)

    def forward(
        self,
        llm_hidden: Tensor,
        cfg_alpha: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        seed: Tensor | None = None,
        frame: Tensor | None = None,
    ) -> Tensor:
        """Generate one frame of codes, as the server's own ``forward`` does.

        Args:
            llm_hidden: [B, input_dim], the backbone's hidden state in the weights' dtype.
            cfg_alpha: [B], strength of each request's guidance; None takes the ``_cfg_alpha`` of the server's module.
            noise: [B, K] standard normals. With None, the noise is drawn from `seed` and `frame`, or as the server does
                if `seed` is None too.
            seed: int64 [B], see :func:`voxkern.reference.noise.seed_tensor`. With a seed, a request's codes depend only
                on its own arguments.
            frame: int64 [B], the number of the frame, counted from 0 in each request.

        Returns:
            int64 [B, 1 + K], the codes.

        Raises:
            RuntimeError: a gradient is needed.
            TypeError: `cfg_alpha` is missing and the server's head has no ``_cfg_alpha``, or a dtype is wrong.
            ValueError: a shape is wrong.
        """
        B = len(llm_hidden)
        if cfg_alpha is None:
            if not hasattr(self.server, "_cfg_alpha"):
                raise TypeError("cfg_alpha is missing, and this head has no _cfg_alpha of its own: pass cfg_alpha")
            cfg_alpha = llm_hidden.new_full((B,), self.server._cfg_alpha, dtype=torch.float32)
        if noise is None and seed is None:
            noise = self._draw(llm_hidden)
        if noise is not None:
            noise = noise.float().contiguous()
        alpha = cfg_alpha.to(llm_hidden.device, torch.float32).contiguous()
        codes = llm_hidden.new_empty((B, 1 + self.module.audio.n_acoustic_codebook), dtype=torch.int64)
        self.run(codes, llm_hidden.contiguous(), alpha, self.module.config.n_decoding_steps, (seed, frame, noise))
        return codes

    def run(self, out: Tensor, h: Tensor, cfg_alpha: Tensor, steps: int, noise_source: NoiseSource) -> None:
        """Generate one frame in groups of at most `max_batch` requests, and write the codes to `out`.

        Servers have no code NOT_FINITE. If the frame of a request has NaN or infinity, the semantic code is END.

        Args:
            out: int64 [B, 1 + K], the memory for the codes.
            h: [B, input_dim]. See :meth:`generate_codes` for this argument, the following arguments, and the errors.
            cfg_alpha: fp32 [B].
            steps: evaluations of the velocity network.
            noise_source: `seed`, `frame` and `noise`, each with B rows or None.
        """
        for first in range(0, len(h), self.max_batch):
            rows = slice(first, first + self.max_batch)
            seed, frame, noise = (None if tensor is None else tensor[rows] for tensor in noise_source)
            codes, _ = self.generate_codes(h[rows], cfg_alpha[rows], steps=steps, seed=seed, frame=frame, noise=noise)
            torch.clamp(codes, min=END_AUDIO, out=out[rows])  # NOT_FINITE becomes END, all other codes are larger

    def velocity_of_projected(self, x_t: Tensor, llm_proj: Tensor, t_proj: Tensor) -> Tensor:
        """Compute the velocity of R independent rows, as vLLM-Omni's ``_predict_velocity`` does.

        Args:
            x_t: [R, K], the flow's state.
            llm_proj: [R, dim], the projected hidden state.
            t_proj: [R, dim], the projected time.

        Returns:
            [R, K] in the weights' dtype.

        Raises:
            RuntimeError: a gradient is needed.
        """
        self._check_gradients(x_t, llm_proj, t_proj)
        velocity = llm_proj.new_empty(x_t.shape)
        with on_device("the accelerated flow head", llm_proj):
            for first in range(0, len(x_t), 2 * self.max_batch):
                rows = slice(first, first + 2 * self.max_batch)
                self._velocity(velocity[rows], x_t[rows].to(llm_proj.dtype), t_proj[rows], llm_proj[rows])
        return velocity

    def velocity_of_embedded(self, x_t: Tensor, llm_output: Tensor, t_emb: Tensor) -> Tensor:
        """Compute the velocity of R independent rows, as SGLang-Omni's ``_predict_velocity`` does.

        Args:
            x_t: [R, K], the flow's state.
            llm_output: [R, input_dim], the backbone's hidden state.
            t_emb: [R, dim], the sinusoids of the flow time.

        Returns:
            [R, K] in the weights' dtype.

        Raises:
            RuntimeError: a gradient is needed.
        """
        return self.velocity_of_projected(
            x_t, self.module.llm_projection(llm_output), self.module.time_projection(t_emb)
        )

    def _velocity(self, out: Tensor, x: Tensor, time: Tensor, hidden: Tensor) -> None:
        """Compute the velocity of R rows into `out`, [R, K].

        The layers take an even number of rows of each token. If R is odd, each token has one extra row with old values,
        and the results of the extra rows are not used.
        """
        module, R = self.module, len(x)
        b = self.buffers((R + 1) // 2, hidden.dtype, hidden.device)
        assert isinstance(b, TransformerHeadBuffers)
        x_tokens, t_tokens, h_tokens = (part[:R] for part in b.stream.chunk(3))
        w_in, scratch = module.input_projection.weight, b.scratch
        launch_linear(x_tokens, x.contiguous(), w_in, None, None, None, self._max_rows, scratch=scratch)
        t_tokens.copy_(time)
        h_tokens.copy_(hidden)
        self._run_layers(b, is_attended=False)
        w_out = module.acoustic_codebook_output.weight
        launch_norm_linear(out, b.stream[:R], module.norm.weight, w_out, self._eps, self._max_rows, scratch=scratch)

    def _quantize_again(self) -> None:
        """Quantise the server's weights, in the memory of old copies, because captured graphs read it."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, QuantizedLinear):
                q, scale = quantize_weight(self.server.get_submodule(name).weight.detach(), layer.format)
                if layer.weight.device == q.device:
                    layer.weight.copy_(q)
                    layer.qscale_weight.copy_(scale)
                else:
                    layer.weight, layer.qscale_weight = q, scale

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        w_in, w_out = self.module.input_projection.weight, self.module.acoustic_codebook_output.weight
        mine = [linear_shares(w_in, dtype, self._max_rows), norm_linear_shares(w_out, dtype, self._max_rows)]
        return [*super()._shares(dtype), *mine]

    def _draw(self, h: Tensor) -> Tensor:
        """Draw noise [B, K] on the device on which the server draws it.

        SGLang-Omni's head, which has ``_cfg_alpha``, draws on the CPU; vLLM-Omni's head draws on the device of `h`.
        """
        shape = len(h), self.module.audio.n_acoustic_codebook
        if hasattr(self.server, "_cfg_alpha"):
            noise = torch.randn(shape, device="cpu").to(h.device, h.dtype)
        else:
            noise = torch.randn(shape, dtype=h.dtype, device=h.device)
        return noise * getattr(self.server, "_noise_scale", 1.0)


class CapturableFrame:
    """Replaces ``_forward_cudagraph_compatible``, the method that vLLM-Omni captures in its CUDA graphs.

    A call allocates nothing for the batch sizes that this object was prepared for. The next call with the same batch
    size overwrites the results, as the replay of a graph does.
    """

    def __init__(self, head: FusedServerHead, steps: int, sizes: list[int]) -> None:
        """Allocate the memory for batches of each of `sizes`, and the tables for `steps` evaluations."""
        self.head, self.steps = head, steps
        self._memory: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        weight, most = head.module.llm_projection.weight, head.max_batch
        for B in sizes:
            self._of(B, weight)
            for group in {min(B, most), B % most} - {0}:
                head.buffers(group, weight.dtype, weight.device)
        head.step_tables("euler", steps)

    def __call__(self, hidden_states: Tensor, cfg_alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Generate one frame of codes.

        Args:
            hidden_states: [B, input_dim], the backbone's hidden state in the weights' dtype.
            cfg_alpha: [B, 1], strength of each request's guidance.
            noise: [B, K] standard normals.

        Returns:
            ended: [B] in the hidden states' dtype, 1 if a request has ended and 0 otherwise.
            codes: int64 [B, 1 + K].
        """
        alpha, x, ended, codes = self._of(len(hidden_states), hidden_states)
        alpha.copy_(cfg_alpha[:, 0])
        x.copy_(noise)
        self.head.run(codes, hidden_states, alpha, self.steps, (None, None, x))
        torch.eq(codes[:, 0], END_AUDIO, out=ended)
        return ended, codes

    def _of(self, B: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the memory of B requests: guidance fp32 [B], noise fp32 [B, K], ends [B], codes int64 [B, 1 + K]."""
        if B not in self._memory:
            K = self.head.module.audio.n_acoustic_codebook
            with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
                self._memory[B] = (
                    like.new_zeros(B, dtype=torch.float32),
                    like.new_zeros((B, K), dtype=torch.float32),
                    like.new_zeros(B),
                    like.new_zeros((B, 1 + K), dtype=torch.int64),
                )
        return self._memory[B]
