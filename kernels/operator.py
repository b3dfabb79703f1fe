"""Operators: public functions that launch Triton kernels, registered with torch as ``torch.ops.voxkern.<name>``.

An operator consists of two functions. The *declaration* has the public signature and docstring. The declaration checks
the arguments and allocates the result. torch.compile runs only the declaration, on fake tensors. The *launcher* fills
the result and checks nothing. Inside a frame, a fused module calls the launcher directly, on memory that is already
allocated, because torch's dispatcher costs some 16 us per call.

Every operator checks its arguments with :func:`expect`: a wrong dtype raises TypeError, and a wrong shape, stride or
device raises ValueError. All tensors must be on one device. They must also share one dtype, except those with a dtype
in the operator's docstring. The docstring of an operator lists only the operator's other errors.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from .launch_config import DTYPES, INTERPRETED

__all__ = ["Operator", "operator"]

P = ParamSpec("P")
R = TypeVar("R")


class Operator(Generic[P, R]):
    """A public function that launches Triton kernels, registered with torch. :func:`operator` creates such a function.

    Attributes:
        name: the operator's name in ``torch.ops.voxkern``.
        declare: the declaration, which checks the arguments and allocates the result.
        launch: the launcher, which fills the result without checks. The launcher's arguments are the result, if the
            declaration returns one, and then the declaration's arguments.
        mutates: names of the arguments that the launcher writes to.
        op: the custom operator that is registered with torch, for tools such as ``torch.library.opcheck``.
    """

    def __init__(self, declare: Callable[P, R], launch: Callable[..., None], mutates: Sequence[str]) -> None:
        functools.update_wrapper(self, declare)
        self.name = declare.__name__
        self.declare = declare
        self.launch = launch
        self.mutates = tuple(mutates)

        @functools.wraps(declare)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return self.run(*args, **kwargs)

        self.op = torch.library.custom_op(f"voxkern::{self.name}", run, mutates_args=mutates)
        self.op.register_fake(declare)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments, allocate the result and launch the kernel, through torch's dispatcher.

        Raises:
            RuntimeError: an argument requires gradients, or is on the CPU and Triton's interpreter is off.
            TypeError: an argument has a wrong dtype.
            ValueError: an argument has a wrong shape, stride or device, or a number is out of range.
        """
        if torch.is_grad_enabled():
            for arg in (*args, *kwargs.values()):
                tensors = arg if isinstance(arg, list) else [arg]
                if any(isinstance(one, Tensor) and one.requires_grad for one in tensors):
                    raise RuntimeError(
                        f"{self.name}: an argument requires gradients, but a kernel computes none: call it under "
                        "torch.no_grad() or torch.inference_mode(), or train with voxkern.reference"
                    )
        return self.op(*args, **kwargs)  # type: ignore[no-any-return]

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments, allocate the result and launch the kernel, without torch's dispatcher.

        Tensors may also be on the meta device within :func:`voxkern.compile_only.compiling_for`. Launches are then
        compiled and recorded, but not run.
        """
        out = self.declare(*args, **kwargs)
        tensor = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with on_device(self.name, tensor):
            self.launch(*(() if out is None else (out,)), *args, **kwargs)
        return out


def operator(launch: Callable[..., None], mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Return a decorator that turns a declaration into an :class:`Operator`: ``@operator(launch_it)``.

    The declaration checks each tensor with :func:`expect`, so it raises TypeError for a wrong dtype, and ValueError for
    a wrong shape, stride or device.

    Args:
        launch: the launcher, called with the declaration's result, if the declaration returns one, and then with the
            declaration's arguments.
        mutates: names of the arguments that the launcher writes to. The declaration must not return any of them.
    """
    return lambda declare: Operator(declare, launch, mutates)


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor | None = None,
    contiguous: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[int, ...]:
    """Check that a kernel can read an argument, and return the argument's shape.

    Args:
        name: the argument's name, for the error message.
        tensor: the argument.
        shape: the sizes that the argument must have. A string allows any size; the message shows the string.
        like: a tensor with the dtype and device that the argument must have. Without `like`, the argument may be fp32,
            bf16 or fp16, on any device.
        contiguous: whether the whole argument must be contiguous. Otherwise only its last dimension must be.
        dtype: the dtype that the argument must have, instead of `like`'s.

    Raises:
        TypeError: the argument is not a tensor, or has a wrong dtype.
        ValueError: the argument has a wrong shape, stride or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__} but must be a tensor")
    got, want = list(tensor.shape), "[" + ", ".join(map(str, shape)) + "]"
    if len(got) != len(shape) or any(isinstance(b, int) and a != b for a, b in zip(got, shape, strict=True)):
        raise ValueError(f"{name} is {got} but must be {want}")
    dtypes = [dtype] if dtype is not None else DTYPES if like is None else [like.dtype]
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype} but must be " + " or ".join(map(str, dtypes)))
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} but must be on {like.device}, like the other arguments")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} {got} has strides {tensor.stride()} but must be contiguous")
    if got[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} {got} has strides {tensor.stride()} but its last dimension must have stride 1")
    return tuple(tensor.shape)


def expect_batch(name: str, rows: int, each: int, max_batch: int) -> None:
    """Check that an argument has `each` rows per request, for 1 to `max_batch` requests.

    Args:
        name: the argument's name, for the error message.
        rows: the rows that the argument has.
        each: the rows that each request must have.
        max_batch: the most requests that the operator is prepared for, 1..64.

    Raises:
        ValueError: `rows` is not `each` times 1..max_batch, or `max_batch` is not in 1..64.
    """
    if not 1 <= max_batch <= 64:
        raise ValueError(f"max_batch is {max_batch} but must lie in 1..64")
    if rows % each or not each <= rows <= each * max_batch:
        limit = " (max_batch)" if max_batch < 64 else ""  # operators without the argument max_batch take up to 64
        raise ValueError(f"{name} has {rows} rows but must have {each} per request, for 1..{max_batch} requests{limit}")


def on_device(name: str, tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device of `tensor`.

    Args:
        name: the operator or fused module that launches, for the error message.
        tensor: an argument of the launch.

    Raises:
        RuntimeError: `tensor` is on the CPU, and Triton's interpreter is off.
        TypeError: `tensor` is floating-point, but not fp32, bf16 or fp16.
    """
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: weights are {tensor.dtype} but must be " + " or ".join(map(str, DTYPES)))
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            f"{name}: tensors are on the CPU, where kernels run only in Triton's interpreter: move them to a GPU, use "
            "voxkern.reference, or set TRITON_INTERPRET=1 before triton is first imported"
        )
    return contextlib.nullcontext()
