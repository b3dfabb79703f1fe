"""The figures of GET /metrics, in the form that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..tts import TTS

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)  # bounds of the first sound's histogram
FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)  # bounds of the real-time factor's histogram


class Metrics:
    """Counts the requests of one server.

    Attributes:
        requests: finished requests for speech, by status; 499 is a client that has gone.
        errors: errors of requests and of WebSocket sessions, by code.
        audio_seconds: seconds of sound of complete requests, and of sentences of sessions.
        first_sound: seconds from a request's body to its first sound.
        real_time_factor: seconds of a request, with its time in the queue, for each second of its sound.
    """

    def __init__(self, tts: TTS) -> None:
        """Make the counters at zero, and gauges that read the engine of `tts`."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("voxkern_requests", "Finished requests for speech", ["status"], registry=registry)
        self.errors = Counter("voxkern_errors", "Errors of requests and sessions", ["code"], registry=registry)
        self.audio_seconds = Counter("voxkern_audio_seconds", "Seconds of sound", registry=registry)
        self.first_sound = Histogram(
            "voxkern_first_sound_seconds", "Seconds to the first sound", registry=registry, buckets=SECONDS
        )
        self.real_time_factor = Histogram(
            "voxkern_real_time_factor", "Seconds of a request for each second of its sound", registry=registry,
            buckets=FACTORS,
        )  # fmt: skip
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "waiting": ("Requests that wait for a slot", lambda: tts.engine.n_waiting),
            "running": ("Requests in a slot", lambda: tts.engine.n_running),
            "pages": ("Pages of the KV cache", lambda: tts.engine.runner.kv_cache.n_pages),
            "pages_in_use": ("Pages of requests and of cached voices", lambda: pages_in_use(tts)),
        }
        for name, (help_, read) in gauges.items():
            Gauge(f"voxkern_{name}", help_, registry=registry).set_function(read)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


def pages_in_use(tts: TTS) -> int:
    """Return the number of pages of the KV cache that requests or cached voices hold."""
    kv_cache = tts.engine.runner.kv_cache
    return kv_cache.n_pages - kv_cache.n_free
