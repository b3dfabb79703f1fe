"""The registry of operators: each with its reference and the named shapes at which it is tested, counted and timed.

The operators of ``kernels/NAME.py`` are registered in ``bench/ops/NAME.py``, in a list called ``ENTRIES``. Tests, the
ledger, the counters and the benchmarks all read these lists.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

import bench.ops
from voxkern.reference.quantized import FORMATS, Format, quantize_weight

if TYPE_CHECKING:
    from voxkern.kernels.launch_config import LaunchConfigs

ROOT = Path(__file__).resolve().parents[2]
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# a case's dtype -> dtype of its activations; with "int8" and "fp8", only the large weights have 8 bits
DTYPES = FLOATS | {"int8": torch.bfloat16, "fp8": torch.bfloat16}
ALL_DTYPES, BF16_AND_8_BITS = ("bf16", "int8", "fp8", "fp16", "fp32"), ("bf16", "int8", "fp8")


Args = Mapping[str, Any]


def times_rows_of_x(args: Args) -> int:
    """Return the multiply-adds of a product of all rows of `x` with each matrix among the operator's weights."""
    weights = [args[name] for name in ("weight", "w1", "w3", "wq", "wk", "wv", "w_in", "w_out") if name in args]
    return sum(len(args["x"]) * weight.numel() for weight in weights if weight.ndim > 1)


@dataclass(frozen=True)
class Case:
    """A named shape of an operator.

    Attributes:
        name: the shape's name, unique for the operator.
        sizes: the sizes by name, which :attr:`Entry.inputs` reads as attributes.
        public: whether the sizes are those of a published model. Other shapes are odd, to expose errors at the edges of
            tiles.
        dtypes: the dtypes at which the operator runs with this shape, keys of :data:`DTYPES`.
    """

    name: str
    sizes: Mapping[str, int]
    public: bool = False
    dtypes: tuple[str, ...] = tuple(FLOATS)

    @property
    def float_dtype(self) -> str:
        """The last of the case's dtypes that is not an 8-bit format; this is fp32 if the case has it."""
        return [dtype for dtype in self.dtypes if dtype in FLOATS][-1]


@dataclass(frozen=True)
class Entry:
    """An operator, with everything that its tests and benchmarks need.

    Attributes:
        op: the operator, a ``voxkern.kernels.operator.Operator``.
        reference: the same computation in plain PyTorch. It takes the operator's arguments in any dtype, fp64 included.
        inputs: function of (sizes, make) that returns the operator's arguments by name. ``make`` is a
            :class:`TensorMaker`.
        cases: at least two odd shapes, and the public shapes at batch 1 and 32.
        rows: name of the size that varies from call to call. One binary must serve all values of this size.
        stage: function of the launch constants that returns how many weight elements one stage of the pipeline loads.
        read_once: names of arguments, usually weights. One row tile loads each byte of them at most once.
        regular_grid: whether blocks differ only in their addresses, so that bytes can be extrapolated from three blocks
            per axis. Otherwise all blocks are counted, and only at the odd shapes.
        uses_matrix_unit: whether the first launch multiplies matrices, so that bf16 and fp16 must use the matrix units.
        weight_names: names of the arguments that are weights; None takes `read_once`.
        partly: argument, or ``out`` for the result -> function of the arguments that returns how many of its elements a
            call must read or write. A call needs all elements of the other arguments.
        ordered_by: names of kernel arguments on which atomics order blocks. A block may then read what other blocks
            wrote before their atomics. No other atomics are allowed, see ``bench/static/races.py``.
        multiply_adds: function of the arguments that returns the multiply-adds of the products with weights, and of
            attention over the cache.
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
    weight_names: tuple[str, ...] | None = None
    partly: Mapping[str, Callable[[Args], int]] = field(default_factory=dict)
    ordered_by: tuple[str, ...] = ()
    multiply_adds: Callable[[Args], int] = times_rows_of_x

    @property
    def name(self) -> str:
        """Name of the operator in ``torch.ops.voxkern``."""
        return str(self.op.name)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the arguments that are weights."""
        return self.read_once if self.weight_names is None else self.weight_names

    def runs_on(self, arch: str) -> bool:
        """Return whether the operator has launch configs for an architecture, such as ``sm_90``, or needs none."""
        configs = configs_of(self)
        return configs is None or any(fnmatch(arch, line["arch"]) for line in configs.lines)

    def format(self, args: Args) -> str | None:
        """Return the format of the call's weights, "int8" or "fp8", or None if they are not quantised."""
        weights = [args[name] for name in self.weights if args[name] is not None]
        if not weights:
            return None
        first = weights[0][0] if isinstance(weights[0], list) else weights[0]
        return next((name for name, one in FORMATS.items() if first.dtype == one.dtype), None)

    def args(self, case: Case, make: "TensorMaker", **sizes: int) -> dict[str, Any]:
        """Return the operator's arguments for `case`; `sizes` replace sizes of the case."""
        return self.inputs(SimpleNamespace(**{**case.sizes, **sizes}), make)


