"""What all fused flow heads share: a frame from hidden state to codes, its memory, its tables, its checks."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.operator import on_device
from ..kernels.semantic_argmax import launch_semantic_argmax, semantic_argmax_scratch
from ..reference.config import N_SPECIAL_CODES
from ..reference.flow_head import FlowHead
from ..reference.noise import quantile_table
from ..reference.solver import step_ratios, time_grid

MAX_BATCH = 64  # six rows a request in the transformer, and the linear family is made for 512


@dataclass(frozen=True)
class HeadBuffers:
    """Memory of a frame of B requests.

    Attributes:
        x: fp32 [B, K], the flow's state.
        v_last: fp32 [B, K], the last step's velocity.
        semantic: int64 [B].
        argmax_scratch: scratch of the semantic head.
        codes: int64 [B, 1 + K], the result.
        next_embedding: [B, E], the result's embedding.
    """

    x: Tensor
    v_last: Tensor
    semantic: Tensor
    argmax_scratch: Tensor
    codes: Tensor
    next_embedding: Tensor


@dataclass(frozen=True)
class StepTables:
    """What depends on weights, solver and steps alone.

    Attributes:
        weights: that it was made from.
        key: what they were then.
        dt: length of each step.
        ab2_ratio: of each step, see :func:`voxkern.reference.solver.integrate`.
    """

    weights: list[Tensor]
    key: tuple[Any, ...]
    dt: list[float]
    ab2_ratio: list[float]


NoiseSource = tuple[Tensor | None, Tensor | None, Tensor | None]  # seed and frame, or noise
ModuleT = TypeVar("ModuleT", bound=FlowHead)
BuffersT = TypeVar("BuffersT", bound=HeadBuffers)
TablesT = TypeVar("TablesT", bound=StepTables)


class FusedHead(Generic[ModuleT, BuffersT, TablesT]):
    """Replaces a flow head's ``forward`` and ``solve``: same arguments, same results up to rounding.

    The fused head of a velocity network is a subclass that adds the methods that raise NotImplementedError here.

    Attributes:
        module: the flow head, whose weights are read anew in every frame.
        max_batch: requests that it is prepared for.
    """

    def __init__(self, module: ModuleT, max_batch: int, embeddings: nn.Embedding | None = None) -> None:
        """`embeddings`: the table of codes, for the next input of the backbone; without it there is none.

        Raises:
            ValueError: `max_batch` is not in 1..64.
        """
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must lie in 1..{MAX_BATCH}, got {max_batch}")
        self.module, self.embeddings, self.max_batch = module, embeddings, max_batch
        self._buffers: dict[tuple[int, torch.dtype, torch.device], BuffersT] = {}
        self._step_tables: dict[tuple[str, int], TablesT] = {}
        self._quantiles: Tensor | None = None

    def __call__(
        self,
        h: Tensor,
        cfg_alpha: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """One frame of codes, as :meth:`FlowHead.forward` says them.

        Raises:
            RuntimeError: gradients are asked for.
            ValueError: a shape is wrong, or there are more requests than `max_batch`.
            TypeError: a dtype is wrong.
        """
        n_acoustic = self.module.audio.n_acoustic_codebook
        if noise is None:
            noise = torch.randn(h.shape[0], n_acoustic, device=h.device)
        alpha, noise = cfg_alpha.float().contiguous(), noise.float().contiguous()
        codes, _ = self.generate_codes(h, alpha, steps=steps, solver=solver, noise=noise)
        return codes.clone()

    def solve(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """The frame's acoustic latents before they are quantised, as :meth:`FlowHead.solve` says them: fp32 [B, K].

        A whole frame is run, its codes too. After a :meth:`generate_codes` they stand in the ``x`` of its buffers.
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
        """One frame, in launches and nothing else once a call of as many requests and steps has been made.

        Args:
            h: [B, input_dim] in the weights' dtype.
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
        steps = self.module.config.n_decoding_steps if steps is None else steps
        self._check(h, cfg_alpha, noise, seed, frame)
        with on_device("the accelerated flow head", h):
            buffers, tables = self.buffers(len(h), h.dtype, h.device), self.step_tables(solver, steps)
            weight = self.module.semantic_codebook_output.weight
            launch_semantic_argmax(buffers.semantic, h, weight, self._n_codes, self.max_batch, buffers.argmax_scratch)
            self._flow(buffers, tables, h, cfg_alpha, (seed, frame, noise))
        return buffers.codes, buffers.next_embedding

    def buffers(self, B: int, dtype: torch.dtype, device: torch.device) -> BuffersT:
        """The memory of a frame of `B` requests; made at the first call."""
        if (B, dtype, device) not in self._buffers:

            def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            K = self.module.audio.n_acoustic_codebook
            with torch.inference_mode(False):  # to be written in any mode
                common = HeadBuffers(
                    x=zeros(B, K, dtype=torch.float32),
                    v_last=zeros(B, K, dtype=torch.float32),
                    semantic=zeros(B, dtype=torch.int64),
                    argmax_scratch=semantic_argmax_scratch(
                        self.module.semantic_codebook_output.weight, self._n_codes, self.max_batch
                    ),
                    codes=zeros(B, 1 + K, dtype=torch.int64),
                    next_embedding=zeros(B, 0 if self.embeddings is None else self.embeddings.embedding_dim),
                )
                self._buffers[B, dtype, device] = self._make_buffers(B, vars(common), zeros)
        return self._buffers[B, dtype, device]

    def step_tables(self, solver: str, steps: int) -> TablesT:
        """The tables of a solver's steps; made anew when a weight that they come from is seen to have changed.

        What is written through ``.data``, or to weights made in inference mode, leaves no trace: :meth:`refresh` then.
        """
        weights = self._step_table_weights()
        key = _key(weights)
        known = self._step_tables.get((solver, steps))
        # the tensors themselves, too: a new one may lie where an old one lay
        if known is None or known.key != key or any(a is not b for a, b in zip(known.weights, weights, strict=True)):
            self._step_tables[solver, steps] = self._new_step_tables(solver, steps, weights, key)
        return self._step_tables[solver, steps]

    def refresh(self) -> None:
        """Make the tables anew from the weights as they are."""
        weights = self._step_table_weights()
        for solver, steps in self._step_tables:
            self._step_tables[solver, steps] = self._new_step_tables(solver, steps, weights, _key(weights))

    def _new_step_tables(self, solver: str, steps: int, weights: list[Tensor], key: tuple[Any, ...]) -> TablesT:
        """Where old ones lie, if they fit: a captured graph reads them there."""
        times = time_grid(solver, steps)
        lengths = [end - start for start, end in itertools.pairwise(times)]
        with torch.inference_mode(False), torch.no_grad():
            projected = self.module.project_time(
                torch.tensor(times[:-1], dtype=torch.float64, device=weights[0].device)
            )
            made = self._make_step_tables(StepTables(weights, key, lengths, step_ratios(solver, times)), projected)
            known = self._step_tables.get((solver, steps))
            return made if known is None else replace(made, **_written_over(vars(known), vars(made)))

    def _make_buffers(self, B: int, common: dict[str, Tensor], zeros: Callable[..., Tensor]) -> BuffersT:
        """The network's own memory beside what is `common`; `zeros` makes tensors."""
        raise NotImplementedError

    def _step_table_weights(self) -> list[Tensor]:
        """What the tables of times are made from."""
        raise NotImplementedError

    def _make_step_tables(self, tables: StepTables, projected: Tensor) -> TablesT:
        """The network's own tables, from the projected times [steps, dim]."""
        raise NotImplementedError

    def _flow(self, b: BuffersT, tables: TablesT, h: Tensor, cfg_alpha: Tensor, noise_source: NoiseSource) -> None:
        """Launch all of a frame but its semantic codes."""
        raise NotImplementedError

    @property
    def _hidden_projection(self) -> nn.Linear:
        """The module's projection of the hidden state."""
        raise NotImplementedError

    @property
    def _n_codes(self) -> int:
        return self.module.audio.semantic_codebook_size + N_SPECIAL_CODES

    @property
    def _codebooks(self) -> tuple[int, Tensor | None, int]:
        """Levels of an acoustic code, the embeddings of codes, and the semantic codebook's size."""
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
        weight, audio = self._hidden_projection.weight, self.module.audio
        self._check_gradients(h)
        if h.ndim != 2 or h.shape[1] != self.module.config.input_dim:
            raise ValueError(f"h must be [B, {self.module.config.input_dim}], got {list(h.shape)}")
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

    def _check_gradients(self, *arguments: Tensor) -> None:
        tensors = (*arguments, self._hidden_projection.weight)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                "gradients are asked of an accelerated flow head, and kernels have none: call it under "
                "torch.inference_mode(), or voxkern.restore() the model to train it"
            )


def _key(weights: list[Tensor]) -> tuple[Any, ...]:
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in weights)


def _written_over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old tensors, by name, that can hold the new ones and now do."""
    pairs = {name: (old[name], tensor) for name, tensor in new.items() if isinstance(tensor, Tensor)}
    return {
        name: a.copy_(b)
        for name, (a, b) in pairs.items()
        if (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    }
