"""Pack a whole model for a CPU, and undo it."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..heap import return_freed_memory
from ..reference.backbone import Backbone
from ..reference.layers import RMSNorm
from ..reference.quantized import QuantizedLinear
from ..reference.transformer_head import FlowMatchingAudioTransformer
from .backbone import PackedBackbone
from .flow_head import PackedHead
from .linear import INT8_COLUMNS, Int8Product, PackedLinear
from .norm import PackedNorm

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# The flow head keeps a table of the time projection's results, and reads the dtype of its weight to make the table.
NOT_PACKED = "time_projection"
# FBGEMM packs a weight with one thread, and takes 10 bytes of extra memory for each number. More threads at once would
# need more memory.
PACKING_THREADS = 2
COPIED = 1 << 26  # parameters with more numbers, 134 MB in bf16, stay in a mapped file
# each method that pack() may replace, and the type of the object that replaces it
REPLACED = {"forward": Int8Product | PackedNorm, "hidden_states": PackedBackbone, "solve": PackedHead}


def pack(model: nn.Module) -> list[str]:
    """Pack the 16-bit linear layers of a model, and replace some methods with faster ones.

    The replaced methods are ``forward`` of int8 layers and 16-bit RMSNorms, ``solve`` of transformer flow heads, and
    ``hidden_states`` of backbones with packed layers. A layer's plain weight is freed when its packed form is made. A
    second call packs what is still plain, and drops the flow heads' tables.

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
        if isinstance(one, RMSNorm) and _is_16_bit(one.weight) and _replaced_method(one) is None:
            one.forward = PackedNorm(one)  # type: ignore[method-assign]
            replaced.append(name)
        if isinstance(one, FlowMatchingAudioTransformer):
            one.solve = PackedHead(one).solve  # type: ignore[method-assign]
            replaced.append(f"{name}.solve".lstrip("."))
        if isinstance(one, Backbone) and _has_packed_layers(one) and _replaced_method(one) is None:
            one.hidden_states = PackedBackbone(one)  # type: ignore[method-assign]
            replaced.append(f"{name}.hidden_states".lstrip("."))
    return replaced


def unpack(model: nn.Module) -> list[str]:
    """Undo :func:`pack`: new ``nn.Linear`` layers have the plain weights, with the same bits.

    Returns:
        Names of the restored modules and methods.
    """
    restored = []
    for name, one in list(model.named_modules()):
        method = _replaced_method(one)
        if isinstance(one, PackedLinear):
            model.set_submodule(name, one.to_linear())
            restored.append(name)
        elif method is not None:
            delattr(one, method)
            restored.append(name if method == "forward" else f"{name}.{method}".lstrip("."))
    return restored


def is_packed(model: nn.Module) -> bool:
    """Return whether a part of the model is replaced by :func:`pack`."""
    return any(isinstance(one, PackedLinear) or _replaced_method(one) is not None for one in model.modules())


def _replaced_method(module: nn.Module) -> str | None:
    """Return the name of the method of a module that :func:`pack` has replaced, or None."""
    for name, kind in REPLACED.items():
        method = vars(module).get(name)
        if isinstance(getattr(method, "__self__", method), kind):
            return name
    return None


def _free_plain_weights(model: nn.Module) -> None:
    """Give the memory of replaced weights back to the operating system.

    A mapping of a checkpoint's file keeps all its pages until no tensor uses it. Therefore the remaining parameters of
    up to :data:`COPIED` numbers are copied.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.numel() <= COPIED:
            parameter.data = parameter.data.clone()
    return_freed_memory()


def _can_be_packed(name: str, module: nn.Module) -> bool:
    if type(module) is not nn.Linear or name.rpartition(".")[2] == NOT_PACKED:
        return False
    return _is_16_bit(module.weight)


def _is_16_bit(weight: Tensor) -> bool:
    """Return whether a weight has 16 bits and is on a CPU."""
    return weight.dtype in SIXTEEN_BITS and weight.device.type == "cpu"


def _has_packed_layers(backbone: Backbone) -> bool:
    return any(isinstance(one, PackedLinear) for one in backbone.layers.modules())


def _has_int8_product(layer: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Return whether a layer of a model in `dtype` can use :class:`Int8Product`."""
    is_int8 = layer.format.dtype == torch.int8 and layer.in_features % INT8_COLUMNS == 0
    return is_int8 and dtype == torch.bfloat16
