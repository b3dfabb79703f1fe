"""The base class of the fused flow heads, which turn hidden states into one frame of codes through kernels."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.flow import launch_flow_finish, launch_flow_step
from ..kernels.operator import expect, on_device
from ..kernels.semantic_argmax import launch_semantic_argmax, semantic_argmax_scratch
from ..kernels.shares import Scratch, Shares, new_scratch
from ..reference.config import N_SPECIAL_CODES
from ..reference.flow_head import FlowHead
from ..reference.noise import quantile_table
from ..reference.quantized import scale_of
from ..reference.solver import step_ratios, time_grid
from ..validation import refuse_gradients

MAX_BATCH = 64  # the operators' limit; the transformer head then has 6 * 64 rows, and linear layers take up to 512


@dataclass(frozen=True)
class HeadBuffers:
    """The memory that one frame of B requests needs in every head.

    K is the number of acoustic codes, and E is the width of the codes' embeddings.

    Attributes:
        x: fp32 [B, K], the flow's state.
        v_last: fp32 [B, K], the velocity of the previous step.
        semantic: int64 [B], the semantic codes.
        argmax_scratch: scratch memory of the semantic argmax.
        codes: int64 [B, 1 + K], the result.
        next_embedding: [B, E], the sum of the codes' embeddings.
        scratch: memory for parts of tiles that blocks share, the same for all numbers of requests.
    """

    x: Tensor
    v_last: Tensor
    semantic: Tensor
    argmax_scratch: tuple[Tensor, Tensor]
    codes: Tensor
    next_embedding: Tensor
    scratch: Scratch


@dataclass(frozen=True)
class StepTables:
    """Values that depend only on the weights, the solver and the number of steps.

    Attributes:
        weights: the weights that the tables were computed from.
        key: addresses, versions, dtypes and devices of the weights at that time.
        dt: length of each step.
        ab2_ratio: for each step, the factor on the velocity's change since the previous step, see
            :func:`voxkern.reference.solver.step_ratios`.
        network: the tables of the velocity network, see ``_make_network_tables`` of its fused head.
    """

    weights: list[Tensor]
    key: tuple[Any, ...]
    dt: list[float]
    ab2_ratio: list[float]
    network: tuple[Tensor, ...]


# seed, frame, noise; either the noise or the other two are given
NoiseSource = tuple[Tensor | None, Tensor | None, Tensor | None]


class FusedHead:
    """Replaces a flow head's ``forward`` and ``solve``, with the same arguments and, up to rounding, the same results.

    A subclass for each velocity network implements the methods that raise NotImplementedError here.

    Attributes:
        module: the flow head. Every frame reads the weights that the module holds at that time.
        embeddings: the embedding table of the codes, or None.
        max_batch: the most requests that a frame may have. The launch configs and a result's last bits depend on it.
    """

    def __init__(self, module: FlowHead, max_batch: int, embeddings: nn.Embedding | None = None) -> None:
        """Prepare for a flow head.

        Args:
            module: the flow head.
            max_batch: the most requests of a frame, 1..64.
            embeddings: the embedding table of the codes, for the backbone's next input; None computes no input.

        Raises:
            ValueError: `max_batch` is not in 1..64.
        """
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must be in 1..{MAX_BATCH}, got {max_batch}")
        self.module, self.embeddings, self.max_batch = module, embeddings, max_batch
        self._buffers: dict[tuple[int, torch.dtype, torch.device], HeadBuffers] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Scratch] = {}
        self._step_tables: dict[tuple[str, int], StepTables] = {}
        self._quantiles: Tensor | None = None

    def __call__(
        self,
        h: Tensor,
        cfg_alpha: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """Return one frame of codes, int64 [B, 1 + K]; see :meth:`FlowHead.forward`.

        Raises:
            RuntimeError: a gradient is needed, or the tensors are on the CPU and Triton's interpreter is off.
            ValueError: a shape is wrong, or there are more requests than `max_batch`.
            TypeError: a dtype is wrong.
        """
        n_acoustic = self.module.audio.n_acoustic_codebook
        if noise is None:
            noise = torch.randn(h.shape[0], n_acoustic, dtype=torch.float32, device=h.device)
        alpha, noise = cfg_alpha.float().contiguous(), noise.float().contiguous()
        codes, _ = self.generate_codes(h, alpha, steps=steps, solver=solver, noise=noise)
        return codes.clone()

    def solve(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """Return a frame's acoustic latents before they are quantised, fp32 [B, K]; see :meth:`FlowHead.solve`.

        The whole frame runs, including the codes. After :meth:`generate_codes`, the same latents are in
        ``buffers(B, dtype, device).x``.
        """
        alpha, noise = cfg_alpha.float().contiguous(), noise.float().contiguous()
        self.generate_codes(h, alpha, steps=steps, solver=solver, noise=noise)
        return self.buffers(len(h), h.dtype, h.device).x.clone()

    def generate_codes(
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
        """Generate one frame of codes.

        The first call with B requests, or with a new solver or number of steps, allocates memory. Later calls only
        launch kernels.

        Args:
            h: [B, input_dim], the backbone's hidden state in the weights' dtype.
            cfg_alpha: fp32 [B], strength of the guidance; 1 means no guidance.
            steps: evaluations of the velocity network, 1..64; None takes the config's number.
            solver: "euler" or "ab2".
            noise: fp32 [B, K] standard normals; with None, the kernel draws the noise from `seed` and `frame`.
            seed: int64 [B], see :func:`voxkern.reference.noise.seed_tensor`.
            frame: int64 [B], the number of the frame, counted from 0 in each request.

        Returns:
            The codes, int64 [B, 1 + K], and the backbone's next input, [B, E] (E = 0 without embeddings). The next
            frame of B requests overwrites both.

        Raises:
            RuntimeError: a gradient is needed, or the tensors are on the CPU and Triton's interpreter is off.
            ValueError: a shape or device is wrong, a number is out of range, or `noise` is missing and so is `seed` or
                `frame`.
            TypeError: a dtype is wrong.
        """
        steps = self.module.config.n_decoding_steps if steps is None else steps
        self._check(h, cfg_alpha, noise, seed, frame)
        with on_device("the accelerated flow head", h):
            buffers, tables = self.buffers(len(h), h.dtype, h.device), self.step_tables(solver, steps)
            logits = self.module.semantic_codebook_output
            launch_semantic_argmax(
                buffers.semantic, h, logits.weight, self._n_codes, self.max_batch, scale_of(logits),
                buffers.argmax_scratch,
            )  # fmt: skip
            self._flow(buffers, tables, h, cfg_alpha, (seed, frame, noise))
        return buffers.codes, buffers.next_embedding

    def buffers(self, B: int, dtype: torch.dtype, device: torch.device) -> HeadBuffers:
        """Return the memory for a frame of `B` requests; the first call with `B`, dtype and device allocates it."""
        if (B, dtype, device) not in self._buffers:

            def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            K = self.module.audio.n_acoustic_codebook
            with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
                if (dtype, device) not in self._scratch:
                    self._scratch[dtype, device] = new_scratch(zeros(0), self._shares(dtype))
                common: dict[str, Any] = {
                    "x": zeros(B, K, dtype=torch.float32),
                    "v_last": zeros(B, K, dtype=torch.float32),
                    "semantic": zeros(B, dtype=torch.int64),
                    "argmax_scratch": semantic_argmax_scratch(
                        self.module.semantic_codebook_output.weight, dtype, self._n_codes, self.max_batch
                    ),
                    "codes": zeros(B, 1 + K, dtype=torch.int64),
                    "next_embedding": zeros(B, 0 if self.embeddings is None else self.embeddings.embedding_dim),
                    "scratch": self._scratch[dtype, device],
                }
                self._buffers[B, dtype, device] = self._make_buffers(B, common, zeros)
        return self._buffers[B, dtype, device]

    def step_tables(self, solver: str, steps: int) -> StepTables:
        """Return the tables of a solver's steps; rebuild the tables if a weight used for them has changed.

        Writes through ``.data``, and writes to weights made in inference mode, cannot be detected. Call
        :meth:`refresh` after such writes.
        """
        weights = self._step_table_weights()
        key = _key(weights)
        known = self._step_tables.get((solver, steps))
        # compare the tensor objects too, because a new tensor may have the address of an old tensor
        if known is None or known.key != key or any(a is not b for a, b in zip(known.weights, weights, strict=True)):
            self._step_tables[solver, steps] = self._new_step_tables(solver, steps, weights, key)
        return self._step_tables[solver, steps]

    def refresh(self) -> None:
        """Rebuild all tables from the current weights."""
        weights = self._step_table_weights()
        for solver, steps in self._step_tables:
            self._step_tables[solver, steps] = self._new_step_tables(solver, steps, weights, _key(weights))

    def _new_step_tables(self, solver: str, steps: int, weights: list[Tensor], key: tuple[Any, ...]) -> StepTables:
        """Compute the tables, in the memory of old tables of the same form, because captured graphs read it."""
        times = time_grid(solver, steps)
        lengths = [end - start for start, end in itertools.pairwise(times)]
        with torch.inference_mode(False), torch.no_grad():
            projected = self.module.project_time(
                torch.tensor(times[:-1], dtype=torch.float64, device=weights[0].device)
            )
            made = self._make_network_tables(projected)
            known = self._step_tables.get((solver, steps))
            if known is not None:
                pairs = zip(known.network, made, strict=True)
                made = tuple(old.copy_(new) if _same_form(old, new) else new for old, new in pairs)
        return StepTables(weights, key, lengths, step_ratios(solver, times), made)

    def _make_buffers(self, B: int, common: dict[str, Any], zeros: Callable[..., Tensor]) -> HeadBuffers:
        """Return the memory for a frame of B requests: the `common` fields, and the network's own, made by `zeros`."""
        raise NotImplementedError

    def _shares(self, dtype: torch.dtype) -> list[Shares]:
        """Return how the network's launches divide their tiles, with activations of `dtype`."""
        raise NotImplementedError

    def _step_table_weights(self) -> list[Tensor]:
        """Return the weights that the step tables are computed from."""
        raise NotImplementedError

    def _make_network_tables(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Return the velocity network's tables; `projected` has the projected times, [steps, dim]."""
        raise NotImplementedError

    def _flow(
        self, b: HeadBuffers, tables: StepTables, h: Tensor, cfg_alpha: Tensor, noise_source: NoiseSource
    ) -> None:
        """Launch all kernels of a frame except those of the semantic codes."""
        raise NotImplementedError

    def _solver_step(
        self,
        b: HeadBuffers,
        tables: StepTables,
        step: int,
        cfg_alpha: Tensor,
        final: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None],
        entrance: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    ) -> None:
        """Run the solver's step, and compute the next evaluation's tokens or, in the last step, the codes.

        `final` are `y`, `norm`, `modulation`, `w_out` and `b_out` of :func:`voxkern.kernels.flow.flow_step`, and
        `entrance` are its `w_in`, `b_in`, `time` and `tokens`.
        """
        common = (*final, self._eps, cfg_alpha, tables.dt[step], tables.ab2_ratio[step], b.x, b.v_last)
        if step + 1 < len(tables.dt):
            launch_flow_step(*common, *entrance, self.max_batch)
        else:
            launch_flow_finish((b.codes, b.next_embedding), *common, b.semantic, *self._codebooks, self.max_batch)

    @property
    def _eps(self) -> float:
        return self.module.config.norm_eps

    @property
    def _hidden_projection(self) -> nn.Linear:
        """The module's linear layer that projects the hidden state."""
        raise NotImplementedError

    @property
    def _n_codes(self) -> int:
        return self.module.audio.semantic_codebook_size + N_SPECIAL_CODES

    @property
    def _codebooks(self) -> tuple[int, Tensor | None, int]:
        """The number of levels of an acoustic code, the codes' embedding table, and the semantic codebook's size."""
        audio = self.module.audio
        embeddings = None if self.embeddings is None else self.embeddings.weight
        return audio.acoustic_codebook_size, embeddings, audio.semantic_codebook_size

    def _quantiles_on(self, device: torch.device) -> Tensor:
        if self._quantiles is None or self._quantiles.device != device:
            self._quantiles = quantile_table().to(device)
        return self._quantiles

    def _check(
        self, h: Tensor, cfg_alpha: Tensor, noise: Tensor | None, seed: Tensor | None, frame: Tensor | None
    ) -> None:
        self._check_gradients(h)
        B, _ = expect("h", h, ("B", self.module.config.input_dim), self._hidden_projection.weight, contiguous=False)
        if not 1 <= B <= self.max_batch:
            raise ValueError(f"h has {B} rows, the flow head is prepared for 1..{self.max_batch} (max_batch)")
        if noise is None and (seed is None or frame is None):
            raise ValueError("noise is missing: pass noise, or seed and frame to draw it from")
        expect("cfg_alpha", cfg_alpha, (B,), like=h, dtype=torch.float32)
        if noise is not None:
            expect("noise", noise, (B, self.module.audio.n_acoustic_codebook), like=h, dtype=torch.float32)
        for name, tensor in (("seed", seed), ("frame", frame)):
            if tensor is not None:
                expect(name, tensor, (B,), like=h, dtype=torch.int64)

    def _check_gradients(self, *arguments: Tensor) -> None:
        refuse_gradients("flow head", *arguments, self._hidden_projection.weight)


def _key(weights: list[Tensor]) -> tuple[Any, ...]:
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in weights)


def _same_form(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
