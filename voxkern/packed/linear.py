"""Linear layers with packed weights, and the product of linear layers with int8 weights on a CPU."""

from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..reference.quantized import QuantizedLinear
from .weights import pack_weight

# the int8 product reads the columns in groups of 16, and would read beyond the end of an incomplete group
INT8_COLUMNS = 16
# The int8 product crashes if activations begin at an address that is not a multiple of 32 bytes, or weights at one that
# is not a multiple of 16. In a file that is mapped into memory, a weight may begin anywhere.
INT8_ALIGNMENT = 32


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in one of the forms of ``weights.py``.

    It takes the place of an ``nn.Linear``. Its state dict, copies and pickles have the plain weight, and it packs each
    weight that it gets through :meth:`load_state_dict` or ``to()``. It has no attribute ``weight``: a write to such a
    tensor would have no effect.

    Attributes:
        packed: the weight.
        bias: [N], or None.
        version: an object that is replaced whenever the layer gets a new weight.
        trained: whether the plain weight required a gradient when the layer was made.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._pack(linear.weight.detach())
        self.trained = linear.weight.requires_grad
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x @ weight.T + bias``, [..., K] -> [..., N] in the dtype of `x`.

        Raises:
            RuntimeError: a gradient is needed.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.trained):
            raise RuntimeError(
                "an accelerated linear layer computes no gradients: call it under torch.inference_mode(), or "
                "voxkern.restore() the model to train it"
            )
        y, bias = self.packed.linear(x), self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """Return a new ``nn.Linear`` with the plain weight."""
        N, K = self.packed.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        with torch.inference_mode(False):  # a weight made in inference mode could not be trained
            linear.weight = nn.Parameter(self.packed.plain(), self.trained)
        linear.register_parameter("bias", self._parameters["bias"])
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in the model's ``repr``."""
        N, K = self.packed.shape
        return f"{K}, {N}, {type(self.packed).__name__} of {self.packed.dtype}"

    def __getattr__(self, name: str) -> Any:
        """Raise an error that explains the missing ``weight``."""
        if name == "weight":
            raise AttributeError(
                "the weight of an accelerated linear layer is packed: read it with state_dict(), write it with "
                "load_state_dict(), or voxkern.restore() the model"
            )
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.packed.plain()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        others = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight = state_dict.get(key)
        if weight is None:
            missing_keys += [key] if strict else []
        elif weight.shape != self.packed.shape:
            error_msgs.append(f"{key} is {list(weight.shape)} but must be {list(self.packed.shape)}")
        else:
            assign = local_metadata.get("assign_to_params_buffers", False)
            weight = weight.detach()
            self._pack(weight if assign else weight.to(self.packed.device, self.packed.dtype, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.packed.plain()
        moved = fn(weight)
        if moved is not weight:
            self._pack(moved)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _pack(self, weight: Tensor) -> None:
        self.packed = pack_weight(weight)
        self.version = object()


class Int8Product:
    """The ``forward`` of a linear layer with int8 weights: PyTorch's product of bf16 and int8 numbers.

    Attributes:
        layer: the layer.
        like: a parameter of the layer's model. The product is used while the model is bf16 and on a CPU.
    """

    def __init__(self, layer: QuantizedLinear, like: nn.Parameter) -> None:
        self.layer, self.like = layer, like
        self._align_weight()

    def __call__(self, x: Tensor) -> Tensor:
        """Compute ``(x @ q.T) * scale``, [..., K] -> [..., N] in the dtype of `x`.

        `x` and the sums are rounded to bf16, as in the reference of a bf16 model.
        """
        layer = self.layer
        if self.like.dtype != torch.bfloat16 or layer.weight.device.type != "cpu":
            return QuantizedLinear.forward(layer, x)
        self._align_weight()
        rows = x.reshape(-1, layer.in_features).bfloat16().contiguous()
        rows = rows if _is_aligned(rows) else rows.clone()
        ones = rows.new_ones(layer.out_features)
        y: Tensor = torch._weight_int8pack_mm(rows, layer.weight, ones) * layer.qscale_weight
        return y.to(x.dtype).view(*x.shape[:-1], layer.out_features)

    def _align_weight(self) -> None:
        if not _is_aligned(self.layer.weight):
            with torch.inference_mode(False):  # later writes to a weight made in inference mode would not be detected
                self.layer.weight = self.layer.weight.clone()


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether the tensor begins at a multiple of :data:`INT8_ALIGNMENT`."""
    return tensor.data_ptr() % INT8_ALIGNMENT == 0


def weights_version(*modules: nn.Module) -> Hashable:
    """Return a value that changes when a weight of `modules` is replaced or written to.

    Writes through ``.data``, or to weights that were made in inference mode, are not detected.
    """
    tensors = [w for module in modules for w in (*module.parameters(), *module.buffers())]  # 8-bit weights are buffers
    packed = [one for module in modules for one in module.modules() if isinstance(one, PackedLinear)]
    return (
        *((id(w), w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype) for w in tensors),
        *(one.version for one in packed),  # the objects: a new one may get a freed one's id
    )
