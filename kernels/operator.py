"""How a kernel becomes an operator of torch: ``torch.ops.voxkern.<name>``.

An operator is two functions. Its *declaration* has the public signature and docstring, checks its arguments and
allocates the result: run on fake tensors it is all that torch.compile needs. Its *launcher* fills the result, and is
what a fused module calls inside a frame, on memory it already has: the way through torch's dispatcher costs some 16 us.
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
    """A kernel as a public function; :func:`operator` makes one.

    Attributes:
        name: its name in ``torch.ops.voxkern``.
        launch: fills the result, its first argument, from the declared arguments, without checks.
        mutates: names of the arguments that it writes to.
        op: what torch's tools want, such as ``torch.library.opcheck``.
    """

    def __init__(self, declare: Callable[P, R], launch: Callable[..., None], mutates: Sequence[str]) -> None:
        """Register `declare` and `launch` with torch."""
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
        """Check, allocate and launch, through torch's dispatcher.

        Raises:
            RuntimeError: an argument requires gradients, or is on the CPU without the interpreter.
        """
        if torch.is_grad_enabled():
            for arg in (*args, *kwargs.values()):
                tensors = arg if isinstance(arg, list) else [arg]
                if any(isinstance(one, Tensor) and one.requires_grad for one in tensors):
                    raise RuntimeError(
                        f"{self.name}: an argument requires gradients, and a kernel has none: call it under "
                        "torch.no_grad() or torch.inference_mode(), or train with voxkern.reference"
                    )
        return self.op(*args, **kwargs)  # type: ignore[no-any-return]

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same without the dispatcher; tensors may also be meta, where a ledger wants only the launches."""
        out = self.declare(*args, **kwargs)
        tensor = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with on_device(self.name, tensor):
            self.launch(*(() if out is None else (out,)), *args, **kwargs)
        return out


def operator(launch: Callable[..., None], mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make an operator of the declaration below: ``@operator(launch_it)``.

    Args:
        launch: called with the result that the declaration allocated, if any, then with its arguments.
        mutates: names of the arguments that the launcher writes to; an operator with some declares no result.
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
    """Raise unless argument `name` is what a kernel can read; its shape otherwise.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: sizes it must have; a string names a size that may be any.
        like: a tensor whose dtype and device it must share; without one, any of fp32, bf16 and fp16 will do.
        contiguous: all of it must be; otherwise only its last dimension.
        dtype: that it must have, whatever `like` has.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: its shape, strides or device are others.
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
        raise ValueError(f"{name} is on {tensor.device} but must be on {like.device}, as the other arguments")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} {got} has strides {tensor.stride()} but must be contiguous")
    if got[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} {got} has strides {tensor.stride()} but its last dimension must have stride 1")
    return tuple(tensor.shape)


def expect_batch(name: str, rows: int, each: int, max_batch: int) -> None:
    """Raise unless argument `name` has `each` rows a request, and as many requests as the operator is prepared for.

    Raises:
        ValueError: it has not.
    """
    if not 1 <= max_batch <= 64:
        raise ValueError(f"max_batch is {max_batch} but must lie in 1..64")
    if rows % each or not each <= rows <= each * max_batch:
        raise ValueError(f"{name} has {rows} rows but must have {each} each for 1..{max_batch} requests (max_batch)")


def on_device(name: str, tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where `tensor` is.

    Raises:
        RuntimeError: it is on the CPU, and the interpreter is off; `name` says who asked.
        TypeError: no kernel reads its dtype.
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
