"""Check that kernels prefetch only weights, and that no launch of a frame writes to what is prefetched.

With overlap, a kernel prefetches before its wait, while the kernel before it may still write. Triton's interpreter runs
kernels one after the other. These tests therefore record the addresses, and compare the memory there at the first
prefetch and after the requests.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checks import stand_in_for_overlap
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

import voxkern
from bench.ops.registry import Case, Entry, TensorMaker, entries
from voxkern import tts as tts_module
from voxkern.kernels.launch_config import overlapped
from voxkern.kernels.overlap import SECTOR, prefetch_rows, wait_for_launches
from voxkern.random_checkpoint import TINY_MOE, make_checkpoint

pytestmark = pytest.mark.interpreter("addresses are recorded in the interpreter")
ODD = [(entry, case) for entry in entries() for case in entry.cases if not case.public]
# operators that stream weights at addresses known before the wait
PREFETCHING = {
    "adaln_linear_silu", "codec_conv", "linear", "norm_linear", "norm_qkv", "norm_qkv_append", "norm_qkv_attention",
    "norm_swiglu", "semantic_argmax", "token_attention_linear",
}  # fmt: skip


@dataclass
class Recorded:
    """Holds the addresses that programs prefetch, load from and store to."""

    prefetched: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)
    contents: dict[int, bytes] = field(default_factory=dict)  # of each sector, when it was first prefetched
    # for each program, sectors: the first of each prefetched row, and those that are loaded
    programs: list[tuple[set[int], set[int]]] = field(default_factory=list)

    def prefetch(self, addresses: NDArray[np.int64]) -> None:
        """Add the addresses of a prefetch."""
        found = addresses.ravel().tolist()
        self.prefetched.update(found)
        self.programs[-1][0].update(sectors(addresses[:, 0].tolist()))
        for one in sectors(found) - self.contents.keys():
            self.contents[one] = bytes_of(one)


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Turn overlap on, and record the address of each prefetch, and of each element that is loaded or stored."""
    builder, found = interpreter.InterpreterBuilder, Recorded()

    def replace(name: str, before: Callable[..., Any]) -> None:
        original = getattr(builder, name)

        def run(self: Any, *args: Any) -> Any:
            before(*args)
            return original(self, *args)

        patch.setattr(builder, name, run)

    def accesses(name: str, pointer: int, mask: int | None, add: Callable[[list[int]], None]) -> None:
        def note(*args: Any) -> None:
            addresses = args[pointer].data
            is_accessed = np.ones_like(addresses, dtype=bool) if mask is None else args[mask].data
            add(addresses[np.broadcast_to(is_accessed, addresses.shape)].ravel().tolist())

        replace(name, note)

    with monkeypatch.context() as patch, overlapped():
        stand_in_for_overlap(patch, prefetch=found.prefetch)
        replace("set_grid_idx", lambda *_: found.programs.append((set(), set())))
        for name, mask in (("create_load", None), ("create_masked_load", 1)):
            accesses(name, 0, mask, lambda some: found.programs[-1][1].update(sectors(some)))
        for name, pointer, mask in (
            ("create_store", 0, None), ("create_masked_store", 0, 2),
            ("create_atomic_rmw", 1, 3), ("create_atomic_cas", 0, None),
        ):  # fmt: skip
            accesses(name, pointer, mask, found.stored.update)
        yield found


def outside(addresses: Iterable[int], tensors: Iterable[Tensor]) -> list[int]:
    """Return the addresses that are not in the memory of one of the tensors."""
    found = np.array(sorted(addresses), dtype=np.int64)
    for tensor in tensors:
        first = tensor.data_ptr()
        found = found[(found < first) | (found >= first + tensor.numel() * tensor.element_size())]
    return [int(address) for address in found]


