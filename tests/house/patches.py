# SPDX-License-Identifier: MIT
"""Where we reach into vLLM, found in our source, for the table in docs/architecture.md.

Found are attributes of what is not ours that are set (``EngineArgs.add_cli_args = ...``, ``setattr``), entries of
vLLM's tables (``ModelRegistry.models[...] = ...``), and vLLM's classes that one of ours stands in for (its bases).
"""

import ast
from collections.abc import Iterator


def patches(source: str) -> set[str]:
    """The names that ``source`` sets in vLLM, or whose class it derives from."""
    tree = ast.parse(source)
    return set(_found(tree, _of_vllm(tree), in_class=False))


def _of_vllm(tree: ast.AST) -> dict[str, str]:
    """Local name -> vLLM's, of all that is imported from it anywhere in a file."""
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and not node.level
        for alias in node.names
    }


def _found(node: ast.AST, vllms: dict[str, str], in_class: bool) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        in_class = True
        for base in node.bases:
            root, *rest = ast.unparse(base).split(".")
            if root in vllms:
                yield rest[-1] if rest else vllms[root]
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _set_by(target, vllms, in_class)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        yield from _set_by(node.target, vllms, in_class)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
        name = node.args[1]
        yield str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name).split(".")[-1]
    for child in ast.iter_child_nodes(node):
        yield from _found(child, vllms, in_class)


def _set_by(target: ast.expr, vllms: dict[str, str], in_class: bool) -> Iterator[str]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for part in target.elts:
            yield from _set_by(part, vllms, in_class)
    elif isinstance(target, ast.Attribute):
        # in a method of ours ``self`` is ours; in a function that is to be one of vLLM's methods it is vLLM's
        if not (in_class and ast.unparse(target.value) == "self"):
            yield target.attr
    elif isinstance(target, ast.Subscript):
        if isinstance(target.value, ast.Attribute):
            yield from _set_by(target.value, vllms, in_class)
        elif isinstance(target.value, ast.Name) and target.value.id in vllms:
            yield vllms[target.value.id]
