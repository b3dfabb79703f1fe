"""Tests of the server: formats, fields, errors, limits, clients that leave, and its end."""

import base64
import gc
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")

import httpx
from serving import NAMES, serving, settled, wait_for
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

import voxkern
from bench.micro.serve import running_server
from voxkern.cli import app
from voxkern.serve.app import make_app
from voxkern.serve.formats import UNKNOWN_SIZE
from voxkern.serve.settings import ServeSettings

ARGUMENTS = {"seed": 5, "steps": 1, "max_frames": 6}
SPEECH = "/v1/audio/speech"
BODY = {"model": "tiny", "input": "seven", "voice": "ada", "response_format": "pcm", **ARGUMENTS}


@pytest.fixture(scope="module")
def tts(tiny_folder: Path) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=2)


@pytest.fixture(scope="module")
def client(tts: voxkern.TTS) -> Iterator[Any]:
    with serving(tts) as (found, _):
        yield found


@pytest.fixture(scope="module")
def expected(tts: voxkern.TTS) -> voxkern.Audio:
    audio = tts.generate("seven", "ada", **ARGUMENTS)
    assert audio.codes.shape[1] == 6
    return audio


def test_pcm_is_generates_sound(client: Any, expected: voxkern.Audio) -> None:
    answer = client.post(SPEECH, json=BODY)
    assert answer.status_code == 200
    assert answer.content == expected.pcm16()
    assert answer.headers["content-type"] == "audio/pcm"
    assert answer.headers["x-seed"] == "5"
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


def test_wav_is_a_header_of_unknown_length_and_the_same_sound(client: Any, expected: voxkern.Audio) -> None:
    content = client.post(SPEECH, json=BODY | {"response_format": "wav"}).content
    assert content[44:] == expected.pcm16()
    assert content[4:8] == content[40:44] == UNKNOWN_SIZE.to_bytes(4, "little")
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == 24000
    assert samples.tobytes() == expected.pcm16()


def test_flac_is_exact(client: Any, expected: voxkern.Audio) -> None:
    answer = client.post(SPEECH, json=BODY | {"response_format": "flac"})
    samples, rate = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert (rate, samples.tobytes()) == (24000, expected.pcm16())
    assert answer.headers["content-type"] == "audio/flac"


