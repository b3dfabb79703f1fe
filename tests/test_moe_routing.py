"""Tests of moe_route; tests/test_operators.py has the tests that every operator must pass."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import moved
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from bench.ops.moe_routing import PLAIN, moe_route_inputs, moe_route_reference
from bench.ops.registry import TensorMaker
from voxkern.kernels import launch_config
from voxkern.kernels.moe_routing import choose_tile_rows, moe_route, tile_count

SIZES = {"M": 7, "E": 12, "top_k": 3, "n_shared": 1, "tile_rows": 4, "max_rows": 8, **PLAIN}


def inputs(device: torch.device, **sizes: int) -> dict[str, Any]:
    return moe_route_inputs(SimpleNamespace(**(SIZES | sizes)), TensorMaker(device=str(device)))


def assert_same(args: dict[str, Any]) -> list[Tensor]:
    """Run moe_route, check it against its reference, and return its results.

    Experts, pairs and tiles must be equal, and weights within 1e-5.
    """
    out, expected = moe_route(**args), moe_route_reference(**args)
    for mine, theirs in zip(out, expected, strict=True):
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(mine, theirs)
    return list(out)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    open_groups = draw(st.integers(1, groups))
    return {
        "M": draw(st.integers(1, 40)),
        "E": groups * size,
        "top_k": draw(st.integers(1, min(open_groups * size, 6))),
        "n_shared": draw(st.integers(0, 2)),
        "tile_rows": 1 << draw(st.integers(0, 4)),
        "max_rows": draw(st.sampled_from([40, 80])),
        "groups": groups,
        "groups_per_tok": open_groups,
        "sigmoid": int(draw(st.booleans())),
        "plain": int(draw(st.booleans())),
    }


@hypothesis_settings(max_examples=40, deadline=None)
@given(sizes=shapes(), steps=st.sampled_from([0.0, 1.0, 4.0]))
def test_any_shape(sizes: dict[str, int], steps: float, device: torch.device) -> None:
    """Logits rounded to multiples of 1 / `steps` often tie; with `steps` 0 they are not rounded."""
    args = inputs(device, **sizes)
    if steps:
        args["logits"] = (args["logits"] * steps).round() / steps
    if sizes["groups"] > 1 and steps:
        # without groups: the sums of two groups may be equal except for rounding, and either group may then come first
        args["n_groups"] = args["n_groups_per_tok"] = 1
    assert_same(args)


@pytest.mark.parametrize("max_rows", [64, 65])  # 64 rows take one launch, 65 take two
def test_ties_and_no_numbers(max_rows: int, device: torch.device) -> None:
    args = inputs(device, max_rows=max_rows)
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, -1.0, 0.0, -0.0, 3.0, 1.0, 1.0, 1.0], device=device)
    args["logits"] = logits.repeat(7, 1)
    args["logits"][1] = torch.nan
    args["logits"][2, 1] = torch.nan
    args["logits"][3] = -torch.inf
    args["logits"][4, 11] = torch.inf
    args["logits"][5] = 0.0
    ids, weights, *_ = assert_same(args)
    assert ids[:, :3].tolist() == [[1, 2, 4], [0, 1, 2], [2, 4, 8], [0, 1, 2], [11, 1, 2], [0, 1, 2], [1, 2, 4]]
    assert weights[1, :3].isnan().all()
    assert (weights[:, 3] == 1).all()


def logits_that_are_not_finite(E: int, group: int) -> Tensor:
    """Return rows of random logits, in which each expert, each group, the whole row, or two experts are not finite."""
    g = torch.Generator().manual_seed(E + group)
    rows = []
    for value in (torch.nan, torch.inf, -torch.inf):
        for first, n in [*((e, 1) for e in range(E)), *((e, group) for e in range(0, E, group)), (0, E)]:
            row = torch.randn(E, generator=g) * 2
            row[first : first + n] = value
            rows.append(row)
    for i, j in ((0, 1), (1, 0), (0, E - 1), (E - 1, 0)):
        row = torch.randn(E, generator=g) * 2
        row[i], row[j] = torch.nan, torch.inf
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("max_rows", [64, 128])  # 64 rows take one launch, 128 take two
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("sigmoid", [0, 1], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "groups_per_tok"), [(1, 1), (3, 2), (6, 2), (12, 5)])
def test_values_that_are_not_finite(
    groups: int, groups_per_tok: int, sigmoid: int, bias: int, max_rows: int, device: torch.device
) -> None:
    """Kernel and reference choose the same experts, which are different and in range, with the same weights."""
    logits = logits_that_are_not_finite(12, 12 // groups)[-max_rows:].to(device)
    form = {"groups": groups, "groups_per_tok": groups_per_tok, "sigmoid": sigmoid, "bias": bias}
    for plain in (0, 1):
        args = inputs(device, M=len(logits), max_rows=max_rows, plain=plain, **form) | {"logits": logits}
        ids, weights, *_ = assert_same(args)
        chosen = ids[:, :3]
        assert all(len(set(row)) == 3 and set(row) <= set(range(12)) for row in chosen.tolist())
        picked = logits.gather(1, chosen.long())
        assert weights[:, :3][picked.isnan()].isnan().all()


def test_an_undefined_score_counts_as_the_lowest_in_groups_too(device: torch.device) -> None:
    """The sums of the groups' two best scores are 1.975, the lowest number (twice), and 1.73."""
    n = torch.nan
    logits = torch.tensor([[n, 5.0, 4.0, 3.0, 9.0, n, n, n, 6.0, n, 1.0, 0.0]], device=device)
    form = {"groups": 3, "groups_per_tok": 1, "sigmoid": 1, "plain": 1}
    ids, weights, *_ = assert_same(inputs(device, M=1, top_k=2, **form) | {"logits": logits})
    assert ids[0, :2].tolist() == [1, 2]
    ids, weights, *_ = assert_same(inputs(device, M=1, top_k=4, **form) | {"logits": logits})
    assert ids[0, :4].tolist() == [1, 2, 3, 0]
    assert weights[0, :4].isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("max_rows", [64, 65])  # 64 rows take one launch, 65 take two
