# SPDX-License-Identifier: MIT
"""Triton's interpreter, for processes that run kernels in it: twice as fast, and with masks of any kind."""

from collections.abc import Callable
from typing import Any


def patch_once_a_launch() -> None:
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
