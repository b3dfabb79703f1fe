"""Errors in OpenAI's JSON form."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response


class APIError(Exception):
    """An error that a client receives as JSON.

    Attributes:
        status: the HTTP status.
        code: the error's short name, such as ``unknown_voice``.
        param: the field that is wrong, or None.
        headers: more headers of the response.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def json(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's API reference."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the error as a response."""
        content = json.dumps(self.json())  # in ASCII, because a message may have a lone surrogate
        return Response(content, self.status, self.headers, "application/json")


async def http_error(request: Request, error: Exception) -> Response:
    """Return the response for an error of the routes: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "unknown_method"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return APIError(error.status_code, code, message, headers=error.headers).response()


def no_sound() -> APIError:
    """Return the error for speech without sound."""
    return APIError(500, "no_sound", "the model generated END before any sound: try another seed")


def shown(value: Any) -> str:
    """Return a client's value for a message, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
