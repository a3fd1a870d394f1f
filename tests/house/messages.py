# SPDX-License-Identifier: MIT
"""Every refusal and warning that the code can print, found in its source, for docs/troubleshooting*.md.

A message is a text with "…" for what is only known at run time. Found are the texts

- of ``raise`` and of errors that are returned to be raised;
- of a logger's warnings and errors, of argparse's ``error`` and ``exit``, and printed to stderr;
- in lists of (condition, text), as `refusals.refuse_unsupported` has one;
- of C++'s ``throw``;
- in what a function of ``TOLD_BY`` returns, or one of ``GIVEN_TO`` is given, which one of these passes on.

``raise UserError(str(error))`` has no words of its own and is left out where it stands in an ``except``; other places
like it are in `without_words`, so that a new one is seen.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "flashvid_vllm", ROOT / "kernels" / "ops")
FILES = (ROOT / "setup.py",)
CPP = ROOT / "csrc"
TOLD_BY = {"unsupported_vllm", "slow_products", "missing_for", "too_large", "why_not", "_why_not"}
GIVEN_TO = {"_warn_missing", "say"}
_CALLS = {"warning", "error", "critical", "exception", "exit"}
_FEWEST_LETTERS = 6  # of a text with words of its own


@dataclass(frozen=True)
class Message:
    """A text with its place, such as flashvid_vllm/serving/cli.py:95."""

    text: str
    place: str


def messages() -> list[Message]:
    """All of them."""
    python = [
        Message(text, f"{file}:{node.lineno}")
        for file, node in _found()
        for text in written_out(node)
        if _letters(text) >= _FEWEST_LETTERS
    ]
    return python + [Message(text, place) for text, place in _thrown()]


def _thrown() -> Iterator[tuple[str, str]]:
    for path in sorted(CPP.rglob("*.*")):
        for thrown in re.findall(r"throw std::\w+\((.*?)\);", path.read_text(encoding="utf-8"), re.DOTALL):
            yield "…".join(re.findall(r'"(.*?)"', thrown)) + "…", str(path.relative_to(ROOT))


def without_words() -> set[tuple[str, str]]:
    """(file, expression) where a text is passed on that is made elsewhere."""
    return {
        (file, ast.unparse(node))
        for file, node in _found()
        if all(_letters(text) < _FEWEST_LETTERS for text in written_out(node))
    }


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def _found() -> Iterator[tuple[str, ast.expr]]:
    for path in (*FILES, *sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))):
        for node in texts(ast.parse(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(ROOT)), node


def texts(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a module's texts, in any order."""
    caught = {
        (name.lineno, name.col_offset)
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and handler.name
        for name in ast.walk(handler)
        if isinstance(name, ast.Name) and name.id == handler.name
    }
    for node in ast.walk(tree):
        for text in _texts_at(node):
            names = {(name.lineno, name.col_offset) for name in ast.walk(text) if isinstance(name, ast.Name)}
            passed_on = isinstance(text, ast.Call | ast.Name) and names & caught
            if not passed_on:
                yield text


def _texts_at(node: ast.AST) -> Iterator[ast.expr]:
    error = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
    if isinstance(error, ast.Call) and error.args and (isinstance(node, ast.Raise) or _is_error(error)):
        if ast.unparse(error.func) != "SystemExit":
            yield max(error.args, key=lambda arg: max(map(_letters, _parts(arg))))  # beside a status, say
    elif isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        to_stderr = any(ast.unparse(word.value) == "sys.stderr" for word in node.keywords if word.arg == "file")
        if (name in _CALLS and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) != "sys.exit") or (
            name in GIVEN_TO or (name == "print" and to_stderr)
        ):
            yield node.args[-1 if name == "exit" else 0]
    elif isinstance(node, ast.FunctionDef) and node.name in TOLD_BY:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return | ast.Assign) and isinstance(inner.value, ast.JoinedStr | ast.Constant):
                yield from [inner.value] if _is_prose(inner.value) else []
    elif isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["MISSING"]:
        yield from [node.value] if _is_prose(node.value) else []
    elif isinstance(node, ast.List):
        for pair in node.elts:
            if isinstance(pair, ast.Tuple) and len(pair.elts) == 2 and _is_prose(pair.elts[1]):
                condition = pair.elts[0]
                yield from [pair.elts[1]] if isinstance(condition, ast.Compare | ast.BoolOp | ast.Call) else []


def _is_error(call: ast.Call) -> bool:
    return ast.unparse(call.func).endswith("Error")


def _is_prose(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.JoinedStr) and any(text.count(" ") > 3 for text in written_out(node))


def written_out(node: ast.expr) -> list[str]:
    """The text of an expression, one for each of its alternatives; "…" for what is not in the source. Without the
    program's name in front."""
    return [re.sub(r"^flashvid\w*: (error: )?", "", " ".join(text.split())) for text in _parts(node)]


def _parts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [str(node.value).replace("%s", "…")]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*map(_parts, node.values))]
    if isinstance(node, ast.FormattedValue):
        return _parts(node.value)
    if isinstance(node, ast.IfExp):
        return _parts(node.body) + _parts(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _parts(node.left) for right in _parts(node.right)]
    if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.JoinedStr | ast.BinOp):
        return _parts(node.args[0])  # of what shortens or escapes it
    return ["…"]
