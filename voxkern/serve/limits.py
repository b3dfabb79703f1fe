"""Limit the size and the time of a body, and stop the work for a client that has gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from .errors import APIError
from .settings import ServeSettings

CLOSE = {"connection": "close"}  # header of a response to a request that was not read to its end


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """Return a request's body.

    Raises:
        APIError: the body is too long, or takes too long to arrive.
        ClientDisconnect: the client has gone.
    """
    too_long = APIError(413, "body_too_long", f"the body has more than {settings.max_body} bytes", headers=CLOSE)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > settings.max_body:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body:
                    raise too_long
    except TimeoutError:
        raise APIError(
            408, "body_too_slow", f"the body did not arrive in {settings.body_seconds:g} s", headers=CLOSE
        ) from None
    return bytes(body)


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, but cancel it as soon as the client has gone.

    Args:
        work: the work for a request, after its body was read.
        receive: ASGI's function for the next message of the client.

    Raises:
        ClientDisconnect: the client has gone.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
