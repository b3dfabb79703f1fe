"""The paged KV cache's pool, who holds which page, and voices' prefixes in it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.config import BackboneConfig

PAGE = 64  # tokens a page; a request wastes half a page on average, 3.4 MB of the public model's keys and values


class PagePool:
    """Pages of keys and values, lent to requests. A page may have several holders, and is free when it has none.

    Attributes:
        pool: [layers, pages, 2, Hkv, PAGE, D].
        n_pages: of them all.
        holders: of each page.
    """

    def __init__(self, config: BackboneConfig, n_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for `n_pages` pages of ``PAGE`` tokens; a CPU gives memory to those that are written."""
        shape = (config.n_layers, n_pages, 2, config.n_kv_heads, PAGE, config.head_dim)
        self.pool = torch.empty(shape, dtype=dtype, device=device)
        self.n_pages, self.holders = n_pages, [0] * n_pages
        self._free = list(range(n_pages))

    @property
    def n_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, n_pages: int) -> list[int]:
        """Pages with one holder.

        Raises:
            RuntimeError: fewer are free.
        """
        if n_pages > len(self._free):
            raise RuntimeError(f"the KV cache has {len(self._free)} free pages, {n_pages} are needed")
        taken, self._free = self._free[:n_pages], self._free[n_pages:]
        return self.share(taken)

    def share(self, pages: list[int]) -> list[int]:
        """The same pages, with one holder more."""
        for page in pages:
            self.holders[page] += 1
        return pages

    def give_back(self, pages: list[int]) -> None:
        """One holder less.

        Raises:
            RuntimeError: a page has none.
        """
        for page in pages:
            if not self.holders[page]:
                raise RuntimeError(f"page {page} is given back, and nobody holds it")
            self.holders[page] -= 1
            if not self.holders[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Keys and values of a page into another one, in all layers."""
        self.pool[:, target].copy_(self.pool[:, source])


@dataclass(frozen=True, eq=False)
class Voice:
    """What the first tokens of a prompt are made of.

    Attributes:
        embeddings: of the voice, [N, dim].
        version: of them, when the prompt was made.
        stamp: of the weights, then.
        n_tokens: that are the same in every prompt of the voice.
    """

    embeddings: Tensor
    version: int
    stamp: Hashable
    n_tokens: int

    @classmethod
    def of(cls, embeddings: Tensor, stamp: Hashable, n_tokens: int) -> "Voice":
        """As it is now. What is written to embeddings made in inference mode leaves no trace."""
        return cls(embeddings, 0 if embeddings.is_inference() else embeddings._version, stamp, n_tokens)

    @property
    def key(self) -> tuple[int, int, int]:
        """Two voices in the cache that have the same one are the same."""
        return id(self.embeddings), self.version, self.n_tokens


@dataclass(frozen=True, eq=False)
class Prefix:
    """A voice in the cache.

    Attributes:
        voice: which; it also keeps the embeddings' identity from being another's.
        pages: of its tokens; the last may be filled partly.
    """

    voice: Voice
    pages: list[int]


class Prefixes:
    """Voices' prefixes: made once, shared by whoever speaks with the voice, forgotten when pages are short.

    Attributes:
        known: those in the cache, least recently used first.
    """

    def __init__(self, pool: PagePool) -> None:
        """None yet."""
        self.known: dict[tuple[int, int, int], Prefix] = {}
        self._pool = pool
        self._stamp: Hashable = None

    def pages(
        self, voice: Voice | None, n_tokens: int, stamp: Hashable, make: Callable[[list[int]], object]
    ) -> list[int] | None:
        """Pages for a request, in which its voice's tokens are already.

        Nothing is shared where the weights are others than when the prompt was made, or where the whole cache is too
        small for the prefix beside the request.

        Args:
            voice: None shares nothing.
            n_tokens: all that the request may ever have.
            stamp: of the weights now; prefixes made with others are forgotten.
            make: fills pages with the voice's tokens.

        Returns:
            The pages, held by the caller; None if too few are free.
        """
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp
        n_pages = pages_for(n_tokens)
        n_full, n_prefix = (voice.n_tokens // PAGE, pages_for(voice.n_tokens)) if voice is not None else (0, 0)
        if voice is None or voice.stamp != stamp or n_prefix + n_pages - n_full > self._pool.n_pages:
            return self._filled(n_pages, make) if self._make_room(n_pages) else None
        prefix = self.known.get(voice.key)
        if not self._make_room(n_pages - n_full + (0 if prefix else n_prefix), prefix):
            return None
        if prefix is None:
            prefix = Prefix(voice, self._filled(n_prefix, make))
        self.known.pop(voice.key, None)
        self.known[voice.key] = prefix  # the last is the most recently used
        shared, partly_filled = prefix.pages[:n_full], prefix.pages[n_full:]

        def copy(own: list[int]) -> None:
            for page in partly_filled:
                self._pool.copy(page, own[0])

        own = self._filled(n_pages - n_full, copy)
        return self._pool.share(shared) + own

    def clear(self) -> None:
        """Forget all; what requests share stays theirs."""
        for prefix in self.known.values():
            self._pool.give_back(prefix.pages)
        self.known.clear()

    def _filled(self, n_pages: int, make: Callable[[list[int]], object]) -> list[int]:
        pages = self._pool.take(n_pages)
        try:
            make(pages)
        except BaseException:
            self._pool.give_back(pages)
            raise
        return pages

    def _make_room(self, n_pages: int, keep: Prefix | None = None) -> bool:
        """Forget unused prefixes until so many pages are free, but none if that is not enough."""
        unused = [prefix for prefix in self.known.values() if prefix is not keep and self._unused(prefix)]
        if n_pages > self._pool.n_free + sum(len(prefix.pages) for prefix in unused):
            return False
        for prefix in unused:
            if n_pages > self._pool.n_free:
                self._pool.give_back(self.known.pop(prefix.voice.key).pages)
        return True

    def _unused(self, prefix: Prefix) -> bool:
        return all(self._pool.holders[page] == 1 for page in prefix.pages)


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens` tokens."""
    return -(-n_tokens // PAGE)


def cache_bytes(config: BackboneConfig, n_tokens: int, dtype: torch.dtype) -> int:
    """Memory of a request's keys and values."""
    row = 2 * config.n_kv_heads * config.head_dim * dtype.itemsize
    return config.n_layers * pages_for(n_tokens) * PAGE * row
