"""Tests of the stand-in for a GPU (bench/static/stand_in_gpu.py): it must refuse what a GPU refuses."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bench.static.stand_in_gpu import StandInGPU
from voxkern.kernels.rms_norm import launch_rms_norm

pytestmark = pytest.mark.interpreter("the stand-in replaces a GPU")


@triton.jit
def _add_kernel(p_x, value, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_x + o_n, tl.load(p_x + o_n) + value)


def add(x: Tensor, value: float) -> None:
    _add_kernel[(1,)](x, value, N=len(x))


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_tensors_are_on_the_device_and_results_too(stand_in: StandInGPU) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    for result in (x + 1, x[0], x.T, torch.cat([x, x]), torch.zeros_like(x), x.new_zeros(2), x.half(), x @ x.T, x.data):
        assert result.device == torch.device("cuda:0")
        assert result.is_cuda
    for result in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), torch.zeros(3), x.to("cpu", torch.half)):
        assert result.device.type == "cpu"
        assert type(result) is Tensor
    assert (x.cpu().numpy() == np.arange(6.0).reshape(2, 3)).all()
    assert torch.zeros(2).to(x).is_cuda
    assert torch.zeros(2).to("cuda", torch.float16).dtype == torch.float16
    assert torch.zeros(2).cuda().is_cuda


def test_a_moved_tensor_is_a_copy(stand_in: StandInGPU) -> None:
    x = torch.zeros(3)
    on_gpu = x.to("cuda")
    on_gpu += 1
    back = on_gpu.cpu()
    on_gpu += 1
    assert (x.tolist(), back.tolist(), on_gpu.tolist()) == ([0] * 3, [1] * 3, [2] * 3)
    assert on_gpu.to("cuda") is on_gpu


def test_both_devices_in_one_operator(stand_in: StandInGPU) -> None:
    x, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (lambda: x + on_cpu, lambda: torch.cat([x, on_cpu]), lambda: x.add_(on_cpu), lambda: on_cpu @ x):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert torch.equal(x + torch.tensor(2.0), torch.full((3,), 3.0, device="cuda"))  # a number on the CPU is allowed
    x[1:] = on_cpu[1:] * 5
    on_cpu.copy_(x)
    assert on_cpu.tolist() == [1, 5, 5]


def test_conversion_to_numpy(stand_in: StandInGPU) -> None:
    x = torch.ones(3, device="cuda")
    for convert in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="convert cuda:0"):
            convert()


def test_a_kernel_runs_on_the_device_only(stand_in: StandInGPU) -> None:
    x = torch.ones(4, device="cuda")
    add(x, 2.0)
    assert x.tolist() == [3.0] * 4
    with pytest.raises(ValueError, match="p_x cannot be accessed from Triton"):
        add(torch.ones(4), 2.0)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        launch_rms_norm(torch.empty(1, 4, device="cuda"), x.view(1, 4), torch.ones(4), 1e-5)


def test_modules_are_moved_in_place(stand_in: StandInGPU) -> None:
    layer = nn.Linear(3, 2)
    weight, values = layer.weight, layer.weight.detach().clone()
    layer.to("cuda")
    assert layer.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert weight.is_cuda
    assert layer(torch.ones(1, 3, device="cuda")).is_cuda
    other = copy.deepcopy(layer)
    assert other.weight.is_cuda
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.data_ptr() != weight.data_ptr()
    layer.to("cpu")
    assert type(weight) is nn.Parameter
    assert torch.equal(weight, values)


def test_waits_are_counted(stand_in: StandInGPU) -> None:
    x = torch.arange(4.0, device="cuda")
    x += 1
    x[1:3] = 7.0
    x.copy_(x * 2)
    assert not stand_in.waits
    for name, wait in (
        ("item", lambda: x[0].item()), ("tolist", x.tolist), ("__bool__", lambda: bool(x[0] > 1)), ("to", x.cpu),
        ("tensor", lambda: torch.tensor([1], device="cuda")), ("__getitem__", lambda: x[x > 3]),
        ("copy_", lambda: torch.empty(4).copy_(x)), ("synchronize", torch.cuda.synchronize), ("nonzero", x.nonzero),
    ):  # fmt: skip
        stand_in.waits.clear()
        wait()
        assert dict(stand_in.waits) == {name: 1}
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        x[0].item()


def test_a_copy_arrives_when_the_host_waits(stand_in: StandInGPU) -> None:
    """Until then the host reads poison; values that the device writes after the copy started do not arrive."""
    x = torch.arange(3, device="cuda")
    host, copied = torch.empty(3, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    copied.record()
    x += 5
    assert host.tolist() == [torch.iinfo(torch.int64).max] * 3
    copied.synchronize()
    assert host.tolist() == [0, 1, 2]
    assert dict(stand_in.waits) == {"Event.synchronize": 1}
    torch.empty(3, dtype=torch.int64).copy_(x, non_blocking=True)  # this memory is not pinned, so the host waits
    assert stand_in.waits["copy_"] == 1


def test_a_captured_launch_runs_at_each_replay(stand_in: StandInGPU) -> None:
    x = torch.ones(4, device="cuda")
    graph = captured(lambda: add(x, 2.0))
    assert x.tolist() == [1.0] * 4
    graph.replay()
    x *= 10
    graph.replay()
    assert x.tolist() == [32.0] * 4
    assert (stand_in.n_graphs, stand_in.n_replays) == (1, 2)


def test_captured_operators_run_at_each_replay(stand_in: StandInGPU) -> None:
    x, results = torch.ones(4, device="cuda"), []

    def work() -> None:
        x.view(2, 2)[0] += 1
        made = torch.zeros(4, device="cuda")
        made += x * 2
        results.append(made)

    graph = captured(work)
    assert x.tolist() == [1.0] * 4
    assert results[0].isnan().all()
    for n in (1, 2):
        graph.replay()
        assert results[0].tolist() == [2.0 + 2 * n] * 2 + [2.0] * 2


def test_what_no_capture_survives(stand_in: StandInGPU) -> None:
    x, other = torch.ones(4, device="cuda"), torch.cuda.Event()
    for wrong in (
        lambda: x[0].item(), x.cpu, lambda: x[x > 0], lambda: torch.tensor([1.0], device="cuda"), other.synchronize,
        lambda: x.copy_(torch.ones(4)), torch.cuda.synchronize, lambda: bool(x.sum()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            captured(wrong)
    assert x.tolist() == [1.0] * 4  # and the capture is over


def test_a_graph_does_not_keep_the_memory_of_its_launches(stand_in: StandInGPU) -> None:
    tensors = [torch.ones(4, device="cuda")]
    graph = captured(lambda: add(tensors[0][:2], 1.0))
    graph.replay()
    assert tensors[0].tolist() == [2.0, 2.0, 1.0, 1.0]
    tensors.clear()
    gc.collect()  # the interpreter leaves cycles that hold its last arguments
    with pytest.raises(RuntimeError, match="was freed"):
        graph.replay()


def test_other_threads_use_the_device_during_a_capture(stand_in: StandInGPU) -> None:
    x, y, errors = torch.ones(4, device="cuda"), torch.ones(4, device="cuda"), list[BaseException]()

    def other() -> None:
        try:
            add(y, torch.full((1,), 2.0, device="cuda").item())
        except BaseException as error:
            errors.append(error)

    def work() -> None:
        add(x, 1.0)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    captured(work).replay()
    assert not errors
    assert (x.tolist(), y.tolist()) == ([2.0] * 4, [3.0] * 4)


def test_without_computing_only_the_host_works(stand_in: StandInGPU) -> None:
    x = torch.ones(4, device="cuda")
    graph = captured(lambda: add(x, 1.0))
    stand_in.computes = False
    add(x, 1.0)
    graph.replay()
    assert x.tolist() == [1.0] * 4
    assert stand_in.n_replays == 1
