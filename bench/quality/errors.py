"""The error of each dtype against fp64, in the model's own units: codes flipped, and noise in the sound.

``python -m bench errors`` first generates the frames of a few texts in fp32, in each voice of the demo checkpoint.
Under teacher forcing, each model then receives these frames as its past, and generates the next frame after each of
them. The truth is the result of the same checkpoint in fp64. Results in fp16 also have the error of weights that fp16
cannot represent.

``torch`` is plain PyTorch. ``voxkern`` is the kernels in Triton's interpreter, on a CPU. The backbone computes all
states in one pass, as it does for a prompt. The noise in the sound comes from the codec alone, because the codec of
every model decodes the same codes.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.command_line import parser_of
from bench.ops.registry import FLOATS, ROOT
from bench.results import FILE, ResultRow, read, store, with_provenance
from voxkern.checkpoint import read_checkpoint
from voxkern.generation_params import CFG_ALPHA
from voxkern.reference.config import END_AUDIO, N_SPECIAL_CODES
from voxkern.reference.noise import noise, seed_tensor
from voxkern.tts import DEMO, TTS

TEXTS = ("seven three", "zero nine", "five two", "eight one", "four six")
N_TEXTS = 2  # a text takes 80 s on one core
STEPS, MAX_FRAMES = 7, 15
ROWS = 64  # states in one call of the flow head: 16 of each of 4 histories (2 texts in 2 voices)
# The interpreter's time depends on the number of operations, not on their size. With these tiles 2 steps of 32 states
# take 3.3 s on one core, many times less than with the tests' small tiles. The order of summation depends on the tiles,
# and therefore differs from a GPU's, as it differs between architectures.
TILES = {
    "norm_linear": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256},
    "norm_swiglu": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256},
    "linear": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256},
    "codec_conv": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256},
    "semantic_argmax": {"BLOCK_B": 64, "BLOCK_N": 64, "BLOCK_K": 256},
    "token_attention": {"BLOCK_B": 32},
    "state_attention": {"BLOCK_B": 32},
    "norm_qkv_attention": {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 256, "PAIRS": 128},
    "flow_step": {"BLOCK_N": 256, "BLOCK_K": 64},
    "prefill_attention": {"COLUMNS_Q": 64, "BLOCK_N": 64},
    "codec_attention": {"BLOCK_Q": 64},
}


@dataclass(frozen=True)
class History:
    """The frames of one request, generated once and given to every model as its past.

    Attributes:
        text: the request's text.
        voice: name of the request's voice.
        seed: the request's seed.
        codes: int64 [T, 37], the frames' codes with the +2 offset.
    """

    text: str
    voice: str
    seed: int
    codes: Tensor


@dataclass(frozen=True)
class Flips:
    """Counts of the codes that differ from the truth's.

    Attributes:
        acoustic: number of acoustic codes compared. Frames that are END in either result are left out.
        by: numbers of acoustic codes that differ by 1 level, by 2 levels, and by more.
        semantic: number of semantic codes compared, END included.
        semantic_flipped: number of semantic codes that differ.
    """

    acoustic: int
    by: tuple[int, int, int]
    semantic: int
    semantic_flipped: int

    @classmethod
    def of(cls, codes: Tensor, truth: Tensor) -> "Flips":
        """Compare frames of codes with the truth's, both int64 [N, 37] with the +2 offset."""
        spoken = (codes[:, 0] != END_AUDIO) & (truth[:, 0] != END_AUDIO)
        off = (codes - truth)[spoken, 1:].abs()
        by = (int((off == 1).sum()), int((off == 2).sum()), int((off > 2).sum()))
        return cls(off.numel(), by, len(codes), int((codes[:, 0] != truth[:, 0]).sum()))


