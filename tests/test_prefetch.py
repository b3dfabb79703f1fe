"""Tests of what overlapping kernels prefetch: weights that no launch of a frame writes, and nothing beside them.

A kernel that overlaps prefetches before it waits, while the kernel before it may still write. In Triton's interpreter,
kernels run one after the other. So these tests record the addresses, and compare the memory at these addresses before
and after whole frames.
"""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import voxkern
from bench.ops.registry import Entry, TensorMaker, entries
from voxkern import tts as tts_module
from voxkern.kernels.launch_config import overlapped
from voxkern.kernels.overlap import SECTOR, prefetch_rows, wait_for_launches
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint

pytestmark = pytest.mark.interpreter("addresses are recorded in the interpreter")
# operators whose kernels stream weights at addresses that are known before the wait
PREFETCHING = {
    "adaln_linear_silu", "codec_conv", "linear", "norm_linear", "norm_qkv", "norm_qkv_append", "norm_qkv_attention",
    "norm_swiglu", "semantic_argmax", "token_attention_linear",
}  # fmt: skip


@dataclass
class Recorded:
    """Addresses of bytes that kernels prefetch and that they store to."""

    prefetched: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)
    contents: dict[int, bytes] = field(default_factory=dict)  # of each sector, when it was first prefetched


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Let launches overlap, and record the first byte of each prefetch and of each element that is stored."""
    builder, found = interpreter.InterpreterBuilder, Recorded()

    def prefetch(_: Any, assembly: str, constraints: str, values: Any, *rest: Any) -> SimpleNamespace:
        assert assembly.startswith("prefetch.global.L2")
        addresses = values[0].data.ravel().tolist()
        found.prefetched.update(addresses)
        for one in sectors(addresses) - found.contents.keys():
            found.contents[one] = memory(one)
        return SimpleNamespace(get_result=lambda i: None)

    def note(name: str, pointer: int, mask: int | None) -> None:
        original = getattr(builder, name)

        def run(self: Any, *args: Any) -> Any:
            addresses = args[pointer].data
            is_stored = np.ones_like(addresses, dtype=bool) if mask is None else args[mask].data
            found.stored.update(addresses[np.broadcast_to(is_stored, addresses.shape)].ravel().tolist())
            return original(self, *args)

        patch.setattr(builder, name, run)

    with monkeypatch.context() as patch, overlapped():
        patch.setattr(builder, "create_inline_asm", prefetch)
        patch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
        patch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
        note("create_store", 0, None)
        note("create_masked_store", 0, 2)
        note("create_atomic_rmw", 1, 3)
        note("create_atomic_cas", 0, None)
        yield found


def outside(addresses: Iterable[int], tensors: Iterable[Tensor]) -> list[int]:
    """Return the addresses that are not in the memory of one of the tensors."""
    found = np.array(sorted(addresses), dtype=np.int64)
    for tensor in tensors:
        first = tensor.data_ptr()
        found = found[(found < first) | (found >= first + tensor.numel() * tensor.element_size())]
    return [int(address) for address in found]


def sectors(addresses: Iterable[int]) -> set[int]:
    """Return the numbers of the 32-byte sectors that hold the addresses."""
    return {address // SECTOR.value for address in addresses}


def memory(sector: int) -> bytes:
    return ctypes.string_at(sector * SECTOR.value, SECTOR.value)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_an_operator_prefetches_its_weights_alone(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    case = entry.cases[0]
    args = entry.args(case, TensorMaker.of(case.float_dtype))
    weights = [args[name] for name in entry.weights if isinstance(args[name], Tensor)]
    with recording(monkeypatch) as found:
        entry.op(**args)
    assert bool(found.prefetched) == (entry.name in PREFETCHING)
    assert outside(found.prefetched, weights) == []
    assert sectors(found.prefetched).isdisjoint(sectors(found.stored))


@triton.jit
def _prefetches(p_weight, p_x, p_y, n, OVERLAP: tl.constexpr):
    o_n = tl.arange(0, 8)
    prefetch_rows(p_weight, o_n, n, 0, 16, OVERLAP)  # type: ignore[arg-type]
    wait_for_launches(OVERLAP)
    tl.store(p_y + o_n, tl.load(p_x + o_n))


@pytest.mark.parametrize("rows", [5, 6])
def test_a_prefetch_beside_the_weights_is_found(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight has 5 rows of 16 numbers. Of a sixth row, a prefetch touches the numbers 0, 8 and 15."""
    weight, x, y = torch.ones(5, 16), torch.ones(8), torch.zeros(8)
    with recording(monkeypatch) as found:
        _prefetches[(1,)](weight, x, y, rows, OVERLAP=True)
    assert len(outside(found.prefetched, [weight])) == (0 if rows == 5 else 3)
    assert found.stored == {y.data_ptr() + 4 * i for i in range(8)}


def test_a_prefetch_of_what_a_launch_writes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(5, 16)
    with recording(monkeypatch) as found:
        _prefetches[(1,)](y, torch.ones(8), y, 5, OVERLAP=True)
    assert not sectors(found.prefetched).isdisjoint(sectors(found.stored))
    assert {one: memory(one) for one in found.contents} != found.contents


@pytest.mark.parametrize(
    "kind", [{}, {"velocity_mlp": True}, {"overrides": {"moe": TINY_MOE}}], ids=["transformer", "mlp", "experts"]
)
def test_no_launch_of_a_frame_writes_what_another_prefetches(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is prefetched is the same before the kernel that a launch waits for, after it, and after whole requests."""
    monkeypatch.setattr(tts_module, "require_overlap", lambda device, backend: None)
    tts = voxkern.load(
        make_checkpoint(tmp_path, dtype=torch.bfloat16, **kind), backend="triton", overlap=True, max_batch=2
    )
    with recording(monkeypatch) as found:
        tts.generate(["a", "b"], seed=1, max_frames=2, steps=2)
    read = sectors(found.prefetched)
    assert len(read) > 1000
    assert read.isdisjoint(sectors(found.stored))
    assert {one: memory(one) for one in read} == found.contents
