"""Tests of the fused mixture of experts: accuracy against fp64, the same bits in any batch, and launches only."""

import copy
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from checks import CPU, tiles_of, with_reference_codec
from torch import Tensor

import voxkern
from bench.ops.accuracy import judge
from bench.static.counters import counting, launches_only
from voxkern.checkpoint import read_checkpoint
from voxkern.fused import backbone
from voxkern.fused.backbone import FusedBackbone
from voxkern.fused.moe import FusedMoE
from voxkern.kernels import launch_config
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint
from voxkern.reference.attention import PagedCache
from voxkern.reference.config import MoEConfig
from voxkern.reference.moe import MoEBlock, route

DIM, HIDDEN = 72, 40  # not multiples of the interpreter's tiles of 32 and 64, and more than one tile of 32


def block(
    dtype: torch.dtype = torch.float32,
    scoring: str = "softmax",
    correction: bool = False,
    device: torch.device = CPU,
    **moe: Any,
) -> MoEBlock:
    """Return a layer of random weights; those of the gate are so large that two logits are seldom nearly equal."""
    torch.manual_seed(0)
    sizes = {"num_experts": 12, "num_experts_per_tok": 3, "expert_hidden_dim": HIDDEN} | moe
    layer = MoEBlock(DIM, MoEConfig(**sizes), 2, 1, 8, 1e-5, scoring, correction).requires_grad_(False)
    layer.gate.weight.copy_(torch.randn_like(layer.gate.weight))
    layer.ffn_norm.weight.copy_(1 + 0.1 * torch.randn(DIM))
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.copy_(0.1 * torch.randn_like(layer.gate.e_score_correction_bias))
    return layer.to(device, dtype)


def tokens(M: int, dtype: torch.dtype = torch.float32, seed: int = 1, device: torch.device = CPU) -> Tensor:
    return torch.randn(M, DIM, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def plain(layer: MoEBlock, u: Tensor) -> Tensor:
    """Return the stream after the module's mixture; the module gets each token as a request of its own."""
    u = u.unsqueeze(1)
    return (u + layer.mixture(layer.ffn_norm(u))).squeeze(1)


def run(layer: MoEBlock, u: Tensor, max_rows: int, phase: str = "decode") -> Tensor:
    fused, stream = FusedMoE(layer, max_rows, phase), u.clone()
    for part in vars(fused.scratch).values():  # a run must not read the results of an earlier run
        part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max)
    fused.run(stream)
    return stream


def decided(layer: MoEBlock, u: Tensor) -> Tensor:
    """Return bool [M], whether a token keeps its experts when its logits get noise of 0.03, as bf16 may add."""
    exact = copy.deepcopy(layer).double()
    logits = exact.gate(exact.ffn_norm(u.double()))
    noise = [0.03 * torch.randn(logits.shape, dtype=logits.dtype).to(logits.device) for _ in range(8)]
    near = [route(logits + one, exact.routing)[0].sort().values for one in noise]
    ids = route(logits, exact.routing)[0].sort().values
    return functools.reduce(torch.logical_and, [(ids == other).all(1) for other in near])


def assert_accurate(layer: MoEBlock, u: Tensor, out: Tensor) -> None:
    """Check accuracy against fp64 (bench/ops/accuracy.py), on tokens with experts that do not depend on rounding."""
    same = torch.ones(len(u), dtype=torch.bool, device=u.device) if u.dtype == torch.float32 else decided(layer, u)
    assert same.float().mean() > 0.5
    exact = plain(copy.deepcopy(layer).double(), u.double())
    verdict = judge(out[same], plain(layer, u)[same], exact[same])
    assert verdict.right, str(verdict)


EXPERTS = [(8, 2), (128, 4), (16, 1), (12, 3)]


