"""Registry entries of the flow head's kernels around its layers.

The shapes ``frame-*`` are those of the public model's transformer. The shapes ``mlp-*`` are those of a velocity MLP
with the width of MAR-H (arXiv 2406.11838) and the public model's codes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.linear import own_rows
from bench.ops.registry import Args, Case, Entry, TensorMaker
from voxkern.kernels.flow import flow_finish, flow_start, flow_step
from voxkern.reference.config import NOT_FINITE
from voxkern.reference.flow_head import guide, quantise
from voxkern.reference.layers import rms_norm, upcast
from voxkern.reference.mlp_head import modulated_norm
from voxkern.reference.noise import noise as draw
from voxkern.reference.noise import quantile_table
from voxkern.reference.solver import euler_step


def project_in(x: Tensor, w_in: Tensor, b_in: Tensor | None, time: Tensor | None, tokens: Tensor) -> None:
    """Write the x tokens, and the t tokens if `time` is given, of both branches to the first rows of `tokens`."""
    projected = F.linear(x.to(w_in.dtype), w_in, b_in).repeat(2, 1)
    written = projected if time is None else torch.cat((projected, time.expand_as(projected)))
    tokens[: len(written)] = written


def solver_step(
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, eps: float,
    cfg_alpha: Tensor, dt: float, ab2_ratio: float, x: Tensor, v_last: Tensor,
) -> None:  # fmt: skip
    """Run one solver step on `x` and `v_last`, in place.

    Like the kernels, this reference rounds no intermediate result. The bound on the kernels' error is therefore
    tighter than with a reference that rounds after every operation.
    """
    y = upcast(y[: 2 * len(x)])
    if modulation is None:
        n = rms_norm(y, upcast(norm), eps)
    else:
        shift, scale = own_rows(modulation, 2 * len(x)).chunk(2, dim=1)
        n = modulated_norm(y, shift, scale, eps)
    v = guide(F.linear(n, upcast(w_out), None if b_out is None else upcast(b_out)), cfg_alpha)
    x.copy_(euler_step(x, v + ab2_ratio * (v - v_last) if ab2_ratio else v, dt))
    v_last.copy_(v)


def flow_start_reference(
    seed: Tensor, frame: Tensor, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, b_in: Tensor | None,
    time: Tensor | None, x: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Start a frame: set `x` to `noise`, or to drawn noise if that is None, and write the x and t tokens."""
    x.copy_(draw(seed, frame, x.shape[1]) if noise is None else noise)
    project_in(x, w_in, b_in, time, tokens)


