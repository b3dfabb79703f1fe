"""The error of solvers with few evaluations of the velocity, as the distance to a fine solution.

``python -m bench.solvers`` trains a small flow head on a synthetic task. The task's targets depend on the condition and
have two modes. The command then solves the flow with 2 to 16 evaluations, and compares with 256 steps of the two-step
method: RMSE of x before quantisation, and the share of codes that differ. The result only compares solvers. The errors
do not apply to the public weights, which were not available.
"""

import itertools

import torch
from torch import Tensor

from voxkern.random_checkpoint import tiny_params
from voxkern.reference import Config
from voxkern.reference.flow_head import guide, quantise
from voxkern.reference.solver import integrate, time_grid
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

TRAINING_STEPS, BATCH, REQUESTS, FINE = 1500, 512, 512, 256
WARPS = (1.0, 1.5, 2.0)  # exponents of the time grid 1 - (1 - k / steps)^warp


def main() -> None:
    """Train the head, solve its flow with each solver, time grid and number of evaluations, and print the errors."""
    head, task = train()
    generator = torch.Generator().manual_seed(1)
    h, x = torch.randn(REQUESTS, 64, generator=generator), torch.randn(REQUESTS, 36, generator=generator)
    exact = solve(head, h, x, "ab2", [1 - (1 - k / FINE) ** 1.5 for k in range(FINE + 1)])
    print(
        f"targets' RMS {task(h, generator).square().mean().sqrt():.2f}, solutions' {exact.square().mean().sqrt():.2f}"
    )
    print("solver  warp  evaluations    RMSE  codes that differ")
    for solver, warp, steps in itertools.product(("euler", "ab2"), WARPS, (2, 3, 4, 5, 7, 10, 16)):
        times = [1 - (1 - k / steps) ** warp for k in range(steps + 1)]
        found = solve(head, h, x, solver, times)
        rmse = (found - exact).square().mean().sqrt()
        differ = (quantise(found, 21) != quantise(exact, 21)).double().mean()
        usual = "  *" if torch.allclose(torch.tensor(times), torch.tensor(time_grid(solver, steps))) else ""
        print(f"{solver:6s}  {warp:4.1f}  {steps:11d}  {rmse:.4f}  {100 * differ:15.1f} %{usual}", flush=True)
    print("* the grid that generate() uses")


@torch.no_grad()
def solve(head: FlowMatchingAudioTransformer, h: Tensor, x: Tensor, solver: str, times: list[float]) -> Tensor:
    """Solve the head's flow with guidance 1.2, and return x at the last time, [B, K].

    Args:
        head: the flow head.
        h: [B, input_dim], hidden states.
        x: [B, K], the initial noise.
        solver: "euler" or "ab2".
        times: the time grid, of any number of steps.
    """
    alpha, both = torch.full((len(h),), 1.2), torch.cat((h, torch.zeros_like(h)))

    def velocity(x: Tensor, k: int) -> Tensor:
        return guide(head.velocity(torch.cat((x, x)), torch.tensor(times[k]), both), alpha)

    return integrate(velocity, x, solver, times)


def train() -> tuple[FlowMatchingAudioTransformer, "Task"]:
    """Train a head of two layers 64 wide by flow matching (arXiv 2210.02747), and return the head and its task.

    One condition in ten is replaced by zeros, which trains the unconditional flow that guidance needs.
    """
    torch.manual_seed(0)
    config = Config.from_params(tiny_params())
    head, task = FlowMatchingAudioTransformer(config.acoustic_transformer, config.audio), Task()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, TRAINING_STEPS)
    for step in range(TRAINING_STEPS):
        h, noise, t = torch.randn(BATCH, 64), torch.randn(BATCH, 36), torch.rand(BATCH)
        target, at = task(h), t.unsqueeze(1)
        kept = (torch.rand(BATCH, 1) > 0.1).float()
        loss = (head.velocity((1 - at) * noise + at * target, t, h * kept) - (target - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"trained {step + 1} of {TRAINING_STEPS} steps, loss {loss.item():.3f}", flush=True)
    return head.eval(), task


class Task:
    """A random task. Each target is in -1..1 and near one of two centres, which depend on the condition."""

    def __init__(self) -> None:
        self.place, self.side = torch.randn(64, 36) / 8, torch.randn(64, 36) / 8

    def __call__(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets [B, 36] for conditions h [B, 64]. A fair coin selects the centre for each condition."""
        coin = torch.randint(2, (len(h), 1), generator=generator) * 2 - 1
        spread = 0.1 * torch.randn(len(h), 36, generator=generator)
        return torch.tanh(0.6 * h @ self.place + 0.5 * coin * torch.tanh(h @ self.side) + spread)


if __name__ == "__main__":
    main()