@pytest.mark.parametrize(
    ("name", "media_type", "begins"), [("mp3", "audio/mpeg", b"\xff"), ("opus", "audio/ogg", b"OggS")]
)
def test_lossy_formats_have_the_sounds_length(
    client: Any, expected: voxkern.Audio, name: str, media_type: str, begins: bytes
) -> None:
    """The tiny model makes noise, so only the length and the energy are compared."""
    answer = client.post(SPEECH, json=BODY | {"response_format": name})
    samples, rate = soundfile.read(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == media_type
    assert answer.content.startswith(begins)
    assert len(samples) / rate == pytest.approx(expected.seconds, abs=0.06)
    clipped = np.clip(expected.samples, -1, 1)
    assert np.square(samples).mean() == pytest.approx(np.square(clipped).mean(), rel=0.5)


def test_mp3_is_the_default(client: Any) -> None:
    body = {name: value for name, value in BODY.items() if name != "response_format"}
    assert client.post(SPEECH, json=body).headers["content-type"] == "audio/mpeg"


def test_a_voice_may_be_an_object(client: Any, expected: voxkern.Audio) -> None:
    assert client.post(SPEECH, json=BODY | {"voice": {"id": "ada"}}).content == expected.pcm16()
    assert client.post(SPEECH, json=BODY | {"voice": {"id": "bob"}}).content != expected.pcm16()


def test_fields_beyond_openais_reach_the_model(client: Any, tts: voxkern.TTS) -> None:
    own = {"seed": 2**64 - 1, "steps": 3, "solver": "ab2", "cfg_alpha": 2.0, "max_frames": 3}
    content = client.post(SPEECH, json={"input": "two", "response_format": "pcm", **own}).content
    assert content == tts.generate("two", **own).pcm16()


def test_a_drawn_seed_gives_the_same_sound_again(client: Any, tts: voxkern.TTS) -> None:
    answer = client.post(SPEECH, json={name: value for name, value in BODY.items() if name != "seed"})
    again = tts.generate("seven", "ada", **ARGUMENTS | {"seed": int(answer.headers["x-seed"])})
    assert answer.content == again.pcm16()


def events_of(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_server_sent_events(client: Any, tts: voxkern.TTS, expected: voxkern.Audio) -> None:
    answer = client.post(SPEECH, json=BODY | {"stream_format": "sse"})
    *deltas, done = events_of(answer.text)
    assert answer.headers["content-type"] == "text/event-stream"
    assert len(deltas) > 1
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == expected.pcm16()
    n_input = tts.count_tokens("seven", "ada")
    usage = {"input_tokens": n_input, "output_tokens": 6, "total_tokens": n_input + 6}
    assert done == {"type": "speech.audio.done", "usage": usage, "ended": expected.ended}


def test_lists_of_models_and_voices(client: Any, tts: voxkern.TTS) -> None:
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny", "tts-1"]
    assert client.get("/v1/audio/voices").json() == {"voices": sorted(tts.voices), "uploaded_voices": []}
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json() == {"ready": True}


WRONG = [
    (b"{", 400, "invalid_json", None),
    (b"[1]", 400, "invalid_json", None),
    (b"[" * 100_000, 400, "invalid_json", None),
    (b'{"input": "\xff"}', 400, "invalid_json", None),
    ({}, 400, "missing_field", "input"),
    ({"input": 7}, 400, "wrong_type", "input"),
    ({"input": ""}, 400, "invalid_value", "input"),
    (b'{"input": "\\ud800"}', 400, "invalid_value", "input"),
    (b'{"\\ud800": 1}', 400, "unknown_field", "\ud800"),
    ({"input": "one", "model": "m" * 100_000}, 404, "model_not_found", "model"),
    ({"input": "x" * 4097}, 400, "input_too_long", "input"),
    ({"input": "one", "voice": "eve"}, 400, "unknown_voice", "voice"),
    ({"input": "one", "voice": {"name": "ada"}}, 400, "wrong_type", "voice"),
    ({"input": "one", "model": "other"}, 404, "model_not_found", "model"),
    ({"input": "one", "response_format": "aac"}, 400, "unsupported_value", "response_format"),
    ({"input": "one", "response_format": ["mp3"]}, 400, "unsupported_value", "response_format"),
    ({"input": "one", "stream_format": "raw"}, 400, "unsupported_value", "stream_format"),
    ({"input": "one", "speed": 1.5}, 400, "unsupported_field", "speed"),
    ({"input": "one", "instructions": "cheerful"}, 400, "unsupported_field", "instructions"),
    ({"input": "one", "temperature": 0.7}, 400, "unknown_field", "temperature"),
    ({"input": "one", "steps": 0}, 400, "invalid_value", "steps"),
    ({"input": "one", "steps": "7"}, 400, "invalid_value", "steps"),
    ({"input": "one", "seed": -1}, 400, "invalid_value", "seed"),
    ({"input": "one", "solver": "rk4"}, 400, "invalid_value", "solver"),
    ({"input": "one", "max_frames": 10**9}, 400, "invalid_value", "max_frames"),
    (b'{"input": "one", "cfg_alpha": NaN}', 400, "invalid_value", "cfg_alpha"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), WRONG)
def test_wrong_requests(client: Any, tts: voxkern.TTS, body: Any, status: int, code: str, param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(SPEECH, content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert settled(tts)


def test_wrong_requests_for_events_have_the_same_errors(client: Any) -> None:
    for body, code in (({"input": ""}, "invalid_value"), ({"input": "one", "voice": "eve"}, "unknown_voice")):
        answer = client.post(SPEECH, json=body | {"stream_format": "sse"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_unknown_paths_and_methods(client: Any) -> None:
    for answer, status, code in (
        (client.get("/v1/audio/speak"), 404, "unknown_path"),
        (client.get(SPEECH), 405, "unknown_method"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def connect(client: Any) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def answer_to(client: Any, *parts: bytes) -> bytes:
    """Send a POST request with these headers and this body over a new connection, and return the answer."""
    with connect(client) as connection:
        connection.sendall(f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\n".encode() + b"".join(parts))
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return answer


@pytest.mark.parametrize(
    "parts",
    [
        (b"Content-Length: 10000000\r\n\r\n",),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"f4241\r\n", b" " * 1_000_001),
    ],
    ids=["length", "chunks"],
)
def test_ten_megabytes_are_refused(client: Any, parts: tuple[bytes, ...]) -> None:
    """A body with a length is refused before it arrives, and a body in chunks as soon as it is too long."""
    answer = answer_to(client, *parts)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b"body_too_long" in answer
    assert client.post(SPEECH, json=BODY).status_code == 200


def test_a_slow_body_is_refused(tts: voxkern.TTS) -> None:
    with serving(tts, body_seconds=0.3) as (client, _):
        start = time.monotonic()
        answer = answer_to(client, b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"body_too_slow" in answer
        assert 0.2 < time.monotonic() - start < 5
        assert client.post(SPEECH, json=BODY).status_code == 200


def test_a_request_that_takes_too_long_is_ended(tts: voxkern.TTS) -> None:
    long = BODY | {"max_frames": 900, "steps": 64}
    with serving(tts, request_seconds=1.5) as (client, _):
        answer = client.post(SPEECH, json=long | {"response_format": "flac"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_slow")
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):  # part of the sound was sent
            client.post(SPEECH, json=long)
        last = events_of(client.post(SPEECH, json=long | {"stream_format": "sse"}).text)[-1]
        assert (last["type"], last["error"]["code"]) == ("speech.audio.error", "too_slow")
        assert settled(tts)
        assert client.post(SPEECH, json=BODY).status_code == 200


def test_the_key(tts: voxkern.TTS) -> None:
    with serving(tts, api_key="secret") as (client, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for answer in (client.post(SPEECH, json=BODY, headers=headers), client.get("/v1/models", headers=headers)):
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for right in ("Bearer secret", "bearer secret"):
            assert client.post(SPEECH, json=BODY, headers={"Authorization": right}).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/", "/about"):
            assert client.get(path).status_code == 200


def test_the_key_is_needed_below_a_prefix_too(tts: voxkern.TTS) -> None:
    settings = ServeSettings(NAMES, api_key="secret")
    outer = Starlette(routes=[Mount("/tts", make_app(tts, settings))])
    with TestClient(outer) as client:
        assert client.get("/tts/health").status_code == 200
        assert client.get("/tts/v1/models").status_code == 401
        assert client.post(f"/tts{SPEECH}", json=BODY).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.get("/tts/v1/models", headers=right).status_code == 200
    assert "secret" not in repr(settings)


def test_a_full_queue_refuses_requests(tts: voxkern.TTS, expected: voxkern.Audio) -> None:
    """Two run and one waits, so the fourth is refused. The others are complete, and the next request is accepted."""
    tts.engine.prefix_cache.clear()
    with serving(tts, max_waiting=1) as (client, _), ThreadPoolExecutor(3) as pool:
        long = BODY | {"max_frames": 40, "steps": 16}
        waiting = [pool.submit(client.post, SPEECH, json=long) for _ in range(3)]
        wait_for(lambda: tts.engine.n_running + tts.engine.n_waiting == 3)
        refused = client.post(SPEECH, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        sound = tts.generate("seven", "ada", seed=5, steps=16, max_frames=40).pcm16()
        assert [one.result().content == sound for one in waiting] == [True] * 3
        assert client.post(SPEECH, json=BODY).content == expected.pcm16()


@pytest.mark.parametrize("name", ["pcm", "flac"])
def test_a_client_that_leaves_frees_its_slot(tts: voxkern.TTS, name: str) -> None:
    """The request ends within a frame, whether or not its sound was already being sent."""
    with serving(tts) as (client, _):
        body = json.dumps(BODY | {"max_frames": 900, "steps": 16, "response_format": name}).encode()
        head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with connect(client) as leaving:
            leaving.sendall(head + body)
            wait_for(lambda: tts.engine.n_running)
            if name == "pcm":
                assert leaving.recv(100)
            state = next(iter(tts.engine.running.values()))
        n_frames = state.n_frames
        wait_for(lambda: state.finished)
        assert state.n_frames - n_frames < 20  # of 900
        assert settled(tts)
        assert 'errors_total{code="client_gone"} 1.0' in client.get("/metrics").text


def test_an_engines_error_is_a_500_with_an_id(
    tts: voxkern.TTS, expected: voxkern.Audio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the cause and the id, but not the text. The next request works."""

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with serving(tts) as (client, _), caplog.at_level(logging.ERROR, "voxkern"):
        with monkeypatch.context() as patch:
            patch.setattr(tts.engine.runner, "prefill", fail)
            answer = client.post(SPEECH, json=BODY | {"input": "a private text"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        request_id = answer.headers["x-request-id"]
        assert request_id in answer.json()["error"]["message"]
        assert f"request {request_id} failed" in caplog.text
        assert "planted" in caplog.text
        assert "private" not in caplog.text
        assert client.post(SPEECH, json=BODY).content == expected.pcm16()


def test_metrics(tts: voxkern.TTS, expected: voxkern.Audio) -> None:
    with serving(tts) as (client, _):
        for body in (BODY, BODY, BODY | {"voice": "eve"}):
            client.post(SPEECH, json=body)
        figures = dict(
            line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    assert float(figures['voxkern_requests_total{status="200"}']) == 2
    assert float(figures['voxkern_errors_total{code="unknown_voice"}']) == 1
    assert float(figures["voxkern_audio_seconds_total"]) == pytest.approx(2 * expected.seconds)
    assert float(figures["voxkern_first_sound_seconds_count"]) == 2
    assert float(figures["voxkern_real_time_factor_count"]) == 2
    assert (figures["voxkern_running"], figures["voxkern_waiting"]) == ("0.0", "0.0")
    assert float(figures["voxkern_pages"]) == tts.engine.runner.kv_cache.n_pages
    assert float(figures["voxkern_pages_in_use"]) == 1  # the cached voice


def test_no_thread_and_no_file_is_left(tts: voxkern.TTS) -> None:
    gc.collect()  # files of earlier tests, which would be closed at any time
    before, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with serving(tts) as (client, _):
        assert client.post(SPEECH, json=BODY | {"response_format": "mp3"}).status_code == 200
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (before, files)


def test_it_listens_beyond_this_machine_only_with_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "myhost"):
        done = CliRunner().invoke(app, ["serve", "--host", host], env={"VOXKERN_API_KEY": None})
        assert done.exit_code == 1
        assert "VOXKERN_API_KEY" in done.stderr
    done = CliRunner().invoke(app, ["serve"], env={"VOXKERN_API_KEY": " "})
    assert "--api-key is empty" in done.stderr


def process(folder: Path, *flags: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """Run the command in a process with one thread, as this one has: the last bits depend on their number."""
    options = ["--model", str(folder), "--device", "cpu", "--backend", "torch", *flags]
    return running_server(*options, OMP_NUM_THREADS="1")


def wait_until_refused(address: str) -> None:
    """Wait until connections are refused. Nothing is sent: a stopping server may reset an open connection."""
    url = httpx.URL(address)

    def refused() -> bool:
        try:
            socket.create_connection((url.host, url.port)).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_for(refused)


def test_sigterm_completes_running_requests(tiny_folder: Path) -> None:
    """A request that runs at SIGTERM is complete, no new one is accepted, and the exit status is 0."""
    with process(tiny_folder) as (running, address):
        body = BODY | {"model": tiny_folder.name, "max_frames": 60, "steps": 16}
        with httpx.stream("POST", address + SPEECH, json=body, timeout=60) as answer:
            received = answer.iter_raw()
            content = next(received)
            running.send_signal(signal.SIGTERM)
            wait_until_refused(address)
            content += b"".join(received)
        assert running.wait(30) == 0
    tts = voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=32)
    assert content == tts.generate("seven", "ada", seed=5, steps=16, max_frames=60).pcm16()


def test_sigterm_does_not_wait_forever(tiny_folder: Path) -> None:
    with process(tiny_folder, "--shutdown-seconds", "1") as (running, address):
        body = BODY | {"model": tiny_folder.name, "max_frames": 900, "steps": 64}
        with httpx.stream("POST", address + SPEECH, json=body, timeout=60) as answer:
            received = answer.iter_raw()
            next(received)
            running.send_signal(signal.SIGTERM)
            start = time.monotonic()
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                list(received)
        assert running.wait(30) == 0
        assert time.monotonic() - start < 20
