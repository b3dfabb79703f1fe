"""Tests of errors.py and distortion.py in bench/quality/: flipped codes, SNR and distances, on tiny models."""

import math
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bench.quality import distortion, errors
from bench.quality.errors import Flips, conditions, generate_histories, measured, next_frames, snr, sound
from bench.results import ResultRow, read
from voxkern.checkpoint import read_checkpoint
from voxkern.generation_params import CFG_ALPHA
from voxkern.reference.config import END_AUDIO
from voxkern.reference.noise import noise, seed_tensor
from voxkern.tts import TTS


def frames(n: int) -> torch.Tensor:
    """Return `n` frames of code 12: level 10 of 0..20 in the acoustic codes, and no END."""
    return torch.full((n, 37), 12)


def values(rows: list[ResultRow]) -> dict[str, float]:
    return {row.metric: row.value for row in rows}


def test_flips_are_counted_by_level() -> None:
    truth, codes = frames(5), frames(5)
    codes[0, 1], codes[1, 36] = 13, 11
    codes[2, 5:8] = 14
    codes[3, 9], codes[3, 10] = 15, 22
    codes[4, 0] = 7
    assert Flips.of(codes, truth) == Flips(acoustic=180, by=(2, 3, 2), semantic=5, semantic_flipped=1)
    assert Flips.of(truth, truth) == Flips(180, (0, 0, 0), 5, 0)


def test_frames_that_a_side_ends_at_have_no_acoustic_codes() -> None:
    truth, codes = frames(3), frames(3)
    truth[0, 0] = codes[1, 0] = END_AUDIO
    truth[0, 1:] = codes[1, 1:] = 2
    codes[2, 1] = 13
    assert Flips.of(codes, truth) == Flips(acoustic=36, by=(1, 0, 0), semantic=3, semantic_flipped=2)


def test_snr_of_a_known_signal() -> None:
    wave = torch.sin(torch.arange(4800, dtype=torch.float64))
    assert snr(1.01 * wave, wave) == pytest.approx(40)
    assert snr(wave + 0.001 * wave.flip(0), wave) == pytest.approx(60)
    assert snr(wave.clone(), wave) == math.inf


def test_a_model_has_no_flips_against_itself(tiny_folder: Path) -> None:
    exact = TTS(read_checkpoint(tiny_folder, torch.float64))
    histories = generate_histories(exact, ["one two"], max_frames=3)
    assert [history.voice for history in histories] == ["ada", "bob"]
    truth = next_frames(exact, histories)
    flips = Flips.of(next_frames(exact, histories), truth)
    assert flips.by == (0, 0, 0)
    assert flips.semantic_flipped == 0
    assert flips.semantic == len(truth) == sum(len(history.codes) + 1 for history in histories)
    assert snr(sound(exact, histories), sound(exact, histories)) == math.inf


def test_teacher_forcing_reproduces_the_generated_frames(tiny_folder: Path) -> None:
    """In one dtype, the frame generated after the first n frames of a history equals the history's next frame.

    The sound of a history equals that of generate().
    """
    tts = TTS(read_checkpoint(tiny_folder, torch.float32))
    histories = generate_histories(tts, ["one two"], max_frames=4)
    found = iter(next_frames(tts, histories))
    for i, history in enumerate(histories):
        again = torch.stack([next(found) for _ in range(len(history.codes) + 1)])
        assert Flips.of(again[:-1], history.codes).semantic_flipped == 0
        assert (again[:-1] != history.codes).float().mean() < 0.01  # only rounding may differ
        audio = tts.generate("one two", history.voice, i, max_frames=4)
        torch.testing.assert_close(sound(tts, [history]).float(), torch.from_numpy(audio.samples))


@pytest.fixture(scope="module")
def rows(tiny_folder: Path) -> list[ResultRow]:
    return measured(tiny_folder, 1, ("bf16",), max_frames=2)


@pytest.mark.slow
def test_rows_of_a_small_run(rows: list[ResultRow]) -> None:
    models = {key: values(list(of)) for key, of in groupby(rows, lambda row: (row.dtype, row.provider))}
    assert list(models) == [("bf16", "torch"), ("bf16", "voxkern")]
    for of in models.values():
        n, n_semantic = of["acoustic codes compared"], of["semantic codes compared"]
        assert n % 36 == 0
        assert n <= 36 * n_semantic
        assert n_semantic <= 2 * 3
        shares = [of[f"acoustic codes flipped{how}"] for how in ("", " by 1 level", " by 2 levels", " by more")]
        assert shares[0] == pytest.approx(sum(shares[1:]))
        for share in shares:
            assert share * n / 100 == pytest.approx(round(share * n / 100))
        assert 20 < of["waveform SNR"] < 70  # bf16 has 8 significant bits


def test_rows_say_what_they_are(rows: list[ResultRow]) -> None:
    assert len({row.key for row in rows}) == len(rows)
    assert {row.bench for row in rows} == {"errors"}
    assert {row.metric for row in rows if row.how == "measured"} == {"waveform SNR"}
    assert {row.command for row in rows} == {"python -m bench errors --texts 1"}
    n = values(rows[:8])["acoustic codes compared"]
    assert f" of {n:5.0f} = " in errors.table(rows).splitlines()[1]


def test_only_a_named_table_is_written(
    rows: list[ResultRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "measured", lambda folder, n_texts: rows)
    monkeypatch.setattr(errors, "FILE", tmp_path / "none.csv")
    errors.main([])
    assert "voxkern" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    errors.main(["--csv", str(tmp_path / "rows.csv")])
    written = read((tmp_path / "rows.csv").read_text())
    assert values(written) == values(rows)
    assert all(row.date and row.versions for row in written)


def test_distances_shrink_with_evaluations(tiny_folder: Path) -> None:
    tts = TTS(read_checkpoint(tiny_folder, torch.float32), max_batch=4)
    rows = distortion.distances(tts, (2, 16))
    assert len({row.key for row in rows}) == len(rows) == 2 * 2 * 3
    solvers = {key: values(list(of)) for key, of in groupby(rows, lambda row: row.steps)}
    assert len({of["codes compared"] for of in solvers.values()}) == 1
    for solver in ("euler", "ab2"):
        few, many = solvers[f"{solver}:2"], solvers[f"{solver}:16"]
        assert many[distortion.RMSE] < few[distortion.RMSE] / 4
        assert many["codes that differ"] < few["codes that differ"]
    h, _ = distortion.spoken(tts)
    assert solvers["ab2:2"]["codes compared"] == 36 * len(h)
    of = solvers["euler:2"]
    said = f"euler:2 {of[distortion.RMSE]:.4f} {of['codes that differ']:.1f} % of {36 * len(h)}"
    assert distortion.table(rows).splitlines()[1].split() == said.split()


def test_a_solver_is_the_one_that_generate_has(tiny_folder: Path) -> None:
    tts = TTS(read_checkpoint(tiny_folder, torch.float32))
    histories = generate_histories(tts, ["one"], max_frames=2)
    h, x = conditions(tts, histories)
    n = len(histories[0].codes) + 1
    assert torch.equal(x[:n], noise(seed_tensor([0] * n), torch.arange(n), 36))
    head = tts.model.acoustic_transformer
    found = distortion.solve(head, h, x, "ab2", distortion.time_grid("ab2", 4))
    torch.testing.assert_close(found, head.solve(h, torch.full((len(h),), CFG_ALPHA), x, 4, "ab2"))
