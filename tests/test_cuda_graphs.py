"""Tests of frames as CUDA graphs, on a GPU or on its stand-in (bench/static/stand_in_gpu.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import with_reference_codec
from torch import Tensor

import voxkern
from bench.static.stand_in_gpu import StandInGPU
from voxkern.engine.cuda_graphs import BatchGraphs, CudaCapture, weight_addresses

TEXTS = ["one two", "three", "four"]
counted = pytest.mark.interpreter("the stand-in counts graphs and replays")


def load(folder: Path, **arguments: Any) -> voxkern.TTS:
    """Load a model on a GPU and on kernels, but with the reference codec, because the fused codec is slow here."""
    return with_reference_codec(voxkern.load(folder, device="cuda", backend="triton", **arguments))


def assert_same(ours: list[voxkern.Audio], theirs: list[voxkern.Audio]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.codes.shape[1] > 0
        assert (a.codes == b.codes).all()
        assert (a.samples == b.samples).all()


@pytest.mark.parametrize(
    ("head", "steps", "solver"),
    [
        ("transformer", 2, "ab2"),
        pytest.param("mlp", 2, "euler", marks=pytest.mark.slow),
        pytest.param("transformer", 7, "euler", marks=pytest.mark.only_gpu),
        pytest.param("mlp", 4, "ab2", marks=pytest.mark.only_gpu),
    ],
)  # fmt: skip
def test_replayed_graphs_equal_launches(
    tiny_folder: Path,
    mlp_folder: Path,
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    steps: int,
    solver: str,
) -> None:
    """The graph of four rows runs full, and later with a free row that held a request; one request runs alone."""
    rows, replay = list[int](), BatchGraphs.__call__
    monkeypatch.setattr(BatchGraphs, "__call__", lambda self, n: (rows.append(n), replay(self, n))[1])
    folder = mlp_folder if head == "mlp" else tiny_folder
    plain, replayed = (load(folder, max_batch=5, graphs=graphs) for graphs in (False, True))
    for limits in ([3, 1, 1, 1], [1, 1, 1]):
        n, seeds = len(limits), list(range(len(limits)))
        arguments: dict[str, Any] = {"steps": steps, "solver": solver, "max_frames": limits, "seed": seeds}
        expected, found = (tts.generate([*TEXTS, "one"][:n], **arguments) for tts in (plain, replayed))
        assert_same(found, expected)
        assert [audio.codes.shape[1] for audio in expected] == limits
    # The host reads a first frame at once, and other frames after the next launch. So one replay of a row is surplus.
    assert rows == [4, 1, 1, 1, 3]


def test_the_codecs_launches_are_in_the_frames_graph(tiny_folder: Path, gpu: torch.device) -> None:
    """The second call has a new request in the same slot, so the codec's state must be reset."""
    plain, replayed = (
        voxkern.load(tiny_folder, device=gpu, backend="triton", graphs=graphs) for graphs in (False, True)
    )
    for n_frames in ([2], [1]):
        arguments: dict[str, Any] = {"steps": 1, "max_frames": n_frames, "seed": n_frames}
        expected, found = (tts.generate(TEXTS[: len(n_frames)], **arguments) for tts in (plain, replayed))
        assert_same(found, expected)
        assert expected[0].samples.any()


@counted
def test_a_frame_is_one_replay(tiny_folder: Path, stand_in: StandInGPU) -> None:
    tts = voxkern.load(tiny_folder, device="cuda", backend="triton")
    stand_in.computes = False
    stand_in.n_replays = 0
    tts.generate("one", steps=2, max_frames=1)
    assert (stand_in.n_graphs, stand_in.n_replays) == (1, 1)


