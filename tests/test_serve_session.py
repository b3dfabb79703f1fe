"""Tests of WebSocket sessions: text in pieces, sound by sentence, errors of one session, cancel, and limits."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("websockets", reason="the server needs websockets: pip install 'voxkern[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")

import io

from serving import serving, settled, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import voxkern
from voxkern.serve import formats, speaker

ARGUMENTS = {"seed": 5, "steps": 1, "max_frames": 6}
CONFIG = {"type": "session.config", "voice": "ada", "response_format": "pcm", "stream_audio": True, **ARGUMENTS}


@pytest.fixture(scope="module")
def tts(tiny_folder: Path) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=4)


@contextlib.contextmanager
def session(tts: voxkern.TTS, headers: dict[str, str] | None = None, **settings: Any) -> Iterator[ClientConnection]:
    with serving(tts, **settings) as (client, _), open_session(client, headers) as found:
        yield found


def open_session(client: Any, headers: dict[str, str] | None = None) -> ClientConnection:
    url = f"ws://127.0.0.1:{client.base_url.port}/v1/audio/speech/stream"
    return connect(url, additional_headers=headers, max_size=None)


def send(connection: ClientConnection, *messages: dict[str, Any] | str | bytes) -> None:
    for message in messages:
        connection.send(json.dumps(message) if isinstance(message, dict) else message)


def receive(connection: ClientConnection) -> Any:
    message = connection.recv(timeout=30)
    return message if isinstance(message, bytes) else json.loads(message)


def until(connection: ClientConnection, kind: str) -> list[Any]:
    """Receive messages until one has this type; return all of them."""
    messages = [receive(connection)]
    while isinstance(messages[-1], bytes) or messages[-1]["type"] != kind:
        messages.append(receive(connection))
    return messages


def sounds(messages: list[Any]) -> dict[str, bytes]:
    """Return the sound of each sentence by its text, and check the messages around it."""
    found: dict[str, bytes] = {}
    text = ""
    for message in messages:
        if isinstance(message, bytes):
            found[text] += message
        elif message["type"] == "audio.start":
            text = message["sentence_text"]
            found[text] = b""
            assert message["sentence_index"] == len(found) - 1
        elif message["type"] == "audio.done":
            assert (message["total_bytes"], message["error"]) == (len(found[text]), False)
    return found


def text_of(piece: str) -> dict[str, str]:
    return {"type": "input.text", "text": piece}


DONE = {"type": "input.done"}


def test_text_in_pieces_gives_the_sound_of_each_sentence(tts: voxkern.TTS) -> None:
    """All sentences have one voice and one seed, whatever the pieces are; the sound arrives in several messages."""
    texts = ["One two.", "Three, (four)!", "five"]
    expected = {text: tts.generate(text, "ada", **ARGUMENTS).pcm16() for text in texts}
    with session(tts) as connection:
        for size in (1, 7, 100):
            whole = " ".join(texts)
            send(connection, CONFIG, *(text_of(whole[i : i + size]) for i in range(0, len(whole), size)), DONE)
            messages = until(connection, "session.done")
            assert sounds(messages) == expected
            assert sum(isinstance(message, bytes) for message in messages) > 3
            assert messages[-1]["total_sentences"] == 3
        assert messages[-1]["utterance_index"] == 2
        assert messages[0] == {
            "type": "audio.start", "utterance_index": 2, "sentence_index": 0, "sentence_text": "One two.",
            "format": "pcm", "sample_rate": 24000,
        }  # fmt: skip
        send(connection, {"type": "session.close"})
        with pytest.raises(ConnectionClosed) as closed:
            receive(connection)
        assert closed.value.rcvd.code == 1000
    assert settled(tts)


def test_vllm_omnis_clients_work(tts: voxkern.TTS) -> None:
    """Their configuration has `speaker`, fields of other models, and no streaming: one WAV file for each text."""
    config = {
        "type": "session.config", "model": "tiny", "speaker": "bob", "task_type": "CustomVoice", "language": "Auto",
        "split_granularity": "none", "word_timestamps": None, **ARGUMENTS,
    }  # fmt: skip
    with session(tts) as connection:
        send(connection, config, text_of("One. "), text_of("Two."), DONE)
        start, sound, done, end = until(connection, "session.done")
    assert (start["format"], start["sentence_text"], end["total_sentences"]) == ("wav", "One. Two.", 1)
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == 24000
    assert samples.tobytes() == tts.generate("One. Two.", "bob", **ARGUMENTS).pcm16()
    assert done["total_bytes"] == len(sound)


def test_a_sentence_is_spoken_before_the_text_ends(tts: voxkern.TTS) -> None:
    with session(tts) as connection:
        send(connection, CONFIG, text_of("One two. And"))
        messages = until(connection, "audio.done")
        assert list(sounds(messages)) == ["One two."]
        send(connection, text_of(" more"), DONE)
        start = receive(connection)
        assert (start["sentence_index"], start["sentence_text"]) == (1, "And more")
        until(connection, "session.done")


def test_the_next_sentence_runs_while_one_is_sent(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sentence is not sent. The second is generated meanwhile, and the third is not."""
    started: list[str] = []
    released = threading.Event()
    submit = tts.submit

    async def counted(text: str, *arguments: Any, **named: Any) -> Any:
        started.append(text)
        return await submit(text, *arguments, **named)

    async def stuck(self: speaker.Speaker, sentence: speaker.Sentence) -> None:
        await speaker.asyncio.to_thread(released.wait, 30)

    monkeypatch.setattr(tts, "submit", counted)
    monkeypatch.setattr(speaker.Speaker, "_send_sentence", stuck)
    with session(tts) as connection:
        send(connection, CONFIG, text_of("A one. B two. C three. D four. "), DONE)
        wait_for(lambda: len(started) == 2)
        time.sleep(0.2)
        assert started == ["A one.", "B two."]
        released.set()
        until(connection, "session.done")
    assert started == ["A one.", "B two.", "C three.", "D four."]


