"""Registry entry of expert routing, at the shapes of Mistral Small 4.

A token uses 4 of 128 experts, and a shared expert.
"""

from typing import Any

import torch
from torch import Tensor

from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.moe_routing import moe_route, tile_count
from voxkern.reference.moe import Routing
from voxkern.reference.moe import route as plain_route


def moe_route_reference(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_shared: int,
    scoring: str,
    n_groups: int,
    n_groups_per_tok: int,
    renormalise: bool,
    scale: float,
    tile_rows: int,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Route with the reference model's function, and sort the pairs by expert. Unused tiles are filled with -1."""
    M, E = logits.shape
    ids, weights = plain_route(logits, Routing(top_k, scoring, n_groups, n_groups_per_tok, renormalise, scale), bias)
    shared = torch.arange(E, E + n_shared, device=ids.device).expand(M, n_shared)
    ids, weights = torch.cat((ids, shared), 1), torch.cat((weights, torch.ones_like(shared, dtype=weights.dtype)), 1)
    experts, pairs = ids.flatten().sort(stable=True)
    tiles, first = [], 0
    for expert, count in zip(*experts.unique(return_counts=True), strict=True):
        end = first + int(count)
        tiles += [[int(expert), i, min(i + tile_rows, end)] for i in range(first, end, tile_rows)]
        first = end
    tiles += [[-1, -1, -1]] * (tile_count(M, E, top_k, n_shared, tile_rows) - len(tiles))
    return ids.int(), weights, pairs.int(), torch.tensor(tiles, dtype=torch.int32, device=ids.device)


def moe_route_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with logits of RMS 2.

    If not 0, `s.bias` adds a bias, and `s.sigmoid` selects sigmoid scores. With `s.plain` other than 0, the weights are
    not renormalised, but scaled by 2.5.
    """
    return {
        "logits": make(s.M, s.E, std=2.0).float(),
        "bias": make(s.E, std=0.1).float() if s.bias else None,
        "top_k": s.top_k,
        "n_shared": s.n_shared,
        "scoring": "sigmoid" if s.sigmoid else "softmax",
        "n_groups": s.groups,
        "n_groups_per_tok": s.groups_per_tok,
        "renormalise": not s.plain,
        "scale": 1.0 if not s.plain else 2.5,
        "tile_rows": s.tile_rows,
        "max_rows": s.max_rows,
    }


PLAIN = {"bias": 0, "sigmoid": 0, "groups": 1, "groups_per_tok": 1, "plain": 0}
GROUPED = {"bias": 1, "sigmoid": 1, "groups": 3, "groups_per_tok": 2, "plain": 1}
SMALL_4 = {"E": 128, "top_k": 4, "n_shared": 1, **PLAIN}

ENTRIES = [
    Entry(
        op=moe_route,
        reference=moe_route_reference,
        inputs=moe_route_inputs,
        cases=tuple(
            Case(name, sizes, public=name.startswith("small-4"), dtypes=("fp32",))
            for name, sizes in {
                "odd": {"M": 19, "E": 12, "top_k": 3, "n_shared": 2, "tile_rows": 8, "max_rows": 20} | PLAIN,
                "odd-groups": {"M": 37, "E": 21, "top_k": 5, "n_shared": 0, "tile_rows": 8, "max_rows": 80} | GROUPED,
                "small-4-b1": {"M": 1, "tile_rows": 8, "max_rows": 1} | SMALL_4,
                "small-4-b32": {"M": 32, "tile_rows": 32, "max_rows": 32} | SMALL_4,
                "small-4-512": {"M": 512, "tile_rows": 32, "max_rows": 512} | SMALL_4,
            }.items()
        ),
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
        uses_matrix_unit=False,
    )
]