def test_all_tokens_on_one_expert(max_rows: int, device: torch.device) -> None:
    args = inputs(device, M=37, max_rows=max_rows, top_k=1)
    args["logits"][:, 5] = 50.0
    _, _, pairs, tiles = assert_same(args)
    used = tiles[tiles[:, 0] >= 0]
    assert used[:, 0].tolist() == [5] * 10 + [12] * 10
    assert used[9].tolist() == [5, 36, 37]
    assert pairs[:37].tolist() == list(range(0, 74, 2))


def test_the_bound_on_tiles_is_reached(device: torch.device) -> None:
    """The tokens need all the tiles that tile_count() allows.

    Each of two experts has 5 tokens, one more than a tile of 4 rows, so 4 tiles are used.
    """
    logits = torch.full((10, 2), -1.0, device=device)
    logits[:5, 0] = logits[5:, 1] = 1.0
    args = inputs(device, M=10, E=2, top_k=1, n_shared=0, max_rows=16) | {"logits": logits}
    *_, tiles = assert_same(args)
    assert tiles.tolist() == [[0, 0, 4], [0, 4, 5], [1, 5, 9], [1, 9, 10]]
    assert tile_count(1, 128, 4, 1, 8) == 5
    assert tile_count(8, 128, 4, 1, 8) == 33
    assert tile_count(64, 8, 2, 0, 64) == 8


@pytest.mark.parametrize("max_rows", [64, 65])  # 64 rows take one launch, 65 take two
def test_a_token_has_the_same_bits_beside_any_others(max_rows: int, device: torch.device) -> None:
    args = inputs(device, M=40, max_rows=max_rows)
    ids, weights, *_ = moe_route(**args)
    for i in (0, 20, 39):
        alone = moe_route(**(args | {"logits": args["logits"][i : i + 1]}))
        assert torch.equal(alone[0][0], ids[i])
        assert torch.equal(alone[1][0], weights[i])


@pytest.mark.interpreter("the launch configs are those of named architectures")
def test_tiles_of_a_prepared_layer() -> None:
    with launch_config.target_arch("sm_90"):
        assert [choose_tile_rows(128, 4, torch.bfloat16, rows, "decode") for rows in (1, 8, 9, 32, 64)] == [
            8,
            8,
            16,
            32,
            64,
        ]
        assert [choose_tile_rows(128, 4, torch.bfloat16, rows, "prefill") for rows in (64, 256, 512)] == [8, 16, 32]
        assert choose_tile_rows(8, 2, torch.bfloat16, 512, "prefill") == 64
    with launch_config.target_arch("gfx942"):  # its matrix units take no tile of 8 columns
        assert choose_tile_rows(128, 4, torch.bfloat16, 1, "decode") == 16
    with pytest.raises(ValueError, match=r"phase is 'train' but must be 'decode' or 'prefill'"):
        choose_tile_rows(128, 4, torch.bfloat16, 1, "train")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(7, 12).bfloat16()}, TypeError, r"logits is torch.bfloat16 but must be torch.float32"),
        ({"logits": torch.ones(12, 7).t()}, ValueError, r"logits .* must be contiguous"),
        ({"bias": torch.ones(11)}, ValueError, r"bias is \[11\] but must be \[12\]"),
        ({"top_k": 13}, ValueError, r"top_k is 13 but must lie in 1..12"),
        ({"top_k": 0}, ValueError, r"top_k is 0"),
        ({"n_groups": 5}, ValueError, r"n_groups is 5 but must divide the 12 experts"),
        ({"n_groups": 4, "n_groups_per_tok": 5}, ValueError, r"n_groups_per_tok is 5 but must lie in 1..4"),
        ({"n_groups": 6, "top_k": 3}, ValueError, r"top_k is 3 but must lie in 1..2"),
        ({"n_shared": -1}, ValueError, r"n_shared is -1"),
        ({"scoring": "tanh"}, ValueError, r"scoring is 'tanh' but must be 'softmax' or 'sigmoid'"),
        ({"tile_rows": 12}, ValueError, r"tile_rows is 12 but must be a power of 2"),
        ({"max_rows": 6}, ValueError, r"logits has 7 rows but must have 1..6 \(max_rows\)"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        moe_route(**(inputs(device) | moved(change, device)))
