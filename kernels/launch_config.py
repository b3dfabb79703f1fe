"""Launch configs: tile sizes, warps and pipeline stages, chosen from a table that stands beside each kernel.

A choice depends on the sizes of the weights, the dtype, the architecture, the rows a model was prepared for and the
phase, and never on the rows at hand: another tile size sums in another order, and a request must give the same codes
alone and in a batch.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
import triton

__all__ = ["LaunchConfigs", "override", "target_arch"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Fused multiply-adds outside the matrix product round once where the reference and the interpreter round twice, so a
# kernel would not compute what was proved. Triton 3.10 turns them off by default; until then we do.
FP_FUSION = False

_targets: list[str] = []
_overrides: dict[str, list[dict[str, int]]] = {}


def architecture() -> str:
    """What kernels launched now are built for: ``sm_90``, ``gfx942``, or ``interpreter``."""
    if _targets:
        return _targets[-1]
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


class LaunchConfigs:
    """The launch configs of one kernel, as text: a line of conditions and values a row, the first that matches wins.

    Columns left of the bar are conditions, ``*`` matches anything: `arch`, `dtype` and `phase` are patterns
    (``sm_*``, ``fp32``, ``prefill``); `rows` (those the model was prepared for), `N` and `K` are upper bounds. Columns
    right of it are constants of the kernel, or ``num_warps`` and ``num_stages``.
    """

    def __init__(self, kernel: str, text: str) -> None:
        """Read `text`; its first line names the columns.

        Raises:
            ValueError: a line whose columns do not match the first line's.
        """
        self.kernel = kernel
        head, *lines = [line.split() for line in text.splitlines() if line.strip()]
        bar = head.index("|")
        self.lines = [dict(zip(head, line, strict=True)) for line in lines]
        self.conditions, self.names = head[:bar], head[bar + 1 :]

    def __call__(self, *, N: int, K: int, dtype: torch.dtype, rows: int, phase: str = "decode") -> dict[str, Any]:
        """The constants of a launch on the current architecture: N, K, the table's, and Triton's options.

        Args:
            N: rows of the weight.
            K: columns of the weight.
            dtype: of the weight.
            rows: the most rows the model was prepared for.
            phase: ``decode`` or ``prefill``.

        Raises:
            ValueError: no line of the table matches.
        """
        chosen = dict(self._choose(N, K, DTYPES[dtype], architecture(), rows, phase))
        for values in _overrides.get(self.kernel, ()):
            chosen.update(values)
        return chosen

    @functools.cache  # noqa: B019 - tables live as long as their modules
    def _choose(self, N: int, K: int, dtype: str, arch: str, rows: int, phase: str) -> tuple[tuple[str, int], ...]:
        asked: dict[str, int | str] = {"arch": arch, "dtype": dtype, "phase": phase, "rows": rows, "N": N, "K": K}
        for row in self.lines:
            if all(_fits(asked[key], row[key]) for key in self.conditions):
                chosen = [(name, int(row[name])) for name in self.names]
                return (("N", N), ("K", K), *chosen, ("enable_fp_fusion", FP_FUSION))
        raise ValueError(
            f"no launch config of {self.kernel} for {arch}, {dtype}, {rows} rows, N = {N}, K = {K}, {phase}"
        )


def _fits(asked: int | str, condition: str) -> bool:
    if isinstance(asked, str):
        return fnmatch(asked, condition)
    return condition == "*" or asked <= int(condition)


@contextmanager
def override(kernel: str, **values: int) -> Iterator[None]:
    """Within the block, launches of `kernel` use these values instead of the table's: for tuning and for tests."""
    _overrides.setdefault(kernel, []).append(values)
    try:
        yield
    finally:
        _overrides[kernel].pop()


@contextmanager
def target_arch(arch: str) -> Iterator[None]:
    """Within the block, launch configs are those of `arch`, so that the interpreter can count with a GPU's tiles."""
    _targets.append(arch)
    try:
        yield
    finally:
        _targets.pop()
