"""Reading of dataclasses from the dict of a ``params.json``, with one error for all problems."""

import dataclasses
import typing
from typing import Any


class ConfigError(ValueError):
    """Raised if a ``params.json`` is incomplete or contradictory, or describes a model that voxkern does not run."""


class ParamsReader:
    """Reads values from a params dict and collects its problems, so that one error names them all.

    Attributes:
        missing: full names of the required keys that are missing.
        wrong: descriptions of the other problems.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def section(self, parent: dict[str, Any], path: str) -> dict[str, Any]:
        """Return the JSON object that `parent` has under the last key of `path`.

        If it is missing or not an object, the problem is recorded and the result is empty.
        """
        value = parent.get(path.rsplit(".", 1)[-1])
        if isinstance(value, dict):
            return value
        self.missing.append(path) if value is None else self.wrong.append(f"{path} must be an object")
        return {}

    def read(self, cls: type, args: dict[str, Any], prefix: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read the fields of a dataclass and record missing and wrong values.

        Args:
            cls: the dataclass; a field's type hint is the type that its value must have.
            args: the JSON object to read.
            prefix: path of `args` for messages, with a dot at its end; empty at the top level.
            skip: fields to leave out.

        Returns:
            The values by field name, without the fields that are absent or wrong.
        """
        kinds = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in skip:
                continue
            value = args.get(field.name)
            if value is None:
                if field.default is dataclasses.MISSING:
                    self.missing.append(prefix + field.name)
                continue
            kind = kinds[field.name]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                self.wrong.append(f"{prefix}{field.name} must be {kind.__name__}, got {value!r}")
            elif kind in (int, float) and value < 0:
                self.wrong.append(f"{prefix}{field.name} must not be negative, got {value!r}")
            else:
                values[field.name] = value
        return values

    def unsupported(
        self, params: dict[str, Any], audio: dict[str, Any], codec: dict[str, Any], acoustic: dict[str, Any]
    ) -> None:
        """Record keys with values that voxkern does not run.

        These keys cannot be ignored, because the model would be computed wrongly.
        """
        checks: list[tuple[dict[str, Any], str, Any]] = [
            (params, "use_biases", False),
            (params, "causal", True),
            (params, "sliding_window", None),
            (params, "qk_norm", False),
            (acoustic, "use_biases", acoustic.get("kind") == "adaln_mlp"),
            (audio, "input_embedding_concat_type", "sum"),
            (audio.get("audio_encoding_args") or {}, "codebook_pattern", "parallel"),
            (codec, "use_biases", False),
            (codec, "causal", True),
            (codec, "qk_norm", True),
            (codec, "layer_scale", True),
            (codec, "conv_weight_norm", True),
            (codec, "channels", 1),
        ]
        for args, key, only in checks:
            if args.get(key, only) != only:
                self.wrong.append(f"{key} = {args[key]!r} is not supported (only {only!r})")

    def raise_problems(self) -> None:
        """Raise ConfigError if any key was missing or wrong."""
        parts = []
        if self.missing:
            parts.append("missing keys: " + ", ".join(self.missing))
        if self.wrong:
            parts.append("; ".join(self.wrong))
        if parts:
            raise ConfigError("params.json: " + "; ".join(parts))
