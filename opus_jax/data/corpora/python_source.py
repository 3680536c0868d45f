"""Take Python source apart: documentation, code without documentation, and what no one wrote by hand."""

import ast
import re
import warnings
from collections.abc import Iterator

_HEAD_CHARACTERS = 500  # where generated files say so
_GENERATED = re.compile(r"auto[- ]?generated|generated (by|from|with)|do not edit", re.IGNORECASE)
_LITERAL_STARTS = frozenset("'\"0123456789-+")
_TABLE_SHARE = 0.5  # of the lines
_BLOCKS = ("body", "handlers", "orelse", "finalbody")  # where a statement holds statements
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parse(source: str) -> ast.Module | None:
    """The syntax tree, or None where the source is not valid for this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the escapes and comparisons of other people's code
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def documentation(tree: ast.Module, module: str) -> str:
    """All docstrings of a module, each below the dotted name of what it documents, in source order."""
    return "\n\n\n".join(f"{name}\n\n{text}" for name, text in _docstrings(tree, module))


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without its docstrings; a body that held nothing else gets `...`, so the result still parses."""
    lines = source.splitlines(keepends=True)
    for node, _ in _definitions(tree, ""):
        first = node.body[0] if node.body else None
        if first is None or not _is_docstring(first):
            continue
        start, end = first.lineno - 1, first.end_lineno or first.lineno
        alone = lines[start][: first.col_offset].isspace() or first.col_offset == 0
        if alone and lines[end - 1].rstrip().endswith(("'", '"')):  # not behind a def, not before a semicolon
            indent = " " * first.col_offset
            lines[start:end] = [indent + "...\n" if len(node.body) == 1 and indent else ""] + [""] * (end - start - 1)
    return "".join(lines).strip("\n")


def is_generated(source: str) -> bool:
    """True when the head of the file says that a program wrote it."""
    return _GENERATED.search(source[:_HEAD_CHARACTERS]) is not None


def is_table(source: str) -> bool:
    """True when most lines begin with a literal: encodings, lists of names, test vectors."""
    lines = [stripped for line in source.splitlines() if (stripped := line.lstrip(" \t[({"))]
    rows = sum(1 for line in lines if line[0] in _LITERAL_STARTS)
    return len(lines) > 20 and rows > _TABLE_SHARE * len(lines)


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node, name in _definitions(tree, module):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield name, text


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[_Documented, str]]:
    """The module, its classes and its functions, in source order, with dotted names; expressions are not visited."""
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}"
        if isinstance(node, _Documented):
            yield node, name
        inside = [child for block in _BLOCKS for child in getattr(node, block, ())]
        stack.extend((child, name) for child in reversed(inside))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
