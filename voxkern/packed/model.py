"""Make a whole model faster on a CPU, and undo it."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..reference.quantized import QuantizedLinear
from ..reference.transformer_head import FlowMatchingAudioTransformer
from .flow_head import PackedHead
from .linear import INT8_COLUMNS, Int8Product, PackedLinear

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# The flow head keeps a table of the time projection's results, so its weight is read once, not in every frame.
NOT_PACKED = "time_projection"
# A weight is packed by one thread, with 6 bytes of extra memory for each of its numbers. More threads would be faster,
# but the public model would then need more than 1.05 x its memory.
PACKING_THREADS = 2


def pack(model: nn.Module) -> list[str]:
    """Pack the linear layers of a model, and replace ``solve`` of its transformer flow heads.

    A layer's plain weight is freed when its packed form is made. A second call packs what is still plain, and drops
    the flow heads' tables.

    Args:
        model: a model on a CPU, or a part of one. Layers in fp32 stay as they are.

    Returns:
        Names of the replaced modules and methods, such as ``["layers.0.attention.wq", "acoustic_transformer.solve"]``.
    """
    modules = dict(model.named_modules())
    linears = [name for name, one in modules.items() if _can_be_packed(name, one)]
    replaced = []
    for name, one in modules.items():
        if isinstance(one, QuantizedLinear) and _has_int8_product(one, model):
            one.forward = Int8Product(one)  # type: ignore[method-assign]
            replaced.append(name)
        if isinstance(one, FlowMatchingAudioTransformer):
            one.solve = PackedHead(one).solve  # type: ignore[method-assign]
            replaced.append(f"{name}.solve".lstrip("."))
    del modules  # it would keep all plain weights until the end

    def replace(name: str) -> None:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, PackedLinear(linear))

    with ThreadPoolExecutor(PACKING_THREADS) as threads:
        list(threads.map(replace, linears))
    _return_freed_memory()
    return linears + replaced


def unpack(model: nn.Module) -> list[str]:
    """Undo :func:`pack`: the layers have their plain weights again, with the same bits.

    Returns:
        Names of the restored modules and methods.
    """
    restored = []
    for name, one in list(model.named_modules()):
        if isinstance(one, PackedLinear):
            model.set_submodule(name, one.to_linear())
            restored.append(name)
        elif isinstance(one, QuantizedLinear) and "forward" in vars(one):
            del one.forward
            restored.append(name)
        elif isinstance(one, FlowMatchingAudioTransformer) and packed_head_of(one) is not None:
            del one.solve
            restored.append(f"{name}.solve".lstrip("."))
    return restored


def is_packed(model: nn.Module) -> bool:
    """Return whether a part of the model is replaced by :func:`pack`."""
    return any(
        isinstance(one, PackedLinear)
        or (isinstance(one, QuantizedLinear) and "forward" in vars(one))
        or (isinstance(one, FlowMatchingAudioTransformer) and packed_head_of(one) is not None)
        for one in model.modules()
    )


def packed_head_of(head: FlowMatchingAudioTransformer) -> PackedHead | None:
    """Return what replaces ``solve`` of a flow head, or None."""
    owner = getattr(vars(head).get("solve"), "__self__", None)
    return owner if isinstance(owner, PackedHead) else None


def _return_freed_memory() -> None:
    """Make the C library return the plain weights' memory to the system; glibc keeps blocks below 32 MB otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _can_be_packed(name: str, module: nn.Module) -> bool:
    is_plain = type(module) is nn.Linear and module.weight.dtype in SIXTEEN_BITS
    return is_plain and name.rpartition(".")[2] != NOT_PACKED


def _has_int8_product(layer: QuantizedLinear, model: nn.Module) -> bool:
    """Return whether an int8 layer can use :class:`Int8Product` in a model, which must be bf16."""
    dtype = next(model.parameters()).dtype
    is_int8 = layer.format.dtype == torch.int8 and layer.in_features % INT8_COLUMNS == 0
    return is_int8 and dtype == torch.bfloat16
