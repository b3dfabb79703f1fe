"""Tests of the streaming decoder: its sound is that of decoding whole, its state and work per frame are constant."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from voxkern.random_checkpoint import public_params
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.codec import AudioTokenizer
from voxkern.reference.codec_stream import CodecStream


class OperatorRecorder(TorchDispatchMode):
    """Records every PyTorch operator that runs, with the shapes of its tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))

    @property
    def n_kernels(self) -> int:
        """Number of recorded operators that would start a kernel on a GPU: all but the views."""
        return sum(not func.is_view for func, *_ in self.seen)


def _codes(T: int, B: int = 1, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    semantic = torch.randint(0, 62, (B, 1, T), generator=g)
    return torch.cat((semantic, torch.randint(0, 21, (B, 36, T), generator=g)), dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [1, 3, 25])
def test_in_chunks_equals_whole(tiny_model: VoxtralTTS, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    codec = copy.deepcopy(tiny_model.audio_tokenizer).to(dtype)
    codes = _codes(60)  # nearly three times the 21 past frames that affect a frame
    with torch.inference_mode():
        whole = codec.decode(codes)
    stream = CodecStream(codec)
    parts = torch.cat([stream.decode(part) for part in codes.split(chunk, dim=2)], dim=2)
    assert parts.dtype == whole.dtype
    assert whole.square().mean().sqrt() > 0.1
    torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance)


def test_bf16_is_as_near_as_decoding_whole(tiny_model: VoxtralTTS) -> None:
    codes = _codes(40)
    codec = copy.deepcopy(tiny_model.audio_tokenizer).bfloat16()
    stream = CodecStream(codec)
    with torch.inference_mode():
        exact = copy.deepcopy(codec).double().decode(codes)
        whole = codec.decode(codes)
        parts = torch.cat([stream.decode(part) for part in codes.split(1, dim=2)], dim=2)
    assert parts.dtype == torch.float32
    assert (parts - exact).square().mean() < 1.5 * (whole - exact).square().mean()


def test_work_and_state_do_not_grow(tiny_model: VoxtralTTS) -> None:
    stream = CodecStream(tiny_model.audio_tokenizer)
    addresses, nbytes, seen = [t.data_ptr() for t in stream.state.conv_state + stream.state.kv_window], [], []
    for code in _codes(30).split(1, dim=2):
        with OperatorRecorder() as operators:
            stream.decode(code)
        seen.append(operators.seen)
        nbytes.append(stream.state.nbytes)
    assert all(frame == seen[0] for frame in seen)  # the same operators and shapes in all frames, also from frame 22 on
    assert len(seen[0]) > 100
    assert len(set(nbytes)) == 1
    assert [t.data_ptr() for t in stream.state.conv_state + stream.state.kv_window] == addresses


def test_state_of_the_public_model() -> None:
    """The state of a request is 278 kB in bf16.

    It holds 2 latents, 1 row before each of 3 transposed convolutions, and 6 rows in fp32 before the last convolution.
    The windows of keys and values have 2, 4, 8 and 16 rows, in 2 layers each.
    """
    with torch.device("meta"):
        codec = AudioTokenizer(Config.from_params(public_params()).codec).bfloat16()
        state = CodecStream(codec).state
    assert [tuple(t.shape) for t in state.conv_state] == [(1, 2, 292), *[(1, 1, 1024)] * 3, (1, 6, 1024)]
    assert [r.shape[2] for r in state.kv_window] == [2, 2, 4, 4, 8, 8, 16, 16]
    window_bytes = 2 * (2 + 4 + 8 + 16) * 2 * 1024 * 2
    assert state.nbytes == window_bytes + (2 * 292 + 3 * 1024) * 2 + 6 * 1024 * 4 + 8


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_requests_of_different_lengths(tiny_model: VoxtralTTS, new_frames: list[tuple[int, int, int]]) -> None:
    """Three requests are decoded in chunks of 4, each with its own number of frames in each chunk, 0..4."""
    codec, stream = tiny_model.audio_tokenizer, CodecStream(tiny_model.audio_tokenizer, 3)
    totals = torch.tensor(new_frames).sum(0)
    codes = _codes(int(totals.max()) + 1, B=3)
    done, parts = [0, 0, 0], [[], [], []]
    for row in new_frames:
        chunk = torch.full((3, 37, 4), -7)  # -7 is no code: codes after a request's own frames are ignored
        for b, n in enumerate(row):
            chunk[b, :, :n] = codes[b, :, done[b] : done[b] + n]
        sound = stream.decode(chunk, torch.tensor(row)).view(3, 4, 1920)
        for b, n in enumerate(row):
            parts[b].append(sound[b, :n].flatten())
            assert not sound[b, n:].any()
            done[b] += n
    for b, total in enumerate(totals.tolist()):
        if total:
            with torch.inference_mode():
                whole = codec.decode(codes[b : b + 1, :, :total]).flatten()
            torch.testing.assert_close(torch.cat(parts[b]), whole, rtol=0, atol=1e-5)


def test_a_restarted_row_ignores_its_old_state(tiny_model: VoxtralTTS) -> None:
    """A new request gives the sound of a new stream, even if the last request left NaN in its row of the state."""
    codec, stream = tiny_model.audio_tokenizer, CodecStream(tiny_model.audio_tokenizer, 2)
    codes = _codes(9, B=2)
    with torch.inference_mode():
        stream.decode(codes[..., :5])
        for memory in stream.state.conv_state:
            memory[1] = torch.nan
        for memory in stream.state.kv_window:
            memory[:, 1] = torch.nan
        stream.restart(torch.tensor([False, True]))
        assert stream.state.past_frames.tolist() == [5, 0]
        sound = stream.decode(torch.stack((codes[0, :, 5:], codes[1, :, :4])))
        torch.testing.assert_close(sound[:1], codec.decode(codes[:1])[..., 5 * 1920 :], rtol=0, atol=1e-5)
        torch.testing.assert_close(sound[1:], codec.decode(codes[1:, :, :4]), rtol=0, atol=1e-5)


def test_batch_size_and_shapes_are_checked(tiny_model: VoxtralTTS) -> None:
    stream = CodecStream(tiny_model.audio_tokenizer, 2)
    with pytest.raises(ValueError, match="codes must have 2 requests, as the stream has, got 1"):
        stream.decode(_codes(3))
    with pytest.raises(ValueError, match=r"new_frames must be \[2\], one number for each request, got \[1\]"):
        stream.decode(_codes(3, B=2), torch.tensor([3]))
    with pytest.raises(ValueError, match="codes must be"):
        stream.decode(torch.zeros(2, 36, 1, dtype=torch.long))


def test_a_frame_of_too_few_rows_cannot_stream(tiny_params: dict) -> None:
    params = copy.deepcopy(tiny_params)
    tokenizer = params["multimodal"]["audio_tokenizer_args"]
    tokenizer |= {"encoder_convs_strides_str": "2,2,1,1", "decoder_convs_strides_str": "1,2,2,1"}
    params["multimodal"]["audio_model_args"]["audio_encoding_args"] |= {"frame_rate": 25.0}
    with pytest.raises(ValueError, match="a frame has 4 rows but must have more than 6"):
        CodecStream(AudioTokenizer(Config.from_params(params).codec))
