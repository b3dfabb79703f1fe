"""Time to load a checkpoint, with and without the scan for NaN and infinite values.

``python -m bench.checkpoint DIR`` prints medians of 3 rounds, in seconds, for a file in the page cache and on disk.
Without the scan, one byte of every page is read instead: a mapped file is loaded only in the pages that are read.
Before each load from disk, the file is dropped from the page cache. Loads with and without the scan alternate.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from voxkern import checkpoint

ROUNDS = 3


def main() -> None:
    """Time the loads, and print one line for the page cache and one for the disk."""
    folder = Path(sys.argv[1])
    for place in ("page cache", "disk"):
        seconds: dict[str, list[float]] = {"scanned": [], "touched": []}
        for _ in range(ROUNDS):
            for way, times in seconds.items():
                if place == "disk":
                    forget(folder / checkpoint.WEIGHTS)
                check = checkpoint.is_finite if way == "scanned" else touch
                with mock.patch.object(checkpoint, "is_finite", check):
                    start = time.perf_counter()
                    checkpoint.read_checkpoint(folder)
                    times.append(time.perf_counter() - start)
        print(f"from {place}: " + ", ".join(f"{way} {statistics.median(t):.2f} s" for way, t in seconds.items()))


def touch(x: Tensor) -> bool:
    """Read one byte of each page of 4096 bytes, and return True, the scan's result for finite values."""
    bytes_ = x.reshape(-1).view(torch.uint8) if x.numel() else x
    bytes_[::4096].sum()
    return True


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
