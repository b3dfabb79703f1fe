"""Tests of the reference and the kernels against vLLM-Omni's code, on the same random weights and noise.

The tests are skipped if vLLM-Omni is not installed. docs/serving.md explains how to install
vLLM-Omni on a CPU.
"""

import copy
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import independent
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import voxkern
from bench.static.counters import counting
from voxkern.integrations import vllm_plugin
from voxkern.integrations.server_heads import CAPTURED_METHOD
from voxkern.reference import VoxtralTTS
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

pytestmark = pytest.mark.servers

generation = pytest.importorskip(
    "vllm_omni.model_executor.models.voxtral_tts.voxtral_tts_audio_generation",
    reason="vllm-omni is not installed",
    exc_type=ImportError,
)
tokenizer = pytest.importorskip("vllm_omni.model_executor.models.voxtral_tts.voxtral_tts_audio_tokenizer")
voxtral_tts = pytest.importorskip("vllm_omni.model_executor.models.voxtral_tts.voxtral_tts")
plugins = pytest.importorskip("vllm.plugins")

Model = generation.VoxtralTTSAudioGenerationForConditionalGeneration
Wrapper = voxtral_tts.CUDAGraphAcousticTransformerWrapper
CAPTURE, ENABLE = "_capture_graph_for_size", "_enable_acoustic_transformer_cudagraph"


