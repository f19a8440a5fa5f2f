"""What the file of a memory says of itself: looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

from torch import Tensor

from memtrans.annotations import allows, described

Method = TypeVar("Method", bound=Callable[..., Any])

ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("dim", "max_memories", "num_indices", "kv_heads", "value_dim"), int),
    "spare": int | Literal["grow"],
    "keep_ids": bool,
    **dict.fromkeys(("dtype", "value_dtype"), str | None),
}


class _OfClassAlone(classmethod):
    """A classmethod that an instance refuses to call: what it makes would be lost."""

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        if instance is None:
            return super().__get__(None, owner)
        kind, name = type(instance).__name__, self.__func__.__name__

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise TypeError(
                f"{name} must be called on the class, which makes a new object, got a {kind}: write "
                f"{kind}.{name}(path), or load_state_dict(state) to replace what this one holds"
            )

        return refuse


def of_class_alone(method: Method) -> Method:
    """Lets a classmethod be called on the class alone; on an instance it raises TypeError."""
    return _OfClassAlone(method.__func__)  # type: ignore[attr-defined, return-value]


def check_configuration(configuration: Mapping[str, Any], keys: Tensor) -> None:
    """Raises ValueError for a file whose configuration is of other types, or of more documents than it holds.

    keys: (R, entries, D), of the file.
    """
    for name, value in configuration.items():
        if name not in ARGUMENTS:
            raise ValueError(f"configuration must hold {', '.join(ARGUMENTS)}, got {name}")
        if not allows(ARGUMENTS[name], value):
            raise ValueError(f"{name} must be of type {described(ARGUMENTS[name])}, got {value!r} in the file")
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise ValueError(f"{name} must be in [0, {2**63}), got {value} in the file")
    if "dim" not in configuration:
        raise ValueError("configuration must hold dim, got none")
    rows = configuration.get("num_indices", 1) * configuration.get("kv_heads", 1)
    if keys.dim() != 3 or len(keys) != rows:
        raise ValueError(f"the file must hold keys of {rows} rows, as it says, got shape {tuple(keys.shape)}")


def check_layers(layers: Any, state: Mapping[str, Tensor]) -> int:
    """How many memories a list's file holds. Raises ValueError when it says another number."""
    named = {name.partition(".")[0] for name in state}
    if not allows(int, layers) or layers != len(named) or not {"0.keys", "0.values"} <= set(state):
        raise ValueError(f"layers must be as many as the file holds memories, {len(named)}, got {layers!r}")
    return int(layers)
