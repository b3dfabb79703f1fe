"""Tests of the fused flow heads: their codes are their modules', in the same bits in any batch, by launches alone."""

import copy
import io
from pathlib import Path

import pytest
import torch
from checks import with_reference_codec
from torch import Tensor

import voxkern
from bench.ops.accuracy import judge
from bench.static.counters import counting, launches_only
from voxkern.checkpoint import read_checkpoint
from voxkern.fused.flow_head import FusedHead
from voxkern.fused.mlp_head import FusedMLPHead
from voxkern.fused.transformer_head import FusedTransformerHead
from voxkern.random_checkpoint import make_checkpoint, tiny_params
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.config import END_AUDIO
from voxkern.reference.model import make_head
from voxkern.reference.noise import noise, seed_tensor

REPLACED = ["hidden_states", "acoustic_transformer", "audio_tokenizer.stream"]


@pytest.fixture(params=["transformer", "mlp"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, mlp_folder: Path) -> Path:
    """Return the folder of a checkpoint, one for each kind of flow head."""
    return mlp_folder if request.param == "mlp" else tiny_folder


@pytest.fixture
def model(folder: Path, device: torch.device) -> VoxtralTTS:
    """Return a model in fp32 that the test may change."""
    return read_checkpoint(folder, device=device).model


def fused_head_of(model: VoxtralTTS, max_batch: int) -> FusedHead:
    """Accelerate a model, and return the fused head that replaces its head's ``forward``."""
    voxkern.accelerate(model, max_batch)
    return model.acoustic_transformer.forward


def reached(model: VoxtralTTS) -> list[Tensor]:
    """Return the weights that a kernel gets as a list of tensors; `indirect` gives them to the counters."""
    return [p.detach() for name, p in model.named_parameters() if "adaLN_modulation" in name]


def inputs(model: VoxtralTTS, B: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [B, 64], cfg_alpha [B] (1 and 0 among them) and noise [B, 36], on the model's device."""
    g, weight = torch.Generator().manual_seed(seed), model.norm.weight
    alpha = torch.tensor([1.2, 1.0, 0.0, 2.5]).repeat(-(-B // 4))[:B]
    h, x = torch.randn(B, 64, generator=g).to(weight.dtype), torch.randn(B, 36, generator=g)
    return h.to(weight.device), alpha.to(weight.device), x.to(weight.device)


@pytest.mark.parametrize(
    ("B", "max_batch", "steps", "solver"),
    [
        (1, 1, 7, "euler"),
        (3, 4, 1, "euler"),
        pytest.param(2, 2, 4, "euler", marks=pytest.mark.slow),
        pytest.param(5, 5, 16, "euler", marks=pytest.mark.slow),
        (1, 1, 4, "ab2"),
        (3, 3, 5, "ab2"),
    ],
)
def test_a_fused_frame_equals_the_modules(model: VoxtralTTS, B: int, max_batch: int, steps: int, solver: str) -> None:
    """Codes differ from the module's only at rounding edges, and latents are as accurate as the module's.

    The embeddings are those of the codes.
    """
    head = model.acoustic_transformer
    h, alpha, x = inputs(model, B, seed=B)
    with torch.inference_mode():
        expected, plain = head(h, alpha, x, steps, solver), head.solve(h, alpha, x, steps, solver)
        exact = copy.deepcopy(head).double().solve(h.double(), alpha.double(), x.double(), steps, solver)
        assert voxkern.accelerate(model, max_batch) == REPLACED
        codes = head(h, alpha, x, steps, solver)
    scaled = (exact.clamp(-1, 1) + 1) * 10
    at_edge = (scaled - scaled.floor() - 0.5).abs() < 1e-4
    assert torch.equal(codes[:, 0], expected[:, 0])
    assert bool(((codes == expected)[:, 1:] | at_edge).all())
    assert int(at_edge.sum()) <= 2
    left = head.forward.buffers(B, h.dtype, h.device)
    verdict = judge(left.x, plain, exact)
    assert verdict.right, verdict
    torch.testing.assert_close(left.next_embedding, model.embed_codes(codes), rtol=1e-5, atol=1e-5)


def test_solve(model: VoxtralTTS) -> None:
    h, alpha, x = inputs(model, 2)
    head = model.acoustic_transformer
    with torch.inference_mode():
        expected = head.solve(h, alpha, x, 2, "ab2")
        fused = fused_head_of(model, 2)
        latents = head.solve(h, alpha, x, 2, "ab2")
        fused.generate_codes(h.flip(0), alpha, noise=x, steps=1)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)  # a copy, which the next frame does not change
    assert latents.abs().max() > 1


def test_end_frames(model: VoxtralTTS) -> None:
    h, alpha, x = inputs(model, 400, seed=3)
    with torch.inference_mode():
        ended = model.acoustic_transformer(h, alpha, x, 1)[:, 0] == END_AUDIO
        assert ended.any()
        h, alpha, x = (torch.cat((a[ended][:1], a[~ended][:2])) for a in (h, alpha, x))
        voxkern.accelerate(model, 3)
        codes = model.acoustic_transformer(h, alpha, x, 2)
    assert codes[0].tolist() == [END_AUDIO] + [2] * 36
    assert (codes[1:, 0] != END_AUDIO).all()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_alone_equals_batched(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A request gives the same bits alone and at any place in a batch, beside other requests or rows of zeros.

    Each request has its own seed and frame number.
    """
    model = read_checkpoint(folder, dtype, device).model
    fused = fused_head_of(model, 6)
    h, alpha, _ = inputs(model, 5)
    seed, frame = seed_tensor([1, 2**64 - 1, 3, 4, 5]).to(device), torch.tensor([0, 7, 2, 2048, 1], device=device)
    with torch.inference_mode():
        together = [part.clone() for part in fused.generate_codes(h, alpha, seed=seed, frame=frame, steps=3)]
        for i in (0, 2, 4):
            rows = slice(i, i + 1)
            alone = fused.generate_codes(h[rows], alpha[rows], seed=seed[rows], frame=frame[rows], steps=3)
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
        padded = torch.cat((torch.zeros_like(h[:1]), h[1:3]))
        some = fused.generate_codes(padded, alpha[:3], seed=seed[:3], frame=frame[:3], steps=3)
        assert all(torch.equal(a[1:], b[1:3]) for a, b in zip(some, together, strict=True))


@pytest.mark.slow
@pytest.mark.interpreter("the constants of all launches are recorded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_equals_batched_everywhere(folder: Path, dtype: torch.dtype) -> None:
    """A request gives the same bits alone, and at the first, middle and last place in batches of 2, 5, 16 and 33.

    All 7 steps run, and the launches of all batches have the same constants.
    """
    model = read_checkpoint(folder, dtype).model
    fused = fused_head_of(model, 33)
    h, alpha, _ = inputs(model, 33)
    seed, frame = seed_tensor(range(33)), torch.arange(33) * 3
    constants: dict[int, set[str]] = {}
    fused.generate_codes(
        h, alpha, seed=seed, frame=frame
    )  # the first frame makes the tables, with launches that later frames do not have

    def speak(rows: slice) -> list[Tensor]:
        with torch.inference_mode(), counting(whole=True, indirect=reached(model)) as launches:
            spoken = fused.generate_codes(h[rows], alpha[rows], seed=seed[rows], frame=frame[rows])
        used = {f"{launch.kernel} {sorted(launch.constants.items(), key=str)}" for launch in launches}
        constants[rows.stop - rows.start] = used
        return [part.clone() for part in spoken]

    for B in (2, 5, 16, 33):
        both = speak(slice(0, B))
        for i in (0, B // 2, B - 1):
            alone = speak(slice(i, i + 1))
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, both, strict=True))
    assert all(found == constants[1] for found in constants.values())


@pytest.mark.only_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_equals_batched_everywhere_on_a_gpu(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Each of 33 requests gives the same bits alone and in batches of 2, 5, 16 and 33, with all 7 steps."""
    model = read_checkpoint(folder, dtype, device).model
    fused = fused_head_of(model, 33)
    h, alpha, _ = inputs(model, 33)
    seed, frame = seed_tensor(range(33)).to(device), torch.arange(33, device=device) * 3

    def speak(rows: slice) -> list[Tensor]:
        with torch.inference_mode():
            spoken = fused.generate_codes(h[rows], alpha[rows], seed=seed[rows], frame=frame[rows])
        return [part.clone() for part in spoken]

    alone = [speak(slice(i, i + 1)) for i in range(33)]
    for B in (2, 5, 16, 33):
        together = speak(slice(0, B))
        for i in range(B):
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone[i], together, strict=True))


@pytest.mark.interpreter("launches are recorded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_is_launches_and_nothing_else(folder: Path, dtype: torch.dtype) -> None:
    model = read_checkpoint(folder, dtype).model
    fused = fused_head_of(model, 2)
    h, alpha, _ = inputs(model, 2)
    seed, frame = seed_tensor([1, 2]), torch.tensor([0, 0])
    with torch.inference_mode():
        expected = fused.generate_codes(h, alpha, seed=seed, frame=frame)[0].clone()
        with launches_only(indirect=reached(model)) as launches:
            codes, _ = fused.generate_codes(h, alpha, seed=seed, frame=frame)
    assert torch.equal(codes, expected)
    # The tiny heads have two layers. In bf16, attention is fused into the launch of q, k and v.
    layers = 2 * 2 if isinstance(fused, FusedMLPHead) else 4 + (4 if dtype == torch.bfloat16 else 5)
    assert len(launches) == 4 + 7 * (layers + 1)


@pytest.mark.interpreter("the launch config is the interpreter's")
def test_attention_in_the_launch_of_qkv_is_as_accurate_as_the_module(tmp_path: Path) -> None:
    """With three layers, the second computes all queries, and the third those of the x tokens."""
    multimodal = copy.deepcopy(tiny_params()["multimodal"])
    multimodal["audio_model_args"]["acoustic_transformer_args"]["n_layers"] = 3
    folder = make_checkpoint(tmp_path, dtype=torch.float32, overrides={"multimodal": multimodal})
    model = read_checkpoint(folder, torch.bfloat16).model
    head = model.acoustic_transformer
    h, alpha, x = inputs(model, 5)
    with torch.inference_mode():
        plain = head.solve(h, alpha, x, 4)
        exact = copy.deepcopy(head).double().solve(h.double(), alpha.double(), x.double(), 4)
        voxkern.accelerate(model, 6)
        with counting(whole=True) as launches:
            fused = head.solve(h, alpha, x, 4)
    assert [launch.kernel for launch in launches].count("_norm_qkv_attention_kernel") == 8
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_generate_through_the_fused_head(folder: Path, device: torch.device) -> None:
    """A model on kernels generates the module's codes, except at a rounding edge.

    After restore(), the model generates exactly the module's codes.
    """
    arguments = {"text": ["one", "two"], "seed": [5, 6], "max_frames": 2, "steps": 2}
    expected = voxkern.load(folder, device=device, max_batch=2, backend="torch").generate(**arguments)
    tts = voxkern.load(folder, device=device, max_batch=2, backend="triton")
    assert voxkern.restore(tts.model) == REPLACED
    voxkern.accelerate(tts.model, 2)
    spoken = with_reference_codec(tts).generate(**arguments)
    voxkern.restore(tts.model)
    for mine, plain, again in zip(spoken, expected, tts.generate(**arguments), strict=True):
        assert mine.codes.shape == plain.codes.shape
        assert (mine.codes != plain.codes).mean() <= 1 / 72  # fp32: at most one code, at a rounding edge, differs
        assert (again.codes == plain.codes).all()


def test_noise_is_the_references(model: VoxtralTTS, device: torch.device) -> None:
    fused = fused_head_of(model, 2)
    h, alpha, _ = inputs(model, 2)
    seed, frame = seed_tensor([2**63 + 5, 0]).to(device), torch.tensor([3, 99], device=device)
    with torch.inference_mode():
        drawn = fused.generate_codes(h, alpha, seed=seed, frame=frame)[0].clone()
        assert torch.equal(drawn, fused.generate_codes(h, alpha, noise=noise(seed, frame, 36))[0])


def test_weights_may_change(model: VoxtralTTS, device: torch.device) -> None:
    """load_state_dict, with assign too, in-place changes, deepcopy and saving work on an accelerated model."""
    head = model.acoustic_transformer
    h, alpha, x = inputs(model, 2)
    voxkern.accelerate(model, 2)
    assert "forward" not in model.state_dict()
    other = {name: torch.randn(t.shape).to(device) * t.std() for name, t in head.state_dict().items()}

    def a_time_weight() -> Tensor:
        return next(p for name, p in head.named_parameters() if name.startswith("time_"))

    with torch.inference_mode():
        head(h, alpha, x, 2)  # this call makes the tables
    for change in ("copy", "assign", "in place", "by way of meta", "through .data"):
        if change == "in place":
            with torch.no_grad():
                a_time_weight().mul_(-1)
        elif change == "through .data":  # no version counter changes: refresh() is needed
            a_time_weight().data.mul_(-1)
            head.forward.refresh()
        else:
            if change == "by way of meta":  # the new weights may get the old ones' addresses
                head.to("meta")
                other = {name: -t for name, t in other.items()}
            head.load_state_dict(other, assign=change != "copy")
        copied = copy.deepcopy(model)
        assert copied.acoustic_transformer.forward.module is copied.acoustic_transformer
        with torch.inference_mode():
            codes, of_copy = head(h, alpha, x, 2), copied.acoustic_transformer(h, alpha, x, 2)
            plain = copy.deepcopy(model)
            assert voxkern.restore(plain) == REPLACED
            expected = plain.acoustic_transformer(h, alpha, x, 2)
        assert (codes != expected).float().mean() < 0.03
        assert torch.equal(codes, of_copy)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer).keys() == model.state_dict().keys()


def test_tables_follow_their_weights(device: torch.device) -> None:
    """Only changes of the first layer's norm, wq, wk and wv, and of the time and input projections, make new tables."""
    config = Config.from_params(tiny_params())
    head = make_head(config.acoustic_transformer, config.audio).to(device)
    names = ["attention_norm", "attention.wq", "attention.wk", "attention.wv"]
    used = {f"{name}.weight" for name in ("time_projection", "input_projection", *(f"layers.0.{n}" for n in names))}
    with torch.inference_mode(False), torch.no_grad():
        fused = FusedTransformerHead(head, 1)
        for name, weight in head.named_parameters():
            tables = fused.step_tables("euler", 2)
            weight.mul_(1.5)
            assert (fused.step_tables("euler", 2) is not tables) == (name in used), name


def test_arguments_may_have_any_strides(model: VoxtralTTS, device: torch.device) -> None:
    h, _, x = inputs(model, 3)
    voxkern.accelerate(model, 3)
    with torch.inference_mode():
        codes = model.acoustic_transformer(h, torch.full((3,), 1.2, device=device), x, 2)
        spread, alpha = x.t().contiguous().t(), torch.tensor(1.2, device=device).expand(3)
        assert torch.equal(model.acoustic_transformer(h, alpha, spread, 2), codes)


def test_restore_is_exact(model: VoxtralTTS) -> None:
    h, alpha, x = inputs(model, 3)
    with torch.inference_mode():
        before = model.acoustic_transformer(h, alpha, x)
        voxkern.accelerate(model, 3)
        voxkern.accelerate(model, 4)  # replaces the first fused head
        assert voxkern.restore(model) == REPLACED
        assert torch.equal(model.acoustic_transformer(h, alpha, x), before)
    assert not {"forward", "solve"} & vars(model.acoustic_transformer).keys()
    assert voxkern.restore(model) == []


def test_errors(model: VoxtralTTS) -> None:
    h, alpha, x = inputs(model, 3)
    with pytest.raises(ValueError, match="no part that voxkern has kernels for"):
        voxkern.accelerate(torch.nn.Linear(2, 2))
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=r"max_batch must be in 1..64"):
            voxkern.accelerate(model, wrong)
    voxkern.accelerate(model, 2)
    head = model.acoustic_transformer
    with torch.inference_mode():
        for arguments, error, message in (
            ((h, alpha, x), ValueError, r"h has 3 rows, the flow head is prepared for 1..2 \(max_batch\)"),
            ((h[:2, :63], alpha[:2], x[:2]), ValueError, r"h is \[2, 63\] but must be \[B, 64\]"),
            ((h[:2].bfloat16(), alpha[:2], x[:2]), TypeError, "h is torch.bfloat16"),
            ((h[:2], alpha, x[:2]), ValueError, r"cfg_alpha is \[3\] but must be \[2\]"),
            ((h[:2], alpha[:2], x[:2, :35]), ValueError, r"noise is \[2, 35\] but must be"),
            ((h[:2], alpha[:2], x[:2], 65), ValueError, "steps must lie in 1..64"),
            ((h[:2], alpha[:2], x[:2], 4, "heun"), ValueError, "solver must be one of"),
        ):
            with pytest.raises(error, match=message):
                head(*arguments)
    head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="an accelerated flow head computes no gradients"):
        head(h[:2], alpha[:2], x[:2])