@pytest.mark.parametrize("M", [1, 2, 7, pytest.param(64, marks=pytest.mark.slow), 300])
@pytest.mark.parametrize(("E", "k"), EXPERTS)
def test_right(M: int, E: int, k: int, device: torch.device) -> None:
    layer = block(num_experts=E, num_experts_per_tok=k, num_shared_experts=1, device=device)
    u = tokens(M, device=device)
    assert_accurate(layer, u, run(layer, u, M, "decode" if M <= 64 else "prefill"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_right_in_half_precision(dtype: torch.dtype, phase: str, tiles: str, device: torch.device) -> None:
    layer = block(dtype, num_shared_experts=2, device=device)
    u = tokens(37, dtype, device=device)
    with tiles_of(tiles):
        assert_accurate(layer, u, run(layer, u, 40, phase))


@pytest.mark.slow
def test_right_in_half_precision_with_many_experts(device: torch.device) -> None:
    layer = block(torch.bfloat16, num_experts=128, num_experts_per_tok=4, num_shared_experts=1, device=device)
    u = tokens(300, torch.bfloat16, device=device)
    assert_accurate(layer, u, run(layer, u, 300, "prefill"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_shared_experts": 2, "routed_scale": 2.5},
        {"num_expert_groups": 4, "num_expert_groups_per_tok": 2},
        {"scoring": "sigmoid", "correction": True, "num_expert_groups": 3, "num_expert_groups_per_tok": 2},
    ],
)
def test_every_way_of_routing(change: dict[str, Any], device: torch.device) -> None:
    layer = block(**change, device=device)
    u = tokens(19, device=device)
    assert_accurate(layer, u, run(layer, u, 20))


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_all_tokens_on_one_expert(phase: str, device: torch.device) -> None:
    """Every tile belongs to expert 5; the weights of all other experts are NaN, which would show in the result."""
    layer = block(num_experts_per_tok=1, device=device)
    layer.gate.weight.zero_()
    layer.gate.weight[5] = 1.0
    u = tokens(37, device=device).abs()
    for i, expert in enumerate(layer.experts):
        if i != 5:
            for weight in expert.parameters():
                weight.fill_(torch.nan)
    out = run(layer, u, 40, phase)
    assert out.isfinite().all()
    assert_accurate(layer, u, out)


def test_ties_go_to_the_lowest_id(device: torch.device) -> None:
    layer = block(device=device)
    layer.gate.weight.zero_()
    u = tokens(7, device=device)
    fused = FusedMoE(layer, 8)
    fused.run(u)
    assert fused.scratch.ids[:7].tolist() == [[0, 1, 2]] * 7
    torch.testing.assert_close(fused.scratch.weights[:7], torch.full((7, 3), 1 / 3, device=device))


def test_a_token_of_nan_spoils_no_other(device: torch.device) -> None:
    layer, u = block(num_shared_experts=1, device=device), tokens(7, device=device)
    good = run(layer, u, 8)
    u[3] = torch.nan
    out = run(layer, u, 8)
    others = torch.arange(7, device=device) != 3
    assert torch.equal(out[others], good[others])
    assert out[3].isnan().all()


@pytest.mark.interpreter("the constants of all launches are recorded")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(
    ("arch", "phase", "max_rows"),
    [("sm_90", "decode", 8), ("sm_90", "decode", 16), ("interpreter", "decode", 64), ("interpreter", "prefill", 96)],
)
def test_alone_equals_batched(dtype: torch.dtype, arch: str, phase: str, max_rows: int) -> None:
    """A token gives the same bits alone and at any place in a batch, beside other tokens or rows of zeros.

    All launches have the same constants. The tiles have 8 or 16 rows, which are columns of numpy's products: with 32 or
    more columns, the bits of a column would depend on its position.
    """
    layer, M = block(dtype, num_shared_experts=1), min(max_rows, 40)
    u = tokens(M, dtype)
    used: list[set[str]] = []

    def launched(u: Tensor) -> Tensor:
        with counting(whole=True, indirect=list(layer.parameters())) as launches:
            out = run(layer, u, max_rows, phase)
        used.append({f"{launch.kernel} {sorted(launch.constants.items(), key=str)}" for launch in launches})
        return out

    with launch_config.target_arch(arch):
        together = launched(u)
        for i in (0, M // 2, M - 1):
            assert torch.equal(launched(u[i : i + 1])[0], together[i])
        padded = torch.zeros_like(u[:3])
        padded[1] = u[4]
        assert torch.equal(launched(padded)[1], together[4])
    assert all(constants == used[0] for constants in used)


@pytest.mark.only_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("phase", "max_rows"), [("decode", 8), ("decode", 64), ("prefill", 96)])
def test_alone_equals_batched_on_a_gpu(dtype: torch.dtype, phase: str, max_rows: int, device: torch.device) -> None:
    layer, M = block(dtype, num_shared_experts=1, device=device), min(max_rows, 40)
    u = tokens(M, dtype, device=device)
    together = run(layer, u, max_rows, phase)
    for i in range(M):
        assert torch.equal(run(layer, u[i : i + 1], max_rows, phase)[0], together[i])


@pytest.mark.interpreter("launches are recorded")
@pytest.mark.parametrize(("phase", "max_rows", "n_launches"), [("decode", 64, 5), ("prefill", 65, 6)])
def test_a_run_is_launches_and_nothing_else(phase: str, max_rows: int, n_launches: int) -> None:
    layer, u = block(num_shared_experts=1), tokens(7)
    fused = FusedMoE(layer, max_rows, phase)
    expected = u.clone()
    fused.run(expected)
    with launches_only(indirect=list(layer.parameters())) as launches:
        fused.run(u)
    assert len(launches) == n_launches
    assert torch.equal(u, expected)


def test_rows_of_the_stream_may_lie_apart(device: torch.device) -> None:
    layer, u = block(device=device), tokens(7, device=device)
    wide = torch.full((7, 2 * DIM), torch.nan, device=device)
    wide[:, :DIM] = u
    FusedMoE(layer, 8).run(wide[:, :DIM])
    assert torch.equal(wide[:, :DIM], run(layer, u, 8))
    assert wide[:, DIM:].isnan().all()


def test_weights_may_be_replaced_and_written(device: torch.device) -> None:
    layer, u = block(num_shared_experts=1, device=device), tokens(7, device=device)
    fused = FusedMoE(layer, 8)
    fused.run(u.clone())
    state = {name: tensor.flip(0) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    written = u.clone()
    fused.run(written)
    assert torch.equal(written, run(layer, u, 8))
    layer.load_state_dict({name: tensor.clone().flip(0) for name, tensor in state.items()}, assign=True)
    replaced = u.clone()
    fused.run(replaced)
    assert torch.equal(replaced, run(layer, u, 8))
    assert not torch.equal(replaced, written)


def test_layers_share_their_scratch(device: torch.device) -> None:
    one, other = (block(num_shared_experts=1, device=device) for _ in range(2))
    u = tokens(7, device=device)
    other.load_state_dict({name: tensor.flip(0) for name, tensor in one.state_dict().items()})
    first = FusedMoE(one, 8)
    second = FusedMoE(other, 8, scratch=first.scratch)
    stream = u.clone()
    first.run(stream)
    second.run(stream)
    assert torch.equal(stream, run(other, run(one, u, 8), 8))
    with pytest.raises(
        ValueError, match=r"scratch.logits is torch.float32 \[8, 12\] but this layer needs .* \[9, 12\]"
    ):
        FusedMoE(one, 9, scratch=first.scratch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny fp32 checkpoint with experts in its second layer, and return its folder."""
    return make_checkpoint(tmp_path_factory.mktemp("moe"), dtype=torch.float32, overrides={"moe": TINY_MOE})


@torch.inference_mode()
def test_a_backbone_with_experts(folder: Path, device: torch.device) -> None:
    """Prompts and single tokens run through the fused backbone, also after the weights' dtype has changed."""
    model = read_checkpoint(folder, device=device).model
    u = torch.randn(2, 21, 64, generator=torch.Generator().manual_seed(0)).to(device)
    expected = model.hidden_states(u)
    voxkern.accelerate(model, 2)
    kv, table = torch.full((2, 2, 2, 2, 64, 16), torch.nan, device=device), torch.tensor([[1], [0]], device=device)
    for start, stop in ((0, 9), (9, 20), (20, 21)):
        lengths = torch.tensor([stop, stop], device=device)
        h = model.hidden_states(u[:, start:stop], PagedCache(kv, table, lengths))
        torch.testing.assert_close(h, expected[:, start:stop], rtol=1e-4, atol=1e-5)
    with mock.patch.object(backbone, "MOE_ROWS", 16):
        fused = FusedBackbone(model, 2)
        torch.testing.assert_close(fused(u), expected, rtol=1e-4, atol=1e-5)
    assert model.bfloat16().hidden_states(u.bfloat16()).dtype == torch.bfloat16


def test_speaks_as_the_torch_backend_does(folder: Path, device: torch.device) -> None:
    arguments = {"text": ["a", "hello"], "voice": ["ada", "bob"], "seed": [1, 2], "max_frames": [3, 5]}
    tts = with_reference_codec(voxkern.load(folder, device=device, backend="triton", max_batch=2))
    mine = tts.generate(**arguments, steps=2)
    theirs = voxkern.load(folder, device=device, backend="torch", max_batch=2).generate(**arguments, steps=2)
    for one, other in zip(mine, theirs, strict=True):
        assert np.array_equal(one.codes, other.codes)
    alone = tts.generate("a", voice="ada", seed=1, max_frames=3, steps=2)
    assert np.array_equal(alone.codes, mine[0].codes)


@pytest.mark.parametrize(
    ("max_rows", "phase", "stream", "error", "message"),
    [
        (513, "decode", None, ValueError, r"max_rows is 513 but must lie in 1..512"),
        (4, "train", None, ValueError, r"phase is 'train' but must be 'decode', 'prefill' or 'codec'"),
        (4, "decode", tokens(5), ValueError, r"x has 5 rows but must have 1..4"),
        (4, "decode", torch.ones(2, DIM + 1), ValueError, r"stream is \[2, 73\] but must be \[M, 72\]"),
        (
            4,
            "decode",
            tokens(2, torch.bfloat16),
            TypeError,
            r"stream is torch.bfloat16 and the weights are",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    max_rows: int, phase: str, stream: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FusedMoE(block(), max_rows, phase).run(stream)
