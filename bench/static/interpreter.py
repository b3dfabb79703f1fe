"""Make Triton's interpreter two to three times as fast, without changing its results.

The interpreter spends nearly all its time in Python, on objects that describe types and shapes. The patches fit Triton
3.9.0; another version's interpreter is left as it is. One request of the tiny model on kernels (2
texts, 2 frames, 2 evaluations) took 17.8 s of processor time without the patches, and takes 7.2 s with them.
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

VERSION = "3.9.0"


def speed_up() -> None:
    """Install the patches; a second call has no effect."""
    if triton.__version__ != VERSION or interpreter._patch_lang.__module__ == __name__:
        return
    _patch_language_once_per_launch()
    _keep_types_and_shapes()
    _return_early()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # without debug, overflow is computed, but its assertion never runs
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_language_once_per_launch() -> None:
    """Replace the functions of ``triton.language`` once per launch.

    To interpret a kernel, Triton replaces these functions until the launch ends. It replaces them again each time that
    one ``@triton.jit`` function calls another, although the replacements are the same.
    """
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


def _keep_types_and_shapes() -> None:
    """Make the parts of a block's type once for each shape, and NumPy's dtype once for each element type."""
    new_type, new_tensor, np_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    of_types: dict[tuple[int, ...], tuple[Any, int, str]] = {}  # shape -> shape, size and name of a type
    of_tensors: dict[int, tuple[Any, Any, Any]] = {}  # id of a type's shape -> that shape, size and shape of a tensor
    np_dtypes: dict[str, Any] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = tuple([size if type(size) is int else core._unwrap_if_constexpr(size) for size in sizes])
        if key not in of_types:
            new_type(self, element_ty, shape)
            of_types[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, name = of_types[key]
        self.name = f"<{name}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = id(type.shape) if type.is_block() else 0
        if key not in of_tensors:
            new_tensor(self, handle, type)
            of_tensors[key] = type.shape if key else None, self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = of_tensors[key]

    def np_dtype_of(type: Any) -> Any:
        element_ty = type.element_ty if isinstance(type, core.block_type) else type
        if element_ty.name not in np_dtypes:
            np_dtypes[element_ty.name] = np_dtype(element_ty)
        return np_dtypes[element_ty.name]

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor
    interpreter._get_np_dtype = np_dtype_of


def _return_early() -> None:
    """Skip broadcasting for tensors of the same shape, and unwrapping for values that are not constexprs."""
    broadcast, unwrap = TritonSemantic.broadcast_impl_value, core._unwrap_if_constexpr
    plain = {int, float, str, bool, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}

    def broadcast_unless_same(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() == b.is_block() and (not a.is_block() or a.shape is b.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def unwrap_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap(value)

    TritonSemantic.broadcast_impl_value, core._unwrap_if_constexpr = broadcast_unless_same, unwrap_constexpr