@torch.inference_mode()
def flips(velocity_mlp: bool, B: int, calls: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Return the share of acoustic codes that differ from fp64's codes, and the share that differ by over one level.

    "plain" has the two shares of the module in bf16, and "fused" has those of the fused head.
    """
    config = Config.from_params(voxkern.random_checkpoint.tiny_params(velocity_mlp))
    head = make_head(config.acoustic_transformer, config.audio)
    g = torch.Generator().manual_seed(1)
    head.load_state_dict(
        {n: voxkern.random_checkpoint.random_tensor(n, t.shape, g) for n, t in head.state_dict().items()}
    )
    final = head.final_layer.linear if velocity_mlp else head.acoustic_codebook_output
    final.weight.mul_(0.5)  # makes the RMS of the final x near 1
    head = head.to(device, torch.bfloat16)
    exact, fused = (
        copy.deepcopy(head).double(),
        FusedMLPHead(head, B) if velocity_mlp else FusedTransformerHead(head, B),
    )
    found: dict[str, list[Tensor]] = {"plain": [], "fused": []}
    rms = []
    for call in range(calls):
        h, x = torch.randn(B, 64, generator=g).bfloat16(), noise(seed_tensor(range(B)), torch.full((B,), call), 36)
        h, x, alpha = h.to(device), x.to(device), torch.full((B,), 1.2, device=device)
        rms.append(exact.solve(h.double(), alpha.double(), x.double(), 7).square().mean())
        truth = exact(h.double(), alpha.double(), x.double(), 7)[:, 1:]
        for name, codes in (("plain", head(h, alpha, x, 7)), ("fused", fused(h, alpha, x, 7))):
            off = (codes[:, 1:] - truth).abs()
            found[name].append(off[(codes[:, 1:] != 2).any(1) & (truth != 2).any(1)])
    print(f"RMS of the final x {torch.stack(rms).mean().sqrt():.2f}")
    assert 0.7 < float(torch.stack(rms).mean().sqrt()) < 1.4
    return {
        name: (torch.cat(off).gt(0).double().mean().item(), torch.cat(off).gt(1).double().mean().item())
        for name, off in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("velocity_mlp", [False, True])
def test_codes_flipped_by_bf16(velocity_mlp: bool, device: torch.device) -> None:
    B, calls = 64, 5
    rates = flips(velocity_mlp, B, calls, device)
    n = B * calls * 36
    for name, (rate, far) in rates.items():
        print(f"{name}: {100 * rate:.2f} % flipped, {100 * far:.3f} % by more than a level")
    plain, mine = rates["plain"][0], rates["fused"][0]
    assert n >= 9216
    assert mine <= plain + 2 * (plain * (1 - plain) / n) ** 0.5
    assert rates["fused"][1] <= 1e-4
