"""Tests of accelerating the flow heads of public servers, on a fake head with SGLang-Omni's names.

tests/test_public_server.py tests vLLM-Omni's real head.
"""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import voxkern
from bench.static.counters import counting
from voxkern.checkpoint import read_checkpoint
from voxkern.integrations.server_heads import UnsupportedHead, as_reference
from voxkern.reference.flow_head import time_embedding
from voxkern.reference.noise import noise, seed_tensor
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

STEPS = 2


class SGLangHead(nn.Module):
    """A fake head with the names of SGLang-Omni's head; a reference head does its computation.

    All requests share one guidance, and the noise is drawn on the CPU.
    """

    def __init__(self, head: FlowMatchingAudioTransformer) -> None:
        super().__init__()
        self.acoustic_transformer_args = copy.copy(head.config)
        self.model_args = SimpleNamespace(
            semantic_codebook_size=head.audio.semantic_codebook_size,
            acoustic_codebook_size=head.audio.acoustic_codebook_size,
            n_acoustic_codebook=head.audio.n_acoustic_codebook,
        )
        for name, child in head.named_children():
            setattr(self, name, child)
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(head.layers)})
        self.register_buffer("_timesteps", torch.linspace(0, 1, STEPS + 1), persistent=False)
        self._cfg_alpha, self._noise_scale = 1.2, 1.0
        self.computation = [head]  # in a list, so that it is no child module

    def forward(self, llm_hidden: Tensor) -> Tensor:
        B, head, device = len(llm_hidden), self.computation[0], llm_hidden.device
        alpha, x = torch.full((B,), self._cfg_alpha, device=device), torch.randn(B, 36).to(device)
        return head(llm_hidden, alpha, x, STEPS)

    def _predict_velocity(self, x_t: Tensor, llm_output: Tensor, t_emb: Tensor) -> Tensor:
        head = self.computation[0]
        return head._velocity(x_t, head.time_projection(t_emb), head.project_hidden(llm_output))


@pytest.fixture
def server(tiny_folder: Path, device: torch.device) -> SGLangHead:
    """Return a new fake head in fp32, which the test may change."""
    return SGLangHead(read_checkpoint(tiny_folder, device=device).model.acoustic_transformer).to(device)


def seeded(server: nn.Module, *args: Tensor) -> Tensor:
    """Call the server's head, which draws its own noise, after seeding torch."""
    torch.manual_seed(5)
    with torch.no_grad():
        return server(*args)


@pytest.mark.parametrize(("B", "max_batch"), [(1, 1), (5, 2), (0, 1)])
def test_sglang(server: SGLangHead, device: torch.device, B: int, max_batch: int) -> None:
    """Batches above `max_batch` run in groups.

    The accelerated head draws its noise and reads its guidance as the server's head does.
    """
    h = torch.randn(B, 64, generator=torch.Generator().manual_seed(B)).to(device)
    before = seeded(server, h)
    model = nn.ModuleDict({"acoustic_transformer": server})
    names = ["acoustic_transformer", "acoustic_transformer._predict_velocity"]
    assert voxkern.accelerate(model, max_batch) == names
    after = seeded(server, h)
    assert after.shape == (B, 37)
    assert int((after != before).sum()) <= B // 3  # codes at a rounding edge may differ
    server._cfg_alpha = 3.0
    if B:
        assert not torch.equal(seeded(server, h), after)
    server._cfg_alpha = 1.2
    assert voxkern.restore(model) == names
    assert torch.equal(seeded(server, h), before)
    assert voxkern.restore(model) == []
    assert not {"forward", "_predict_velocity"} & vars(server).keys()


