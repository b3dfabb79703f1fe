"""The engine with many requests on this machine: frames a second, time to the first sound under load, and memory.

``python -m bench.engine`` runs the torch backend in one thread, on the demo voice and on a random checkpoint of
the sizes of `mid_size_params`. No request ends too early: random models seldom generate END, and the demo voice
does not generate it before everything is measured.
"""

import copy
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import voxkern
from bench.results import ResultRow, provenance, with_provenance
from voxkern.engine.kv_cache import cache_bytes
from voxkern.random_checkpoint import make_checkpoint, tiny_params
from voxkern.tts import DEMO

BATCHES = (1, 8, 32)
FRAMES, STEPS = 25, 7
TEXT = "seven three one nine five two"  # about sixty frames in the demo voice


def mid_size_params() -> dict[str, Any]:
    """Return the entries of ``params.json`` that differ from the tiny model's: 8 layers 768 wide, and a head of 3."""
    dims = {"dim": 768, "head_dim": 64, "hidden_dim": 2304, "n_heads": 12, "n_kv_heads": 4}
    multimodal = copy.deepcopy(tiny_params()["multimodal"])
    multimodal["audio_model_args"]["acoustic_transformer_args"] |= {"input_dim": 768, "n_layers": 3, **dims}
    return {"n_layers": 8, **dims, "multimodal": multimodal}


def frames_a_second(folder: Path, batch: int) -> float:
    """Return the frames per second of `batch` requests together, without the time of their prompts."""
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
    """Return this process's peak memory in bytes. ``getrusage`` would include the peak of its parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def rows() -> list[ResultRow]:
    """Measure the demo voice and a random model of medium size, print each figure when it is measured, and return rows.

    Each batch size runs in its own process, so that its peak memory does not include another's.
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
        folder: its checkpoint.
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
            "python -m bench.engine", "torch", f"batch {batch}", "bf16", f"euler:{STEPS}",
        )
        for metric, (value, unit) in figures.items()
    ]  # fmt: skip
    here = provenance()  # taken in this process because it records the number of threads, which is 1 here only
    return [with_provenance(row, here) for row in found]


if __name__ == "__main__":
    rows()