def generate_histories(tts: TTS, texts: list[str], max_frames: int = MAX_FRAMES) -> list[History]:
    """Generate every text in every voice, with seeds 0, 1, 2 and so on, and return the histories."""
    asked = [(text, voice) for text in texts for voice in tts.voices]
    said, voices = zip(*asked, strict=True)
    seeds = list(range(len(asked)))
    audios = tts.generate(list(said), list(voices), seeds, steps=STEPS, max_frames=max_frames)
    return [
        History(text, voice, seed, torch.from_numpy(audio.codes.T).long() + N_SPECIAL_CODES)
        for (text, voice), seed, audio in zip(asked, seeds, audios, strict=True)
    ]


@torch.inference_mode()
def conditions(tts: TTS, histories: list[History]) -> tuple[Tensor, Tensor]:
    """Return the backbone's states [N, dim] and the next frames' noise [N, K].

    The states are those after each history's prompt, and after each frame of the history.
    """
    model, states, draws = tts.model, [], []
    for history in histories:
        prompt = tts._prompts.make(history.text, history.voice, tts.model.config.backbone.max_seq_len).embeddings
        u = torch.cat((prompt, model.embed_codes(history.codes)))
        states.append(model.hidden_states(u.unsqueeze(0))[0, len(prompt) - 1 :])
        frames = torch.arange(len(history.codes) + 1)
        seeds = seed_tensor([history.seed] * len(frames))
        draws.append(noise(seeds, frames, model.config.audio.n_acoustic_codebook))
    return torch.cat(states), torch.cat(draws)


@torch.inference_mode()
def next_frames(tts: TTS, histories: list[History]) -> Tensor:
    """Generate the frame after each state of :func:`conditions`: int64 [N, 37] with the +2 offset."""
    parts = zip(*(torch.split(rows, ROWS) for rows in conditions(tts, histories)), strict=True)
    head = tts.model.acoustic_transformer
    return torch.cat([head(h, torch.full((len(h),), CFG_ALPHA), x, STEPS) for h, x in parts])


def sound(tts: TTS, histories: list[History]) -> Tensor:
    """Decode the histories' codes with the model's codec, and return the samples of all histories joined, fp64 [n]."""
    chunks = []
    for history in histories:
        stream = tts.model.audio_tokenizer.stream()
        codes = (history.codes - N_SPECIAL_CODES).T.unsqueeze(0)  # [1, 37, T]
        chunks += [
            stream.decode(part).flatten().double() for part in torch.split(codes, stream.max_chunk_frames, dim=2)
        ]
    return torch.cat(chunks)


def snr(found: Tensor, truth: Tensor) -> float:
    """Return the signal-to-noise ratio in dB: energy of `truth` / energy of the error, inf without an error."""
    added = float((found.double() - truth).square().sum())
    return 10 * math.log10(float(truth.square().sum()) / added) if added else math.inf


def measured(
    folder: Path, n_texts: int, dtypes: tuple[str, ...] = tuple(FLOATS), max_frames: int = MAX_FRAMES
) -> list[ResultRow]:
    """Measure each dtype and provider, and return their rows. The process must run with ``TRITON_INTERPRET=1``.

    Args:
        folder: the checkpoint.
        n_texts: number of :data:`TEXTS` to generate.
        dtypes: names of dtypes: bf16, fp16 or fp32.
        max_frames: the most frames in a history.
    """
    from bench.static.interpreter import speed_up  # needs Triton

    speed_up()
    histories = generate_histories(TTS(read_checkpoint(folder, torch.float32)), list(TEXTS[:n_texts]), max_frames)
    exact = TTS(read_checkpoint(folder, torch.float64))
    truth, exact_sound = next_frames(exact, histories), sound(exact, histories)
    rows = []
    for dtype in dtypes:
        for provider in ("torch", "voxkern"):
            tts = TTS(
                read_checkpoint(folder, FLOATS[dtype]), ROWS, backend="triton" if provider == "voxkern" else "torch"
            )
            with large_tiles():
                flips = Flips.of(next_frames(tts, histories), truth)
                rows += rows_of(flips, snr(sound(tts, histories), exact_sound), provider, dtype, n_texts)
    return rows


