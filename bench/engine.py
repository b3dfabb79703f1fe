"""Requests side by side on this machine: frames a second, time to the first sound under load, memory.

``python -m bench.engine`` runs the torch backend on a random checkpoint of middling size; ``--tiny`` on the tiny one.
Two threads of a product wait for each other: on a machine that others use, set OMP_NUM_THREADS=1.
Random models seldom say END, so every request has as many frames as it may.
"""

import argparse
import copy
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import voxkern
from voxkern.cache import cache_bytes
from voxkern.maker import make_checkpoint, tiny_params

BATCHES = (1, 8, 32)
FRAMES, STEPS = 25, 7
TEXT = "seven three one, and then some more of it"


def middling() -> dict[str, Any]:
    """What is other than in the tiny model: 8 layers of 768, and a head of 3."""
    wide = {"dim": 768, "head_dim": 64, "hidden_dim": 2304, "n_heads": 12, "n_kv_heads": 4}
    multimodal = copy.deepcopy(tiny_params()["multimodal"])
    multimodal["audio_model_args"]["acoustic_transformer_args"] |= {"input_dim": 768, "n_layers": 3, **wide}
    return {"n_layers": 8, **wide, "multimodal": multimodal}


def frames_a_second(folder: Path, batch: int) -> float:
    """Of all requests together, prompts left out."""
    tts = voxkern.load(folder, backend="torch", max_batch=batch)
    times: list[float] = []
    tts.generate(
        [TEXT] * batch, seed=list(range(batch)), steps=STEPS, max_frames=FRAMES,
        on_frame=lambda n: times.append(time.perf_counter()),
    )  # fmt: skip
    return batch * (len(times) - 1) / (times[-1] - times[0])


def first_sound(folder: Path, batch: int, others: int) -> float:
    """Median seconds from the call of a stream to its first chunk, while `others` are being spoken."""
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


def main() -> None:
    """Print a row a batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), overrides={} if arguments.tiny else middling())
        model = voxkern.load(folder, backend="torch").model
        config, dtype = model.config.backbone, model.norm.weight.dtype
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {dtype}, {STEPS} steps")
        print("batch  frames a second  first sound, s, beside batch - 1 others  peak memory, MB")
        for batch in BATCHES:
            speed, wait = frames_a_second(folder, batch), first_sound(folder, batch, batch - 1)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(f"{batch:5d}  {speed:15.1f}  {wait:39.3f}  {peak:15.0f}", flush=True)
        print("keys and values of a request, MB: ", end="")
        print(", ".join(f"{n} tokens {cache_bytes(config, n, dtype) / 1e6:.2f}" for n in (64, 400, 1000)))


if __name__ == "__main__":
    main()
