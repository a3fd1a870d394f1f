# SPDX-License-Identifier: MIT
"""Triton's interpreter, for processes that run kernels in it: three times as fast, and with masks of any kind."""

import functools
from collections.abc import Callable
from typing import Any


def hasten() -> None:
    """Leave out what the interpreter does for nothing: half of all time and more."""
    _patch_once_a_launch()
    from triton.language import dtype
    from triton.runtime import interpreter

    # whether sums of integers overflow is computed, and asserted with `debug` alone
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    numpy_type = functools.cache(interpreter._get_np_dtype)  # makes a table of all types each time
    address = numpy_type(interpreter.tl.uint64)

    def looked_up(type_: dtype) -> Any:
        return address if type_.scalar.is_ptr() else numpy_type(type_.scalar)

    interpreter._get_np_dtype = looked_up


def _patch_once_a_launch() -> None:
    """Let the interpreter put its own in the place of what is in triton.language once a launch, for each set of modules
    that functions inside a kernel see. It looks again at every call of such a function, finds next to nothing left to
    do, and takes half of all time for it."""
    from triton.runtime import interpreter

    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    seen: set[tuple[bool, ...]] = set()
    language = (interpreter.tl, interpreter.tl.core)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = tuple(any(value is module for value in self.fn.__globals__.values()) for module in language)
        if modules in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(modules)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called


def take_any_mask() -> None:
    """Loads and stores take masks of bool only, and `&` of two of them may be an integer."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def taking_any(original: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(self: Any, *given: Any) -> Any:
            mask = given[place]
            if mask.data.dtype != np.bool_:
                given = (*given[:place], TensorHandle(mask.data != 0, mask.dtype), *given[place + 1 :])
            return original(self, *given)

        return call

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, taking_any(getattr(InterpreterBuilder, name), place))
