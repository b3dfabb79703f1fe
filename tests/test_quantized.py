"""Tests of 8-bit weights in the reference: rounding, the product, checkpoints, and errors that name what is wrong.

tests/test_quantized_kernels.py tests the kernels.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import CPU
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import voxkern
from voxkern.checkpoint import CheckpointError, quantize_checkpoint, read_checkpoint
from voxkern.cli import app
from voxkern.engine.runner import backbone_weights_version
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint, public_params
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.quantized import FORMATS, QuantizedLinear, quantizable, quantize_weight, replace_linears, widened

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
N, K = 515, 37  # odd, and more rows than are widened at a time


def _weight(seed: int = 0) -> Tensor:
    """Return a weight with rows of very different sizes, a row of zeros and a row of tiny numbers."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 3, N)[:, None]
    weight[3], weight[4] = 0, 1e-44
    return weight


def _layer(format_: str, weight: Tensor) -> QuantizedLinear:
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], FORMATS[format_])
    layer.weight, layer.qscale_weight = quantize_weight(weight, FORMATS[format_])
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_", FORMATS)
def test_each_number_is_the_nearest(format_: str, dtype: torch.dtype) -> None:
    """Among all numbers of the format, none is nearer to weight / scale."""
    weight = _weight().to(dtype)
    q, scale = quantize_weight(weight, FORMATS[format_])
    assert (q.dtype, scale.dtype, scale.shape) == (FORMATS[format_].dtype, torch.float32, (N,))
    numbers = torch.arange(-127, 128).float() if format_ == "int8" else E4M3[E4M3.isfinite()]
    exact = weight.float() / scale[:, None]
    nearest = (exact[..., None] - numbers).abs().amin(-1)
    assert torch.equal((exact - q.float()).abs(), nearest)
    largest = q.float().abs().amax(1)
    assert (largest[5:] == FORMATS[format_].largest).all()
    assert (q.float()[3] == 0).all()
    assert (scale > 0).all()


def test_ties_go_to_the_even_number() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    assert quantize_weight(weight, FORMATS["int8"])[0].tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    weight = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    assert quantize_weight(weight, FORMATS["fp8"])[0].float().tolist() == [[448, 16, 20, -16, 0, 2.0**-8]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_8_bit_number_is_widened_exactly(format_: str, dtype: torch.dtype) -> None:
    q = torch.arange(256, dtype=torch.uint8).view(FORMATS[format_].dtype).view(32, 8).T  # not contiguous
    torch.testing.assert_close(widened(q, dtype), q.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_dequantized_weight(format_: str, dtype: torch.dtype) -> None:
    """The sum is rounded to `dtype`, and so is its product with the scale; a sum's own error is that of its dtype."""
    layer = _layer(format_, torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5)
    x = torch.randn(K, 2, 3, generator=torch.Generator().manual_seed(2)).to(dtype).permute(1, 2, 0)  # not contiguous
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 3, N))
    exact = layer.weight.double() * layer.qscale_weight.double()[:, None]
    truth, absolute = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    rounding = 1.01 * torch.finfo(dtype).eps * truth.abs()
    summing = K * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * absolute
    assert ((y - truth).abs() <= rounding + summing).all()


@pytest.mark.parametrize("size", [1.0, 0.0625, 2.0**-14])
@pytest.mark.parametrize("format_", FORMATS)
def test_fp16_does_not_overflow(format_: str, size: float) -> None:
    """The sum over K of 8-bit numbers times x is beyond 65,504, but not the result."""
    layer, x = _layer(format_, torch.full((5, 1000), size)), torch.full((1, 1000), min(50.0 / size, 60_000.0))
    torch.testing.assert_close(layer(x.half()), torch.full((1, 5), 1000 * size * float(x[0, 0])).half())


