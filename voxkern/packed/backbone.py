"""Compute the reference's backbone on a CPU with fp32 activations."""

from torch import Tensor

from ..reference.attention import PagedCache
from ..reference.backbone import Backbone
from ..reference.layers import upcast


class PackedBackbone:
    """Replaces ``hidden_states`` of a backbone, with the same arguments and, up to rounding, the same result.

    Activations are fp32 (fp64 in an fp64 model), which most packed products take and return. For one token of a small
    layer, conversions around each product would take longer than packed weights save. Keys and values keep the dtype of
    the KV cache.

    Attributes:
        module: the backbone; its 16-bit linear layers are packed.
    """

    def __init__(self, module: Backbone) -> None:
        self.module = module

    def __call__(self, u: Tensor, cache: PagedCache | None = None) -> Tensor:
        """Run the layers over T tokens of each request, [B, T, dim] -> [B, T, dim] in the dtype of `u`.

        See :meth:`Backbone.hidden_states`.

        Raises:
            RuntimeError: a gradient is needed.
        """
        return Backbone.hidden_states(self.module, upcast(u), cache).to(u.dtype)
