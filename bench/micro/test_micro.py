"""Operators timed by pytest-benchmark: ``pytest bench --benchmark-only``.

On a CPU, six operators are timed in plain PyTorch. On a GPU, every operator is timed at its first public shape, with
each available provider; this has not been run on a GPU. Calls run one after another, and the gaps between calls are
included in the times. ``python -m bench run`` times calls in a CUDA graph, as in a frame, without such gaps.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bench.micro.providers import missing, operator_trial
from bench.ops.registry import Case, Entry, entries
from bench.results import provenance
from voxkern.kernels import launch_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = [name for name in ("voxkern", "torch", "torch.compile", "flashinfer") if name not in missing(DEVICE)]
# the operators that are timed on a CPU
FEW = ("flow_step", "linear", "norm_linear", "paged_attention", "rms_norm", "token_attention")
ON_CPU = ("torch",)  # excludes torch.compile, which runs a C++ compiler for ten seconds a shape


def cases() -> list[Any]:
    """Return the test's parameters: (operator, its first public shape, provider) for each provider."""
    found = []
    for entry in entries(launch_config.architecture() if DEVICE == "cuda" else "*"):
        if DEVICE == "cuda" or entry.name in FEW:
            case = next(case for case in entry.cases if case.public)
            for provider in PROVIDERS if DEVICE == "cuda" else ON_CPU:
                found.append(pytest.param(entry, case, provider, id=f"{entry.name}-{case.name}-{provider}"))
    return found


@pytest.mark.parametrize(("entry", "case", "provider"), cases())
def test_operator(benchmark: Any, entry: Entry, case: Case, provider: str) -> None:
    """Check the results of one provider of one operator, then time it."""
    dtype = case.dtypes[0]
    with torch.inference_mode(), nullcontext() if DEVICE == "cuda" else launch_config.target_arch("sm_90"):
        trial = operator_trial(entry, case, dtype, DEVICE)
        if provider not in trial.variants:
            pytest.skip(f"{provider} has no {entry.name}")
        assert trial.fault(provider) == ""
        (args,) = trial.copies(1)

        def call() -> None:
            trial.variants[provider](**args)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{entry.name} {case.name} {dtype}"
        benchmark.extra_info |= {"provider": provider, "dtype": dtype, **provenance(DEVICE)}
        benchmark.pedantic(call, rounds=10, iterations=2, warmup_rounds=1)
