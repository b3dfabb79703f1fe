"""The demo voice's quality with fewer evaluations of the velocity: distance to a fine solution, and words recognised.

``python -m bench distortion`` solves the demo voice's flow head with 2 to 16 evaluations on generate()'s time grids. It
starts from the backbone's states after frames that the voice generated, and compares with 256 evaluations of the
two-step method. Then a speech recogniser transcribes sentences generated with each solver, and with 256 evaluations.
Everything runs in plain PyTorch, fp32, on a CPU.
"""

import argparse
import importlib.util
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from torch import Tensor

from bench.quality.errors import TEXTS, conditions, generate_histories
from bench.quality.recognition import Score, Speaker, flite_whole, listen, sentences
from bench.results import FILE, ResultRow, provenance, store, with_provenance
from voxkern.checkpoint import read_checkpoint
from voxkern.generation_params import LIMITS
from voxkern.reference import solver as solver_module
from voxkern.reference.config import END_AUDIO
from voxkern.reference.flow_head import guide, lowest_argmax, quantise
from voxkern.reference.solver import integrate, time_grid
from voxkern.reference.train.data import VOICES, WORDS
from voxkern.reference.train.recogniser import Recogniser
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer
from voxkern.tts import DEMO, TTS

FINE = 256  # steps of the two-step method; its result counts as exact
EVALUATIONS = (2, 3, 4, 5, 7, 10, 16)
RECOGNISED = [*itertools.product(("euler", "ab2"), EVALUATIONS), ("ab2", FINE)]
SENTENCES, SEEDS = 15, 1
MAX_BATCH = 16
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
        shape = f"{len(TEXTS)} texts, each voice"
        found += [
            ResultRow(
                "distortion",
                "demo voice",
                metric,
                value,
                unit,
                how,
                COMMAND,
                "torch",
                shape,
                "fp32",
                f"{solver}:{steps}",
            )
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


def recognition_rows(tts: TTS, n_sentences: int, seeds: int) -> list[ResultRow]:
    """Return rows of the words and sentences recognised, for each solver and number of evaluations and for flite."""
    recogniser, texts = Recogniser(WORDS), sentences(n_sentences)
    found = []
    if shutil.which("flite"):
        found += score_rows(listen(flite_whole, texts, [0], recogniser), "flite", "flite", n_sentences, 1)
    # generate() raises an error above MAX_STEPS = 64 evaluations, so the limit is raised to 256 here
    with mock.patch.object(solver_module, "MAX_STEPS", FINE), mock.patch.dict(LIMITS, steps=(1, FINE)):
        for solver, steps in RECOGNISED:
            score = listen(Speaker(tts, solver, steps), texts, list(range(seeds)), recogniser)
            found += score_rows(score, "demo voice", "torch", n_sentences, seeds, f"{solver}:{steps}")
    return found


def score_rows(
    score: Score, subject: str, provider: str, n_sentences: int, seeds: int, steps: str = ""
) -> list[ResultRow]:
    """Return the rows of a score; `steps` is empty for flite's own sound."""
    shape = f"{n_sentences} sentences, {seeds} seeds, {len(VOICES)} voices"
    command = f"{COMMAND} --sentences {n_sentences} --seeds {seeds}"
    dtype = "fp32" if steps else ""
    return [
        ResultRow("distortion", subject, metric, value, unit, "measured", command, provider, shape, dtype, steps)
        for metric, (value, unit) in score.figures.items()
    ]


def missing() -> list[str]:
    """Return one line for each part that is left out on this machine, with the reason."""
    lines = []
    if not importlib.util.find_spec("pocketsphinx"):
        lines.append("no words are recognised: pocketsphinx is not installed (pip install 'voxkern[test]')")
    elif not shutil.which("flite"):
        lines.append("flite's own sound is left out: flite is not installed")
    return lines


def rows(n_sentences: int = SENTENCES, seeds: int = SEEDS, folder: Path = DEMO) -> list[ResultRow]:
    """Return all figures that can be measured on this machine. Without pocketsphinx these are only the distances."""
    tts = TTS(read_checkpoint(folder, torch.float32), MAX_BATCH)
    found = distances(tts)
    return found + (recognition_rows(tts, n_sentences, seeds) if importlib.util.find_spec("pocketsphinx") else [])


def table(rows: list[ResultRow]) -> str:
    """Return the table to print, a line for each solver and number of evaluations. A missing figure is a dash."""
    by_solver: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_solver.setdefault((row.subject, row.steps), {})[row.metric] = row.value
    lines = ["                        RMSE   codes that differ      words recognised   sentences heard"]
    for (subject, steps), of in by_solver.items():
        cells = (share(of, "codes that differ", "codes compared"), share(of, "words recognised", "words"))
        rmse = f"{of[RMSE]:.4f}" if RMSE in of else "-"
        lines.append(
            f"{subject:10}  {steps:8}  {rmse:>6}  {cells[0]:>18}  {cells[1]:>15}  "
            f"{share(of, 'strings recognised', 'strings'):>16}"
        )
    return "\n".join(lines)


def share(of: dict[str, float], metric: str, whole: str) -> str:
    """Return the percentage `metric` with its denominator, such as "2.5 % of 80", or a dash without the metric."""
    return f"{of[metric]:.1f} % of {of[whole]:.0f}" if metric in of else "-"


def main(arguments: Sequence[str]) -> int:
    """Print the table, and write the rows if ``--csv`` is given."""
    parser = argparse.ArgumentParser(prog="python -m bench distortion", description=__doc__)
    parser.add_argument("--sentences", type=int, default=SENTENCES, help="sentences to recognise, in each voice")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds for each sentence and voice")
    parser.add_argument(
        "--csv", type=Path, nargs="?", const=FILE, metavar="FILE", help=f"store the rows in FILE, or in {FILE.name}"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = rows(args.sentences, args.seeds)
    print(table(found), *missing(), sep="\n")
    if args.csv:
        here = provenance()
        store((with_provenance(row, here) for row in found), args.csv)
    return 0