@dataclass
class TensorMaker:
    """Makes random tensors of one dtype on one device: ``make(4, 5, std=0.1)``. Equal seeds give equal tensors.

    Attributes:
        dtype: dtype of the tensors.
        device: where the tensors are.
        seed: seed of the random numbers.
        weights: format of the weights, or None for weights in `dtype`.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    weights: Format | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @classmethod
    def of(cls, dtype: str, device: str = "cpu", seed: int = 0) -> Self:
        """Make a maker for the dtype of a case, a key of :data:`DTYPES`."""
        return cls(DTYPES[dtype], device, seed, FORMATS.get(dtype))

    def weight(self, *shape: int, std: float) -> tuple[Tensor, Tensor | None]:
        """Return a weight [N, K], and the scales of its rows, or None if weights are not quantised."""
        if self.weights is None:
            return self(*shape, std=std), None
        if self.device == "meta":
            return torch.empty(shape, dtype=self.weights.dtype, device="meta"), torch.empty(shape[0], device="meta")
        return quantize_weight(self(*shape, std=std), self.weights)

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return normal random numbers, rounded to the maker's dtype; on the meta device, an empty tensor."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return (mean + std * torch.randn(shape, generator=self.generator)).to(self.device, self.dtype)


def configs_of(entry: Entry) -> "LaunchConfigs | None":
    """Return the operator's own table of launch configs, or None if it has no table with a column `arch`."""
    from voxkern.kernels.launch_config import LaunchConfigs  # needs Triton

    module = vars(sys.modules[entry.op.__module__])
    found = [value for value in module.values() if isinstance(value, LaunchConfigs) and value.kernel == entry.name]
    return next((configs for configs in found if "arch" in configs.conditions), None)


def entries(arch: str = "*") -> list[Entry]:
    """Return the entries of the operators, in the alphabetical order of their files.

    Args:
        arch: the architecture that the operators must run on, such as ``sm_90``; ``*`` for all operators.
    """
    modules = sorted(info.name for info in pkgutil.iter_modules(bench.ops.__path__))
    found: list[Entry] = []
    for module in modules:
        if (ROOT / "kernels" / f"{module}.py").exists():
            found += importlib.import_module(f"bench.ops.{module}").ENTRIES
    return [entry for entry in found if arch == "*" or entry.runs_on(arch)]


def to_dtype(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return copies of the arguments, with every floating-point tensor converted to `dtype`."""
    return each_tensor(lambda arg: arg.to(dtype if arg.is_floating_point() else arg.dtype, copy=True), args)


def each_tensor(change: Callable[[Tensor], Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with `change` applied to every tensor, including tensors in lists."""

    def changed(arg: Any) -> Any:
        if isinstance(arg, list):
            return [changed(one) for one in arg]
        return change(arg) if isinstance(arg, Tensor) else arg

    return {name: changed(arg) for name, arg in args.items()}


def listed(args: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors in lists, and their scales. Kernels read these tensors through a table of addresses."""
    lists = [one for arg in args.values() if isinstance(arg, list) for one in arg]
    scales = [arg for name, arg in args.items() if name.startswith("scale") and isinstance(arg, Tensor)]
    return lists + scales if lists else []
