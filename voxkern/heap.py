"""The memory that the C library keeps after it was freed."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Return freed memory to the operating system. glibc keeps freed blocks below 32 MB until then."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
