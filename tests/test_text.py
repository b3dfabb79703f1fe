"""Tests of the prompt's tokens, and of the parts into which long texts are split.

Parts are as long as `max_chars` allows, and only spaces are lost.
"""

import json
import re
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxkern.checkpoint import CheckpointError
from voxkern.random_checkpoint import TINY_VOICES, byte_tokenizer
from voxkern.text import PromptEncoder, split_text

# the token ids of the public template, with mistral-common's tekken_240911 and the voice casual_male
PARIS = [1, 25, *[24] * 147, 36, 42572, 1395, 1261, 15568, 5970, 1033, 35, 25]


def test_golden(tmp_path: Path) -> None:
    """The prompt has the public template's tokens.

    mistral-common ships a tekken.json of version 3. The test changes this file to version 7 and adds an audio section,
    as in the public model's file.
    """
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    names = byte_tokenizer({})["special_tokens"]
    tekken["config"]["version"] = "v7"
    tekken["special_tokens"] = [t for t in names if not t["token_str"].startswith("<SPECIAL")]
    taken = {t["rank"] for t in tekken["special_tokens"]}
    tekken["special_tokens"] += [
        {"rank": i, "token_str": f"<SPECIAL_{i}>", "is_control": True} for i in range(1000) if i not in taken
    ]
    tekken["special_tokens"].sort(key=lambda t: t["rank"])
    tekken["audio"] = byte_tokenizer({"casual_male": 147})["audio"]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    prompt = PromptEncoder(tmp_path / "tekken.json", {"casual_male": 147})
    assert prompt.encode("Paris is a beautiful city!", "casual_male") == PARIS
    assert len(PARIS) == 158


def test_tiny(tiny_folder: Path) -> None:
    prompt = PromptEncoder(tiny_folder / "tekken.json", TINY_VOICES)
    ids = [64 + byte for byte in "Hé\n\n0".encode()]
    assert prompt.encode("Hé\n\n0", "bob") == [1, 25, *[24] * 9, 36, *ids, 35, 25]


def test_a_voice_the_tokenizer_does_not_know(tiny_folder: Path) -> None:
    prompt = PromptEncoder(tiny_folder / "tekken.json", {**TINY_VOICES, "new": 3})
    assert prompt.encode("a", "new") == [1, 25, 24, 24, 24, 36, 64 + 97, 35, 25]


def test_control_words_in_a_text_stay_text(tiny_folder: Path) -> None:
    prompt = PromptEncoder(tiny_folder / "tekken.json", TINY_VOICES)
    assert prompt.encode("[AUDIO]</s>", "ada").count(24) == TINY_VOICES["ada"]


@pytest.mark.parametrize(
    ("text", "voice", "error", "named"),
    [
        ("", "ada", ValueError, "text is empty"),
        (" \n\t", "ada", ValueError, "text is empty"),
        (None, "ada", TypeError, "text must be a string"),
        ("a", "zoe", ValueError, "voice 'zoe' is unknown; there are ada, bob"),
    ],
)
def test_wrong_requests(tiny_folder: Path, text: str, voice: str, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        PromptEncoder(tiny_folder / "tekken.json", TINY_VOICES).encode(text, voice)


def test_a_tokenizer_without_audio(tmp_path: Path) -> None:
    tekken = byte_tokenizer({})
    del tekken["audio"]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(CheckpointError, match="no 'audio' section"):
        PromptEncoder(tmp_path / "tekken.json", {})


@pytest.mark.parametrize(
    ("text", "max_chars", "parts"),
    [
        ("One. Two! Three?", 400, ["One. Two! Three?"]),
        ("One. Two! Three?", None, ["One. Two! Three?"]),
        ("  One. Two. ", 12, ["  One. Two. "]),  # short enough: left alone
        ("One. Two! Three?", 10, ["One. Two!", "Three?"]),
        ("One. Two! Three?", 9, ["One. Two!", "Three?"]),
        ("One. Two! Three?", 8, ["One.", "Two!", "Three?"]),
        ('He said "No." Then he went.', 15, ['He said "No."', "Then he went."]),
        ("It costs 3.50 in all. Yes.", 21, ["It costs 3.50 in all.", "Yes."]),
        ("Wait... what? No", 13, ["Wait... what?", "No"]),
        ("first line\nsecond line", 12, ["first line", "second line"]),
        ("यह एक है। यह दो है।", 10, ["यह एक है।", "यह दो है।"]),
        ("这是一。这是二！「这是三？」完", 5, ["这是一。", "这是二！", "「这是三？」", "完"]),  # no spaces
        ("一、二，三", 2, ["一、", "二，", "三"]),
        ("a, b and c; d. e", 11, ["a, b and c;", "d. e"]),  # a sentence that is too long is split at clauses
        ("aa bb cc dd", 5, ["aa bb", "cc dd"]),  # a clause that is too long is split at words
        ("aaaaaaaa bb", 5, ["aaaaaaaa", "bb"]),  # a word is never split
    ],
)
def test_parts(text: str, max_chars: int | None, parts: list[str]) -> None:
    assert split_text(text, max_chars) == parts


@given(st.text(st.sampled_from("ab. ,!\n?\"'é。"), max_size=80), st.integers(1, 30))
def test_nothing_is_lost_and_parts_fit(text: str, max_chars: int) -> None:
    parts = split_text(text, max_chars)
    assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", text)
    if len(text) > max_chars:
        for part in parts:
            assert part == part.strip()
            assert len(part) <= max_chars or not re.search(r"\s", part)


def test_no_string() -> None:
    with pytest.raises(TypeError, match="text must be a string, got int"):
        split_text(3, 10)  # type: ignore[arg-type]
