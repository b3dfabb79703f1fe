"""Tests of the reference backbone: against a second derivation, and with a paged cache against the plain forward."""

import independent
import numpy as np
import pytest
import torch

from voxkern.reference import VoxtralTTS
from voxkern.reference.attention import PagedCache, append, attention, paged_attention


def test_hidden_states_equal_a_second_derivation(tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict) -> None:
    u = torch.randn(1, 37, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        h = tiny_model.hidden_states(u)
    expected = independent.backbone_hidden(tiny_weights, tiny_params, u[0].double().numpy())
    np.testing.assert_allclose(h[0].numpy(), expected, rtol=1e-4, atol=2e-5)


def test_codes_are_embedded_as_a_sum(tiny_model: VoxtralTTS, tiny_weights: dict, tiny_params: dict) -> None:
    codes = torch.cat((torch.tensor([63]), torch.arange(36) % 21 + 2))
    with torch.inference_mode():
        embedded = tiny_model.embed_codes(codes)
    expected = independent.embed_codes(tiny_weights, tiny_params, codes.numpy())
    np.testing.assert_allclose(embedded.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [16, 64])
def test_paged_equals_plain(tiny_model: VoxtralTTS, page: int) -> None:
    """Prompts of different lengths are prefilled in two chunks, then decoded token by token.

    Pages are shuffled, and unused pages hold NaN.
    """
    g = torch.Generator().manual_seed(page)
    lengths = [1, 63, 64, 65, 130]
    u = torch.randn(len(lengths), 140, 64, generator=g)
    n_pages = -(-140 // page)
    kv = torch.full((2, len(lengths) * n_pages + 3, 2, 2, page, 16), torch.nan)
    table = torch.randperm(len(lengths) * n_pages + 3, generator=g)[: len(lengths) * n_pages].view(-1, n_pages).int()
    with torch.inference_mode():
        whole = tiny_model.hidden_states(u)
        for i, n in enumerate(lengths):
            for start, stop in ((0, n // 3), (n // 3, n)):
                if stop > start:
                    cache = PagedCache(kv, table[i : i + 1], torch.tensor([stop]))
                    h = tiny_model.hidden_states(u[i : i + 1, start:stop], cache)
                    torch.testing.assert_close(h[0], whole[i, start:stop], rtol=1e-4, atol=1e-5)
        for step in range(10):
            now = torch.tensor([n + step + 1 for n in lengths])
            now[step % len(lengths)] = 0  # each step leaves one request out, with length 0
            rows = torch.stack([u[i, now[i] - 1] for i in range(len(lengths))]).unsqueeze(1)
            h = tiny_model.hidden_states(rows, PagedCache(kv, table, now))
            for i, n in enumerate(now.tolist()):
                if n:
                    torch.testing.assert_close(h[i, 0], whole[i, n - 1], rtol=1e-4, atol=1e-5)
                else:  # then the request that was left out runs its token alone
                    one = PagedCache(kv, table[i : i + 1], torch.tensor([lengths[i] + step + 1]))
                    tiny_model.hidden_states(u[i : i + 1, lengths[i] + step].unsqueeze(1), one)


@pytest.mark.parametrize("group", [1, 4, 6])
def test_attention_by_hand(group: int) -> None:
    """Query head h reads key head h // group, a query reads no later key, and arithmetic is fp64."""
    g = torch.Generator().manual_seed(group)
    T, S, D = 3, 5, 8
    q = torch.randn(2, T, 2 * group, D, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, S, 2, D, generator=g, dtype=torch.float64)
    o = attention(q, k, v, causal=True)
    for b in range(2):
        for t in range(T):
            for h in range(2 * group):
                seen = S - T + t + 1
                p = (k[b, :seen, h // group] @ q[b, t, h] / D**0.5).softmax(0)
                torch.testing.assert_close(o[b, t, h], p @ v[b, :seen, h // group])


def test_append_writes_nothing_else() -> None:
    kv = torch.full((6, 2, 2, 4, 8), torch.nan)
    k, v = torch.randn(2, 2, 3, 2, 8)
    table = torch.tensor([[4, 1], [0, 2]])
    append(kv, k, v, table, torch.tensor([5, 0]))
    assert torch.equal(kv[4, 0, :, 2:], k[0, :2].transpose(0, 1))
    assert torch.equal(kv[1, 1, :, 0], v[0, 2])
    assert int(kv.isfinite().sum()) == 3 * 2 * 2 * 8
    out = paged_attention(torch.ones(2, 1, 4, 8), kv, table, torch.tensor([0, 0]))
    assert not out.any()


def test_training_reaches_every_weight(tiny_model: VoxtralTTS) -> None:
    weights = [p for name, p in tiny_model.named_parameters() if name.startswith(("layers", "norm"))]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        grads = torch.autograd.grad(tiny_model.hidden_states(torch.randn(2, 9, 64)).square().mean(), weights)
        assert all(g.isfinite().all() for g in grads)
        assert sum(bool(g.any()) for g in grads) == len(grads)
    finally:
        tiny_model.requires_grad_(False)
