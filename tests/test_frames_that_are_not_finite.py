"""Tests of frames that have NaN or infinity: only their request fails, and the error names the frame's number.

The flow head writes NOT_FINITE in place of such a frame's semantic code. The engine raises an error when it reads this
code.
"""

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import results, tiles_of, with_reference_codec
from plant import entry_of
from poison import guarded_args
from torch import Tensor

import voxkern
from bench.ops import decode_state as decode_state_bench
from bench.ops import flow as flow_bench
from bench.ops import semantic_argmax as argmax_bench
from bench.ops.registry import TensorMaker
from voxkern.audio import Audio
from voxkern.checkpoint import read_checkpoint
from voxkern.engine import runner
from voxkern.engine.fused_runner import DecodeBatch
from voxkern.engine.request import RequestState
from voxkern.kernels import common
from voxkern.packed.model import pack
from voxkern.reference import config
from voxkern.reference.config import NOT_FINITE

VALUES = (math.nan, math.inf, -math.inf)
EACH_VALUE = pytest.mark.parametrize("value", VALUES)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
PACKED = pytest.param("packed", marks=pytest.mark.interpreter("packed weights are for a CPU"))
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", PACKED, "triton"])


def test_kernels_and_reference_use_the_same_special_codes() -> None:
    assert (common.NOT_FINITE.value, common.END_AUDIO.value) == (config.NOT_FINITE, config.END_AUDIO)
    assert min(config.EMPTY_AUDIO, config.END_AUDIO) > config.NOT_FINITE


def argmax_inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of semantic_argmax for 5 requests and 139 codes; code 0 is EMPTY, and 21 rows are padding.

    The first element of each hidden state is 1 or -1 in turn.
    """
    sizes = SimpleNamespace(B=5, rows=160, K=70, N=139, max_batch=20)
    args = argmax_bench.semantic_argmax_inputs(sizes, TensorMaker(dtype, str(device)))
    args["h"][:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    return args


def argmax(args: dict[str, Any], tiles: str) -> list[int]:
    """Run semantic_argmax, check that its reference gives the same codes, and return the codes."""
    with tiles_of(tiles):
        (codes,) = results(entry_of("semantic_argmax"), entry_of("semantic_argmax").op, args)
    assert torch.equal(codes, argmax_bench.semantic_argmax_reference(**args))
    return codes.tolist()  # type: ignore[no-any-return]


@EACH_VALUE
@EACH_DTYPE
def test_a_hidden_state_has_no_code(tiles: str, dtype: torch.dtype, value: float, device: torch.device) -> None:
    args = argmax_inputs(device, dtype)
    expected = argmax(args, tiles)
    for request, element in ((0, 0), (2, 33), (4, 69)):
        h = args["h"].clone()
        h[request, element] = value
        codes = argmax(args | {"h": h}, tiles)
        assert codes[request] == NOT_FINITE
        assert codes[:request] + codes[request + 1 :] == expected[:request] + expected[request + 1 :]


@EACH_VALUE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_logit_anywhere_is_enough(tiles: str, dtype: torch.dtype, value: float, device: torch.device) -> None:
    """The logit is in the first, a middle or the last tile.

    An infinite weight gives logits of both signs, because ``h[:, 0]`` is positive for some requests and not for others.
    """
    args = argmax_inputs(device, dtype)
    for row in (1, 31, 32, 63, 64, 100, 138):
        weight = args["weight"].clone()
        weight[row] = 0.0
        weight[row, 0] = value
        assert argmax(args | {"weight": weight}, tiles) == [NOT_FINITE] * 5


@EACH_VALUE
def test_masked_logits_may_be_anything(tiles: str, value: float, device: torch.device) -> None:
    args = argmax_inputs(device, torch.float32)
    expected = argmax(args, tiles)
    args["weight"][[0, 139, 159]] = value
    assert argmax(args, tiles) == expected
    assert all(1 <= code < 139 for code in expected)


def finish(args: dict[str, Any], tiles: str) -> list[Tensor]:
    """Run flow_finish on guarded copies of its arguments; return codes, embeddings, x and v_last."""
    entry = entry_of("flow_finish")
    with tiles_of(tiles):
        return results(entry, entry.op, guarded_args(args))


@pytest.mark.parametrize("mlp", [0, 1], ids=["transformer", "mlp"])
@EACH_VALUE
def test_latents_mark_the_frame(tiles: str, value: float, mlp: int, device: torch.device) -> None:
    """The flow's state is not finite in the first, a middle or the last codebook; request 1 also generates END."""
    sizes = SimpleNamespace(**(flow_bench.ODD_MLP if mlp else flow_bench.ODD))
    args = flow_bench.flow_finish_inputs(sizes, TensorMaker(device=str(device)))
    expected = finish(args, tiles)
    x = args["x"].clone()
    x[0, 0] = x[1, 17] = x[3, 36] = value
    found = finish(args | {"x": x}, tiles)
    plain = results(entry_of("flow_finish"), flow_bench.flow_finish_reference, guarded_args(args | {"x": x}))
    assert torch.equal(found[0], plain[0])
    assert (found[0][[0, 1, 3], 0] == NOT_FINITE).all()
    assert ((found[0][:, 1:] >= 2) & (found[0][:, 1:] < 23)).all()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[[2, 4]], theirs[[2, 4]])


