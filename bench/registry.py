"""What there is to test, count and time: every operator with its reference and its named shapes.

An operator is entered by the file in ``bench/`` named after its kernels' file, as a list called ``ENTRIES``. Tests, the
ledger, the counters and the benchmarks all read this list and have none of their own.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import bench

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A named shape of an operator: a public one (the model's own), or an odd one, made to catch kernels out."""

    name: str
    sizes: Mapping[str, int]
    public: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)


@dataclass(frozen=True)
class Entry:
    """An operator, and all that is needed to prove and to time it.

    Attributes:
        op: the operator, a ``voxkern.kernels.operator.Operator``.
        reference: the same in plain PyTorch. It takes the operator's arguments, in any dtype including fp64.
        inputs: (sizes, make) -> the operator's arguments by name; ``make`` is a :class:`TensorMaker`.
        cases: two odd shapes at least, and the public ones at batch 1 and 32.
        rows: the size that varies from call to call, for which there may be one binary only.
        stage: launch constants -> elements of the weights that one stage of the pipeline loads.
        read_once: arguments of which no byte may be loaded twice by one row tile: the weights.
        regular_grid: blocks differ only in their addresses, so bytes can be extrapolated from three blocks per axis;
            otherwise all blocks are counted, and only at the odd shapes.
        uses_matrix_unit: whether its first launch multiplies matrices, so that bf16 and fp16 must reach the matrix
            units.
    """

    op: Any
    reference: Callable[..., Any]
    inputs: Callable[[Any, "TensorMaker"], dict[str, Any]]
    cases: tuple[Case, ...]
    rows: str = "M"
    stage: Callable[[Mapping[str, Any]], int] = lambda c: c["BLOCK_N"] * c["BLOCK_K"]
    read_once: tuple[str, ...] = ("weight",)
    regular_grid: bool = True
    uses_matrix_unit: bool = True

    @property
    def name(self) -> str:
        """Of the operator, in ``torch.ops.voxkern``."""
        return str(self.op.name)

    def args(self, case: Case, make: "TensorMaker", **sizes: int) -> dict[str, Any]:
        """The operator's arguments for `case`, some of whose sizes may be others."""
        return self.inputs(SimpleNamespace(**{**case.sizes, **sizes}), make)


@dataclass
class TensorMaker:
    """Makes tensors of one dtype on one device: ``make(4, 5, std=0.1)``, the same ones from the same seed."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed the generator."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Normal numbers, rounded to the maker's dtype; uninitialised on the meta device."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return (mean + std * torch.randn(shape, generator=self.generator)).to(self.device, self.dtype)


def entries() -> list[Entry]:
    """Every operator, file by file."""
    modules = sorted(info.name for info in pkgutil.iter_modules(bench.__path__))
    found: list[Entry] = []
    for module in modules:
        if (ROOT / "kernels" / f"{module}.py").exists():
            found += importlib.import_module(f"bench.{module}").ENTRIES
    return found


def to_dtype(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies of the arguments, every floating tensor in another dtype: fp64 for the truth."""
    return each_tensor(lambda arg: arg.to(dtype if arg.is_floating_point() else arg.dtype, copy=True), args)


def each_tensor(change: Callable[[Tensor], Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every tensor changed, those in lists too."""

    def changed(arg: Any) -> Any:
        if isinstance(arg, list):
            return [changed(one) for one in arg]
        return change(arg) if isinstance(arg, Tensor) else arg

    return {name: changed(arg) for name, arg in args.items()}


def listed(args: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that stand in lists: kernels reach them by a table of addresses."""
    return [one for arg in args.values() if isinstance(arg, list) for one in arg]
