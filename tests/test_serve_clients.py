"""Tests of the server with real clients, the demo voice and a speech recogniser; and under load."""

import asyncio
import gc
import io
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("pocketsphinx", reason="speech recognition needs pocketsphinx: pip install 'voxkern[test]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")

import httpx
from serving import serving
from websockets.sync.client import connect

import voxkern
from voxkern.reference.train.data import WORDS
from voxkern.reference.train.recogniser import Recogniser

SPEECH = "/v1/audio/speech"
TEXT = "seven three one"


@pytest.fixture(scope="module")
def tts() -> voxkern.TTS:
    return voxkern.load(device="cpu", backend="torch", max_batch=4)


@pytest.fixture(scope="module")
def address(tts: voxkern.TTS) -> Iterator[str]:
    with serving(tts) as (client, _):
        yield str(client.base_url)


def words(samples: np.ndarray, rate: int) -> str:
    return " ".join(Recogniser(list(WORDS)).recognise(samples.astype(np.float32), rate))


@pytest.fixture
def openai_client(address: str) -> Any:
    openai = pytest.importorskip("openai", reason="needs the package openai: pip install 'voxkern[test]'")
    return openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0)


def test_openais_client(openai_client: Any) -> None:
    answer = openai_client.audio.speech.create(
        model="tts-1", voice="slt", input=TEXT, response_format="wav", extra_body={"seed": 1}
    )
    assert words(*soundfile.read(io.BytesIO(answer.content))) == TEXT


def test_openais_client_streaming(openai_client: Any, tts: voxkern.TTS) -> None:
    """The sound arrives in several parts, and is that of ``generate``."""
    with openai_client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="slt", input=TEXT, response_format="pcm", extra_body={"seed": 1}
    ) as answer:
        parts = [bytes(part) for part in answer.iter_bytes()]
    assert len(parts) > 2
    audio = tts.generate(TEXT, "slt", 1)
    assert b"".join(parts) == audio.pcm16()
    assert words(audio.samples, 24000) == TEXT


def test_openais_client_raises_its_own_errors(openai_client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="voice is 'alloy', but the model has"):
        openai_client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT)
    with pytest.raises(openai.NotFoundError, match="this server has tiny, tts-1"):
        openai_client.audio.speech.create(model="gpt-4o-mini-tts", voice="slt", input=TEXT)
    assert [model.id for model in openai_client.models.list()] == ["tiny", "tts-1"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(address: str) -> None:
    command = ["curl", "-s", f"{address}{SPEECH}", "-d", f'{{"input": "{TEXT}", "seed": 1}}']
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert words(*soundfile.read(io.BytesIO(done.stdout))) == TEXT  # mp3


def test_text_that_arrives_word_by_word(address: str, tts: voxkern.TTS) -> None:
    """A client sends words, as a language model does. Each line is a sentence, and its words are recognised."""
    url = address.replace("http", "ws") + f"{SPEECH}/stream"
    found: list[bytes] = []
    with connect(url) as connection:
        config = {"type": "session.config", "voice": "slt", "response_format": "pcm", "stream_audio": True, "seed": 1}
        connection.send(json.dumps(config))
        for word in ("seven ", "three ", "one\n", "good ", "evening\n", "monday ", "morning"):
            connection.send(json.dumps({"type": "input.text", "text": word}))
        connection.send(json.dumps({"type": "input.done"}))
        while not isinstance(message := connection.recv(timeout=60), str) or "session.done" not in message:
            if isinstance(message, bytes):
                found[-1] += message
            elif "audio.start" in message:
                found.append(b"")
    sounds = [np.frombuffer(sound, "<i2") / 32767 for sound in found]
    assert [words(sound, 24000) for sound in sounds] == ["seven three one", "good evening", "monday morning"]
    assert found[0] == tts.generate("seven three one", "slt", 1).pcm16()


@pytest.mark.slow
def test_128_clients_at_once() -> None:
    """32 requests run and 64 may wait, so some are refused. All others receive exactly their sounds."""
    tts = voxkern.load(device="cpu", backend="torch", max_batch=32)
    texts = [("one two", "four six", "eight")[i % 3] for i in range(128)]
    expected = [audio.pcm16() for audio in tts.generate(texts, seed=list(range(128)))]

    async def post(client: Any, seed: int) -> Any:
        body = {"input": texts[seed], "seed": seed, "response_format": "pcm"}
        return await client.post(SPEECH, json=body)

    async def post_all(address: Any) -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=128)) as client:
            return await asyncio.gather(*(post(client, seed) for seed in range(128)))

    with serving(tts) as (client, _):
        answers = asyncio.run(post_all(client.base_url))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 96
    for answer, sound in zip(answers, expected, strict=True):
        assert answer.status_code == 429 or answer.content == sound


@pytest.mark.slow
def test_a_thousand_requests_with_disconnects_leave_nothing(tiny_folder: Any) -> None:
    """About half of the clients leave at a random time. No page, slot, thread or file descriptor is left."""
    tts = voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=8)
    expected = [tts.generate("seven", seed=seed, steps=2, max_frames=12).pcm16() for seed in range(10)]
    complete = 0

    async def post(client: Any, index: int, draw: random.Random) -> None:
        nonlocal complete
        name = draw.choice(["pcm", "pcm", "flac"])
        body = {"input": "seven", "seed": index % 10, "steps": 2, "max_frames": 12, "response_format": name}
        patience = draw.choice([60.0, draw.uniform(0, 0.5)])
        try:
            async with asyncio.timeout(patience):
                answer = await client.post(SPEECH, json=body)
        except TimeoutError:
            return
        assert answer.status_code == 200
        if name == "pcm":
            assert answer.content == expected[index % 10]
            complete += 1

    async def post_all(address: Any) -> None:
        draw, at_once = random.Random(0), asyncio.Semaphore(40)

        async def one(client: Any, index: int) -> None:
            async with at_once:
                await post(client, index, draw)

        async with httpx.AsyncClient(base_url=address, timeout=600) as client:
            await asyncio.gather(*(one(client, index) for index in range(1000)))

    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with serving(tts, max_waiting=64) as (client, _):
        asyncio.run(post_all(client.base_url))
        engine, end = tts.engine, time.monotonic() + 30
        while engine.n_running or engine.n_waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
    engine.prefix_cache.clear()
    assert engine.runner.kv_cache.n_free == engine.runner.kv_cache.n_pages
    assert 200 < complete < 900
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
