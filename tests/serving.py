"""Run a server in a thread of the test process, on loopback."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import httpx

import voxkern
from voxkern.serve.app import make_app
from voxkern.serve.server import SpeechServer, make_server
from voxkern.serve.settings import ServeSettings

NAMES = ("tiny", "tts-1")


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, for at most 30 s."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def settled(tts: voxkern.TTS) -> bool:
    """Wait until no request runs; return whether all pages are free."""
    wait_for(lambda: not tts.engine.n_running and not tts.engine.n_waiting)
    tts.engine.prefix_cache.clear()
    return tts.engine.runner.kv_cache.n_free == tts.engine.runner.kv_cache.n_pages


@contextlib.contextmanager
def serving(tts: voxkern.TTS, **settings: object) -> Iterator[tuple[httpx.Client, SpeechServer]]:
    """Serve a model on a free port; yield a client, and the server, which ends with the ``with`` block."""
    app = make_app(tts, ServeSettings(NAMES, **settings))  # type: ignore[arg-type]
    server = make_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