@pytest.mark.parametrize("mlp", [0, 1], ids=["transformer", "mlp"])
def test_a_network_of_nan_marks_the_frame(tiles: str, mlp: int, device: torch.device) -> None:
    sizes = SimpleNamespace(**(flow_bench.ODD_MLP if mlp else flow_bench.ODD))
    args = flow_bench.flow_finish_inputs(sizes, TensorMaker(device=str(device)))
    args["y"][2, 149] = math.nan
    assert finish(args, tiles)[0][:, 0].tolist() == [9, 1, NOT_FINITE, 12, 13]


@pytest.mark.parametrize("embeddings", [True, False])
def test_a_marked_code_stays_and_is_no_row_of_embeddings(tiles: str, embeddings: bool, device: torch.device) -> None:
    """The memory before the embeddings holds NaN; if row -1 were read, the sum would be NaN."""
    args = flow_bench.flow_finish_inputs(SimpleNamespace(**flow_bench.ODD), TensorMaker(device=str(device)))
    args["semantic"][2] = NOT_FINITE
    codes, next_embedding, *_ = finish(args if embeddings else args | {"embeddings": None}, tiles)
    assert codes[:, 0].tolist() == args["semantic"].tolist()
    assert next_embedding.isfinite().all()


def test_the_decode_state_after_such_a_frame(device: torch.device) -> None:
    """Request 0 continues, 1 is absent, 2 ends with END, and 3 ends at `max_frames`.

    Requests 4 to 7 are the same, but have NOT_FINITE as semantic code.
    """
    entry = entry_of("update_decode_state")
    args = decode_state_bench.update_decode_state_inputs(
        SimpleNamespace(B=8, K=37, max_frames=50), TensorMaker(device=str(device))
    )
    args["codes"][4:, 0] = NOT_FINITE
    expected = results(entry, entry.reference, guarded_args(args))
    found = results(entry, entry.op, guarded_args(args))
    assert all(map(torch.equal, found, expected))
    lengths, n_frames, last_codes, valid = found
    assert valid.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert lengths.tolist() == [6, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(n_frames[4:], args["n_frames"][4:])
    failed = NOT_FINITE - config.N_SPECIAL_CODES
    assert last_codes[:, 0].tolist() == [0, -1, -1, 3, failed, -1, failed, failed]


@pytest.mark.parametrize("head", ["transformer", "mlp"])
@EACH_BACKEND
@EACH_VALUE
def test_heads_mark_the_frame(
    tiny_folder: Path, mlp_folder: Path, device: torch.device, head: str, backend: str, value: float
) -> None:
    """The hidden states of requests 1 and 4 are not finite, and neither is the guidance of request 3."""
    model = read_checkpoint(tiny_folder if head == "transformer" else mlp_folder, device=device).model
    if backend == "triton":
        voxkern.accelerate(model, 5)
    elif backend == "packed":
        pack(model.bfloat16())
    g = torch.Generator().manual_seed(1)
    h, noise = torch.randn(5, 64, generator=g).to(device), torch.randn(5, 36, generator=g).to(device)
    alpha = torch.full((5,), 1.2, device=device)
    with torch.inference_mode():
        expected = model.acoustic_transformer(h, alpha, noise, 2)
        h[1, 63], h[4], alpha[3] = value, value, value
        codes = model.acoustic_transformer(h, alpha, noise, 2)
    assert (codes[[1, 3, 4], 0] == NOT_FINITE).all()
    assert ((codes[:, 1:] >= 2) & (codes[:, 1:] < 23)).all()
    assert torch.equal(codes[[0, 2]], expected[[0, 2]])


ARGUMENTS: dict[str, Any] = {"voice": ["ada", "bob"], "seed": [1, 2], "steps": 1, "max_frames": 3}


def load(folder: Path, device: torch.device, backend: str, fused_codec: bool = False, **arguments: Any) -> voxkern.TTS:
    """Load a model for two requests; the kernels run with the reference codec, unless `fused_codec` is true."""
    tts = voxkern.load(folder, device=device, backend=backend, **({"max_batch": 2} | arguments))
    return tts if fused_codec else with_reference_codec(tts)


def spoil(tts: voxkern.TTS, voice: str, value: float = math.nan) -> None:
    """Write `value` into the last element of a voice's embeddings."""
    with torch.inference_mode():
        tts.voices[voice][-1, -1] = value


def spoil_frame(monkeypatch: pytest.MonkeyPatch, seed: int, frame: int) -> None:
    """Write NaN into the hidden state from which the request with `seed` generates frame `frame`, counted from 1."""
    generate_block, generate_frame = runner.generate_block, DecodeBatch.generate_frame

    def spoilt_block(model: Any, block: list[runner.RunningRequest], *arguments: Any) -> None:
        for r in block:
            if (r.request.seed, r.n_frames) == (seed, frame - 1):
                r.hidden = torch.full_like(r.hidden, math.nan)
        generate_block(model, block, *arguments)

    def spoilt_frame(batch: DecodeBatch) -> runner.FrameOutput:
        batch._hidden[(batch._seeds == seed) & (batch.n_frames == frame - 1)] = math.nan
        return generate_frame(batch)

    monkeypatch.setattr(runner, "generate_block", spoilt_block)
    monkeypatch.setattr(DecodeBatch, "generate_frame", spoilt_frame)


def run_side_by_side(tts: voxkern.TTS) -> list[RequestState]:
    """Run the requests of ARGUMENTS with the texts "a", in slot 0, and "b", in slot 1, until both are finished."""
    streams = [
        tts.stream(text, voice, seed, steps=1, max_frames=3) for text, voice, seed in (("a", "ada", 1), ("b", "bob", 2))
    ]
    states = [tts.engine.submit(stream._requests[0]) for stream in streams]
    tts.engine.run_until(lambda: all(state.finished for state in states))
    return states


def assert_nothing_runs(tts: voxkern.TTS) -> None:
    """Check that no request runs or waits, and that only the cached prefixes of voices hold pages."""
    engine = tts.engine
    prefixes = sum(len(prefix.pages) for prefix in engine.prefix_cache.entries.values())
    assert (engine.n_running, engine.n_waiting) == (0, 0)
    assert engine.runner.kv_cache.n_free == engine.runner.kv_cache.n_pages - prefixes


def assert_same(a: Audio, b: Audio) -> None:
    assert a.codes.shape[1] > 0
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.samples, b.samples)


