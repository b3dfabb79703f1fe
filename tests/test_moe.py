"""Tests that the mixture of experts equals a second derivation and public implementations, and runs end to end."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import voxkern
from voxkern.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from voxkern.cli import app
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint, tiny_params
from voxkern.reference.config import MoEConfig
from voxkern.reference.moe import MoEBlock, Routing, mix_experts, route
from voxkern.weight_files import tensor_table


def block(seed: int = 0, dim: int = 24, scoring: str = "softmax", correction: bool = False, **moe: Any) -> MoEBlock:
    """Return a layer with random weights; the router's have a deviation of 1, so that logits are never nearly equal."""
    torch.manual_seed(seed)
    sizes = {"num_experts": 12, "num_experts_per_tok": 3, "expert_hidden_dim": 10} | moe
    layer = MoEBlock(dim, MoEConfig(**sizes), 2, 1, 8, 1e-5, scoring, correction).requires_grad_(False)
    for parameter in layer.gate.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return layer


def by_hand(layer: MoEBlock, x: np.ndarray) -> np.ndarray:
    """Compute the layer's mixture [M, dim] of tokens `x` [M, dim] from its equations, one token at a time, in fp64.

    Groups of experts, the correction bias and shared experts are included.
    """
    w = {name: p.double().numpy() for name, p in layer.named_parameters()}
    r, out = layer.routing, np.zeros_like(x)

    def expert(name: str, v: np.ndarray) -> np.ndarray:
        gate = w[f"{name}.w1.weight"] @ v
        return w[f"{name}.w2.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"{name}.w3.weight"] @ v))

    for m, v in enumerate(x):
        logits = w["gate.weight"] @ v
        scores = np.exp(logits) / np.exp(logits).sum() if r.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        order = scores + w.get("gate.e_score_correction_bias", 0)
        size = len(scores) // r.n_groups
        of_group = [np.sort(order[g * size : (g + 1) * size])[-2:].sum() for g in range(r.n_groups)]
        kept = np.argsort(of_group)[::-1][: r.n_groups_per_tok]
        allowed = [e for e in range(len(scores)) if e // size in kept]
        best = sorted(allowed, key=lambda e: -order[e])[: r.top_k]
        total = scores[best].sum()
        out[m] = sum(r.scale * scores[e] / total * expert(f"experts.{e}", v) for e in best)
        if layer.n_shared:
            out[m] += expert("shared_experts", v)
    return out


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_shared_experts": 2, "routed_scale": 2.5},
        {"num_experts": 16, "num_experts_per_tok": 1},
        {"num_expert_groups": 4, "num_expert_groups_per_tok": 2},
        {"scoring": "sigmoid", "correction": True, "num_expert_groups": 3, "num_expert_groups_per_tok": 2},
    ],
)
def test_equals_a_second_derivation(change: dict[str, Any], T: int) -> None:
    layer = block(**change)
    x = torch.randn(5, T, 24, generator=torch.Generator().manual_seed(1))
    expected = by_hand(layer, x.flatten(0, 1).double().numpy())
    np.testing.assert_allclose(layer.mixture(x).flatten(0, 1).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -0.0, 0.0, -1.0]])
    ids, weights = route(logits, Routing(3))
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3))
    tied_groups = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
    assert route(tied_groups, Routing(2, n_groups=2))[0].tolist() == [[1, 0]]


def test_no_number_is_the_last_choice() -> None:
    logits = torch.tensor([[torch.nan, 1.0, -torch.inf, 2.0], [torch.nan] * 4])
    ids, weights = route(logits, Routing(2))
    assert ids.tolist() == [[3, 1], [0, 1]]
    assert weights.isnan().all()


