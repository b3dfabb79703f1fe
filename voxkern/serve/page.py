"""A page to try the server in a browser: ``page.html``, and the facts that it shows."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..tts import TTS
from .settings import ServeSettings

FILE = Path(__file__).with_suffix(".html")
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def page_routes(tts: TTS, settings: ServeSettings) -> list[Route]:
    """Return the routes of the page: ``/``, and ``/about`` with the facts that the page shows."""
    html = FILE.read_text(encoding="utf-8")
    headers = HEADERS | {"content-security-policy": security_policy(html)}

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def about(request: Request) -> Response:
        config = tts.model.config
        facts = {
            "model": settings.model_names[0],
            "sampling_rate": tts.sampling_rate,
            "steps": config.acoustic_transformer.n_decoding_steps,
            "voices": list(tts.voices),  # read for each request: voices can be added
            "max_chars": settings.max_chars,
            "needs_key": settings.api_key is not None,
            "words": list(settings.words),
        }
        return JSONResponse(facts, headers=HEADERS)

    return [Route("/", page), Route("/about", about)]


def security_policy(html: str) -> str:
    """Return the Content-Security-Policy of a page.

    The browser runs only the page's own inline blocks, which the policy names by their SHA-256, and connects only to
    this server. ``data:`` is for the icon.
    """
    scripts, styles = (re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style"))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_sources(scripts)}",
            f"style-src {_sources(styles)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _sources(blocks: list[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{value}'" for value in hashes)
