"""Tests of files that are empty, hidden, ambiguous, sharded or cannot be written, and of outputs that stay whole."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import voxkern
from voxkern.audio import Audio, Timings
from voxkern.checkpoint import CheckpointError, read_checkpoint
from voxkern.cli import app
from voxkern.output_file import replacing
from voxkern.random_checkpoint import make_checkpoint

run = CliRunner().invoke
WEIGHTS = "consolidated.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def _audio(samples: np.ndarray) -> Audio:
    return Audio(samples.astype(np.float32), 24000, np.zeros((37, 0), np.int16), 0, True, Timings(0, 0, 0, 0))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_an_empty_sound_is_a_file_that_can_be_read(suffix: str, tmp_path: Path) -> None:
    samples, rate = soundfile.read(_audio(np.zeros(0)).save(tmp_path / f"a{suffix}"))
    assert rate == 24000
    assert samples.tolist() == ([0.0] if suffix == ".flac" else [])


@pytest.mark.parametrize("options", [[], ["--stream"]])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_a_text_that_ends_at_once_has_its_own_exit_status(folder: Path, suffix: str, options: list[str]) -> None:
    weights = load_file(folder / WEIGHTS)
    head = weights["acoustic_transformer.semantic_codebook_output.weight"]
    for sign in (1, -1):  # END's logit is the largest for one of the signs
        head[:] = -sign
        head[1] = sign
        save_file(weights, folder / WEIGHTS)
        audio = voxkern.load(folder, backend="torch").generate("seven", seed=3, max_frames=2, steps=1)
        if not len(audio.samples):
            break
    assert (len(audio.samples), audio.ended) == (0, True)
    out = folder / f"o{suffix}"
    arguments = ["--model", str(folder), "--seed", "3", "--max-frames", "2", "--steps", "1", "--backend", "torch"]
    done = run(app, ["say", "seven", "-o", str(out), *arguments, *options])
    assert done.exit_code == 3
    assert "holds no sound" in done.stderr
    assert soundfile.info(out).samplerate == 24000


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_has_the_integers_of_pcm16(suffix: str, tmp_path: Path) -> None:
    audio = _audio(np.concatenate((np.linspace(-1.2, 1.2, 70_001), [0.5 / 32767, -0.5 / 32767, 1.5 / 32767])))
    written = soundfile.read(audio.save(tmp_path / f"a{suffix}"), dtype="int16")[0]
    assert written.tobytes() == audio.pcm16()
    wanted = np.rint(np.clip(audio.samples.astype(np.float64), -1, 1) * 32767)
    assert np.abs(written - wanted).max() <= 1  # a product may be rounded to fp32 before it is rounded to an integer
    assert (written.min(), written.max()) == (-32767, 32767)


def test_a_byte_order_mark_is_not_spoken(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--seed", "3", "--max-frames", "3", "--steps", "1", "--backend", "torch"]
    outputs = []
    for i, (text, option, stdin) in enumerate(
        [(b"seven", "--file", None), (b"\xef\xbb\xbfseven\r\n", "--file", None), (b"", "", b"\xef\xbb\xbfseven")]
    ):
        (tmp_path / "t.txt").write_bytes(text)
        say = ["say", *([option, str(tmp_path / "t.txt")] if option else []), "-o", str(tmp_path / f"{i}.wav")]
        done = run(app, [*say, *arguments], input=stdin)
        assert done.exit_code == 0, done.output
        outputs.append((tmp_path / f"{i}.wav").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_params_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    params = (folder / "params.json").read_bytes()
    (folder / "params.json").write_bytes(b"\xef\xbb\xbf" + params)
    assert read_checkpoint(folder).model.config.backbone.dim == 64


def test_a_key_that_occurs_twice_is_named(folder: Path) -> None:
    path = folder / "params.json"
    path.write_text(path.read_text().replace('"dim": 64', '"dim": 64, "dim": 64', 1))
    with pytest.raises(CheckpointError, match=r"params\.json: has the key 'dim' twice in one object"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"dim": ' + b"9" * 5000 + b"}"])
def test_json_that_python_refuses_is_named(folder: Path, content: bytes) -> None:
    (folder / "params.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params\.json: "):
        read_checkpoint(folder)


def test_hidden_files_are_no_voices(folder: Path) -> None:
    (folder / "voice_embedding" / "._ada.pt").write_bytes(b"\0\5\26\7Mac OS X")
    assert set(read_checkpoint(folder).voices) == {"ada", "bob"}


@pytest.mark.parametrize("second", ["ada.pt", "ADA.safetensors"])
def test_two_files_of_one_voice_are_named(folder: Path, second: str) -> None:
    path = folder / "voice_embedding" / second
    if second.endswith(".pt"):
        torch.save(torch.ones(5, 64), path)
    else:
        save_file({"embedding": torch.ones(5, 64)}, path)
    with pytest.raises(CheckpointError, match=rf"{second}.*both the voice 'ada'|both the voice 'ada'") as error:
        read_checkpoint(folder)
    assert second in str(error.value)
    assert "ada.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("voice", "named"),
    [
        (torch.ones(5, 64).to_sparse(), "must be a dense tensor"),
        (torch.ones(5, 64, device="meta"), "must be a dense tensor|cannot be read"),
        (torch.ones(5, 64, dtype=torch.complex64), "a voice must be floats"),
        ({"embedding": torch.ones(5, 64)}, "must hold one tensor, got dict"),
        (torch.full((5, 64), 1e60, dtype=torch.float64), "is NaN, infinite or too large for float32"),
    ],
)
def test_voices_of_a_wrong_kind_are_named(folder: Path, voice: object, named: str) -> None:
    torch.save(voice, folder / "voice_embedding" / "zoe.pt")
    with pytest.raises(CheckpointError, match=rf"zoe\.pt: .*({named})"):
        read_checkpoint(folder)


def test_a_voice_may_be_a_parameter(folder: Path) -> None:
    torch.save(torch.nn.Parameter(torch.ones(5, 64)), folder / "voice_embedding" / "zoe.pt")
    voice = read_checkpoint(folder).voices["zoe"]
    assert torch.equal(voice, torch.ones(5, 64))
    assert not voice.requires_grad


def test_a_file_with_two_tensors_is_no_voice(folder: Path) -> None:
    save_file({"a": torch.ones(5, 64), "b": torch.ones(5, 64)}, folder / "voice_embedding" / "zoe.safetensors")
    with pytest.raises(CheckpointError, match=r"zoe\.safetensors: must hold one tensor"):
        read_checkpoint(folder)


def test_a_weight_is_checked_in_the_dtype_that_is_used(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["norm.weight"][3] = 1e5
    save_file(weights, folder / WEIGHTS)
    assert read_checkpoint(folder, torch.bfloat16).model.norm.weight[3] > 9e4
    with pytest.raises(
        CheckpointError, match=r"norm\.weight has a value that is NaN, infinite or too large for float16"
    ):
        read_checkpoint(folder, torch.float16)


def _shard(folder: Path, index: str = "consolidated.safetensors.index.json") -> dict:
    """Split the weights of a checkpoint into three files with an index, and return the index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"consolidated-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    content = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / index).write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("index", ["consolidated.safetensors.index.json", "model.safetensors.index.json"])
