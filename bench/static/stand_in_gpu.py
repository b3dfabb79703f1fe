"""A stand-in for a GPU: its tensors are on ``cuda:0`` by name, and keep their data in the CPU's memory.

The product runs on it as on a GPU, with streams, events, graphs and pinned memory. Kernels run in Triton's interpreter.
In these cases, the stand-in raises an error as a GPU does:

- an operator gets tensors of both devices, a kernel gets a CPU tensor, or a GPU tensor is converted to NumPy;
- the host waits for the device, or copies from memory that is not pinned, while a graph is captured;
- a graph is replayed after memory that its launches use was freed.

Work that is captured is recorded and not run. A copy to pinned memory with ``non_blocking=True`` arrives when the host
waits for the device; until then, the memory holds NaN or the largest integer.

The functions of ``torch`` are replaced in the whole process, so the stand-in works in all threads. Streams have no
effect: work runs when it is launched, in the order of the launches.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only
from triton.runtime.interpreter import GridExecutor

from bench.static.stand_in_tensor import (
    DEVICE,
    Arrival,
    LaunchArgument,
    StandInTensor,
    adopted,
    is_gpu,
    parse_to,
    plainly,
)

TO = Tensor.to
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "scalar_tensor", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip
# functions that make the host wait for the device
WAITING = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "__repr__", "allclose", "equal", "is_nonzero",
    "item", "masked_select", "nonzero", "tolist", "unique",
}  # fmt: skip
METADATA = {
    "__get__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_contiguous", "is_floating_point",
    "is_inference", "numel", "size", "storage_offset", "stride", "untyped_storage", "_has_compatible_shallow_copy_type",
}  # fmt: skip
CROSSING = {"copy_", "__getitem__", "__setitem__"}  # functions that take tensors of both devices


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``: the recorded work, and the memory that was allocated in the capture."""

    def __init__(self, gpu: "StandInGPU", keep_graph: bool = False) -> None:
        self._gpu, self.steps = gpu, list[Callable[[], object]]()
        self.memory: list[Any] = []

    def pool(self) -> tuple[int, int]:
        """Return the identifier of a memory pool, which the stand-in does not need."""
        return 0, 0

    def replay(self) -> None:
        """Run the recorded work again."""
        self._gpu.n_replays += 1
        self._gpu.now += len(self.steps)
        if self._gpu.computes:
            with _disable_current_modes():
                for step in self.steps:
                    step()


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, gpu: "StandInGPU", enable_timing: bool = False, **_: Any) -> None:
        self._gpu, self._arriving, self._at = gpu, list[Arrival](), 0.0

    def record(self, stream: object = None) -> None:
        """Remember the time, and the copies that this event waits for."""
        self._at, self._arriving = self._gpu.now, list(self._gpu.arriving)

    def synchronize(self) -> None:
        """Wait for the copies that were started before the event."""
        self._gpu.wait("Event.synchronize", self._arriving)

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds until the event `end`."""
        return end._at - self._at


class Stream:
    """Stands in for ``torch.cuda.Stream``."""

    def __init__(self, gpu: "StandInGPU") -> None:
        self._gpu = gpu

    def wait_stream(self, other: object) -> None:
        """Do nothing, because all streams run in one order."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        self._gpu.wait("Stream.synchronize")


