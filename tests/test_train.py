"""Tests of the functions that train the demo voice, on synthetic sounds; flite is not needed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from voxkern.reference.config import EMPTY_AUDIO, END_AUDIO
from voxkern.reference.train.codec import spectral_loss
from voxkern.reference.train.data import FRAME, VOICES, WORDS, WordBank
from voxkern.reference.train.params import word_id
from voxkern.reference.train.recogniser import words_right
from voxkern.reference.train.speech import AUDIO, BEGIN_AUDIO, NEXT, REPEAT, Batch, corrupt, make_batch
from voxkern.reference.train.stage import TrainingStage


@pytest.mark.parametrize(
    ("said", "heard", "right"),
    [
        ("one two three", "one two three", 3),
        ("one two three", "one three", 2),
        ("one two three", "one two nine three", 2),
        ("one two three", "two two three", 2),
        ("one", "two two two", 0),
        ("one two", "", 0),
    ],
)
def test_words_right(said: str, heard: str, right: int) -> None:
    assert words_right(said.split(), heard.split()) == right


def test_labels_name_the_word_and_its_frame() -> None:
    quiet, loud = torch.zeros(FRAME), torch.full((FRAME,), 0.5)
    long, short = torch.cat((quiet, loud, loud, quiet)), torch.cat((loud, quiet))
    bank = WordBank([[long, short]], first=[1, 4], n_labels=6)
    sound, labels = bank.speak(0, [1, 0])
    assert labels.tolist() == [4, 5, 0, 1, 2, 3]
    torch.testing.assert_close(sound, torch.cat((short, long)))


def test_spectral_loss_is_of_magnitudes() -> None:
    sound = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    assert spectral_loss(sound, sound, step=0) == 0
    assert spectral_loss(-sound, sound, step=0) == 0
    assert spectral_loss(0.5 * sound, sound, step=0) > 0.5


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    codes = [
        [[torch.randint(2, 23, (n, 37), generator=generator) for _ in range(5)] for n in range(5, 5 + len(WORDS))]
        for _ in VOICES
    ]
    return make_batch(codes, np.random.default_rng(3))


def test_a_batch_has_the_words_of_its_text_as_targets(batch: Batch) -> None:
    for ids, codes, next_codes, word, pointer in zip(
        batch.ids, batch.codes, batch.next, batch.word, batch.pointer, strict=True
    ):
        start, stop = (ids == NEXT).nonzero().item() + 1, (ids == REPEAT).nonzero().item()
        text = [(i - word_id(0)) // 4 for i in ids[start:stop].tolist()]
        asked = (next_codes[:, 0] != EMPTY_AUDIO).nonzero().squeeze(1)
        assert ids[asked[0]] == BEGIN_AUDIO
        assert (ids[asked[1:]] == AUDIO).all()
        assert torch.equal(next_codes[asked[:-1]], codes[asked[1:]])  # a target is the next position's input
        assert next_codes[asked[-1]].tolist() == [END_AUDIO] + [EMPTY_AUDIO] * 36
        numbers = word[asked].tolist()
        assert numbers == sorted(numbers)
        for i, word_now in enumerate(text):
            assert numbers.count(i) == 5 + word_now  # word n has 5 + n frames in `batch`
            assert (pointer[asked][word[asked] == i] == start + i).all()
        assert pointer[asked[-1]] == stop


def test_a_spoilt_history_keeps_ends_and_most_semantic_codes(batch: Batch) -> None:
    spoilt = corrupt(batch.codes)
    ends = batch.codes[..., 1] == EMPTY_AUDIO
    assert torch.equal(spoilt[ends], batch.codes[ends])
    frames = ~ends
    assert spoilt[frames][:, 1:].min() >= 2
    assert spoilt[frames][:, 1:].max() <= 22
    assert 0.85 < (spoilt[frames][:, 0] == batch.codes[frames][:, 0]).float().mean() < 0.99
    assert (spoilt[frames][:, 1:] != batch.codes[frames][:, 1:]).float().mean() > 0.1


def test_a_stage_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def train(minutes: float) -> tuple[TrainingStage, nn.Linear]:
        torch.manual_seed(0)
        layer = nn.Linear(2, 1)
        stage = TrainingStage(tmp_path / "work" / "s.pt", layer, minutes, rate=0.1)
        while not stage.ended:
            loss = layer(torch.ones(1, 2)).square().sum()
            stage.learn(loss, {"loss": loss})
        return stage, layer

    first, layer = train(0.0005)
    assert first.step > 0
    second, same = train(0.0005)  # no time is left, so no step runs
    assert second.step == first.step
    assert torch.equal(same.weight, layer.weight)
    third, _ = train(0.001)
    assert third.step > first.step
