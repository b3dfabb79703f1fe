"""Tests of frames as CUDA graphs.

On a CPU, a fake capture records the interpreter's launches with their addresses and numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import voxkern
from bench.static.counters import launches_only
from voxkern.engine.codec_runner import CodecRunner
from voxkern.engine.cuda_graphs import BatchGraphs, CudaCapture, weight_addresses
from voxkern.engine.runner import FrameOutput

TEXTS = ["one two", "three", "four"]
ARGUMENTS: dict[str, Any] = {"steps": 2, "max_frames": [2, 4, 1], "seed": [1, 2, 3]}
LAUNCH = GridExecutor.__call__
recorded = pytest.mark.interpreter("graphs are recorded launches of the interpreter")


class Recording:
    """Captures by recording launches instead of running them; any other operation in a capture raises."""

    def __init__(self) -> None:
        self.n_graphs = self.n_replays = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        run()
        launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        def record(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            launches.append((executor, args, kwargs))

        with launches_only(), mock.patch.object(GridExecutor, "__call__", record):
            made = run()
        self.n_graphs += 1

        def replay() -> None:
            self.n_replays += 1
            for executor, args, kwargs in launches:
                LAUNCH(executor, *args, **kwargs)

        return replay, made


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Return the :class:`Recording` with which models that are loaded afterwards capture their graphs."""
    capture = Recording()
    monkeypatch.setattr("voxkern.engine.make.capture_for", lambda device: capture)
    return capture


def load(folder: Path, **arguments: Any) -> voxkern.TTS:
    """Load a model on kernels, but with the reference codec.

    The fused codec would take most of the time in the interpreter; test_the_codec_has_a_graph_of_its_own runs it.
    """
    tts = voxkern.load(folder, backend="triton", **arguments)
    del vars(tts.model.audio_tokenizer)["stream"]
    return tts


