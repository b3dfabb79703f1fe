"""Tests of the first layer's queries, keys and values from the flow's state, and of the weights multiplied for them."""

import pytest
import torch
from torch import Tensor

from bench.ops.registry import TensorMaker
from voxkern.kernels.state_qkv import fold_state_qkv, state_qkv
from voxkern.reference.quantized import FORMATS, quantize_weight

EPS, NAN = 1e-5, float("nan")


def weights(make: TensorMaker, dim: int, K: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the weights of queries, keys and values, of RMSNorm, and of the state's projection."""
    w_qkv = [make(n, dim, std=dim**-0.5) for n in (3 * dim, dim, dim)]
    return w_qkv, make(dim, mean=1.0, std=0.3), make(dim, K)


def unfolded(x: Tensor, w_qkv: list[Tensor], norm: Tensor, w_in: Tensor) -> Tensor:
    """Return the q | k | v of the tokens of `x`, computed in fp64 from the weights themselves."""
    token = x.double() @ w_in.double().T
    normed = token / (token.square().mean(1, keepdim=True) + EPS).sqrt() * norm.double()
    return normed @ torch.cat(w_qkv).double().T


def folded(x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
    """Return the result of the operator in fp32, in memory that was NaN."""
    qkv = x.new_full((len(x), len(weight)), NAN)
    state_qkv(x, weight, root, EPS, qkv, len(x))
    return qkv


@pytest.mark.parametrize(("dim", "K"), [(70, 37), (40, 5), (3, 7)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_folded_weights_give_the_layers_result(dim: int, K: int, size: float, device: torch.device) -> None:
    """The results agree also for a network narrower than the state, and for tokens so small that `eps` matters."""
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, dim, K)
    x = make(5, K, std=size)
    result = folded(x, *fold_state_qkv(w_qkv, [None] * 3, norm, w_in))
    torch.testing.assert_close(result.double(), unfolded(x, w_qkv, norm, w_in), rtol=1e-4, atol=1e-5)


def test_columns_that_nearly_cancel(device: torch.device) -> None:
    """The token is a ten-thousandth of its terms. A quadratic form of x would lose all digits of its mean square."""
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 50, 2)
    w_in[:, 1] = w_in[:, 0] * make(50, mean=1.0, std=1e-4)
    x = torch.tensor([[100.0, -100.0], [64.0, -64.0]], device=device)
    result = folded(x, *fold_state_qkv(w_qkv, [None] * 3, norm, w_in))
    torch.testing.assert_close(result.double(), unfolded(x, w_qkv, norm, w_in), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_scaled(name: str, device: torch.device) -> None:
    w_qkv, norm, w_in = weights(TensorMaker(device=str(device)), 70, 37)
    pairs = [quantize_weight(weight, FORMATS[name]) for weight in w_qkv]
    wide = [q.float() * scale[:, None] for q, scale in pairs]
    found = fold_state_qkv([q for q, _ in pairs], [scale for _, scale in pairs], norm, w_in)
    for one, expected in zip(found, fold_state_qkv(wide, [None] * 3, norm, w_in), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_the_state_is_rounded_first(device: torch.device) -> None:
    """As all inputs of the network are, the state is rounded to the network's dtype."""
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 40, 5)
    tables, x = fold_state_qkv(w_qkv, [None] * 3, norm, w_in), make(3, 5)
    results = [x.new_full((3, 200), NAN, dtype=torch.bfloat16) for _ in range(2)]
    for state, qkv in zip((x, x.bfloat16().float()), results, strict=True):
        state_qkv(state, *tables, EPS, qkv, 3)
    assert torch.equal(*results)


def test_a_row_of_nan_stays_alone(device: torch.device) -> None:
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 40, 5)
    tables, x = fold_state_qkv(w_qkv, [None] * 3, norm, w_in), make(3, 5)
    expected = folded(x, *tables)
    x[1, 2] = NAN
    result = folded(x, *tables)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(3, 4), ValueError, r"x is \[3, 4\] but must be \[3, 5\]"),
        ("x", torch.zeros(3, 5).half(), TypeError, r"x is torch.float16 but must be torch.float32"),
        ("root", torch.zeros(4, 5), ValueError, r"root is \[4, 5\] but must be \[5, 5\]"),
        ("weight", torch.zeros(9, 5), ValueError, r"weight is \[9, 5\] but must be \[10, K\]"),
        ("qkv", torch.zeros(3, 20)[:, ::2], ValueError, "qkv .* must be contiguous"),
        ("max_batch", 2, ValueError, "qkv has 3 rows but must have 1 per request, for 1..2 requests"),
        ("max_batch", 65, ValueError, "max_batch is 65 but must lie in 1..64"),
    ],
)
def test_errors(name: str, value: object, error: type[Exception], message: str) -> None:
    args = {"x": torch.zeros(3, 5), "weight": torch.zeros(10, 5), "root": torch.zeros(5, 5), "eps": EPS}
    args |= {"qkv": torch.zeros(3, 10).bfloat16(), "max_batch": 3}
    with pytest.raises(error, match=message):
        state_qkv(**args | {name: value})
