"""What is the experts' own; what every operator must do is in test_operators.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import assert_right
from plant import entry_of
from torch import Tensor

from bench.counters import counting
from bench.experts import experts_down_inputs, experts_up_inputs
from bench.registry import Case, Maker, listed
from voxkern.kernels import settings
from voxkern.kernels.experts import addresses, combine, experts_down, experts_up
from voxkern.reference.config import MoEConfig
from voxkern.reference.moe import MoEBlock
from voxkern.twins.moe import MoETwin

SIZES = {"M": 7, "E": 5, "top_k": 2, "n_shared": 1, "max_rows": 8, "decode": 1, "N": 75, "K": 150}


def up(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return experts_up_inputs(SimpleNamespace(**SIZES), Maker(dtype))


def down(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return experts_down_inputs(SimpleNamespace(**SIZES), Maker(dtype))


@pytest.mark.parametrize("operator", ["experts_up", "experts_down"])
@pytest.mark.parametrize(("rows", "decode"), [(1, 1), (8, 1), (32, 1), (300, 0)])
def test_right_for_these_rows(operator: str, rows: int, decode: int) -> None:
    sizes = {**SIZES, "M": rows, "max_rows": rows, "decode": decode, "N": 97}
    with settings.pretend("sm_90"):
        assert_right(entry_of(operator), Case(f"rows-{rows}", sizes), "bf16")


def small_4() -> MoEBlock:
    """A layer of Mistral Small 4: 12.8 GB of zeros, which take no memory until they are written."""
    moe = MoEConfig(128, 4, 2048, num_shared_experts=1)
    with torch.device("meta"):
        layer = MoEBlock(4096, moe, 32, 32, 128, 1e-6).bfloat16()
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("M", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_bytes_of_the_experts_that_are_hit(M: int) -> None:
    """Mistral Small 4's shapes: every expert hit is loaded once, no other at all."""
    layer = small_4()
    layer.gate.weight.copy_(torch.randn(128, 4096, generator=torch.Generator().manual_seed(0)))
    layer.ffn_norm.weight.fill_(1.0)
    stream = torch.randn(M, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts = [*layer.experts.parameters(), *layer.shared_experts.parameters()]
    with settings.pretend("sm_90"), counting(whole=True, reached=experts) as launches:
        twin = MoETwin(layer, M)
        twin.run(stream)
    hit = twin.scratch.ids.unique()
    assert len(hit) == (5 if M == 1 else 30)
    traffic = [t for launch in launches for name, t in launch.traffic().items() if name.startswith("reached")]
    least = len(hit) * 3 * 4096 * 2048 * 2
    print(f"{M} tokens, {len(hit)} experts: {sum(t.dram for t in traffic) / least:.4f} of their bytes from DRAM")
    assert sum(t.dram for t in traffic) == least
    assert sum(t.again for t in traffic) == 0
    assert len(launches) == 5


def test_weights_that_begin_anywhere() -> None:
    """A memory-mapped file aligns nothing to 16 bytes: then the kernel may not count on it."""
    args = up(torch.bfloat16)
    expected = experts_up(**args)
    moved = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape) for w in args["w1"]]
    assert moved[0].data_ptr() % 16
    assert not addresses(moved).aligned
    assert torch.equal(experts_up(**(args | {"w1": moved})), expected)
    aligned = [torch.zeros(8, 64, dtype=torch.bfloat16) for _ in range(3)]
    assert addresses(aligned).aligned
    assert not addresses([*aligned, torch.zeros(8, 65, dtype=torch.bfloat16)[:, :64]]).aligned


def test_addresses_are_those_of_now() -> None:
    one, other = torch.ones(3, 4), torch.ones(3, 4)
    assert addresses([one, other]).table.tolist() == [[one.data_ptr(), 4], [other.data_ptr(), 4]]
    assert addresses([one, other]) is addresses([one, other])
    other.data = torch.ones(3, 4)
    assert addresses([one, other]).table[1, 0] == other.data_ptr()


@pytest.mark.parametrize("bad", [-2, 6])
def test_an_expert_out_of_range_is_named(bad: int) -> None:
    for operator, args in ((experts_up, up()), (experts_down, down())):
        args["tiles"] = args["tiles"].clone()
        args["tiles"][1, 0] = bad
        with pytest.raises(ValueError, match=rf"tiles has expert {bad} but must have -1..5"):
            operator(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(7, 149)}, ValueError, r"norm is \[150\] but must be \[149\]"),
        ({"w1": []}, ValueError, r"w1 is empty"),
        ({"w1": [torch.ones(75, 149)]}, ValueError, r"w1\[0\] is \[75, 149\] but must be \[75, 150\]"),
        ({"w3": [torch.ones(75, 150)] * 5}, ValueError, r"w3 must be 6 experts of \[75, 150\]"),
        ({"w3": [torch.ones(75, 150).bfloat16()] * 6}, TypeError, r"w3\[0\] is torch.bfloat16"),
        ({"pairs": torch.zeros(8, dtype=torch.int32)}, ValueError, r"pairs has 8 but must have a multiple of 7"),
        ({"pairs": torch.zeros(21)}, TypeError, r"pairs is torch.float32 but must be torch.int32"),
        ({"tiles": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"tiles is \[3, 2\] but must be \[T, 3\]"),
    ],
)
def test_errors_of_up(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        experts_up(**(up() | change))


def test_errors_of_down_and_combine() -> None:
    with pytest.raises(ValueError, match=r"weights is \[6, 3\] but x has 21 rows"):
        experts_down(**(down() | {"weights": torch.ones(6, 3)}))
    with pytest.raises(TypeError, match=r"weights is torch.bfloat16 but must be torch.float32"):
        experts_down(**(down() | {"weights": torch.ones(7, 3).bfloat16()}))
    with pytest.raises(ValueError, match=r"parts has 5 rows but must have a multiple of 2"):
        combine(torch.ones(2, 8), torch.ones(5, 8))


def test_gradients_of_an_expert_are_refused() -> None:
    args = up()
    args["w1"][3].requires_grad_()
    with pytest.raises(RuntimeError, match="experts_up: an argument requires gradients"):
        experts_up(**args)


def test_lists_are_counted_like_arguments() -> None:
    args = up()
    with counting(whole=True, reached=listed(args)) as launches:
        experts_up.run(**args)
    (launch,) = launches
    used: list[Tensor] = [args["w1"][i] for i in {int(e) for e in args["tiles"][:, 0] if e >= 0}]
    assert all(launch.of(w).dram == w.nbytes for w in used)
    with pytest.raises(Exception, match="outside of every argument"), counting(whole=True, reached=listed(args)[1:]):
        experts_up.run(**args)
