"""The prompt, to the token."""

import json
from pathlib import Path

import mistral_common
import pytest

from voxkern.checkpoint import CheckpointError
from voxkern.maker import TINY_VOICES, byte_tokenizer
from voxkern.prompt import Prompt

# the public template's ids, for mistral-common's tekken_240911 and the voice casual_male
PARIS = [1, 25, *[24] * 147, 36, 42572, 1395, 1261, 15568, 5970, 1033, 35, 25]


def test_golden(tmp_path: Path) -> None:
    """mistral-common ships a tekken of version 3; as the public file does, it is given version 7 and an audio part."""
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
    prompt = Prompt(tmp_path / "tekken.json", {"casual_male": 147})
    assert prompt.encode("Paris is a beautiful city!", "casual_male") == PARIS
    assert len(PARIS) == 158


def test_tiny(tiny_folder: Path) -> None:
    prompt = Prompt(tiny_folder / "tekken.json", TINY_VOICES)
    ids = [64 + byte for byte in "Hé\n\n0".encode()]
    assert prompt.encode("Hé\n\n0", "bob") == [1, 25, *[24] * 9, 36, *ids, 35, 25]


def test_a_voice_the_tokenizer_does_not_know(tiny_folder: Path) -> None:
    prompt = Prompt(tiny_folder / "tekken.json", {**TINY_VOICES, "new": 3})
    assert prompt.encode("a", "new") == [1, 25, 24, 24, 24, 36, 64 + 97, 35, 25]


def test_control_words_in_a_text_stay_text(tiny_folder: Path) -> None:
    prompt = Prompt(tiny_folder / "tekken.json", TINY_VOICES)
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
        Prompt(tiny_folder / "tekken.json", TINY_VOICES).encode(text, voice)


def test_a_tokenizer_without_audio(tmp_path: Path) -> None:
    tekken = byte_tokenizer({})
    del tekken["audio"]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(CheckpointError, match="no 'audio' section"):
        Prompt(tmp_path / "tekken.json", {})
