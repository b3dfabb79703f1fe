"""Registry entries of the velocity MLP's kernels around its blocks.

The public shapes have the width of MAR-H (arXiv 2406.11838) and the public model's codes.
"""

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
    """Run one solver step on `x` and `v_last`, in place.

    Like the kernels, this reference rounds no intermediate result. The bound on the kernels' error is therefore
    tighter than with a reference that rounds after every operation.
    """
    shift, scale = own_rows(modulation, 2 * len(x)).chunk(2, dim=1)
    y = modulated_norm(upcast(stream), shift, scale, eps)
    v = guide(F.linear(y, upcast(w_out), upcast(b_out)), cfg_alpha)
    x.copy_(euler_step(x, v + ab2_ratio * (v - v_last) if ab2_ratio else v, dt))
    v_last.copy_(v)


def mlp_start_reference(
    seed: Tensor, frame: Tensor, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, b_in: Tensor,
    x: Tensor, stream: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Start a frame: set `x` to `noise`, or to drawn noise if that is None, and write `stream` for both branches."""
    x.copy_(draw(seed, frame, x.shape[1]) if noise is None else noise)
    stream.copy_(F.linear(x.to(w_in.dtype), w_in, b_in).repeat(2, 1))


def mlp_step_reference(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, w_in: Tensor, b_in: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run one solver step, then write `stream` for the next evaluation."""
    solver_step(stream, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    stream.copy_(F.linear(x.to(w_in.dtype), w_in, b_in).repeat(2, 1))


def mlp_finish_reference(
    stream: Tensor, modulation: Tensor, w_out: Tensor, b_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float,
    ab2_ratio: float, x: Tensor, v_last: Tensor, semantic: Tensor, levels: int, embeddings: Tensor, semantic_size: int,
    max_batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the last solver step, and return the codes and the sum of their embeddings."""
    solver_step(stream, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    return codes_of(x, semantic, levels, embeddings, semantic_size)


def mlp_start_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments at the start of a frame. With `s.given` = 0 the noise is None, and will be drawn."""
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
    """Return the arguments that every step needs.

    The requests in turn have a guidance of 1.2, 1.0 (none), 0.8 and so on down to 0. With `s.given` other than 0, the
    step uses the previous velocity.
    """
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
    """Return the arguments of a step that is not the last."""
    return final_inputs(s, make) | {
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "b_in": make(s.N, std=0.1),
        "max_batch": s.max_batch,
    }


def mlp_finish_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments of the last step."""
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
        uses_matrix_unit=False,  # with one row of state per request, the kernels compute sums, not matrix products
    )


ENTRIES = [
    _entry(mlp_start, mlp_start_reference, mlp_start_inputs, ("w_in",)),
    _entry(mlp_step, mlp_step_reference, mlp_step_inputs, ("w_out", "w_in")),
    _entry(mlp_finish, mlp_finish_reference, mlp_finish_inputs, ("w_out",)),
]