def flow_step_reference(
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, eps: float,
    cfg_alpha: Tensor, dt: float, ab2_ratio: float, x: Tensor, v_last: Tensor, w_in: Tensor, b_in: Tensor | None,
    time: Tensor | None, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Run one solver step, then write the x and t tokens of the next evaluation."""
    solver_step(y, norm, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    project_in(x, w_in, b_in, time, tokens)


def flow_finish_reference(
    y: Tensor, norm: Tensor | None, modulation: Tensor | None, w_out: Tensor, b_out: Tensor | None, eps: float,
    cfg_alpha: Tensor, dt: float, ab2_ratio: float, x: Tensor, v_last: Tensor, semantic: Tensor, levels: int,
    embeddings: Tensor, semantic_size: int, max_batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the last solver step; return the codes, int64 [B, 1 + K] with the +2 offset, and their embeddings' sum."""
    solver_step(y, norm, modulation, w_out, b_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    acoustic = quantise(x, levels) + 2
    semantic = semantic.where(x.isfinite().all(1), NOT_FINITE)
    codes = torch.cat((semantic[:, None], acoustic.where(semantic[:, None] != 1, 2)), dim=1)
    offset = torch.arange(x.shape[1], device=x.device) * (levels + 2) + semantic_size + 2
    rows = codes.clamp(min=0) + F.pad(offset, (1, 0))  # NOT_FINITE is no row
    return codes, upcast(embeddings[rows]).sum(1).to(embeddings.dtype)


def integers(make: TensorMaker, n: int, first: int, every: int) -> Tensor:
    """Return int64 [n]: `first`, `first + every`, `first + 2 * every` and so on."""
    return torch.arange(n, dtype=torch.int64, device=make.device) * every + first


def state(s: Any, make: TensorMaker) -> Tensor:
    """Return a random flow state x, fp32 [B, K]. As late in the flow, most but not all values are within -1..1."""
    return make(s.B, s.K, std=0.7).float()


def semantic_of(s: Any, make: TensorMaker) -> Tensor:
    """Return random semantic codes with the +2 offset, int64 [B]; the second request's code is END."""
    semantic = integers(make, s.B, 7, 1) % s.semantic_size + 2
    if s.B > 1:
        semantic[1] = 1
    return semantic


def entrance_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments of the input projection: with a time, or with a bias for an MLP."""
    return {
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "b_in": make(s.N, std=0.1) if s.mlp else None,
        "time": None if s.mlp else make(s.N),
        "tokens": make((2 if s.mlp else 6) * s.B, s.N),
        "max_batch": s.max_batch,
    }


def flow_start_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments at the start of a frame. With `s.given` = 0 the noise is None, and will be drawn."""
    return {
        "seed": integers(make, s.B, -3 << 40, 0x5DEECE66D1234),
        "frame": integers(make, s.B, 2047, 3),
        "noise": make(s.B, s.K).float() if s.given else None,
        "quantiles": quantile_table().to(make.device),
        "x": state(s, make),
        **entrance_inputs(s, make),
    }


def exit_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments that every step needs.

    `y` has `s.rows` rows per request. The requests in turn have a guidance of 1.2, 1.0 (none), 0.8 and so on down to 0.
    With `s.given` other than 0, the step uses the previous velocity.
    """
    return {
        "y": make(s.rows * s.B, s.N, mean=1.0 if s.mlp else 0.0, std=4.0),
        "norm": None if s.mlp else make(s.N, mean=1.0, std=0.1),
        "modulation": make(1 + s.B, 2 * s.N, std=0.5) if s.mlp else None,
        "w_out": make(s.K, s.N, std=s.N**-0.5),
        "b_out": make(s.K, std=0.1) if s.mlp else None,
        "eps": 1e-6 if s.mlp else 1e-5,
        "cfg_alpha": 1.2 - 0.2 * (integers(make, s.B, 0, 1) % 7).float(),
        "dt": 1 / 7,
        "ab2_ratio": 0.4 if s.given else 0.0,
        "x": state(s, make),
        "v_last": make(s.B, s.K).float(),
    }


def flow_step_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments of a step that is not the last."""
    return exit_inputs(s, make) | entrance_inputs(s, make)


def flow_finish_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the arguments of the last step."""
    return exit_inputs(s, make) | {
        "semantic": semantic_of(s, make),
        "levels": s.levels,
        "embeddings": make(s.semantic_size + 2 + s.K * (s.levels + 2) + 5, s.E),
        "semantic_size": s.semantic_size,
        "max_batch": s.max_batch,
    }


PUBLIC = {"N": 3072, "K": 36, "E": 3072, "levels": 21, "semantic_size": 8192, "given": 0, "rows": 2, "mlp": 0}
MAR_H = {**PUBLIC, "N": 1536, "mlp": 1}
ODD = {
    "B": 5, "max_batch": 7, "N": 150, "K": 37, "E": 129, "levels": 21, "semantic_size": 50, "given": 0, "rows": 6,
    "mlp": 0,
}  # fmt: skip
ODD_SMALL = {
    "B": 3, "max_batch": 3, "N": 200, "K": 5, "E": 70, "levels": 8, "semantic_size": 9, "given": 1, "rows": 2, "mlp": 0,
}  # fmt: skip
ODD_MLP = {**ODD, "rows": 2, "mlp": 1}
CASES = (
    Case("odd", ODD),
    Case("odd-small", ODD_SMALL),
    Case("odd-mlp", ODD_MLP),
    Case("odd-small-mlp", {**ODD_SMALL, "mlp": 1}),
    Case("frame-b1", {"B": 1, "max_batch": 1, **PUBLIC}, public=True),
    Case("frame-b32", {"B": 32, "max_batch": 32, **PUBLIC}, public=True),
    Case("mlp-b1", {"B": 1, "max_batch": 1, **MAR_H}, public=True),
    Case("mlp-b32", {"B": 32, "max_batch": 32, **MAR_H}, public=True, dtypes=("bf16",)),
)


# elements that a call uses: of y only the x tokens, of tokens all but the h tokens, of the quantiles only a few
PARTLY: dict[str, Callable[[Args], int]] = {
    "y": lambda args: 2 * len(args["x"]) * int(args["y"].shape[1]),
    "tokens": lambda args: args["tokens"].numel() if args["time"] is None else args["tokens"].numel() * 4 // 6,
    "quantiles": lambda args: 0,
    "embeddings": lambda args: len(args["semantic"]) * (1 + len(args["w_out"])) * int(args["embeddings"].shape[1]),
}


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
        partly=PARTLY,
    )


ENTRIES = [
    _entry(flow_start, flow_start_reference, flow_start_inputs, ("w_in",)),
    _entry(flow_step, flow_step_reference, flow_step_inputs, ("norm", "w_out", "w_in")),
    _entry(flow_finish, flow_finish_reference, flow_finish_inputs, ("norm", "w_out")),
]
