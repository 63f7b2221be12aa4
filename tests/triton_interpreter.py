"""Triton's interpreter, at half its cost: it looks through the whole language before each call of a function, here once.

Importing this is enough. The language stays patched, so that triton compiles nothing in this process afterwards.
"""

from __future__ import annotations

import atexit
import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch, _numpy_type = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
_patched = dict[int, Any]()  # what was changed, by the modules of kernels


def _patch_lang(function: Any) -> Any:
    if id(function.__globals__) not in _patched:
        _patched[id(function.__globals__)] = _patch(function)
    return interpreter._LangPatchScope()  # of which nothing is restored


def _get_np_dtype(of: Any) -> Any:
    return np.dtype(np.uint64) if of.scalar.is_ptr() else _numpy_type(of.scalar)


_with_element, _init = tl.block_type.with_element_ty, tl.tensor.__init__
_types, _shapes = dict[tuple[str, str], Any](), dict[str, Any]()  # by the names of types


def _with_element_ty(self: Any, scalar: Any) -> Any:
    key = self.name, scalar.name
    if key not in _types:
        _types[key] = _with_element(self, scalar)
    return _types[key]


def _new_tensor(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _shapes:
        _init(self, handle, type)
        _shapes[type.name] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[type.name]


@atexit.register
def _restore() -> None:
    """As each kernel would: triton's library complains of what is left when it ends."""
    for scope in reversed(_patched.values()):
        scope.restore()


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounded once, as by GPUs and from triton 3.9 on; before, the interpreter multiplies and then adds."""
    with np.errstate(all="ignore"):
        exact = x.data.astype(np.longdouble) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


interpreter._patch_lang, interpreter._get_np_dtype = _patch_lang, _get_np_dtype
tl.block_type.with_element_ty, tl.tensor.__init__ = _with_element_ty, _new_tensor
if not hasattr(interpreter._interpreter, "fma_fp32"):
    interpreter.InterpreterBuilder.create_fma = _create_fma