@pytest.mark.parametrize("format_", FORMATS)
def test_a_cast_keeps_numbers_and_scales(format_: str) -> None:
    layer = _layer(format_, _weight())
    for cast in (copy.deepcopy(layer).double(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert torch.equal(cast.weight.view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(cast.qscale_weight, layer.qscale_weight)
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta"


def test_the_layers_that_are_quantized(tiny_folder: Path, mlp_folder: Path, tmp_path: Path) -> None:
    attention = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    of_a_layer = [*attention, *(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))]
    for folder, networks in ((tiny_folder, ["", "acoustic_transformer."]), (mlp_folder, [""])):
        model = read_checkpoint(folder).model
        layers = {prefix: len(model.get_submodule(f"{prefix}layers")) for prefix in networks}
        expected = {
            f"{prefix}layers.{i}.{name}" for prefix in networks for i in range(layers[prefix]) for name in of_a_layer
        }
        assert quantizable(model).keys() == expected | {"acoustic_transformer.semantic_codebook_output"}
    moe = read_checkpoint(make_checkpoint(tmp_path, overrides={"moe": TINY_MOE})).model
    i = next(i for i, layer in enumerate(moe.layers) if hasattr(layer, "gate"))
    found = {name.removeprefix(f"layers.{i}.") for name in quantizable(moe) if name.startswith(f"layers.{i}.")}
    experts = [f"experts.{e}" for e in range(TINY_MOE["num_experts"])] + ["shared_experts"]
    assert found == {*attention, *(f"{expert}.{name}" for expert in experts for name in ("w1", "w2", "w3"))}


def _codes(tts: voxkern.TTS) -> list[Any]:
    return [tts.generate("one", seed=seed, steps=2, max_frames=4).codes.tolist() for seed in (3, 4)]


@pytest.mark.parametrize("format_", FORMATS)
def test_quantized_on_loading_and_on_disk(tiny_folder: Path, tmp_path: Path, format_: str) -> None:
    tts = voxkern.load(tiny_folder, dtype="bfloat16", device=CPU, backend="torch", quantize=format_)
    written = make_checkpoint(tmp_path / "half", encoder=True)  # the weights of tiny_folder, in bf16
    quantize_checkpoint(written, tmp_path / "q", format_)
    again = voxkern.load(tmp_path / "q", device=CPU, backend="torch")
    assert again.model.config.quantization == format_
    assert again.voices.keys() == tts.voices.keys()
    for name, tensor in voxkern.load(written, device=CPU, backend="torch", quantize=format_).model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert _codes(again) == _codes(voxkern.load(written, device=CPU, backend="torch", quantize=format_))
    sizes = [(folder / "consolidated.safetensors").stat().st_size for folder in (written, tmp_path / "q")]
    linears = quantizable(read_checkpoint(written).model).values()
    saved = sum(linear.weight.numel() - 4 * linear.out_features for linear in linears)
    assert abs(sizes[0] - sizes[1] - saved) < 10_000  # the files' headers differ too
    linear = tts.model.layers[0].attention.wq
    plain = read_checkpoint(tiny_folder).model.layers[0].attention.wq.weight
    q, scale = quantize_weight(plain, FORMATS[format_])
    assert torch.equal(linear.weight.float(), q.float())
    assert torch.equal(linear.qscale_weight, scale)
    assert tts.model.config.quantization == format_


def _mistral_fp8(source: Path, folder: Path, per_row: bool) -> dict[str, Tensor]:
    """Write a checkpoint with FP8 weights as Mistral's are, and return the weights that it stands for, by name."""
    shutil.copytree(source, folder)
    state, exact = load_file(folder / "consolidated.safetensors"), {}
    for layer in quantizable(read_checkpoint(source).model):
        weight = state[f"{layer}.weight"]
        scale = (weight.abs().amax(1) if per_row else weight.abs().max()) / 448
        q = (weight / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        exact[f"{layer}.weight"] = q.float() * (scale[:, None] if per_row else scale)
        state |= {f"{layer}.weight": q, f"{layer}.qscale_weight": scale, f"{layer}.qscale_act": torch.tensor(0.5)}
    state["layers.0.attention.q_fake_quantizer.qscale_act"] = torch.tensor(0.25)
    save_file(state, folder / "consolidated.safetensors")
    params = json.loads((folder / "params.json").read_text())
    params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (folder / "params.json").write_text(json.dumps(params))
    return exact


@pytest.mark.parametrize("per_row", [False, True])
def test_a_checkpoint_in_mistrals_fp8_sounds_as_its_dequantized_one(
    tiny_folder: Path, tmp_path: Path, per_row: bool, caplog: pytest.LogCaptureFixture
) -> None:
    exact = _mistral_fp8(tiny_folder, tmp_path / "fp8", per_row)
    with caplog.at_level("WARNING", "voxkern"):
        quantized = voxkern.load(tmp_path / "fp8", device=CPU, backend="torch")
    assert f"{len(exact) + 1} scales of activations are not used" in caplog.text
    plain = voxkern.load(tiny_folder, device=CPU, backend="torch")
    plain.model.load_state_dict(plain.model.state_dict() | exact)
    mine, truth = (tts.generate("seven", seed=5, steps=2, max_frames=5) for tts in (quantized, plain))
    assert mine.codes.tolist() == truth.codes.tolist()
    assert _codes(plain) != _codes(voxkern.load(tiny_folder, device=CPU, backend="torch"))


def test_a_write_to_an_8_bit_weight_is_seen(tiny_folder: Path) -> None:
    model = voxkern.load(tiny_folder, device=CPU, backend="torch", quantize="int8").model
    before = backbone_weights_version(model)
    assert backbone_weights_version(model) == before
    model.layers[1].feed_forward.w2.weight.mul_(1)
    assert backbone_weights_version(model) != before


def _changed(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict, dict], None]:
    def edit(state: dict[str, Tensor], params: dict) -> None:
        new = change(state.pop(name))
        state.update({} if new is None else {name: new})

    return edit


WQ = "layers.0.attention.wq"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_changed(f"{WQ}.qscale_weight", lambda t: None), "but layers.0.attention.wq.qscale_weight is missing"),
        (_changed(f"{WQ}.qscale_weight", lambda t: t[:-1]), r"is \[63\] but must be \[\], \[1\], \[64\] or \[64, 1\]"),
        (_changed(f"{WQ}.qscale_weight", lambda t: t * 0), "has a scale that is zero, negative or not finite"),
        (_changed(f"{WQ}.qscale_weight", lambda t: -t), "has a scale that is zero, negative or not finite"),
        (_changed(f"{WQ}.qscale_weight", lambda t: t / 0), "has a scale that is zero, negative or not finite"),
        (_changed(f"{WQ}.weight", lambda t: t[1:]), r"wq.weight is \[63, 64\], but params.json requires \[64, 64\]"),
        (_changed(f"{WQ}.weight", lambda t: t.to(torch.int8)), "wq.weight is int8, but params.json has the quantiz"),
        (_changed(f"{WQ}.weight", lambda t: t.float()), f"{WQ}.qscale_weight is not a tensor of this model"),
        (_changed(f"{WQ}.weight", lambda t: (t.float() * torch.nan).to(t.dtype)), "wq.weight has a value that is NaN"),
        (_changed("norm.weight", lambda t: t.to(torch.int8)), "norm.weight is int8, but voxkern has no 8-bit form"),
        (lambda state, params: params.pop("quantization"), "is float8_e4m3fn, but params.json has no quantization"),
        (lambda state, params: params.update(quantization={"qformat_weight": "int8"}), "has the quantization int8"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(
    tiny_folder: Path, tmp_path: Path, edit: Callable[[dict, dict], None], named: str
) -> None:
    _mistral_fp8(tiny_folder, tmp_path / "fp8", per_row=True)
    weights, params_file = tmp_path / "fp8" / "consolidated.safetensors", tmp_path / "fp8" / "params.json"
    state, params = load_file(weights), json.loads(params_file.read_text())
    edit(state, params)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    params_file.write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(tmp_path / "fp8")


def test_scales_of_activations_without_a_quantization_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    state = load_file(folder / "consolidated.safetensors") | {f"{WQ}.qscale_act": torch.ones(())}
    save_file(state, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"wq\.qscale_act is not a tensor of this model"):
        read_checkpoint(folder)


def test_weights_beyond_fp32_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    state = load_file(folder / "consolidated.safetensors")
    state[f"{WQ}.weight"] = state[f"{WQ}.weight"].double() * 1e300
    save_file(state, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"wq\.weight has a value that is NaN, infinite or too large for float32"):
        read_checkpoint(folder, quantize="int8")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_that_is_not_finite_has_such_a_scale(format_: str, value: float) -> None:
    weight = _weight()
    weight[7, 5] = value
    finite = quantize_weight(weight, FORMATS[format_])[1].isfinite()
    assert not finite[7]
    assert finite.sum() == N - 1


def test_a_missing_tokenizer_is_named_before_the_work(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    (folder / "tekken.json").unlink()
    with pytest.raises(CheckpointError, match=r"tekken\.json"):
        quantize_checkpoint(folder, tmp_path / "q", "int8", lambda n: pytest.fail("a tensor was read"))


def test_the_public_model_takes_58_percent() -> None:
    def gigabytes(model: torch.nn.Module) -> float:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e9

    with torch.device("meta"):
        model = VoxtralTTS(Config.from_params(public_params())).bfloat16()
        plain = gigabytes(model)
        replace_linears(model, quantizable(model), FORMATS["int8"])
    assert (round(plain, 1), round(gigabytes(model), 1)) == (8.0, 4.6)
    assert gigabytes(model) < 0.58 * plain


def test_a_quantization_without_8_bit_tensors_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    params = json.loads((folder / "params.json").read_text()) | {"quantization": {"qformat_weight": "int8"}}
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=r"has the quantization int8, but no tensor has 8 bits"):
        read_checkpoint(folder)


def test_the_command_and_its_errors(tiny_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(arguments))
        return done.exit_code, done.output

    source, target = str(tiny_folder), str(tmp_path / "q")
    assert run("quantize", source, target, "--format", "fp8")[0] == 0
    code, text = run("info", target)
    assert (code, "float8_e4m3fn" in text) == (0, True)
    assert run("quantize", source, target) == (1, f"voxkern: {target}: is not an empty folder\n")
    twice = f"voxkern: quantize is 'int8', but the weights of {target} are in fp8 already\n"
    assert run("quantize", target, str(tmp_path / "twice")) == (1, twice)
    assert not (tmp_path / "twice").exists()
    wrong = "voxkern: quantize must be one of int8, fp8, got 'int4'\n"
    assert run("quantize", source, str(tmp_path / "w"), "--format", "int4") == (1, wrong)
    with pytest.raises(ValueError, match="quantize must be one of int8, fp8, got 'nf4'"):
        voxkern.load(tiny_folder, backend="torch", quantize="nf4")
