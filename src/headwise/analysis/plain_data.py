"""Dataclasses out of plain data, as JSON keeps them: the inverse of `dataclasses.asdict`."""

from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_plain(kind: type[T], value: Any) -> T:
    """A value of that kind: a dataclass with fields of plain types, lists, dicts, dataclasses.

    Where earlier versions wrote fields in another way, a class has a function `of_earlier` that
    takes them and gives those of today.

    Raises:
        ValueError: Naming the field that is missing, unknown or of another type.
    """
    return _made(kind, value, kind.__name__)


def _made(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        kinds = [part for part in parts if part is not NoneType]
        (kind, *_) = [x for x in kinds if is_dataclass(x) == isinstance(value, dict)] or kinds
        return _made(kind, value, where)
    if is_dataclass(kind):
        return _dataclass(kind, _checked(dict, value, where), where)
    if origin is list:
        items = enumerate(_checked(list, value, where))
        return [_made(parts[0], item, f"{where}[{index}]") for index, item in items]
    if origin is dict:
        pairs = _checked(dict, value, where).items()
        return {key: _made(parts[1], item, f"{where}[{key!r}]") for key, item in pairs}
    return _checked(kind, value, where)


def _dataclass(kind: Any, fields: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    fields = getattr(kind, "of_earlier", dict)(fields)
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}")
    values = {name: _made(hints[name], x, f"{where}.{name}") for name, x in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where} lacks a field: {error}") from error


def _checked(kind: type, value: Any, where: str) -> Any:
    # JSON writes a whole float as it is written, and in Python a bool is an int.
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is a {type(value).__name__}; it must be a {kind.__name__}")
    return value
