"""Tests of the packed forms of weights and of the layers that hold them: products against fp64, exact plain weights."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.ops.accuracy import judge
from voxkern.packed import weights
from voxkern.packed.linear import INT8_ALIGNMENT, Int8Product, PackedLinear, weights_version
from voxkern.packed.weights import FP16Weight, FP32Weight, LinearWeight, OneDNNWeight, PlainWeight, pack_weight
from voxkern.reference.quantized import FORMATS, quantized

LARGE, SMALL, PUBLIC = (1001, 333), (37, 21), (9216, 3072)  # [N, K]


@pytest.fixture(params=["half", "onednn"])
def large_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[LinearWeight]:
    """Return the form of large bf16 weights, on a CPU without and with instructions for bf16."""
    monkeypatch.setattr(weights, "has_bf16_instructions", lambda: request.param == "onednn")
    if request.param == "half" and torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("this CPU has no FBGEMM")
    if request.param == "onednn" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU's oneDNN has no products of bf16")
    return FP16Weight if request.param == "half" else OneDNNWeight


@pytest.fixture
def as_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "has_bf16_instructions", lambda: False)
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("this CPU has no FBGEMM")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def assert_right(packed: LinearWeight, weight: Tensor, x: Tensor) -> None:
    exact = F.linear(x.double(), weight.double())
    y = packed.linear(x)
    assert y.dtype == x.dtype
    verdict = judge(y.to(weight.dtype), F.linear(x.to(weight.dtype), weight), exact)
    assert verdict.right, verdict


@pytest.mark.parametrize("rows", [1, 6, 24])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_large_weights(large_form: type[LinearWeight], rows: int, x_dtype: torch.dtype) -> None:
    weight = random(*LARGE) / 18
    packed = pack_weight(weight)
    assert type(packed) is large_form
    assert torch.equal(bits(packed.plain()), bits(weight))
    assert_right(packed, weight, random(rows, LARGE[1], dtype=x_dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_weights(dtype: torch.dtype) -> None:
    weight = random(*SMALL, dtype=dtype)
    packed = pack_weight(weight)
    assert type(packed) is FP32Weight
    assert torch.equal(bits(packed.plain()), bits(weight))
    assert_right(packed, weight, random(5, SMALL[1], dtype=dtype, seed=1))


@pytest.mark.slow
def test_a_public_weight(large_form: type[LinearWeight]) -> None:
    weight = random(*PUBLIC) / 55
    packed = pack_weight(weight)
    assert type(packed) is large_form
    assert torch.equal(bits(packed.plain()), bits(weight))
    assert_right(packed, weight, random(6, PUBLIC[1], seed=1))


@pytest.mark.usefixtures("as_half")
def test_sums_of_a_half_weight_are_fp32() -> None:
    weight, x = random(*LARGE), random(6, LARGE[1], dtype=torch.float32, seed=1)
    exact = F.linear(x.double(), weight.double())
    error = pack_weight(weight).linear(x).double() - exact
    assert error.square().mean().sqrt() < 1e-6 * exact.square().mean().sqrt()


@pytest.mark.usefixtures("as_half")
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    packed, x = pack_weight(random(*LARGE)), random(24, LARGE[1], seed=1)
    y = packed.linear(x)
    for rows in (1, 2, 3, 5, 7, 13, 23):
        assert torch.equal(packed.linear(x[:rows]), y[:rows])
    assert torch.equal(packed.linear(x.view(4, 6, -1)), y.view(4, 6, -1))
    assert torch.equal(packed.linear(x.t().contiguous().t()), y)  # not contiguous
    assert packed.linear(x[:0]).shape == (0, LARGE[0])


@pytest.mark.usefixtures("as_half")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**9])
def test_the_power_of_two_follows_the_largest_number(dtype: torch.dtype, scale: float) -> None:
    weight = (random(*LARGE) * scale).to(dtype)
    packed = pack_weight(weight)
    assert type(packed) is FP16Weight
    assert torch.equal(bits(packed.plain()), bits(weight))
    assert_right(packed, weight, random(3, LARGE[1], dtype=dtype, seed=1))


@pytest.mark.usefixtures("as_half")
@pytest.mark.parametrize(
    ("value", "form"),
    [
        (0.0, FP16Weight),
        (-0.0, FP16Weight),
        (2.0**-31 * 255 / 128, FP16Weight),  # 8 significant bits, the most that bf16 has
        (2.0**-34 * 255 / 128, PlainWeight),  # too small beside the largest number, 1
        (float("nan"), PlainWeight),
        (float("inf"), PlainWeight),
    ],
)
def test_a_weight_that_fp16_cannot_hold_stays_plain(value: float, form: type[LinearWeight]) -> None:
    weight = random(*LARGE).clamp(-1, 1)
    weight[3, 5] = value
    packed = pack_weight(weight)
    assert type(packed) is form
    assert torch.equal(bits(packed.plain()), bits(weight))
    y = packed.linear(torch.ones(2, LARGE[1], dtype=torch.bfloat16))
    assert y.isfinite().all(0).logical_not().nonzero().flatten().tolist() == ([] if abs(value) <= 1 else [3])


@pytest.mark.usefixtures("as_half")
@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38, 1.0])
def test_weights_of_one_value(value: float) -> None:
    weight = torch.full(LARGE, value, dtype=torch.bfloat16)
    packed = pack_weight(weight)
    assert torch.equal(bits(packed.plain()), bits(weight))
    y = packed.linear(torch.full((1, LARGE[1]), 2.0**-10))
    torch.testing.assert_close(y, torch.full((1, LARGE[0]), weight[0, 0].item() * LARGE[1] / 1024), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("as_half")
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_weight_comes_back_to_the_last_bit(numbers: list[int], dtype: torch.dtype) -> None:
    repeated = torch.tensor(numbers, dtype=torch.int16).repeat(-(-513 * 512 // len(numbers)))[: 513 * 512]
    weight = repeated.view(dtype).view(513, 512)
    packed = pack_weight(weight)
    assert type(packed) in (FP16Weight, PlainWeight)
    assert torch.equal(bits(packed.plain()), bits(weight))


@pytest.mark.parametrize("form", [FP32Weight, FP16Weight, OneDNNWeight, PlainWeight])
def test_no_rows(form: type[LinearWeight], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "has_bf16_instructions", lambda: form is OneDNNWeight)
    weight = random(*(SMALL if form is FP32Weight else LARGE))
    packed = PlainWeight(weight) if form is PlainWeight else pack_weight(weight)
    assert type(packed) is form
    assert packed.linear(random(0, 3, weight.shape[1])).shape == (0, 3, len(weight))


def test_what_is_not_packed() -> None:
    for weight in (random(*LARGE, dtype=torch.float32), random(*LARGE, dtype=torch.float64)):
        packed = pack_weight(weight)
        assert type(packed) is PlainWeight
        assert packed.plain() is weight
    assert type(pack_weight(torch.empty(LARGE, dtype=torch.bfloat16, device="meta"))) is PlainWeight


def test_a_packed_layer_is_its_linear(large_form: type[LinearWeight]) -> None:
    weight, bias = random(*LARGE), random(LARGE[0], seed=2)
    linear = linear_of(weight, bias)
    layer = PackedLinear(linear)
    assert type(layer.packed) is large_form
    x = random(2, 3, LARGE[1], seed=1)
    assert judge(layer(x), linear(x), F.linear(x.double(), weight.double(), bias.double())).right
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back(x), linear(x))
    assert not back.weight.requires_grad
    with pytest.raises(AttributeError, match=r"is packed: read it with state_dict.*or voxkern\.restore"):
        layer.weight  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'scale'"):
        layer.scale  # noqa: B018


def test_state_dicts_have_the_plain_weight(large_form: type[LinearWeight]) -> None:
    weight, bias = random(*LARGE), random(LARGE[0], seed=2)
    linear = nn.Sequential(linear_of(weight, bias))
    packed = nn.Sequential(PackedLinear(linear[0]))
    state = packed.state_dict()
    assert state.keys() == linear.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in linear.state_dict().items())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = random(*LARGE, seed=3)
    assert packed.load_state_dict({"0.weight": other, "0.bias": -bias}).missing_keys == []
    assert type(packed[0].packed) is large_form
    assert torch.equal(packed[0].packed.plain(), other)
    assert torch.equal(packed[0].bias, -bias)
    packed.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(packed[0].packed.plain(), weight)
    packed.load_state_dict({"0.weight": other.float(), "0.bias": bias})  # the layer keeps its dtype
    assert torch.equal(bits(packed[0].packed.plain()), bits(other))
    for wrong, why in (
        ({"0.bias": bias}, r'Missing key\(s\) in state_dict: "0.weight"'),
        ({"0.weight": other}, r'Missing key\(s\) in state_dict: "0.bias"'),
        ({"0.weight": other, "0.bias": bias, "0.scale": bias}, r'Unexpected key\(s\) in state_dict: "0.scale"'),
        ({"0.weight": other[1:], "0.bias": bias}, r"0\.weight is \[1000, 333\] but must be \[1001, 333\]"),
    ):
        with pytest.raises(RuntimeError, match=why):
            packed.load_state_dict(wrong)
    assert sorted(packed.load_state_dict({}, strict=False).missing_keys) == ["0.bias", "0.weight"]
    assert torch.equal(packed[0].packed.plain(), other)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_copies_are_independent(large_form: type[LinearWeight], shape: tuple[int, int]) -> None:
    weight, x = random(*shape), random(2, shape[1], seed=1)
    layer = PackedLinear(linear_of(weight))
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        assert type(other.packed) is type(layer.packed)
        other.load_state_dict({"weight": weight * 2})
        assert torch.equal(other.packed.plain(), weight * 2)
        assert torch.equal(layer(x), expected)


def test_moved_and_cast(large_form: type[LinearWeight]) -> None:
    weight, x = random(*LARGE), random(2, LARGE[1], seed=1)
    layer = PackedLinear(linear_of(weight))
    packed = layer.packed
    assert layer.to(torch.bfloat16).packed is packed  # nothing was cast, so nothing is packed again
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), weight.double()))
    assert type(layer.packed) is PlainWeight
    assert type(layer.bfloat16().packed) is large_form
    assert torch.equal(layer.packed.plain(), weight)
    assert layer.to("meta").packed.plain().device.type == "meta"


def test_a_gradient_is_refused(large_form: type[LinearWeight]) -> None:
    linear = linear_of(random(*LARGE))
    x = random(2, LARGE[1])
    PackedLinear(linear)(x)
    with pytest.raises(RuntimeError, match=r"computes no gradients: call it under torch\.inference_mode\(\), or"):
        PackedLinear(linear)(x.requires_grad_())
    linear.weight.requires_grad_()
    trained = PackedLinear(linear.eval())
    with pytest.raises(RuntimeError, match="computes no gradients"):
        trained(x.detach())
    with torch.no_grad():
        trained(x)
    with torch.inference_mode():
        back = trained.to_linear()
    assert not back.training
    back(x.detach().clone()).sum().backward()  # a weight made in inference mode would raise an error
    assert back.weight.grad.isfinite().all()


def test_the_version_follows_each_weight() -> None:
    module = nn.Sequential(PackedLinear(linear_of(random(*SMALL))), linear_of(random(*SMALL)))
    before = weights_version(module)
    assert weights_version(module) == before
    module.load_state_dict({"0.weight": random(*SMALL, seed=5)}, strict=False)
    loaded = weights_version(module)
    assert loaded != before
    with torch.no_grad():
        module[1].weight[0, 0] = 3
    assert weights_version(module) != loaded


@pytest.mark.parametrize("shape", [(1001, 336), (37, 16), pytest.param(PUBLIC, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [1, 6, 24])
def test_int8_product(shape: tuple[int, int], rows: int) -> None:
    layer = quantized(linear_of(random(*shape)), FORMATS["int8"])
    x = random(rows, shape[1], seed=1)
    exact = F.linear(x.double(), layer.weight.double()) * layer.qscale_weight.double()
    product = Int8Product(layer, nn.Parameter(random(1)))
    verdict = judge(product(x), layer(x), exact)
    assert verdict.right, verdict
    assert torch.equal(product(x.view(rows, 1, -1)), product(x).view(rows, 1, -1))
    assert torch.equal(product(x.float()).bfloat16(), product(x))
    assert torch.equal(product(x[:1]), product(x)[:1])


@pytest.mark.parametrize("offset", [1, 4, 8, 16])
def test_int8_weights_at_any_address(offset: int) -> None:
    """Weights in a mapped file begin at any address. The product would crash on some of them."""
    layer = quantized(linear_of(random(37, 48)), FORMATS["int8"])
    x = random(7, 48, seed=1)
    expected = Int8Product(layer, nn.Parameter(random(1)))(x)

    def moved() -> torch.Tensor:
        memory = torch.zeros(layer.weight.numel() + 64, dtype=torch.int8)
        start = -memory.data_ptr() % 64 + offset
        return memory[start : start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)

    layer.weight = moved()
    product = Int8Product(layer, nn.Parameter(random(1)))
    assert layer.weight.data_ptr() % INT8_ALIGNMENT == 0
    assert torch.equal(product(x), expected)
    layer.load_state_dict({**layer.state_dict(), "weight": moved()}, assign=True)
    with torch.inference_mode():
        assert torch.equal(product(x), expected)
    assert layer.weight.data_ptr() % INT8_ALIGNMENT == 0
    layer.weight.zero_()
    assert not product(x).any()
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    layer.weight = moved()
    assert torch.equal(Int8Product(layer, nn.Parameter(random(1)))(odd), product(x))
