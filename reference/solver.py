"""ODE solvers for the flow from time 0 to 1: Euler's method and the two-step Adams-Bashforth method (ab2)."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 64
SOLVERS = ("euler", "ab2")


def euler_step(x: Tensor, v: Tensor, dt: float) -> Tensor:
    """Return the state after one Euler step, ``x + dt v``."""
    return x + dt * v


def time_grid(solver: str, steps: int) -> list[float]:
    """Return the `steps` + 1 times, increasing from 0 to 1, at which the solver's steps start and end.

    The times of "euler" are evenly spaced, as in the public model's servers. The times of "ab2" are
    ``1 - (1 - k / steps)^1.5`` for k from 0 to `steps`. These times are closer together near 1, where the velocity
    field changes most.

    Raises:
        ValueError: `solver` is unknown or `steps` is not in 1..64.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie in 1..{MAX_STEPS}, got {steps}")
    if solver == "euler":
        return [k / steps for k in range(steps + 1)]
    return [1 - (1 - k / steps) ** 1.5 for k in range(steps + 1)]


def step_ratios(solver: str, times: list[float]) -> list[float]:
    """Return one ratio r per step, by which :func:`integrate` multiplies the change of the velocity.

    For "ab2", r is ``dt_k / (2 dt_{k-1})``, where dt_k is the length of step k. The ratio is 0 for the first step and
    for all steps of "euler".
    """
    if solver == "euler":
        return [0.0] * (len(times) - 1)
    lengths = [end - start for start, end in itertools.pairwise(times)]
    return [0.0] + [now / (2 * before) for before, now in itertools.pairwise(lengths)]


def integrate(velocity: Callable[[Tensor, int], Tensor], x: Tensor, solver: str, times: list[float]) -> Tensor:
    """Integrate a velocity field from the first of `times` to the last, with one evaluation per step.

    A step is ``x += dt (v + r (v - v_last))``, with r from :func:`step_ratios` and v_last the velocity at the previous
    step's start. If r is 0, the step is one of Euler's method. Otherwise it is one of the two-step Adams-Bashforth
    method on uneven steps (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5).

    Args:
        velocity: function of the state and of the step's number, counted from 0; it returns the velocity at the step's
            start.
        x: the state at the first time.
        solver: "euler" or "ab2".
        times: increasing times, from :func:`time_grid`.

    Returns:
        The state at the last time, of the shape of `x`.
    """
    last = torch.zeros_like(x)
    ratios = step_ratios(solver, times)
    for k, (start, end) in enumerate(itertools.pairwise(times)):
        v = velocity(x, k)
        x = euler_step(x, v + ratios[k] * (v - last), end - start)
        last = v
    return x
