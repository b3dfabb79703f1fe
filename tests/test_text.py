"""Tests of the prompt's tokens, and of the parts into which texts in several languages are split.

``test_long_texts.py`` tests the time, and that nothing of any text is lost.
"""

import json
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest

from voxkern.checkpoint import CheckpointError
from voxkern.prompt import PromptEncoder
from voxkern.random_checkpoint import TINY_VOICES, byte_tokenizer
from voxkern.reference.config import AudioModelConfig
from voxkern.text import split_text

AUDIO = AudioModelConfig(8192, 21, 36, audio_token_id=24, begin_audio_token_id=25)

# the token ids of the public template, with mistral-common's tekken_240911 and the voice casual_male
PARIS = [1, 25, *[24] * 147, 36, 42572, 1395, 1261, 15568, 5970, 1033, 35, 25]


def encoder(
    folder: Path, voices: dict[str, int], audio: AudioModelConfig = AUDIO, vocab_size: int = 131072
) -> PromptEncoder:
    return PromptEncoder(folder / "tekken.json", voices, audio, vocab_size)


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
    prompt = encoder(tmp_path, {"casual_male": 147})
    assert prompt.encode("Paris is a beautiful city!", "casual_male") == PARIS
    assert len(PARIS) == 158


def test_tiny(tiny_folder: Path) -> None:
    prompt = encoder(tiny_folder, TINY_VOICES)
    ids = [64 + byte for byte in "Hé\n\n0".encode()]
    assert prompt.encode("Hé\n\n0", "bob") == [1, 25, *[24] * 9, 36, *ids, 35, 25]


def test_a_voice_the_tokenizer_does_not_know(tiny_folder: Path) -> None:
    prompt = encoder(tiny_folder, {**TINY_VOICES, "new": 3})
    assert prompt.encode("a", "new") == [1, 25, 24, 24, 24, 36, 64 + 97, 35, 25]


def test_control_words_in_a_text_stay_text(tiny_folder: Path) -> None:
    prompt = encoder(tiny_folder, TINY_VOICES)
    assert prompt.encode("[AUDIO]</s>", "ada").count(24) == TINY_VOICES["ada"]


@pytest.mark.parametrize(
    ("text", "voice", "error", "named"),
    [
        ("", "ada", ValueError, "text is empty"),
        (" \n\t", "ada", ValueError, "text is empty"),
        (None, "ada", TypeError, "text must be a string"),
        ("\ufeff \ufeff", "ada", ValueError, "text is empty"),
        ("ab\ud800c", "ada", ValueError, r"text has a lone surrogate, U\+D800, at position 2"),
        ("a", "zoe", ValueError, "voice 'zoe' is unknown; known voices: ada, bob"),
    ],
)
def test_wrong_requests(tiny_folder: Path, text: str, voice: str, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        encoder(tiny_folder, TINY_VOICES).encode(text, voice)


def test_a_tokenizer_without_audio(tmp_path: Path) -> None:
    tekken = byte_tokenizer({})
    del tekken["audio"]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(CheckpointError, match="no 'audio' section"):
        encoder(tmp_path, {})


def test_a_byte_order_mark_is_not_spoken(tiny_folder: Path) -> None:
    assert encoder(tiny_folder, TINY_VOICES).encode("\ufeffa", "ada") == encoder(tiny_folder, TINY_VOICES).encode(
        "a", "ada"
    )
    marks = len("\ufeff".encode())  # the tiny model has a token for each byte; marks inside the text stay
    inside = encoder(tiny_folder, TINY_VOICES).encode("a\ufeffa", "ada")
    assert len(inside) == len(encoder(tiny_folder, TINY_VOICES).encode("aa", "ada")) + marks


@pytest.mark.parametrize(
    ("key", "token", "of_file"),
    [("audio_token_id", r"\[AUDIO\]", 24), ("begin_audio_token_id", r"\[BEGIN_AUDIO\]", 25)],
)
def test_a_tokenizer_of_another_model(tiny_folder: Path, key: str, token: str, of_file: int) -> None:
    named = f"{token} has id {of_file}, but the model's {key} is 26"
    with pytest.raises(CheckpointError, match=named):
        encoder(tiny_folder, TINY_VOICES, replace(AUDIO, **{key: 26}))


def test_a_tokenizer_with_more_ids_than_the_model(tiny_folder: Path) -> None:
    n_ids = encoder(tiny_folder, TINY_VOICES).tokenizer.tokenizer.n_words
    encoder(tiny_folder, TINY_VOICES, vocab_size=n_ids)
    with pytest.raises(CheckpointError, match=f"has {n_ids} token ids, but the model's vocab_size is {n_ids - 1}"):
        encoder(tiny_folder, TINY_VOICES, vocab_size=n_ids - 1)


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
        ("这是一。这是二！「这是三？」完", 6, ["这是一。", "这是二！", "「这是三？」", "完"]),  # no spaces
        ("一、二，三", 2, ["一、", "二，", "三"]),
        ("这是……那是……完", 5, ["这是……", "那是……完"]),  # an ellipsis of two characters needs no space after it
        ("他说：“你好。”然后走了", 7, ["他说：", "“你好。”", "然后走了"]),
        ("Hello world. «Oui, dit-il.» Non", 14, ["Hello world.", "«Oui, dit-il.»", "Non"]),
        ("a, b and c; d. e", 11, ["a, b and c;", "d. e"]),  # a sentence that is too long is split at clauses
        ("aa bb cc dd", 5, ["aa bb", "cc dd"]),  # a clause that is too long is split at words
        ("aaaaaaaa bb", 5, ["aaaaa", "aaa", "bb"]),  # a word that is too long is cut
        ("这是一个没有标点的句子而且很长", 6, ["这是一个没有", "标点的句子而", "且很长"]),  # between ideographs
        ("ロボットー", 3, ["ロボッ", "トー"]),  # no part begins with a small kana or a prolonged sound mark
        ("東京（とうきょう）へ行った", 8, ["東京（とうきょ", "う）へ行った"]),  # or with a closing bracket
        ("東京（とう", 3, ["東京", "（とう"]),  # and none ends with an opening bracket
        ("well-known-thing", 7, ["well-", "known-", "thing"]),
        ("a\u200bb\u200bc", 2, ["a\u200b", "b\u200b", "c"]),  # zero width spaces
        ("สวัสดีครับ", 6, ["สวัสดี", "ครับ"]),  # between grapheme clusters
        ("e\u0301" * 3, 3, ["e\u0301", "e\u0301", "e\u0301"]),
        ("🇩🇪🇫🇷🇬🇧", 4, ["🇩🇪🇫🇷", "🇬🇧"]),
        ("👩‍👩‍👧👩‍👩‍👧", 6, ["👩‍👩‍👧", "👩‍👩‍👧"]),
        ("👩‍👩‍👧👩‍👩‍👧", 2, ["👩‍👩‍👧", "👩‍👩‍👧"]),  # one cluster may be longer than max_chars
    ],
)
def test_parts(text: str, max_chars: int | None, parts: list[str]) -> None:
    assert split_text(text, max_chars) == parts


def test_no_string() -> None:
    with pytest.raises(TypeError, match="text must be a string, got int"):
        split_text(3, 10)  # type: ignore[arg-type]
