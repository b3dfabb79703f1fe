"""Launch configs: tile sizes, warps and pipeline stages, chosen from a table next to each kernel.

The choice depends on the weight's sizes, the dtype, the architecture, the phase, and the rows that a model is prepared
for. The choice never depends on the number of rows in one call. Another tile size would sum in another order, but a
request must give the same codes alone and in a batch.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatch
from typing import Any

import torch
import triton

__all__ = ["LaunchConfigs", "override", "target_arch"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES_IN_8_BITS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}

# A fused multiply-add outside the matrix product rounds once, where the reference and the interpreter round twice. With
# fusion on, a kernel would not compute what the tests have checked in the interpreter. Triton 3.10 turns fusion off by
# default; older versions need this option.
FP_FUSION = False

_overlaps: ContextVar[bool] = ContextVar("overlaps", default=False)
_targets: list[tuple[str, int]] = []
_overrides: dict[str, list[dict[str, int]]] = {}


def architecture() -> str:
    """Return the architecture that launch configs are chosen for, such as ``sm_90``, ``gfx942`` or ``interpreter``.

    The result is the current device's architecture, or ``interpreter`` when Triton's interpreter is on. Within
    :func:`target_arch`, the result is the architecture given there.
    """
    if _targets:
        return _targets[-1][0]
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiprocessors() -> int:
    """Return the number of multiprocessors that launches are divided among: those of the current device.

    Within :func:`target_arch`, the result is the number given there. In Triton's interpreter it is 16.
    """
    if _targets:
        return _targets[-1][1]
    if INTERPRETED:
        return 16
    driver: Any = triton.runtime.driver.active
    return _multiprocessors_of(driver, driver.get_current_device())


@functools.cache
def _multiprocessors_of(driver: Any, device: int) -> int:
    return int(driver.utils.get_device_properties(device)["multiprocessor_count"])


def launch_options() -> dict[str, Any]:
    """Return the options and constants that every launch has, whatever its kernel."""
    return {"enable_fp_fusion": FP_FUSION} | ({"OVERLAP": True, "launch_pdl": True} if _overlaps.get() else {})


@contextmanager
def overlapped(overlap: bool = True) -> Iterator[None]:
    """Let this thread's launches within the ``with`` block overlap, see :mod:`voxkern.kernels.overlap`.

    Args:
        overlap: False for no overlap. True needs an NVIDIA GPU of architecture sm_90 or newer.
    """
    token = _overlaps.set(overlap)
    try:
        yield
    finally:
        _overlaps.reset(token)


class LaunchConfigs:
    """Chooses the launch config of one kernel from a text table: the first row that matches.

    The columns left of the bar ``|`` are conditions, and ``*`` matches anything. `arch`, `dtype` and `phase` are
    patterns, such as ``sm_*``, ``fp32`` and ``prefill``. `dtype` is ``int8`` or ``fp8`` for weights in 8 bits, unless
    the activations are fp32. `rows` (the rows that the model is prepared for), `N` and `K` are inclusive upper bounds.
    The columns right of the bar are the kernel's constants, and Triton's options ``num_warps`` and ``num_stages``.
    """

    def __init__(self, kernel: str, text: str) -> None:
        """Parse the table.

        Args:
            kernel: the kernel's name, for error messages and :func:`override`.
            text: the table. The first line of the text names the columns.

        Raises:
            ValueError: a line has more or fewer columns than the first line.
        """
        self.kernel = kernel
        head, *lines = [line.split() for line in text.splitlines() if line.strip()]
        bar = head.index("|")
        self.lines = [dict(zip(head, line, strict=True)) for line in lines]
        self.conditions, self.names = head[:bar], head[bar + 1 :]

    def __call__(
        self, *, N: int, K: int, dtype: torch.dtype, rows: int, phase: str = "decode", weight: torch.dtype | None = None
    ) -> dict[str, Any]:
        """Return the columns right of the bar in the first matching row, and :func:`launch_options`.

        Args:
            N: rows of the weight.
            K: columns of the weight.
            dtype: dtype of the activations: fp32, bf16 or fp16.
            rows: the most rows that the model is prepared for.
            phase: ``decode``, ``prefill`` or ``codec``.
            weight: dtype of the weight; None is that of the activations.

        Raises:
            ValueError: no row of the table matches.
        """
        found = self._find(N, K, _dtype_name(dtype, weight), architecture(), rows, phase)
        if found is None:
            raise ValueError(
                f"no launch config of {self.kernel} for {architecture()}, {_dtype_name(dtype, weight)}, {rows} rows, "
                f"N = {N}, K = {K}, {phase}"
            )
        chosen = launch_options() | dict(found)
        for values in _overrides.get(self.kernel, ()):
            chosen.update(values)
        return chosen

    def has(
        self, *, N: int, K: int, dtype: torch.dtype, rows: int, phase: str = "decode", weight: torch.dtype | None = None
    ) -> bool:
        """Return whether the table has a launch config for a call with these arguments."""
        return self._find(N, K, _dtype_name(dtype, weight), architecture(), rows, phase) is not None

    @functools.cache  # noqa: B019 - tables live as long as their modules
    def _find(self, N: int, K: int, dtype: str, arch: str, rows: int, phase: str) -> tuple[tuple[str, int], ...] | None:
        asked: dict[str, int | str] = {"arch": arch, "dtype": dtype, "phase": phase, "rows": rows, "N": N, "K": K}
        for row in self.lines:
            if all(_fits(asked[key], row[key]) for key in self.conditions):
                return tuple((name, int(row[name])) for name in self.names)
        return None


def _dtype_name(dtype: torch.dtype, weight: torch.dtype | None) -> str:
    return DTYPES[dtype] if dtype == torch.float32 else DTYPES_IN_8_BITS.get(weight or dtype, DTYPES[dtype])


def _fits(asked: int | str, condition: str) -> bool:
    if isinstance(asked, str):
        return fnmatch(asked, condition)
    return condition == "*" or asked <= int(condition)


@contextmanager
def override(kernel: str, **values: int) -> Iterator[None]:
    """Replace values of the table in all launches of `kernel` within the ``with`` block, for tuning and tests."""
    _overrides.setdefault(kernel, []).append(values)
    try:
        yield
    finally:
        _overrides[kernel].pop()


@contextmanager
def target_arch(arch: str, multiprocessors: int = 132) -> Iterator[None]:
    """Choose a GPU's launch configs within the ``with`` block, to count its tiles in the interpreter.

    Args:
        arch: the GPU's architecture.
        multiprocessors: the GPU's number of multiprocessors.
    """
    _targets.append((arch, multiprocessors))
    try:
        yield
    finally:
        _targets.pop()
