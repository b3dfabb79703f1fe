"""Measure what the host does for one frame while requests run: its time, PyTorch operators, waits and replays.

``python -m bench host`` runs the engine on a stand-in for a GPU (bench/static/stand_in_gpu.py), on which launches and
replays do nothing. The time includes the stand-in's own: some 20 us for each operator. It shows how the host's work
changes, and not the time on a machine with a GPU.
"""

import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before Triton is imported, which the next lines do

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import voxkern
from bench.command_line import parser_of
from bench.results import ResultRow
from bench.static.stand_in_gpu import stand_in_gpu
from voxkern.engine.fused_runner import DecodeBatch
from voxkern.engine.request import Request
from voxkern.random_checkpoint import make_checkpoint

BATCHES = (1, 8, 32)
FRAMES = 300  # frames that are timed, for each batch size


@dataclass(frozen=True)
class HostWork:
    """Holds the host's work for one frame.

    Attributes:
        seconds: the median time of a frame.
        operators: number of calls of each PyTorch operator outside the graphs, by name.
        waits: how often the host waits for the device, by the function that waits.
        replays: number of replays of graphs.
    """

    seconds: float
    operators: Counter[str]
    waits: Counter[str]
    replays: int


class _Operators(TorchDispatchMode):
    """Counts the PyTorch operators that run, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def host_work(folder: Path, batch: int, frames: int = FRAMES) -> HostWork:
    """Return the host's work for one frame of `batch` running requests.

    Args:
        folder: the model's checkpoint.
        batch: number of requests, and max_batch.
        frames: number of frames that are timed.
    """
    add = DecodeBatch.add

    def add_endless(self: DecodeBatch, slot: int, *arguments: Any) -> None:
        add(self, slot, *arguments)
        self.valid[slot] = 1  # no launch computes it, and a frame that is not valid ends its request

    with stand_in_gpu() as gpu, mock.patch.object(DecodeBatch, "add", add_endless):
        gpu.computes = False
        tts = voxkern.load(folder, device="cuda", backend="triton", max_batch=batch)
        engine, dim = tts.engine, tts.model.config.backbone.dim
        for seed in range(batch):
            prompt = torch.zeros(8, dim, dtype=tts.model.norm.weight.dtype, device="cuda")
            engine.submit(Request(prompt, seed, 1.2, frames + 10, 7, "euler"))
        for _ in range(3):  # captures the graphs, and allocates the host's memory
            engine.run_frame()
        gpu.waits.clear()
        gpu.n_replays = 0
        with _Operators() as operators:
            engine.run_frame()
        waits, replays, times = Counter(gpu.waits), gpu.n_replays, list[float]()
        for _ in range(frames):
            start = time.perf_counter()
            engine.run_frame()
            times.append(time.perf_counter() - start)
        assert engine.n_running == batch
    return HostWork(statistics.median(times), operators.calls, waits, replays)


def rows() -> list[ResultRow]:
    """Return rows with the host's work for a frame of 1, 8 and 32 requests of a tiny model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name))
        work = {batch: host_work(folder, batch) for batch in BATCHES}
    return [
        ResultRow("host", "frame", metric, value, unit, how, "python -m bench host", shape=f"batch {batch}")
        for batch, one in work.items()
        for metric, value, unit, how in (
            ("time", one.seconds * 1e6, "us", "measured"),
            ("operators", one.operators.total(), "1", "counted"),
            ("waits", one.waits.total(), "1", "counted"),
            ("replays", one.replays, "1", "counted"),
        )
    ]


def main(arguments: Sequence[str]) -> int:
    """Print a line for each figure."""
    parser_of("host", __doc__).parse_args(arguments)
    for row in rows():
        print(f"{row.shape}: {row.metric} {row.value:.4g} {row.unit}".removesuffix(" 1"))
    return 0
