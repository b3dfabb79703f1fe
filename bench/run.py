"""Microbenchmarks: every operator at its public shapes, in microseconds and in bytes per second.

On a CPU only plain PyTorch is timed, which says nothing about the kernels. The CUDA path has not been run yet: there
has been no GPU to run it on.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import triton
from torch import Tensor

from bench.accuracy import judge
from bench.registry import DTYPES, Case, Entry, Maker, each_tensor, entries, listed, to_dtype

ROUNDS = 20
COLD = 256 << 20  # bytes of copies to go round, so that weights come from memory: five times the L2 cache of an H100


@dataclass(frozen=True)
class Timing:
    """One operator at one shape: microseconds a call at the median and at the 20th and 80th percentile of rounds.

    Attributes:
        provider: ``torch``, the reference in plain PyTorch, or ``voxkern``.
        gb_per_s: the fewest bytes that the operator can move / median.
        versions: of torch and triton.
    """

    operator: str
    case: str
    dtype: str
    provider: str
    device: str
    us: float
    us_20: float
    us_80: float
    gb_per_s: float
    versions: str


def report(names: Sequence[str], device: str) -> None:
    """Time the named operators, or all, and print a CSV line for each as it comes."""
    known = {entry.name: entry for entry in entries()}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no operator {', '.join(unknown)}; there are {', '.join(known)}")
    table = csv.DictWriter(sys.stdout, [field.name for field in fields(Timing)], lineterminator="\n")
    table.writeheader()
    for entry in [known[name] for name in names] or known.values():
        for case in entry.cases:
            for dtype in case.dtypes if case.public else ():
                for timing in time_case(entry, case, dtype, device):
                    table.writerow(asdict(timing))
                    sys.stdout.flush()


@torch.inference_mode()
def time_case(entry: Entry, case: Case, dtype: str, device: str) -> Iterator[Timing]:
    """One timing for each provider that runs on `device`.

    Raises:
        RuntimeError: a kernel's result is wrong; a wrong one is not timed.
    """
    args = entry.args(case, Maker(DTYPES[dtype], device))
    fewest = _bytes(args.values()) + _bytes(listed(args)) + _bytes(_outputs(entry.op.declare(**args)))
    providers: dict[str, Callable[..., Any]] = {"torch": entry.reference}
    if device.startswith("cuda"):
        _must_be_right(entry, case, dtype, args)
        providers["voxkern"] = entry.op.run
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    for provider, call in providers.items():
        copies = _copies(args, max(2, COLD // fewest + 1) if device.startswith("cuda") else 2)
        rounds = _on_gpu(call, copies) if device.startswith("cuda") else _on_cpu(call, copies)
        low, *_, high = statistics.quantiles(rounds, n=5)
        median = statistics.median(rounds)
        yield Timing(
            entry.name, case.name, dtype, provider, name, *(round(1e6 * t, 2) for t in (median, low, high)),
            round(fewest / median / 1e9, 2), f"torch {torch.__version__} triton {triton.__version__}",
        )  # fmt: skip


def _on_cpu(call: Callable[..., Any], copies: Sequence[Mapping[str, Any]]) -> list[float]:
    call(**copies[0])
    times = []
    for i in range(ROUNDS):
        start = time.perf_counter()
        call(**copies[i % len(copies)])
        times.append(time.perf_counter() - start)
    return times


def _on_gpu(call: Callable[..., Any], copies: Sequence[Mapping[str, Any]]) -> list[float]:
    # one graph over all copies: event pairs around single short launches would time the gaps between them
    for args in copies:
        call(**args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in copies:
            call(**args)
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(copies))
    return times


def _must_be_right(entry: Entry, case: Case, dtype: str, args: Mapping[str, Any]) -> None:
    truth = _outputs(entry.reference(**to_dtype(args, torch.float64)))
    for out, plain, exact in zip(_outputs(entry.op.run(**args)), _outputs(entry.reference(**args)), truth, strict=True):
        verdict = judge(out, plain, exact)
        if not verdict.right:
            raise RuntimeError(f"{entry.name} {case.name} {dtype} is wrong on this device: {verdict}")


def _copies(args: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    return [each_tensor(Tensor.clone, args) for _ in range(n)]


def _outputs(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned or ())


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
