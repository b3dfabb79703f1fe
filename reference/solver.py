"""ODE solvers of the flow: Euler's method and two-step Adams-Bashforth, from time 0 to 1."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 64
SOLVERS = ("euler", "ab2")


def euler_step(x: Tensor, v: Tensor, dt: float) -> Tensor:
    """``x + dt v``."""
    return x + dt * v


def time_grid(solver: str, steps: int) -> list[float]:
    """The steps + 1 times from 0 to 1 that a solver stands at.

    Euler's are evenly spaced, as the public model is served. The two-step solver's are warped towards the end, where
    the field bends most: ``1 - (1 - k / steps)^1.5``.

    Raises:
        ValueError: an unknown solver, or `steps` not in 1..64.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie in 1..{MAX_STEPS}, got {steps}")
    if solver == "euler":
        return [k / steps for k in range(steps + 1)]
    return [1 - (1 - k / steps) ** 1.5 for k in range(steps + 1)]


def step_ratios(solver: str, times: list[float]) -> list[float]:
    """What each step adds of the velocity's last change: ``dt_k / (2 dt_{k-1})`` for two-step Adams-Bashforth.

    Zero for a first step, and for Euler.
    """
    if solver == "euler":
        return [0.0] * (len(times) - 1)
    lengths = [end - start for start, end in itertools.pairwise(times)]
    return [0.0] + [now / (2 * before) for before, now in itertools.pairwise(lengths)]


def integrate(velocity: Callable[[Tensor, int], Tensor], x: Tensor, solver: str, times: list[float]) -> Tensor:
    """Follow a velocity field from the first of `times` to the last, evaluating it once a step.

    ``x += dt (v + r (v - v_last))`` with r of :func:`step_ratios`: Euler's method, or the two-step Adams-Bashforth
    method on uneven steps (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5).

    Args:
        velocity: (state, number of the step) -> the velocity there.
        x: the state at the first time.
        solver: "euler" or "ab2".
        times: increasing.
    """
    last = torch.zeros_like(x)
    ratios = step_ratios(solver, times)
    for k, (start, end) in enumerate(itertools.pairwise(times)):
        v = velocity(x, k)
        x = euler_step(x, v + ratios[k] * (v - last), end - start)
        last = v
    return x
