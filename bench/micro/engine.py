"""Measure the engine with many requests: frames per second, time to the first sound under load, and memory.

``python -m bench engine`` runs the torch backend in one thread, with the demo voice and with a random checkpoint of
8 layers of 768. No request ends before the measurement does: random models seldom generate END, and the demo voice
generates END later.
"""

import copy
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import voxkern
from bench.command_line import parser_of
from bench.results import ResultRow, with_provenance
from voxkern.engine.kv_cache import cache_bytes
from voxkern.random_checkpoint import make_checkpoint, tiny_params
from voxkern.tts import DEMO

BATCHES = (1, 8, 32)
FRAMES, STEPS = 25, 7
TEXT = "seven three one nine five two"  # about sixty frames in the demo voice


def mid_size_params() -> dict[str, Any]:
    """Return entries of ``params.json`` that replace the tiny model's: 8 layers 768 wide, and a head of 3 layers."""
    dims = {"dim": 768, "head_dim": 64, "hidden_dim": 2304, "n_heads": 12, "n_kv_heads": 4}
    multimodal = copy.deepcopy(tiny_params()["multimodal"])
    multimodal["audio_model_args"]["acoustic_transformer_args"] |= {"input_dim": 768, "n_layers": 3, **dims}
    return {"n_layers": 8, **dims, "multimodal": multimodal}


def frames_a_second(folder: Path, batch: int) -> float:
    """Return the frames per second of `batch` requests together. The time of the prompts is not included."""
    tts = voxkern.load(folder, backend="torch", max_batch=batch)
    times: list[float] = []
    tts.generate(
        [TEXT] * batch, seed=list(range(batch)), steps=STEPS, max_frames=FRAMES,
        on_frame=lambda n: times.append(time.perf_counter()),
    )  # fmt: skip
    return batch * (len(times) - 1) / (times[-1] - times[0])


def first_sound(folder: Path, batch: int, others: int) -> float:
    """Return the median seconds from the call of ``stream()`` to its first chunk, while `others` requests run."""
    tts = voxkern.load(folder, backend="torch", max_batch=batch)
    tts.generate(TEXT, steps=STEPS, max_frames=1)
    load = [tts.stream(TEXT, seed=i, steps=STEPS, max_frames=400, chunk=400, first_chunk=400) for i in range(others)]
    threads = [threading.Thread(target=next, args=(stream, None), daemon=True) for stream in load]
    for thread in threads:
        thread.start()
    while tts.engine.n_running < others:
        time.sleep(0.01)
    waits = []
    for seed in range(5):
        start = time.perf_counter()
        stream = tts.stream(TEXT, seed=seed, steps=STEPS, max_frames=20)
        next(stream)
        waits.append(time.perf_counter() - start)
        stream.close()
    for stream in load:
        stream.close()
    for thread in threads:
        thread.join()
    return statistics.median(waits)


def peak_memory() -> int:
    """Return this process's peak memory in bytes. ``getrusage`` would include the parent process's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rows() -> list[ResultRow]:
    """Measure the demo voice and a random model of medium size at each batch size, print the figures, and return rows.

    Each model and batch size runs in a new process, so that the peak memory of one does not include another's.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as own,
    ):
        middle = make_checkpoint(Path(name), overrides=mid_size_params())
        folders = {"demo voice": DEMO, "random, 8 layers of 768": middle}
        return [
            row
            for model, folder in folders.items()
            for batch in BATCHES
            for row in own.submit(rows_of, model, folder, batch).result()
        ]


def rows_of(model: str, folder: Path, batch: int) -> list[ResultRow]:
    """Measure one model at one batch size, print its figures, and return their rows.

    Args:
        model: the model's name in the rows.
        folder: the model's checkpoint.
        batch: requests that run at once.
    """
    torch.set_num_threads(1)
    config = voxkern.load(folder, backend="torch").model.config.backbone
    before = peak_memory()
    figures = {
        "frames a second": (frames_a_second(folder, batch), "1/s"),
        "first sound under load": (first_sound(folder, batch, batch - 1), "s"),
    }
    figures["peak memory"] = (peak_memory() / 1e6, "MB")
    figures["memory before any request"] = (before / 1e6, "MB")
    for n in (64, 400, 1000):
        figures[f"keys and values of {n} tokens"] = (cache_bytes(config, n, torch.bfloat16) / 1e6, "MB")
    print(
        f"{model}, {batch}: " + ", ".join(f"{name} {value:.4g} {unit}" for name, (value, unit) in figures.items()),
        flush=True,
    )
    found = [
        ResultRow(
            "engine", model, metric, value, unit, "counted" if metric.startswith("keys") else "measured",
            "python -m bench engine", "torch", f"batch {batch}", "bf16", f"euler:{STEPS}",
        )
        for metric, (value, unit) in figures.items()
    ]  # fmt: skip
    return with_provenance(found)  # with the number of threads, which is 1 only in this process


def main(arguments: Sequence[str]) -> int:
    """Print a line for each figure."""
    parser_of("engine", __doc__).parse_args(arguments)
    rows()
    return 0