@pytest.mark.slow
@counted
def test_requests_with_other_steps_run_beside(tiny_folder: Path, stand_in: StandInGPU) -> None:
    """Each pair of steps and solver has graphs of its own, and decodes its own frames with the fused codec."""
    tts = voxkern.load(tiny_folder, device="cuda", backend="triton", max_batch=2)
    expected = [tts.generate("one", steps=steps, max_frames=3, seed=steps) for steps in (1, 2)]
    tts = voxkern.load(tiny_folder, device="cuda", backend="triton", max_batch=2)
    first, second = (tts.stream("one", steps=steps, max_frames=3, seed=steps)._requests[0] for steps in (1, 2))
    states = [tts.engine.submit(first)]
    tts.engine.run_until(lambda: states[0].n_frames == 1)
    states.append(tts.engine.submit(second))  # its graphs are captured while the first request is in the middle
    tts.engine.run_until(lambda: all(state.finished for state in states))
    assert_same([state.take() for state in states], expected)
    assert stand_in.n_graphs == 2 * 2 * 2


@counted
def test_nothing_is_captured_again(tiny_folder: Path, stand_in: StandInGPU) -> None:
    tts = load(tiny_folder)
    for steps in (2, 3, 2, 3):
        tts.generate("one", steps=steps, max_frames=1, seed=1)
    assert stand_in.n_graphs == 2


@pytest.mark.parametrize("where", ["written over", "moved"])
def test_new_weights(tiny_folder: Path, gpu: torch.device, where: str) -> None:
    """Weights that are written in place keep their addresses, and so do the tables made from weights.

    The graphs therefore stay valid. When weights move to other addresses, all graphs are captured again.
    """
    tts, other = (load(tiny_folder, graphs=graphs) for graphs in (True, False))
    tts.generate("one", steps=1, max_frames=2, seed=1)
    state = {name: -tensor if "acoustic" in name else tensor.clone() for name, tensor in tts.model.state_dict().items()}
    for one in (tts, other):
        one.model.load_state_dict(state, assign=where == "moved")
        one.model.requires_grad_(False)
    assert_same(*([one.generate("one", steps=1, max_frames=2, seed=1)] for one in (tts, other)))


@counted
@pytest.mark.parametrize(("what", "n_graphs"), [("written over", 1), ("moved", 2), ("the codec's", 2)])
def test_new_weights_are_captured_only_if_memory_was_replaced(
    tiny_folder: Path, stand_in: StandInGPU, what: str, n_graphs: int
) -> None:
    tts = voxkern.load(tiny_folder, device="cuda", backend="triton")
    stand_in.computes = False
    tts.generate("one", steps=1, max_frames=1)
    assert stand_in.n_graphs == 1
    if what == "the codec's":  # a convolution's weight norm is folded in, so the codec's streams are made again
        with torch.no_grad():
            tts.model.audio_tokenizer.output_proj.conv.parametrizations.weight.original0.mul_(2)
    else:
        state = tts.model.state_dict()
        state = {name: tensor.clone() for name, tensor in state.items() if not name.startswith("audio_tokenizer")}
        tts.model.load_state_dict(state, assign=what == "moved", strict=False)
        tts.model.requires_grad_(False)
    tts.generate("one", steps=1, max_frames=1)
    assert stand_in.n_graphs == n_graphs


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, (1,)), (3, (1, 2, 3)), (32, (1, 2, 4, 8, 16, 32)), (48, (1, 2, 4, 8, 16, 32, 48))]
)
def test_the_smallest_that_fits(n: int, sizes: tuple[int, ...]) -> None:
    captured: list[int] = []
    replayed: list[int] = []

    def capture(run: Callable[[], int]) -> tuple[Callable[[], object], int]:
        captured.append(size := run())
        return lambda: replayed.append(size), size

    graphs = BatchGraphs(lambda rows: rows, n, capture)
    assert graphs.sizes == sizes
    assert tuple(captured) == sizes[::-1]  # the largest first
    for rows in range(1, n + 1):
        size = graphs(rows)
        assert size == replayed[-1] == min(s for s in sizes if s >= rows)


def test_addresses() -> None:
    module = torch.nn.Linear(3, 3).requires_grad_(False)
    known = weight_addresses(module)
    module.weight.add_(1)
    assert weight_addresses(module) == known
    module.weight = torch.nn.Parameter(module.weight.clone())
    assert weight_addresses(module) != known


def test_a_capture(gpu: torch.device) -> None:
    x = torch.zeros(3, device=gpu)

    def work() -> Tensor:
        x.add_(1)
        return x

    replay, made = CudaCapture(x.device)(work)
    assert made is x
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1)
