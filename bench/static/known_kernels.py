"""Skip the compilation of kernels that the committed ledger already has, with the same key.

Triton's key of a kernel is a hash of the kernel's source with all functions that it calls, its constants, types and
options, the architecture, and the compilers themselves. Kernels with equal keys have equal machine code. Triton's key
also contains the line on which each function starts; here that line counts as 0, so a comment further up in the file
does not change the key.
"""

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction

DIGITS = 16  # hexadecimal digits of a key that are kept
SAMPLE = 16  # one kernel in so many is compiled although its key is known


class Known(Protocol):
    """What the ledger stores of a kernel that was compiled before."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""

    @property
    def warps(self) -> int:
        """Warps of a block."""

    @property
    def stages(self) -> int:
        """Stages of the software pipeline."""


def key(hash_: str) -> str:
    """Return the digits of Triton's hash that identify a kernel in the ledger."""
    return hash_[:DIGITS]


def is_sampled(key: str) -> bool:
    """Return whether a kernel is compiled although its key is known, so that a wrong figure in the ledger is found."""
    return int(key, 16) % SAMPLE == 0


@contextmanager
def skipping(known: Mapping[str, Known]) -> Iterator[None]:
    """Return kernels with a known key without machine code, within the ``with`` block of a process that only compiles.

    Such a kernel's launches are recorded like all others. Its binary has no files.

    Args:
        known: key -> what the ledger has of the kernel.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("voxkern.kernels.")]
    for function in (one for module in modules for one in vars(module).values() if isinstance(one, JITFunction)):
        function.starting_line_number = 0
    compiler: Any = triton.compiler
    compile_ = compiler.compile

    def compile_unknown(source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
        hash_ = _hash(source, target, options)
        row = known.get(key(hash_))
        if row is None or is_sampled(key(hash_)):
            return compile_(source, target=target, options=options)
        metadata = SimpleNamespace(
            name=source.fn.__name__, hash=hash_, shared=row.shared, num_warps=row.warps, num_stages=row.stages
        )
        driver: Any = triton.runtime.driver.active
        run = driver.launcher_cls(source, metadata)
        return SimpleNamespace(run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None)

    compiler.compile = compile_unknown
    try:
        yield
    finally:
        compiler.compile = compile_


def _hash(source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    backend = _backend(target)
    parsed = backend.parse_options(dict(options))
    text = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _backend(target: GPUTarget) -> Any:
    return triton.compiler.make_backend(target)
