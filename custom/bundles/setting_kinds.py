"""What kind of value a setting takes (a switch, a number, text, ...), and a value read as that kind.

A command line knows text only: ``--resume false`` is the text ``"false"``, which Python takes for true. This
file needs Python alone. The segmentation bundles hold the same file.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = ("null", "Null", "NULL", "None")
_REFERENCE = re.compile(r"@(\w+(?:(?:::|#)\w+)*)")
_SAID = {
    "switch": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "text",
    "object": "an object",
    "null": "null",
}
_ANNOTATIONS = {"bool": "switch", "int": "whole", "float": "number", "str": "text", "None": "null"}
_LISTS = ("Sequence", "list", "tuple", "Iterable")


class WrongKind(ValueError):
    """A value that a setting cannot take. The message says what the setting takes."""


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes.

    Args:
        names: among ``switch``, ``whole`` (number), ``number``, ``text``, ``list``, ``object``, ``null``.
            If it is empty, nothing is known and every value fits.
        elements: of a list.
        example: a value of this kind, for messages.
    """

    names: frozenset[str] = frozenset()
    elements: Kind | None = None
    example: Any = field(default=None, compare=False)

    def __or__(self, other: Kind) -> Kind:
        if not self.names or not other.names:
            return self if self.names else other
        elements = [kind.elements for kind in (self, other) if kind.elements is not None]
        example = self.example if self.example is not None else other.example
        return Kind(self.names | other.names, union(elements) if elements else None, example)

    def __str__(self) -> str:
        names = self.names - {"whole"} if "number" in self.names else self.names
        said = [text for name, text in _SAID.items() if name in names]
        if "list" in names:
            of = {"whole": " of whole numbers", "number": " of numbers", "text": " of text"}
            inside = self.elements.names - {"null"} if self.elements else frozenset()
            inside = inside - {"whole"} if "number" in inside else inside
            example = f", such as {self.example}" if isinstance(self.example, list | tuple) else ""
            said.insert(0, f"a list{of.get(next(iter(inside)), '') if len(inside) == 1 else ''}{example}")
        return " or ".join(said) or "anything"


ANYTHING = Kind()


def union(kinds: Iterable[Kind]) -> Kind:
    """The kind of values that one of ``kinds`` takes."""
    made = ANYTHING
    for kind in kinds:
        made = made | kind
    return made


def kind_of(value: Any, kind_at: Callable[[str], Kind] = lambda path: ANYTHING) -> Kind:
    """The kind of a value that stands in a config.

    Args:
        value: of the config. An expression is not evaluated: what can be told from its text is used.
        kind_at: the kind of the setting that an ``@path`` refers to.
    """
    if isinstance(value, str) and value.startswith("$"):
        return _kind_of_expression(value[1:], kind_at)
    if isinstance(value, str) and value.startswith("@"):
        return kind_at(value[1:].replace("#", "::"))
    if isinstance(value, str) and (value.startswith("%") or value == "???"):
        return ANYTHING
    if isinstance(value, list | tuple):
        return Kind(frozenset({"list"}), union(kind_of(v, kind_at) for v in value), value)
    return Kind(frozenset({_name_of(value)}), None, value)


def _name_of(value: Any) -> str:
    kinds = {bool: "switch", int: "whole", float: "number", str: "text", list: "list", tuple: "list"}
    return "null" if value is None else kinds.get(type(value), "object")


def kind_of_annotation(annotation: str, default: Any = None) -> Kind:
    """The kind that an argument's annotation names, such as ``int | None``.

    Without an annotation it is the kind of the default, if that is a switch.
    """
    if not annotation:
        return kind_of(default) if isinstance(default, bool) else ANYTHING
    kinds = []
    for part in _parts(annotation.replace("Optional[", "None | Union["), "|"):
        name, _, inside = part.partition("[")
        name, inside = name.strip().rpartition(".")[2], inside.strip().removesuffix("]")
        if name == "Union":
            kinds += [kind_of_annotation(p) for p in _parts(inside, ",")]
        elif name in _LISTS:
            kinds.append(Kind(frozenset({"list"}), kind_of_annotation(_parts(inside, ",")[0])))
        elif name == "PathLike":
            kinds.append(Kind(frozenset({"text"})))
        elif name in _ANNOTATIONS:
            kinds.append(Kind(frozenset({_ANNOTATIONS[name]})))
        else:
            return ANYTHING
    return union(kinds) if all(kind.names for kind in kinds) else ANYTHING


def kind_of_parameter(parameter: inspect.Parameter) -> Kind:
    """The kind that an argument of a class or function takes."""
    annotation = "" if parameter.annotation is parameter.empty else parameter.annotation
    said = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return kind_of_annotation(said, parameter.default)


