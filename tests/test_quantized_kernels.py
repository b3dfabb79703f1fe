"""Tests of kernels on 8-bit weights: widening, accuracy, whole models, servers' heads, and errors."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checks import assert_accurate, with_reference_codec
from test_server_heads import SGLangHead, seeded, server  # noqa: F401 - a fixture
from torch import Tensor, nn

import voxkern
from bench.ops.registry import TensorMaker, entries
from voxkern.checkpoint import quantize_checkpoint, read_checkpoint
from voxkern.integrations import vllm_plugin
from voxkern.kernels.linear import linear
from voxkern.kernels.moe_experts import moe_experts_down
from voxkern.kernels.norm_linear import norm_swiglu
from voxkern.kernels.qkv import norm_qkv
from voxkern.kernels.quantized import stored, widen
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint
from voxkern.reference.quantized import FORMATS, QuantizedLinear, quantizable, quantize_linears

QUANTIZED = [entry for entry in entries() if "int8" in entry.cases[0].dtypes]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@triton.jit
def _widen_kernel(p_q, p_out):
    o = tl.arange(0, 256)
    tl.store(p_out + o, widen(tl.load(p_q + o), p_out.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_each_8_bit_number_is_widened_exactly(format_: str, dtype: str, device: torch.device) -> None:
    q = torch.arange(256, dtype=torch.uint8).view(FORMATS[format_].dtype).to(device)
    out = torch.empty(256, dtype=DTYPES[dtype], device=device)
    _widen_kernel[(1,)](stored(q), out)
    exact = q.float()
    is_number = exact.isfinite()  # e4m3 has two NaNs
    assert is_number.sum() == (256 if format_ == "int8" else 254)
    assert torch.equal(out.float()[is_number], exact[is_number])
    assert torch.equal(out.signbit()[is_number], exact.signbit()[is_number])


@pytest.mark.parametrize(("format_", "dtype"), [("int8", "fp16"), ("fp8", "fp32")])
@pytest.mark.parametrize("entry", QUANTIZED, ids=lambda entry: entry.name)
def test_right_with_other_activations(entry, dtype: str, format_: str, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    if entry.name == "token_attention_linear" and dtype == "fp32":
        pytest.skip("the operator takes no fp32")
    make = TensorMaker(DTYPES[dtype], str(device), weights=FORMATS[format_])
    assert_accurate(entry, entry.cases[0], dtype, device=device, make=make)


def test_sums_that_are_not_scaled_may_exceed_fp16(device: torch.device) -> None:
    """Each unscaled sum is 64 * 127 * 100 = 812,800, and the result is a hundredth of it."""
    q = torch.full((40, 64), 127, dtype=torch.int8, device=device)
    scale = torch.full((40,), 0.01, device=device)
    x = torch.full((3, 64), 100.0, dtype=torch.float16, device=device)
    y = linear(x, q, None, None, None, 3, scale=scale)
    assert torch.equal(y, torch.full_like(y, 8128.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write tiny fp32 checkpoints, without experts and with them, and return their folders."""
    path, fp32 = tmp_path_factory.mktemp("quantized"), torch.float32
    return {
        "dense": make_checkpoint(path / "dense", dtype=fp32),
        "experts": make_checkpoint(path / "experts", dtype=fp32, overrides={"moe": TINY_MOE}),
    }


@pytest.mark.parametrize(("kind", "format_"), [("dense", "int8"), ("experts", "fp8")])
def test_kernels_generate_the_codes_of_the_reference(
    folders: dict[str, Path], kind: str, format_: str, device: torch.device
) -> None:
    arguments = {"text": ["a", "hello"], "voice": ["ada", "bob"], "seed": [1, 2], "max_frames": [3, 4]}
    mine, theirs = (
        voxkern.load(folders[kind], device=device, backend=backend, max_batch=2, quantize=format_)
        for backend in ("triton", "torch")
    )
    expected = theirs.generate(**arguments, steps=2)
    for one, other in zip(with_reference_codec(mine).generate(**arguments, steps=2), expected, strict=True):
        assert np.array_equal(one.codes, other.codes)
    alone = mine.generate("a", voice="ada", seed=1, max_frames=3, steps=2)
    assert np.array_equal(alone.codes, expected[0].codes)
    plain = voxkern.load(folders[kind], device=device, backend="torch", max_batch=2).generate(**arguments, steps=2)
    assert any(not np.array_equal(one.codes, other.codes) for one, other in zip(plain, expected, strict=True))