def test_weights_as_asked() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    p = logits.softmax(-1)[0]
    torch.testing.assert_close(route(logits, Routing(2, renormalise=False, scale=3.0))[1][0], 3 * p[[2, 1]])
    bias = torch.tensor([9.0, 0.0, 0.0])
    ids, weights = route(logits, Routing(2, "sigmoid"), bias)
    s = logits.sigmoid()[0, [0, 2]]
    assert ids.tolist() == [[0, 2]]
    torch.testing.assert_close(weights[0], s / s.sum())


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing(13), r"top_k is 13 but must lie in 1..12"),
        (Routing(0), r"top_k is 0"),
        (Routing(2, n_groups=5), r"n_groups is 5 but must divide the 12 experts"),
        (Routing(2, n_groups=4, n_groups_per_tok=5), r"n_groups_per_tok is 5 but must lie in 1..4"),
        (Routing(4, n_groups=4), r"top_k is 4 but must lie in 1..3"),
        (Routing(2, "tanh"), r"scoring must be one of softmax, sigmoid, got 'tanh'"),
    ],
)
def test_what_does_not_fit_is_named(routing: Routing, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 12), routing)


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_id_out_of_range_is_named(bad: int) -> None:
    experts = [nn.Identity()] * 4
    with pytest.raises(ValueError, match=rf"ids has expert {bad} but must have 0..3"):
        mix_experts(torch.ones(2, 3), torch.tensor([[0, 3], [1, bad]]), torch.ones(2, 2), experts, alone=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    layer = block(dim=64, num_shared_experts=1).to(dtype)
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    together = layer.mixture(x)
    for i in range(4):
        alone = torch.zeros_like(x)  # generate() pads a block with zero rows in the same way
        alone[i] = x[i]
        assert torch.equal(layer.mixture(alone)[i], together[i])
    prompts = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(layer.mixture(prompts)[1:2], layer.mixture(prompts[1:2]))


def test_training_reaches_every_expert_that_is_hit() -> None:
    layer = block(num_shared_experts=1).requires_grad_(True)
    x = torch.randn(2, 9, 24)
    ids, _ = route(layer.gate(x.flatten(0, 1)), layer.routing)
    layer.mixture(x).square().mean().backward()
    for i, expert in enumerate(layer.experts):
        assert (expert.w1.weight.grad is not None) == (i in ids)
    assert layer.gate.weight.grad is not None
    assert layer.gate.weight.grad.any()


def test_a_tiny_checkpoint_speaks(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    done = CliRunner().invoke(app, ["make", str(folder), "--moe"])
    assert done.exit_code == 0, done.output
    said = CliRunner().invoke(app, ["info", str(folder)])
    assert "2 layers of 64, 1 with 12 experts: a token uses 3 and 1 shared" in said.stdout
    names = {name for name in tensor_table(folder) if name.startswith("layers.1")}
    assert {"layers.1.gate.weight", "layers.1.experts.11.w3.weight", "layers.1.shared_experts.w2.weight"} <= names
    assert not any("feed_forward" in name for name in names)

    tts = voxkern.load(folder, max_batch=4, backend="torch", device="cpu")
    texts, seeds = ["one two", "three", "seven three one"], [5, 6, 7]
    together = tts.generate(texts, seed=seeds, max_frames=5)
    for text, seed, audio in zip(texts, seeds, together, strict=True):
        alone = tts.generate(text, seed=seed, max_frames=5)
        assert np.array_equal(alone.codes, audio.codes)
        assert alone.samples.any()
    done = CliRunner().invoke(app, ["make", str(folder), "--moe", "--full"])
    assert "not both" in done.output


def test_mixtrals_older_form_loads(tmp_path: Path) -> None:
    older = {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    model = read_checkpoint(make_checkpoint(tmp_path, overrides=older)).model
    assert all(isinstance(layer, MoEBlock) and layer.n_shared == 0 for layer in model.layers)
    assert model.layers[0].experts[3].w1.weight.shape == (160, 64)


@pytest.mark.parametrize(
    ("lost", "gained", "message"),
    [
        ("layers.1.experts.7.w2.weight", None, r"layers.1.experts.7.w2.weight is missing"),
        ("layers.1.gate.weight", None, r"layers.1.gate.weight is missing"),
        ("layers.1.shared_experts.w1.weight", None, r"layers.1.shared_experts.w1.weight is missing"),
        (None, "layers.1.experts.12.w1.weight", r"layers.1.experts.12.w1.weight is not a tensor of this model"),
    ],
)
def test_experts_missing_or_too_many_are_named(
    tmp_path: Path, lost: str | None, gained: str | None, message: str
) -> None:
    params = {**tiny_params(), "moe": TINY_MOE}
    state = dict(read_checkpoint(make_checkpoint(tmp_path, overrides={"moe": TINY_MOE})).model.state_dict())
    state = {name: tensor.clone() for name, tensor in state.items() if name != lost}
    if gained:
        state[gained] = torch.zeros(48, 64)
    write_checkpoint(tmp_path, params, state, (tmp_path / "tekken.json").read_text(), {})
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_experts_load_without_a_second_copy(tmp_path: Path, dtype: str) -> None:
    """Loading 256 experts (403 M parameters) takes less than 1.2 x the bytes of the weights.

    A fresh process loads the demo voice and then the experts. The test measures how much the experts raise its peak
    memory.
    """
    moe = {**TINY_MOE, "num_experts": 256, "expert_hidden_dim": 8192}
    make_checkpoint(tmp_path, overrides={"moe": moe})
    sizes = [t.numel for t in tensor_table(tmp_path).values()]
    peak = "next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024"
    code = f"import sys, voxkern; voxkern.load(); a = {peak}; tts = voxkern.load(*sys.argv[1:]); print({peak} - a)"
    command = [sys.executable, "-c", code, str(tmp_path), "cpu", dtype]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = sum(sizes) * (2 if dtype == "bfloat16" else 4)
    print(f"{dtype}: {taken / 1e9:.2f} GB taken for {weights / 1e9:.2f} GB of weights")
    assert taken < 1.2 * weights


def _fill(theirs: nn.Module, mine: MoEBlock) -> None:
    """Copy the weights of `mine` in Hugging Face's layout: all experts in one tensor, gate stacked above up."""
    experts = list(mine.experts)
    theirs.gate.weight.copy_(mine.gate.weight)
    theirs.experts.gate_up_proj.copy_(torch.stack([torch.cat((e.w1.weight, e.w3.weight)) for e in experts]))
    theirs.experts.down_proj.copy_(torch.stack([e.w2.weight for e in experts]))
    if mine.n_shared:
        shared = mine.shared_experts
        theirs.shared_experts.gate_proj.weight.copy_(shared.w1.weight)
        theirs.shared_experts.up_proj.weight.copy_(shared.w3.weight)
        theirs.shared_experts.down_proj.weight.copy_(shared.w2.weight)


def _mixtral(layer: MoEBlock) -> nn.Module:
    models = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed")
    config = models.MixtralConfig(
        hidden_size=64, intermediate_size=80, num_local_experts=8, num_experts_per_tok=2, hidden_act="silu",
    )  # fmt: skip
    return models.MixtralSparseMoeBlock(config)  # type: ignore[no-any-return]


def _mistral4(layer: MoEBlock) -> nn.Module:
    models = pytest.importorskip("transformers.models.mistral4.modeling_mistral4", reason="transformers is missing")
    config = models.Mistral4Config(
        hidden_size=64, moe_intermediate_size=80, n_routed_experts=16, num_local_experts=16, num_experts_per_tok=4,
        n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    return models.Mistral4MoE(config)  # type: ignore[no-any-return]


PUBLIC = {
    "mixtral": (_mixtral, {"num_experts": 8, "num_experts_per_tok": 2}),
    "mistral4": (
        _mistral4,
        {
            "num_experts": 16, "num_experts_per_tok": 4, "num_shared_experts": 2, "num_expert_groups": 4,
            "num_expert_groups_per_tok": 2, "routed_scale": 2.5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_equals_the_public_block(name: str) -> None:
    """The layer equals the block of Hugging Face transformers on the same weights, in fp32."""
    make, sizes = PUBLIC[name]
    layer = block(seed=4, dim=64, expert_hidden_dim=80, **sizes)
    theirs = make(layer).requires_grad_(False)
    _fill(theirs, layer)
    x: Tensor = torch.randn(3, 21, 64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer.mixture(x), theirs(x), rtol=1e-5, atol=1e-5)
