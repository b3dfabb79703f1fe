"""The paged KV cache's pool and who owns which page."""

import torch
from torch import Tensor

from .reference.config import BackboneConfig

PAGE = 64  # tokens a page; a request wastes half a page on average, 3.4 MB of the public model's keys and values


class PagePool:
    """Pages of keys and values, lent to requests.

    Attributes:
        pool: [layers, pages, 2, Hkv, PAGE, D].
    """

    def __init__(self, config: BackboneConfig, n_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for `n_pages` pages of ``PAGE`` tokens."""
        shape = (config.n_layers, n_pages, 2, config.n_kv_heads, PAGE, config.head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(n_pages))

    def take(self, n_tokens: int) -> Tensor:
        """Pages for `n_tokens` tokens, int32 [pages].

        Raises:
            RuntimeError: fewer pages are free.
        """
        n_pages = pages_for(n_tokens)
        if n_pages > len(self._free):
            raise RuntimeError(f"the KV cache has {len(self._free)} free pages, {n_pages} are needed")
        taken, self._free = self._free[:n_pages], self._free[n_pages:]
        return torch.tensor(taken, dtype=torch.int32, device=self.pool.device)

    def give_back(self, pages: Tensor) -> None:
        """Pages of a request that has ended."""
        self._free += pages.tolist()


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens` tokens."""
    return -(-n_tokens // PAGE)


def cache_bytes(config: BackboneConfig, n_tokens: int, dtype: torch.dtype) -> int:
    """Memory of a request's keys and values."""
    row = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize
    return config.n_layers * pages_for(n_tokens) * PAGE * row
