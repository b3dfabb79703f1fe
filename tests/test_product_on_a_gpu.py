"""Tests of the whole product on a GPU, or on its stand-in (bench/static/stand_in_gpu.py).

The sounds must be those of the CPU. On kernels, the codes and samples of the stand-in are equal to the CPU's. With
PyTorch, the samples may differ in their last bits, because these depend on the addresses of the weights.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from checks import with_reference_codec

import voxkern
from bench.micro.host import host_work
from voxkern.audio import Audio
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint

LONG = "one two three. four five six."
ARGUMENTS: dict[str, Any] = {"steps": 2, "max_frames": 2, "seed": 3}
BOTH_BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
Speak = Callable[[voxkern.TTS], list[Audio]]


def load(folder: Path, device: torch.device | str, backend: str, **arguments: Any) -> voxkern.TTS:
    """Load a model that decodes with the reference codec, because the fused codec is slow in the interpreter."""
    return with_reference_codec(voxkern.load(folder, device=device, backend=backend, **({"max_batch": 2} | arguments)))


def assert_same(found: list[Audio], expected: list[Audio], exact: bool) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.codes.shape[1] > 0
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_allclose(one.samples, other.samples, rtol=0, atol=0 if exact else 1e-5)


def check(request: pytest.FixtureRequest, folder: Path, backend: str, speak: Speak) -> voxkern.TTS:
    """Check that a model speaks on a GPU as on the CPU, and return the model on the GPU."""
    expected = None
    if request.getfixturevalue("device").type == "cpu":  # with a real GPU, no kernel is interpreted
        # this is done before the stand-in GPU is installed, because kernels refuse CPU tensors afterwards
        expected = speak(load(folder, "cpu", backend))
    tts = load(folder, request.getfixturevalue("gpu"), backend)
    assert all(tensor.is_cuda for tensor in tts.model.state_dict().values())
    found = speak(tts)
    assert_same(found, expected or found, exact=backend == "triton")
    return tts


@BOTH_BACKENDS
def test_generate(request: pytest.FixtureRequest, tiny_folder: Path, device: torch.device, backend: str) -> None:
    voices = {"voice": ["ada", "bob"]}
    check(request, tiny_folder, backend, lambda tts: tts.generate(["one two", "three"], **voices, **ARGUMENTS))


@BOTH_BACKENDS
def test_stream(tiny_folder: Path, gpu: torch.device, backend: str) -> None:
    tts = load(tiny_folder, gpu, backend)
    arguments = ARGUMENTS | {"max_frames": 4}
    chunks = list(tts.stream("one", **arguments))
    assert [chunk.codes.shape[1] for chunk in chunks] == [1, 2, 1]
    assert_same([Audio.join(chunks)], [tts.generate("one", **arguments)], exact=True)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_submit(tiny_folder: Path, gpu: torch.device, backend: str) -> None:
    tts = load(tiny_folder, gpu, backend)

    async def one(seed: int) -> Audio:
        return Audio.join([chunk async for chunk in await tts.submit("one", **ARGUMENTS | {"seed": seed})])

    async def both() -> list[Audio]:
        return await asyncio.gather(one(1), one(2))

    found = asyncio.run(both())
    assert_same(found, tts.generate(["one", "one"], **ARGUMENTS | {"seed": [1, 2]}), exact=True)


def test_threads(tiny_folder: Path, gpu: torch.device) -> None:
    tts = load(tiny_folder, gpu, "triton")

    def speak(seed: int) -> Audio:
        return tts.generate("one", **ARGUMENTS | {"seed": seed})

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(speak, (1, 2)))
    assert_same(found, [speak(seed) for seed in (1, 2)], exact=True)


@BOTH_BACKENDS
def test_add_voice(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path, device: torch.device, backend: str
) -> None:
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(26_000) / 24_000).astype(np.float32)
    soundfile.write(tmp_path / "eve.wav", tone, 24_000, subtype="FLOAT")
    embeddings = torch.linspace(-1, 1, 5 * 64).view(5, 64)

    def speak(tts: voxkern.TTS) -> list[Audio]:
        tts.add_voice("eve", tmp_path / "eve.wav")
        tts.add_voice("dan", embeddings)
        return tts.generate(["one", "one"], voice=["eve", "dan"], **ARGUMENTS)

    tts = check(request, tiny_folder, backend, speak)
    assert all(voice.is_cuda for voice in tts.voices.values())


def test_long_text(request: pytest.FixtureRequest, tiny_folder: Path, device: torch.device) -> None:
    check(request, tiny_folder, "torch", lambda tts: [tts.generate(LONG, max_chars=16, **ARGUMENTS)])


@BOTH_BACKENDS
def test_experts(request: pytest.FixtureRequest, tmp_path: Path, device: torch.device, backend: str) -> None:
    folder = make_checkpoint(tmp_path, dtype=torch.float32, overrides={"moe": TINY_MOE})
    check(request, folder, backend, lambda tts: [tts.generate("one", **ARGUMENTS)])


@BOTH_BACKENDS
def test_mlp_head(request: pytest.FixtureRequest, mlp_folder: Path, device: torch.device, backend: str) -> None:
    check(request, mlp_folder, backend, lambda tts: tts.generate(["one", "two"], **ARGUMENTS))


def test_accelerated_and_restored(tiny_folder: Path, gpu: torch.device) -> None:
    tts = load(tiny_folder, gpu, "torch", max_batch=1)
    plain = tts.generate("one", **ARGUMENTS)
    voxkern.accelerate(tts.model)
    assert tts.backend == "triton"
    accelerated = with_reference_codec(tts).generate("one", **ARGUMENTS)
    assert accelerated.codes.shape == plain.codes.shape
    assert (abs(accelerated.codes[1:] - plain.codes[1:]) <= 1).all()  # a code may fall on the other side of an edge
    voxkern.restore(tts.model)
    assert_same([tts.generate("one", **ARGUMENTS)], [plain], exact=True)


def test_a_model_that_is_moved(tiny_folder: Path, gpu: torch.device) -> None:
    tts = load(tiny_folder, "cpu", "torch")
    before = tts.generate("one", **ARGUMENTS)
    for device in (gpu, torch.device("cpu"), gpu):
        tts.model.to(device)
        assert_same([tts.generate("one", **ARGUMENTS)], [before], exact=False)
        assert tts.model.norm.weight.device == device


@pytest.mark.interpreter("the host's work is counted on the stand-in")
@pytest.mark.parametrize("batch", [1, 8])
def test_the_hosts_work_for_a_frame(tiny_folder: Path, batch: int) -> None:
    """The host replays one graph, starts three copies to pinned memory, and waits for those of the frame before."""
    work = host_work(tiny_folder, batch, frames=3)
    assert dict(work.operators) == {"aten.copy_.default": 3}
    assert dict(work.waits) == {"Event.synchronize": 1}
    assert work.replays == 1
