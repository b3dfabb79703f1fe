"""Send the response to one request: a sound, server-sent events, or an error."""

import base64
import json
import secrets
from typing import Any

from starlette.types import Receive, Scope, Send

from .errors import APIError


class Reply:
    """Sends the response to one request, in parts.

    Attributes:
        id: the request's name in the log and in the header ``x-request-id``.
        status: the HTTP status that was sent, or 0.
        headers: headers of a sound; an error has its own.
        as_events: whether the sound is sent as server-sent events, in OpenAI's form.
    """

    def __init__(self, send: Send) -> None:
        self.id, self.status = secrets.token_hex(8), 0
        self.headers: dict[str, str] = {}
        self.as_events = False
        self._send = send

    async def sound(self, sound: bytes) -> None:
        """Send a part of the sound, unless it is empty."""
        if sound and self.as_events:
            await self._event({"type": "speech.audio.delta", "audio": base64.b64encode(sound).decode()})
        elif sound:
            await self._part(sound)

    async def done(self, event: dict[str, Any]) -> None:
        """End the response; as server-sent events, `event` comes before the end."""
        if self.as_events:
            await self._event(event)
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: APIError, scope: Scope, receive: Receive) -> None:
        """Send an error.

        After a part of the sound, the error is an event. If the sound is not sent as events, the body gets no end, so
        that the client sees that it is incomplete.
        """
        if not self.status:
            self.status = error.status
            error.headers["x-request-id"] = self.id
            await error.response()(scope, receive, self._send)
        elif self.as_events:
            await self.done({"type": "speech.audio.error"} | error.json())

    async def _event(self, event: dict[str, Any]) -> None:
        await self._part(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    async def _part(self, body: bytes) -> None:
        if not self.status:
            self.status = 200
            headers = {"x-request-id": self.id, "cache-control": "no-store"} | self.headers
            fields = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": fields})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