def inside(numbers: Iterable[int], tensor: Tensor) -> bool:
    """Return whether a sector of the tensor's memory is among the numbers of sectors."""
    first = tensor.data_ptr() // SECTOR.value
    return any(first <= one <= (tensor.data_ptr() + tensor.nbytes - 1) // SECTOR.value for one in numbers)


def sectors(addresses: Iterable[int]) -> set[int]:
    """Return the numbers of the 32-byte sectors that hold the addresses."""
    return {address // SECTOR.value for address in addresses}


def bytes_of(sector: int) -> bytes:
    return ctypes.string_at(sector * SECTOR.value, SECTOR.value)


@pytest.mark.parametrize(("entry", "case"), ODD, ids=lambda one: one.name)
def test_an_operator_prefetches_only_its_weights(entry: Entry, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch loads what it prefetches. A program that loads weights loads the first bytes of each prefetched row."""
    args = entry.args(case, TensorMaker.of(case.float_dtype))
    weights = [args[name] for name in entry.weights if isinstance(args[name], Tensor)]
    with recording(monkeypatch) as found:
        entry.op(**args)
    assert bool(found.prefetched) == (entry.name in PREFETCHING)
    assert outside(found.prefetched, weights) == []
    assert sectors(found.prefetched).isdisjoint(sectors(found.stored))
    assert sectors(found.prefetched) <= set().union(*(loaded for _, loaded in found.programs))
    if (entry.name, case.name) == ("norm_qkv", "odd-some-queries"):
        return  # programs without queries prefetch weights of queries too, which other programs load
    for firsts, loaded in found.programs:
        assert firsts <= loaded or not any(inside(loaded, weight) for weight in weights)


@triton.jit
def _prefetch_kernel(p_weight, p_x, p_y, n, OVERLAP: tl.constexpr):
    o_n = tl.arange(0, 8)
    prefetch_rows(p_weight, o_n, n, 0, 16, OVERLAP)  # type: ignore[arg-type]
    wait_for_launches(OVERLAP)
    tl.store(p_y + o_n, tl.load(p_x + o_n))


@pytest.mark.parametrize("rows", [5, 6])
def test_a_prefetch_outside_the_weights_is_found(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight has 5 rows of 16 numbers. A prefetch of a sixth row has three addresses: numbers 0, 8 and 15."""
    weight, x, y = torch.ones(5, 16), torch.ones(8), torch.zeros(8)
    with recording(monkeypatch) as found:
        _prefetch_kernel[(1,)](weight, x, y, rows, OVERLAP=True)
    assert len(outside(found.prefetched, [weight])) == (0 if rows == 5 else 3)
    assert found.stored == {y.data_ptr() + 4 * i for i in range(8)}


def test_a_prefetch_of_what_a_launch_writes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(5, 16)
    with recording(monkeypatch) as found:
        _prefetch_kernel[(1,)](y, torch.ones(8), y, 5, OVERLAP=True)
    assert not sectors(found.prefetched).isdisjoint(sectors(found.stored))
    assert {one: bytes_of(one) for one in found.contents} != found.contents


@pytest.mark.parametrize(
    "kind", [{}, {"velocity_mlp": True}, {"overrides": {"moe": TINY_MOE}}], ids=["transformer", "mlp", "experts"]
)
def test_no_launch_of_a_frame_writes_what_another_prefetches(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of a prefetched sector are the same at the first prefetch and after the requests."""
    monkeypatch.setattr(tts_module, "require_overlap", lambda device, backend: None)
    tts = voxkern.load(
        make_checkpoint(tmp_path, dtype=torch.bfloat16, **kind), backend="triton", overlap=True, max_batch=2
    )
    with recording(monkeypatch) as found:
        tts.generate(["a", "b"], seed=1, max_frames=2, steps=2)
    prefetched = sectors(found.prefetched)
    assert len(prefetched) > 1000
    assert prefetched.isdisjoint(sectors(found.stored))
    assert {one: bytes_of(one) for one in prefetched} == found.contents
