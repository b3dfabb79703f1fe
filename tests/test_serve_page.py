"""Tests of the server's page without a browser: its security policy, and the facts that it shows."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server needs starlette: pip install 'voxkern[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx: pip install 'voxkern[test]'")

from serving import serving

import voxkern
from voxkern.serve.page import FILE

KEY, MAX_CHARS = "a secret", 300


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch")


def sha256_source(block: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"


def test_the_policy_allows_the_pages_own_blocks_only(tiny: voxkern.TTS) -> None:
    with serving(tiny, api_key=KEY) as (client, _):
        answer = client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    (style,) = re.findall(r"<style[^>]*>(.*?)</style>", answer.text, re.DOTALL)
    assert dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")) == {
        "default-src": "'none'",
        "script-src": sha256_source(script),
        "style-src": sha256_source(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_the_page_needs_nothing_that_the_policy_refuses() -> None:
    html = FILE.read_text(encoding="utf-8")
    assert re.findall(r"""\b(?:src|href|action)\s*=\s*["'](?!data:)[^"']*""", html) == []
    assert re.findall(r"https?://|url\(|@import|\beval\b", html) == []
    assert re.findall(r"<[^<>]*\s(?:on\w+|style)\s*=[^<>]*>", html) == []


def test_about_has_what_the_page_shows(tiny: voxkern.TTS) -> None:
    with serving(tiny) as (client, _):
        answer = client.get("/about")
    voices = list(tiny.model.config.voices)
    assert sorted(voices) == sorted(tiny.voices)
    expected = {"model": "tiny", "sampling_rate": 24000, "steps": 7, "voices": voices, "max_chars": 4096}
    assert answer.json() == expected | {"needs_key": False, "words": []}
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_about_follows_settings_and_new_voices_and_needs_no_key(tiny: voxkern.TTS) -> None:
    with serving(tiny, api_key=KEY, max_chars=9, words=("one", "two")) as (client, _):
        facts = client.get("/about").json()
        assert (facts["needs_key"], facts["max_chars"], facts["words"]) == (True, 9, ["one", "two"])
        assert KEY not in client.get("/").text
        tiny.add_voice("added", next(iter(tiny.voices.values())))
        try:
            assert client.get("/about").json()["voices"] == [*facts["voices"], "added"]
        finally:
            tiny.remove_voice("added")