@pytest.mark.parametrize(("B", "steps"), [(1, 7), (3, 16), (32, 7)])
def test_flow_head(tiny_model: VoxtralTTS, tiny_params: dict, tiny_weights: dict, B: int, steps: int) -> None:
    args = copy.deepcopy(tiny_params["multimodal"]["audio_model_args"])
    args["acoustic_transformer_args"]["n_decoding_steps"] = steps
    theirs = generation.FlowMatchingAudioTransformer(args).eval()
    missing = theirs.load_state_dict(tiny_model.acoustic_transformer.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["time_embedding.inv_freq"]
    g = torch.Generator().manual_seed(B)
    h, noise, alpha = torch.randn(B, 64, generator=g), torch.randn(B, 36, generator=g), torch.rand(B, generator=g) * 2
    with torch.inference_mode():
        ours = tiny_model.acoustic_transformer(h, alpha, noise, steps)
        with mock.patch.object(torch, "randn", return_value=noise.clone()):
            codes = theirs(h, alpha)
        logits = tiny_model.acoustic_transformer.semantic_logits(h).sort(dim=1).values
    x = independent.solve(
        tiny_weights, tiny_params, h.double().numpy(), noise.double().numpy(), alpha.double().numpy(), steps
    )
    tied = ((logits[:, -1] - logits[:, -2]) < 1e-4).unsqueeze(1)
    at_edge = torch.from_numpy(independent.edge_distance(x, 21) < 1e-4)
    assert bool(((ours[:, :1] == codes[:, :1]) | tied).all())
    assert bool(((ours[:, 1:] == codes[:, 1:]) | at_edge | tied).all())


@pytest.mark.parametrize("T", [1, 30])
def test_codec(tiny_model: VoxtralTTS, tiny_params: dict, T: int) -> None:
    audio = {
        "codec_args": tiny_params["multimodal"]["audio_tokenizer_args"],
        "audio_model_args": copy.deepcopy(tiny_params["multimodal"]["audio_model_args"]),
    }
    hf_config = SimpleNamespace(audio_config=audio, text_config=SimpleNamespace(hidden_size=64))
    theirs = tokenizer.VoxtralTTSAudioTokenizer(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    ).eval()
    for item in tiny_model.audio_tokenizer.state_dict().items():
        theirs.load_weight(item)
    g = torch.Generator().manual_seed(T)
    codes = torch.cat((torch.randint(62, (2, 1, T), generator=g), torch.randint(21, (2, 36, T), generator=g)), dim=1)
    with torch.inference_mode():
        ours = tiny_model.audio_tokenizer.decode(codes)
        wave = theirs.decode(codes)
    np.testing.assert_allclose(ours.numpy(), wave.numpy(), rtol=0, atol=1e-4 * float(wave.abs().max()))


def server_head(model: VoxtralTTS, params: dict, **changes: object) -> torch.nn.Module:
    """Return vLLM-Omni's own head with the weights of `model`, in their dtype; `changes` replace its arguments."""
    args = copy.deepcopy(params["multimodal"]["audio_model_args"])
    args["acoustic_transformer_args"] |= {"n_decoding_steps": 1, **changes}
    ours = model.acoustic_transformer
    theirs = generation.FlowMatchingAudioTransformer(args).eval().to(next(ours.parameters()).dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs


def wrapper_of(theirs: torch.nn.Module, sizes: list[int], dtype: torch.dtype = torch.float32) -> Wrapper:
    """Return vLLM-Omni's graph wrapper of a head, warmed up by its own method; no graph is captured."""
    wrapper = Wrapper(SimpleNamespace(acoustic_transformer=theirs), sizes)
    warm_up(wrapper._warmup_and_capture, torch.device("cpu"), dtype, 64)
    return wrapper


def warm_up(call: Callable[..., None], *args: object) -> list[Wrapper]:
    """Run `call`, which warms up wrappers; return the wrappers that would then capture graphs, but capture none."""
    about_to = []

    def note(self: Wrapper, *_: object) -> None:
        about_to.append(self)

    with mock.patch.object(torch.accelerator, "synchronize"), mock.patch.object(Wrapper, CAPTURE, note):
        call(*args)
    return about_to


def inputs(model: VoxtralTTS, B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states [B, 64], guidance [B] and noise [B, 36].

    Each request has its own guidance. If B > 1, the first request generates END.
    """
    g = torch.Generator().manual_seed(B)
    h, alpha, noise = torch.randn(400, 64, generator=g), torch.rand(B, generator=g) * 2, torch.randn(B, 36, generator=g)
    if B > 1:
        ended = model.acoustic_transformer.semantic_logits(h).argmax(1) == 1
        h = torch.cat((h[ended][:1], h[~ended]))
    return h[:B], alpha, noise


@torch.no_grad()
def both_paths(wrapper: Wrapper, h: torch.Tensor, alpha: torch.Tensor, noise: torch.Tensor) -> list[torch.Tensor]:
    """Return the codes of the eager call, then the codes and END flags of the method that is captured in graphs."""
    with mock.patch.object(torch, "randn", return_value=noise.clone()):
        eager = wrapper.acoustic_transformer(llm_hidden=h, cfg_alpha=alpha)
    ended, captured = wrapper._forward_cudagraph_compatible(h, cfg_alpha=alpha.unsqueeze(1), noise=noise)
    return [eager.clone(), captured.clone(), ended.clone()]


@pytest.mark.parametrize(("B", "max_batch", "steps"), [(1, 1, 7), (3, 3, 7), (3, 2, 2), (32, 32, 2)])
def test_accelerated(
    tiny_model: VoxtralTTS, tiny_params: dict, tiny_weights: dict, B: int, max_batch: int, steps: int
) -> None:
    """After accelerate(), both paths give the server's codes, except for codes at a rounding edge.

    After restore(), both paths give the server's bits.
    """
    wrapper = wrapper_of(server_head(tiny_model, tiny_params, n_decoding_steps=steps), [B])
    h, alpha, noise = inputs(tiny_model, B)
    before = both_paths(wrapper, h, alpha, noise)
    names = voxkern.accelerate(wrapper, max_batch)
    assert names == [
        "acoustic_transformer",
        "acoustic_transformer._predict_velocity",
        f"{Wrapper.__name__}.{CAPTURED_METHOD}",
    ]
    after = both_paths(wrapper, h, alpha, noise)
    arrays = [a.double().numpy() for a in (h, noise, alpha)]
    at_edge = torch.from_numpy(
        independent.edge_distance(independent.solve(tiny_weights, tiny_params, *arrays, steps), 21) < 1e-4
    )
    for old, new in zip(before[:2], after[:2], strict=True):
        assert torch.equal(new[:, 0], old[:, 0])
        assert bool(((new == old)[:, 1:] | at_edge).all())
    assert int(at_edge.sum()) <= 2
    assert after[2].dtype == before[2].dtype
    assert after[2].tolist() == before[2].tolist() == [1.0] * (B > 1) + [0.0] * (B - (B > 1))
    if B > 1:
        assert after[1][0].tolist() == [1] + [2] * 36
    x, tokens = noise.repeat(2, 1), torch.randn(2, 2 * B, 64)
    with torch.inference_mode():
        velocity = wrapper.acoustic_transformer._predict_velocity(x_t=x, llm_proj=tokens[0], t_proj=tokens[1])
        assert voxkern.restore(wrapper) == names
        theirs = wrapper.acoustic_transformer._predict_velocity(x_t=x, llm_proj=tokens[0], t_proj=tokens[1])
    torch.testing.assert_close(velocity, theirs, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, both_paths(wrapper, h, alpha, noise), before))


@torch.no_grad()
def test_what_is_captured_allocates_nothing(tiny_model: VoxtralTTS, tiny_params: dict) -> None:
    """Once graphs are captured, accelerating again keeps the memory that the graphs use."""
    wrapper = wrapper_of(server_head(tiny_model, tiny_params), [2])
    voxkern.accelerate(wrapper, 2)
    h, alpha, noise = inputs(tiny_model, 2)
    with counting(whole=True), OperatorRecorder() as operators:
        ended, codes = wrapper._forward_cudagraph_compatible(h, alpha.unsqueeze(1), noise)
    assert operators.seen == {"aten.copy_.default": 2, "aten.clamp.out": 1, "aten.eq.Scalar_out": 1}
    wrapper.graphs[2] = None
    captured = wrapper._forward_cudagraph_compatible
    assert voxkern.accelerate(wrapper, 2)[-1] == f"{Wrapper.__name__}.{CAPTURED_METHOD}"
    assert wrapper._forward_cudagraph_compatible is captured
    again = wrapper._forward_cudagraph_compatible(h, alpha.unsqueeze(1), noise)
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in (ended, codes)]
    voxkern.restore(wrapper)
    # a wrapper that has captured graphs is left as it is
    assert voxkern.accelerate(wrapper, 2)[-1] == "acoustic_transformer._predict_velocity"


class OperatorRecorder(TorchDispatchMode):
    """Counts the operators that would start a kernel, which are all except views and allocations.

    One operator may start more than one kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize(("max_batch", "limit"), [(1, 95), (32, 95)])
def test_launches(max_batch: int, limit: int) -> None:
    """The head has three layers and seven evaluations, as in the public model.

    Its widths are tiny, which does not change the number of launches.
    """
    params = tiny_params_of(n_layers=3)
    theirs = generation.FlowMatchingAudioTransformer(params["multimodal"]["audio_model_args"]).bfloat16()
    B = min(max_batch, 2)
    wrapper = wrapper_of(theirs, [B], torch.bfloat16)
    h, alpha, noise = torch.zeros(B, 64).bfloat16(), torch.ones(B, 1).bfloat16(), torch.zeros(B, 36).bfloat16()
    paths = {
        "eager": lambda: theirs(h, alpha[:, 0]),
        "captured": lambda: getattr(wrapper, CAPTURED_METHOD)(h, alpha, noise),
    }

    def counts() -> dict[str, int]:
        found = {}
        for name, path in paths.items():
            with counting() as launches, OperatorRecorder() as operators:
                path()
            found[name] = len(launches) + operators.seen.total()
        return found

    server = counts()
    voxkern.accelerate(wrapper, max_batch)
    accelerated = counts()
    print(f"launches a frame, prepared for {max_batch}: server {server} or more, accelerated {accelerated}")
    assert accelerated["captured"] == limit + 4  # 4: noise and guidance to fp32, codes, END flags
    assert accelerated["eager"] <= limit + 5
    assert server["captured"] > 3.5 * accelerated["captured"]


def tiny_params_of(**changes: object) -> dict:
    params = copy.deepcopy(voxkern.random_checkpoint.tiny_params())
    params["multimodal"]["audio_model_args"]["acoustic_transformer_args"] |= {"n_decoding_steps": 7, **changes}
    return params


@pytest.mark.slow
@torch.inference_mode()
def test_codes_flipped_by_bf16() -> None:
    """In bf16, the accelerated head flips at most as many codes as the server's own head, plus two standard errors.

    A code is flipped if it differs from the code of the same weights in fp64.
    """
    B, calls, params = 32, 3, tiny_params_of()
    config, g = voxkern.Config.from_params(params), torch.Generator().manual_seed(1)
    head = FlowMatchingAudioTransformer(config.acoustic_transformer, config.audio)
    head.load_state_dict(
        {n: voxkern.random_checkpoint.random_tensor(n, t.shape, g) for n, t in head.state_dict().items()}
    )
    head.acoustic_codebook_output.weight.mul_(0.5)  # gives the final x an RMS near 1
    theirs = server_head(SimpleNamespace(acoustic_transformer=head.bfloat16()), params, n_decoding_steps=7)
    wrapper, exact = wrapper_of(theirs, [B], torch.bfloat16), head.double()
    examples = [
        [torch.randn(B, n, generator=g).bfloat16() for n in (64, 36)] + [torch.full((B,), 1.2).bfloat16()]
        for _ in range(calls)
    ]
    truth = torch.cat([exact(h.double(), alpha.double(), noise.double()) for h, noise, alpha in examples])
    speaking = truth[:, 0] != 1

    def flipped() -> dict[str, tuple[float, float]]:
        paths = [both_paths(wrapper, h, alpha, noise)[:2] for h, noise, alpha in examples]
        off = [(torch.cat(codes) - truth)[speaking, 1:].abs() for codes in zip(*paths, strict=True)]
        return {
            name: (o.gt(0).double().mean().item(), o.gt(1).double().mean().item())
            for name, o in zip(("eager", "captured"), off, strict=True)
        }

    server = flipped()
    voxkern.accelerate(wrapper, B)
    accelerated, n = flipped(), int(speaking.sum()) * 36
    print(f"shares of {n} codes flipped, and flipped by > 1 level: server {server}, accelerated {accelerated}")
    for name, (rate, _) in server.items():
        assert accelerated[name][0] <= rate + 2 * (rate * (1 - rate) / n) ** 0.5


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Return a function that registers the plugin as vLLM does, with VOXKERN_VLLM set to its argument.

    `caplog` receives the plugin's log, and the patched methods are restored after the test.
    """
    monkeypatch.setattr(Model, "load_weights", Model.load_weights)
    monkeypatch.setattr(Wrapper, "__init__", Wrapper.__init__)
    monkeypatch.setattr(vllm_plugin.log, "handlers", [caplog.handler])
    monkeypatch.setattr(vllm_plugin.log, "propagate", False)
    monkeypatch.setattr(vllm_plugin.log, "level", logging.INFO)

    def register(value: str) -> None:
        monkeypatch.setenv("VOXKERN_VLLM", value)
        for _ in range(2):  # plugins may be loaded more than once
            plugins.load_plugins_by_group("vllm.general_plugins")["voxkern"]()

    return register


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines that the plugin has logged, each after its level."""
    return [f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name == vllm_plugin.log.name]


def load(head: torch.nn.Module, state: dict[str, torch.Tensor]) -> Any:
    """Return vLLM-Omni's model with `head`, at the point where the model would capture graphs.

    The model loads the weights `state` by its own method.
    """
    model = Model.__new__(Model)
    torch.nn.Module.__init__(model)
    model.acoustic_transformer = head
    model.language_model = SimpleNamespace(load_weights=lambda weights: [name for name, _ in weights])
    model.audio_tokenizer = SimpleNamespace(_encoder_loaded=True)
    model.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=64))
    names = model.load_weights((f"acoustic_transformer.{name}", tensor) for name, tensor in state.items())
    assert names == {f"acoustic_transformer.{name}" for name in state}
    whole = SimpleNamespace(model_stage="audio_generation", _vllm_config=None, model=model)
    (model.wrapper,) = set(warm_up(voxtral_tts.VoxtralTTSForConditionalGeneration.__dict__[ENABLE], whole))
    assert whole._cudagraph_acoustic_transformer is model.wrapper
    return model


def test_plugin(tiny_model: VoxtralTTS, tiny_params: dict, hooked: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """With VOXKERN_VLLM=0, the plugin does nothing.

    With VOXKERN_VLLM=1, the plugin accelerates the head after weights are loaded and before graphs are captured, and
    logs one line.
    """
    state = tiny_model.acoustic_transformer.state_dict()
    hooked("0")
    plain = load(server_head(tiny_model, tiny_params), state)
    hooked("1")
    with mock.patch.object(Wrapper, "DEFAULT_CAPTURE_SIZES", [1, 2]):
        model = load(server_head(tiny_model, tiny_params), state)
    for one, replaced in ((plain, False), (model, True)):
        assert ("forward" in vars(one.acoustic_transformer)) == replaced
        assert (CAPTURED_METHOD in vars(one.wrapper)) == replaced
    assert told(caplog) == [
        "INFO voxkern accelerates acoustic_transformer and acoustic_transformer._predict_velocity of "
        "VoxtralTTSAudioGenerationForConditionalGeneration, also inside CUDA graphs"
    ]
    h, alpha, noise = inputs(tiny_model, 2)
    ours, theirs = (both_paths(one.wrapper, h, alpha, noise) for one in (model, plain))
    assert all(int((a != b).sum()) <= 1 for a, b in zip(ours, theirs, strict=True))
    # the second load writes through .data, which is not detected: the tables must be rebuilt nevertheless
    names = {name: -tensor for name, tensor in state.items()}
    model.load_weights((f"acoustic_transformer.{name}", tensor) for name, tensor in names.items())
    plain.acoustic_transformer.load_state_dict(names, strict=False)
    plain.acoustic_transformer._timesteps_cache.clear()
    (again, *_), (expected, *_) = (both_paths(one.wrapper, h, alpha, noise) for one in (model, plain))
    assert int((again != expected).sum()) <= 1


def test_plugin_and_a_head_of_an_unknown_shape(
    tiny_model: VoxtralTTS, tiny_params: dict, hooked: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    hooked("1")
    with mock.patch.object(Wrapper, "DEFAULT_CAPTURE_SIZES", [1]):
        model = load(server_head(tiny_model, tiny_params, use_biases=True), {})
    assert "forward" not in vars(model.acoustic_transformer)
    assert CAPTURED_METHOD not in vars(model.wrapper)
    (line,) = told(caplog)
    assert line.startswith("WARNING voxkern leaves VoxtralTTSAudioGenerationForConditionalGeneration as it is")
    assert "acoustic_transformer is not supported: layers.0.attention.wo.bias is [64] but must be missing" in line


def test_plugin_where_vllm_omni_is_another(
    hooked: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_plugin, "SERVER_PACKAGE", "vllm_omni.elsewhere")
    hooked("1")
    assert set(told(caplog)) == {
        "WARNING voxkern leaves vLLM-Omni as it is: ModuleNotFoundError: No module named 'vllm_omni.elsewhere'"
    }


@pytest.mark.parametrize(("switch", "hooked_in"), [("1", "True"), ("", "False")])
def test_plugin_in_a_process_of_vllms(switch: str, hooked_in: str) -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        f"from {generation.__name__} import {Model.__name__} as M; print(hasattr(M.load_weights, '_voxkern'))"
    )
    environment = os.environ | {"VOXKERN_VLLM": switch, "TRITON_INTERPRET": "0"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert answer.stdout.split()[-1:] == [hooked_in], answer.stderr
