"""The paged KV cache: its pages, the number of references to each page, and the prefixes that requests share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.config import BackboneConfig

PAGE_SIZE = 64  # tokens per page; a request wastes half a page on average: 3.4 MB in the public model


class KVCache:
    """Holds pages of keys and values, and counts the references to each page.

    Several requests may share a page. A page without references is free.

    Attributes:
        kv: [layers, pages, 2, Hkv, PAGE, D]; the third index is 0 for keys and 1 for values.
        n_pages: number of all pages.
        ref_counts: number of references to each page: how often it was allocated or retained, less how often it was
            freed.
    """

    def __init__(self, config: BackboneConfig, n_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate `n_pages` pages of ``PAGE_SIZE`` tokens; on a CPU, a page takes memory when it is first written."""
        shape = (config.n_layers, n_pages, 2, config.n_kv_heads, PAGE_SIZE, config.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.n_pages, self.ref_counts = n_pages, [0] * n_pages
        self._free = list(range(n_pages))

    @property
    def n_free(self) -> int:
        """Number of pages that no request and no cached prefix uses."""
        return len(self._free)

    def allocate(self, n_pages: int) -> list[int]:
        """Take `n_pages` free pages, each with a reference count of 1, and return them.

        Raises:
            RuntimeError: fewer than `n_pages` pages are free.
        """
        if n_pages > len(self._free):
            raise RuntimeError(f"the KV cache has {len(self._free)} free pages, {n_pages} are needed")
        pages, self._free = self._free[:n_pages], self._free[n_pages:]
        return self.retain(pages)

    def retain(self, pages: list[int]) -> list[int]:
        """Add one reference to each page of `pages`, and return `pages`."""
        for page in pages:
            self.ref_counts[page] += 1
        return pages

    def free(self, pages: list[int]) -> None:
        """Remove one reference from each page of `pages`; a page without references becomes free.

        Raises:
            RuntimeError: a page has no references.
        """
        for page in pages:
            if not self.ref_counts[page]:
                raise RuntimeError(f"page {page} is freed, but has no references")
            self.ref_counts[page] -= 1
            if not self.ref_counts[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Copy the keys and values of page `source` to page `target`, in all layers."""
        self.kv[:, target].copy_(self.kv[:, source])


@dataclass(frozen=True, eq=False)
class PrefixKey:
    """Identifies the first tokens of a prompt, which all prompts of one voice share.

    Attributes:
        embeddings: [N, dim], the voice's embeddings.
        version: torch's version counter of the embeddings when the prompt was made.
        weights_version: version of the model's weights when the prompt was made.
        n_tokens: tokens of the prefix.
    """

    embeddings: Tensor
    version: int
    weights_version: Hashable
    n_tokens: int

    @classmethod
    def of(cls, embeddings: Tensor, weights_version: Hashable, n_tokens: int) -> "PrefixKey":
        """Make a key for the present values of the embeddings.

        A key made after a write to the embeddings differs, unless the embeddings were made in inference mode.
        """
        return cls(embeddings, 0 if embeddings.is_inference() else embeddings._version, weights_version, n_tokens)

    @property
    def identity(self) -> tuple[int, int, int]:
        """A value that two keys share if they have the same tensor and length, and the tensor did not change."""
        return id(self.embeddings), self.version, self.n_tokens


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """Holds the pages of a prefix in the KV cache.

    Attributes:
        key: the prefix's key. The key keeps the embeddings alive, so that Python does not reuse their id.
        pages: the pages of the prefix's tokens; the last page may be partly filled.
    """

    key: PrefixKey
    pages: list[int]


class PrefixCache:
    """Keeps prefixes of prompts in the KV cache.

    A prefix is computed once and shared by all requests with the same voice. An unused prefix is evicted when a request
    needs its pages.

    Attributes:
        entries: prefixes in the KV cache, least recently used first.
    """

    def __init__(self, kv_cache: KVCache) -> None:
        self.entries: dict[tuple[int, int, int], CachedPrefix] = {}
        self._kv_cache = kv_cache
        self._weights_version: Hashable = None

    def allocate_request(
        self, key: PrefixKey | None, n_tokens: int, weights_version: Hashable, fill: Callable[[list[int]], object]
    ) -> list[int] | None:
        """Allocate the pages of a request, with its prefix already filled in.

        The prefix is computed for this request alone in two cases: the weights have changed since the prompt was made,
        or the whole KV cache is too small for the shared prefix beside the request's other pages.

        Args:
            key: key of the request's prefix; None shares nothing.
            n_tokens: the most tokens that the request may ever have.
            weights_version: version of the weights now; prefixes from other weights are evicted.
            fill: writes the prefix's keys and values into the given pages.

        Returns:
            The pages, which the caller frees; None if too few pages are free.
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
        self.entries[key.identity] = prefix  # the last entry is the most recently used
        shared, partly_filled = prefix.pages[:n_full], prefix.pages[n_full:]

        def copy(own: list[int]) -> None:
            for page in partly_filled:
                self._kv_cache.copy(page, own[0])

        own = self._allocate_filled(n_pages - n_full, copy)
        return self._kv_cache.retain(shared) + own

    def clear(self) -> None:
        """Evict all prefixes; a page that a running request shares stays allocated."""
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
        """Evict unused prefixes until `n_pages` pages are free; if that cannot succeed, evict none and return False."""
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
    """Return the number of pages that `n_tokens` tokens need."""
    return -(-n_tokens // PAGE_SIZE)


def cache_bytes(config: BackboneConfig, n_tokens: int, dtype: torch.dtype) -> int:
    """Return the number of bytes of the keys and values of a request with `n_tokens` tokens, in whole pages."""
    row = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize
    return config.n_layers * pages_for(n_tokens) * PAGE_SIZE * row
