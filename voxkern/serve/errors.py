"""Errors in OpenAI's JSON form."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse


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

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.json(), self.status, self.headers)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response for an error of the routes: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "unknown_method"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return APIError(error.status_code, code, message, headers=error.headers).response()
