"""A patch that saves a quarter of the time in Triton's interpreter: ``triton.language`` is patched once a launch.

To interpret a kernel, Triton replaces the functions of ``triton.language`` until the launch ends. Triton 3.9.0 replaces
them again each time that one ``@triton.jit`` function calls another, although the replacements are the same. In the
tests, this took a quarter of the time of a whole request.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """Make the interpreter patch ``triton.language`` once a launch.

    A second call of this function has no effect. Triton 3.5 has another interpreter, which is left as it is.
    """
    if interpreter._patch_lang.__module__ == __name__ or not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set[tuple[bool, bool]]()  # pairs patched in this launch: whether a function's module has tl, and tl.core

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
