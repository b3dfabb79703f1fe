"""Tests of bench/micro/depth.py: the depth transformer, and the figures that compare it with the flow head."""

import pytest
import torch

from bench.micro import depth
from bench.micro.depth import STEPS, DepthTransformer, candidates, depth_work, flow_work
from bench.static.roofline import GPUS, predict
from bench.static.work import dram_bytes, launches, public, total_multiply_adds, weight_bytes
from voxkern.random_checkpoint import random_tensor, tiny_params
from voxkern.reference import Config

LAYER = 3072 * 4096 + 2 * 3072 * 1024 + 4096 * 3072 + 3 * 3072 * 9216


@pytest.fixture(scope="module")
def tiny() -> DepthTransformer:
    config = Config.from_params(tiny_params())
    module, g = DepthTransformer(config.acoustic_transformer, config.audio), torch.Generator().manual_seed(0)
    module.load_state_dict({name: random_tensor(name, t.shape, g) for name, t in module.state_dict().items()})
    return module.requires_grad_(False)


def test_a_cached_decode_is_the_whole_causal_forward(tiny: DepthTransformer) -> None:
    g = torch.Generator().manual_seed(1)
    h, semantic = torch.randn(3, 64, generator=g), torch.randint(2, 64, (3,), generator=g)
    codes, logits = tiny.decode(h, semantic)
    torch.testing.assert_close(tiny(h, codes), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(codes[:, 0], semantic)
    assert torch.equal(codes[:, 1:], logits.argmax(-1) + 2)
    assert 2 <= int(codes[:, 1:].min()) < int(codes[:, 1:].max()) < 2 + 21
    alone, _ = tiny.decode(h[1:2], semantic[1:2])
    assert torch.equal(alone[0], codes[1])


@pytest.mark.parametrize("i", [0, 1, 17, 35])
def test_a_code_sees_those_before_it_and_no_others(tiny: DepthTransformer, i: int) -> None:
    g = torch.Generator().manual_seed(2)
    h, codes = torch.randn(1, 64, generator=g), torch.randint(2, 23, (1, 37), generator=g)
    other = codes.clone()
    other[:, i] = 2 + (codes[:, i] - 1) % 21
    before, after = tiny(h, codes)[0], tiny(h, other)[0]
    assert torch.allclose(before[:i], after[:i], rtol=0, atol=1e-6)
    assert not torch.allclose(before[i], after[i], rtol=0, atol=1e-3)


def test_weights_streamed_by_hand() -> None:
    """The bytes of weights of both candidates equal those computed by hand.

    The depth transformer reads 3 layers and an output head for each of 36 codes, and projects the hidden state once.
    The flow head reads 3 layers and the state's projections in each step, and projects the hidden state once. Instead
    of the first layer's weights of q, k and v it reads an fp32 weight with 36 columns.
    """
    found = {name: weight_bytes(work) for name, work in candidates().items()}
    assert found.pop(("depth transformer", "codes:36")) == 2 * (36 * (3 * LAYER + 21 * 3072) + 3072 * 3072)
    for steps in STEPS:
        ends = 2 * 36 * 3072 * steps  # input projection before each step, output projection after it
        once = 3072 * 3072 + 6144 * 3072
        layers = 2 * steps * (3 * LAYER - 6144 * 3072) + 4 * steps * 6144 * 36
        assert found["flow head", f"euler:{steps}"] == layers + 2 * (ends + once)


def test_launches_by_hand() -> None:
    found = [launches(work) for work in candidates().values()]
    assert found == [36 * (3 * 5 + 1 + 1 + 1) + 1, *(13 * steps + 3 for steps in STEPS)]
    found = [launches(work) for work in candidates(2).values()]
    assert found == [36 * (3 * 5 + 1 + 1 + 1) + 1, *(13 * steps + 3 for steps in STEPS)]


def test_the_depth_transformers_weights_are_its_modules() -> None:
    """Layers are read once per code; output heads and the hidden state's projection are read once per frame.

    Embeddings and norms are not counted as weights, because their bytes are as few as those of activations.
    """
    with torch.device("meta"):
        module = DepthTransformer(public().acoustic_transformer, public().audio)
    layers = sum(p.numel() for p in module.layers.parameters() if p.ndim == 2)
    others = sum(p.numel() for part in (module.outputs, module.llm_projection) for p in part.parameters())
    work = depth_work(public().acoustic_transformer, public().audio, 1)
    assert weight_bytes(work) == 2 * (36 * layers + others)
    assert total_multiply_adds(work) == 36 * layers + others + 3 * 36 * 37 // 2 * 2 * 4096


@pytest.mark.parametrize("B", [1, 8, 64])
def test_more_steps_cost_more(B: int) -> None:
    works = [flow_work(B, steps) for steps in STEPS]
    for gpu in GPUS.values():
        times = [predict(work, gpu) for work in works]
        assert times == sorted(times)
    assert [dram_bytes(work) for work in works] == sorted(dram_bytes(work) for work in works)


def test_rows_say_how_they_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = depth.arithmetic_rows()
    assert {row.how for row in rows if "time" in row.metric} == {"predicted"}
    assert {row.how for row in rows if "time" not in row.metric} == {"counted"}
    assert len({row.key for row in rows}) == len(rows)
    monkeypatch.setitem(depth.ROUNDS, "reduced", 2)
    monkeypatch.setattr(depth, "STEPS", (1,))
    measured = depth.measured_rows("reduced")
    assert [(row.subject, row.steps) for row in measured] == [
        ("depth transformer", "codes:36"),
        ("flow head", "euler:1"),
    ]
    assert all(row.how == "measured" and row.low <= row.value <= row.high for row in measured)
