"""Checks of the public boundary: each error names the argument, its value and what was expected."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# What a memory's keys and values may be stored as.
STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Slots of a memory row: kernels number them in 32 bits, and the sum of two such numbers is still one.
MOST_SLOTS = 1 << 30
# Entries ever stored in a row: adding a segment's length to such a number does not overflow.
MOST_ENTRIES = 1 << 62
MOST_REMEMBERED = 4096  # combinations of shapes that a check remembers


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """Makes a check of kinds and shapes run once for each combination of them, and never again when it was passed.

    check: looks at shapes, dtypes and devices of tensors, at the values of other arguments, and at nothing else.

    >>> @remembered
    ... def check(tensor: Tensor, low: int) -> None:
    ...     print("looking")
    >>> check(torch.ones(2), 1), check(torch.zeros(2), 1), check(torch.ones(3), 1)
    looking
    looking
    (None, None, None)
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        try:
            # in one expression, for it is made in every call of an operator
            signature = tuple(
                [
                    (one.shape, one.dtype, one.device) if isinstance(one, Tensor) else (type(one), one)
                    for one in arguments
                ]
            )  # True is no 1, 2.0 no 2
            if signature in passed:
                return None
        except TypeError:  # what has no hash: a list where a tensor belongs, a symbolic size
            return check(*arguments)
        check(*arguments)
        if len(passed) >= MOST_REMEMBERED:
            passed.clear()
        passed.add(signature)

    return checked


class Letters:
    """Binds the legend's shape letters to sizes, argument by argument; a size that disagrees raises ValueError.

    >>> import torch
    >>> letters = Letters()
    >>> letters.bind("query", torch.zeros(2, 3), "N D")
    >>> letters["D"]
    3
    >>> letters.bind("key", torch.zeros(5, 4), "L D")
    Traceback (most recent call last):
        ...
    ValueError: key must have shape (L, D) with D=3, got (5, 4)
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = dict(sizes)

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def bind(self, name: str, tensor: Tensor, axes: str) -> None:
        """Binds the axes of `tensor`, named by different letters such as "B H N D", or raises ValueError.

        A plain loop, for a compiler that traces a model goes through every one of these steps.
        """
        if not isinstance(tensor, Tensor):
            raise _no_tensor(name, tensor)
        letters, shape, sizes, bound = axes.split(), tuple(tensor.shape), self.sizes, len(self.sizes)
        fits = len(shape) == len(letters)
        for letter, size in zip(letters, shape, strict=False):
            fits = sizes.setdefault(letter, size) == size and fits
        if not fits:
            before = list(sizes)[:bound]
            known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in before)
            expected = f"({', '.join(letters)})" + (f" with {known}" if known else "")
            raise ValueError(f"{name} must have shape {expected}, got {shape}")


def groups(letters: Letters) -> None:
    """Raises ValueError unless the rows are B·G for some G, and the query heads H a multiple of G."""
    divides(letters["B"], "B", letters["B·G"], "the number of rows")
    divides(letters["B·G"] // letters["B"], "G", letters["H"], "the number of query heads")


def writable(name: str, tensor: Tensor) -> None:
    """Raises ValueError if `tensor` cannot be written in place: it needs a gradient, or two numbers share a place."""
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient, for it is written in place: give {name}.detach()")
    if not tensor.is_contiguous() and _overlaps(tensor):
        raise ValueError(
            f"{name} must have a place in memory for each of its numbers, for it is written in place, "
            f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share a place: an axis steps over less than the axes inside it reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def few_slots(name: str, slots: int) -> None:
    """Raises ValueError if a row has more slots, M + S, than kernels can number."""
    if slots > MOST_SLOTS:
        raise ValueError(f"{name} must have at most {MOST_SLOTS} slots in a row, got {slots}")


def tensors(**arguments: Any) -> None:
    """Raises TypeError unless every argument is a tensor; a list or an array of NumPy is none."""
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise _no_tensor(name, argument)


def _no_tensor(name: str, argument: Any) -> TypeError:
    return TypeError(f"{name} must be a torch.Tensor, got {type(argument).__name__}")


def _given(arguments: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """The arguments that are not None, which all must be tensors."""
    for name, argument in arguments.items():
        if argument is None:
            continue
        if not isinstance(argument, Tensor):
            raise _no_tensor(name, argument)
        yield name, argument


def floating(**arguments: Tensor | None) -> None:
    """Raises TypeError unless every tensor holds floating-point numbers; None stands for an argument not given."""
    for name, tensor in _given(arguments):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def typed(dtype: torch.dtype, **arguments: Tensor | None) -> None:
    """Raises TypeError unless every tensor has this dtype; None stands for an argument not given."""
    for name, tensor in _given(arguments):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def same_device(device: torch.device, **arguments: Tensor | None) -> None:
    """Raises ValueError unless every tensor is on this device; None stands for an argument not given."""
    for name, tensor in _given(arguments):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def may_look(tensor: Tensor, validate: bool = False) -> bool:
    """Whether values may be looked at: not while tracing, and off the CPU (a host round trip) only on request."""
    return not torch.compiler.is_compiling() and tensor.numel() > 0 and (tensor.device.type == "cpu" or validate)


def within(name: str, tensor: Tensor | None, low: int, high: int | None = None) -> None:
    """Raises ValueError if a number is outside [low, high], where `may_look` allows to look; `high` may be None."""
    if tensor is None or not may_look(tensor):
        return
    least, most = _range(tensor)
    if least < low or (high is not None and most > high):
        expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
        got = tensor.tolist() if tensor.numel() <= 100 else f"{least} to {most}"
        raise ValueError(f"{name} must be {expected}, got {got}")


def entries(name: str, tensor: Tensor | None) -> None:
    """Raises ValueError if a number of entries is negative or above MOST_ENTRIES, where `may_look` allows to look."""
    within(name, tensor, 0)
    if tensor is not None and may_look(tensor) and (most := _range(tensor)[1]) > MOST_ENTRIES:
        raise ValueError(f"{name} must be at most 2^62 = {MOST_ENTRIES}, got {most}")


def _range(tensor: Tensor) -> tuple[int, int]:
    least, most = tensor.aminmax()
    return int(least), int(most)


def distinct(name: str, tensor: Tensor) -> None:
    """Raises ValueError if a number comes twice, where `may_look` allows to look."""
    if may_look(tensor) and tensor.unique().numel() < tensor.numel():
        raise ValueError(f"{name} must be different numbers, got {tensor.tolist()}")


def best_first(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless numbers fall along the last axis, where `may_look` allows to look."""
    if may_look(tensor) and bool((tensor[..., 1:] > tensor[..., :-1]).any()):
        raise ValueError(f"{name} must be best first along the last axis, got larger ones behind smaller ones")


