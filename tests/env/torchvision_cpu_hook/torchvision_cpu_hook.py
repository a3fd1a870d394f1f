# SPDX-License-Identifier: MIT
"""Declare torchvision's C++ operators where its C++ library cannot be loaded.

A .pth file imports this in every interpreter of the environment, so it imports nothing heavy itself: it
waits for `torchvision.extension` and costs microseconds until then.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # torch forgets the operators of a library that is collected


def declare_operators(extension: ModuleType) -> None:
    """Declare the operators that `import torchvision` looks up, unless the C++ library brought them."""
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in SCHEMAS:
        library.define(schema)


class ExtensionFinder:
    """Finds `torchvision.extension` as usual and lets `declare_operators` follow its execution."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module's usual spec with its loader wrapped; None for every other module."""
        if name != "torchvision.extension":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            declare_operators(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, ExtensionFinder)
