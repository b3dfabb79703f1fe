"""Checks of arguments that several calls share."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


def check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise unless `value` is an integer of at least `low`, and of at most `high` if there is one.

    Raises:
        TypeError: it is none.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be {f'in {low}..{high}' if high is not None else f'at least {low}'}, got {value}"
        )


def per_text(name: str, value: T | Sequence[T], n: int) -> Sequence[T]:
    """One value for each of `n` texts: a list's own, or the same for all.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, list):
        return [cast(T, value)] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} texts")
    return value


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for; None takes the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {error}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU; use device='cpu'")
    return target


def use_kernels(backend: str, device: torch.device) -> bool:
    """Whether a model on `device` shall run on kernels.

    Raises:
        ValueError: an unknown backend, or kernels where they cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend is 'triton' and device '{device.type}', where kernels run only in Triton's interpreter: use "
            "device='cuda', backend='torch', or set TRITON_INTERPRET=1 before triton is first imported"
        )
    return backend == "triton"


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype that models come in, by itself or by name; None for None.

    Raises:
        ValueError: any other.
    """
    for known in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    if dtype is not None:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    return None
