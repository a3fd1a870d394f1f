# SPDX-License-Identifier: MIT
"""What we build on in a vLLM release, read off our sources and its own, without importing either."""

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving.contract_by_hand import KNOWN_BY, MENTIONED_IN, READ, USED_IN
from tests.serving.contract_sources import (
    Function,
    Sources,
    Symbol,
    UnknownType,
    decorators,
    dotted,
    misfit,
)

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = "tests/serving/contract_by_hand.py"
OURS = {"flashvid_vllm": ROOT / "flashvid_vllm", "flashvid_vllm.ops": ROOT / "kernels" / "ops"}
NOT_THERE = "not there"
_CLASS_IN_STRING = re.compile(r"vllm(\.\w+)+\.[A-Z]\w+")


@dataclass(frozen=True)
class Use:
    """One place where we reach for something: ``names`` of a path, of ``self`` or of ``super()``."""

    names: tuple[str, ...]
    where: str
    call: ast.Call | None = None


def place(file: Path, node: ast.AST) -> str:
    """file:line"""
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}:{getattr(node, 'lineno', 0)}"


class Reader(ast.NodeVisitor):
    """What one module of ours reaches for."""

    def __init__(self, sources: Sources, module: Symbol) -> None:
        self.sources, self.module = sources, module
        self.paths: list[Use] = []  # imports, and names and attributes that begin with an imported name
        self.of_self: dict[str, list[Use]] = defaultdict(list)  # class -> uses
        self.of_super: dict[str, list[Use]] = defaultdict(list)
        self.classes: list[Symbol] = []
        self.words: set[str] = set()
        self._class = ""
        self._known: dict[str, str | None] = {}  # name -> path of what it is
        for node in ast.walk(module.node):
            for name, path in module.module.imports(node):
                module.module.names.setdefault(name, path)  # also what is imported inside functions
                self._known[name] = path
                self._use([path], node)
        self.visit(module.node)

    def _use(self, names: list[str], node: ast.AST, call: ast.Call | None = None) -> None:
        names = ".".join(names).split(".")
        if names[0] == "vllm":
            self.paths.append(Use(tuple(names), self._where(node), call))

    def _where(self, node: ast.AST) -> str:
        return place(self.module.module.file, node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside, self._class = self._class, f"{self._class or self.module.path}.{node.name}"
        self.classes.append(Symbol(self._class, node, self.module.module))
        self.generic_visit(node)
        self._class = outside

    def _visit_scope(self, node: Function | ast.Lambda) -> None:
        outside = self._known
        parameters = {}
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                cls = self.sources.class_of(argument.annotation, self.module)
                parameters[argument.arg] = cls.path if cls else None
        self._known = {**outside, **parameters}
        self.generic_visit(node)
        self._known = outside

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_scope

    def visit_Call(self, node: ast.Call) -> None:
        self._chain(node.func, node)
        for part in (*node.args, *node.keywords):
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._chain(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._chain(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.words.add(node.value)
            if _CLASS_IN_STRING.fullmatch(node.value):
                self._use([node.value], node)

    def _chain(self, node: ast.expr, call: ast.Call | None = None) -> None:
        names: list[str] = []
        root = node
        while isinstance(root, ast.Attribute):
            names.insert(0, root.attr)
            root = root.value
        self.words.update(names)
        if isinstance(root, ast.Name):
            assigned = isinstance(getattr(node, "ctx", None), ast.Store) and len(names) < 2
            if root.id == "self" and self._class and names and not assigned:
                self.of_self[self._class].append(Use(tuple(names), self._where(node), call))
            elif path := self._known.get(root.id):
                self._use([path, *names], node, call)
        elif isinstance(root, ast.Call) and dotted(root.func) == ["super"] and self._class and names:
            self.of_super[self._class].append(Use(tuple(names), self._where(node), call))
        else:
            self.visit(root)


@dataclass
class Contract:
    """What we build on, as one release has it."""

    symbols: dict[str, str] = field(default_factory=dict)  # symbol -> what it is there
    users: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # symbol -> file:line of ours
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unchecked: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # of an unknown type -> what of it

    def add(self, symbol: str, found: str, *users: str) -> None:
        """Note that we build on ``symbol``."""
        self.symbols[symbol] = found
        self.users[symbol].update(users)

    def fault(self, symbol: str, why: str) -> None:
        """Note that what we build on is not as we need it."""
        if why not in self.faults[symbol]:
            self.faults[symbol].append(why)


class Derivation:
    """Reads our sources and looks everything up in a release's."""

    def __init__(self, vllm: Path, ours: Mapping[str, Path] = OURS, by_hand: bool = True) -> None:
        self.sources = Sources({"vllm": vllm, **ours})
        self.contract = Contract()
        self.readers = [Reader(self.sources, module) for module in self._our_modules(ours)]
        self.overrides: dict[str, list[Symbol]] = defaultdict(list)  # name -> our methods
        for reader in self.readers:
            for use in reader.paths:
                self._path(use)
        for reader in self.readers:
            for cls in reader.classes:
                self._class(cls)
        if by_hand:
            self._by_hand()

    def _our_modules(self, ours: Mapping[str, Path]) -> Iterator[Symbol]:
        for package, folder in ours.items():
            for file in sorted(folder.rglob("*.py")):
                parts = [package, *file.relative_to(folder).with_suffix("").parts]
                module = self.sources.module(".".join(parts[: -1 if parts[-1] == "__init__" else None]))
                if module is not None:
                    yield Symbol(module.name, module.tree, module)

    def _path(self, use: Use) -> None:
        """An import, or what hangs on one."""
        found, known = self._follow(None, use.names)
        path = ".".join(use.names[:known])
        self._note(path, found, use, complete=known == len(use.names))

    def _follow(self, start: Symbol | None, names: tuple[str, ...]) -> tuple[Symbol | None, int]:
        """What ``names`` lead to, and how many of them lie within what is known: all, or up to an unknown type."""
        for known in range(len(names), 0, -1):
            try:
                if start is None:
                    return self.sources.find(".".join(names[:known])), known
                symbol: Symbol | None = start
                for name in names[:known]:
                    symbol = symbol and self.sources.member(symbol, name)
                return symbol, known
            except UnknownType:
                continue
        return start, 0

    def _note(self, path: str, found: Symbol | None, use: Use, complete: bool = True) -> None:
        self.contract.add(path, found.describe() if found else NOT_THERE, use.where)
        if found is None:
            self.contract.fault(path, NOT_THERE)
        elif not complete:
            self.contract.unchecked[path].add(".".join(use.names[-1:]))
        elif use.call is not None:
            self._fits(path, self.sources.signature(found), use.call, f"our call in {use.where}")

    def _fits(self, path: str, signature: inspect.Signature | None, call: ast.Call, what: str) -> None:
        if signature is not None and (why := misfit(signature, call)):
            self.contract.fault(path, f"{what} does not fit: {why}")

    def _class(self, cls: Symbol) -> None:
        """A class of ours that has a base in vLLM: what it overrides, and what it takes from there."""
        order = self.sources.mro(cls)
        ours = [c for c in order if not c.path.startswith("vllm.")]
        theirs = [c for c in order if c.path.startswith("vllm.")]
        if not theirs:
            return
        entries = [base for c in ours for base in self.sources.bases(c) if base in theirs]

        def their(name: str) -> tuple[str, Symbol | None]:
            found = self.sources.first_member(theirs, name)
            mine = [e for e in entries if found is None or self.sources.member(e, name) == found]
            return f"{(mine or entries)[0].path}.{name}", found

        own: dict[str, Symbol] = {}
        for name, symbol in ((n, s) for c in ours for n, s in self.sources.own_members(c).items()):
            if isinstance(symbol, Symbol) and (symbol.method or not _declared(symbol.node)):
                own.setdefault(name, symbol)
        for name, symbol in own.items():
            path, found = their(name)
            if found is not None:
                self._override(path, found, symbol, theirs)
        for reader in self.readers:
            for c in ours:
                for use in reader.of_self[c.path]:
                    if use.names[0] not in own:
                        self._inherited(*their(use.names[0]), use)
                later = {name for after in ours[ours.index(c) + 1 :] for name in self.sources.own_members(after)}
                for use in reader.of_super[c.path]:
                    if use.names[0] not in later:
                        self._inherited(*their(use.names[0]), use)

    def _inherited(self, path: str, found: Symbol | None, use: Use) -> None:
        """``self.NAME...`` or ``super().NAME...`` that is vLLM's."""
        rest = use.names[1:]
        if found is not None and rest:
            self._note(path, found, Use(use.names[:1], use.where))
            end, known = self._follow(found, rest)
            path = ".".join([path, *rest[:known]])
            self._note(path, end, use, complete=known == len(rest))
        else:
            self._note(path, found, use)

    def _override(self, path: str, theirs: Symbol, ours: Symbol, classes: list[Symbol]) -> None:
        """A member of vLLM's class that ours replaces: its callers must find what they expect."""
        where = place(ours.module.file, ours.node)
        self.contract.add(path, theirs.describe(), where)
        if not isinstance(theirs.node, Function) or not isinstance(ours.node, Function):
            return
        self.overrides[ours.name].append(ours)
        kinds = {"property", "cached_property", "staticmethod", "classmethod"}
        if decorators(theirs.node) & kinds != decorators(ours.node) & kinds:
            self.contract.fault(path, f"our override in {where} is of another kind")
            return
        signature, wanted = self.sources.signature(ours), self.sources.signature(theirs)
        if signature is not None and wanted is not None and (why := _narrower(signature, wanted)):
            self.contract.fault(path, f"our override in {where} does not take what vLLM's takes: {why}")
        callers = set()
        for cls in classes:
            for method, call in self.sources.calls_of_self(cls, ours.name):
                callers.add(f"{cls.name}.{method}")
                self._fits(path, signature, call, f"the call in {cls.name}.{method} for our override in {where}")
        if callers:
            self.contract.add(f"{path} called by", ", ".join(sorted(callers)), where)
        elif ours.name.startswith("_") and not ours.name.startswith("__"):
            self.contract.fault(path, f"vLLM no longer calls this method, which {where} overrides")

    def _by_hand(self) -> None:
        words = set().union(*(reader.words for reader in self.readers))
        for path, names in READ.items():
            for name in names.split():
                self._path(Use((*path.split("."), name), BY_HAND))
                if name not in words:
                    self.contract.fault(f"{path}.{name}", f"{BY_HAND} names it; our sources do not")
        for path in KNOWN_BY:
            self._path(Use(tuple(path.split(".")), BY_HAND))
            found = self.sources.find(path)
            if found is not None and isinstance(found.node, ast.ClassDef):
                fields = self.sources.signature(found)
                self.contract.symbols[path] += f": {', '.join(fields.parameters) if fields else ''}"
        for path, names in USED_IN.items():
            scope = self.sources.find(path)
            for name in names.split():
                self._used_in(path, scope, name)
        for package, names in MENTIONED_IN.items():
            self._mentioned_in(package, names.split())

    def _used_in(self, path: str, scope: Symbol | None, name: str) -> None:
        """Every use of ``.name`` inside a module, class or function of vLLM's."""
        symbol = f"{path} uses {name}"
        inside = "" if scope is None or isinstance(scope.node, ast.Module) else scope.name
        uses = [] if scope is None else list(uses_of(scope.node, name, inside))
        found = (
            NOT_THERE if scope is None else "; ".join(f"{function}: {text}" for function, text, _ in uses) or "never"
        )
        self.contract.add(symbol, found, BY_HAND)
        if scope is None:
            self.contract.fault(symbol, NOT_THERE)
        for function, _, call in uses:
            for ours in self.overrides[name] if call is not None else ():
                assert isinstance(call, ast.Call)
                self._fits(symbol, self.sources.signature(ours), call, f"the call in {function} for {ours.path}")

    def _mentioned_in(self, package: str, names: list[str]) -> None:
        """The modules of a package of vLLM's in whose text a name stands."""
        top = self.sources.module(package)
        found: dict[str, list[str]] = {name: [] for name in names}
        for file in sorted(top.file.parent.rglob("*.py")) if top else ():
            text = file.read_bytes()
            for name in names:
                if name.encode() in text:
                    parts = file.relative_to(self.sources.roots["vllm"]).with_suffix("").parts
                    module = self.sources.module(".".join(["vllm", *parts]).removesuffix(".__init__"))
                    found[name] += [module.name] if module else []
        for name, modules in found.items():
            where = ", ".join(modules) or "nowhere"
            self.contract.add(f"{package} mentions {name}", where, BY_HAND)


def _declared(node: ast.AST) -> bool:
    """Whether a member is only declared, ``name: type``: it is somebody else's."""
    return isinstance(node, ast.AnnAssign) and node.value is None


def _narrower(ours: inspect.Signature, theirs: inspect.Signature) -> str:
    """Why a method does not take all that another takes; "" if it does."""
    p = inspect.Parameter
    plain = [v for v in theirs.parameters.values() if v.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_position = [v.name for v in plain]
    by_keyword = {v.name: None for v in theirs.parameters.values() if v.kind is p.KEYWORD_ONLY}
    late = {v.name: None for v in plain if v.kind is p.POSITIONAL_OR_KEYWORD}
    early = [v.name for v in plain if v.kind is p.POSITIONAL_ONLY]
    for kind, what in ((p.VAR_POSITIONAL, "*"), (p.VAR_KEYWORD, "**")):
        kinds = ({v.kind for v in s.parameters.values()} for s in (theirs, ours))
        if [kind in found for found in kinds] == [True, False]:
            return f"it takes no {what}arguments"
    try:
        ours.bind(*by_position, **by_keyword)
        ours.bind(*early, **late, **by_keyword)
        required = {
            v.name: None for v in theirs.parameters.values() if v.kind is p.KEYWORD_ONLY and v.default is p.empty
        }
        ours.bind(*[v.name for v in plain if v.default is p.empty], **required)
    except TypeError as error:
        return str(error)
    return ""


def uses_of(scope: ast.AST, name: str, inside: str = "") -> Iterator[tuple[str, str, ast.Call | None]]:
    """(function, source, call) of every call, assignment or reading of ``.name`` below ``scope``."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Function | ast.ClassDef):
            yield from uses_of(node, name, f"{inside}.{node.name}".strip("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == name:
            yield inside, ast.unparse(node), node
            for part in (node.func, *node.args, *node.keywords):
                yield from uses_of(part, name, inside)
        elif name in (getattr(node, "attr", None), *(getattr(t, "attr", None) for t in getattr(node, "targets", ()))):
            yield inside, ast.unparse(node), None
        else:
            yield from uses_of(node, name, inside)