@pytest.mark.parametrize(
    ("backend", "dtype", "value", "way_out"),
    [
        ("torch", "float32", math.nan, r"dtype float32; check the weights, the voice's embeddings and cfg_alpha"),
        ("torch", "bfloat16", math.inf, r"dtype bfloat16; check the weights"),
        ("torch", "float16", -math.inf, r"dtype float16; try bfloat16 or float32"),
        ("triton", "float16", math.inf, r"dtype float16; try bfloat16 or float32"),
        pytest.param("triton", "float32", math.nan, r"dtype float32; check the weights", marks=pytest.mark.slow),
        pytest.param("triton", "bfloat16", -math.inf, r"dtype bfloat16; check the weights", marks=pytest.mark.slow),
    ],
)
def test_a_request_fails_alone(
    tiny_folder: Path, device: torch.device, backend: str, dtype: str, value: float, way_out: str
) -> None:
    """Of two requests side by side, the one in slot 0 fails at its first frame; the one in slot 1 keeps its bits."""
    tts = load(tiny_folder, device, backend, dtype=dtype)
    _, expected = tts.generate(["a", "b"], **ARGUMENTS)
    spoil(tts, "ada", value)
    with pytest.raises(FloatingPointError, match=rf"frame 1 of the request with seed 1 is not finite: .*\({way_out}"):
        tts.generate(["a", "b"], **ARGUMENTS)
    assert_nothing_runs(tts)
    failing, healthy = run_side_by_side(tts)
    assert isinstance(failing.error, FloatingPointError)
    assert healthy.error is None
    assert_same(healthy.take(), expected)
    assert_nothing_runs(tts)
    assert_same(tts.generate("b", "bob", 2, steps=1, max_frames=3), expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_request_beside_the_failing_one_keeps_its_bits(
    tiny_folder: Path, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream begins before the failing call and runs beside it; with "triton", the codec is fused too."""
    tts = load(tiny_folder, device, backend, fused_codec=True)
    expected = tts.generate("b", "bob", 2, steps=1, max_frames=3)
    assert expected.codes.shape[1] == 3
    stream = tts.stream("b", "bob", 2, steps=1, max_frames=3)
    chunks = [next(stream)]
    spoil_frame(monkeypatch, seed=1, frame=2)
    with pytest.raises(FloatingPointError, match="frame 2 of the request with seed 1 is not finite"):
        tts.generate("a", "ada", 1, steps=1, max_frames=3)
    chunks += list(stream)
    assert_same(Audio.join(chunks), expected)
    assert_nothing_runs(tts)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_later_frame_is_counted_from_1(
    tiny_folder: Path, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tts = load(tiny_folder, device, backend)
    arguments = {**ARGUMENTS, "max_frames": 4}
    expected = tts.generate(["a", "b"], **arguments)
    assert all(audio.codes.shape[1] == 4 for audio in expected)
    with monkeypatch.context() as context:
        spoil_frame(context, seed=2, frame=3)
        with pytest.raises(FloatingPointError, match="frame 3 of the request with seed 2"):
            tts.generate(["a", "b"], **arguments)
        assert_nothing_runs(tts)
        assert_same(tts.generate("a", "ada", 1, steps=1, max_frames=4), expected[0])
    for mine, theirs in zip(tts.generate(["a", "b"], **arguments), expected, strict=True):
        assert_same(mine, theirs)


@EACH_BACKEND
@pytest.mark.parametrize("head", ["transformer", "mlp"])
def test_latents_alone_fail_a_request(
    tiny_folder: Path, mlp_folder: Path, device: torch.device, backend: str, head: str
) -> None:
    """A guidance of 3e38 overflows in the velocity; hidden state and logits are finite."""
    tts = load(tiny_folder if head == "transformer" else mlp_folder, device, backend)
    with pytest.raises(FloatingPointError, match="frame 1 of the request with seed 2"):
        tts.generate(["a", "b"], **ARGUMENTS, cfg_alpha=[1.2, 3e38])
    assert_nothing_runs(tts)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_stream_delivers_the_frames_before_the_error(
    tiny_folder: Path, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is in frame 5, so the chunks have 1, 2 and 1 frames; the last one is cut short."""
    tts = load(tiny_folder, device, backend)
    expected = tts.generate("a", "ada", 1, steps=1, max_frames=4)
    assert expected.codes.shape[1] == 4
    spoil_frame(monkeypatch, seed=1, frame=5)
    stream = tts.stream("a", "ada", 1, steps=1, max_frames=9)
    chunks = [next(stream) for _ in range(3)]
    assert [chunk.codes.shape[1] for chunk in chunks] == [1, 2, 1]
    assert not chunks[-1].ended
    assert_same(Audio.join(chunks), expected)
    with pytest.raises(FloatingPointError, match="frame 5 of"):
        next(stream)
    assert next(stream, None) is None
    assert_nothing_runs(tts)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_submit_raises_in_the_iteration(
    tiny_folder: Path, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing request and another one run side by side in one event loop."""
    tts = load(tiny_folder, device, backend)
    expected = tts.generate("b", "bob", 2, steps=1, max_frames=4)
    spoil_frame(monkeypatch, seed=1, frame=3)

    async def iterate(text: str, voice: str, seed: int, chunks: list[Audio]) -> None:
        async for chunk in await tts.submit(text, voice, seed, steps=1, max_frames=4):
            chunks.append(chunk)

    async def both() -> list[Any]:
        calls = iterate("a", "ada", 1, failing), iterate("b", "bob", 2, healthy)
        return await asyncio.gather(*calls, return_exceptions=True)

    failing: list[Audio] = []
    healthy: list[Audio] = []
    error, none = asyncio.run(both())
    assert isinstance(error, FloatingPointError)
    assert "frame 3 of the request with seed 1" in str(error)
    assert none is None
    assert sum(chunk.codes.shape[1] for chunk in failing) == 2
    assert_same(Audio.join(healthy), expected)
    assert_nothing_runs(tts)


def text_that_ends_at_once(tts: voxkern.TTS) -> str:
    """Return a text that ends without a frame; the first semantic code depends on the text, not on the seed."""
    return next(x for n in range(1, 500) if not tts.generate(x := "x" * n, "ada", steps=1, max_frames=1).codes.size)


@pytest.mark.slow
def test_a_failed_slot_serves_other_requests(
    tiny_folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request in slot 0 has other steps, so it runs in another batch.

    The old batch still computes its row 0, but that row's result is dropped.
    """
    tts = load(tiny_folder, device, "triton")
    arguments = {"voice": "bob", "seed": [1, 2], "max_frames": 3}
    expected = [tts.generate(["a", "b"], steps=steps, **arguments) for steps in (1, 2)]
    with monkeypatch.context() as context:
        spoil_frame(context, seed=1, frame=2)
        with pytest.raises(FloatingPointError, match="frame 2 of"):
            tts.generate("a", "bob", 1, steps=2, max_frames=3)
    streams = [tts.stream(text, "bob", seed, steps=seed, max_frames=3) for text, seed in (("a", 1), ("b", 2))]
    chunks = [[next(stream)] for stream in streams]  # two batches run side by side
    for of_stream, stream in zip(chunks, streams, strict=True):
        of_stream += list(stream)
    assert_same(Audio.join(chunks[0]), expected[0][0])
    assert_same(Audio.join(chunks[1]), expected[1][1])
    assert_nothing_runs(tts)


def test_two_batches_side_by_side_with_a_failing_request(
    tiny_folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tts = load(tiny_folder, device, "triton")
    expected = tts.generate("b", "bob", 2, steps=2, max_frames=4)
    spoil_frame(monkeypatch, seed=1, frame=2)
    healthy = tts.stream("b", "bob", 2, steps=2, max_frames=4)
    chunks = [next(healthy)]
    with pytest.raises(FloatingPointError, match="frame 2 of the request with seed 1"):
        tts.generate("a", "ada", 1, steps=1, max_frames=4)
    assert_same(Audio.join([*chunks, *healthy]), expected)
    assert_nothing_runs(tts)


@EACH_BACKEND
def test_end_in_a_failed_slot_is_an_end(tiny_folder: Path, device: torch.device, backend: str) -> None:
    tts = load(tiny_folder, device, backend, max_batch=1)
    text = text_that_ends_at_once(load(tiny_folder, device, "torch", max_batch=1))
    spoil(tts, "bob")
    with pytest.raises(FloatingPointError, match="frame 1 of"):
        tts.generate("b", "bob", 2, steps=1)
    audio = tts.generate(text, "ada", steps=1)
    assert audio.ended
    assert not len(audio.samples)


def test_replayed_graphs_fail_a_request_alone(tiny_folder: Path, gpu: torch.device) -> None:
    """The failed request leaves NaN in row 0. The graph of two rows is still replayed, and computes row 0 too."""
    tts = load(tiny_folder, gpu, "triton")
    _, expected = tts.generate(["a", "b"], **ARGUMENTS)
    spoil(tts, "ada")
    failing, healthy = run_side_by_side(tts)
    assert isinstance(failing.error, FloatingPointError)
    assert_same(healthy.take(), expected)


def test_a_server_gets_end_instead(tiny_folder: Path, device: torch.device) -> None:
    """A server has no code NOT_FINITE, so such a frame gets END; the acoustic codes of all requests stay in range."""
    from test_server_heads import SGLangHead

    server = SGLangHead(read_checkpoint(tiny_folder, device=device).model.acoustic_transformer).to(device)
    voxkern.accelerate(server, 2)
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    noise = torch.randn(3, 36, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        expected = server(h, noise=noise)
        h[1] = math.nan
        codes = server(h, noise=noise)
    assert codes[1, 0] == config.END_AUDIO
    assert torch.equal(codes[[0, 2]], expected[[0, 2]])
    assert ((codes[:, 1:] >= 2) & (codes[:, 1:] < 23)).all()