def integer(name: str, value: Any, low: int | None = None) -> int:
    """Returns `value` as an int. Raises TypeError if it is no integer, ValueError if it is below `low`.

    >>> integer("k", 3, low=1)
    3
    >>> integer("k", 2.0)
    Traceback (most recent call last):
        ...
    TypeError: k must be an integer, got 2.0
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    number = value if is_int else _index(name, value)  # the compiler's symbolic ints must not be asked for attributes
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def _index(name: str, value: Any) -> int:
    """The integer that something else than an int is; a truth value is none."""
    is_truth = isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool
    try:
        if not is_truth:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def probability(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def dropout(dropout_p: Any, seed: Tensor | None) -> None:
    """Raises ValueError or TypeError unless `dropout_p` is in [0, 1), and `seed` () int64 where dropout needs one.

    >>> dropout(0.1, torch.tensor([1]))
    Traceback (most recent call last):
        ...
    ValueError: seed must have shape (), got (1,)
    """
    probability("dropout_p", dropout_p)
    if seed is None:
        if dropout_p > 0.0:
            raise ValueError("seed must be an int64 tensor when dropout_p > 0, got None")
        return
    Letters().bind("seed", seed, "")
    typed(torch.int64, seed=seed)


def positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is None or a finite number above 0; a truth value is none."""
    is_number = isinstance(value, Real) and value is not True
    if value is not None and not (is_number and 0.0 < float(value) < math.inf):
        raise ValueError(f"{name} must be a finite number above 0, or None, got {value!r}")


def stored(**dtypes: torch.dtype | None) -> None:
    """Raises TypeError unless a memory can store its entries in each of these dtypes."""
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in STORED:
            raise TypeError(f"{name} must be one of {', '.join(map(str, STORED))}, got {dtype!r}")


def divides(divisor: int, divisor_name: str, number: int, number_name: str) -> None:
    """Raises ValueError unless `number` is a positive multiple of `divisor`.

    >>> divides(2, "G", 0, "H")
    Traceback (most recent call last):
        ...
    ValueError: H must be a positive multiple of G=2, got 0
    """
    if divisor <= 0 or number <= 0 or number % divisor:
        raise ValueError(f"{number_name} must be a positive multiple of {divisor_name}={divisor}, got {number}")