@pytest.mark.parametrize(("R", "max_batch"), [(6, 3), (7, 2), (1, 1)])
def test_velocity(server: SGLangHead, device: torch.device, R: int, max_batch: int) -> None:
    """Rows run in groups, also an odd number of rows, and no row's velocity depends on the other rows."""
    g = torch.Generator().manual_seed(R)
    x, h, t = torch.randn(R, 36, generator=g), torch.randn(R, 64, generator=g), torch.rand(R, generator=g)
    x, h, embedded = x.to(device), h.to(device), time_embedding(t, 64).float().to(device)
    with torch.no_grad():
        expected = server._predict_velocity(x_t=x, llm_output=h, t_emb=embedded)
        voxkern.accelerate(server, max_batch)
        velocity = server._predict_velocity(x_t=x, llm_output=h, t_emb=embedded)
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
        way, projected = server.forward.__self__.velocity_of_projected, torch.randn(2, R, 64, generator=g).to(device)
        assert torch.equal(way(x, *projected)[-1:], way(x[-1:], *projected[:, -1:]))
    server.requires_grad_(True)
    with pytest.raises(RuntimeError, match="an accelerated flow head computes no gradients"):
        server._predict_velocity(x, h, embedded)


@pytest.mark.interpreter("the launch config is the interpreter's")
def test_velocity_with_attention_in_the_launch_of_qkv(server: SGLangHead) -> None:
    g = torch.Generator().manual_seed(5)
    x, projected = torch.randn(7, 36, generator=g), torch.randn(2, 7, 64, generator=g)
    with torch.no_grad():
        voxkern.accelerate(server, 1)
        expected = server.forward.__self__.velocity_of_projected(x, *projected)
        voxkern.restore(server)
        voxkern.accelerate(server.bfloat16(), 3)
        way = server.forward.__self__.velocity_of_projected
        with counting(whole=True) as launches:
            velocity = way(x.bfloat16(), *projected.bfloat16())
        assert torch.equal(velocity[6:], way(x[6:].bfloat16(), *projected[:, 6:].bfloat16()))
    assert "_norm_qkv_attention_kernel" in {launch.kernel for launch in launches}
    torch.testing.assert_close(velocity.float(), expected, rtol=5e-2, atol=5e-2)


def test_noise_handed_in_or_drawn_by_seed(server: SGLangHead, device: torch.device) -> None:
    """The noise may be an argument, or it is computed from seed and frame.

    Each request has its own guidance, and gives the same codes alone and in a batch.
    """
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    alpha, frame = torch.tensor([1.2, 0.0, 2.5], device=device), torch.tensor([0, 4, 9], device=device)
    seed = seed_tensor([1, 2, 3]).to(device)
    voxkern.accelerate(server, 2)
    with torch.inference_mode():
        codes = server(h, alpha, seed=seed, frame=frame)
        assert torch.equal(codes, server(h, alpha, noise=noise(seed, frame, 36)))
        assert torch.equal(codes[2:], server(h[2:], alpha[2:], seed=seed[2:], frame=frame[2:]))
        expected = server.computation[0](h, alpha, noise(seed, frame, 36), STEPS)
    assert int((codes != expected).sum()) <= 1


def test_it_is_the_servers_own_weights(server: SGLangHead, device: torch.device) -> None:
    """Weights that change through .data are not detected, but accelerating again rebuilds the tables.

    The tables keep their addresses, which captured graphs contain. A copy of the head behaves in the same way.
    """
    h = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(device)
    voxkern.accelerate(server, 2)
    fused = server.forward.__self__
    addresses = [table.data_ptr() for table in fused.step_tables("euler", STEPS).network]
    before = seeded(server, h)
    for p in server.parameters():
        p.data.mul_(-1.5)
    copied = copy.deepcopy(server)
    assert copied.forward.__self__.server is copied
    for one in (server, copied):
        with torch.inference_mode():  # the tables must be writable in inference mode and outside of it
            voxkern.accelerate(one, 2)
    after = seeded(server, h)
    assert server.forward.__self__ is fused
    assert addresses == [table.data_ptr() for table in fused.step_tables("euler", STEPS).network]
    assert torch.equal(after, seeded(copied, h))
    voxkern.restore(server)
    expected = seeded(server, h)
    assert int((after != expected).sum()) <= 1
    assert not torch.equal(after, before)