def rows_of(flips: Flips, decibels: float, provider: str, dtype: str, n_texts: int) -> list[ResultRow]:
    """Return the rows of one provider and dtype: shares of codes flipped, the codes compared, and the SNR."""
    share = 100 / max(flips.acoustic, 1)
    figures = {
        "acoustic codes compared": (flips.acoustic, "codes"),
        "acoustic codes flipped": (share * sum(flips.by), "%"),
        "acoustic codes flipped by 1 level": (share * flips.by[0], "%"),
        "acoustic codes flipped by 2 levels": (share * flips.by[1], "%"),
        "acoustic codes flipped by more": (share * flips.by[2], "%"),
        "semantic codes compared": (flips.semantic, "codes"),
        "semantic codes flipped": (100 * flips.semantic_flipped / flips.semantic, "%"),
        "waveform SNR": (decibels, "dB"),
    }
    shape, command = f"{n_texts} texts, each voice", f"python -m bench errors --texts {n_texts}"
    return [
        ResultRow(
            "errors", "demo voice", metric, value, unit, "measured" if unit == "dB" else "counted", command,
            provider, shape, dtype, f"euler:{STEPS}",
        )
        for metric, (value, unit) in figures.items()
    ]  # fmt: skip


@contextmanager
def large_tiles() -> Iterator[None]:
    """Launch kernels with :data:`TILES` within the ``with`` block."""
    from voxkern.kernels import launch_config  # needs Triton

    with ExitStack() as stack:
        for kernel, tiles in TILES.items():
            stack.enter_context(launch_config.override(kernel, **tiles))
        yield


def rows(n_texts: int = N_TEXTS) -> list[ResultRow]:
    """Measure all figures in a new process, and return their rows."""
    return rows_in_interpreter("errors", "--texts", str(n_texts))


def rows_in_interpreter(tool: str, *arguments: str) -> list[ResultRow]:
    """Run a tool of ``python -m bench`` in a new process, and return the rows that it stores.

    The new process runs kernels in the interpreter, which Triton selects when it is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", "bench", tool, *arguments, "--csv", str(file)]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        return read(file.read_text())


def table(rows: list[ResultRow]) -> str:
    """Return the table to print: for each dtype and provider a line of counts and shares."""
    lines = ["dtype  provider  acoustic codes flipped     by 1    2  more   semantic codes flipped   waveform SNR"]
    by_model: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_model.setdefault((row.dtype, row.provider), {})[row.metric] = row.value
    for (dtype, provider), of in by_model.items():
        n, n_semantic = max(of["acoustic codes compared"], 1), of["semantic codes compared"]
        flipped, *by = (
            round(of[f"acoustic codes flipped{how}"] * n / 100)
            for how in ("", " by 1 level", " by 2 levels", " by more")
        )
        semantic = round(of["semantic codes flipped"] * n_semantic / 100)
        lines.append(
            f"{dtype:5}  {provider:8}  {flipped:5} of {n:5.0f} = {flipped / n:6.2%}  {by[0]:5} {by[1]:4} {by[2]:5}"
            f"   {semantic:5} of {n_semantic:4.0f} = {semantic / n_semantic:6.2%}   {of['waveform SNR']:9.1f} dB"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table, and write the rows if ``--csv`` is given."""
    parser = parser_of("errors", __doc__)
    parser.add_argument("--texts", type=int, default=N_TEXTS, choices=range(1, len(TEXTS) + 1), help="how many texts")
    parser.add_argument(
        "--csv", type=Path, nargs="?", const=FILE, metavar="FILE", help=f"store the rows in FILE, or in {FILE.name}"
    )
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") != "1":
        found = rows(args.texts)
    else:
        torch.set_num_threads(1)
        found = with_provenance(measured(DEMO, args.texts))
    print(table(found))
    if args.csv:
        store(found, args.csv)
    return 0
