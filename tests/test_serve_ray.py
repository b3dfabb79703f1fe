"""Tests of replicas on Ray Serve: the same sound, a replica that dies under load, and wrong arguments."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")
pytest.importorskip("ray", reason="needs Ray: pip install 'voxkern[ray]'")

import httpx
import torch
from websockets.sync.client import connect

import voxkern
from bench.micro.serve import running_replicas
from voxkern.serve.ray_app import app

SPEECH = "/v1/audio/speech"
MAX_BATCH = 8
TEXTS = ("one two", "four six seven", "good evening")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Run two replicas, and yield their address."""
    with running_replicas(2, max_batch=MAX_BATCH, device="cpu", backend="torch") as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    """Return the sound of each text with its number as seed. A replica has one thread, as this process has."""
    assert torch.get_num_threads() == 1
    tts = voxkern.load(device="cpu", backend="torch", max_batch=MAX_BATCH)
    return {text: tts.generate(text, seed=i).pcm16() for i, text in enumerate(TEXTS)}


def replicas() -> list[int]:
    """Return the process ids of the replicas that this process has started."""
    found = subprocess.run(["pgrep", "-f", "^ray::ServeReplica:default:voxkern"], capture_output=True, text=True)
    return [pid for pid in map(int, found.stdout.split()) if os.getpid() in ancestors(pid)]


def ancestors(pid: int) -> Iterator[int]:
    """Yield the process ids of a process's parent, its parent's parent, and so on."""
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


async def post(client: Any, i: int) -> tuple[int, bytes | None]:
    """Return the status of a request, and its sound; None if the sound had no end."""
    text = TEXTS[i % len(TEXTS)]
    body = {"input": text, "seed": i % len(TEXTS), "response_format": "pcm"}
    async with client.stream("POST", SPEECH, json=body) as answer:
        try:
            return answer.status_code, await answer.aread()
        except httpx.RemoteProtocolError:
            return answer.status_code, None


@pytest.mark.slow
def test_a_session_gives_the_same_sound(address: str, expected: dict[str, bytes]) -> None:
    url = address.replace("http", "ws") + f"{SPEECH}/stream"
    with connect(url) as connection:
        config = {"type": "session.config", "response_format": "pcm", "stream_audio": True}
        for i, text in enumerate(TEXTS):
            connection.send(json.dumps(config | {"seed": i}))
            for word in text.split():
                connection.send(json.dumps({"type": "input.text", "text": f"{word} "}))
            connection.send(json.dumps({"type": "input.done"}))
            sound = b""
            while not isinstance(message := connection.recv(timeout=60), str) or "session.done" not in message:
                sound += message if isinstance(message, bytes) else b""
            assert sound == expected[text]


@pytest.mark.slow
def test_a_replica_that_dies_loses_only_its_requests(address: str, expected: dict[str, bytes]) -> None:
    """One of two replicas is killed under load. Its requests fail, all others are complete, and it is replaced."""
    first = replicas()
    assert len(first) == 2

    async def under_load() -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            requests = [asyncio.create_task(post(client, i)) for i in range(24)]
            await asyncio.sleep(2)
            os.kill(first[0], signal.SIGKILL)
            return await asyncio.gather(*requests, return_exceptions=True)

    answers = asyncio.run(under_load())
    complete = 0
    for i, answer in enumerate(answers):
        if isinstance(answer, tuple) and answer[0] == 200 and answer[1] is not None:
            assert answer[1] == expected[TEXTS[i % len(TEXTS)]]
            complete += 1
        else:  # a connection that ended, a sound without an end, or a 5xx
            assert isinstance(answer, httpx.TransportError) or answer[1] is None or answer[0] >= 500
    assert 6 <= complete < len(answers)

    end = time.monotonic() + 90
    while len(set(replicas()) - {first[0]}) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)

    async def again() -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            return await asyncio.gather(*(post(client, i) for i in range(12)))

    answers = asyncio.run(again())
    while any(status != 200 for status, _ in answers):  # the new replica is still loading
        assert time.monotonic() < end
        answers = asyncio.run(again())
    assert [sound for _, sound in answers] == [expected[TEXTS[i % len(TEXTS)]] for i in range(12)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": "2"}, "'replica' is not an argument: the arguments are model"),
        ({"replicas": "two"}, "replicas must be of type int, got 'two'"),
        ({"max_waiting": "1.5"}, "max_waiting must be of type int"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        app(arguments | {"no_api_key": "true"})


def test_a_key_is_needed_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", " "):
        monkeypatch.setenv("VOXKERN_API_KEY", key)
        with pytest.raises(ValueError, match="set a key in VOXKERN_API_KEY"):
            app({})
    monkeypatch.setenv("VOXKERN_API_KEY", "secret")
    app({})
