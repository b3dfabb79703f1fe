"""The tensors of the stand-in for a GPU (bench/static/stand_in_gpu.py), and how functions of torch run on them."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

DEVICE = torch.device("cuda:0")


class StandInTensor(Tensor):
    """A tensor on the stand-in: a CPU tensor of another class, so that kernels find its data at its address."""

    gpu: ClassVar[Any] = None  # the StandInGPU in use

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert cls.gpu is not None, "a tensor of the stand-in is used after the stand-in was removed"
        return cls.gpu.operator(func, args, kwargs or {})

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a copy on the CPU."""
        return self.to("cpu")

    def numpy(self, *, force: bool = False) -> Any:
        """Raise TypeError, as a GPU's tensor does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copy = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True  # type: ignore[attr-defined]
        return copy


class Arrival:
    """A copy to pinned memory that the host has not waited for yet."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        """Start to copy `source`, and poison `target`."""
        self._target, self._values = target, plainly(torch.clone, source)
        target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).max)

    def arrive(self) -> None:
        """Write the values that the source had when the copy started."""
        with torch.inference_mode(), _disable_current_modes():
            plainly(self._target.copy_, self._values)


class LaunchArgument:
    """Refers to the memory of a tensor that a captured launch uses, without keeping the memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._form = tensor.dtype, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def tensor(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the memory was freed.
        """
        if self._storage.expired():
            raise RuntimeError("a graph is replayed after memory that its launches use was freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return adopted(torch.empty(0, dtype=self._dtype, device="cpu").set_(storage, *self._form))  # type: ignore[no-any-return]


def adopted(made: Any) -> Any:
    """Move the tensors in `made`, a tensor or a collection, to the stand-in, without a copy."""
    for one in tree_iter(made):
        if type(one) is Tensor:
            one.__class__ = StandInTensor
    return made


def plainly(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch, for which tensors of the stand-in are then CPU tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def is_gpu(device: Any) -> bool:
    """Return whether `device`, an argument of torch, is a GPU."""
    return isinstance(device, int) or torch.device(device).type == "cuda"


def parse_to(args: Any, kwargs: Any) -> tuple[Any, torch.dtype | None, bool, torch.memory_format]:
    """Return device, dtype, non_blocking and memory format of the arguments of ``Tensor.to``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    args, other = list(args), kwargs.get("other")
    if args and isinstance(args[0], Tensor):
        other = args.pop(0)
    if other is not None:
        return other.device, other.dtype, bool(kwargs.get("non_blocking", args[:1] == [True])), torch.preserve_format
    if args and isinstance(args[0], str | int | torch.device) and not isinstance(args[0], bool):
        device = args.pop(0)
    elif args and args[0] is None:
        args.pop(0)
    if args and isinstance(args[0], torch.dtype | None):
        dtype = args.pop(0)
    non_blocking = kwargs.get("non_blocking", args[0] if args else False)
    return device, dtype, bool(non_blocking), kwargs.get("memory_format") or torch.preserve_format