def test_prepared_while_a_server_loads(server: SGLangHead, device: torch.device) -> None:
    """Servers set a default dtype and device while a model loads.

    What accelerate() prepares must not depend on these defaults.
    """
    h = torch.randn(2, 64).to(device)
    before = seeded(server, h)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            voxkern.accelerate(server, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert int((seeded(server, h) != before).sum()) <= 1


def with_bias(server: SGLangHead) -> None:
    server.layers["1"].attention.wq.bias = nn.Parameter(torch.zeros(len(server.layers["1"].attention.wq.weight)))


def narrow(server: SGLangHead) -> None:
    server.acoustic_codebook_output = nn.Linear(64, 35, bias=False)


def in_fp8(server: SGLangHead) -> None:
    server.to(torch.float8_e4m3fn)


def uneven(server: SGLangHead) -> None:
    server._timesteps = server._timesteps**2


def too_many_steps(server: SGLangHead) -> None:
    server._timesteps = torch.linspace(0, 1, 66)


def without_args(server: SGLangHead) -> None:
    del server.acoustic_transformer_args


def other_eps(server: SGLangHead) -> None:
    server.norm.eps = 1e-3


def patched(server: SGLangHead) -> None:
    server.forward = lambda llm_hidden: llm_hidden


UNKNOWN = {
    with_bias: r"layers.1.attention.wq.bias is \[\d+\] but must be missing",
    narrow: r"acoustic_codebook_output.weight is \[35, 64\] but must be \[36, 64\]",
    in_fp8: "its weights are torch.float8_e4m3fn but must be one of fp32, bf16, fp16",
    uneven: r"its _timesteps are \[0.0, 0.25, 1.0\] but must be even steps from 0 to 1",
    too_many_steps: r"steps must lie in 1..64, got 65",
    without_args: "has no attribute 'acoustic_transformer_args'",
    other_eps: "norm.eps is 0.001 but must be",
    patched: "its forward has been replaced already, by something else",
}


@pytest.mark.parametrize("change", UNKNOWN, ids=lambda change: change.__name__)
def test_what_is_not_known_is_left_alone(server: SGLangHead, change, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown head is named in an error if the model has no other head, otherwise in one warning."""
    other = SGLangHead(copy.deepcopy(server.computation[0]))
    change(server)
    before = dict(vars(server))
    with pytest.raises(ValueError, match="part that voxkern has kernels for; a is not supported: .*" + UNKNOWN[change]):
        voxkern.accelerate(nn.ModuleDict({"a": server}))
    assert vars(server) == before
    with caplog.at_level(logging.WARNING, "voxkern"):
        assert voxkern.accelerate(nn.ModuleDict({"a": server, "b": other}))[0] == "b"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.records[0].getMessage().index("a is left as it is: ")
    assert vars(server) == before


def test_a_velocity_of_another_kind_is_left_alone(
    server: SGLangHead, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SGLangHead, "_predict_velocity", lambda self, x, condition: x)
    with caplog.at_level(logging.WARNING, "voxkern"):
        assert voxkern.accelerate(nn.ModuleDict({"a": server})) == ["a"]
    assert [r.getMessage() for r in caplog.records] == [
        "a._predict_velocity is left as it is: its arguments (x, condition) are not those of a known server"
    ]
    assert "_predict_velocity" not in vars(server)


def test_as_reference(server: SGLangHead, device: torch.device) -> None:
    """The reference head is made of the server's own layers, and gives the same codes."""
    head = as_reference(server)
    assert [p.data_ptr() for p in head.parameters()] == [p.data_ptr() for p in server.computation[0].parameters()]
    h, x, alpha = torch.randn(2, 64).to(device), torch.randn(2, 36).to(device), torch.ones(2, device=device)
    with torch.no_grad():
        assert torch.equal(head(h, alpha, x), server.computation[0](h, alpha, x, STEPS))
    server.acoustic_transformer_args = None
    with pytest.raises(UnsupportedHead, match="missing 7 required positional arguments"):
        as_reference(server)
