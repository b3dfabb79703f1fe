"""Tests of the velocity MLP in plain PyTorch.

The velocity MLP is compared with a second derivation. It has the parameter names of MAR (arXiv 2406.11838), and shares
guidance and solver with the transformer head.
"""

from pathlib import Path

import independent
import numpy as np
import pytest
import torch

import voxkern
from voxkern.checkpoint import read_checkpoint, read_params
from voxkern.reference import VoxtralTTS
from voxkern.reference.flow_head import guide
from voxkern.reference.mlp_head import FlowMatchingAudioMLP, ResidualBlock, modulated_norm

MAR = {
    "time_embed.mlp.0.weight": (48, 256), "time_embed.mlp.0.bias": (48,),
    "time_embed.mlp.2.weight": (48, 48), "time_embed.mlp.2.bias": (48,),
    "cond_embed.weight": (48, 64), "cond_embed.bias": (48,),
    "input_proj.weight": (48, 36), "input_proj.bias": (48,),
    "final_layer.linear.weight": (36, 48), "final_layer.linear.bias": (36,),
    "final_layer.adaLN_modulation.1.weight": (96, 48), "final_layer.adaLN_modulation.1.bias": (96,),
}  # fmt: skip
BLOCK = {
    "mlp.0.weight": (80, 48), "mlp.0.bias": (80,), "mlp.2.weight": (48, 80), "mlp.2.bias": (48,),
    "adaLN_modulation.1.weight": (144, 48), "adaLN_modulation.1.bias": (144,),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(mlp_folder: Path) -> VoxtralTTS:
    """Return the model of the tiny checkpoint with an MLP head, in fp32. Tests must not change this model."""
    return read_checkpoint(mlp_folder).model


@pytest.fixture(scope="module")
def head(model: VoxtralTTS) -> FlowMatchingAudioMLP:
    assert isinstance(model.acoustic_transformer, FlowMatchingAudioMLP)
    return model.acoustic_transformer


@pytest.fixture(scope="module")
def weights(model: VoxtralTTS) -> dict:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def inputs(B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(B)
    alpha = torch.tensor([1.2, 0.0, 1.0, 3.0]).repeat(-(-B // 4))[:B]
    return torch.randn(B, 64, generator=g), alpha, torch.randn(B, 36, generator=g)


def test_names_are_mar_s(head: FlowMatchingAudioMLP) -> None:
    blocks = {f"res_blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
    wanted = {**MAR, **blocks, "semantic_codebook_output.weight": (128, 64)}
    assert {name: tuple(t.shape) for name, t in head.state_dict().items()} == wanted


def test_the_maker_s_weights_mean_something(head: FlowMatchingAudioMLP) -> None:
    """The random weights must not be MAR's initial ones.

    MAR initialises modulations with zeros, and then the residual blocks do nothing.
    """
    assert all(parameter.std() > 0.05 for parameter in head.parameters())


def test_velocity_equals_the_second_derivation(head: FlowMatchingAudioMLP, weights: dict, mlp_folder: Path) -> None:
    h, _, x = inputs(6)
    for t in (0.0, 3 / 7, 1.0):
        with torch.inference_mode():
            v = head.velocity(x, torch.tensor(t), h).numpy()
        expected = independent.velocity(weights, read_params(mlp_folder), x.double().numpy(), t, h.double().numpy())
        np.testing.assert_allclose(v, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        each = head.velocity(x, torch.linspace(0, 1, 6), h)
        torch.testing.assert_close(each[2], head.velocity(x[2:3], torch.tensor(0.4), h[2:3])[0])


@pytest.mark.parametrize(("B", "steps"), [(1, 7), (3, 1), (33, 7), (2, 64)])
def test_frame_equals_the_second_derivation(
    head: FlowMatchingAudioMLP, weights: dict, mlp_folder: Path, B: int, steps: int
) -> None:
    params = read_params(mlp_folder)
    h, alpha, noise = inputs(B)
    with torch.inference_mode():
        codes = head(h, alpha, noise, steps).numpy()
        latents = head.solve(h, alpha, noise, steps).numpy()
    arrays = (h.double().numpy(), noise.double().numpy(), alpha.double().numpy())
    x = independent.solve(weights, params, *arrays, steps)
    expected = independent.frame(weights, params, *arrays, steps)
    np.testing.assert_allclose(latents, x, rtol=1e-4, atol=1e-4)
    assert 0.3 < np.abs(x[alpha.numpy() == np.float32(1.2)]).mean() < 3  # codes spread over their levels
    at_edge = independent.edge_distance(x, 21) < 1e-4
    assert (codes[:, 0] == expected[:, 0]).all()
    assert ((codes[:, 1:] == expected[:, 1:]) | at_edge).all()
    assert at_edge.mean() < 0.01


def test_without_a_condition_the_hidden_state_is_zero_before_its_bias(head: FlowMatchingAudioMLP) -> None:
    h, _, x = inputs(3)
    with torch.inference_mode():
        assert torch.equal(head.project_hidden(torch.zeros(3, 64)), head.cond_embed.bias.expand(3, -1))
        v = torch.cat([head.velocity(x, torch.tensor(0.0), states) for states in (h, torch.zeros_like(h))])
        alpha = torch.tensor([1.5, 0.0, 1.0])
        torch.testing.assert_close(head.solve(h, alpha, x, 1), x + guide(v, alpha))


def test_a_norm_s_own_weights_are_a_change_of_its_modulation() -> None:
    """MAR's ``in_ln`` has a weight w and a bias b; both can be folded into ``adaLN_modulation`` as shown here."""
    torch.manual_seed(0)
    block, dim = ResidualBlock(20, 30, 1e-6).double(), 20
    x, c, w, b = (torch.randn(5, dim).double() for _ in range(4))
    w, b = w[0], b[0]
    shift, scale, _ = block.adaLN_modulation(c).chunk(3, dim=-1)
    expected = torch.nn.functional.layer_norm(x, (dim,), w, b, 1e-6) * (1 + scale) + shift
    linear = block.adaLN_modulation[1]
    with torch.no_grad():
        for p in (linear.weight, linear.bias):
            p[:dim] += (b if p.ndim == 1 else b[:, None]) * p[dim : 2 * dim]
            p[dim : 2 * dim] *= w if p.ndim == 1 else w[:, None]
        linear.bias[:dim] += b
        linear.bias[dim : 2 * dim] += w - 1
    shift, scale, _ = block.adaLN_modulation(c).chunk(3, dim=-1)
    torch.testing.assert_close(modulated_norm(x, shift, scale, 1e-6), expected)


def test_gradients_reach_every_weight(mlp_folder: Path) -> None:
    head = read_checkpoint(mlp_folder).model.acoustic_transformer.requires_grad_(True)
    h, _, x = inputs(3)
    loss = head.velocity(x, torch.rand(3), h).square().sum()
    loss = loss + torch.nn.functional.linear(h, head.semantic_codebook_output.weight).logsumexp(-1).sum()
    grads = torch.autograd.grad(loss, list(head.parameters()))
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_generate(mlp_folder: Path) -> None:
    """A request gives the same codes alone and in a batch, and the solver "ab2" gives other codes."""
    tts = voxkern.load(mlp_folder, max_batch=3, backend="torch")
    texts, seeds = ["a", "seven three", "yes"], [1, 2, 3]
    batch = tts.generate(texts, seed=seeds, max_frames=12, steps=3)
    for text, seed, audio in zip(texts, seeds, batch, strict=True):
        np.testing.assert_array_equal(tts.generate(text, seed=seed, max_frames=12, steps=3).codes, audio.codes)
    ab2 = tts.generate(texts, seed=seeds, max_frames=12, steps=3, solver="ab2")
    assert any(a.codes.shape != b.codes.shape or (a.codes != b.codes).any() for a, b in zip(batch, ab2, strict=True))
