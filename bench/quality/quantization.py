"""What 8-bit weights do to the sound of the demo voice.

``python -m bench quantization`` compares the schemes of bench/quality/schemes.py in two ways.

**Teacher forcing.** Each model receives the frames that bf16 has generated as its past, and generates the next frame
after each of them (bench/quality/errors.py). The truth is the same checkpoint in fp64, without 8-bit weights. Two
faithful bf16 implementations, PyTorch and the kernels, differ from this truth, too. They are the baseline. The kernels
run in Triton's interpreter.

**Free running.** Each model generates 100 strings of digits and 40 sentences on its own past, with several solvers. A
speech recogniser counts the words, and the lengths are compared with those of 16-bit weights. All models compute in
fp32, so that only the weights differ, and 8-bit weights are dequantised once. The checkpoint in bf16 is the baseline.

With TRITON_INTERPRET=1, only teacher forcing is measured.
"""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bench.command_line import parser_of
from bench.ops.registry import FLOATS
from bench.quality.errors import (
    Flips,
    History,
    conditions,
    generate_histories,
    large_tiles,
    rows_in_interpreter,
    snr,
    sound,
)
from bench.quality.recognition import digit_strings, sentences
from bench.quality.schemes import FP8, FP8_BY_TENSOR, INT4, INT8, PLAIN, Scheme, dequantize, dequantized, schemes
from bench.results import FILE, ResultRow, store, with_provenance
from bench.static.work import dram_bytes, frame, public, public_model
from voxkern.checkpoint import read_checkpoint
from voxkern.engine import runner
from voxkern.generation_params import CFG_ALPHA
from voxkern.reference.config import END_AUDIO
from voxkern.reference.quantized import QuantizedLinear, quantizable
from voxkern.reference.train.data import DIGITS, WORDS
from voxkern.reference.train.recogniser import Recogniser, words_right
from voxkern.tts import DEMO, TTS

COMMAND = "python -m bench quantization"
STEPS, ROWS, MAX_FRAMES = 7, 64, 15
# texts in 2 voices, with 16 states each: 4 x ROWS
TEXTS = ("seven three", "zero nine", "five two", "eight one", "six four", "nine eight", "two seven", "three zero")
FITTED_ON = ("four six", "nine seven", "two zero", "three eight")  # texts for scales that are fitted to inputs
SOLVERS = ("euler:2", "euler:4", "euler:7", "ab2:2", "ab2:4", "ab2:7")
SPEAKING = (PLAIN, INT8, FP8, FP8_BY_TENSOR, INT4)
MAIN_SCHEMES, OTHER_SOLVERS = (PLAIN, INT8, FP8), ("euler:7", "ab2:4")  # other schemes run with these solvers only
STRINGS, LONGEST = 100, 150  # strings of digits, with 2 sentences for each 5 of them; the most frames of a text
SLOTS = 32  # texts that are generated side by side


@dataclass(frozen=True)
class Result:
    """The latents and codes that a model generates with teacher forcing.

    Attributes:
        latents: fp64 [N, K], the acoustic latents before they are quantised.
        codes: int64 [N, 37], with the +2 offset.
    """

    latents: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Text:
    """The words, the length and the end of one generated text.

    Attributes:
        words: number of its words that were recognised.
        frames: number of its frames.
        ended: whether it ended by itself, before the limit of frames.
    """

    words: int
    frames: int
    ended: bool


@torch.inference_mode()
def generated(tts: TTS, histories: list[History]) -> Result:
    """Generate the latents and codes of the frame after each state of :func:`conditions`."""
    head, latents, codes = tts.model.acoustic_transformer, [], []
    for h, noise in zip(*(torch.split(rows, ROWS) for rows in conditions(tts, histories)), strict=True):
        alpha = torch.full((len(h),), CFG_ALPHA)
        latents.append(head.solve(h, alpha, noise, STEPS).double())
        codes.append(head(h, alpha, noise, STEPS))
    return Result(torch.cat(latents), torch.cat(codes))


def decoded(tts: TTS, histories: list[History], codes: Tensor, truth: Tensor) -> Tensor:
    """Decode generated frames history by history, without those for which the truth is END.

    A frame without sound in `codes` alone (END, EMPTY or not finite) is replaced by the truth's, so it adds no error.
    """
    frames = torch.where(codes[:, :1] <= END_AUDIO, truth, codes)
    parts = torch.split(frames, [len(history.codes) + 1 for history in histories])
    wanted = torch.split(truth[:, 0] != END_AUDIO, [len(part) for part in parts])
    changed = [
        History(history.text, history.voice, history.seed, part[mask])
        for history, part, mask in zip(histories, parts, wanted, strict=True)
    ]
    return sound(tts, [history for history in changed if len(history.codes)])


