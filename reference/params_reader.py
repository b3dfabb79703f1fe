"""A reader that fills dataclasses from the dict of a ``params.json``, and reports all problems in one error."""

import dataclasses
import typing
from typing import Any


class ConfigError(ValueError):
    """The error for a ``params.json`` that is incomplete or contradictory, or that describes an unsupported model."""


class ParamsReader:
    """Reads values from a params dict and collects the problems, so that one error names all of them.

    Attributes:
        missing: full names of the required keys that are missing.
        wrong: descriptions of the other problems.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def section(self, parent: dict[str, Any], path: str) -> dict[str, Any]:
        """Return the JSON object at `path`: the value of the last key of `path` in `parent`.

        If the value is missing or is not an object, the problem is recorded and an empty dict is returned.

        Args:
            parent: the JSON object that has the last key of `path`.
            path: all keys from the top level, joined by dots, for messages.
        """
        value = parent.get(path.rsplit(".", 1)[-1])
        if isinstance(value, dict):
            return value
        self.missing.append(path) if value is None else self.wrong.append(f"{path} must be a JSON object")
        return {}

    def read(self, cls: type, args: dict[str, Any], prefix: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read the values for the fields of a dataclass, and record the missing and wrong ones.

        A number must not be negative. A field with a default may be missing.

        Args:
            cls: the dataclass; a value must have the type of its field's hint, but an int is accepted for a float.
            args: the JSON object to read.
            prefix: path of `args` for messages, with a dot at its end; empty at the top level.
            skip: fields to leave out.

        Returns:
            The values by field name, without the skipped, missing and wrong fields.
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
        """Record each key that has a value which voxkern does not support.

        If such a key were ignored, the model would be computed wrongly.

        Args:
            params: the whole dict.
            audio: its object ``multimodal.audio_model_args``.
            codec: its object ``multimodal.audio_tokenizer_args``.
            acoustic: the object ``acoustic_transformer_args`` of `audio`.
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
        """Raise a ConfigError that names all recorded problems, if any were recorded."""
        parts = []
        if self.missing:
            parts.append("missing keys: " + ", ".join(self.missing))
        if self.wrong:
            parts.append("; ".join(self.wrong))
        if parts:
            raise ConfigError("params.json: " + "; ".join(parts))
