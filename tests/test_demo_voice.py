"""Tests that a speech recogniser understands the demo voice."""

import shutil

import pytest
import torch

pytest.importorskip("pocketsphinx", reason="speech recognition needs pocketsphinx: pip install 'voxkern[test]'")

import voxkern
from bench.quality.errors import large_tiles
from bench.quality.recognition import Score, Speaker, digit_strings, listen, sentences
from voxkern.reference.train.data import DIGITS, RATE, WORDS
from voxkern.reference.train.recogniser import Recogniser


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(DIGITS)


@pytest.mark.parametrize(("voice", "text"), [("slt", "seven three one nine"), ("rms", "four six two")])
def test_the_demo_voice_is_understood(recogniser: Recogniser, voice: str, text: str) -> None:
    audio = voxkern.load(backend="torch").generate(text, voice=voice, seed=7, max_frames=80)
    assert audio.ended
    assert recogniser.recognise(audio.samples, RATE) == text.split()


@pytest.mark.slow
def test_the_demo_voice_is_understood_on_kernels(recogniser: Recogniser) -> None:
    """Backbone, flow head and codec run in the interpreter; the semantic codes equal those of plain PyTorch."""
    arguments = {"voice": "rms", "seed": 7, "steps": 2, "solver": "ab2", "max_frames": 12}
    tts = voxkern.load(backend="triton")
    decode = tts.model.audio_tokenizer.stream().decode
    del tts.model.audio_tokenizer.stream  # the codec is slow frame by frame: below, one chunk holds all frames
    with large_tiles():
        audio = tts.generate("eight", **arguments)
        sound = decode(torch.from_numpy(audio.codes).long().unsqueeze(0)).flatten().numpy()
    assert audio.ended
    assert recogniser.recognise(sound, RATE) == ["eight"]
    plain = voxkern.load(backend="torch").generate("eight", **arguments)
    assert (audio.codes[0] == plain.codes[0]).all()  # the semantic codes, which determine the word


def test_the_wider_vocabulary() -> None:
    text = "good evening monday march twenty"
    audio = voxkern.load(backend="torch").generate(text, voice="slt", seed=7, max_frames=100)
    assert audio.ended
    assert Recogniser(WORDS).recognise(audio.samples, RATE) == text.split()


def test_the_recogniser_rejects_reversed_speech(recogniser: Recogniser) -> None:
    tts = voxkern.load(backend="torch")
    audio = tts.generate("four nine two", voice="rms", seed=1, max_frames=60)
    assert recogniser.recognise(audio.samples, RATE) == ["four", "nine", "two"]
    assert recogniser.recognise(audio.samples[::-1].copy(), RATE) != ["four", "nine", "two"]


def test_other_texts_make_sound() -> None:
    audio = voxkern.load(backend="torch").generate("Grüße, 42!", seed=1, max_frames=4)
    assert audio.samples.any()


def test_sentences_are_of_known_words() -> None:
    found = sentences(200)
    assert {word for text in found for word in text.split()} <= set(WORDS)
    assert all(2 <= len(text.split()) <= 7 for text in found)
    assert len(set(found)) > 150


def test_a_score_counts_words_and_strings() -> None:
    score = Score()
    score.add(["one", "two", "three"], ["one", "two", "nine"])
    score.add(["four"], ["four"])
    assert score.figures == {
        "words": (4, "words"), "words recognised": (75, "%"), "strings": (2, "strings"), "strings recognised": (50, "%")
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is missing: apt-get install flite")
def test_unseen_strings(recogniser: Recogniser) -> None:
    speaker = Speaker(voxkern.load(backend="torch", max_batch=16), "euler", 7)
    score = listen(speaker, digit_strings(100), [0, 1, 2], recogniser, show=20)
    print(score)
    assert score.words_right >= 0.95 * score.words
    assert score.strings_right >= 0.85 * score.strings
    assert all(speaker.ended)
    assert max(speaker.lengths) <= 1.5
