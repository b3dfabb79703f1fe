"""Argument checks that several public functions share."""

import importlib.util
import numbers
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reference.params_reader import shown

FP32_MAX = torch.finfo(torch.float32).max


def to_int(name: str, value: Any, low: int, high: int | None) -> int:
    """Return the argument `name` as an int; integers of NumPy and PyTorch are accepted too, but bools are not.

    Args:
        name: the argument's name, for messages.
        value: the argument.
        low: the smallest value that is allowed.
        high: the largest value that is allowed; None means no limit.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < low or (high is not None and number > high):
        wanted = f"in {low}..{high}" if high is not None else f"at least {low}"
        raise ValueError(f"{name} must be {wanted}, got {shown(number)}")
    return number


def to_float(name: str, value: Any) -> float:
    """Return the argument `name` as a float.

    Any real number is accepted, also as an array or tensor without axes, but bools are not.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is NaN, infinite or too large for fp32, the dtype in which it is stored.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # Compare before float(), which raises OverflowError for a huge int. The comparison is false for NaN too.
    if not -FP32_MAX <= value <= FP32_MAX:  # type: ignore[operator]  # Real has <= with float
        raise ValueError(f"{name} must be a finite fp32 number, got {shown(value)}")
    return float(value)


def is_list(value: Any) -> bool:
    """Return whether an argument holds several values: a list, tuple or range, or an array or tensor with an axis."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def per_text(name: str, value: Any, n: int) -> Sequence[Any]:
    """Return one value of the argument `name` for each of `n` texts: those of a list, or a single value `n` times.

    Raises:
        ValueError: `value` is a list of another length.
    """
    if not is_list(value):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} texts")
    return list(value)


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """Return the torch device of an argument: a CPU or a GPU of CUDA or ROCm.

    None takes the GPU if torch finds one, and the CPU otherwise. An integer is the index of a GPU.

    Raises:
        ValueError: `device` is neither a CPU nor a GPU, or torch does not find this GPU.
        TypeError: `device` is of another type.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        device = f"cuda:{to_int('device', device, 0, 127)}"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', optionally with an index, got {str(device)!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise ValueError(f"device is {str(device)!r}, but torch finds {found} GPU(s); use device='cpu'")
    return target


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """Raise an error unless Triton is installed.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    if not has_triton():
        raise ModuleNotFoundError("the kernels need triton, which is not installed: pip install triton", name="triton")


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return what a model on `device` runs on: "triton", "packed" or "torch".

    Raises:
        ValueError: `backend` is unknown, or cannot run on this device.
        ModuleNotFoundError: `backend` is "triton", but Triton is not installed.
    """
    if backend not in ("auto", "triton", "packed", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton', 'packed' or 'torch', got {backend!r}")
    if backend == "auto":
        if (device.type == "cuda" or is_interpreted()) and has_triton():
            return "triton"
        return "packed" if device.type == "cpu" else "torch"
    if backend == "triton" and device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"backend is 'triton', but on a {device.type} device kernels run only in Triton's interpreter: use "
            "device='cuda', backend='packed', or set TRITON_INTERPRET=1 before triton is first imported"
        )
    if backend == "triton":
        require_triton()
    if backend == "packed" and device.type != "cpu":
        raise ValueError(f"backend is 'packed', which runs on a CPU, but device is {str(device)!r}: use backend='auto'")
    return backend


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on a CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_gradients(name: str, *tensors: Tensor) -> None:
    """Raise an error if gradients are enabled and a tensor requires one.

    Args:
        name: the accelerated part, for the message.
        tensors: arguments and weights of the part.

    Raises:
        RuntimeError: a gradient is needed.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"an accelerated {name} computes no gradients: call it under torch.inference_mode(), or voxkern.restore() "
            "the model to train it"
        )


def can_overlap(device: torch.device) -> bool:
    """Return whether launches can overlap on a device: on an NVIDIA GPU of compute capability 9.0 or newer."""
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def require_overlap(device: torch.device, backend: str) -> None:
    """Raise an error unless a model's launches can overlap.

    Args:
        device: the model's device.
        backend: what the model runs on, from :func:`resolve_backend`.

    Raises:
        ValueError: the model runs without kernels, or its device is not an NVIDIA GPU of compute capability 9.0 or
            newer.
    """
    if backend != "triton":
        raise ValueError("overlap is True, but without kernels no launches overlap: use backend='triton'")
    if not can_overlap(device):
        raise ValueError(
            f"overlap is True, but device is {str(device)!r} and launches overlap only on NVIDIA GPUs of compute "
            "capability 9.0 or newer, such as an H100: use overlap=False"
        )


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


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool)