@torch.inference_mode()
def mean_squares(tts: TTS, histories: list[History]) -> dict[str, Tensor]:
    """Return the mean square of each input of the large layers, fp32 [K].

    The mean is over prompts and frames in the backbone, and over all evaluations in the flow head.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        total, n = sums.get(name, (torch.zeros(x.shape[1]), 0))
        sums[name] = total + x.square().sum(0), n + len(x)

    hooks = [
        linear.register_forward_pre_hook(functools.partial(note, name))
        for name, linear in quantizable(tts.model).items()
    ]
    generated(tts, histories)
    for hook in hooks:
        hook.remove()
    return {name: total / n for name, (total, n) in sums.items()}


def plain(dtype: torch.dtype = torch.bfloat16, backend: str = "torch") -> TTS:
    """Return the demo voice in `dtype`, without quantised layers."""
    return TTS(read_checkpoint(DEMO, dtype), ROWS, backend)


def given() -> list[ResultRow]:
    """Measure every scheme after given histories. The process must run with ``TRITON_INTERPRET=1``."""
    from bench.static.interpreter import speed_up  # needs Triton

    speed_up()
    histories = generate_histories(plain(), list(TEXTS), MAX_FRAMES)
    truth, codec = generated(plain(torch.float64), histories), plain(torch.float32)
    importance = mean_squares(plain(torch.float32), generate_histories(plain(), list(FITTED_ON), MAX_FRAMES))
    exact = decoded(codec, histories, truth.codes, truth.codes)
    config, found = plain().model.config, []
    all_ = list(schemes(config.acoustic_transformer.n_layers, config.backbone.n_layers))
    for scheme, provider in [(one, "torch") for one in all_] + [(PLAIN, "voxkern")]:
        checkpoint = read_checkpoint(DEMO, torch.bfloat16)
        scheme.apply(checkpoint.model, importance)
        with large_tiles():
            result = generated(TTS(checkpoint, ROWS, backend="triton" if provider == "voxkern" else "torch"), histories)
        decibels = snr(decoded(codec, histories, result.codes, truth.codes), exact)
        rmse = float((result.latents - truth.latents).square().mean().sqrt())
        found += rows_given(scheme, provider, Flips.of(result.codes, truth.codes), rmse, decibels)
        print(f"{scheme.name} {provider}: RMSE {rmse:.4f}, SNR {decibels:.1f} dB", flush=True)
    for scheme in (INT8, FP8):
        share = 100 * share_of_worst_rows(scheme, importance)
        found.append(_row(scheme.name, "error in the worst 1 % of rows", share, "%", "measured", "torch", "demo voice"))
    return found


def share_of_worst_rows(scheme: Scheme, importance: Mapping[str, Tensor]) -> float:
    """Return the share of the squared error of all layers' outputs that comes from the worst hundredth of rows.

    The errors are estimated from the mean squares of the inputs, without their correlations.
    """
    errors = []
    for name, linear in quantizable(plain().model).items():
        new = scheme.convert(linear, None)
        assert isinstance(new, QuantizedLinear)
        errors.append(((dequantized(new) - linear.weight.float()).square() * importance[name]).sum(1))
    found = torch.cat(errors).sort(descending=True).values
    return float(found[: len(found) // 100].sum() / found.sum())


def rows_given(scheme: Scheme, provider: str, flips: Flips, rmse: float, decibels: float) -> list[ResultRow]:
    """Return the rows of one scheme after given histories."""
    share = 100 / max(flips.acoustic, 1)
    figures = {
        "acoustic codes compared": (flips.acoustic, "codes", "counted"),
        "acoustic codes flipped": (share * sum(flips.by), "%", "counted"),
        "acoustic codes flipped by more than 1 level": (share * sum(flips.by[1:]), "%", "counted"),
        "semantic codes compared": (flips.semantic, "codes", "counted"),
        "semantic codes flipped": (100 * flips.semantic_flipped / flips.semantic, "%", "counted"),
        "RMSE of latents": (rmse, "1", "measured"),
        "SNR of the sound": (decibels, "dB", "measured"),
    }
    return [
        _row(scheme.name, metric, *figure, provider, f"given, {len(TEXTS)} texts") for metric, figure in figures.items()
    ]


def sizes() -> list[ResultRow]:
    """Count the bytes of the public model and of one request's frame, with each scheme."""
    config, model = public(), public_model()
    memory = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    whole = dram_bytes([one for part in frame(1, STEPS).values() for one in part])
    found = []
    for scheme in schemes(config.acoustic_transformer.n_layers, config.backbone.n_layers):
        less, less_a_frame = scheme.saved(model, STEPS)
        found.append(_row(scheme.name, "bytes of the public model", memory - less, "B", "counted", "voxkern", "public"))
        found.append(_row(scheme.name, "bytes of a frame", whole - less_a_frame, "B", "counted", "voxkern", "public"))
    return found


