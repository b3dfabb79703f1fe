"""The names and limits of a server."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reference.train.data import WORDS

DEMO_NAME = "voxkern-demo"  # the demo voice's name in requests


@dataclass(frozen=True)
class ServeSettings:
    """Holds the names and limits of a server. Flags of ``voxkern serve`` set all of them except `words`.

    Attributes:
        model_names: the names by which requests may call the model; the page shows the first.
        max_waiting: the most requests that wait for a slot.
        max_chars: the most characters of a request's text.
        max_body: the most bytes of a request's body.
        body_seconds: the most seconds that a body may take to arrive.
        request_seconds: the most seconds from a request's headers to the last byte of its sound. A session's utterance
            may be open for the same time.
        shutdown_seconds: the most seconds that running requests may take after SIGTERM.
        max_sessions: the most WebSocket sessions that are open.
        idle_seconds: the most seconds between two messages of a session for which nothing is left to send.
        api_key: the key that requests must have; None accepts all requests.
        words: the words that the model can speak, for the page; empty if it speaks any text.
    """

    model_names: tuple[str, ...]
    max_waiting: int = 64
    max_chars: int = 4096
    max_body: int = 1_000_000
    body_seconds: float = 10.0
    request_seconds: float = 600.0
    shutdown_seconds: float = 30.0
    max_sessions: int = 256
    idle_seconds: float = 60.0
    api_key: str | None = field(default=None, repr=False)
    words: tuple[str, ...] = ()


def settings_for(source: str | None, names: Sequence[str] = (), **limits: Any) -> ServeSettings:
    """Return the settings for a model.

    Args:
        source: a checkpoint folder or a hub id; None is the demo voice, which can speak certain words only.
        names: the names by which requests may call the model; by default, the last part of `source`.
        **limits: other fields of :class:`ServeSettings`.
    """
    usual = DEMO_NAME if source is None else source.rstrip("/").rpartition("/")[2]
    return ServeSettings(tuple(names) or (usual,), words=WORDS if source is None else (), **limits)
