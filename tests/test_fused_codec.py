"""Tests of the fused codec: it gives the reference's sound by launches alone, and chunks do not change its bits."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import CPU
from test_codec_stream import OperatorRecorder

import voxkern
from bench.static.counters import launches_only
from voxkern.checkpoint import read_checkpoint
from voxkern.fused.codec import FusedCodec, FusedCodecStream
from voxkern.kernels.launch_config import LaunchConfigs
from voxkern.reference import Config
from voxkern.reference.codec import AudioTokenizer
from voxkern.reference.codec_stream import CodecStream

KERNELS = ("linear", "norm_linear", "norm_swiglu")  # norm_qkv takes the launch configs of norm_linear


def _codes(T: int, B: int = 1, seed: int = 0, device: torch.device = CPU) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    semantic = torch.randint(0, 62, (B, 1, T), generator=g)
    return torch.cat((semantic, torch.randint(0, 21, (B, 36, T), generator=g)), dim=1).to(device)


def _in_chunks(fused: FusedCodec, codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    stream = fused(len(codes))
    return torch.cat([stream.decode(part) for part in codes.split(sizes, dim=2)], dim=2)


@pytest.fixture(scope="module")
def codec(tiny_folder: Path, device: torch.device) -> AudioTokenizer:
    """Return the codec of `tiny_folder`, in fp32. Tests must not change this codec."""
    return read_checkpoint(tiny_folder, device=device).model.audio_tokenizer


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1, 3, 2], id="6"),
        pytest.param([1] * 26, marks=pytest.mark.slow, id="26 frames, beyond what is remembered"),
        pytest.param([25, 1], marks=pytest.mark.slow, id="the longest chunk"),
    ],
)
def test_fp32_is_the_reference(codec: AudioTokenizer, device: torch.device, sizes: list[int]) -> None:
    codes = _codes(sum(sizes), device=device)
    with torch.inference_mode():
        whole = codec.decode(codes)
    torch.testing.assert_close(_in_chunks(FusedCodec(codec, 2), codes, sizes), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_bits_do_not_depend_on_chunks_or_neighbours(
    codec: AudioTokenizer, device: torch.device, dtype: torch.dtype
) -> None:
    fused = FusedCodec(copy.deepcopy(codec).to(dtype), 2)
    codes = _codes(4, B=2, device=device)  # up to 32 rows a request, in tiles of 16
    together = _in_chunks(fused, codes, [4])
    assert torch.equal(_in_chunks(fused, codes, [1, 3]), together)
    assert torch.equal(_in_chunks(fused, codes[1:], [2, 1, 1]), together[1:])


def test_bf16_is_as_near_as_the_reference(codec: AudioTokenizer, device: torch.device) -> None:
    codes, half = _codes(8, device=device), copy.deepcopy(codec).bfloat16()
    with torch.inference_mode():
        exact = copy.deepcopy(half).double().decode(codes)
        plain = half.decode(codes)
    mine = _in_chunks(FusedCodec(half, 2), codes, [8])
    assert mine.dtype == torch.float32
    assert (mine - exact).square().mean() < 1.2 * (plain - exact).square().mean()


def test_requests_of_different_lengths_and_new_ones(codec: AudioTokenizer, device: torch.device) -> None:
    """In a chunk, a request has none, some or all of the frames, and a new request takes the row of an old one.

    The codes after a request's own frames, and the old request's state, do not change the sound.
    """
    codes = _codes(4, B=2, device=device)
    stream, plain = FusedCodec(codec, 2)(2), CodecStream(codec, 2)
    for memory in stream.state.conv_state + stream.state.kv_window:
        memory.fill_(torch.nan)
    for lengths in ([2, 0], [1, 2]):
        chunk = codes[..., :2].clone()
        for b, n in enumerate(lengths):
            chunk[b, :, n:] = -(1 << 40)
        n = torch.tensor(lengths, device=device)
        expected = plain.decode(chunk, n)
        torch.testing.assert_close(stream.decode(chunk, n), expected, rtol=0, atol=1e-5)
        assert stream.state.past_frames.tolist() == plain.state.past_frames.tolist()
    for one in (stream, plain):
        one.restart(torch.tensor([True, False], device=device))
    torch.testing.assert_close(stream.decode(codes[..., 2:]), plain.decode(codes[..., 2:]), rtol=0, atol=1e-5)


@pytest.mark.interpreter("launches are recorded")
def test_a_chunk_is_launches_and_nothing_else(codec: AudioTokenizer) -> None:
    """A chunk of any length takes 7 launches and 5 per layer, less than a tenth of the reference's operators."""
    stream, codes = FusedCodec(codec, 2)(), _codes(25)
    n_layers = sum(len(block.layers) for block in codec.decoder_blocks if hasattr(block, "layers"))
    stream.decode(codes[..., :1])
    addresses = [t.data_ptr() for t in stream.state.conv_state + stream.state.kv_window]
    for T in (1, 5, 25):
        lengths = torch.tensor([T])
        chunk = codes[..., :T].contiguous()
        with torch.inference_mode(), launches_only(whole=False) as launches:
            stream.chunk(chunk, lengths)
        assert len(launches) == 7 + 5 * n_layers
    assert [t.data_ptr() for t in stream.state.conv_state + stream.state.kv_window] == addresses
    plain = CodecStream(codec)
    with OperatorRecorder() as operators:
        plain.decode(codes[..., :1])
    assert operators.n_kernels > 10 * len(launches)


