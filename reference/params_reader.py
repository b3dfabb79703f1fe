"""A reader that fills dataclasses from the dict of a ``params.json``, and reports all problems in one error."""

import dataclasses
import re
import typing
from collections import defaultdict
from typing import Any

from .params_schema import DEFAULT_RANGES, FORMATS_ON_DISK, MAX_STAGE_VALUE, MAX_STAGES, OTHER_KEYS, RANGES, TOP

NUMBERS = re.compile(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*")


class ConfigError(ValueError):
    """The error for a ``params.json`` that is incomplete or contradictory, or that describes an unsupported model."""


class ParamsReader:
    """Reads values from a params dict and collects the problems, so that one error names all of them.

    A section is a JSON object, named by the keys that lead to it, joined by dots; the name of the whole dict is "". A
    key with the value null counts as absent. :meth:`check_other_keys` records every key that is not known.

    Attributes:
        missing: full names of the required keys that are missing.
        wrong: descriptions of the other problems.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self._sections = {TOP: _without_nulls(params)}
        self._read: dict[str, set[str]] = defaultdict(set)

    def open(self, section: str, required: bool = True) -> None:
        """Open a section, so that its keys can be read and are checked. Its parent must have been opened before.

        A problem is recorded if the value is not a JSON object, or if the section is required and missing.
        """
        parent, _, key = section.rpartition(".")
        value = self.get(parent, key)
        if isinstance(value, dict):
            self._sections[section] = _without_nulls(value)
        elif value is not None:
            self.wrong.append(f"{section} must be a JSON object, got {shown(value)}")
        elif required and parent in self._sections:
            self.missing.append(section)

    def get(self, section: str, key: str) -> Any:
        """Return the unchecked value of a key, or None if the key is absent or its section is not open."""
        self._read[section].add(key)
        return self._sections.get(section, {}).get(key)

    def value(self, section: str, key: str, kind: type) -> Any:
        """Return the value of a key, or None if the value is absent or wrong; a wrong value is recorded.

        Args:
            section: the key's section.
            key: the key.
            kind: the type that the value must have, but an int is accepted for a float. A number must lie in the key's
                range. A string must be a codec's list of numbers for its stages, such as "2,2,2,1".
        """
        value = self.get(section, key)
        if value is None:
            return None
        problem = _problem(value, key, kind)
        if problem:
            self.wrong.append(f"{_path(section, key)} {problem}, got {shown(value)}")
            return None
        return kind(value)

    def read(self, cls: type, section: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read the values for the fields of a dataclass, and record the missing and wrong ones.

        A field with a default may be missing. If the section is not open, nothing is read or recorded.

        Args:
            cls: the dataclass; the type hint of a field is the `kind` of :meth:`value`.
            section: the section that has the fields as keys.
            skip: fields to leave out.

        Returns:
            The values by field name, without the skipped, missing and wrong fields.
        """
        if section not in self._sections:
            return {}
        kinds = typing.get_type_hints(cls)
        fields = [field for field in dataclasses.fields(cls) if field.name not in skip]
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        self.missing += [_path(section, name) for name in required if self.get(section, name) is None]
        values = {field.name: self.value(section, field.name, kinds[field.name]) for field in fields}
        return {name: value for name, value in values.items() if value is not None}

    def names(self, section: str, key: str) -> tuple[str, ...]:
        """Return the names that a key has, in lower case; none if the key is absent.

        The value is an array of names, or an object that maps names to the integers by which the names are sorted. A
        wrong value is recorded.
        """
        value = self.get(section, key)
        if value is None:
            return ()
        numbers = value.values() if isinstance(value, dict) else ()
        if (
            not isinstance(value, dict | list)
            or not all(isinstance(name, str) for name in value)
            or not all(type(number) is int for number in numbers)
        ):
            self.wrong.append(
                f"{_path(section, key)} must be an array of names or an object that maps names to integers, "
                f"got {shown(value)}"
            )
            return ()
        names = sorted(value, key=value.__getitem__) if isinstance(value, dict) else value
        return tuple(name.lower() for name in names)

    def check_only(self, section: str, key: str, only: Any) -> None:
        """Record a problem if a key has another value than `only`, the one that voxkern supports."""
        value = self.get(section, key)
        if value is not None and not (_is_kind(value, type(only)) and value == only):
            self.wrong.append(f"{_path(section, key)} = {shown(value)} is not supported (only {only!r})")

    def quantization(self) -> str | None:
        """Return the name of the weights' 8-bit format, or None if the weights are not quantised.

        The weights are not quantised if the value is null or "NO_SCALES", or an object with only these values. With a
        format, `qscheme_act` may be "TENSOR", which has no effect, because activations are not quantised. Every other
        value is recorded as a problem.
        """
        value = self.get(TOP, "quantization")
        parts = value if isinstance(value, dict) else {"": value}
        given = {key: part for key, part in parts.items() if part not in (None, "NO_SCALES")}
        weights, activations = given.pop("qformat_weight", None), given.pop("qscheme_act", None)
        format_ = FORMATS_ON_DISK.get(weights) if isinstance(weights, str) else None
        schemes = (None, "TENSOR") if format_ else (None,)
        if given or (weights is not None and not format_) or activations not in schemes:
            formats = " or ".join(FORMATS_ON_DISK)
            self.wrong.append(
                f"quantization = {shown(value)} is not supported (only null, 'NO_SCALES', or a qformat_weight of "
                f"{formats} with a qscheme_act of null, 'NO_SCALES' or 'TENSOR')"
            )
        return format_

    def check_other_keys(self) -> None:
        """Check the keys in the open sections that were not read; an unknown one is recorded as a problem.

        If such a key were ignored, the model might be computed wrongly.
        """
        for section, args in self._sections.items():
            for key, only in OTHER_KEYS[section].only.items():
                self.check_only(section, key, only)
            for key, kind in OTHER_KEYS[section].harmless.items():
                self.value(section, key, kind)
            self.wrong += [
                f"{_path(section, key)} is unknown and may change what the model computes (remove it if it does not)"
                for key in args
                if key not in self._read[section]
            ]

    def raise_problems(self) -> None:
        """Raise a ConfigError that names all recorded problems, if any were recorded."""
        parts = []
        if self.missing:
            parts.append("missing keys: " + ", ".join(self.missing))
        if self.wrong:
            parts.append("; ".join(self.wrong))
        if parts:
            raise ConfigError("params.json: " + "; ".join(parts))


def shown(value: Any) -> str:
    """Return the ``repr`` of a value for a message, shortened to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # repr refuses integers of more than 4300 digits
        return "a value that is too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _without_nulls(args: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if value is not None}


def _path(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _is_kind(value: Any, kind: type) -> bool:
    """Return whether `value` has the type `kind`; a bool is no int, but an int is accepted for a float."""
    return type(value) is kind or (kind is float and type(value) is int)


def _problem(value: Any, key: str, kind: type) -> str:
    """Return what a value must be if it is wrong, see :meth:`ParamsReader.value`; otherwise an empty string."""
    if not _is_kind(value, kind):
        return f"must be {kind.__name__}"
    if kind is str and not _is_stages(value):
        return f"must be 1 to {MAX_STAGES} integers in 1..{MAX_STAGE_VALUE}, joined by commas"
    if kind in DEFAULT_RANGES:
        low, high = RANGES.get(key, DEFAULT_RANGES[kind])
        if not low <= value <= high:  # true for NaN, and exact for integers of any size
            return f"must lie in {low:.10g}..{high:.10g}"
    return ""


def _is_stages(text: str) -> bool:
    if not NUMBERS.fullmatch(text):
        return False
    numbers = [int(part) for part in text.split(",")]
    return len(numbers) <= MAX_STAGES and all(1 <= number <= MAX_STAGE_VALUE for number in numbers)
