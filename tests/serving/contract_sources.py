# SPDX-License-Identifier: MIT
"""Python sources read without importing them: names, classes with their bases, signatures, types where written.

Only the modules that are asked for are parsed, so a look at some hundred names of vLLM takes seconds. (griffe, which
knows more of Python, loads a package as a whole, 25 s for vLLM, and leaves out the bodies of functions.)
"""

import ast
import copy
import inspect
import pydoc
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.AST | str  # a node, or the path that the name is imported from


class UnknownType(Exception):
    """A member was asked of something whose type is not written down."""


def dotted(node: ast.AST) -> list[str]:
    """["a", "b"] for the expression ``a.b``, [] for one of another form."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def decorators(node: Definition) -> set[str]:
    """The last names of a definition's decorators."""
    found = (dotted(d.func if isinstance(d, ast.Call) else d) for d in getattr(node, "decorator_list", ()))
    return {names[-1] for names in found if names}


@dataclass
class Module:
    """A parsed file."""

    name: str
    file: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.file.read_text(encoding="utf-8"), str(self.file))

    @cached_property
    def names(self) -> dict[str, Definition]:
        """What the module's names are; a wildcard import has its ``*`` path as its name."""
        return self.definitions(self.tree.body)

    def definitions(self, body: Iterable[ast.stmt]) -> dict[str, Definition]:
        """The names that the statements of a module or class define: of several definitions the first (so that
        an ImportError's stand-in is not taken), of overloads the last."""
        found: dict[str, Definition] = {}
        for name, definition in self._definitions(body):
            if name not in found or "overload" in decorators(found[name]):
                found[name] = definition
        return found

    def _definitions(self, body: Iterable[ast.stmt]) -> Iterator[tuple[str, Definition]]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef):
                yield node.name, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from ((n.id, node) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from self.imports(node)
            else:
                for part in ("body", "handlers", "orelse", "finalbody"):
                    yield from self._definitions(getattr(node, part, []))

    def imports(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """(name, path) of what an import statement brings in."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom):
            package = self.name.split(".") + ["__init__"] * (self.file.name == "__init__.py")
            start = [".".join(package[: -node.level])] if node.level else []
            for alias in node.names:
                path = ".".join([*start, *([node.module] if node.module else []), alias.name])
                yield path if alias.name == "*" else alias.asname or alias.name, path


@dataclass(frozen=True)
class Symbol:
    """A definition: a module, class, function or assignment."""

    path: str
    node: ast.AST = field(compare=False)
    module: Module = field(compare=False)
    owner: str = field(default="", compare=False)  # the class that it is a member of
    method: Function | None = field(default=None, compare=False)  # the one that assigns self.NAME

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_property(self) -> bool:
        return bool(decorators(self.node) & {"property", "cached_property"})

    def describe(self) -> str:
        """What its users see of it, in one line."""
        node, name = self.node, f"{self.owner}.{self.name}" if self.owner else self.name
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.ClassDef):
            return f"class {name}({', '.join(map(ast.unparse, node.bases))})"
        if isinstance(node, Function):
            kinds = sorted(decorators(node) & {"property", "cached_property", "staticmethod", "classmethod"})
            bare = copy.deepcopy(node.args)
            for argument in ast.walk(bare):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            return " ".join([*kinds, f"{name}({ast.unparse(bare)}){returns}"])
        if isinstance(node, ast.Pass):  # of a class that lies elsewhere
            return name
        if isinstance(node, ast.AnnAssign):
            return f"{name}: {ast.unparse(node.annotation)}"
        value = getattr(node, "value", None)
        text = f"{ast.unparse(value.func)}(...)" if isinstance(value, ast.Call) else ast.unparse(value or node)
        return f"{name} = {text if len(text) <= 80 else '...'}"


class Sources:
    """Packages below ``roots`` (package -> its folder); what lies elsewhere is not looked at."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = roots
        self.modules: dict[str, Module | None] = {}
        self._sought: set[str] = set()  # what `find` is after, so that modules may import each other
        self._members: dict[tuple[str, str], Symbol | None] = {}
        self._own: dict[str, dict[str, Symbol | str]] = {}
        self._calls: dict[str, dict[str, list[tuple[str, ast.Call]]]] = {}

    def module(self, name: str) -> Module | None:
        """The module or package of that dotted name."""
        if name not in self.modules:
            roots = [root for root in self.roots if f"{name}.".startswith(f"{root}.")]
            root = max(roots, key=len, default=None)
            self.modules[name] = None
            if root is not None:
                base = self.roots[root].joinpath(*name[len(root) :].split(".")[1:])
                files = [base / "__init__.py", base.parent / f"{base.name}.py"]
                self.modules[name] = next((Module(name, file) for file in files if file.is_file()), None)
        return self.modules[name]

    def find(self, path: str) -> Symbol | None:
        """What a dotted path leads to, through imports, bases and written types; None: it is not there.

        Raises:
            UnknownType: the path goes on beyond something whose type is not written down.
        """
        names = path.split(".")
        ends = (end for end in range(len(names), 0, -1) if self.module(".".join(names[:end])))
        end = next(ends, 0)
        module = self.module(".".join(names[:end]))
        if module is None or path in self._sought:
            return None
        symbol: Symbol | None = Symbol(module.name, module.tree, module)
        self._sought.add(path)
        try:
            for name in names[end:]:
                symbol = symbol and self.member(symbol, name)
        finally:
            self._sought.remove(path)
        return symbol

    def member(self, symbol: Symbol, name: str) -> Symbol | None:
        """``symbol.name``, as `find`."""
        if isinstance(symbol.node, ast.Module):
            found = symbol.module.names.get(name)
            if found is None and name in ("__file__", "__name__"):
                return Symbol(f"{symbol.path}.{name}", ast.Pass(), symbol.module)
            if found is None:
                stars = [path.removesuffix("*") for path in symbol.module.names if path.endswith(".*")]
                return next(filter(None, (self.find(star + name) for star in stars)), None)
            if isinstance(found, str):
                return self.find(found) if found != f"{symbol.path}.{name}" else None
            return Symbol(f"{symbol.path}.{name}", found, symbol.module)
        if isinstance(symbol.node, ast.ClassDef):
            if (symbol.path, name) not in self._members:
                self._members[symbol.path, name] = self.first_member(self.mro(symbol), name)
            return self._members[symbol.path, name]
        cls = self.type_of(symbol)
        if cls is None:
            raise UnknownType(symbol.path)
        return self.member(cls, name)

    def first_member(self, classes: Iterable[Symbol], name: str) -> Symbol | None:
        """``name`` of the first class that has it, then of those of their bases that lie elsewhere."""
        classes = list(classes)
        own = next(filter(None, (self.own_member(cls, name) for cls in classes)), None)
        return own or next(filter(None, (self._foreign_member(cls, name) for cls in classes)), None)

    def _foreign_member(self, cls: Symbol, name: str) -> Symbol | None:
        assert isinstance(cls.node, ast.ClassDef)
        for node in cls.node.bases:
            names = dotted(node.value if isinstance(node, ast.Subscript) else node)
            path = cls.module.names.get(names[0]) if names else None
            if isinstance(path, str) and path.partition(".")[0] in {*sys.stdlib_module_names, "torch"}:
                path = ".".join([path, *names[1:]])
                if hasattr(pydoc.locate(path), name):
                    return Symbol(f"{path}.{name}", ast.Pass(), cls.module, names[-1])
        return None

    def own_members(self, cls: Symbol) -> dict[str, Symbol | str]:
        """What the body of a class defines and what its methods assign to ``self``."""
        if cls.path not in self._own:
            assert isinstance(cls.node, ast.ClassDef)
            found: dict[str, Symbol | str] = {}
            for name, definition in cls.module.definitions(cls.node.body).items():
                found[name] = (
                    definition
                    if isinstance(definition, str)
                    else Symbol(f"{cls.path}.{name}", definition, cls.module, cls.name)
                )
            for method in methods(cls):
                for node in ast.walk(method):
                    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
                    parts = (dotted(part) for target in targets if target for part in ast.walk(target))
                    for name in (names[1] for names in parts if len(names) == 2 and names[0] == "self"):
                        found.setdefault(name, Symbol(f"{cls.path}.{name}", node, cls.module, cls.name, method))
            self._own[cls.path] = found
        return self._own[cls.path]

    def own_member(self, cls: Symbol, name: str) -> Symbol | None:
        """The class's own ``name``, not that of a base."""
        found = self.own_members(cls).get(name)
        return self.find(found) if isinstance(found, str) else found

    def calls_of_self(self, cls: Symbol, name: str) -> list[tuple[str, ast.Call]]:
        """(method, call) of every ``self.name(...)`` in the class."""
        if cls.path not in self._calls:
            found: dict[str, list[tuple[str, ast.Call]]] = {}
            for method in methods(cls):
                for node in ast.walk(method):
                    names = dotted(node.func) if isinstance(node, ast.Call) else []
                    if len(names) == 2 and names[0] == "self" and isinstance(node, ast.Call):
                        found.setdefault(names[1], []).append((method.name, node))
            self._calls[cls.path] = found
        return self._calls[cls.path].get(name, [])

    def bases(self, cls: Symbol) -> list[Symbol]:
        """The bases that lie below the roots."""
        assert isinstance(cls.node, ast.ClassDef)
        return [base for node in cls.node.bases if (base := self.class_of(node, cls)) is not None]

    def mro(self, cls: Symbol) -> list[Symbol]:
        """The class and its bases in the order in which Python looks (C3), as far as they lie below the roots."""
        bases = self.bases(cls)
        rows = [*map(self.mro, bases), bases]
        order = [cls]
        while rows := [row for row in rows if row]:
            heads = (row[0] for row in rows if not any(row[0] in other[1:] for other in rows))
            order.append(next(heads, rows[0][0]))
            rows = [[base for base in row if base != order[-1]] for row in rows]
        return order

    def type_of(self, symbol: Symbol) -> Symbol | None:
        """The class of a value, by annotation, by the call that makes it, or by the parameter that it is."""
        node = symbol.node
        if isinstance(node, Function):
            return self.class_of(node.returns, symbol)
        annotation = self.class_of(getattr(node, "annotation", None), symbol)
        return annotation or self.class_of(getattr(node, "value", None), symbol)

    def class_of(self, node: ast.AST | None, scope: Symbol) -> Symbol | None:
        """The class that an annotation, a base or an assigned value stands for."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):  # X | None
            return self.class_of(node.left, scope) or self.class_of(node.right, scope)
        if isinstance(node, ast.Subscript):  # Base[T]; but not list[X], which lies elsewhere
            return self.class_of(node.value, scope)
        is_call = isinstance(node, ast.Call)
        names = dotted(node.func if isinstance(node, ast.Call) else node) if node is not None else []
        if not names:
            return None
        parameters = {a.arg: a.annotation for a in ast.walk(scope.method or ast.Pass()) if isinstance(a, ast.arg)}
        if names[0] in parameters:
            return self.class_of(parameters[names[0]], scope) if len(names) == 1 and not is_call else None
        try:
            found = self.find(".".join([scope.module.name, *names]))
        except UnknownType:
            return None
        if found is None or isinstance(found.node, ast.ClassDef):
            return found
        return self.type_of(found) if is_call or not isinstance(found.node, Function) else None

    def signature(self, symbol: Symbol) -> inspect.Signature | None:
        """How a function, or a class to make one, is called, without ``self``; None where it is not written down."""
        if isinstance(symbol.node, ast.ClassDef):
            made_by = self.member(symbol, "__init__")
            return self.signature(made_by) if made_by else self._fields(symbol)
        if not isinstance(symbol.node, Function) or symbol.is_property:
            return None
        bound = bool(symbol.owner) and "staticmethod" not in decorators(symbol.node)
        return signature_of(symbol.node.args, bound)

    def _fields(self, cls: Symbol) -> inspect.Signature | None:
        """The constructor of a dataclass."""
        found: dict[str, inspect.Parameter] = {}
        for base in reversed(self.mro(cls)):
            assert isinstance(base.node, ast.ClassDef)
            if "dataclass" in decorators(base.node):
                for name, node in base.module.definitions(base.node.body).items():
                    if isinstance(node, ast.AnnAssign):
                        default = None if node.value else inspect.Parameter.empty
                        found[name] = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        # required after optional ones, as keyword-only fields may be, is refused by a signature of positional ones
        ordered = sorted(found.values(), key=lambda p: p.default is not p.empty)
        return inspect.Signature(ordered) if found else None


def methods(cls: Symbol) -> list[Function]:
    """The functions that the body of a class defines, each time that one is."""
    return [node for node in getattr(cls.node, "body", ()) if isinstance(node, Function)]


def signature_of(arguments: ast.arguments, bound: bool = False) -> inspect.Signature:
    """The signature of written arguments, names and kinds alone; ``bound``: without the first."""
    p = inspect.Parameter
    plain = [p(a.arg, p.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    plain += [p(a.arg, p.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    required = len(plain) - len(arguments.defaults)
    made = [*plain[:required], *(parameter.replace(default=None) for parameter in plain[required:])][bound:]
    made += [p(arguments.vararg.arg, p.VAR_POSITIONAL)] if arguments.vararg else []
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        made.append(p(argument.arg, p.KEYWORD_ONLY, default=p.empty if value is None else None))
    made += [p(arguments.kwarg.arg, p.VAR_KEYWORD)] if arguments.kwarg else []
    return inspect.Signature(made)


def misfit(signature: inspect.Signature, call: ast.Call) -> str:
    """Why a call does not fit a signature; "" if it does, as far as ``*`` and ``**`` let one tell."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    starred = len(positional) < len(call.args) or len(keywords) < len(call.keywords)
    try:
        (signature.bind_partial if starred else signature.bind)(*positional, **keywords)
    except TypeError as error:
        return str(error)
    return ""
