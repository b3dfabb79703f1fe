"""Triton's interpreter, a quarter faster: it makes ``triton.language`` its own once a launch, not at every device call.

What it puts in place is the same each time, and lasts until the launch is over. Triton 3.9.0 does it again for each
call of a ``@triton.jit`` function from another, which was a quarter of the time of a whole request in the tests.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """From now on; calling it again changes nothing."""
    if interpreter._patch_lang.__module__ == __name__:
        return
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set[tuple[bool, bool]]()  # in this launch: whether the function's module has tl, and tl.core, in it

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        seen = (tl in modules, tl.core in modules)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch, patch_once
