"""Check the fields of a request for speech."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import APIError, shown
from .formats import FORMATS, SoundFormat
from .settings import ServeSettings

ARGUMENTS = ("seed", "steps", "solver", "cfg_alpha", "max_frames")  # fields beyond OpenAI's: arguments of TTS.stream
FIELDS = ("model", "input", "voice", "response_format", "stream_format", "speed", "instructions", *ARGUMENTS)


@dataclass(frozen=True)
class SpeechRequest:
    """Holds the checked fields of a request.

    Attributes:
        text: the text to speak.
        voice: name of the voice; None takes the default.
        sound_format: the format of the sound.
        as_events: whether the sound is sent as server-sent events.
        arguments: arguments of :meth:`voxkern.TTS.stream`, not checked yet.
    """

    text: str
    voice: str | None
    sound_format: SoundFormat
    as_events: bool
    arguments: dict[str, Any]


def read_request(body: bytes, settings: ServeSettings) -> SpeechRequest:
    """Return the checked fields of a request's body.

    Raises:
        APIError: the body is no JSON object in UTF-8, or a field is missing, unknown or wrong.
    """
    fields = known_fields(read_object(body), FIELDS)
    check_fields(fields, settings)
    return SpeechRequest(
        text=_text(fields, settings),
        voice=voice_of(fields.get("voice")),
        sound_format=FORMATS[one_of(fields, "response_format", tuple(FORMATS), "mp3")],
        as_events=one_of(fields, "stream_format", ("audio", "sse"), "audio") == "sse",
        arguments={name: fields[name] for name in ARGUMENTS if name in fields},
    )


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body or a message.

    Raises:
        APIError: the body is not a JSON object in UTF-8.
    """
    try:
        fields = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise wrong("invalid_json", None, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise wrong("invalid_json", None, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise wrong("invalid_json", None, f"the body must be a JSON object, got {type(fields).__name__}")
    return fields


def known_fields(fields: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Return the fields that have a value (not null).

    Raises:
        APIError: a field is not one of `known`.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in known:
            raise wrong(
                "unknown_field", name[:80], f"{shown(name)} is not a field of this server: it has {', '.join(known)}"
            )
    return given


def check_fields(fields: dict[str, Any], settings: ServeSettings) -> None:
    """Raise an APIError if the model is unknown, the speed is not 1, or the instructions are not empty."""
    name = fields.get("model")
    if name is not None and name not in settings.model_names:
        message = f"model is {shown(name)}, but this server has {', '.join(settings.model_names)}"
        raise APIError(404, "model_not_found", message, "model")
    if fields.get("speed", 1) != 1 or isinstance(fields.get("speed"), bool):
        raise wrong("unsupported_field", "speed", "speed must be 1: the model cannot change it")
    if fields.get("instructions", "") != "":
        raise wrong("unsupported_field", "instructions", "instructions are not supported: the model takes none")


def _text(fields: dict[str, Any], settings: ServeSettings) -> str:
    if "input" not in fields:
        raise wrong("missing_field", "input", "input is missing: it has the text to speak")
    text = fields["input"]
    if not isinstance(text, str):
        raise wrong("wrong_type", "input", f"input must be a string, got {type(text).__name__}")
    if len(text) > settings.max_chars:
        message = f"input has {len(text)} characters, but this server takes at most {settings.max_chars}"
        raise wrong("input_too_long", "input", message)
    return text


def voice_of(value: Any) -> str | None:
    """Return the name of a voice that is given as a string or, in OpenAI's form, as ``{"id": name}``.

    Raises:
        APIError: the value is neither.
    """
    name = value["id"] if isinstance(value, dict) and value.keys() == {"id"} else value
    if name is not None and not isinstance(name, str):
        raise wrong("wrong_type", "voice", 'voice must be a name, or {"id": name}')
    return name


def one_of(fields: dict[str, Any], name: str, values: tuple[str, ...], default: str) -> str:
    """Return the value of a field that must be one of `values`.

    Raises:
        APIError: the field has another value.
    """
    value = fields.get(name, default)
    if value not in values:
        raise wrong("unsupported_value", name, f"{name} must be one of {', '.join(values)}, got {shown(value)}")
    return str(value)


def wrong(code: str, param: str | None, message: str) -> APIError:
    """Return the error for a request that is wrong."""
    return APIError(400, code, message, param)
