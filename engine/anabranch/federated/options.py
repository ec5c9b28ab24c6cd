"""Settings from texts and TOML: each value as its dataclass declares it, and clear words where it is not."""

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

S = TypeVar("S")
TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


def make(cls: type[S], given: Mapping[str, Any], *, what: str) -> S:
    """A settings dataclass from values by name: texts (`lr=0.1`) or numbers, lists and booleans as TOML has them.

    Settings within settings are named with a dot, or given as a table. ValueError for names that it does not have.
    """
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    nested = {name: held for name, hint in hints.items() if name in known and (held := _dataclass_in(hint))}
    values: dict[str, Any] = {}
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        if outer not in known or (inner and outer not in nested):
            own = (f"{field}.NAME" if field in nested else f"{field} ({default_of(known[field])})" for field in known)
            listed = ", ".join(own) or "none"
            raise ValueError(f"{what} has no option {name!r}; its options are {listed}")
        if outer in nested and not inner and not isinstance(value, Mapping):
            raise ValueError(f"{what}: {name} has options of its own, as {name}.NAME=VALUE, got {value!r}")
        if outer in nested:
            values.setdefault(outer, {}).update({inner: value} if inner else value)
        else:
            values[name] = typed(hints[name], value, what=f"{what}: {name}")
    for name in nested.keys() & values.keys():
        values[name] = make(nested[name], values[name], what=f"{what}: {name}")
    try:
        return cls(**values)
    except TypeError as error:  # an option without a default
        raise ValueError(f"{what}: {error}") from error


def _dataclass_in(hint: Any) -> type[Any] | None:
    """A type of settings, or what else than None there may be."""
    return next((one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)), None)


def typed(hint: Any, value: Any, *, what: str) -> Any:
    """A value of a declared type. ValueError names the type."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        (hint,) = (one for one in inside if one is not type(None))
        return typed(hint, value, what=what)
    if origin is Literal:
        if value not in inside:
            raise ValueError(f"{what} must be one of {list(inside)}, got {value!r}")
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
        each = inside[:1] * len(parts) if inside[-1] is Ellipsis else inside
        if len(each) == len(parts) > 0:
            return tuple(typed(one, part, what=what) for one, part in zip(each, parts, strict=True))
    elif hint is bool:
        if isinstance(value, bool) or str(value).lower() in TRUTHS:
            return value if isinstance(value, bool) else TRUTHS[value.lower()]
    elif isinstance(value, (int, float, str, Path)) and not isinstance(value, bool):
        try:
            if hint is not int or isinstance(value, (int, str)):
                return hint(value)
        except ValueError:
            pass
    raise ValueError(f"{what} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def pairs_of(texts: Iterable[str]) -> dict[str, str]:
    """`name=value` texts by name."""
    given = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"an option is written NAME=VALUE, got {text!r}")
        given[name.strip().replace("-", "_")] = value.strip()
    return given


def default_of(field: "Field[Any]") -> Any:
    """What a field is if nobody says."""
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else "no default"
