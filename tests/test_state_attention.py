"""Tests of the first layer's attention from the flow's state, and of the weights multiplied for it."""

import pytest
import torch
from torch import Tensor

from bench.ops.registry import TensorMaker
from bench.ops.token_attention import token_attention_reference
from voxkern.kernels.state_attention import fold_state_qkv, state_attention
from voxkern.reference.quantized import FORMATS, quantize_weight

EPS, NAN = 1e-5, float("nan")


def weights(make: TensorMaker, dim: int, K: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the weights of queries, keys and values, of RMSNorm, and of the state's projection.

    The weights have three query heads of `dim` columns, and one key head.
    """
    w_qkv = [make(n, dim, std=dim**-0.5) for n in (3 * dim, dim, dim)]
    return w_qkv, make(dim, mean=1.0, std=0.3), make(dim, K)


def other_tokens(make: TensorMaker, B: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return q | k | v of the t token and of the h tokens."""
    return make(1, 5 * dim), make(B, 5 * dim)


def unfolded(x: Tensor, w_qkv: list[Tensor], norm: Tensor, w_in: Tensor, t_qkv: Tensor, h_qkv: Tensor) -> Tensor:
    """Return the attention, computed in fp64 from the weights themselves."""
    token = x.double() @ w_in.double().T
    normed = token / (token.square().mean(1, keepdim=True) + EPS).sqrt() * norm.double()
    x_qkv = normed @ torch.cat(w_qkv).double().T
    tokens = (x_qkv, x_qkv, t_qkv.double().expand(2 * len(x), -1), h_qkv.double(), torch.zeros_like(x_qkv))
    return token_attention_reference(torch.cat(tokens), 3, 1, 3, len(x))


def folded(x: Tensor, weight: Tensor, root: Tensor, t_qkv: Tensor, h_qkv: Tensor) -> Tensor:
    """Return the operator's result."""
    return state_attention(x, weight, root, t_qkv, h_qkv, EPS, 3, 1, len(x))


@pytest.mark.parametrize(("dim", "K"), [(70, 37), (40, 5), (3, 7)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_folded_weights_give_the_layers_result(dim: int, K: int, size: float, device: torch.device) -> None:
    """The results agree also for a network narrower than the state, and for tokens so small that `eps` matters."""
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, dim, K)
    x, others = make(5, K, std=size), other_tokens(make, 5, dim)
    result = folded(x, *fold_state_qkv(w_qkv, [None] * 3, norm, w_in), *others)
    torch.testing.assert_close(result.double(), unfolded(x, w_qkv, norm, w_in, *others), rtol=1e-4, atol=1e-4)


def test_columns_that_nearly_cancel(device: torch.device) -> None:
    """The token is a ten-thousandth of its terms. A quadratic form of x would lose all digits of its mean square."""
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 50, 2)
    w_in[:, 1] = w_in[:, 0] * make(50, mean=1.0, std=1e-4)
    x, others = torch.tensor([[100.0, -100.0], [64.0, -64.0]], device=device), other_tokens(make, 2, 50)
    result = folded(x, *fold_state_qkv(w_qkv, [None] * 3, norm, w_in), *others)
    torch.testing.assert_close(result.double(), unfolded(x, w_qkv, norm, w_in, *others), rtol=5e-3, atol=5e-3)


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
    others = [qkv.bfloat16() for qkv in other_tokens(make, 3, 40)]
    assert torch.equal(folded(x, *tables, *others), folded(x.bfloat16().float(), *tables, *others))


@pytest.mark.parametrize("name", ["x", "h_qkv"])
def test_a_request_of_nan_stays_alone(name: str, device: torch.device) -> None:
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 40, 5)
    tables, x, (t_qkv, h_qkv) = fold_state_qkv(w_qkv, [None] * 3, norm, w_in), make(3, 5), other_tokens(make, 3, 40)
    expected = folded(x, *tables, t_qkv, h_qkv).unflatten(0, (6, 3))
    {"x": x, "h_qkv": h_qkv}[name][1] = NAN
    result = folded(x, *tables, t_qkv, h_qkv).unflatten(0, (6, 3))
    assert torch.equal(result[:, [0, 2]], expected[:, [0, 2]])
    assert result[::2, 1].isnan().all()  # branch 0
    if name == "h_qkv":  # branch 1 does not have the hidden state
        assert torch.equal(result[1::2, 1], expected[1::2, 1])
    else:
        assert result[1::2, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_request_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    make = TensorMaker(device=str(device))
    w_qkv, norm, w_in = weights(make, 40, 5)
    tables, x = fold_state_qkv(w_qkv, [None] * 3, norm, w_in), make(7, 5)
    t_qkv, h_qkv = (qkv.to(dtype) for qkv in other_tokens(make, 7, 40))
    whole = state_attention(x, *tables, t_qkv, h_qkv, EPS, 3, 1, 9).unflatten(0, (6, 7))
    for part in ([0], [3], [6, 0, 1]):
        found = state_attention(x[part], *tables, t_qkv, h_qkv[part], EPS, 3, 1, 9).unflatten(0, (6, len(part)))
        assert torch.equal(found, whole[:, part])


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(3, 4), ValueError, r"x is \[3, 4\] but must be \[3, 5\]"),
        ("x", torch.zeros(3, 5).half(), TypeError, r"x is torch.float16 but must be torch.float32"),
        ("root", torch.zeros(4, 5), ValueError, r"root is \[4, 5\] but must be \[5, 5\]"),
        ("weight", torch.zeros(5, 9), ValueError, r"weight is \[5, 9\] but must be \[K, 20\]"),
        ("t_qkv", torch.zeros(3, 20).bfloat16(), ValueError, r"t_qkv is \[3, 20\] but must be \[1, 20\]"),
        ("h_qkv", torch.zeros(3, 40).bfloat16()[:, ::2], ValueError, "h_qkv .* must be contiguous"),
        ("n_heads", 4, ValueError, r"h_qkv has 20 columns, which do not split into 4 \+ 2 \* 1 heads"),
        ("max_batch", 2, ValueError, "h_qkv has 3 rows but must have 1 per request, for 1..2 requests"),
        ("max_batch", 65, ValueError, "max_batch is 65 but must lie in 1..64"),
    ],
)
def test_errors(name: str, value: object, error: type[Exception], message: str) -> None:
    args = {"x": torch.zeros(3, 5), "weight": torch.zeros(5, 20), "root": torch.zeros(5, 5), "eps": EPS}
    args |= {"t_qkv": torch.zeros(1, 20).bfloat16(), "h_qkv": torch.zeros(3, 20).bfloat16()}
    args |= {"n_heads": 3, "n_kv_heads": 1, "max_batch": 3}
    with pytest.raises(error, match=message):
        state_attention(**args | {name: value})
