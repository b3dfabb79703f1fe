"""A page to try the server in a browser: ``page.html``, and the facts that it shows."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..tts import TTS
from .settings import ServeSettings

FILE = Path(__file__).with_suffix(".html")


def page_routes(tts: TTS, settings: ServeSettings) -> list[Route]:
    """Return the routes of the page: ``/``, and ``/about`` with the facts that the page shows."""

    async def page(request: Request) -> Response:
        return HTMLResponse(FILE.read_text())

    async def about(request: Request) -> Response:
        return JSONResponse({"model": settings.model_names[0]})

    return [Route("/", page), Route("/about", about)]
