"""Tests of ``python -m bench quantization``: the schemes, their bytes, and the figures made of a model's results."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from bench.quality import quantization
from bench.quality.errors import History
from bench.quality.quantization import Text, decoded, plain, rows_free
from bench.quality.schemes import (
    FP8,
    FP8_BY_TENSOR,
    INT4,
    INT8,
    PLAIN,
    Scheme,
    by_rows,
    by_tensor,
    clipped,
    dequantize,
    dequantized,
    int4_by_groups,
    schemes,
)
from bench.static.work import dram_bytes, frame, public, public_model
from voxkern.checkpoint import read_checkpoint
from voxkern.reference.config import END_AUDIO
from voxkern.reference.quantized import FORMATS, QuantizedLinear, quantizable
from voxkern.tts import DEMO


def layer(seed: int = 0, rows: int = 40, columns: int = 64) -> nn.Linear:
    """Return a linear layer with one large number in each row."""
    new = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    new.weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    new.weight[:, 3] *= 6
    return new


def loss(linear: nn.Linear, new: nn.Module, importance: torch.Tensor | float = 1.0) -> float:
    assert isinstance(new, QuantizedLinear)
    return float(((dequantized(new) - linear.weight).square() * importance).sum())


def test_one_scale_for_a_tensor() -> None:
    linear = layer()
    new = by_tensor(linear, None, FORMATS["fp8"])
    assert set(new.qscale_weight.tolist()) == {float(linear.weight.abs().max() / 448)}
    assert loss(linear, new) > loss(linear, by_rows(linear, None, FORMATS["fp8"]))


def test_clipping_lessens_the_error_that_it_is_given() -> None:
    """If the column with the largest numbers has small inputs, clipping it leaves smaller steps for the others."""
    linear, importance = layer(), torch.ones(64)
    importance[3] = 1e-6
    usual = by_rows(linear, None, FORMATS["int8"])
    even, fitted = (clipped(linear, one, FORMATS["int8"]) for one in (None, importance))
    assert loss(linear, even) <= loss(linear, usual)
    assert loss(linear, fitted, importance) < 0.5 * loss(linear, even, importance)


def test_4_bits_have_15_numbers_in_each_group() -> None:
    linear = layer()
    new = int4_by_groups(linear, None)
    groups = new.weight.unflatten(1, (-1, 32))
    steps = groups / (linear.weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 7).half().float()
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.abs().max() <= 7.001


def test_the_bytes_of_int8_are_those_of_the_frame() -> None:
    """The formula agrees with the launches of a quantised frame within a ten-thousandth."""
    model = public_model()
    _, less = INT8.saved(model, 7)
    whole, int8 = (
        dram_bytes([one for part in frame(1, 7, format_=f).values() for one in part]) for f in (None, "int8")
    )
    assert whole - less == pytest.approx(int8, rel=1e-4)
    assert PLAIN.saved(model, 7) == (0, 0)
    assert FP8_BY_TENSOR.saved(model, 7) > FP8.saved(model, 7)
    assert INT4.saved(model, 7) > FP8.saved(model, 7)


def test_parts_make_up_the_whole() -> None:
    """Backbone, flow head and semantic head are all large weights, and so are attention, feed-forward and that head."""
    config, model = public(), public_model()
    by_name = {one.name: one for one in schemes(config.acoustic_transformer.n_layers, config.backbone.n_layers)}
    names = quantizable(model)

    def taken(*parts: str) -> list[str]:
        return sorted(name for part in parts for name in names if by_name[f"int8, {part}"].takes(name))

    head = [f"flow head layer {i}" for i in range(3)]
    for parts in (
        ("backbone", "semantic head", "flow head"),
        ("backbone", "semantic head", *head),
        ("attention", "feed-forward", "semantic head"),
    ):
        assert taken(*parts) == sorted(names)
    for kept, layers in (("but the first layers", (0, 0)), ("but the last layers", (25, 2))):
        left = set(names) - set(taken(kept))
        prefixes = {f"layers.{layers[0]}.", f"acoustic_transformer.layers.{layers[1]}."}
        assert left == {name for name in names if any(name.startswith(prefix) for prefix in prefixes)}


def test_a_scheme_replaces_the_layers_that_it_takes() -> None:
    model = read_checkpoint(DEMO).model
    part = Scheme("one", functools.partial(by_rows, format_=FORMATS["int8"]), lambda _: 8, r"layers\.1\..*")
    part.apply(model, {})
    found = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == {name for name in quantizable(read_checkpoint(DEMO).model) if name.startswith("layers.1.")}


def test_dequantised_layers_hold_the_numbers_of_the_8_bit_ones() -> None:
    model = nn.Sequential(
        by_rows(layer(), None, FORMATS["int8"]), nn.Sequential(by_rows(layer(1, 7, 40), None, FORMATS["fp8"]))
    )
    numbers = [dequantized(one) for one in model.modules() if isinstance(one, QuantizedLinear)]
    dequantize(model)
    assert not any(isinstance(one, QuantizedLinear) for one in model.modules())
    for weight, number in zip(model.parameters(), numbers, strict=True):
        assert torch.equal(weight, number)


def test_frames_that_end_are_not_decoded() -> None:
    """A frame that is END in the truth is left out, and one that is END in the result alone is the truth's."""
    codes = torch.full((6, 37), 5)
    codes[5, 0] = END_AUDIO
    history = History("a", "slt", 0, codes[:5])
    tts = plain(torch.float32)
    right = decoded(tts, [history], codes, codes)
    assert len(right) == 5 * 1920
    ended = codes.clone()
    ended[2, 0] = END_AUDIO
    assert torch.equal(decoded(tts, [history], ended, codes), right)


def test_figures_of_free_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "texts", lambda: ["one two", "three"])
    usual, mine = [Text(2, 20, True), Text(1, 10, True)], [Text(1, 20, True), Text(1, 15, False)]
    rows = rows_free("int8", "euler:7", torch.float32, mine, usual)
    found = {row.metric: row.value for row in rows}
    assert found["words recognised"] == pytest.approx(100 * 2 / 3)
    assert found["ended by itself"] == 50
    assert found["texts of another length"] == 50
    assert found["mean length"] == np.mean([1, 1.5])
    assert found["greatest length"] == 1.5
    assert {(row.dtype, row.steps, row.shape) for row in rows} == {("fp32", "euler:7", "free, 2 texts")}


@pytest.mark.slow
@pytest.mark.interpreter("the kernels' results are measured in the interpreter")
def test_given_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 flips few codes, fp8 more and int4 most, and the kernels agree with PyTorch."""
    monkeypatch.setattr(quantization, "TEXTS", quantization.TEXTS[:2])
    rows = {(row.subject, row.provider, row.metric): row.value for row in quantization.given()}
    rmse = {name: rows[name, "torch", "RMSE of latents"] for name in ("bf16", "int8", "fp8", INT4.name)}
    assert rmse["bf16"] < rmse["int8"] < rmse["fp8"] < rmse[INT4.name]
    assert rows["bf16", "voxkern", "RMSE of latents"] == pytest.approx(rmse["bf16"], rel=0.5)
