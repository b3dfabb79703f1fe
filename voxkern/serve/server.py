"""Listen for requests, and end in order at SIGTERM."""

from types import FrameType

import uvicorn

from ..tts import TTS
from .app import make_app
from .service import SpeechService
from .settings import ServeSettings


class SpeechServer(uvicorn.Server):
    """Runs the application until a signal ends it.

    At SIGTERM or SIGINT the server refuses new requests, waits for running ones up to a limit, and returns. At a second
    signal it returns at once. uvicorn's own server would raise the signal again, and the exit status would not be 0.
    """

    def __init__(self, config: uvicorn.Config, service: SpeechService) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end the server."""
        self._service.closing = True
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(tts: TTS, settings: ServeSettings, host: str, port: int) -> SpeechServer:
    """Return a server of a model; its ``run()`` listens at `host` and `port` until a signal ends it."""
    app = make_app(tts, settings)
    config = uvicorn.Config(
        app, host, port, timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)), server_header=False
    )
    return SpeechServer(config, app.state.service)
