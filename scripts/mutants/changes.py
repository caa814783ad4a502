"""Small wrong changes to a source file: a comparison turned, a statement left out, one too many."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Place = tuple[int, int, int, int]
"""First line (from 1) and byte, last line and byte."""

_TURNED: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
"""What an operator is, and what it becomes."""

_OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_COMMUTING = ("fma", "min", "max", "add_product")
"""Functions whose first two arguments may be swapped."""

_SHOWN = ("Problem", "hint")
"""Calls and keywords that only say something to the user."""


@dataclass(frozen=True)
class Change:
    """One wrong change.

    Attributes:
        file: path below the package.
        function: qualified name of the function, empty for what runs at the import.
        place: what is replaced.
        now: what stands there instead.
    """

    file: str
    function: str
    place: Place
    now: str

    def apply(self, text: str) -> str:
        """Return the file's text with the change made."""
        lines = text.encode().splitlines(keepends=True)
        first, start, last, end = self.place
        head, tail = lines[first - 1][:start], lines[last - 1][end:]
        lines[first - 1 : last] = [head + self.now.encode() + tail]
        return b"".join(lines).decode()


def changes_of(path: Path, root: Path) -> list[Change]:
    """Return all the changes that can be made to a file.

    Args:
        path: the file.
        root: the package's folder.
    """
    text = path.read_text(encoding="utf-8")
    finder = _Finder(text, path.relative_to(root).as_posix())
    finder.visit(ast.parse(text))
    return finder.found


def chosen(changes: Sequence[Change], count: int, seed: int) -> list[Change]:
    """Return changes of so many lines, drawn at random: one of each line."""
    by_line: dict[tuple[str, int], list[Change]] = defaultdict(list)
    for change in changes:
        by_line[change.file, change.place[0]].append(change)
    dice = random.Random(seed)
    lines = dice.sample(sorted(by_line), min(count, len(by_line)))
    return [dice.choice(by_line[line]) for line in lines]


def is_one(change: Change, text: str) -> bool:
    """Whether Python can read a change to a text, and it says something else then."""
    try:
        return ast.dump(ast.parse(change.apply(text))) != ast.dump(ast.parse(text))
    except (SyntaxError, ValueError):
        return False


class _Finder(ast.NodeVisitor):
    """Walks a file; leaves out annotations, docstrings, and what is only shown to the user."""

    def __init__(self, text: str, file: str) -> None:
        self.found: list[Change] = []
        self._lines = text.encode().splitlines(keepends=True)
        self._file = file
        self._names: list[str] = []
        self._in_function = False

    def visit(self, node: ast.AST) -> None:
        """Look at a node, then at what is in it."""
        outer = self._names, self._in_function
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._names = [*self._names, *(["<locals>"] if self._in_function else []), node.name]
            self._in_function = isinstance(node, ast.FunctionDef)
        for kind, look in _LOOKS.items():
            if isinstance(node, kind):
                for place, now in look(self, node):
                    self.found.append(Change(self._file, ".".join(self._names), place, now))
        self._go_on(node)
        self._names, self._in_function = outer

    def text(self, place: Place) -> str:
        """Return what stands at a place."""
        first, start, last, end = place
        if first == last:
            return self._lines[first - 1][start:end].decode()
        middle = b"".join(self._lines[first : last - 1])
        return (self._lines[first - 1][start:] + middle + self._lines[last - 1][:end]).decode()

    def _go_on(self, node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _SHOWN:
            return
        if isinstance(node, ast.keyword) and node.arg in _SHOWN:
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)


def _place(node: Any) -> Place:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _between(finder: _Finder, left: Any, right: Any, what: tuple[str, str]) -> Iterator[Any]:
    """Replace the operator that stands between two nodes."""
    place = (left.end_lineno, left.end_col_offset, right.lineno, right.col_offset)
    text = finder.text(place)
    if text.count(what[0]) == 1:
        yield place, text.replace(*what)