def _parts(text: str, separator: str) -> list[str]:
    """Split at separators outside of brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "[") - (sign == "]")
        if sign == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _kind_of_expression(text: str, kind_at: Callable[[str], Kind]) -> Kind:
    references: list[str] = []

    def name(found: re.Match[str]) -> str:
        references.append(found[1].replace("#", "::"))
        return f"_reference_{len(references) - 1}"

    try:
        tree = ast.parse(_REFERENCE.sub(name, text).strip(), mode="eval").body
    except SyntaxError:  # an import
        return ANYTHING

    def kind(node: ast.expr) -> Kind:
        match node:
            case ast.Constant(value):
                return kind_of(value) if not isinstance(value, str) else Kind(frozenset({"text"}))
            case ast.Compare() | ast.UnaryOp(op=ast.Not()):
                return Kind(frozenset({"switch"}))
            case ast.UnaryOp(operand=operand):
                return kind(operand)
            case ast.BoolOp(values=values):
                return _known([kind(v) for v in values])
            case ast.IfExp(body=yes, orelse=no):
                return _known([kind(yes), kind(no)])
            case ast.List() | ast.ListComp():
                return Kind(frozenset({"list"}))
            case ast.Dict() | ast.DictComp() | ast.Call(func=ast.Name(id="dict")):
                return Kind(frozenset({"object"}))
            case ast.Call(func=ast.Name(id="int" | "len" | "round")):
                return Kind(frozenset({"whole"}))
            case ast.Call(func=ast.Name(id="float")):
                return Kind(frozenset({"number"}))
            case ast.Call(func=ast.Name(id="min" | "max"), args=[_, _, *_] as args):
                return _known([kind(a) for a in args])
            case ast.Call(func=ast.Attribute(attr="get"), args=[_, default]):
                return kind(default)
            case ast.BinOp(left=left, op=op, right=right):
                return _of_arithmetic(kind(left), op, kind(right))
            case ast.Name(id=name) if name.startswith("_reference_"):
                return kind_at(references[int(name.removeprefix("_reference_"))])
        return ANYTHING

    return kind(tree)


def _known(kinds: list[Kind]) -> Kind:
    """The union, if all of them are known."""
    return union(kinds) if all(kind.names for kind in kinds) else ANYTHING


def _of_arithmetic(left: Kind, op: ast.operator, right: Kind) -> Kind:
    names = left.names | right.names
    if isinstance(op, ast.Add) and "text" in names:
        return Kind(frozenset({"text"}))
    if isinstance(op, ast.FloorDiv):
        return Kind(frozenset({"whole"}))
    if names and left.names and right.names and names <= {"whole", "number"}:
        return Kind(frozenset({"number"} if isinstance(op, ast.Div) else names))
    return ANYTHING


def read_as(value: Any, kind: Kind, expressions: bool = True) -> Any:
    """Read a value as its setting takes it.

    Args:
        value: text of a command line, or a value of Python.
        kind: what the setting takes.
        expressions: leave text that begins with ``$``, ``@`` or ``%`` as it is.

    Returns:
        ``"false"`` as False for a switch, ``"3"`` and 3.0 as 3 for a whole number, ...

    Raises:
        WrongKind: if the value is of no kind that the setting takes.
    """
    if (
        isinstance(value, dict) and "_target_" in value
    ):  # an object of the config; what it makes is not known here
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, str):
        return value if expressions and value[:1] in ("$", "@", "%") else _read_text(value, kind, expressions)
    if (
        isinstance(value, float)
        and value.is_integer()
        and "whole" in kind.names
        and "number" not in kind.names
    ):
        return int(value)
    if isinstance(value, list | tuple) and "list" in kind.names:
        return [read_as(v, kind.elements, expressions) if kind.elements else v for v in value]
    name = _name_of(value)
    also = {"whole": "number", "null": "object"}.get(name, name)  # an object of a config can be switched off
    other = name == "object" and not isinstance(
        value, dict
    )  # of Python, given to a workflow: a device, a network
    if (
        not kind.names
        or kind.names == {"null"}
        or {name, also} & kind.names
        or (other and "text" in kind.names)
    ):
        return value
    quoted = f"; for this text write '\"{value}\"'" if "text" in kind.names else ""
    raise WrongKind(f"takes {kind}{quoted}")


def _read_text(text: str, kind: Kind, expressions: bool) -> Any:
    names, word = kind.names, text.strip()
    free = not names or names == {"null"}
    if word in _NOTHING and (free or names & {"null", "object"}):
        return None
    if word.lower() in SWITCHES and (free or "switch" in names):
        return SWITCHES[word.lower()]
    if (free or names & {"whole", "number"}) and (number := _number(word)) is not None:
        if free or "number" in names or isinstance(number, int):
            return number
        if number.is_integer():
            return int(number)
    if "list" in names and ("text" not in names or word[:1] == "["):
        inside = kind.elements or ANYTHING
        found = _list_of(word, "text" in inside.names)
        if found is not None:
            return [read_as(v, inside, expressions) for v in found]
    if "object" in names and word[:1] == "{" and isinstance(found := _literal(word), dict):
        return found
    unclear = word in _NOTHING or (
        "null" in names and word.lower() in SWITCHES
    )  # "false" hardly names a file
    if free or ("text" in names and not unclear):
        return text
    raise WrongKind(f"takes {kind}")


def _number(word: str) -> int | float | None:
    if not re.fullmatch(r"[+-]?(\d+[.]?\d*|[.]\d+)(e[+-]?\d+)?|[+-]?inf", word, re.IGNORECASE):
        return None
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def _list_of(word: str, of_text: bool) -> list[Any] | None:
    """``[1, 2]``, ``[a, b]`` or ``a,b``; None for a single number."""
    found = _literal(word)
    if isinstance(found, list | tuple) and all(isinstance(v, str) for v in found) >= of_text:
        return list(found)
    bare = word[1:-1] if (word[:1], word[-1:]) in (("[", "]"), ("(", ")")) else word
    if bare == word and "," not in word and not of_text:
        return None
    return [part.strip().strip("'\"") for part in bare.split(",") if part.strip()]


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return None