def test_a_quantized_checkpoint_loads_onto_kernels(
    folders: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    quantize_checkpoint(folders["dense"], tmp_path / "q", "int8")
    mine, other = (
        voxkern.load(source, device=device, backend="triton", quantize=quantize, dtype="bfloat16")
        for source, quantize in ((tmp_path / "q", None), (folders["dense"], "int8"))
    )
    codes = [with_reference_codec(tts).generate("a", seed=1, max_frames=2, steps=2).codes for tts in (mine, other)]
    assert np.array_equal(*codes)


@torch.inference_mode()
def test_alone_equals_batched(folders: dict[str, Path], device: torch.device) -> None:
    """In bf16, the backbone's states and the head's codes of a request have the same bits alone and in a batch."""
    model = read_checkpoint(folders["dense"], torch.bfloat16, device, quantize="int8").model
    voxkern.accelerate(model, 5)
    g = torch.Generator().manual_seed(0)
    u, h, noise = (torch.randn(5, n, generator=g).to(device) for n in (64, 64, 36))
    u, h, alpha = u.bfloat16(), h.bfloat16(), torch.full((5,), 1.2, device=device)
    states = model.hidden_states(u[:, None])
    codes = model.acoustic_transformer(h, alpha, noise, 2)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.equal(model.hidden_states(u[one, None]), states[one])
        assert torch.equal(model.acoustic_transformer(h[one], alpha[one], noise[one], 2), codes[one])


@torch.no_grad()
def test_only_some_layers_in_8_bits(folders: dict[str, Path], device: torch.device) -> None:
    """Each layer of the head may have its own format; a written scale changes the step tables too."""
    head = read_checkpoint(folders["dense"], device=device).model.acoustic_transformer
    linears = quantizable(head)
    for layer, format_ in ((1, "int8"), (2, "fp8")):
        quantize_linears(head, {n: one for n, one in linears.items() if f"layers.{layer}." in n}, FORMATS[format_])
    exact = copy.deepcopy(head)
    voxkern.accelerate(head, 2)
    g = torch.Generator().manual_seed(0)
    h, noise = torch.randn(2, 64, generator=g).to(device), torch.randn(2, 36, generator=g).to(device)
    args = h, torch.full((2,), 1.2, device=device), noise, 2
    torch.testing.assert_close(head.solve(*args), exact.solve(*args), rtol=1e-4, atol=1e-4)
    first = {n: one for n, one in linears.items() if "layers.0." in n}
    for one in (head, exact):
        quantize_linears(one, first, FORMATS["int8"])
    voxkern.accelerate(head, 2)
    torch.testing.assert_close(head.solve(*args), exact.solve(*args), rtol=1e-4, atol=1e-4)
    for one in (head, exact):
        one.layers[0].attention.wq.qscale_weight.mul_(-3)
    torch.testing.assert_close(head.solve(*args), exact.solve(*args), rtol=1e-4, atol=1e-4)


def test_copies_of_a_servers_weights(server: SGLangHead, device: torch.device) -> None:  # noqa: F811
    """The head keeps its own weights, and accelerating again quantises the weights of that time."""
    h = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(device)
    before, state = seeded(server, h), copy.deepcopy(server.state_dict())
    voxkern.accelerate(server, 2, quantize="int8")
    fused = server.forward.__self__
    assert sum(isinstance(one, QuantizedLinear) for one in fused.module.modules()) == 7 * len(server.layers) + 1
    mine = seeded(server, h)
    assert not torch.equal(mine, before)
    for name, tensor in server.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    reference = copy.deepcopy(fused.module)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = reference(h, torch.full((2,), 1.2, device=device), torch.randn(2, 36).to(device), 2)
    assert int((mine != expected).sum()) <= 1  # codes at a rounding edge may differ
    addresses = [one.weight.data_ptr() for one in fused.module.modules() if isinstance(one, QuantizedLinear)]
    for p in server.parameters():
        p.data.mul_(-1.5)
    with torch.inference_mode():
        voxkern.accelerate(server, 2, quantize="int8")
    assert server.forward.__self__ is fused
    assert addresses == [one.weight.data_ptr() for one in fused.module.modules() if isinstance(one, QuantizedLinear)]
    assert not torch.equal(seeded(server, h), mine)
    voxkern.accelerate(server, 2)
    plain = seeded(server, h)
    voxkern.restore(server)
    assert int((seeded(server, h) != plain).sum()) <= 1


def test_the_plugin_quantises_if_it_is_told_to(
    server: SGLangHead,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.ModuleDict({"acoustic_transformer": server})
    for value, quantize in (("0", None), ("int8", "int8")):
        monkeypatch.setenv("VOXKERN_VLLM_QUANTIZE", value)
        with caplog.at_level(logging.INFO, "vllm"):
            vllm_plugin._accelerate_head(model)
        assert server.forward.__self__.quantize == quantize
    assert caplog.messages[-1].endswith("with copies of its large weights in int8")
    monkeypatch.setenv("VOXKERN_VLLM_QUANTIZE", "int4")
    with pytest.raises(ValueError, match="quantize must be one of int8, fp8, got 'int4'"):
        vllm_plugin._accelerate_head(model)


def test_what_cannot_be_quantised_is_named(folders: dict[str, Path], server: SGLangHead) -> None:  # noqa: F811
    model = read_checkpoint(folders["experts"]).model
    with pytest.raises(ValueError, match=r"quantize is 'int8', but the model is voxkern's own: use load"):
        voxkern.accelerate(model, quantize="int8")
    linears = quantizable(model)
    for name, part in (
        ("layers.0.attention", "layers.0.attention.wk"),
        ("layers.0.feed_forward", "layers.0.feed_forward.w3"),
        ("layers.1", "layers.1.shared_experts.w2"),
    ):
        mixed = copy.deepcopy(model)
        quantize_linears(mixed, {part: linears[part]}, FORMATS["int8"])
        with pytest.raises(ValueError, match=f"{name} has weights in torch.float32 and torch.int8, which one kernel"):
            voxkern.accelerate(mixed)
    wq = server.layers["0"].attention.wq
    server.layers["0"].attention.wq = type("Other", (nn.Linear,), {})(wq.in_features, wq.out_features, bias=False)
    with pytest.raises(ValueError, match=r"is not supported: quantize needs layers that are torch.nn.Linear"):
        voxkern.accelerate(server, quantize="int8")


def _weight(dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.ones(40, 64, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: linear(x, _weight(), None, None, None, 3), TypeError, r"weight is torch.int8 but has no scales"),
        (
            lambda x: linear(x, _weight(x.dtype), None, None, None, 3, scale=torch.ones(40)),
            TypeError,
            r"weight has scales but is torch.float32: it must be torch.int8 or torch.float8_e4m3fn",
        ),
        (
            lambda x: linear(x, _weight(), None, None, None, 3, scale=torch.ones(41)),
            ValueError,
            r"the scale of weight is \[41\] but must be \[40\]",
        ),
        (
            lambda x: linear(x, _weight(), None, None, None, 3, scale=torch.ones(40).half()),
            TypeError,
            r"the scale of weight is torch.float16 but must be torch.float32",
        ),
        (
            lambda x: norm_swiglu(
                x, x[0], _weight(), _weight(torch.float8_e4m3fn), 1e-5, 3, "decode", *[torch.ones(40)] * 2
            ),
            TypeError,
            r"w3 is torch.float8_e4m3fn but must be torch.int8, like w1",
        ),
        (
            lambda x: norm_qkv(x, x[0], _weight(), _weight(), _weight(), 1e-5, 3, 3, scale_q=torch.ones(40)),
            TypeError,
            r"wk is torch.int8 but has no scales",
        ),
        (
            lambda x: moe_experts_down(
                x, [_weight()], torch.ones(3, 1), torch.zeros(3).int(), torch.zeros(1, 3).int(), 8, torch.ones(2, 40)
            ),
            ValueError,
            r"the scale of w2 is \[2, 40\] but must be \[1, 40\]",
        ),
    ],
)
def test_arguments_that_do_not_fit(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.ones(3, 64))
