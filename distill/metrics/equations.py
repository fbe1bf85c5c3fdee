"""The value of an equation that a model wrote. The text is never given to `eval`."""

import ast
import math
import operator
import re

# The limits bound the parser's time and memory, whatever the text.
_CHARACTERS = frozenset("0123456789.+-*/() ")
_MAX_CHARACTERS = 200
_MAX_NODES = 100
_MAX_VALUE = 1e15
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_BOOLEAN = re.compile(r"\b(?:and|or)\b")
_SIGNS = str.maketrans("×·÷−–", "**/--", "$€£")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def equation_value(text: str, *, reference: bool = False) -> float | None:
    """Returns the value of an arithmetic expression, or None where it is not one.

    Allowed: decimal numbers, + - * /, unary minus, parentheses and spaces; at most 200 characters
    and 100 syntax nodes; every number and intermediate value below 1e15 in size. Within that it is
    the value that Python gives; a division by zero has none.

    Args:
      text: for example `( 84.0 / 2.0 )`; surrounding whitespace does not matter.
      reference: also `and` and `or`, as the published scoring (Hsieh et al. 2023) took them with
        `eval`: to Python `(29/2) and (30/2)` is `30/2`.
    """
    text = text.strip()
    if not text or len(text) > _MAX_CHARACTERS:
        return None
    if not _CHARACTERS.issuperset(_BOOLEAN.sub("", text) if reference else text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
            return None
        return float(_value(tree.body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    """Returns the value of a syntax node; ValueError for anything that is not arithmetic."""
    # type(), not isinstance: `...` is a Constant too, and True would be an int.
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.BoolOp):
        stops_at = isinstance(node.op, ast.Or)
        for operand in node.values:
            value = _value(operand)
            if bool(value) == stops_at:
                break
    else:
        raise ValueError(type(node).__name__)
    if not abs(value) < _MAX_VALUE:
        raise ValueError("too large")
    return value


def plain_arithmetic(text: str) -> str:
    """Returns a text with the signs of `equation_value`: `$1,210 × 4` becomes `1210 * 4`."""
    return _THOUSANDS.sub("", text.translate(_SIGNS))


def same_value(a: float | None, b: float | None) -> bool:
    """Returns whether two values are equal within 1e-6 relative or 1e-9 absolute; None is not."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
