"""The demo voice, as a recogniser hears it."""

import pytest

pytest.importorskip("pocketsphinx", reason="hearing needs pocketsphinx: pip install 'voxkern[test]'")

import voxkern
from bench.hearing import digit_strings, listen, speaker
from voxkern.reference.train.data import RATE, WORDS
from voxkern.reference.train.hear import Ear


@pytest.fixture(scope="module")
def ear() -> Ear:
    return Ear(WORDS)


@pytest.mark.parametrize(("voice", "text"), [("slt", "seven three one nine"), ("rms", "four six two")])
def test_the_demo_voice_is_understood(ear: Ear, voice: str, text: str) -> None:
    audio = voxkern.load(backend="torch").generate(text, voice=voice, seed=7, max_frames=80)
    assert audio.ended
    assert ear.hear(audio.samples, RATE) == text.split()


def test_the_ear_hears_what_is_said_and_nothing_else(ear: Ear) -> None:
    tts = voxkern.load(backend="torch")
    audio = tts.generate("four nine two", voice="rms", seed=1, max_frames=60)
    assert ear.hear(audio.samples, RATE) == ["four", "nine", "two"]
    assert ear.hear(audio.samples[::-1].copy(), RATE) != ["four", "nine", "two"]


def test_other_texts_make_sound() -> None:
    audio = voxkern.load(backend="torch").generate("Grüße, 42!", seed=1, max_frames=4)
    assert audio.samples.any()


@pytest.mark.slow
def test_unseen_strings(ear: Ear) -> None:
    tts = voxkern.load(backend="torch", max_batch=16)
    score = listen(speaker(tts, "euler", 7), digit_strings(100), [0, 1, 2], ear, show=20)
    print(score)
    assert score.words_right >= 0.95 * score.words
    assert score.strings_right >= 0.85 * score.strings
