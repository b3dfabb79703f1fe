"""Pack a whole model for a CPU, and undo it."""

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
# The flow head keeps a table of the time projection's results, and reads the dtype of its weight to make the table.
NOT_PACKED = "time_projection"
# FBGEMM packs a weight with one thread, and takes 10 bytes of extra memory for each number. More threads at once would
# need more memory.
PACKING_THREADS = 2
COPIED = 1 << 26  # parameters with more numbers, 134 MB in bf16, stay in a mapped file


def pack(model: nn.Module) -> list[str]:
    """Pack the 16-bit linear layers of a model, and replace ``forward`` of int8 layers and ``solve`` of flow heads.

    A layer's plain weight is freed when its packed form is made. A second call packs what is still plain, and drops
    the flow heads' tables.

    Args:
        model: a model on a CPU, or a part of one. Layers of other dtypes or on other devices, and the time projection,
            stay as they are. int8 layers change only in a bf16 model.

    Returns:
        Names of the replaced modules and methods, such as ``["layers.0.attention.wq", "acoustic_transformer.solve"]``.
    """
    linears = [name for name, one in model.named_modules() if _can_be_packed(name, one)]

    def replace(name: str) -> None:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, PackedLinear(linear))

    with ThreadPoolExecutor(PACKING_THREADS) as threads:
        list(threads.map(replace, linears))
    if linears:
        _free_plain_weights(model)
    replaced, like = list(linears), next(model.parameters(), None)
    for name, one in model.named_modules():
        if isinstance(one, QuantizedLinear) and like is not None and _has_int8_product(one, like.dtype):
            one.forward = Int8Product(one, like)  # type: ignore[method-assign]
            replaced.append(name)
        if isinstance(one, FlowMatchingAudioTransformer):
            one.solve = PackedHead(one).solve  # type: ignore[method-assign]
            replaced.append(f"{name}.solve".lstrip("."))
    return replaced


def unpack(model: nn.Module) -> list[str]:
    """Undo :func:`pack`: new ``nn.Linear`` layers have the plain weights, with the same bits.

    Returns:
        Names of the restored modules and methods.
    """
    restored = []
    for name, one in list(model.named_modules()):
        if isinstance(one, PackedLinear):
            model.set_submodule(name, one.to_linear())
            restored.append(name)
        elif isinstance(one, QuantizedLinear) and _is_changed(one):
            del one.forward
            restored.append(name)
        elif isinstance(one, FlowMatchingAudioTransformer) and _is_changed(one):
            del one.solve
            restored.append(f"{name}.solve".lstrip("."))
    return restored


def is_packed(model: nn.Module) -> bool:
    """Return whether a part of the model is replaced by :func:`pack`."""
    return any(map(_is_changed, model.modules()))


def _is_changed(module: nn.Module) -> bool:
    """Return whether :func:`pack` has replaced this module, or one of its methods."""
    if isinstance(module, FlowMatchingAudioTransformer):
        return packed_head_of(module) is not None
    return isinstance(module, PackedLinear) or isinstance(vars(module).get("forward"), Int8Product)


def packed_head_of(head: FlowMatchingAudioTransformer) -> PackedHead | None:
    """Return what replaces ``solve`` of a flow head, or None."""
    owner = getattr(vars(head).get("solve"), "__self__", None)
    return owner if isinstance(owner, PackedHead) else None


def _free_plain_weights(model: nn.Module) -> None:
    """Give the memory of replaced weights back to the operating system.

    A mapping of a checkpoint's file keeps all its pages until no tensor uses it. Therefore the remaining parameters of
    up to :data:`COPIED` numbers are copied. glibc keeps freed blocks below 32 MB until it is asked to return them.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.numel() <= COPIED:
            parameter.data = parameter.data.clone()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _can_be_packed(name: str, module: nn.Module) -> bool:
    if type(module) is not nn.Linear or name.rpartition(".")[2] == NOT_PACKED:
        return False
    return module.weight.dtype in SIXTEEN_BITS and module.weight.device.type == "cpu"


def _has_int8_product(layer: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Return whether a layer of a model in `dtype` can use :class:`Int8Product`."""
    is_int8 = layer.format.dtype == torch.int8 and layer.in_features % INT8_COLUMNS == 0
    return is_int8 and dtype == torch.bfloat16
