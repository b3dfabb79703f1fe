"""The routes of the server, and the API key."""

import hmac
import ipaddress
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from ..tts import TTS, load
from .errors import APIError, http_error
from .page import page_routes
from .service import SpeechService
from .session import run_session
from .settings import ServeSettings
from .speech import Speech

PUBLIC = ("/", "/about", "/health", "/ready", "/metrics")  # paths that need no API key


def load_app(source: str | None, settings: ServeSettings, **arguments: Any) -> Starlette:
    """Load a model with the arguments of :func:`voxkern.load`, and return the application that serves it.

    Two frames are generated after loading. This makes the engine and, on a GPU, captures the CUDA graphs of the default
    steps and solver. The graphs of other steps or solvers are captured at their first request.
    """
    tts = load(source, **arguments)
    tts.generate("one", seed=0, max_frames=2)
    return make_app(tts, settings)


def make_app(tts: TTS, settings: ServeSettings) -> Starlette:
    """Return an ASGI application that serves a model. Its ``state.service`` is the :class:`SpeechService`."""
    service, created = SpeechService(tts, settings), int(time.time())

    async def models(request: Request) -> Response:
        about = {"object": "model", "created": created, "owned_by": "voxkern"}
        return JSONResponse({"object": "list", "data": [{"id": name} | about for name in settings.model_names]})

    async def voices(request: Request) -> Response:
        return JSONResponse({"voices": sorted(tts.voices), "uploaded_voices": []})  # vLLM-Omni's form

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": not service.closing}, 503 if service.closing else 200)

    async def figures(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def session(websocket: WebSocket) -> None:
        await run_session(websocket, service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    app = Starlette(
        routes=[
            Route("/v1/audio/speech", Speech(service), methods=["POST"]),
            WebSocketRoute("/v1/audio/speech/stream", session),
            Route("/v1/audio/voices", voices),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", figures),
            *page_routes(tts, settings),
        ],
        middleware=[Middleware(Guard, key=settings.api_key)],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class Guard:
    """Refuses requests that lack the API key or, if no key is set, requests of other sites' pages in a browser."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application unless the request is refused."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        error = None
        if scope["path"].removeprefix(scope.get("root_path", "")) not in PUBLIC:  # all paths but these need the key
            error = self._refusal(dict(scope["headers"]))
        await (self._app if error is None else error.response())(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> APIError | None:
        if self._key is None:
            origin = headers.get(b"origin")
            if origin is None or _is_own(origin.decode("latin-1"), headers.get(b"host", b"").decode("latin-1")):
                return None
            message = "without an API key, a page must be this server's own, opened by IP address or as localhost"
            return APIError(403, "other_site", message)
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # a wrong key takes the same time wherever it differs
        if hmac.compare_digest(given, self._key) and scheme.lower() == b"bearer":
            return None
        message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
        return APIError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def _is_own(origin: str, host: str) -> bool:
    """Return whether a page's site is this server, addressed by IP or as localhost.

    Host names are refused, because another site's name can resolve to this machine (DNS rebinding).
    """
    try:
        site = urlsplit(origin)
        return site.netloc == host and (site.hostname == "localhost" or bool(ipaddress.ip_address(site.hostname or "")))
    except ValueError:
        return False
