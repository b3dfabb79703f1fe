"""Packed weights on a CPU beside plain PyTorch, torch.compile and vLLM-Omni's module: ``python -m bench cpu``.

Three parts: the flow head of the public sizes, a whole frame of the public model, and the demo voice. All
implementations of a part run in turn, round by round. ``--threads 1`` times one thread. The flow head's weights are
also given as bytes read per second. The bandwidth of a large copy on the same machine is measured for comparison.

The whole frame needs 18 GB of memory. vLLM-Omni's module is timed where it is installed, see docs/serving.md.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import voxkern
from bench.command_line import parser_of
from bench.micro.modules import STEPS, BenchPoint, frame_trial, head_trial, public_head, public_model
from bench.micro.providers import Trial, missing
from bench.micro.run import line_of, time_trial
from bench.micro.timing import CPUClock, Timing, measure
from bench.ops.registry import to_dtype
from bench.results import FILE, ResultRow, provenance, store, with_provenance
from voxkern.random_checkpoint import public_params
from voxkern.reference import VoxtralTTS

BATCHES = (1, 4, 16)
COMPILED = (1, 4)  # torch.compile is timed at these batches only, to save time
COPY = 256 << 20  # bytes of the large copy, more than any cache holds
TEXT, SEED = "seven three one good morning", 1
PARTS = ("head", "frame", "voice")


def head_rows(command: str) -> Iterator[ResultRow]:
    """Time the flow head of the public sizes at each of :data:`BATCHES`, and a large copy."""
    copied = copy_bandwidth()
    yield row("copy", "bandwidth", "GB/s", command, "copy", copied)
    for B in BATCHES:
        point = BenchPoint("flow_head", f"public-b{B}", "bf16", "cpu")
        trial = head_trial(point, public_head, B, public_params)
        absent = {*missing("cpu"), *(() if B in COMPILED else ("torch.compile",))}
        found = timed(trial.only([name for name in trial.variants if name not in absent]))
        nbytes = weights_read(module_of(trial))
        for provider, t in found.items():
            what = {"shape": point.shape, "dtype": "bf16", "steps": trial.steps}
            yield row("flow_head", "time", "us", command, provider, scaled(t, 1e6), **what)
            rate = Timing(*(nbytes / seconds / 1e9 for seconds in (t.median, t.high, t.low)), t.rounds)
            yield row("flow_head", "weights read", "GB/s", command, provider, rate, **what)


def frame_rows(command: str) -> Iterator[ResultRow]:
    """Time a whole frame of one request of the public model."""
    point = BenchPoint("frame", "frame-b1", "bf16", "cpu")
    trial = frame_trial(point, public_model, 1)
    model, in_parts = (
        cast(VoxtralTTS, module_of(trial)),
        frame_trial(point, public_model, 1),
    )  # with its own codec stream

    def exact() -> list[torch.Tensor]:
        with in_fp64(model):
            return list(in_parts.reference(**to_dtype(trial.args, torch.float64)))

    found = timed(replace(trial, exact=exact).only(("torch", "voxkern-packed")))
    for provider, t in found.items():
        yield row("frame", "time", "us", command, provider, scaled(t, 1e6), point.shape, "bf16", trial.steps)


def voice_rows(command: str) -> Iterator[ResultRow]:
    """Time the demo voice: seconds of work for a second of sound."""
    voices = {"torch": voxkern.load(backend="torch"), "voxkern-packed": voxkern.load(backend="packed")}
    seconds = {name: len(tts.generate(TEXT, seed=SEED).samples) / tts.sampling_rate for name, tts in voices.items()}
    calls = {name: [partial(tts.generate, TEXT, seed=SEED)] for name, tts in voices.items()}
    for provider, t in measure(CPUClock(), calls).items():
        factor = scaled(t, 1 / seconds[provider])
        yield row("demo_voice", "real-time factor", "s/s", command, provider, factor, "one text", "bf16", "euler:7")


def module_of(trial: Trial) -> nn.Module:
    """Return the reference module of a trial, which holds plain weights."""
    return cast(nn.Module, cast(partial[Any], trial.reference).args[0])


def timed(trial: Trial) -> dict[str, Timing]:
    """Return the timing of each provider of a trial.

    Raises:
        RuntimeError: a provider fails or gives a wrong result.
    """
    found, faults = time_trial(trial, CPUClock(), None)
    if faults:
        raise RuntimeError("; ".join(faults))
    return found


@contextmanager
def in_fp64(model: VoxtralTTS) -> Iterator[None]:
    """Make a bf16 model compute in fp64: each layer of the backbone has fp64 weights only while it runs.

    The text embeddings stay in bf16; a frame does not use them. After the ``with`` block, all weights have their old
    bits, because fp64 holds every bf16 number.
    """
    parts = [model.acoustic_transformer, model.audio_tokenizer, model.norm]
    parts.append(model.mm_audio_embeddings.audio_codebook_embeddings)

    def widen(module: nn.Module, *_: Any) -> None:
        module.double()

    def narrow(module: nn.Module, *_: Any) -> None:
        module.bfloat16()

    hooks = [layer.register_forward_pre_hook(widen) for layer in model.layers]
    hooks += [layer.register_forward_hook(narrow) for layer in model.layers]
    for part in parts:
        part.double()
    try:
        yield
    finally:
        for part in parts:
            part.bfloat16()
        for hook in hooks:
            hook.remove()


def weights_read(head: nn.Module) -> int:
    """Return the bytes of weights that a frame of a flow head must read: the velocity network's in each evaluation."""
    sizes = {name: p.numel() * p.element_size() for name, p in head.named_parameters()}
    once = ("time_projection", "llm_projection", "semantic_codebook_output")
    return sum(size if name.startswith(once) else STEPS * size for name, size in sizes.items())


