"""Conditions over columns, such as `text_area < 0.05 and camera != 'shake'`: read, checked, and answered for all rows.

They are Python's comparisons (chains too), `and`, `or`, `not`, `+ - * /`, `in ('a', 'b')`, `min`, `max`, `abs` over
column names, numbers and texts, and mean what Python means by them. What is not known stays unknown: where a value is
null or not a number, a comparison is neither true nor false, and `and`, `or`, `not` follow Kleene's logic.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sora_train.config.schema import did_you_mean
from sora_train.errors import ConfigError

NUMBER, TEXT, TRUTH = "a number", "a text", "true or false"
_FEW_NAMES = 40

_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
_JOINED: dict[type[ast.boolop], Callable[[Any, Any], Any]] = {
    ast.And: pc.and_kleene,
    ast.Or: pc.or_kleene,
}
_CALLED: dict[str, Callable[..., Any]] = {
    "min": lambda *values: pc.min_element_wise(*values, skip_nulls=False),
    "max": lambda *values: pc.max_element_wise(*values, skip_nulls=False),
    "abs": pc.abs,
}


@dataclass(frozen=True)
class Condition:
    """One of the parts that a text joins by `and`."""

    text: str
    node: ast.expr
    whole: str
    """The text that it is a part of, with `key`, the setting that holds it, for messages."""
    key: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, in the order of the text."""
        called = {id(node.func) for node in ast.walk(self.node) if isinstance(node, ast.Call)}
        names = [
            node
            for node in ast.walk(self.node)
            if isinstance(node, ast.Name) and id(node) not in called
        ]
        return tuple(
            dict.fromkeys(node.id for node in sorted(names, key=lambda node: node.col_offset))
        )

    @property
    def threshold(self) -> tuple[str, str, float] | None:
        """(column, one of < <= > >=, number) where it compares the two; None for any other form."""
        node = self.node
        if not isinstance(node, ast.Compare) or len(node.ops) > 1:
            return None
        left, operator, right = node.left, type(node.ops[0]), node.comparators[0]
        if isinstance(right, ast.Name):
            left, right, operator = right, left, _TURNED.get(operator, operator)
        number = _number(right)
        if not isinstance(left, ast.Name) or number is None or operator not in _SIGNS:
            return None
        return left.id, _SIGNS[operator], number

    def holds(self, rows: pa.Table) -> pa.ChunkedArray:
        """bool (rows,), null where it is unknown.

        Raises ConfigError for a column that is not there, and for values that do not compare with each other.
        """
        kind, value = _Answer(self, rows).of(self.node)
        if kind != TRUTH:
            raise refused(self, self.node, f"is {kind} where a condition is meant; compare it")
        if isinstance(value, pa.Scalar):
            value = pa.chunked_array([pa.array([value.as_py()] * len(rows), pa.bool_())])
        return value if isinstance(value, pa.ChunkedArray) else pa.chunked_array([value])


_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_SIGNS: dict[type[ast.cmpop], str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


def conditions(text: str, key: str) -> tuple[Condition, ...]:
    """The parts that `text` joins by `and`; none for an empty one. `key` is the setting that holds it.

    Raises ConfigError, which names the place, for what is no condition, whatever the columns.
    """
    whole = " ".join(text.split())
    if not whole:
        return ()
    try:
        tree = ast.parse(whole, mode="eval").body
    except SyntaxError as error:
        place = whole[max(0, (error.offset or 1) - 1) :][:20]
        raise ConfigError(
            f"{key}={whole} cannot be read {f'at {place!r}' if place else 'at its end'}; write a condition such as "
            "motion > 0.02 and camera != 'shake'"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{key}={whole[:60]} cannot be read: it holds a zero byte, or too many conditions in one another"
        ) from error
    found = tuple(
        Condition(ast.get_source_segment(whole, node) or whole, node, whole, key)
        for node in _parts(tree)
    )
    for condition in found:
        _check(condition, condition.node)
    return found


def refused(condition: Condition, node: ast.AST, why: str) -> ConfigError:
    """The error that names the text, the place in it and what is wrong there."""
    place = ast.get_source_segment(condition.whole, node) or condition.text
    return ConfigError(f"{condition.key}={condition.whole}: {place!r} {why}")


def _parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [part for value in node.values for part in _parts(value)]
    return [node]


def _check(condition: Condition, node: ast.expr) -> None:
    """Raises ConfigError for anything that conditions are not made of."""
    allowed: list[ast.expr]
    match node:
        case ast.Name():
            allowed = []
        case ast.Constant(value=value) if isinstance(value, bool | int | float | str):
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise refused(condition, node, "is too large a number")
            allowed = []
        case ast.BoolOp():
            allowed = node.values
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd()):
            allowed = [node.operand]
        case ast.BinOp() if type(node.op) in _COMPUTED:
            allowed = [node.left, node.right]
        case ast.Compare():
            allowed = _compared(condition, node)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _CALLED:
            count = len(node.args)
            if (count != 1) if name == "abs" else (count < 2):
                needs = "one value" if name == "abs" else "two values or more"
                raise refused(condition, node, f"has {count} values; {name} takes {needs}")
            allowed = node.args
        case _:
            raise refused(
                condition,
                node,
                "is not what a condition may hold: column names, numbers, 'texts', < <= > >= == != in, and or not, "
                "+ - * /, min, max, abs",
            )
    for child in allowed:
        _check(condition, child)