def assert_same(ours: list[voxkern.Audio], theirs: list[voxkern.Audio]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.codes.shape[1] > 0
        assert (a.codes == b.codes).all()
        assert (a.samples == b.samples).all()


@recorded
def test_replayed_graphs_equal_launches(tiny_folder: Path, recording: Recording) -> None:
    """Three requests run in two slots, so that frames have 1 or 2 rows."""
    plain = load(tiny_folder, max_batch=2, graphs=False).generate(TEXTS, solver="ab2", **ARGUMENTS)
    assert recording.n_graphs == 0
    tts = load(tiny_folder, max_batch=2)
    assert_same(tts.generate(TEXTS, solver="ab2", **ARGUMENTS), plain)
    assert recording.n_graphs == 2
    replays = recording.n_replays
    assert_same(tts.generate(TEXTS, solver="ab2", **ARGUMENTS), plain)
    assert recording.n_graphs == 2  # nothing is captured again
    assert recording.n_replays == 2 * replays


@recorded
def test_padded_rows_do_not_change_the_others(
    tiny_folder: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests run in the graph of four rows; the fourth row held another request before."""
    rows: list[int] = []
    replay = BatchGraphs.__call__
    monkeypatch.setattr(BatchGraphs, "__call__", lambda self, n: (rows.append(n), replay(self, n))[1])
    arguments: dict[str, Any] = {"steps": 1, "max_frames": [3, 3, 3, 1, 1], "seed": [1, 2, 3, 4, 5]}
    plain = load(tiny_folder, max_batch=5, graphs=False).generate(["one"] * 5, **arguments)
    assert_same(load(tiny_folder, max_batch=5).generate(["one"] * 5, **arguments), plain)
    assert 3 in rows
    assert 4 not in rows


@recorded
def test_the_codec_has_a_graph_of_its_own(tiny_folder: Path, recording: Recording) -> None:
    """A frame of two requests is decoded. Then the streams are restarted, and a frame of one request is decoded."""
    plain, model = (voxkern.load(tiny_folder, backend="triton", max_batch=2).model for _ in range(2))
    codecs = CodecRunner(plain, 2), CodecRunner(model, 2, recording)
    assert recording.n_graphs == 1
    codes = torch.randint(2, 20, (2, 2, 37), generator=torch.Generator().manual_seed(1))
    for frame, valid in zip(codes, ([1, 1], [1, 0]), strict=True):
        expected, found = (codec.decode(FrameOutput(frame, torch.tensor(valid)), [0, 1]) for codec in codecs)
        assert torch.equal(found, expected)
        assert found[0].any()
        for codec in codecs:
            codec.refresh_weights()
    assert recording.n_graphs == 1


@recorded
def test_the_other_head(mlp_folder: Path, recording: Recording) -> None:
    arguments = {"steps": 2, "max_frames": 2, "seed": [1, 2]}
    plain = load(mlp_folder, max_batch=2, graphs=False).generate(TEXTS[:2], **arguments)
    assert_same(load(mlp_folder, max_batch=2).generate(TEXTS[:2], **arguments), plain)
    assert recording.n_replays > 0


@recorded
@pytest.mark.parametrize("where", ["written over", "moved"])
def test_new_weights(tiny_folder: Path, recording: Recording, where: str) -> None:
    """Weights that are written in place keep their addresses, and so do the tables made from weights.

    The graphs therefore stay valid. When weights move to other addresses, all graphs are captured again.
    """
    tts = load(tiny_folder)
    tts.generate("one", steps=2, max_frames=2, seed=1)
    model, n_graphs = tts.model, recording.n_graphs
    state = {name: -tensor if "acoustic" in name else tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=where == "moved")
    model.requires_grad_(False)
    again = tts.generate("one", steps=2, max_frames=2, seed=1)
    assert recording.n_graphs == (n_graphs if where == "written over" else 2 * n_graphs)
    other = load(tiny_folder, graphs=False)
    other.model.load_state_dict(state, assign=where == "moved")  # a CPU's products may depend on weights' addresses
    assert_same([again], [other.generate("one", steps=2, max_frames=2, seed=1)])


@recorded
def test_another_number_of_steps_is_captured_beside(tiny_folder: Path, recording: Recording) -> None:
    tts = load(tiny_folder)
    for steps in (2, 3, 2, 3):
        tts.generate("one", steps=steps, max_frames=1, seed=1)
    assert recording.n_graphs == 2


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


@recorded
def test_what_is_no_launch_is_caught() -> None:
    with pytest.raises(RuntimeError, match="inside a frame"):
        BatchGraphs(lambda rows: torch.zeros(rows), 2, Recording())


def test_addresses() -> None:
    module = torch.nn.Linear(3, 3).requires_grad_(False)
    known = weight_addresses(module)
    module.weight.add_(1)
    assert weight_addresses(module) == known
    module.weight = torch.nn.Parameter(module.weight.clone())
    assert weight_addresses(module) != known


@pytest.mark.only_gpu
@pytest.mark.parametrize("head", ["transformer", "mlp"])
@pytest.mark.parametrize(("steps", "solver"), [(7, "euler"), (4, "ab2")])
def test_graphs_on_a_gpu_equal_launches(
    tiny_folder: Path, mlp_folder: Path, device: torch.device, steps: int, solver: str, head: str
) -> None:
    """Five requests end one after the other, so that the graphs of 5, 4 and 1 rows run, also with padded rows."""
    folder = mlp_folder if head == "mlp" else tiny_folder
    arguments = {"steps": steps, "solver": solver, "max_frames": [9, 5, 7, 3, 1], "seed": [1, 2, 3, 4, 5]}
    plain, replayed = (
        voxkern.load(folder, device=device, backend="triton", max_batch=5, graphs=graphs).generate(
            [*TEXTS, *TEXTS[:2]], **arguments
        )
        for graphs in (False, True)
    )
    assert_same(replayed, plain)


@pytest.mark.only_gpu
@pytest.mark.parametrize("where", ["written over", "moved"])
def test_new_weights_on_a_gpu(tiny_folder: Path, device: torch.device, where: str) -> None:
    tts, other = (voxkern.load(tiny_folder, device=device, backend="triton", graphs=graphs) for graphs in (True, False))
    tts.generate("one", steps=2, max_frames=2, seed=1)
    state = {name: -tensor if "acoustic" in name else tensor.clone() for name, tensor in tts.model.state_dict().items()}
    for one in (tts, other):
        one.model.load_state_dict(state, assign=where == "moved")
        one.model.requires_grad_(False)
    assert_same(*([one.generate("one", steps=2, max_frames=2, seed=1)] for one in (tts, other)))


@pytest.mark.only_gpu
def test_a_capture_on_a_gpu(device: torch.device) -> None:
    x = torch.zeros(3, device=device)

    def work() -> Tensor:
        x.add_(1)
        return x

    replay, made = CudaCapture(x.device)(work)
    assert made is x
    before = x.clone()
    replay()
    assert torch.equal(x, before + 1)
