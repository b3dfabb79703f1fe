"""Compute the reference's backbone on a CPU with fp32 activations."""

from torch import Tensor

from ..reference.attention import PagedCache
from ..reference.backbone import Backbone
from ..reference.layers import upcast
from ..validation import refuse_gradients


class PackedBackbone:
    """Replaces ``hidden_states`` of a backbone, with the same arguments and, up to rounding, the same result.

    Activations are fp32 (fp64 in an fp64 model), which most packed products take and return. In a small layer,
    converting one token's activations around each product would take longer than the packed weights save. With a KV
    cache, queries, keys and values are rounded to its dtype, and attention is computed in it.

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
        refuse_gradients("backbone", u, self.module.norm.weight)
        return Backbone.hidden_states(self.module, upcast(u), cache).to(u.dtype)