def _comparisons(finder: _Finder, node: ast.Compare) -> Iterator[Any]:
    sides = [node.left, *node.comparators]
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        yield from _between(finder, left, right, _TURNED[type(operator)])


def _sums(finder: _Finder, node: ast.BinOp) -> Iterator[Any]:
    if what := _TURNED.get(type(node.op)):
        yield from _between(finder, node.left, node.right, what)


def _augmented(finder: _Finder, node: ast.AugAssign) -> Iterator[Any]:
    yield _place(node), "pass"
    if what := _TURNED.get(type(node.op)):
        was, now = what
        yield from _between(finder, node.target, node.value, (f"{was}=", f"{now}="))


def _junctions(finder: _Finder, node: ast.BoolOp) -> Iterator[Any]:
    for left, right in zip(node.values, node.values[1:], strict=False):
        yield from _between(finder, left, right, _TURNED[type(node.op)])


def _negations(finder: _Finder, node: ast.UnaryOp) -> Iterator[Any]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield _place(node), f"({finder.text(_place(node.operand))})"


def _conditions(finder: _Finder, node: ast.If | ast.IfExp | ast.While) -> Iterator[Any]:
    yield _place(node.test), f"not ({finder.text(_place(node.test))})"


def _filters(_: _Finder, node: ast.comprehension) -> Iterator[Any]:
    for condition in node.ifs:
        yield _place(condition), "True"


def _constants(_: _Finder, node: ast.Constant) -> Iterator[Any]:
    if isinstance(node.value, bool):
        yield _place(node), str(not node.value)
    elif isinstance(node.value, int):
        yield _place(node), str(node.value + 1)
    elif isinstance(node.value, float):
        yield _place(node), repr(node.value * 2 + (not node.value))


def _statements(_: _Finder, node: ast.Expr) -> Iterator[Any]:
    if not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom):
        yield _place(node), "pass"


def _jumps(_: _Finder, node: Any) -> Iterator[Any]:
    yield _place(node), "pass"


def _settings(_: _Finder, node: ast.Assign) -> Iterator[Any]:
    """Leave out what is set of something; a name that is never set shows at once."""
    if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        yield _place(node), "pass"


def _returns(finder: _Finder, node: ast.Return) -> Iterator[Any]:
    if isinstance(node.value, ast.Compare | ast.BoolOp):
        yield _place(node.value), f"not ({finder.text(_place(node.value))})"


def _calls(finder: _Finder, node: ast.Call) -> Iterator[Any]:
    if isinstance(node.func, ast.Name) and node.func.id in _OTHER_NAMES:
        yield _place(node.func), _OTHER_NAMES[node.func.id]
    first, second = [*node.args, None, None][:2]
    if isinstance(node.func, ast.Name) and node.func.id in _COMMUTING:
        return
    if first is None or second is None or ast.Starred in (type(first), type(second)):
        return
    one, other = _place(first), _place(second)
    between = finder.text((*one[2:], *other[:2]))
    yield (*one[:2], *other[2:]), finder.text(other) + between + finder.text(one)


def _functions(_: _Finder, node: ast.FunctionDef) -> Iterator[Any]:
    """Return before anything is done, where nothing is to be returned."""
    first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
    if isinstance(node.returns, ast.Constant) and node.returns.value is None:
        line, column = _place(first)[:2]
        yield (line, column, line, column), "return; "


_LOOKS: dict[Any, Callable[[_Finder, Any], Iterator[tuple[Place, str]]]] = {
    ast.Compare: _comparisons,
    ast.BinOp: _sums,
    ast.AugAssign: _augmented,
    ast.BoolOp: _junctions,
    ast.UnaryOp: _negations,
    ast.If | ast.IfExp | ast.While: _conditions,
    ast.comprehension: _filters,
    ast.Constant: _constants,
    ast.Expr: _statements,
    ast.Raise | ast.Continue | ast.Break: _jumps,
    ast.Assign: _settings,
    ast.Return: _returns,
    ast.Call: _calls,
    ast.FunctionDef: _functions,
}
"""What is looked for, by the kind of node."""
