"""Tests of a frame's cost: its launches, multiply-adds and bytes stay within limits."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from plant import case_of, entry_of

from bench.ops.registry import Case, TensorMaker
from bench.static import frame
from bench.static.counters import counting, launches_only
from bench.static.frame import (
    backbone_cost,
    cache_traffic,
    frame_cost,
    plain_multiply_adds,
    public_backbone,
    public_head,
)
from voxkern.fused.mlp_head import FusedMLPHead
from voxkern.fused.transformer_head import FusedTransformerHead
from voxkern.kernels import launch_config
from voxkern.kernels.adaln import launch_adaln_modulation
from voxkern.kernels.qkv import launch_norm_qkv, launch_norm_qkv_append
from voxkern.random_checkpoint import tiny_params
from voxkern.reference import Config
from voxkern.reference.model import make_head
from voxkern.reference.noise import seed_tensor
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

LAUNCHES = {1: 95, 32: 95}  # by max_batch: launches of the flow head in a frame
WHOLE = {1: 227, 32: 227}  # by max_batch: launches of flow head, decode state and backbone in a frame


@pytest.mark.parametrize("max_batch", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_launches_and_nothing_else(max_batch: int) -> None:
    """The head has three layers and seven steps, as in the public model; its widths do not change the launches."""
    params = copy.deepcopy(tiny_params())
    params["multimodal"]["audio_model_args"]["acoustic_transformer_args"]["n_layers"] = 3
    config = Config.from_params(params)
    head = FlowMatchingAudioTransformer(config.acoustic_transformer, config.audio).bfloat16()
    fused = FusedTransformerHead(head, max_batch, torch.nn.Embedding(config.audio.embedding_rows, 64).bfloat16())
    B = min(max_batch, 2)
    h, alpha = torch.zeros(B, 64, dtype=torch.bfloat16), torch.ones(B)
    seed, frame = seed_tensor([5] * B), torch.zeros(B, dtype=torch.int64)
    with torch.inference_mode():
        fused.generate_codes(h, alpha, seed=seed, frame=frame)
        with launches_only() as launches:
            fused.generate_codes(h, alpha, seed=seed, frame=frame)
    assert len(launches) == LAUNCHES[max_batch]


@pytest.mark.parametrize("B", LAUNCHES)
def test_public_shapes(B: int) -> None:
    """Launches and multiply-adds are counted on the meta device, from shapes; a slow test counts bytes."""
    head, embeddings = public_head("meta")
    cost = frame_cost(head, B, embeddings, count_bytes=False)
    assert cost.launches == LAUNCHES[B]
    assert cost.multiply_adds <= 0.76 * plain_multiply_adds(head, B)


@pytest.mark.parametrize("B", WHOLE)
def test_a_whole_frame_at_the_public_shapes(B: int) -> None:
    """A frame has the launches of the head and of the backbone, and one launch for the decode state.

    tests/test_fused_backbone.py runs a whole frame and counts the same parts.
    """
    head, embeddings = public_head("meta")
    backbone = backbone_cost(public_backbone("meta"), B, count_bytes=False).launches
    assert backbone == 5 * 26 + 1
    assert frame_cost(head, B, embeddings, count_bytes=False).launches + 1 + backbone == WHOLE[B]


@pytest.mark.parametrize("context", [64, 400, 1000])
def test_keys_and_values_are_read_once(context: int) -> None:
    """No key or value is loaded twice.

    One block per query head would load keys and values again from the L2 cache, which DRAM bytes do not show.
    """
    traffic = cache_traffic(context)
    assert traffic.fewest <= traffic.kv <= 1.05 * traffic.fewest
    assert traffic.again == 0
    assert traffic.parts <= 0.05 * traffic.kv


@pytest.mark.slow
def test_keys_and_values_are_read_once_at_4096() -> None:
    traffic = cache_traffic(4096)
    assert traffic.fewest <= traffic.kv <= 1.05 * traffic.fewest
    assert traffic.again == 0


def test_products_as_usually_written() -> None:
    """At batch 1, 7 steps x 6 rows x 349.2 M multiply-adds and the projections are 29.4 GFLOP."""
    head, _ = public_head("meta")
    assert 2 * plain_multiply_adds(head, 1) == pytest.approx(29.4e9, rel=0.01)


@pytest.mark.parametrize(
    ("n_layers", "steps", "max_batch", "solver"),
    [(1, 1, 1, "euler"), pytest.param(3, 7, 32, "euler", marks=pytest.mark.slow), (4, 4, 2, "ab2")],
)
def test_the_velocity_mlp_has_two_launches_a_block_and_one_a_step(
    n_layers: int, steps: int, max_batch: int, solver: str
) -> None:
    """Five more launches run once per frame.

    Two launches compute the semantic codes, and one each the hidden states, the modulations and the noise.
    """
    params = copy.deepcopy(tiny_params(velocity_mlp=True))
    params["multimodal"]["audio_model_args"]["acoustic_transformer_args"]["n_layers"] = n_layers
    config = Config.from_params(params)
    head = make_head(config.acoustic_transformer, config.audio).bfloat16().requires_grad_(False)
    fused = FusedMLPHead(head, max_batch, torch.nn.Embedding(config.audio.embedding_rows, 64).bfloat16())
    B = min(max_batch, 2)
    h, alpha = torch.zeros(B, 64, dtype=torch.bfloat16), torch.ones(B)
    asked = {"seed": seed_tensor([5] * B), "frame": torch.zeros(B, dtype=torch.int64), "steps": steps}
    with torch.inference_mode():
        fused.generate_codes(h, alpha, **asked, solver=solver)
        with launches_only(indirect=list(head.parameters())) as launches:
            fused.generate_codes(h, alpha, **asked, solver=solver)
    assert len(launches) <= steps * (2 * n_layers + 1) + 5


@pytest.mark.parametrize("B", LAUNCHES)
def test_public_shapes_with_the_velocity_mlp(B: int) -> None:
    """A frame takes at most 54 launches.

    The modulations of the branch without a hidden state are a third of all multiply-adds; a table replaces them.
    """
    head, embeddings = public_head("meta", velocity_mlp=True)
    cost = frame_cost(head, B, embeddings, count_bytes=False)
    assert cost.launches <= 54
    assert cost.multiply_adds <= 0.69 * plain_multiply_adds(head, B)


@pytest.mark.parametrize(
    ("name", "launch", "case"),
    [
        ("norm_qkv", launch_norm_qkv, "odd"),
        ("norm_qkv", launch_norm_qkv, "odd-some-queries"),
        ("norm_qkv_append", launch_norm_qkv_append, "odd"),
    ],
)
def test_q_k_v_in_one_grid_is_three_grids(name: str, launch: Callable[..., None], case: str) -> None:
    """One launch for q, k and v moves the same weight and result bytes as the three that frame.py counts."""
    entry = entry_of(name)
    args = entry.args(case_of(entry, case), TensorMaker(torch.bfloat16))
    if name == "norm_qkv":
        args = {"out": args["x"].new_empty(len(args["x"]), sum(len(args[w]) for w in ("wq", "wk", "wv")))} | args
    else:
        args["lengths"].clamp_(1)  # every row writes its keys and values
    with counting(whole=True) as together:
        launch(**args)
    written = 0
    for _, (launch_part, *part) in frame.parts(name, launch, inspect.signature(launch).bind(**args).args):
        with counting(whole=True) as alone:
            launch_part(*part)
        assert together[0].of(part[3]) == alone[0].of(part[3])
        written += alone[0].traffic()["p_y"].dram
    results = ("p_y",) if name == "norm_qkv" else ("p_out", "p_kv")
    assert sum(together[0].traffic()[result].dram for result in results) == written


def test_modulations_in_one_grid_are_a_grid_each() -> None:
    """A layer's weight, bias and results take the same bytes in the joint launch and in a launch of their own.

    All blocks of the joint launch are counted. In a layer's own launch, only the outer blocks are counted, as in
    bench/static/frame.py.
    """
    entry = entry_of("adaln_modulation")
    sizes = {"N": 3 * 130, "K": 130, "blocks": 3, "S": 7, "R": 32, "max_rows": 2048}
    args = entry.args(Case("odd", sizes), TensorMaker(torch.bfloat16))
    lists = [*args["weights"], *args["biases"]]
    with launch_config.target_arch("sm_90"), counting(whole=True, indirect=lists) as together:
        entry.op.run(**args)
    written = 0
    out = torch.empty(7, 32, sum(map(len, args["weights"])), dtype=torch.bfloat16)
    for _, (launch, *part) in frame.parts("adaln_modulation", launch_adaln_modulation, (out, *args.values())):
        weight, bias = part[3][0], part[4][0]
        with launch_config.target_arch("sm_90"), counting(indirect=[weight, bias]) as alone:
            launch(*part)
        for tensor in (weight, bias):
            assert together[0].of(tensor) == alone[0].of(tensor)
        written += alone[0].traffic()["p_y"].dram
    assert together[0].traffic()["p_y"].dram == written == out.numel() * out.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("velocity_mlp", [False, True])
@pytest.mark.parametrize("B", LAUNCHES)
def test_bytes_at_the_public_shapes(B: int, velocity_mlp: bool) -> None:
    """A frame moves at most 1.05 times the fewest bytes.

    At batch 32, the transformer head's scratch memory adds about a tenth.
    """
    head, embeddings = public_head(velocity_mlp=velocity_mlp)
    cost = frame_cost(head, B, embeddings)
    print(f"batch {B}: {cost}")
    assert cost.dram - cost.scratch <= 1.05 * cost.fewest
    assert cost.dram <= (1.12 if B == 32 and not velocity_mlp else 1.05) * cost.fewest
    backbone = backbone_cost(public_backbone(), B)
    print(f"backbone, batch {B}: {backbone}")
    assert backbone.dram <= 1.05 * backbone.fewest