def copy_bandwidth() -> Timing:
    """Return the bandwidth of a large copy, in GB/s; read and written bytes both count."""
    source = torch.empty(COPY, dtype=torch.uint8)
    target = torch.zeros_like(source)
    t = measure(CPUClock(), {"copy": [lambda: target.copy_(source)]})["copy"]
    return Timing(*(2 * COPY / seconds / 1e9 for seconds in (t.median, t.high, t.low)), t.rounds)


def scaled(t: Timing, factor: float) -> Timing:
    """Return a timing with all times multiplied by `factor`."""
    return Timing(t.median * factor, t.low * factor, t.high * factor, t.rounds)


def row(
    subject: str, metric: str, unit: str, command: str, provider: str, t: Timing, shape: str = "", dtype: str = "",
    steps: str = "",
) -> ResultRow:  # fmt: skip
    """Return the row of one figure; the metric's name has the number of threads."""
    value, low, high = (float(f"{one:.4g}") for one in (t.median, t.low, t.high))
    n = torch.get_num_threads()
    metric += f", {n} threads" if n > 1 else ", 1 thread"
    return ResultRow("cpu", subject, metric, value, unit, "measured", command, provider, shape, dtype, steps, low, high)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Time the parts, and store the rows."""
    parser = parser_of("cpu", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: torch's")
    parser.add_argument("--part", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--csv", default=str(FILE), metavar="FILE", help="store the rows in FILE")
    options = parser.parse_args(arguments)
    if len(options.part) > 1:  # each part has its own process, because a part does not free all its memory
        command = [sys.executable, "-m", "bench", "cpu", "--threads", str(options.threads), "--csv", options.csv]
        failed = [part for part in options.part if subprocess.run([*command, "--part", part], check=False).returncode]
        if failed:
            print(f"FAILED: {', '.join(failed)}")
        return 1 if failed else 0
    (part,) = options.part
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[str], Iterator[ResultRow]]] = {
        "head": head_rows, "frame": frame_rows, "voice": voice_rows,
    }  # fmt: skip
    for made in makers[part](f"python -m bench cpu --threads {options.threads} --part {part}"):
        found = with_provenance([made], provenance())
        print(line_of(found[0]), flush=True)
        store(found, Path(options.csv))
    return 0