class StandInGPU:
    """The state of the stand-in.

    Attributes:
        waits: how often the host waited for the device, by the function that waited.
        now: number of launches and operators that ran, as milliseconds on the device's clock.
        n_replays: number of replays of all graphs.
        n_graphs: number of captured graphs.
        arriving: copies to pinned memory that the host has not waited for.
        computes: whether launches and replays compute. If False, only the host's work remains.
        sync_debug_mode: the mode of ``torch.cuda.set_sync_debug_mode``.
    """

    def __init__(self) -> None:
        self.waits, self.now, self.n_replays, self.n_graphs = Counter[str](), 0.0, 0, 0
        self.arriving, self.computes, self.sync_debug_mode = list[Arrival](), True, "default"
        self._pinned: set[StorageWeakRef] = set()
        self._capture = threading.local()

    @property
    def capturing(self) -> Graph | None:
        """The graph that this thread captures, or None."""
        return getattr(self._capture, "graph", None)

    def wait(self, why: str, arriving: Sequence[Arrival] | None = None) -> None:
        """Make the host wait: for `arriving`, or for all that was launched.

        Raises:
            RuntimeError: this thread captures a graph, or the debug mode is "error".
        """
        if self.capturing is not None:
            raise RuntimeError(f"{why}: operation not permitted when stream is capturing")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"{why}: called a synchronizing CUDA operation")
        self.waits[why] += 1
        for arrival in list(self.arriving) if arriving is None else arriving:
            if arrival in self.arriving:
                self.arriving.remove(arrival)
                arrival.arrive()

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of torch that takes a tensor of the stand-in, or record it while a graph is captured."""
        name = func.__name__
        if name in METADATA:
            return adopted(plainly(func, *args, **kwargs))
        device = torch.device(kwargs.get("device") or DEVICE)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cpu = [tensor for tensor in tensors if not tensor.is_cuda]
        if name not in CROSSING and any(tensor.dim() for tensor in on_cpu):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        if name == "copy_" and on_cpu:
            return self._copy_across(*args, **kwargs)
        if name in WAITING or (name in CROSSING and _index_waits(args)):
            self.wait(name)
        run = partial(plainly, func, *args, **kwargs)
        if self.capturing is not None:
            return self._recorded(name, run, args, kwargs)
        self.now += name not in WAITING
        made = run()
        return made if device.type == "cpu" else adopted(made)

    def _recorded(self, name: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Record an operator. New floating-point results are NaN until a replay; views are returned as usual."""
        graph = self.capturing
        assert graph is not None
        if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs:
            graph.steps.append(run)
            return kwargs.get("out", args[0])
        made = adopted(run())
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [one for one in tree_iter(made) if isinstance(one, Tensor)]
        if all(one.untyped_storage().data_ptr() in known for one in fresh):
            return made

        def step() -> None:
            for old, new in zip(fresh, tree_iter(run()), strict=True):
                plainly(old.copy_, new)

        self._expect_replay(fresh, step)
        return made

    def _expect_replay(self, fresh: list[Tensor], step: Callable[[], object] | None) -> None:
        graph = self.capturing
        assert graph is not None
        for tensor in fresh:
            if tensor.is_floating_point():
                plainly(tensor.fill_, torch.nan)
        graph.memory += fresh
        if step is not None:
            graph.steps.append(step)

    def _copy_across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy between the devices; the host waits, unless the copy does not block and its CPU memory is pinned."""
        host = source if target.is_cuda else target
        if not (non_blocking and StorageWeakRef(host.untyped_storage()) in self._pinned):
            self.wait("copy_")
            return plainly(target.copy_, source)
        if self.capturing is not None:
            raise NotImplementedError("the stand-in captures no copies between the devices")
        if target.is_cuda or not self.computes:
            return plainly(target.copy_, source)
        self.arriving.append(Arrival(target, source))
        return target

    def launch(self, executor: GridExecutor, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Launch a kernel, or record the launch while a graph is captured.

        Raises:
            ValueError: an argument is a CPU tensor.
        """
        for name, arg in (*zip(executor.arg_names, args, strict=False), *kwargs.items()):
            if isinstance(arg, Tensor) and not arg.is_cuda:
                raise ValueError(f"Pointer argument {name} cannot be accessed from Triton (cpu tensor?)")
        if self.capturing is None:
            self.now += 1.0
            self._compute(executor, run, args, kwargs)
            return
        recorded = tree_map_only(Tensor, LaunchArgument, (args, kwargs))

        def step() -> None:
            self._compute(executor, run, *tree_map_only(LaunchArgument, LaunchArgument.tensor, recorded))

        self.capturing.steps.append(step)

    def _compute(self, executor: GridExecutor, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        if self.computes:
            with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs))
                run(executor, *args, **kwargs)

    def factory(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a replacement of a factory of torch, which can also make tensors of the stand-in and pinned ones."""

        @wraps(original)
        def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            if device is not None and is_gpu(device):
                return self._made(original, args, kwargs)
            made: Tensor = original(*args, **kwargs, **({} if device is None else {"device": device}))
            if pin_memory:
                self._pinned.add(StorageWeakRef(made.untyped_storage()))
            return made

        return make

    def _made(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        name = original.__name__
        if name in ("tensor", "as_tensor"):
            self.wait(name)  # the values come from memory that is not pinned
        run = partial(plainly, original, *args, **kwargs, device="cpu")
        made = run()
        made = adopted(made.clone() if name == "as_tensor" else made)
        if self.capturing is not None:
            self._expect_replay([made], None if name.startswith("empty") else lambda: plainly(made.copy_, run()))
        return made  # type: ignore[no-any-return]

    def moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for ``Tensor.to``."""
        device, dtype, non_blocking, memory_format = parse_to(args, kwargs)
        to_gpu = tensor.is_cuda if device is None else is_gpu(device)
        wanted = {"dtype": tensor.dtype if dtype is None else dtype, "memory_format": memory_format}
        if to_gpu == tensor.is_cuda:
            copy = bool(kwargs.get("copy"))
            if to_gpu:
                return self.operator(TO, (tensor,), {**wanted, "copy": copy})  # type: ignore[no-any-return]
            return TO(tensor, device="cpu" if device is None else device, copy=copy, **wanted)
        if device is not None and torch.device(device).type == "meta":
            return TO(tensor, device=device, **wanted)
        pinned = not tensor.is_cuda and StorageWeakRef(tensor.untyped_storage()) in self._pinned
        if not (non_blocking and pinned):
            self.wait("to")
        made: Tensor = plainly(TO, tensor, device="cpu", copy=True, **wanted)
        return adopted(made) if to_gpu else made  # type: ignore[no-any-return]

    @contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        """Stand in for ``torch.cuda.graph``."""
        self.wait("graph")
        self._capture.graph = graph
        try:
            yield
        finally:
            self._capture.graph = None
        self.n_graphs += 1


def _index_waits(args: Any) -> bool:
    """Return whether an index is a mask, of a size that only the device knows, or a CPU tensor that is copied."""
    tensors = [leaf for leaf in tree_iter(args[1]) if isinstance(leaf, Tensor)]
    return any(tensor.dtype == torch.bool or (tensor.dim() > 0 and not tensor.is_cuda) for tensor in tensors)


@contextmanager
def stand_in_gpu() -> Iterator[StandInGPU]:
    """Replace functions of torch and the interpreter's launch by those of a stand-in, within the ``with`` block."""
    gpu = StandInGPU()
    run, data = GridExecutor.__call__, Tensor.data

    def get_data(tensor: Tensor) -> Tensor:
        made: Tensor = plainly(data.__get__, tensor)  # type: ignore[attr-defined]
        return adopted(made) if tensor.is_cuda else made  # type: ignore[no-any-return]

    def set_data(tensor: Tensor, value: Tensor) -> None:
        plainly(data.__set__, tensor, value)  # type: ignore[attr-defined]
        if value.is_cuda != tensor.is_cuda:  # Module.to moves a parameter in this way
            tensor.__class__ = StandInTensor if value.is_cuda else torch.nn.Parameter
            tensor._is_param = True  # type: ignore[attr-defined]

    replaced: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "device": lambda device: nullcontext(), "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(gpu), "Stream": lambda device=None: Stream(gpu),
        "Event": partial(Event, gpu), "CUDAGraph": partial(Graph, gpu), "graph": gpu.capture,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(gpu, "sync_debug_mode", mode),
        "get_device_name": lambda device=None: "stand-in", "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: SimpleNamespace(major=9, minor=0, total_memory=80 << 30),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, what in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, what))
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, gpu.factory(getattr(torch, name))))
        for owner, name, what in (
            (Tensor, "to", lambda tensor, *args, **kwargs: gpu.moved(tensor, *args, **kwargs)),
            (Tensor, "cuda", lambda tensor, *_, **__: gpu.moved(tensor, DEVICE)),
            (Tensor, "data", property(get_data, set_data)),
            (GridExecutor, "__call__", lambda executor, *args, **kwargs: gpu.launch(executor, run, args, kwargs)),
            (StandInTensor, "gpu", gpu),
        ):
            stack.enter_context(mock.patch.object(owner, name, what))
        yield gpu
