"""The paged KV cache: its pages, how many requests use each, and the prefixes that requests share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.config import BackboneConfig

PAGE_SIZE = 64  # tokens a page; a request wastes half a page on average, 3.4 MB of the public model's keys and values


class KVCache:
    """Pages of keys and values. A page may be shared by several requests, and is free when none uses it.

    Attributes:
        kv: [layers, pages, 2, Hkv, PAGE, D], keys at index 0 and values at 1.
        n_pages: of them all.
        ref_counts: of each page, how often it was allocated or retained and not freed since.
    """

    def __init__(self, config: BackboneConfig, n_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate `n_pages` pages of ``PAGE_SIZE`` tokens; a CPU gives memory only to those that are written."""
        shape = (config.n_layers, n_pages, 2, config.n_kv_heads, PAGE_SIZE, config.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.n_pages, self.ref_counts = n_pages, [0] * n_pages
        self._free = list(range(n_pages))

    @property
    def n_free(self) -> int:
        """Pages that no request and no prefix uses."""
        return len(self._free)

    def allocate(self, n_pages: int) -> list[int]:
        """Take free pages; each has a reference count of 1.

        Raises:
            RuntimeError: fewer are free.
        """
        if n_pages > len(self._free):
            raise RuntimeError(f"the KV cache has {len(self._free)} free pages, {n_pages} are needed")
        pages, self._free = self._free[:n_pages], self._free[n_pages:]
        return self.retain(pages)

    def retain(self, pages: list[int]) -> list[int]:
        """Count one more reference to each of these pages, and return them."""
        for page in pages:
            self.ref_counts[page] += 1
        return pages

    def free(self, pages: list[int]) -> None:
        """Count one reference less to each of these pages; a page without references is free.

        Raises:
            RuntimeError: a page has none.
        """
        for page in pages:
            if not self.ref_counts[page]:
                raise RuntimeError(f"page {page} is freed, but has no references")
            self.ref_counts[page] -= 1
            if not self.ref_counts[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Copy keys and values of a page into another one, in all layers."""
        self.kv[:, target].copy_(self.kv[:, source])


@dataclass(frozen=True, eq=False)
class PrefixKey:
    """Identifies the first tokens of a prompt, which all prompts of one voice share.

    Attributes:
        embeddings: of the voice, [N, dim].
        version: of the embeddings, when the prompt was made.
        weights_version: of the model's weights, when the prompt was made.
        n_tokens: of the prefix.
    """

    embeddings: Tensor
    version: int
    weights_version: Hashable
    n_tokens: int

    @classmethod
    def of(cls, embeddings: Tensor, weights_version: Hashable, n_tokens: int) -> "PrefixKey":
        """Make the key of embeddings as they are now.

        What is written to embeddings made in inference mode leaves no trace.
        """
        return cls(embeddings, 0 if embeddings.is_inference() else embeddings._version, weights_version, n_tokens)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Equal for two prefixes that have the same keys and values under the same weights."""
        return id(self.embeddings), self.version, self.n_tokens


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A prefix in the KV cache.

    Attributes:
        key: of the prefix; holding it also keeps the id of its embeddings from being reused.
        pages: of its tokens; the last may be filled partly.
    """

    key: PrefixKey
    pages: list[int]


class PrefixCache:
    """Prefixes of prompts: computed once, shared by all requests with the same voice, evicted when pages are short.

    Attributes:
        entries: prefixes in the KV cache, least recently used first.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        """The cache is empty."""
        self.entries: dict[tuple[int, int, int], CachedPrefix] = {}
        self._kv_cache = kv_cache
        self._weights_version: Hashable = None

    def allocate_request(
        self, key: PrefixKey | None, n_tokens: int, weights_version: Hashable, fill: Callable[[list[int]], object]
    ) -> list[int] | None:
        """Allocate pages for a request, in which its prefix is already.

        Nothing is shared where the weights are others than when the prompt was made, or where the whole cache is too
        small for the prefix beside the request.

        Args:
            key: of the request's prefix; None shares nothing.
            n_tokens: all that the request may ever have.
            weights_version: now; prefixes that other weights made are evicted.
            fill: writes the prefix's keys and values into pages.

        Returns:
            The pages, which the caller frees; None if too few are free.
        """
        if weights_version != self._weights_version:
            self.clear()
            self._weights_version = weights_version
        n_pages = pages_for(n_tokens)
        n_full, n_prefix = (key.n_tokens // PAGE_SIZE, pages_for(key.n_tokens)) if key is not None else (0, 0)
        if (
            key is None
            or key.weights_version != weights_version
            or n_prefix + n_pages - n_full > self._kv_cache.n_pages
        ):
            return self._allocate_filled(n_pages, fill) if self._evict_for(n_pages) else None
        prefix = self.entries.get(key.identity)
        if not self._evict_for(n_pages - n_full + (0 if prefix else n_prefix), prefix):
            return None
        if prefix is None:
            prefix = CachedPrefix(key, self._allocate_filled(n_prefix, fill))
        self.entries.pop(key.identity, None)
        self.entries[key.identity] = prefix  # the last is the most recently used
        shared, partly_filled = prefix.pages[:n_full], prefix.pages[n_full:]

        def copy(own: list[int]) -> None:
            for page in partly_filled:
                self._kv_cache.copy(page, own[0])

        own = self._allocate_filled(n_pages - n_full, copy)
        return self._kv_cache.retain(shared) + own

    def clear(self) -> None:
        """Evict all; pages that running requests share stay allocated."""
        for prefix in self.entries.values():
            self._kv_cache.free(prefix.pages)
        self.entries.clear()

    def _allocate_filled(self, n_pages: int, fill: Callable[[list[int]], object]) -> list[int]:
        pages = self._kv_cache.allocate(n_pages)
        try:
            fill(pages)
        except BaseException:
            self._kv_cache.free(pages)
            raise
        return pages

    def _evict_for(self, n_pages: int, keep: CachedPrefix | None = None) -> bool:
        """Evict unused prefixes until `n_pages` are free, but none if that would not be enough."""
        unused = [prefix for prefix in self.entries.values() if prefix is not keep and self._unused(prefix)]
        if n_pages > self._kv_cache.n_free + sum(len(prefix.pages) for prefix in unused):
            return False
        for prefix in unused:
            if n_pages > self._kv_cache.n_free:
                self._kv_cache.free(self.entries.pop(prefix.key.identity).pages)
        return True

    def _unused(self, prefix: CachedPrefix) -> bool:
        return all(self._kv_cache.ref_counts[page] == 1 for page in prefix.pages)


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens` tokens."""
    return -(-n_tokens // PAGE_SIZE)


def cache_bytes(config: BackboneConfig, n_tokens: int, dtype: torch.dtype) -> int:
    """Memory of a request's keys and values."""
    row = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize
    return config.n_layers * pages_for(n_tokens) * PAGE_SIZE * row
