"""Tests of the codec's decoder: it equals a second derivation and is causal."""

import copy

import independent
import numpy as np
import pytest
import torch

from voxkern.reference import VoxtralTTS, codec_layers


def _codes(T: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    semantic = torch.randint(0, 62, (1, 1, T), generator=g)
    return torch.cat((semantic, torch.randint(0, 21, (1, 36, T), generator=g)), dim=1)


@pytest.mark.parametrize("T", [1, 2, 40])
def test_decode_equals_the_second_derivation(
    tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_layers, "QUERY_BLOCK", 100)  # 40 frames are 320 rows at 100 Hz: four blocks
    codes = _codes(T)
    with torch.inference_mode():
        wave = tiny_model.audio_tokenizer.decode(codes)
    assert wave.shape == (1, 1, 1920 * T)
    expected = independent.codec_decode(tiny_weights, tiny_params, codes[0].numpy())
    error = np.sqrt(np.mean((wave[0, 0].numpy() - expected) ** 2)) / np.sqrt(np.mean(expected**2))
    assert error < 1e-5
    assert np.abs(wave[0, 0].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_decode_is_causal_and_forgets_after_21_frames(tiny_model: VoxtralTTS) -> None:
    codes, other = _codes(40), _codes(40)
    other[:, :, 10] = (other[:, :, 10] + 5) % 21
    with torch.inference_mode():
        a, b = (tiny_model.audio_tokenizer.decode(c)[0, 0].view(40, 1920) for c in (codes, other))
    changed = (a - b).abs().amax(1) > 1e-6
    assert changed.nonzero().flatten().tolist()[0] == 10
    assert changed.nonzero().flatten().tolist()[-1] <= 31
    with torch.inference_mode():
        prefix = tiny_model.audio_tokenizer.decode(codes[:, :, :7])
    torch.testing.assert_close(prefix[0, 0].view(7, 1920), a[:7], rtol=1e-4, atol=1e-5)


def test_batch_rows_are_independent(tiny_model: VoxtralTTS) -> None:
    codes = torch.cat((_codes(9, 1), _codes(9, 2)))
    with torch.inference_mode():
        both = tiny_model.audio_tokenizer.decode(codes)
        alone = tiny_model.audio_tokenizer.decode(codes[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_a_bf16_codec_returns_fp32_sound(tiny_model: VoxtralTTS) -> None:
    codes = _codes(20)
    with torch.inference_mode():
        exact = copy.deepcopy(tiny_model.audio_tokenizer).double().decode(codes)
        half = copy.deepcopy(tiny_model.audio_tokenizer).bfloat16().decode(codes)
    assert half.dtype == torch.float32
    assert (half.bfloat16().float() != half).any()
    assert float((half - exact).square().mean() / exact.square().mean()) < 0.02**2


def test_gradients_reach_every_decoder_weight(tiny_model: VoxtralTTS) -> None:
    codec = tiny_model.audio_tokenizer
    weights = [p for name, p in codec.named_parameters() if not name.startswith(("input_proj", "encoder"))]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        grads = torch.autograd.grad(codec.decode(_codes(3)).square().mean(), weights)
        assert all(g.isfinite().all() and g.any() for g in grads)
    finally:
        codec.requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 36, 4), (37, 4), (1, 38, 4)])
def test_wrong_codes(tiny_model: VoxtralTTS, shape: tuple) -> None:
    with pytest.raises(ValueError, match="codes must be"):
        tiny_model.audio_tokenizer.decode(torch.zeros(shape, dtype=torch.long))
