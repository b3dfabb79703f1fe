"""Listen for requests, and end in order at SIGTERM."""

import asyncio
import socket
import time
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from .service import SpeechService


class SpeechServer(uvicorn.Server):
    """Runs the application until a signal ends it.

    At SIGTERM or SIGINT the server refuses new requests, waits for running ones up to a limit, and returns. At a second
    signal it returns at once. uvicorn's own server would raise the signal again, and the exit status would not be 0.

    Attributes:
        service: what the server serves.
    """

    def __init__(self, config: uvicorn.Config, service: SpeechService) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, because uvicorn would close WebSockets at once; then end the server."""
        for server in self.servers:
            server.close()  # no more connections
        end = time.monotonic() + self.service.settings.shutdown_seconds
        while self.service.n_admitted and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown at the first signal, and force it at the second."""
        self.service.closing = True
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(app: Starlette, host: str, port: int) -> SpeechServer:
    """Return a server of an application; its ``run()`` listens at `host` and `port` until a signal ends it."""
    service: SpeechService = app.state.service
    config = uvicorn.Config(
        app,
        host,
        port,
        ws_max_size=service.settings.max_body,
        ws_per_message_deflate=False,  # a small message could become a large one
        ws_ping_interval=None,  # a client's answer would wait behind unread text; SpeechSession has its own time limits
        limit_concurrency=service.most_connections,
        timeout_graceful_shutdown=1,  # for last bytes: SpeechServer.shutdown has waited for requests before
        server_header=False,
    )
    return SpeechServer(config, service)
