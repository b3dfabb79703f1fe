"""Tests of the cost of PyTorch operators, counted on modules, and of the message if the public server is missing."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.static import server_cost
from bench.static.server_cost import (
    SERVER_PACKAGE,
    Cost,
    counted,
    distinct_bytes,
    kernels,
    missing,
    of_batch,
    plain,
    zeroed,
)
from voxkern.integrations.server_heads import CAPTURED_METHOD
from voxkern.random_checkpoint import tiny_params
from voxkern.reference import Config
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer


def test_a_product_is_its_weight_its_input_and_its_output() -> None:
    linear = nn.Linear(6, 5, bias=False).bfloat16()
    x = torch.zeros(3, 6, dtype=torch.bfloat16)
    assert counted(lambda: linear(x), linear) == Cost(1, 2 * (5 * 6 + 3 * 6 + 3 * 5), 2 * 5 * 6)


def test_views_and_allocations_are_free_and_in_place_is_one_tensor() -> None:
    x, nothing = torch.zeros(4, 8), nn.Module()
    assert counted(lambda: (x.view(8, 4).t(), torch.empty(9)), nothing) == Cost(0, 0, 0)
    assert counted(lambda: x.add_(1), nothing) == Cost(1, 4 * 32, 0)
    assert counted(lambda: x.to(torch.bfloat16), nothing) == Cost(1, (4 + 2) * 32, 0)
    assert distinct_bytes(torch.zeros(1, 5).expand(7, 5)) == 4 * 5


def tiny_head(n_layers: int) -> FlowMatchingAudioTransformer:
    params = tiny_params()
    params["multimodal"]["audio_model_args"]["acoustic_transformer_args"]["n_layers"] = n_layers
    config = Config.from_params(params)
    return zeroed(FlowMatchingAudioTransformer(config.acoustic_transformer, config.audio).bfloat16())


def test_the_plain_module_streams_every_weight_once_an_evaluation() -> None:
    head = tiny_head(3)
    per_step = [p for name, p in head.named_parameters() if name.startswith(("layers", "norm", "input", "acoustic"))]
    once = [p for name, p in head.named_parameters() if name.startswith(("semantic", "time", "llm"))]
    found = [plain(head, B) for B in (1, 2)]
    for cost in found:
        assert cost.weights == 2 * (7 * sum(p.numel() for p in per_step) + sum(p.numel() for p in once))
    # the batch does not change the number of launches, and each further request adds the same bytes
    assert found[0].launches == found[1].launches
    assert of_batch(5, *found) == plain(head, 5)
    with pytest.raises(ValueError, match="different paths"):
        of_batch(5, found[0], Cost(1, 2, 3))


@pytest.mark.parametrize(("B", "launches"), [(1, 95), (32, 95)])
def test_the_kernels(B: int, launches: int) -> None:
    cost = kernels(B)
    assert cost.launches == launches
    assert cost.weights < cost.dram < 1.08 * cost.weights


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_cost, "SERVER_PACKAGE", "vllm_omni_that_is_not_there")
    assert missing() == "No module named 'vllm_omni_that_is_not_there'"
    with pytest.raises(ImportError):
        server_cost.server(1)


class FakeWrapper:
    """Has the methods of vLLM-Omni's graph wrapper, but computes only one matrix product."""

    def __init__(self, model: SimpleNamespace, sizes: list[int]) -> None:
        self.head, self.sizes, self.warm = model.acoustic_transformer, sizes, False

    def _warmup_and_capture(self, device: torch.device, dtype: torch.dtype, hidden_size: int) -> None:
        torch.accelerator.synchronize()
        self._capture_graph_for_size(self.sizes[0])
        self.warm = True

    def _capture_graph_for_size(self, size: int) -> None:
        raise AssertionError("a graph is captured, which must be left out on a CPU")

    def _forward_cudagraph_compatible(self, h: Tensor, cfg_alpha: Tensor, noise: Tensor) -> Tensor:
        assert self.warm
        assert h.dtype == cfg_alpha.dtype == noise.dtype == torch.bfloat16
        assert cfg_alpha.shape == (self.sizes[0], 1)
        return self.head.semantic_codebook_output(h)


class FakeHead(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        assert args["acoustic_transformer_args"]["n_decoding_steps"] == 7
        self.semantic_codebook_output = nn.Linear(3072, 8320, bias=False)

    def forward(self, llm_hidden: Tensor, cfg_alpha: Tensor) -> Tensor:
        return self.semantic_codebook_output(llm_hidden) * cfg_alpha


def test_a_server_that_is_there_is_counted_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is a fake with the same interface; test_the_real_server counts the real one."""
    parents = [SERVER_PACKAGE.rsplit(".", n)[0] for n in range(len(SERVER_PACKAGE.split(".")))]
    generation, model = ModuleType("generation"), ModuleType("model")
    generation.FlowMatchingAudioTransformer = FakeHead
    model.CUDAGraphAcousticTransformerWrapper = FakeWrapper
    for name in parents:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{SERVER_PACKAGE}.voxtral_tts_audio_generation", generation)
    monkeypatch.setitem(sys.modules, f"{SERVER_PACKAGE}.voxtral_tts", model)
    assert missing() is None
    assert hasattr(FakeWrapper, CAPTURED_METHOD)
    found = server_cost.server(1)
    weights = 2 * 3072 * 8320
    assert found["captured"] == Cost(1, weights + 2 * (3072 + 8320), weights)
    assert (found["eager"].launches, found["eager"].weights) == (2, weights)


@pytest.mark.servers
@pytest.mark.slow
def test_the_real_server() -> None:
    pytest.importorskip(f"{SERVER_PACKAGE}.voxtral_tts", reason="vllm-omni is not installed", exc_type=ImportError)
    found = {path: cost for B, _, path, cost in server_cost.costs() if B == 1}
    for path in ("eager", "captured"):
        assert found[path].launches > 3.5 * kernels(1).launches
        assert found[path].weights == pytest.approx(found["plain PyTorch"].weights, rel=0.005)
