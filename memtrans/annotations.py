"""Type annotations asked at run time: which values they allow, for values that come from files and command lines."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class Kind(NamedTuple):
    """What an annotation such as `int`, `tuple[int, ...] | None` or `Literal["a", "b"]` allows.

    Attributes:
        base: bool, int, float or str. several: a tuple of them. optional: or None.
        choices: the only values allowed; () for all.
    """

    base: type
    several: bool
    optional: bool
    choices: tuple[Any, ...]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself.

    >>> alternatives(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def kind_of(annotation: Any) -> Kind:
    """Takes an annotation apart.

    >>> kind_of(tuple[int, ...] | None)
    Kind(base=<class 'int'>, several=True, optional=True, choices=())
    """
    members = [member for member in alternatives(annotation) if member is not type(None)]
    optional, (member,) = len(members) < len(alternatives(annotation)), members
    if get_origin(member) is Literal:
        choices = get_args(member)
        return Kind(type(choices[0]), False, optional, choices)
    several = get_origin(member) is tuple
    return Kind(get_args(member)[0] if several else member, several, optional, ())


def allows(annotation: Any, value: Any) -> bool:
    """Whether a value is of an annotation. An int is a float; a bool is neither; a list is a tuple, as in JSON.

    >>> allows(float | None, 3), allows(int, True), allows(tuple[int, ...], [1, 2])
    (True, False, True)
    """
    return any(_allows(member, value) for member in alternatives(annotation))


def _allows(annotation: Any, value: Any) -> bool:
    origin = get_origin(annotation) or annotation
    if origin is Any:
        return True
    if origin is Literal:
        return value in get_args(annotation)
    if origin in (None, type(None)):
        return value is None
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is not str and issubclass(origin, Collection):  # whatever the kind: JSON has lists alone
        members = [member for member in get_args(annotation) if member is not ...]
        return isinstance(value, (list, tuple)) and all(allows(members[0], each) for each in value)
    return isinstance(value, origin)


def described(annotation: Any) -> str:
    """An annotation as an error names it.

    >>> described(int), described(tuple[int, ...] | None)
    ('int', 'tuple[int, ...] | None')
    """
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
