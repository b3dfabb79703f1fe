"""The error of the demo voice's flow head with fewer evaluations of the velocity: distance to a fine solution.

``python -m bench distortion`` solves the demo voice's flow head with 2 to 16 evaluations on generate()'s time grids. It
starts from the backbone's states after frames that the voice generated, and compares with 256 evaluations of the
two-step method. Everything runs in plain PyTorch, fp32, on a CPU. ``python -m bench recognition --solver`` measures how
many words a speech recogniser hears right with a solver and a number of evaluations.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bench.command_line import parser_of
from bench.quality.errors import TEXTS, conditions, generate_histories
from bench.results import FILE, ResultRow, store, with_provenance
from voxkern.checkpoint import read_checkpoint
from voxkern.reference.config import END_AUDIO
from voxkern.reference.flow_head import guide, lowest_argmax, quantise
from voxkern.reference.solver import integrate, time_grid
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer
from voxkern.tts import DEMO, TTS

FINE = 256  # steps of the two-step method; its result counts as exact
EVALUATIONS = (2, 3, 4, 5, 7, 10, 16)
COMMAND = "python -m bench distortion"
RMSE = f"RMSE from {FINE} steps"


def distances(tts: TTS, evaluations: tuple[int, ...] = EVALUATIONS) -> list[ResultRow]:
    """Return rows for each solver and number of evaluations: RMSE of x before quantisation, and codes that differ."""
    h, x = spoken(tts)
    head = cast(FlowMatchingAudioTransformer, tts.model.acoustic_transformer)  # for the type checker: any head works
    levels = tts.model.config.audio.acoustic_codebook_size
    exact = solve(head, h, x, "ab2", [1 - (1 - k / FINE) ** 1.5 for k in range(FINE + 1)])
    found = []
    for solver, steps in itertools.product(("euler", "ab2"), evaluations):
        solved = solve(head, h, x, solver, time_grid(solver, steps))
        differ = quantise(solved, levels) != quantise(exact, levels)
        figures = {
            RMSE: (float((solved - exact).square().mean().sqrt()), "1", "measured"),
            "codes compared": (differ.numel(), "codes", "counted"),
            "codes that differ": (100 * float(differ.double().mean()), "%", "counted"),
        }
        shape, name = f"{len(TEXTS)} texts, each voice", f"{solver}:{steps}"
        found += [
            ResultRow("distortion", "demo voice", metric, value, unit, how, COMMAND, "torch", shape, "fp32", name)
            for metric, (value, unit, how) in figures.items()
        ]
    return found


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


def spoken(tts: TTS) -> tuple[Tensor, Tensor]:
    """Return the backbone states [N, dim] after which the model generates a frame, and the frames' noise [N, K].

    States after which the model generates END are left out.
    """
    h, x = conditions(tts, generate_histories(tts, list(TEXTS)))
    goes_on = lowest_argmax(tts.model.acoustic_transformer.semantic_logits(h)) != END_AUDIO
    return h[goes_on], x[goes_on]


def rows() -> list[ResultRow]:
    """Return the rows of the demo voice."""
    return distances(TTS(read_checkpoint(DEMO, torch.float32), max_batch=16))


def table(rows: list[ResultRow]) -> str:
    """Return the table to print: a line for each solver and number of evaluations."""
    by_solver: dict[str, dict[str, float]] = {}
    for row in rows:
        by_solver.setdefault(row.steps, {})[row.metric] = row.value
    lines = [f"{'solver':8}  {'RMSE':>6}  {'codes that differ':>17}"]
    for steps, of in by_solver.items():
        share = f"{of['codes that differ']:.1f} % of {of['codes compared']:.0f}"
        lines.append(f"{steps:8}  {of[RMSE]:6.4f}  {share:>17}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table, and write the rows if ``--csv`` is given."""
    parser = parser_of("distortion", __doc__)
    parser.add_argument(
        "--csv", type=Path, nargs="?", const=FILE, metavar="FILE", help=f"store the rows in FILE, or in {FILE.name}"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = rows()
    print(table(found))
    if args.csv:
        store(with_provenance(found), args.csv)
    return 0
