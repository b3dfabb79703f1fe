"""Linear layers whose weights are in packed forms, and linear layers with int8 weights on a CPU."""

from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..reference.quantized import QuantizedLinear
from .weights import PackedWeight, pack_weight

INT8_COLUMNS = 16  # the int8 product reads the columns in groups of 16, and reads beyond the end of an odd group


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in the form that is fastest on this CPU, see ``weights.py``.

    It takes the place of an ``nn.Linear``. Its state dict, copies and pickles have the plain weight, and it packs each
    weight that it gets through :meth:`load_state_dict` or ``to()``. It has no attribute ``weight``: a write to such a
    tensor would have no effect.

    Attributes:
        packed: the packed weight.
        bias: [N], or None.
        n_packed: number of weights that this layer has packed so far. It grows when the weight changes.
        requires_grad: whether the plain weight was trained; :meth:`to_linear` gives this back.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: PackedWeight = pack_weight(linear.weight.detach())
        self.n_packed = 1
        self.requires_grad = linear.weight.requires_grad
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``x @ weight.T + bias``, [..., K] -> [..., N] in the dtype of `x`.

        Raises:
            RuntimeError: a gradient is needed.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.requires_grad):
            raise RuntimeError(
                "an accelerated linear layer computes no gradients: call it under torch.inference_mode(), or "
                "voxkern.restore() the model to train it"
            )
        y, bias = self.packed.linear(x), self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the plain weight."""
        N, K = self.packed.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(self.packed.plain(), self.requires_grad)
        linear.register_parameter("bias", self._parameters["bias"])
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in the model's ``repr``."""
        N, K = self.packed.shape
        return f"{K}, {N}, {type(self.packed).__name__} of {self.packed.dtype}"

    def __getattr__(self, name: str) -> Any:
        """Say why there is no ``weight``."""
        if name == "weight":
            raise AttributeError(
                "the weight of an accelerated linear layer is packed: use state_dict() and load_state_dict(), or "
                "voxkern.restore() the model"
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
            self._pack(weight.detach() if assign else weight.detach().to("cpu", self.packed.dtype, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.packed.plain()
        moved = fn(weight)
        if moved is not weight:
            self._pack(moved)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _pack(self, weight: Tensor) -> None:
        self.packed = pack_weight(weight)
        self.n_packed += 1


class Int8Product:
    """The ``forward`` of a linear layer with int8 weights, by PyTorch's product of bf16 and int8 numbers."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Compute ``(x @ q.T) * scale``, [..., K] -> [..., N] in the dtype of `x`; `x` is rounded to bf16."""
        layer, rows = self.layer, x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        ones = rows.new_ones(layer.out_features)
        y: Tensor = torch._weight_int8pack_mm(rows, layer.weight, ones) * layer.qscale_weight
        return y.to(x.dtype).view(*x.shape[:-1], layer.out_features)


def weights_version(*modules: nn.Module) -> Hashable:
    """Return a value that changes when a weight of `modules` is replaced or written to.

    Writes through ``.data``, or to weights that were made in inference mode, are not detected.
    """
    tensors = [w for module in modules for w in (*module.parameters(), *module.buffers())]  # 8-bit weights are buffers
    packed = [one for module in modules for one in module.modules() if isinstance(one, PackedLinear)]
    return (
        *((id(w), w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype) for w in tensors),
        *((id(one), one.n_packed) for one in packed),
    )
