"""The reference against the public serving code, on the same random weights and noise.

Skipped where vLLM-Omni is absent; see "Against the public server" in the README for how to have it on a CPU.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import independent
import numpy as np
import pytest
import torch

from voxkern.reference import VoxtralTTS

generation = pytest.importorskip(
    "vllm_omni.model_executor.models.voxtral_tts.voxtral_tts_audio_generation",
    reason="vllm-omni is not installed",
    exc_type=ImportError,
)
tokenizer = pytest.importorskip("vllm_omni.model_executor.models.voxtral_tts.voxtral_tts_audio_tokenizer")


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
