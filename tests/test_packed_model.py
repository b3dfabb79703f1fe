"""Tests of models with packed weights: accuracy of latents and codes, saving, loading, and undoing."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_process import run_python
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import voxkern
from bench.ops.accuracy import CEILINGS, judge
from voxkern.checkpoint import quantize_checkpoint, read_checkpoint, read_params
from voxkern.engine.kv_cache import PAGE_SIZE
from voxkern.fused.transformer_head import FusedTransformerHead
from voxkern.packed.backbone import PackedBackbone
from voxkern.packed.flow_head import PackedHead
from voxkern.packed.linear import Int8Product, PackedLinear
from voxkern.packed.model import is_packed, pack, unpack
from voxkern.packed.weights import PlainWeight
from voxkern.random_checkpoint import TINY_MOE, random_tensor, tiny_params
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.attention import PagedCache
from voxkern.reference.config import END_AUDIO
from voxkern.reference.model import make_head
from voxkern.reference.quantized import FORMATS

pytestmark = pytest.mark.interpreter("packed weights are for a CPU")
ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(voxkern.__file__).with_name("demo")


@pytest.fixture
def model(tiny_folder: Path) -> VoxtralTTS:
    """Return a bf16 model that the test may change."""
    return read_checkpoint(tiny_folder, torch.bfloat16, "cpu").model


@pytest.fixture
def outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def inputs(model: VoxtralTTS, B: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [B, dim], guidance [B] with 1 and 0 among them, and noise [B, 36]."""
    g = torch.Generator().manual_seed(seed)
    alpha = torch.tensor([1.2, 1.0, 0.0, 2.5]).repeat(-(-B // 4))[:B]
    h = torch.randn(B, model.config.acoustic_transformer.input_dim, generator=g)
    return h.to(model.norm.weight.dtype), alpha, torch.randn(B, 36, generator=g)


def assert_right(latents: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Check fp32 latents with the ceiling of `dtype`, because hidden states and t tokens are rounded to it."""
    verdict = replace(judge(latents, plain, exact), ceiling=CEILINGS[dtype])
    assert verdict.right, verdict


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("source", ["tiny", "demo"])
@pytest.mark.parametrize(
    ("B", "steps", "solver"), [(1, 7, "euler"), (3, 1, "euler"), (5, 16, "euler"), (1, 4, "ab2"), (4, 5, "ab2")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32])
def test_frames_are_those_of_the_reference(
    tiny_folder: Path, source: str, B: int, steps: int, solver: str, dtype: torch.dtype
) -> None:
    """Latents are as accurate as the reference's, and codes differ from fp64's only at rounding edges."""
    model = read_checkpoint(DEMO if source == "demo" else tiny_folder, dtype, "cpu").model
    head, (h, alpha, x) = model.acoustic_transformer, inputs(model, B, seed=B)
    with torch.inference_mode():
        expected, plain = head(h, alpha, x, steps, solver), head.solve(h, alpha, x, steps, solver)
        exact = copy.deepcopy(head).double().solve(h.double(), alpha.double(), x.double(), steps, solver)
        pack(model)
        codes, latents = head(h, alpha, x, steps, solver), head.solve(h, alpha, x, steps, solver)
    assert_right(latents, plain, exact, dtype)
    assert torch.equal(codes[:, 0], expected[:, 0])
    levels = (exact.clamp(-1, 1) + 1) * 10
    at_edge = (levels - levels.floor() - 0.5).abs() < (1e-4 if dtype == torch.float32 else 0.03)
    speaks = codes[:, :1] != END_AUDIO  # an end frame has no acoustic codes
    wrong = (codes[:, 1:] - 2 != levels.round()) & speaks
    assert not bool((wrong & ~at_edge).any())
    assert at_edge.float().mean() < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("B", [1, 4])
def test_a_frame_of_the_public_head(B: int) -> None:
    from bench.micro.modules import head_args, public_head

    head = public_head("bf16", "cpu")
    args = head_args(head, B) | {"steps": 4}
    with torch.inference_mode():
        plain = head.solve(**args)
        exact = (
            copy.deepcopy(head)
            .double()
            .solve(**{k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()})
        )
        assert len(pack(head)) == (7 + 2) * 3 + 4 + 1 + 1  # linear layers but the time projection, norms, and solve
        latents = head.solve(**args)
    assert_right(latents, plain, exact, torch.bfloat16)


def test_an_mlp_head(mlp_folder: Path) -> None:
    model = read_checkpoint(mlp_folder, torch.bfloat16, "cpu").model
    head, (h, alpha, x) = model.acoustic_transformer, inputs(model, 3)
    with torch.inference_mode():
        plain = head.solve(h, alpha, x, 4)
        exact = copy.deepcopy(head).double().solve(h.double(), alpha.double(), x.double(), 4)
        names = pack(model)
        assert "acoustic_transformer.res_blocks.0.adaLN_modulation.1" in names
        assert "solve" not in vars(head)
        assert_right(head.solve(h, alpha, x, 4), plain, exact, torch.bfloat16)


def test_a_head_of_one_layer() -> None:
    params = copy.deepcopy(read_params(DEMO))
    params["multimodal"]["audio_model_args"]["acoustic_transformer_args"]["n_layers"] = 1
    config = Config.from_params(params)
    head = make_head(config.acoustic_transformer, config.audio).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    head.load_state_dict({name: random_tensor(name, t.shape, g) for name, t in head.state_dict().items()})
    h, alpha, x = torch.randn(2, 192, generator=g), torch.tensor([1.2, 3.0]), torch.randn(2, 36, generator=g)
    expected = head.solve(h, alpha, x, 3)
    pack(head)
    torch.testing.assert_close(head.solve(h, alpha, x, 3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("outside_the_interpreter")
@pytest.mark.parametrize("trained", [False, True])
def test_accelerate_and_restore(model: VoxtralTTS, trained: bool, caplog: pytest.LogCaptureFixture) -> None:
    model.requires_grad_(trained)
    before, names = bits_of(model), [name for name, _ in model.named_parameters()]
    args, tree = inputs(model, 2), repr(model)
    with torch.inference_mode():
        expected = model.acoustic_transformer.solve(*args, 3)
    replaced = voxkern.accelerate(model)
    assert {"layers.0.attention.wq", "acoustic_transformer.semantic_codebook_output"} < set(replaced)
    assert "acoustic_transformer.solve" in replaced
    assert is_packed(model)
    assert bits_of(model) == before
    with torch.inference_mode():
        packed = model.acoustic_transformer.solve(*args, 3)
        assert not torch.equal(packed, expected)
        assert voxkern.accelerate(model) == ["acoustic_transformer.solve"]
        assert torch.equal(model.acoustic_transformer.solve(*args, 3), packed)
    assert sorted(voxkern.restore(model)) == sorted(replaced)
    assert not is_packed(model)
    assert bits_of(model) == before
    assert repr(model) == tree
    assert [name for name, _ in model.named_parameters()] == names
    assert {p.requires_grad for p in model.parameters()} == {trained}
    with torch.inference_mode():
        assert torch.equal(model.acoustic_transformer.solve(*args, 3), expected)
    assert voxkern.restore(model) == []


@pytest.mark.usefixtures("outside_the_interpreter")
def test_a_model_without_a_transformer_head(mlp_folder: Path) -> None:
    model = read_checkpoint(mlp_folder, torch.bfloat16, "cpu").model
    first = voxkern.accelerate(model)
    assert voxkern.accelerate(model) == []  # nothing is left to pack, and the model is packed
    assert sorted(voxkern.restore(model)) == sorted(first)


@pytest.mark.usefixtures("outside_the_interpreter")
def test_only_voxkerns_own_modules_are_packed(model: VoxtralTTS) -> None:
    wrapper = nn.ModuleDict({"theirs": nn.Linear(64, 64, dtype=torch.bfloat16), "head": model.acoustic_transformer})
    wrapper["codec"] = model.audio_tokenizer
    replaced = voxkern.accelerate(wrapper)
    assert type(wrapper["theirs"]) is nn.Linear
    assert {name.partition(".")[0] for name in replaced} == {"head", "codec"}
    assert "head.solve" in replaced
    assert sorted(voxkern.restore(wrapper)) == sorted(replaced)


def test_gradients_are_refused_and_tables_hold_none(tiny_folder: Path) -> None:
    model = read_checkpoint(tiny_folder, torch.float32, "cpu").model.requires_grad_(True)
    head, args = model.acoustic_transformer, inputs(model, 1)
    pack(model)  # fp32 layers stay plain, so only the head can refuse
    with pytest.raises(RuntimeError, match="flow head computes no gradients"):
        head.solve(*args, 2)
    backbone = read_checkpoint(tiny_folder, torch.bfloat16, "cpu").model
    pack(backbone)
    backbone.norm.weight.requires_grad_(True)  # no packed layer requires one, so the backbone itself refuses
    with pytest.raises(RuntimeError, match="backbone computes no gradients"):
        backbone.hidden_states(torch.zeros(1, 2, backbone.config.backbone.dim, dtype=torch.bfloat16))
    with torch.inference_mode():
        expected = head.solve(*args, 2)
    with torch.no_grad():
        assert torch.equal(head.solve(*args, 2), expected)  # with the table made in inference mode
    assert not copy.deepcopy(head).solve.__self__._time_tables["euler", 3][1].requires_grad


@pytest.mark.parametrize("params", [{}, {"moe": TINY_MOE}], ids=["dense", "experts"])
def test_a_backbone(params: dict[str, Any]) -> None:
    """With fp32 activations a backbone is more exact than the reference, over whole sequences and in a KV cache."""
    config = Config.from_params(tiny_params() | params)
    model = VoxtralTTS(config).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    model.load_state_dict({name: random_tensor(name, t.shape, g) for name, t in model.state_dict().items()})
    model, exact_model = model.bfloat16(), copy.deepcopy(model).bfloat16().double()
    u = torch.randn(3, 5, config.backbone.dim, generator=g).bfloat16()

    def states(model: VoxtralTTS) -> list[Tensor]:
        """Return the hidden states of whole sequences, and of the same tokens with a KV cache, 3 and then 2."""
        x = u.to(model.norm.weight.dtype)
        sizes = (3, 2, config.backbone.n_kv_heads, PAGE_SIZE, config.backbone.head_dim)
        kv = torch.full((config.backbone.n_layers, *sizes), float("nan"), dtype=x.dtype)
        table = torch.tensor([[2], [0], [1]], dtype=torch.int32)
        first, then = (PagedCache(kv, table, torch.tensor([n, 0, n])) for n in (3, 5))
        in_cache = torch.cat((model.hidden_states(x[:, :3], first), model.hidden_states(x[:, 3:], then)), dim=1)
        return [model.hidden_states(x), in_cache[::2]]  # the middle row has no request

    with torch.inference_mode():
        plain, exact = states(model), states(exact_model)
        names = pack(model)
        packed = states(model)
        copied = copy.deepcopy(model)
        assert copied.hidden_states.module is copied
        assert all(map(torch.equal, states(copied), packed))
        assert "hidden_states" not in pack(model)
        restored = unpack(model)
        assert all(map(torch.equal, states(model), plain))
        copied.double()
        for mine, right in zip(states(copied), exact, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    assert "hidden_states" in names
    assert sorted(restored) == sorted(names)
    assert any(".experts.0.w1" in name for name in names) == bool(params)
    assert not any(name.endswith(".gate") for name in names)
    for mine, theirs, right in zip(packed, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        mine, theirs = ((one.double() - right).square().mean().sqrt() for one in (mine, theirs))
        assert mine <= 0.9 * theirs
        assert theirs < 0.05 * right.square().mean().sqrt()


def test_kernels_and_packed_weights_take_each_others_place(model: VoxtralTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    before, args = bits_of(model), inputs(model, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    voxkern.accelerate(model)
    with torch.inference_mode():
        packed = model.acoustic_transformer.solve(*args, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    voxkern.accelerate(model)
    with torch.inference_mode():
        fused = model.acoustic_transformer.solve(*args, 1)
        assert not torch.equal(fused, packed)
        torch.testing.assert_close(fused, packed, rtol=0.02, atol=0.05)
    assert not is_packed(model)
    assert isinstance(model.acoustic_transformer.forward, FusedTransformerHead)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    voxkern.accelerate(model)
    assert is_packed(model)
    with torch.inference_mode():
        assert torch.equal(model.acoustic_transformer.solve(*args, 1), packed)
    assert isinstance(model.hidden_states, PackedBackbone)
    assert "stream" not in vars(model.audio_tokenizer)
    assert bits_of(model) == before


@pytest.mark.usefixtures("outside_the_interpreter")
def test_what_cannot_be_accelerated(mlp_folder: Path) -> None:
    model = read_checkpoint(mlp_folder, torch.float32, "cpu").model
    with pytest.raises(ValueError, match="has no part that is faster on a CPU"):
        voxkern.accelerate(model)
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        voxkern.accelerate(model, 0)
    with pytest.raises(ValueError, match=r"use load\(\.\.\., quantize=\.\.\.\)"):
        voxkern.accelerate(model, quantize="int8")


def test_files_copies_and_new_weights(model: VoxtralTTS, tmp_path: Path) -> None:
    """A packed model is saved and copied with plain weights, and computes with weights that are loaded into it."""
    before, args = bits_of(model), inputs(model, 2)
    with torch.inference_mode():
        pack(model)
        expected = model.acoustic_transformer.solve(*args, 3)
        other_model = copy.deepcopy(model)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        model.load_state_dict({name: t * 2 if t.ndim == 2 else t for name, t in model.state_dict().items()})
        changed = model.acoustic_transformer.solve(*args, 3)  # the table of t tokens must follow
        unpack(model)
        pack(model)
        assert torch.equal(model.acoustic_transformer.solve(*args, 3), changed)
        assert not torch.equal(changed, expected)
        assert torch.equal(other_model.acoustic_transformer.solve(*args, 3), expected)
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert bits_of(model) == before
        assert torch.equal(model.acoustic_transformer.solve(*args, 3), expected)
        assert other_model.acoustic_transformer.solve.__self__.module is other_model.acoustic_transformer


def test_the_time_table_follows_each_of_its_weights(model: VoxtralTTS) -> None:
    head, args = model.acoustic_transformer, inputs(model, 1)
    first = head.layers[0]
    pack(model)
    with torch.inference_mode():
        seen = [head.solve(*args, 2)]
    for part in (head.time_projection, first.attention_norm, first.attention.wq, first.attention.wk):
        with torch.no_grad():
            part.load_state_dict({"weight": part.state_dict()["weight"] * 1.5})
        with torch.inference_mode():
            seen.append(head.solve(*args, 2))
            head.solve = PackedHead(head).solve
            assert torch.equal(head.solve(*args, 2), seen[-1])
        assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_cast_to_fp64_computes_in_fp64(quantize: str | None) -> None:
    model = read_checkpoint(DEMO, torch.bfloat16, "cpu", quantize).model
    h, alpha, x = inputs(model, 2)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double().acoustic_transformer.solve(h.double(), alpha.double(), x.double(), 3)
        pack(model)
        model.double()
        latents = model.acoustic_transformer.solve(h.double(), alpha.double(), x.double(), 3)
    torch.testing.assert_close(latents, exact, rtol=1e-12, atol=1e-12)
    assert {type(one.packed) for one in model.modules() if isinstance(one, PackedLinear)} == {PlainWeight}


def test_int8_weights() -> None:
    model = read_checkpoint(DEMO, torch.bfloat16, "cpu", "int8").model
    reference, (h, alpha, x) = copy.deepcopy(model), inputs(model, 2)
    before = bits_of(model)
    with torch.inference_mode():
        plain = reference.acoustic_transformer.solve(h, alpha, x, 4)
        exact = reference.double().acoustic_transformer.solve(h.double(), alpha.double(), x.double(), 4)
        pack(model)
        wq = model.acoustic_transformer.layers[1].attention.wq
        assert isinstance(wq.forward, Int8Product)
        assert_right(model.acoustic_transformer.solve(h, alpha, x, 4), plain, exact, torch.bfloat16)
        other_model = copy.deepcopy(model)
        assert other_model.acoustic_transformer.layers[1].attention.wq.forward.layer is not wq
        assert len(unpack(model)) == len(unpack(other_model)) > 60
        assert torch.equal(model.acoustic_transformer.solve(h, alpha, x, 4), plain)
    assert bits_of(model) == bits_of(other_model) == before
    for dtype, format_ in ((torch.float16, "int8"), (torch.bfloat16, "fp8")):  # fp16 would lose bits in bf16
        other = read_checkpoint(DEMO, dtype, "cpu", format_).model
        pack(other)
        assert "forward" not in vars(other.acoustic_transformer.layers[1].attention.wq)
        assert "layers.0.attention_norm" not in pack(other)
        assert "hidden_states" not in vars(other)  # a second call must not count the norms as packed layers


def test_a_restored_int8_model_uses_no_keys_of_the_packed_one() -> None:
    tts, fresh = (voxkern.load(device="cpu", quantize="int8", backend=one) for one in ("packed", "torch"))
    arguments = {"seed": 1, "steps": 1, "max_frames": 4}
    tts.generate("one", **arguments)
    voxkern.restore(tts.model)
    np.testing.assert_array_equal(tts.generate("one", **arguments).samples, fresh.generate("one", **arguments).samples)


@pytest.mark.parametrize("format_", list(FORMATS))
def test_a_file_with_8_bit_weights(format_: str, tmp_path: Path) -> None:
    """The weights of such a file lie at any address; the sound is that of a model quantised when it is loaded."""
    quantize_checkpoint(DEMO, tmp_path / "quantised", format_)
    arguments = {"seed": 1, "steps": 1, "max_frames": 4}
    tts = voxkern.load(tmp_path / "quantised", "cpu", backend="packed")
    expected = voxkern.load(device="cpu", backend="packed", quantize=format_).generate("one", **arguments)
    np.testing.assert_array_equal(tts.generate("one", **arguments).codes, expected.codes)


def test_the_same_seed_gives_the_same_sound(tiny_folder: Path) -> None:
    """A request gives the same sound alone, in a batch after a reset, and in a copy."""
    tts = voxkern.load(tiny_folder, "cpu", "bfloat16", backend="packed", max_batch=6)
    assert tts.backend == "packed"
    texts, arguments = ["one two", "three", "x" * 40, "yes", "five six"], {"steps": 2, "max_frames": 12}
    alone = [tts.generate(text, seed=i, **arguments) for i, text in enumerate(texts)]
    tts.reset()
    for other in (tts, copy.deepcopy(tts)):
        for one, batched in zip(alone, other.generate(texts, seed=list(range(5)), **arguments), strict=True):
            np.testing.assert_array_equal(one.codes, batched.codes)
            np.testing.assert_array_equal(one.samples, batched.samples)


def test_a_changed_backbone_weight_changes_the_cached_voice(tiny_folder: Path) -> None:
    tts = voxkern.load(tiny_folder, "cpu", "bfloat16", backend="packed")
    arguments = {"seed": 1, "steps": 1, "max_frames": 6}
    before = tts.generate("one", **arguments).codes
    wq = tts.model.layers[0].attention.wq
    wq.load_state_dict({"weight": wq.state_dict()["weight"] * -3})
    changed = tts.generate("one", **arguments).codes
    assert not np.array_equal(changed, before)
    tts.reset()  # drops the cached voice
    np.testing.assert_array_equal(tts.generate("one", **arguments).codes, changed)


def test_backends_of_a_cpu(tiny_folder: Path) -> None:
    code = """
import sys, voxkern
for backend in ("auto", "packed", "torch"):
    tts = voxkern.load(sys.argv[1], "cpu", "bfloat16", backend)
    print(tts.backend, len(voxkern.restore(tts.model)) > 0, tts.backend)
    voxkern.accelerate(tts.model)
    print(tts.backend)
"""
    expected = ["packed True torch", "packed", "packed True torch", "packed", "torch False torch", "packed"]
    assert run_python("-c", code, str(tiny_folder)).splitlines() == expected
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'packed' or 'torch', got 'cpu'"):
        voxkern.load(tiny_folder, backend="cpu")
    with pytest.raises(ValueError, match="backend is 'packed', which runs on a CPU, but device is 'cuda:0'"):
        voxkern.validation.resolve_backend("packed", torch.device("cuda:0"))


@pytest.mark.slow
def test_packed_weights_take_the_place_of_plain_ones() -> None:
    """After a public flow head of 790 MB is packed, the process has at most 1.05 x its memory before."""
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from bench.micro.modules import public_head
from voxkern.packed.model import pack

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

head = public_head("bf16", "cpu")
plain = resident()
pack(head)
print(plain, resident())
"""
    plain, packed = map(int, run_python("-c", code, str(ROOT)).split())
    assert plain > 9e8
    assert packed <= 1.05 * plain


@pytest.mark.slow
def test_the_memory_of_a_loaded_model(tmp_path: Path) -> None:
    """The process of a packed model has at most 1.05 x the memory of a plain one, with pages of the file counted."""
    voxkern.random_checkpoint.make_checkpoint(tmp_path / "model", full=True, overrides={"n_layers": 2})
    code = """
import resource, sys, voxkern
tts = voxkern.load(sys.argv[1], "cpu", backend=sys.argv[2], cache_tokens=640)
tts.generate("one", seed=1, max_frames=2)
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
"""
    plain, packed = (int(run_python("-c", code, str(tmp_path / "model"), backend)) for backend in ("torch", "packed"))
    assert plain > 2.4e9
    assert packed <= 1.05 * plain
