"""The flow head's twin: a frame in 13 launches a step (16 for more than one request), on the host's own weights.

Beside fusing, it does not compute what is known: the time tokens and their first layer's queries, keys and values are a
table; those of the hidden state are made once a frame; without the condition they are exactly zero; before the first
layer the x token has no branch; and in the last layer only the x tokens go on past keys and values.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.flow import launch_flow_finish, launch_flow_start, launch_flow_step
from ..kernels.linear import launch_linear, launch_norm_swiglu
from ..kernels.operator import on_device
from ..kernels.qkv import launch_norm_qkv
from ..kernels.semantic import launch_semantic_codes, semantic_scratch
from ..kernels.tokens import launch_token_attention, launch_token_attention_linear
from ..reference.attention import TransformerBlock
from ..reference.config import N_SPECIAL_CODES
from ..reference.flow import FlowMatchingAudioTransformer, step_ratios, time_grid
from ..reference.noise import quantile_table

MAX_BATCH = 64  # six rows a request, and the linear family is made for 512
FUSED_ROWS = 8  # up to here wo attends for itself; from 16 rows on a stage of it holds too little of the weights


@dataclass(frozen=True)
class Buffers:
    """Memory of a frame of B requests; rows are token-major, row = token * 2B + branch * B + request.

    Attributes:
        x: fp32 [B, K], the flow's state.
        v_last: fp32 [B, K], the last step's velocity.
        tokens: [6B, dim], what enters the first layer. The last B rows, no condition, are zero and stay so.
        stream: [6B, dim], what the layers make of it.
        x_qkv: [B, W], q | k | v of the x tokens in the first layer.
        h_qkv: [2B, W], of the hidden states there; the second half is zero and stays so.
        qkv: [6B, W], of all tokens in later layers.
        attended: [6B, H * D].
        gated: [6B, hidden].
        semantic: int64 [B].
        best: scratch of the semantic head.
        codes: int64 [B, 1 + K], the result.
        following: [B, E], the result's embedding.
    """

    x: Tensor
    v_last: Tensor
    tokens: Tensor
    stream: Tensor
    x_qkv: Tensor
    h_qkv: Tensor
    qkv: Tensor
    attended: Tensor
    gated: Tensor
    semantic: Tensor
    best: Tensor
    codes: Tensor
    following: Tensor


@dataclass(frozen=True)
class Times:
    """What depends on weights, solver and steps alone.

    Attributes:
        weights: that it was made from.
        key: what they were then.
        tokens: [steps, dim], the t tokens.
        qkv: [steps, W], their first layer's q | k | v.
        lengths: of the steps.
        ratios: of each step, see :func:`voxkern.reference.flow.integrate`.
    """

    weights: tuple[Tensor, ...]
    key: tuple[Any, ...]
    tokens: Tensor
    qkv: Tensor
    lengths: list[float]
    ratios: list[float]


class FlowTwin:
    """Stands in for a host's ``forward``: same arguments, same codes up to rounding.

    Attributes:
        host: whose weights it reads, anew in every frame.
        max_batch: requests that it is prepared for.
    """

    def __init__(
        self, host: FlowMatchingAudioTransformer, max_batch: int, embeddings: nn.Embedding | None = None
    ) -> None:
        """`embeddings`: the table of codes, for the next input of the backbone; without it there is none.

        Raises:
            ValueError: `max_batch` is not in 1..64.
        """
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must lie in 1..{MAX_BATCH}, got {max_batch}")
        self.host, self.embeddings, self.max_batch = host, embeddings, max_batch
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Buffers] = {}
        self._times: dict[tuple[str, int], Times] = {}
        self._quantiles: Tensor | None = None

    def __call__(
        self,
        h: Tensor,
        cfg_alpha: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """One frame of codes, as :meth:`FlowMatchingAudioTransformer.forward` says them.

        Raises:
            RuntimeError: gradients are asked for.
            ValueError: a shape is wrong, or there are more requests than `max_batch`.
            TypeError: a dtype is wrong.
        """
        n_acoustic = self.host.audio.n_acoustic_codebook
        if noise is None:
            noise = torch.randn(h.shape[0], n_acoustic, device=h.device)
        alpha, noise = cfg_alpha.float().contiguous(), noise.float().contiguous()
        codes, _ = self.frame(h, alpha, steps=steps, solver=solver, noise=noise)
        return codes.clone()

    def frame(
        self,
        h: Tensor,
        cfg_alpha: Tensor,
        *,
        steps: int | None = None,
        solver: str = "euler",
        noise: Tensor | None = None,
        seed: Tensor | None = None,
        frame: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One frame, in launches and nothing else once a call of as many requests and steps has been made.

        Args:
            h: [B, dim] in the weights' dtype.
            cfg_alpha: fp32 [B].
            steps: evaluations of the velocity; None takes the config's.
            solver: "euler" or "ab2".
            noise: fp32 [B, K]; None draws it from `seed` and `frame`.
            seed: int64 [B], see :func:`voxkern.reference.noise.seed_tensor`.
            frame: int64 [B].

        Returns:
            Codes int64 [B, 1 + K] and the next input [B, E] (E = 0 without embeddings), in memory that the next frame
            of as many requests writes again.
        """
        steps = self.host.config.n_decoding_steps if steps is None else steps
        self._check(h, cfg_alpha, noise, seed, frame)
        with on_device("the accelerated flow head", h):
            buffers, times = self.buffers(len(h), h.dtype, h.device), self.times(solver, steps)
            self._begin(buffers, times, h, noise, seed, frame)
            for step in range(steps):
                self._layers(buffers, times.qkv[step : step + 1])
                self._step(buffers, times, cfg_alpha, step)
        return buffers.codes, buffers.following

    def buffers(self, B: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        """The memory of a frame of `B` requests; made at the first call."""
        if (B, dtype, device) not in self._buffers:
            config, audio = self.host.config, self.host.audio

            def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            width, K = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, audio.n_acoustic_codebook
            self._buffers[B, dtype, device] = Buffers(
                x=zeros(B, K, dtype=torch.float32),
                v_last=zeros(B, K, dtype=torch.float32),
                tokens=zeros(6 * B, config.dim),
                stream=zeros(6 * B, config.dim),
                x_qkv=zeros(B, width),
                h_qkv=zeros(2 * B, width),
                qkv=zeros(6 * B, width),
                attended=zeros(6 * B, config.n_heads * config.head_dim),
                gated=zeros(6 * B, config.hidden_dim),
                semantic=zeros(B, dtype=torch.int64),
                best=semantic_scratch(self.host.semantic_codebook_output.weight, self._n_codes, self.max_batch),
                codes=zeros(B, 1 + K, dtype=torch.int64),
                following=zeros(B, 0 if self.embeddings is None else self.embeddings.embedding_dim),
            )
        return self._buffers[B, dtype, device]

    def times(self, solver: str, steps: int) -> Times:
        """The tables of a solver's steps; made anew when a weight that they come from is seen to have changed.

        What is written through ``.data``, or to weights made in inference mode, leaves no trace: :meth:`refresh` then.
        """
        host, first = self.host, self._blocks[0]
        attention = first.attention
        norm, wq, wk, wv = first.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight
        weights = (host.time_projection.weight, norm, wq, wk, wv)
        key = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in weights)
        known = self._times.get((solver, steps))
        # the tensors themselves, too: a new one may lie where an old one lay
        if known is None or known.key != key or any(a is not b for a, b in zip(known.weights, weights, strict=True)):
            times = time_grid(solver, steps)
            with torch.no_grad():
                tokens = host.project_time(torch.tensor(times[:-1], dtype=torch.float64, device=wq.device))
                qkv = tokens.new_empty(steps, len(wq) + len(wk) + len(wv))
                launch_norm_qkv(qkv, tokens, norm, wq, wk, wv, self._eps, steps, self._max_rows)
            lengths = [end - start for start, end in itertools.pairwise(times)]
            self._times[solver, steps] = Times(weights, key, tokens, qkv, lengths, step_ratios(solver, times))
        return self._times[solver, steps]

    def refresh(self) -> None:
        """Forget the tables: the next frame makes them from the weights as they are then."""
        self._times.clear()

    @property
    def _n_codes(self) -> int:
        return self.host.audio.semantic_codebook_size + N_SPECIAL_CODES

    @property
    def _blocks(self) -> list[TransformerBlock]:
        return cast(list[TransformerBlock], list(self.host.layers))

    @property
    def _eps(self) -> float:
        return self.host.config.norm_eps

    @property
    def _max_rows(self) -> int:
        return 6 * self.max_batch

    def _begin(
        self, b: Buffers, times: Times, h: Tensor, noise: Tensor | None, seed: Tensor | None, frame: Tensor | None
    ) -> None:
        """Semantic codes, the hidden states' tokens, and the first x and t tokens: 5 launches."""
        host, B = self.host, len(h)
        launch_semantic_codes(
            b.semantic, h, host.semantic_codebook_output.weight, self._n_codes, self.max_batch, b.best
        )
        hidden = b.tokens[4 * B : 5 * B]
        launch_linear(hidden, h, host.llm_projection.weight, None, None, self._max_rows)
        self._qkv(b.h_qkv[:B], hidden, self._blocks[0], B)
        if self._quantiles is None or self._quantiles.device != h.device:
            self._quantiles = quantile_table().to(h.device)
        w_in = host.input_projection.weight
        launch_flow_start(seed, frame, noise, self._quantiles, w_in, times.tokens[0], b.x, b.tokens, self.max_batch)

    def _qkv(self, out: Tensor, x: Tensor, layer: TransformerBlock, q_rows: int) -> None:
        attention = layer.attention
        launch_norm_qkv(
            out, x, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
            self._eps, q_rows, self._max_rows,
        )  # fmt: skip

    def _layers(self, b: Buffers, t_qkv: Tensor) -> None:
        """All layers of one evaluation: 4 launches each, 5 when prepared for more than one request."""
        B, layers = len(b.x), self._blocks
        for i, layer in enumerate(layers):
            rows = 2 * B if i == len(layers) - 1 else 6 * B  # in the last layer only the x tokens ask
            if i == 0:
                self._qkv(b.x_qkv, b.tokens[:B], layer, B)
                self._attend(b, b.tokens[:rows], b.x_qkv, t_qkv, b.h_qkv, layer)
            else:
                self._qkv(b.qkv, b.stream, layer, rows)
                x_qkv, t_qkv, h_qkv = b.qkv[: 2 * B], b.qkv[2 * B : 4 * B], b.qkv[4 * B :]
                self._attend(b, b.stream[:rows], x_qkv, t_qkv, h_qkv, layer)
            feed, stream, gated = layer.feed_forward, b.stream[:rows], b.gated[:rows]
            norm = layer.ffn_norm.weight
            launch_norm_swiglu(gated, stream, norm, feed.w1.weight, feed.w3.weight, self._eps, self._max_rows)
            launch_linear(stream, gated, feed.w2.weight, None, stream, self._max_rows)

    def _attend(
        self, b: Buffers, residual: Tensor, x_qkv: Tensor, t_qkv: Tensor, h_qkv: Tensor, layer: TransformerBlock
    ) -> None:
        """``stream = residual + wo(attention)`` on the residual's rows."""
        config, wo, rows = self.host.config, layer.attention.wo.weight, len(residual)
        heads = (config.n_heads, config.n_kv_heads)
        if self._max_rows <= FUSED_ROWS and wo.dtype != torch.float32:
            launch_token_attention_linear(b.stream[:rows], x_qkv, t_qkv, h_qkv, wo, residual, *heads, self.max_batch)
            return
        attended = b.attended[:rows]
        launch_token_attention(attended, x_qkv, t_qkv, h_qkv, *heads, rows // len(h_qkv), self.max_batch)
        launch_linear(b.stream[:rows], attended, wo, None, residual, self._max_rows)

    def _step(self, b: Buffers, times: Times, cfg_alpha: Tensor, step: int) -> None:
        """The solver's step and the next tokens, or the codes."""
        host, dt, ratio = self.host, times.lengths[step], times.ratios[step]
        norm, w_out = host.norm.weight, host.acoustic_codebook_output.weight
        if step + 1 < len(times.lengths):
            launch_flow_step(
                b.stream, norm, w_out, self._eps, cfg_alpha, dt, ratio, b.x, b.v_last, host.input_projection.weight,
                times.tokens[step + 1], b.tokens, self.max_batch,
            )  # fmt: skip
            return
        embeddings = None if self.embeddings is None else self.embeddings.weight
        launch_flow_finish(
            (b.codes, b.following), b.stream, norm, w_out, self._eps, cfg_alpha, dt, ratio, b.x, b.v_last, b.semantic,
            host.audio.acoustic_codebook_size, embeddings, host.audio.semantic_codebook_size, self.max_batch,
        )  # fmt: skip

    def _check(
        self, h: Tensor, cfg_alpha: Tensor, noise: Tensor | None, seed: Tensor | None, frame: Tensor | None
    ) -> None:
        weight, audio = self.host.llm_projection.weight, self.host.audio
        if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
            raise RuntimeError(
                "gradients are asked of an accelerated flow head, and kernels have none: call it under "
                "torch.inference_mode(), or voxkern.restore() the model to train it"
            )
        if h.ndim != 2 or h.shape[1] != self.host.config.input_dim:
            raise ValueError(f"h must be [B, {self.host.config.input_dim}], got {list(h.shape)}")
        B = len(h)
        if not 1 <= B <= self.max_batch:
            raise ValueError(f"h has {B} rows, the flow head is prepared for 1..{self.max_batch} (max_batch)")
        if h.dtype != weight.dtype or h.device != weight.device:
            raise TypeError(f"h is {h.dtype} on {h.device}, the weights are {weight.dtype} on {weight.device}")
        if h.stride(1) != 1:
            raise ValueError(f"h has strides {h.stride()} but its last dimension must have stride 1")
        if noise is None and (seed is None or frame is None):
            raise ValueError("give noise, or seed and frame to draw it from")
        shapes = {"cfg_alpha": (cfg_alpha, [B]), "noise": (noise, [B, audio.n_acoustic_codebook])}
        shapes |= {"seed": (seed, [B]), "frame": (frame, [B])}
        for name, (tensor, shape) in shapes.items():
            if tensor is None:
                continue
            dtype = torch.int64 if name in ("seed", "frame") else torch.float32
            if tensor.dtype != dtype or tensor.device != h.device:
                raise TypeError(f"{name} is {tensor.dtype} on {tensor.device} but must be {dtype} on {h.device}")
            if list(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous {shape}, got {list(tensor.shape)}, {tensor.stride()}")
