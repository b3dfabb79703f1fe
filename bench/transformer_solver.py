"""What surrounds the flow head's layers, at the shapes of the public model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Case, Entry, TensorMaker
from voxkern.kernels.transformer_solver import flow_finish, flow_start, flow_step
from voxkern.reference.flow_head import guide, quantise
from voxkern.reference.layers import rms_norm, upcast
from voxkern.reference.noise import noise as draw
from voxkern.reference.noise import quantile_table
from voxkern.reference.solver import euler_step


def project_in(x: Tensor, w_in: Tensor, time: Tensor, tokens: Tensor) -> None:
    """The x and t tokens of both branches."""
    projected = F.linear(x.to(w_in.dtype), w_in)
    tokens[: 4 * len(x)] = torch.cat((projected, projected, time.expand(2 * len(x), -1)))


def solver_step(
    y: Tensor, norm: Tensor, w_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float, ab2_ratio: float,
    x: Tensor, v_last: Tensor,
) -> None:  # fmt: skip
    """The step in place. The kernels round nothing on the way and neither does this, so they are held to more."""
    v = guide(F.linear(rms_norm(upcast(y[: 2 * len(x)]), upcast(norm), eps), upcast(w_out)), cfg_alpha)
    x.copy_(euler_step(x, v + ab2_ratio * (v - v_last) if ab2_ratio else v, dt))
    v_last.copy_(v)


def flow_start_reference(
    seed: Tensor, frame: Tensor, noise: Tensor | None, quantiles: Tensor, w_in: Tensor, time: Tensor,
    x: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """Noise, or what is handed in for it, and its tokens."""
    x.copy_(draw(seed, frame, x.shape[1]) if noise is None else noise)
    project_in(x, w_in, time, tokens)


def flow_step_reference(
    y: Tensor, norm: Tensor, w_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float, ab2_ratio: float,
    x: Tensor, v_last: Tensor, w_in: Tensor, time: Tensor, tokens: Tensor, max_batch: int,
) -> None:  # fmt: skip
    """The step, then the tokens of the next."""
    solver_step(y, norm, w_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    project_in(x, w_in, time, tokens)


def flow_finish_reference(
    y: Tensor, norm: Tensor, w_out: Tensor, eps: float, cfg_alpha: Tensor, dt: float, ab2_ratio: float,
    x: Tensor, v_last: Tensor, semantic: Tensor, levels: int, embeddings: Tensor, semantic_size: int, max_batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The step, its codes, and the sum of their embeddings."""
    solver_step(y, norm, w_out, eps, cfg_alpha, dt, ab2_ratio, x, v_last)
    return codes_of(x, semantic, levels, embeddings, semantic_size)


def codes_of(x: Tensor, semantic: Tensor, levels: int, embeddings: Tensor, semantic_size: int) -> tuple[Tensor, Tensor]:
    """A frame's codes, and the sum of their embeddings."""
    acoustic = quantise(x, levels) + 2
    codes = torch.cat((semantic[:, None], acoustic.where(semantic[:, None] != 1, 2)), dim=1)
    offset = torch.arange(x.shape[1], device=x.device) * (levels + 2) + semantic_size + 2
    rows = codes + F.pad(offset, (1, 0))
    return codes, upcast(embeddings[rows]).sum(1).to(embeddings.dtype)


def integers(make: TensorMaker, n: int, first: int, every: int) -> Tensor:
    """int64 [n]: `first`, and one in `every` more than the last."""
    return torch.arange(n, dtype=torch.int64, device=make.device) * every + first


def state(s: Any, make: TensorMaker) -> Tensor:
    """x as it stands late in the flow: most of it within -1..1, some not."""
    return make(s.B, s.K, std=0.7).float()


def semantic_of(s: Any, make: TensorMaker) -> Tensor:
    """Semantic codes, of which the second request's is END."""
    semantic = integers(make, s.B, 7, 1) % s.semantic_size + 2
    if s.B > 1:
        semantic[1] = 1
    return semantic


def flow_start_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """`s.given`: whether the noise is handed in (and, in a step, whether it has a last one)."""
    return {
        "seed": integers(make, s.B, -3 << 40, 0x5DEECE66D1234),
        "frame": integers(make, s.B, 2047, 3),
        "noise": make(s.B, s.K).float() if s.given else None,
        "quantiles": quantile_table().to(make.device),
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "time": make(s.N),
        "x": state(s, make),
        "tokens": make(6 * s.B, s.N),
        "max_batch": s.max_batch,
    }


def head_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """What a step begins with: `s.rows` rows of y a request, guidance from none (1) to the usual 1.2 to only."""
    return {
        "y": make(s.rows * s.B, s.N, std=4.0),
        "norm": make(s.N, mean=1.0, std=0.1),
        "w_out": make(s.K, s.N, std=s.N**-0.5),
        "eps": 1e-5,
        "cfg_alpha": 1.2 - 0.2 * (torch.arange(s.B, device=make.device) % 7).float(),
        "dt": 1 / 7,
        "ab2_ratio": 0.4 if s.given else 0.0,
        "x": state(s, make),
        "v_last": make(s.B, s.K).float(),
    }


def flow_step_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """A step in the middle of the flow."""
    return head_inputs(s, make) | {
        "w_in": make(s.N, s.K, std=s.K**-0.5),
        "time": make(s.N),
        "tokens": make(6 * s.B, s.N),
        "max_batch": s.max_batch,
    }


def flow_finish_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Semantic codes, of which the second request's is END."""
    return head_inputs(s, make) | {
        "semantic": semantic_of(s, make),
        "levels": s.levels,
        "embeddings": make(s.semantic_size + 2 + s.K * (s.levels + 2) + 5, s.E),
        "semantic_size": s.semantic_size,
        "max_batch": s.max_batch,
    }


PUBLIC = {"N": 3072, "K": 36, "E": 3072, "levels": 21, "semantic_size": 8192, "given": 0}
ODD = {"B": 5, "max_batch": 7, "N": 150, "K": 37, "E": 129, "levels": 21, "semantic_size": 50, "given": 0, "rows": 6}
ODD_SMALL = {"B": 3, "max_batch": 3, "N": 200, "K": 5, "E": 70, "levels": 8, "semantic_size": 9, "given": 1, "rows": 2}
CASES = (
    Case("odd", ODD),
    Case("odd-small", ODD_SMALL),
    Case("frame-b1", {"B": 1, "max_batch": 1, "rows": 2, **PUBLIC}, public=True),
    Case("frame-b32", {"B": 32, "max_batch": 32, "rows": 2, **PUBLIC}, public=True),
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
    _entry(flow_start, flow_start_reference, flow_start_inputs, ("w_in",)),
    _entry(flow_step, flow_step_reference, flow_step_inputs, ("norm", "w_out", "w_in")),
    _entry(flow_finish, flow_finish_reference, flow_finish_inputs, ("norm", "w_out")),
]