def test_a_session_reads_no_more_text_than_it_can_speak(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """While 16 x max_chars characters wait, the next message is not read. It is read when sentences are sent."""
    sending = speaker.Speaker._send_sentence
    waiting: list[int] = []

    async def slow(self: speaker.Speaker, sentence: speaker.Sentence) -> None:
        waiting.append(self.n_chars)
        await speaker.asyncio.sleep(0.01)
        await sending(self, sentence)

    monkeypatch.setattr(speaker.Speaker, "_send_sentence", slow)
    with session(tts, max_chars=20) as connection:
        send(connection, CONFIG | {"max_frames": 1}, *[text_of("One two. ")] * 60, DONE)
        assert until(connection, "session.done")[-1]["total_sentences"] == 60
    assert 300 < max(waiting) <= 320 + 20


WRONG = [
    ("{", "invalid_json"),
    ("[]", "invalid_json"),
    (b"\x00", "invalid_json"),
    ("[" * 10_000, "invalid_json"),
    ({"no": "type"}, "unknown_message"),
    ({"type": ["input.text"]}, "unknown_message"),
    ({"type": "input.text"}, "wrong_type"),
    ({"type": "input.text", "text": 7}, "wrong_type"),
    ({"type": "input.text", "text": "x" * 4097}, "input_too_long"),
    (CONFIG | {"voice": "eve"}, "unknown_voice"),
    (CONFIG | {"response_format": "aac"}, "unsupported_value"),
    (CONFIG | {"response_format": "flac"}, "unsupported_value"),  # not streamed
    (CONFIG | {"stream_audio": 1}, "wrong_type"),
    (CONFIG | {"speed": 2}, "unsupported_field"),
    (CONFIG | {"steps": 99}, "invalid_value"),
    (CONFIG | {"seed": "5"}, "invalid_value"),
    (CONFIG | {"solver": []}, "invalid_value"),
    (CONFIG | {"ref_audio": "data:"}, "unknown_field"),
    (CONFIG | {"model": "other"}, "model_not_found"),
]


def test_wrong_messages_are_errors_of_one_session(tts: voxkern.TTS) -> None:
    """Each wrong message is answered by an error, and the session goes on. Another session gives its sound."""
    expected = {"seven": tts.generate("seven", "ada", **ARGUMENTS).pcm16()}
    with serving(tts) as (client, _), open_session(client) as wrong, open_session(client) as other:
        send(wrong, CONFIG)
        send(other, CONFIG, text_of("seven"))
        for message, code in WRONG:
            send(wrong, message)
            error = receive(wrong)
            assert (error["type"], error["code"]) == ("error", code)
            assert len(error["message"]) < 400
        send(wrong, text_of("sev"), CONFIG, text_of("en"), DONE)
        assert receive(wrong)["code"] == "open_utterance"
        assert sounds(until(wrong, "session.done")) == expected
        send(other, DONE)
        assert sounds(until(other, "session.done")) == expected


@pytest.mark.parametrize(("message", "code"), [*WRONG[:3], (text_of("one"), "no_config"), (DONE, "no_config")])
def test_a_session_that_does_not_begin_with_its_configuration_ends(tts: voxkern.TTS, message: Any, code: str) -> None:
    with session(tts) as connection:
        send(connection, message)
        assert receive(connection)["code"] == code
        with pytest.raises(ConnectionClosed) as closed:
            receive(connection)
        assert closed.value.rcvd.code == 1008


def test_an_oversized_message_ends_one_session(tts: voxkern.TTS) -> None:
    with serving(tts, max_body=2000) as (client, _), open_session(client) as large, open_session(client) as other:
        send(large, CONFIG, text_of("x" * 3000))
        with pytest.raises(ConnectionClosed) as closed:
            receive(large)
        assert closed.value.rcvd.code == 1009
        send(other, CONFIG, text_of("seven"), DONE)
        assert len(sounds(until(other, "session.done"))["seven"]) > 0


def test_cancel_ends_the_utterance_at_once(tts: voxkern.TTS) -> None:
    """The slot is free at the end of the frame, and the next utterance is spoken as usual."""
    expected = {"seven": tts.generate("seven", "ada", **ARGUMENTS).pcm16()}
    with session(tts) as connection:
        long = CONFIG | {"max_frames": 900, "steps": 32}
        send(connection, long, text_of("One two. Three four. Five six. "))
        until(connection, "audio.start")
        wait_for(lambda: tts.engine.n_running == 2)
        states = list(tts.engine.running.values())
        send(connection, {"type": "cancel"})
        done = until(connection, "session.done")[-1]
        assert (done["cancelled"], done["utterance_index"]) == (True, 0)
        assert settled(tts)
        assert max(state.n_frames for state in states) < 450  # of 900
        send(connection, CONFIG, text_of("seven"), DONE)
        messages = until(connection, "session.done")
        assert messages[-1]["utterance_index"] == 1
        assert sounds(messages) == expected


def test_a_client_that_leaves_frees_its_slots(tts: voxkern.TTS) -> None:
    with serving(tts) as (client, server):
        with open_session(client) as connection:
            send(connection, CONFIG | {"max_frames": 900, "steps": 32}, text_of("One two. Three four. Five. "))
            until(connection, "audio.start")
            wait_for(lambda: tts.engine.n_running == 2)
            states = list(tts.engine.running.values())
        assert settled(tts)
        assert max(state.n_frames for state in states) < 450  # of 900
        wait_for(lambda: server.service.n_admitted == server.service.n_sessions == 0)


def test_an_engines_error_ends_one_sentence(
    tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = tts.engine.runner.prefill
    n_failures = 1

    def fail_once(*arguments: Any) -> Any:
        nonlocal n_failures
        n_failures -= 1
        if n_failures >= 0:
            raise RuntimeError("planted")
        return prefill(*arguments)

    with session(tts) as connection, caplog.at_level(logging.ERROR, "voxkern"):
        monkeypatch.setattr(tts.engine.runner, "prefill", fail_once)
        send(connection, CONFIG, text_of("A private text. Another. "), DONE)
        _, error, done, *rest = until(connection, "session.done")
    assert (error["type"], error["code"], error["sentence_index"]) == ("error", "failed", 0)
    assert (done["type"], done["total_bytes"], done["error"]) == ("audio.done", 0, True)
    assert len(sounds([{**rest[0], "sentence_index": 0}, *rest[1:]])["Another."]) > 0
    assert "planted" in caplog.text
    assert "private" not in caplog.text


def test_limits_of_sessions(tts: voxkern.TTS) -> None:
    """More sessions than allowed are refused, and so is an utterance if too many requests wait."""
    with serving(tts, max_sessions=1, max_waiting=0) as (client, server):
        with open_session(client), pytest.raises(InvalidStatus) as refused:
            open_session(client)
        assert refused.value.response.status_code == 429
        wait_for(lambda: server.service.n_sessions == 0)
        with open_session(client) as second:
            server.service.n_admitted = tts.max_batch
            send(second, CONFIG, text_of("one"))
            assert receive(second)["code"] == "queue_full"
            with pytest.raises(ConnectionClosed) as closed:
                receive(second)
            assert closed.value.rcvd.code == 1013
            server.service.n_admitted = 0


def test_an_idle_session_ends_and_so_does_an_endless_utterance(tts: voxkern.TTS) -> None:
    for settings, messages, code in (
        ({"idle_seconds": 0.3}, [CONFIG], "idle"),
        ({"idle_seconds": 0.3}, [CONFIG, text_of("o"), *[text_of("")] * 3], "idle"),
        ({"idle_seconds": 2.0, "request_seconds": 0.1}, [CONFIG, text_of("one")], "too_slow"),
    ):
        with session(tts, **settings) as connection:
            send(connection, *messages)
            assert receive(connection)["code"] == code
            with pytest.raises(ConnectionClosed) as closed:
                receive(connection)
            assert closed.value.rcvd.code == 1008


def test_cancel_ends_utterances_whose_text_is_complete(tts: voxkern.TTS) -> None:
    """After ``input.done``, the dropped utterances end in order. A cancel while nothing runs does nothing."""
    long = CONFIG | {"max_frames": 900, "steps": 32}
    with session(tts) as connection:
        send(connection, long, {"type": "cancel"}, text_of("One."), DONE, text_of("Two."), DONE, text_of("Three"))
        until(connection, "audio.start")
        send(connection, {"type": "cancel"}, DONE)
        ends = [until(connection, "session.done")[-1] for _ in range(4)]
    assert [(end["utterance_index"], end.get("cancelled", False)) for end in ends] == [
        (0, True), (1, True), (2, True), (3, False),
    ]  # fmt: skip


def test_an_utterance_that_is_refused_leaves_the_one_before_it_complete(tts: voxkern.TTS) -> None:
    expected = tts.generate("seven", "ada", **ARGUMENTS).pcm16()
    with serving(tts, max_waiting=0) as (client, server), open_session(client) as connection:
        server.service.n_admitted = tts.max_batch - 1
        send(connection, CONFIG, text_of("seven"), DONE, text_of("two"))
        messages = until(connection, "error")
        assert sounds(messages[:-1]) == {"seven": expected}
        assert (messages[-2]["type"], messages[-1]["code"]) == ("session.done", "queue_full")
        server.service.n_admitted = 0


def test_close_comes_after_the_sound(tts: voxkern.TTS) -> None:
    with session(tts) as connection:
        send(connection, CONFIG, text_of("seven"), DONE, {"type": "session.close"})
        sound = sounds(until(connection, "session.done"))["seven"]
        with pytest.raises(ConnectionClosed) as closed:
            receive(connection)
    assert closed.value.rcvd.code == 1000
    assert sound == tts.generate("seven", "ada", **ARGUMENTS).pcm16()


def test_halves_of_a_character_that_arrive_in_two_messages_are_joined(tts: voxkern.TTS) -> None:
    """JSON writes an emoji as two escapes, which a client may cut. A half without its other half is an error."""
    first, second = (f'{{"type": "input.text", "text": "{half}"}}' for half in ("one \\ud83d", "\\ude00 two"))
    with session(tts) as connection:
        send(connection, CONFIG, first, second, DONE)
        assert list(sounds(until(connection, "session.done"))) == ["one \U0001f600 two"]
        send(connection, second)
        assert receive(connection)["code"] == "invalid_value"
        send(connection, first, DONE)
        assert [m["code"] for m in until(connection, "session.done") if "code" in m] == ["invalid_value"]


def test_an_error_of_the_encoder_ends_one_sentence(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: formats.FileWriter) -> bytes:
        raise RuntimeError("planted")

    config = CONFIG | {"response_format": "flac", "stream_audio": False}
    with session(tts) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(formats.FileWriter, "finish", fail)
            send(connection, config, text_of("One."), DONE)
            _, error, done, _ = until(connection, "session.done")
        assert (error["code"], done["error"]) == ("failed", True)
        send(connection, text_of("One."), DONE)
        assert until(connection, "session.done")[1].startswith(b"fLaC")


def test_pages_of_other_sites_are_refused_without_a_key(tts: voxkern.TTS) -> None:
    """A browser names the page's site in the header ``Origin``."""
    with serving(tts) as (client, _):
        own = f"http://127.0.0.1:{client.base_url.port}"
        with pytest.raises(InvalidStatus) as refused:
            open_session(client, {"Origin": "http://other.example"})
        assert refused.value.response.status_code == 403
        body = {"input": "seven", **ARGUMENTS}
        for origin, status in (("http://other.example", 403), ("null", 403), ("http://[", 403), (own, 200)):
            assert client.post("/v1/audio/speech", json=body, headers={"Origin": origin}).status_code == status
        rebound = {"Origin": "http://other.example", "Host": "other.example"}  # a name that leads to this machine
        assert client.post("/v1/audio/speech", json=body, headers=rebound).status_code == 403
        with open_session(client, {"Origin": own}) as connection:
            send(connection, CONFIG, text_of("seven"), DONE)
            until(connection, "session.done")


def test_the_key(tts: voxkern.TTS) -> None:
    with serving(tts, api_key="secret") as (client, _):
        for headers in (None, {"Authorization": "Bearer wrong"}):
            with pytest.raises(InvalidStatus) as refused:
                open_session(client, headers)
            assert refused.value.response.status_code == 401
        with open_session(client, {"Authorization": "Bearer secret"}) as connection:
            send(connection, CONFIG, text_of("seven"), DONE)
            assert len(sounds(until(connection, "session.done"))["seven"]) > 0


def test_the_end_of_the_server_completes_an_utterance(tts: voxkern.TTS) -> None:
    with serving(tts) as (client, server), open_session(client) as connection:
        config = CONFIG | {"max_frames": 40, "steps": 16}
        send(connection, config, text_of("One two. Three."), DONE)
        until(connection, "audio.start")
        server.handle_exit(15, None)
        sound = b"".join(message for message in until(connection, "session.done") if isinstance(message, bytes))
        parts = [tts.generate(text, "ada", seed=5, steps=16, max_frames=40).pcm16() for text in ("One two.", "Three.")]
        assert sound == b"".join(parts)