def test_sharded_weights_are_those_of_one_file(tiny_folder: Path, folder: Path, index: str) -> None:
    _shard(folder, index)
    expected = read_checkpoint(tiny_folder).model.state_dict()
    state = read_checkpoint(folder).model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    done = run(app, ["info", str(folder)])
    assert done.exit_code == 0
    assert f"in {len(load_file(tiny_folder / WEIGHTS))} tensors" in done.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder, index: index["weight_map"].popitem(), r"is in .*00003\.safetensors, but not in consolidated"),
        (
            lambda folder, index: index["weight_map"].update(extra="consolidated-00001-of-00003.safetensors"),
            r"extra is in consolidated\.safetensors\.index\.json, but not in consolidated-00001",
        ),
        (lambda folder, index: index["weight_map"].update(extra="../x.safetensors"), "extra must be in a .safetensors"),
        (lambda folder, index: index["weight_map"].update(extra="consolidated.pt"), "extra must be in a .safetensors"),
        (lambda folder, index: index["weight_map"].update(extra=3), "extra must be in a .safetensors"),
        (lambda folder, index: index.pop("weight_map"), "must have the object 'weight_map'"),
        (
            lambda folder, index: (folder / "consolidated-00002-of-00003.safetensors").unlink(),
            r"consolidated-00002-of-00003\.safetensors: no such file",
        ),
        (
            lambda folder, index: (folder / "model.safetensors.index.json").write_text("{}"),
            "has several indices of weights",
        ),
    ],
)
def test_a_wrong_index_is_named(folder: Path, change: object, named: str) -> None:
    index = _shard(folder)
    change(folder, index)  # type: ignore[operator]
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(folder)


def test_make_replaces_a_checkpoint_only_with_force(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert run(app, ["make", str(folder)]).exit_code == 0
    torch.save(torch.ones(3, 64), folder / "voice_embedding" / "old.pt")
    (folder / "notes.txt").write_text("mine")
    before = (folder / WEIGHTS).read_bytes()
    done = run(app, ["make", str(folder), "--seed", "3"])
    assert done.exit_code == 1
    assert "is not empty; --force replaces the checkpoint" in done.stderr
    assert (folder / WEIGHTS).read_bytes() == before
    assert run(app, ["make", str(folder), "--seed", "3", "--force"]).exit_code == 0
    assert (folder / WEIGHTS).read_bytes() != before
    assert set(read_checkpoint(folder).voices) == {"ada", "bob"}  # the old voice is gone
    assert (folder / "notes.txt").read_text() == "mine"
    done = run(app, ["make", str(folder / "notes.txt")])
    assert done.exit_code == 1
    assert "is not a folder" in done.stderr


def test_an_error_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _audio(np.ones(9)).save(tmp_path / "a.wav")
    before = path.read_bytes()

    def full(file: Path, *_: object, **__: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        _audio(np.zeros(9)).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_an_error_leaves_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("voxkern.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_checkpoint(folder, dtype=torch.float32, encoder=True)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before  # params.json and tekken.json of the same sizes have the same content


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near.wav").symlink_to(tmp_path / "far" / "a.wav")
    with replacing(tmp_path / "near.wav") as new:
        new.write_text("new")
    assert (tmp_path / "near.wav").is_symlink()
    assert (tmp_path / "far" / "a.wav").read_text() == "new"


def test_targets_that_cannot_be_written_are_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    cases = {"folder.wav": "is a folder", "pipe.wav": "is not a regular file", "none/a.wav": "no such folder"}
    if os.getuid():  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        cases["locked/a.wav"] = "cannot be written"
    for name, named in cases.items():
        done = run(app, ["say", "a", "-o", str(tmp_path / name), "--model", "/none"])  # not reached: there is no model
        assert done.exit_code == 1
        assert named in done.stderr.replace("\n", "")
        with pytest.raises(ValueError, match=named):
            _audio(np.zeros(3)).save(tmp_path / name)