def texts() -> list[str]:
    """Return the texts that the models generate on their own past."""
    return digit_strings(STRINGS) + sentences(2 * STRINGS // 5)


def generate_texts(name: str, solver: str, dtype: torch.dtype) -> list[Text]:
    """Generate all texts with the scheme of :data:`SPEAKING` that has this name, and one solver, in `dtype`."""
    torch.set_num_threads(1)
    scheme = next(scheme for scheme in SPEAKING if scheme.name == name)
    checkpoint = read_checkpoint(DEMO, dtype)
    scheme.apply(checkpoint.model, {})
    dequantize(checkpoint.model)
    tts, all_ = TTS(checkpoint, SLOTS), texts()
    voices, (kind, _, steps) = list(tts.voices), solver.partition(":")
    with mock.patch.object(runner, "BLOCK_ROWS", SLOTS):  # one large block: half the time, other roundings
        audios = tts.generate(
            all_, [voices[i % len(voices)] for i in range(len(all_))], list(range(len(all_))),
            steps=int(steps), solver=kind, max_frames=LONGEST,
        )  # fmt: skip
    digits, words = Recogniser(DIGITS), Recogniser(WORDS)
    found = []
    for i, (text, audio) in enumerate(zip(all_, audios, strict=True)):
        recognised = (digits if i < STRINGS else words).recognise(audio.samples, tts.sampling_rate)
        found.append(Text(words_right(text.split(), recognised), audio.codes.shape[1], audio.ended))
    return found


def free() -> list[ResultRow]:
    """Measure the schemes that run free, and return their rows."""
    settings = [
        (scheme.name, solver, torch.float32)
        for solver in SOLVERS for scheme in SPEAKING if scheme in MAIN_SCHEMES or solver in OTHER_SOLVERS
    ]  # fmt: skip
    settings.append((PLAIN.name, f"euler:{STEPS}", torch.bfloat16))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = dict(zip(settings, pool.map(generate_texts, *zip(*settings, strict=True)), strict=True))
    found = []
    for name, solver, dtype in settings:
        usual = results[PLAIN.name, solver, torch.float32]
        found += rows_free(name, solver, dtype, results[name, solver, dtype], usual)
    return found


def rows_free(name: str, solver: str, dtype: torch.dtype, result: list[Text], usual: list[Text]) -> list[ResultRow]:
    """Return the rows of one scheme that runs free with one solver; `usual` is the result of 16-bit weights."""
    lengths = np.array([one.frames / other.frames for one, other in zip(result, usual, strict=True)])
    n_words = sum(len(text.split()) for text in texts())
    figures = {
        "words": (float(n_words), "words"),
        "words recognised": (100 * sum(one.words for one in result) / n_words, "%"),
        "ended by itself": (100 * float(np.mean([one.ended for one in result])), "%"),
        "texts of another length": (100 * float((lengths != 1).mean()), "%"),
        "mean length": (float(lengths.mean()), "1"),
        "greatest length": (float(lengths.max()), "1"),
    }
    dtype_ = next(name for name, one in FLOATS.items() if one == dtype)
    shape = f"free, {len(result)} texts"
    return [
        _row(name, metric, *figure, "measured", "torch", shape, dtype_, solver) for metric, figure in figures.items()
    ]


def _row(
    name: str, metric: str, value: float, unit: str, how: str, provider: str, shape: str,
    dtype: str = "bf16", steps: str = f"euler:{STEPS}",
) -> ResultRow:  # fmt: skip
    return ResultRow("quantization", name, metric, value, unit, how, COMMAND, provider, shape, dtype, steps)


def rows() -> list[ResultRow]:
    """Measure everything, and return the rows. Teacher forcing is measured in a new process, in the interpreter."""
    return [*rows_in_interpreter("quantization"), *sizes(), *free()]


def main(arguments: Sequence[str]) -> int:
    """Print a line for each scheme and solver, and write the rows if ``--csv`` is given."""
    parser = parser_of("quantization", __doc__)
    parser.add_argument(
        "--csv", type=Path, nargs="?", const=FILE, metavar="FILE", help=f"store the rows in FILE, or in {FILE.name}"
    )
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        torch.set_num_threads(2)
        found = with_provenance(given())
    else:
        found = rows()
        print(table(found))
        found = with_provenance(found)
    if args.csv:
        store(found, args.csv)
    return 0


def table(rows: Iterable[ResultRow]) -> str:
    """Return the lines to print: the figures of each scheme, provider, shape and solver."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (row.subject, row.provider, row.shape, row.steps)
        groups.setdefault(key, []).append(f"{row.metric} {row.value:.4g} {row.unit if row.unit != '1' else ''}".strip())
    return "\n".join(f"{', '.join(key)}: {', '.join(figures)}" for key, figures in groups.items())
