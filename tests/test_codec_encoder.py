"""Tests of the codec's encoder and quantiser: equal to a second derivation, in training, and without an encoder."""

import copy
from pathlib import Path

import independent
import numpy as np
import pytest
import torch

from voxkern.checkpoint import read_checkpoint
from voxkern.random_checkpoint import make_checkpoint
from voxkern.reference import VoxtralTTS, quantizer


def _sound(n: int, B: int = 1, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(B, 1, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1920, 100, 1921, 12 * 1920 - 7, 40 * 1920 + 240])
def test_encode_equals_the_second_derivation(
    tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict, n: int
) -> None:
    """The sounds have five lengths; a frame is 1920 samples and a patch is 240.

    They are 1 frame, less than a patch, 1 frame and 1 sample, 12 frames less 7 samples, and 40 frames and 1 patch.
    """
    sound = _sound(n)
    with torch.inference_mode():
        latents, codes = tiny_model.audio_tokenizer.latents(sound), tiny_model.audio_tokenizer.encode(sound)
    expected = independent.codec_encode(tiny_weights, tiny_params, sound[0, 0].double().numpy())
    assert codes.shape == (1, 37, -(-n // 1920))
    np.testing.assert_allclose(latents[0].T.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    expected_codes, margin = independent.codec_codes(tiny_weights, tiny_params, expected)
    differ = codes[0].numpy() != expected_codes
    assert not (differ & (margin > 1e-3)).any()
    assert len(np.unique(expected_codes[1:])) > 10 or n < 1920  # the codes are spread over many levels


def test_encoder_is_causal(tiny_model: VoxtralTTS) -> None:
    sound, other = _sound(20 * 1920), _sound(20 * 1920)
    other[..., 12 * 1920 :] += 0.5
    with torch.inference_mode():
        a, b = (tiny_model.audio_tokenizer.latents(x)[0] for x in (sound, other))
    assert (a[:, :12] - b[:, :12]).abs().max() < 1e-5
    assert ((a[:, 12:] - b[:, 12:]).abs().amax(0) > 1e-3).all()


def test_quantised_latents_are_what_their_codes_say(tiny_model: VoxtralTTS) -> None:
    codec = tiny_model.audio_tokenizer
    with torch.inference_mode():
        latents = 2 * torch.randn(2, 60, 9, generator=torch.Generator().manual_seed(1))
        quantized, codes = codec.quantizer.quantize(latents)
        torch.testing.assert_close(quantized, codec.quantizer(codes))
        torch.testing.assert_close(codec.quantizer.encode(latents), codes, rtol=0, atol=0)
        # a latent equal to a code's vector gives that code
        semantic = codec.quantizer.semantic_codebook(torch.arange(62)).T[None]
        exact = torch.cat((semantic, torch.zeros(1, 36, 62)), dim=1)
        assert codec.quantizer.encode(exact)[0, 0].tolist() == list(range(62))
        # tanh keeps all levels within 0..20, and latent 0 gives level 10
        acoustic = torch.tensor([-1e4, -0.51, 0.0, 0.49, 1e4]).expand(36, 5)
        scaled = codec.quantizer.encode(torch.cat((torch.zeros(24, 5), acoustic))[None])[0, 1:]
        assert (scaled == torch.tensor([0, 5, 10, 15, 20])).all()


def test_halves_go_to_the_even_level(monkeypatch: pytest.MonkeyPatch, tiny_model: VoxtralTTS) -> None:
    monkeypatch.setattr(torch.Tensor, "tanh", lambda x: x)
    latents = torch.zeros(1, 60, 2)
    latents[0, 24:, 0], latents[0, 24:, 1] = -0.75, -0.25  # levels 2.5 and 7.5
    codes = tiny_model.audio_tokenizer.quantizer.encode(latents)
    assert (codes[0, 1:] == torch.tensor([2, 8])).all()


def test_the_round_trip_is_differentiable(tiny_model: VoxtralTTS) -> None:
    """Gradients of the sound reach every weight of encoder and decoder; rounding passes the gradients unchanged."""
    codec = copy.deepcopy(tiny_model.audio_tokenizer).requires_grad_(True)
    sound = _sound(3 * 1920 - 500, B=2)
    again, codes = codec(sound)
    assert again.shape == sound.shape
    torch.testing.assert_close(again, codec.decode(codes)[..., : sound.shape[-1]])
    grads = torch.autograd.grad((again - sound).square().mean(), list(codec.parameters()))
    assert all(g.isfinite().all() and g.any() for g in grads)

    latents = torch.randn(1, 60, 4, requires_grad=True)
    quantized, _ = codec.quantizer.quantize(latents)
    (grad,) = torch.autograd.grad(quantized.sum(), latents)
    assert (grad[:, :24] == 1).all()
    torch.testing.assert_close(grad[:, 24:], 1 - latents.detach()[:, 24:].tanh().square())


def test_training_makes_the_round_trip_better(tiny_model: VoxtralTTS) -> None:
    """After 100 steps on a tone, the squared error is below 0.2 x that of silence, which needs correct gradients."""
    torch.manual_seed(0)
    codec = copy.deepcopy(tiny_model.audio_tokenizer).requires_grad_(True)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=2e-3)
    tone = (0.5 * torch.sin(torch.arange(4 * 1920) * 0.1)).view(1, 1, -1)
    for _ in range(100):
        loss = (codec(tone)[0] - tone).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * tone.square().mean()


def test_bf16_codes_are_near(tiny_model: VoxtralTTS) -> None:
    sound = _sound(30 * 1920)
    with torch.inference_mode():
        exact = tiny_model.audio_tokenizer.encode(sound)[:, 1:]
        half = copy.deepcopy(tiny_model.audio_tokenizer).bfloat16().encode(sound)[:, 1:]
    assert (exact != half).float().mean() < 0.2
    assert (exact - half).abs().max() <= 2


def test_without_the_encoder_it_says_so(tmp_path: Path) -> None:
    model = read_checkpoint(make_checkpoint(tmp_path)).model
    with pytest.raises(ValueError, match=r"has no codec encoder .*input_proj"):
        model.audio_tokenizer.encode(torch.zeros(1, 1, 1920))
    with pytest.raises(ValueError, match="has no codec encoder"):
        model.audio_tokenizer(torch.zeros(1, 1, 1920))


@pytest.mark.parametrize("shape", [(1, 2, 1920), (1920,), (1, 1, 0)])
def test_wrong_samples(tiny_model: VoxtralTTS, shape: tuple) -> None:
    with pytest.raises(ValueError, match="samples must be"):
        tiny_model.audio_tokenizer.encode(torch.zeros(shape))


def test_the_nearest_of_equals_is_the_first() -> None:
    codebook = quantizer.SemanticCodebook(5, 3)
    codebook.embedding_sum[:] = torch.tensor([2.0, 0.0, 0.0])
    codebook.embedding_sum[1], codebook.embedding_sum[3] = torch.tensor([0.0, 8.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    codebook.cluster_usage[:] = torch.tensor([1.0, 4.0, 1.0, 2.0, 1.0])  # codes 1 and 3 have the same vector
    x = torch.tensor([[0.0, 1.9, 0.0], [1.9, 0.0, 0.0]])
    assert codebook.nearest(x).tolist() == [1, 0]
