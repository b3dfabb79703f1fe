"""What surrounds the velocity MLP's blocks, in the public model at the width of MAR-H (arXiv 2406.11838)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.adaln import own_rows
from bench.registry import Case, Entry, TensorMaker
from bench.transformer_solver import codes_of, integers, semantic_of, state
from voxkern.kernels.mlp_solver import mlp_finish, mlp_start, mlp_step
from voxkern.reference.flow_head import guide
from voxkern.reference.layers import upcast
from voxkern.reference.mlp_head import modulated_norm
from voxkern.reference.noise import noise as draw
from voxkern.reference.noise import quantile_table
from voxkern.reference.solver import euler_step


def solver_step(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor,
) -> None:  # fmt: skip
    """The step in place. The kernels round nothing on the way and neither does this, so they are held to more."""
    shift, scale = own_rows(modulation, 2 * len(x)).chunk(2, dim=1)
    y = modulated_norm(upcast(stream), shift, scale, eps)
    v = guide(F.linear(y, upcast(w_out), upcast(b_out)), cfg_alpha)
    x.copy_(euler_step(x, v + ab2_ratio * (v - v_last) if ab2_ratio else v, dt))
    v_last.copy_(v)


def mlp_start_reference(
    seed: Tensor, frame: Tensor, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, b_in: Tensor,
    x: Tensor, stream: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Noise, or what is handed in for it, and its projection for both branches."""
    x.copy_(draw(seed, frame, x.shape[1]) if noise is None else noise)
    stream.copy_(F.linear(x.to(w_in.dtype), w_in, b_in).repeat(2, 1))


def mlp_step_reference(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, w_in: Tensor, b_in: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """The step, then the stream of the next."""
    solver_step(stream, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    stream.copy_(F.linear(x.to(w_in.dtype), w_in, b_in).repeat(2, 1))


def mlp_finish_reference(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, semantic: Tensor, levels: int, embeddings: Tensor, semantic_size: int,
    max_batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The step, its codes, and the sum of their embeddings."""
    solver_step(stream, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    return codes_of(x, semantic, levels, embeddings, semantic_size)


def mlp_start_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """`s.given`: whether the noise is handed in (and, in a step, whether it has a last one)."""
    return {
        "seed": integers(make, s.B, -3 << 40, 0x5DEECE66D1234),
        "frame": integers(make, s.B, 2047, 3),
        "noise": make(s.B, s.K).float() if s.given else None,
        "quantiles": quantile_table().to(make.device),
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "b_in": make(s.N, std=0.1),
        "x": state(s, make),
        "stream": make(2 * s.B, s.N),
        "max_batch": s.max_batch,
    }


def final_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """What a step begins with; guidance from none (1) to the usual 1.2 to only."""
    return {
        "stream": make(2 * s.B, s.N, mean=1.0, std=4.0),
        "modulation": make(1 + s.B, 2 * s.N, std=0.5),
        "w_out": make(s.K, s.N, std=s.N**-0.5),
        "b_out": make(s.K, std=0.1),
        "eps": 1e-6,
        "cfg_alpha": 1.2 - 0.2 * (integers(make, s.B, 0, 1) % 7).float(),
        "dt": 1 / 7,
        "ab2_ratio": 0.4 if s.given else 0.0,
        "x": state(s, make),
        "v_last": make(s.B, s.K).float(),
    }


def mlp_step_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """A step in the middle of the flow."""
    return final_inputs(s, make) | {
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "b_in": make(s.N, std=0.1),
        "max_batch": s.max_batch,
    }


def mlp_finish_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Semantic codes, of which the second request's is END."""
    return final_inputs(s, make) | {
        "semantic": semantic_of(s, make),
        "levels": s.levels,
        "embeddings": make(s.semantic_size + 2 + s.K * (s.levels + 2) + 5, s.E),
        "semantic_size": s.semantic_size,
        "max_batch": s.max_batch,
    }


PUBLIC = {"N": 1536, "K": 36, "E": 3072, "levels": 21, "semantic_size": 8192, "given": 0}
ODD = {"B": 5, "max_batch": 7, "N": 150, "K": 37, "E": 129, "levels": 21, "semantic_size": 50, "given": 0}
ODD_SMALL = {"B": 3, "max_batch": 3, "N": 200, "K": 5, "E": 70, "levels": 8, "semantic_size": 9, "given": 1}
CASES = (
    Case("odd", ODD),
    Case("odd-small", ODD_SMALL),
    Case("frame-b1", {"B": 1, "max_batch": 1, **PUBLIC}, public=True),
    Case("frame-b32", {"B": 32, "max_batch": 32, **PUBLIC}, public=True, dtypes=("bf16",)),
)


def _entry(op: Any, reference: Any, inputs: Any, once: tuple[str, ...]) -> Entry:
    return Entry(
        op=op,
        reference=reference,
        inputs=inputs,
        cases=CASES,
        rows="B",
        stage=lambda c: c.get("BLOCK_K", 0) * c["N"],
        read_once=once,
        uses_matrix_unit=False,  # with a state of one row a request, these are sums over bytes that stream by
    )


ENTRIES = [
    _entry(mlp_start, mlp_start_reference, mlp_start_inputs, ("w_in",)),
    _entry(mlp_step, mlp_step_reference, mlp_step_inputs, ("w_out", "w_in")),
    _entry(mlp_finish, mlp_finish_reference, mlp_finish_inputs, ("w_out",)),
]
