"""Tests of the reference flow head: it equals a second derivation, and each of its rules and errors is tested alone."""

import itertools
import math
from collections.abc import Callable

import independent
import numpy as np
import pytest
import torch

from voxkern.reference import VoxtralTTS
from voxkern.reference.flow_head import guide, lowest_argmax, quantise, time_embedding
from voxkern.reference.solver import integrate, step_ratios, time_grid


def _inputs(B: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    alpha = torch.tensor([1.2, 0.0, 1.0, 3.0]).repeat(-(-B // 4))[:B]
    return torch.randn(B, dim, generator=g), alpha, torch.randn(B, 36, generator=g)


@pytest.mark.parametrize(("B", "steps"), [(1, 7), (3, 1), (5, 16), (33, 7), (2, 64)])
def test_frame_equals_the_second_derivation(
    tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict, B: int, steps: int
) -> None:
    head = tiny_model.acoustic_transformer
    h, alpha, noise = _inputs(B, 64, B)
    with torch.inference_mode():
        codes = head(h, alpha, noise, steps).numpy()
        logits = head.semantic_logits(h).double().numpy()
    h_, alpha_, noise_ = h.double().numpy(), alpha.double().numpy(), noise.double().numpy()
    expected = independent.frame(tiny_weights, tiny_params, h_, noise_, alpha_, steps)
    expected_logits = independent.semantic_logits(tiny_weights, tiny_params, h_)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-4)
    top = np.sort(expected_logits, axis=1)
    tied = top[:, -1] - top[:, -2] < 1e-4
    assert ((codes[:, 0] == expected[:, 0]) | tied).all()
    x = independent.solve(tiny_weights, tiny_params, h_, noise_, alpha_, steps)
    at_edge = independent.edge_distance(x, 21) < 1e-4
    ended = (expected[:, 0] == 1)[:, None] | tied[:, None]
    assert ((codes[:, 1:] == expected[:, 1:]) | at_edge | ended).all()
    assert at_edge.mean() < 0.01
    assert (codes[codes[:, 0] == 1, 1:] == 2).all()


def test_velocity_equals_the_second_derivation(tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict) -> None:
    head = tiny_model.acoustic_transformer
    h, _, x = _inputs(6, 64, 1)
    for t in (0.0, 3 / 7, 1.0):
        with torch.inference_mode():
            v = head.velocity(x, torch.tensor(t), h).numpy()
        expected = independent.velocity(tiny_weights, tiny_params, x.double().numpy(), t, h.double().numpy())
        np.testing.assert_allclose(v, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        each = head.velocity(x, torch.linspace(0, 1, 6), h)
        torch.testing.assert_close(each[2], head.velocity(x[2:3], torch.tensor(0.4), h[2:3])[0])


def test_last_layer_carries_only_what_is_read(tiny_model: VoxtralTTS) -> None:
    """The last layer computes only keys and values for tokens 1 and 2, which does not change the velocity."""
    head = tiny_model.acoustic_transformer
    h, _, x = _inputs(3, 64, 2)
    with torch.inference_mode():
        pruned = head.velocity(x, torch.tensor(0.5), h)
        forward = type(head.layers[-1]).forward
        head.layers[-1].forward = lambda u, attend, n_queries: forward(head.layers[-1], u, attend)
        try:
            whole = head.velocity(x, torch.tensor(0.5), h)
        finally:
            del head.layers[-1].forward
    torch.testing.assert_close(pruned, whole, rtol=1e-5, atol=1e-6)


def test_quantise() -> None:
    levels = torch.arange(21)
    assert torch.equal(quantise(levels / 10 - 1, 21), levels)
    halves = torch.tensor([-0.875, -0.625, 0.125, 0.375, 0.875])  # exactly between two of nine levels
    assert quantise(halves, 9).tolist() == [0, 2, 4, 6, 8]
    assert quantise(torch.tensor([-9.0, 9.0]), 21).tolist() == [0, 20]


def test_guidance() -> None:
    v = torch.tensor([[1.0], [2.0], [10.0], [20.0]])
    assert guide(v, torch.tensor([1.0, 0.0])).flatten().tolist() == [1.0, 20.0]
    assert guide(v, torch.tensor([1.5, 2.0])).flatten().tolist() == [-3.5, -16.0]


def test_argmax_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [-torch.inf, -torch.inf, -5.0, -5.0]])
    assert lowest_argmax(logits).tolist() == [1, 2]


def test_masked_logits(tiny_model: VoxtralTTS) -> None:
    with torch.inference_mode():
        logits = tiny_model.acoustic_transformer.semantic_logits(torch.randn(2, 64))
    assert logits.shape == (2, 128)
    assert torch.equal(logits.isneginf()[0].nonzero().flatten(), torch.tensor([0, *range(64, 128)]))


def test_time_embedding() -> None:
    embedding = time_embedding(torch.tensor([0.0, 0.5]), 6)
    w = 10000 ** (-torch.arange(3, dtype=torch.float64) / 3)
    torch.testing.assert_close(embedding[0], torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(embedding[1], torch.cat(((w / 2).cos(), (w / 2).sin())))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """In fp64, on x' = x cos(3t) + t, halving the step length divides the error by 2 (euler) or by 4 (ab2)."""

    def velocity_at(times: list[float]) -> Callable[[torch.Tensor, int], torch.Tensor]:
        return lambda x, k: x * math.cos(3 * times[k]) + times[k]

    errors = []
    start = torch.tensor([0.3, -1.0], dtype=torch.float64)
    fine = [k / 2**16 for k in range(2**16 + 1)]
    exact = integrate(velocity_at(fine), start, "ab2", fine)
    for steps in (16, 32, 64):
        times = time_grid(solver, steps)
        errors.append(float((integrate(velocity_at(times), start, solver, times) - exact).abs().max()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(found - order) < 0.2 for found in measured), measured


def test_a_line_is_followed_exactly() -> None:
    """If the velocity is linear in time, ab2 is exact in all steps except the first, which is Euler's.

    The steps have different lengths.
    """
    times = time_grid("ab2", 5)
    x = integrate(lambda x, k: torch.full_like(x, 2 * times[k]), torch.zeros(1, dtype=torch.float64), "ab2", times)
    assert float(x) == pytest.approx(1 - times[1] ** 2)


def test_time_grids() -> None:
    assert time_grid("euler", 4) == [0, 0.25, 0.5, 0.75, 1]
    warped = time_grid("ab2", 4)
    assert warped == pytest.approx([0, 1 - 0.75**1.5, 1 - 0.5**1.5, 1 - 0.25**1.5, 1])
    assert step_ratios("euler", warped) == [0] * 4
    assert step_ratios("ab2", [0, 1, 3, 4]) == [0, 1, 0.25]
    with pytest.raises(ValueError, match="solver must be one of euler, ab2, got 'heun'"):
        time_grid("heun", 4)


def test_ab2_with_one_step_is_euler(tiny_model: VoxtralTTS) -> None:
    h, alpha, noise = _inputs(4, 64, 6)
    with torch.inference_mode():
        head = tiny_model.acoustic_transformer
        assert torch.equal(head(h, alpha, noise, 1, "ab2"), head(h, alpha, noise, 1))
        assert not torch.equal(head(h, alpha, noise, 3, "ab2"), head(h, alpha, noise, 3))


def test_noise_from_torch_when_none_is_given(tiny_model: VoxtralTTS) -> None:
    h, alpha, _ = _inputs(2, 64, 3)
    with torch.inference_mode():
        torch.manual_seed(5)
        drawn = tiny_model.acoustic_transformer(h, alpha)
        torch.manual_seed(5)
        assert torch.equal(drawn, tiny_model.acoustic_transformer(h, alpha, torch.randn(2, 36)))
        assert not torch.equal(drawn, tiny_model.acoustic_transformer(h, alpha))


def test_gradients_reach_every_weight(tiny_model: VoxtralTTS) -> None:
    head = tiny_model.acoustic_transformer
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    try:
        h, _, x = _inputs(3, 64, 4)
        loss = head.velocity(x, torch.rand(3), h).square().sum()
        loss = loss + torch.nn.functional.linear(h, head.semantic_codebook_output.weight).logsumexp(-1).sum()
        grads = torch.autograd.grad(loss, list(head.parameters()))
        assert all(g.isfinite().all() and g.any() for g in grads)
    finally:
        head.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"h": torch.zeros(2, 63)}, "h must be"),
        ({"cfg_alpha": torch.zeros(3)}, "cfg_alpha must be"),
        ({"noise": torch.zeros(2, 35)}, "noise must be"),
        ({"steps": 0}, "steps"),
        ({"steps": 65}, "steps"),
    ],
)
def test_wrong_arguments(tiny_model: VoxtralTTS, change: dict, named: str) -> None:
    arguments = {"h": torch.zeros(2, 64), "cfg_alpha": torch.ones(2), "noise": torch.zeros(2, 36), "steps": 2}
    with pytest.raises(ValueError, match=named):
        tiny_model.acoustic_transformer(**{**arguments, **change})