def _compared(condition: Condition, node: ast.Compare) -> list[ast.expr]:
    """What a comparison compares; the values of `in (...)` are constants of one kind."""
    allowed = [node.left]
    for operator, right in zip(node.ops, node.comparators, strict=True):
        if type(operator) in _COMPARED:
            allowed.append(right)
            continue
        if not isinstance(operator, ast.In | ast.NotIn):
            raise refused(condition, node, "compares by `is`; write == or !=")
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or len(node.ops) > 1:
            raise refused(
                condition,
                node,
                "needs a list of values behind `in`, for example in ('shake', 'roll')",
            )
        values = right.elts
        texts = [isinstance(v, ast.Constant) and isinstance(v.value, str) for v in values]
        if not all(texts) and (any(texts) or None in map(_number, values)):
            raise refused(condition, right, "must hold only texts or only numbers")
    return allowed


def _number(node: ast.expr) -> float | None:
    """The value of a number as written, its sign included; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        positive = _number(node.operand)
        return None if positive is None else -positive
    value: object = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


@dataclass(frozen=True)
class _Answer:
    """The values of a condition's nodes over a table: (kind, scalar or array)."""

    condition: Condition
    rows: pa.Table

    def of(self, node: ast.expr) -> tuple[str, Any]:
        match node:
            case ast.Name(id=name):
                return self._column(node, name)
            case ast.Constant(value=str() as text):
                return TEXT, pa.scalar(text)
            case ast.Constant(value=bool() as truth):
                return TRUTH, pa.scalar(truth)
            case ast.Constant(value=int() | float() as number):
                return NUMBER, pa.scalar(float(number))
            case ast.BoolOp(op=operator, values=values):
                answers = [self._need(TRUTH, value) for value in values]
                result = answers[0]
                for answer in answers[1:]:
                    result = _JOINED[type(operator)](result, answer)
                return TRUTH, result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return TRUTH, pc.invert(self._need(TRUTH, operand))
            case ast.UnaryOp(op=operator, operand=operand):
                value = self._need(NUMBER, operand)
                return NUMBER, pc.negate(value) if isinstance(operator, ast.USub) else value
            case ast.BinOp(left=left, op=operator, right=right):
                pair = self._need(NUMBER, left), self._need(NUMBER, right)
                return NUMBER, _known(_COMPUTED[type(operator)](*pair))
            case ast.Call(func=ast.Name(id=name), args=args):
                return NUMBER, _CALLED[name](*(self._need(NUMBER, value) for value in args))
            case ast.Compare():
                return TRUTH, self._comparison(node)
        raise AssertionError(f"{ast.dump(node)} was checked")

    def _comparison(self, node: ast.Compare) -> Any:
        result: Any = None
        left_node, (kind, left) = node.left, self.of(node.left)
        for operator, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn):
                return self._membership(left_node, (kind, left), operator, right_node)
            other, right = self.of(right_node)
            if kind != other or (kind == TRUTH and not isinstance(operator, ast.Eq | ast.NotEq)):
                raise refused(self.condition, node, f"compares {kind} with {other}")
            holds = _COMPARED[type(operator)](left, right)
            result = holds if result is None else pc.and_kleene(result, holds)
            left_node, left, kind = right_node, right, other
        return result

    def _membership(
        self, left: ast.expr, found: tuple[str, Any], operator: ast.cmpop, right: ast.expr
    ) -> Any:
        assert isinstance(right, ast.Tuple | ast.List | ast.Set)
        kind, value = found
        holds: Any = pa.scalar(False)
        for element in right.elts:
            other, wanted = self.of(element)
            if kind != other:
                raise refused(self.condition, left, f"is {kind}, and is looked for among {other}s")
            holds = pc.or_kleene(holds, pc.equal(value, wanted))
        return pc.invert(holds) if isinstance(operator, ast.NotIn) else holds

    def _need(self, wanted: str, node: ast.expr) -> Any:
        kind, value = self.of(node)
        if kind != wanted:
            raise refused(self.condition, node, f"is {kind} where {wanted} is needed")
        return value

    def _column(self, node: ast.expr, name: str) -> tuple[str, Any]:
        names = self.rows.schema.names
        if name not in names:
            listed = f"columns: {', '.join(sorted(names)[:_FEW_NAMES])}"
            raise refused(
                self.condition, node, f"is no column; {did_you_mean(name, names) or ''}{listed}"
            )
        column = self.rows[name]
        kind = column.type
        if pa.types.is_boolean(kind):
            return TRUTH, column
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return TEXT, column
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
            return NUMBER, _known(column.cast(pa.float64(), safe=False))
        raise refused(
            self.condition, node, f"holds {kind}; a condition compares numbers, texts, truth values"
        )


def _known(values: Any) -> Any:
    """Numbers with null for what is not a number: a score that is none is not known."""
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)


def values_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """A row's values of these columns, in words: `motion=0.003, camera=shake`."""

    def told(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name}={told(row[name])}" for name in columns)