@pytest.mark.interpreter("launches are recorded")
def test_launch_configs_are_those_of_max_batch(codec: AudioTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's products are prepared for its rows in a frame of `max_batch` requests, whatever the stream has."""
    prepared = set()
    choose = LaunchConfigs.__call__

    def record(self: LaunchConfigs, **asked: Any) -> dict[str, Any]:
        prepared.update({(self.kernel, asked["rows"])} if asked.get("phase") == "codec" else ())
        return choose(self, **asked)

    monkeypatch.setattr(LaunchConfigs, "__call__", record)
    for batch, T in ((1, 1), (3, 2)):
        stream, codes, lengths = FusedCodec(codec, 5)(batch), _codes(T, B=batch), torch.full((batch,), T)
        prepared.clear()
        with torch.inference_mode(), launches_only(whole=False):
            stream.chunk(codes, lengths)
        assert prepared == {(kernel, 5 * rate) for kernel in KERNELS for rate in (1, 2, 4, 8)}


def test_a_new_stream_uses_changed_weights(codec: AudioTokenizer, device: torch.device) -> None:
    mine, codes = copy.deepcopy(codec), _codes(2, device=device)
    fused = FusedCodec(mine, 2)
    before = _in_chunks(fused, codes, [2])
    folded = mine.folded_weights()
    assert mine.folded_weights() is folded  # the weights are folded once
    with torch.no_grad():
        mine.output_proj.conv.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(_in_chunks(fused, codes, [2]), 2 * before)
    mine.load_state_dict(copy.deepcopy(codec).state_dict(), assign=True)
    assert torch.equal(_in_chunks(fused, codes, [2]), before)


def test_behind_generate(tiny_folder: Path, device: torch.device) -> None:
    """generate() of an accelerated model decodes with the fused codec; test_streaming.py tests stream()'s chunks."""
    tts = voxkern.load(tiny_folder, device=device, backend="triton")
    assert isinstance(tts.model.audio_tokenizer.stream(), FusedCodecStream)
    audio = tts.generate("one", seed=4, steps=1, max_frames=2)
    with torch.inference_mode():
        codes = torch.from_numpy(audio.codes).long().unsqueeze(0).to(device)
        expected = tts.model.audio_tokenizer.decode(codes).flatten()
    np.testing.assert_allclose(audio.samples, expected.cpu().numpy(), atol=1e-5)
    voxkern.restore(tts.model)
    assert isinstance(tts.model.audio_tokenizer.stream(), CodecStream)


def test_what_cannot_run_says_so(codec: AudioTokenizer, tiny_params: dict) -> None:
    stream = FusedCodec(codec, 2)(2)
    with pytest.raises(ValueError, match="codes must have 2 requests, as the stream has, got 1"):
        stream.decode(_codes(3))
    with pytest.raises(ValueError, match=r"codes have 26 frames but must have 1\.\.25"):
        stream.decode(_codes(26, B=2))
    with pytest.raises(ValueError, match="codes must be"):
        stream.decode(torch.zeros(2, 36, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch must lie in 1\.\.64, got 65"):
        FusedCodec(codec, 2)(65)
    params = copy.deepcopy(tiny_params)
    params["multimodal"]["audio_tokenizer_args"]["attn_sliding_window_size"] = 32
    with pytest.raises(ValueError, match=r"windows are \[4, 8, 16, 32\], kernels need 1\.\.16"):
        FusedCodec(AudioTokenizer(Config.from_params(params).codec), 2)
