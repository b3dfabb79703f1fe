"""Argument checks that several public functions share."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


def check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise an error unless the argument `name` is an integer in `low`..`high`; a `high` of None is no limit.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be {f'in {low}..{high}' if high is not None else f'at least {low}'}, got {value}"
        )


def per_text(name: str, value: T | Sequence[T], n: int) -> Sequence[T]:
    """Return one value of the argument `name` for each of `n` texts: the list itself, or a single value `n` times.

    Raises:
        ValueError: `value` is a list of another length.
    """
    if not isinstance(value, list):
        return [cast(T, value)] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} texts")
    return value


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the torch device of an argument; None takes the GPU if torch finds one, and the CPU otherwise.

    Raises:
        ValueError: `device` is not the name of a torch device, or is "cuda" but torch finds no GPU.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {error}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU; use device='cpu'")
    return target


def use_kernels(backend: str, device: torch.device) -> bool:
    """Return whether a model on `device` runs on kernels.

    Raises:
        ValueError: `backend` is unknown, or is "triton" on a device on which kernels cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend is 'triton', but on a {device.type} device kernels run only in Triton's interpreter: use "
            "device='cuda', backend='torch', or set TRITON_INTERPRET=1 before triton is first imported"
        )
    return backend == "triton"


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of an argument, which is a dtype or its name; for None return None.

    Raises:
        ValueError: `dtype` is not bfloat16, float16 or float32.
    """
    for known in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    if dtype is not None:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    return None
