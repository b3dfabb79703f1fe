"""Checks of arguments that several calls share."""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


def check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise unless `value` is an integer of at least `low`, and of at most `high` if there is one.

    Raises:
        TypeError: it is none.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be {f'in {low}..{high}' if high is not None else f'at least {low}'}, got {value}"
        )


def per_text(name: str, value: T | Sequence[T], n: int) -> Sequence[T]:
    """One value for each of `n` texts: a list's own, or the same for all.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, list):
        return [cast(T, value)] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries for {n} texts")
    return value
