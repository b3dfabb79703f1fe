"""Tests of writing and reading checkpoints, of the peak memory, and of errors that name what is broken."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import voxkern
from voxkern.checkpoint import CheckpointError, find_folder, is_finite, read_checkpoint, write_checkpoint
from voxkern.random_checkpoint import make_checkpoint


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Copy the tiny checkpoint to a folder in which a test may change files."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def _edit(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "consolidated.safetensors"
    state = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, path)


def test_round_trip(tiny_folder: Path, tmp_path: Path) -> None:
    read = read_checkpoint(tiny_folder)
    params = json.loads((tiny_folder / "params.json").read_text())
    tokenizer = (tiny_folder / "tekken.json").read_text()
    write_checkpoint(tmp_path, params, read.model.state_dict(), tokenizer, read.voices)
    again = read_checkpoint(tmp_path)
    assert again.model.config == read.model.config
    state = read.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    assert {name: v.tolist() for name, v in again.voices.items()} == {n: v.tolist() for n, v in read.voices.items()}
    assert not any(p.requires_grad for p in again.model.parameters())


def test_same_seed_same_weights(tiny_folder: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", dtype=torch.float32, encoder=True)
    make_checkpoint(tmp_path / "b", dtype=torch.float32, encoder=True, seed=1)
    weights = [(f / "consolidated.safetensors").read_bytes() for f in (tiny_folder, tmp_path / "a", tmp_path / "b")]
    assert weights[0] == weights[1] != weights[2]
    assert sum(f.stat().st_size for f in tiny_folder.rglob("*") if f.is_file()) < 5e6


def test_dtype_changes(tiny_folder: Path) -> None:
    half = read_checkpoint(tiny_folder, torch.bfloat16)
    whole = read_checkpoint(tiny_folder)
    for name, tensor in half.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole.model.state_dict()[name].bfloat16())
    assert all(v.dtype == torch.bfloat16 for v in half.voices.values())


def test_encoder_is_loaded_where_the_checkpoint_has_one(tiny_folder: Path, tmp_path: Path) -> None:
    assert hasattr(read_checkpoint(tiny_folder).model.audio_tokenizer, "encoder_blocks")
    without = read_checkpoint(make_checkpoint(tmp_path)).model
    assert not hasattr(without.audio_tokenizer, "encoder_blocks")


def test_voices_from_pt_files(folder: Path) -> None:
    voice = torch.randn(4, 64)
    torch.save(voice, folder / "voice_embedding" / "Eve.pt")
    assert torch.equal(read_checkpoint(folder).voices["eve"], voice)


class _Evil:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_pt_files_run_no_code(folder: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"v": _Evil()}, folder / "voice_embedding" / "eve.pt")
    with pytest.raises(CheckpointError, match=r"eve\.pt"):
        read_checkpoint(folder)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm__weight": None}, r"copy: norm\.weight is missing"),
        ({"norm__weight": torch.ones(65)}, r"norm\.weight is \[65\], but params\.json requires \[64\]"),
        ({"norm__weight": torch.ones(64, dtype=torch.int32)}, r"norm\.weight is I32, must be"),
        ({"norm__weight": torch.full((64,), torch.nan)}, r"norm\.weight has a value that is NaN"),
        ({"layers__1__attention__wq__weight": torch.eye(64) / 0}, r"layers\.1\.attention\.wq\.weight has a value"),
        ({"output__weight": torch.ones(3)}, r"output\.weight is not a tensor of this model"),
    ],
)
def test_broken_tensors(folder: Path, changes: dict, named: str) -> None:
    _edit(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors: truncated"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("params.json", None, r"params\.json: no such file"),
        ("params.json", b"{", r"params\.json: "),
        ("params.json", b"\xff\xfe\xfa", r"params\.json: "),
        ("params.json", b"[]", r"must hold a JSON object"),
        ("consolidated.safetensors", None, r"consolidated\.safetensors: no such file"),
        ("tekken.json", None, r"tekken\.json"),
        ("tekken.json", b"{}", r"tekken\.json"),
        ("voice_embedding/ada.safetensors", b"xx", r"ada\.safetensors: cannot be read"),
        ("voice_embedding/zoe.pt", b"xx", r"zoe\.pt: cannot be read"),
    ],
)
def test_broken_files(folder: Path, file: str, content: bytes | None, named: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        voxkern.load(folder)


@pytest.mark.parametrize(
    "voice",
    [torch.zeros(3, 63), torch.zeros(64), torch.zeros(0, 64), torch.full((2, 64), torch.inf), torch.ones(2, 64).int()],
)
def test_broken_voices(folder: Path, voice: torch.Tensor) -> None:
    save_file({"embedding": voice}, folder / "voice_embedding" / "ada.safetensors")
    with pytest.raises(CheckpointError, match=r"ada\.safetensors"):
        read_checkpoint(folder)


def test_voice_length_disagrees_with_the_tokenizer(folder: Path) -> None:
    save_file({"embedding": torch.ones(6, 64)}, folder / "voice_embedding" / "ada.safetensors")
    with pytest.raises(CheckpointError, match="gives voice 'ada' 5 tokens, but the voice's file has 6 embeddings"):
        voxkern.load(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "none", "./a/b", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="no such folder"):
            find_folder(source)


def test_a_hub_id_is_downloaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_folder("owner/name") == tiny_folder
    weights = ["consolidated*.safetensors", "consolidated*.index.json"]
    assert asked == [("owner/name", ["params.json", *weights, "tekken.json", "voice_embedding/*"])]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="owner/name: not a folder, and the hub download failed: no connection"):
        find_folder("owner/name")


def test_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(10007).to(dtype)
        assert is_finite(x)
        for place in (0, 5000, -1):
            for value in (torch.nan, torch.inf, -torch.inf):
                y = x.clone()
                y[place] = value
                assert not is_finite(y)
    assert is_finite(torch.empty(0))


PEAK = """
import sys, torch, voxkern
from pathlib import Path
from voxkern.checkpoint import read_checkpoint
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
read_checkpoint(Path(sys.argv[3]), getattr(torch, sys.argv[2]))  # memory that torch itself takes at its first use
before = status("VmRSS")
model = read_checkpoint(Path(sys.argv[1]), getattr(torch, sys.argv[2])).model
print(status("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_peak_memory(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    """Loading takes less than 1.2 x the weights' bytes in a fresh process, even if it changes their dtype."""
    dims = {"vocab_size": 100_000, "dim": 640, "hidden_dim": 2560, "n_layers": 12}
    folder = make_checkpoint(tmp_path, overrides=dims | _acoustic(640))
    command = [sys.executable, "-c", PEAK, folder, dtype, tiny_folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 2.5e8
    assert grown < 1.2 * weights


def _acoustic(dim: int) -> dict:
    multimodal = json.loads(json.dumps(voxkern.random_checkpoint.tiny_params()["multimodal"]))
    multimodal["audio_model_args"]["acoustic_transformer_args"].update(dim=dim, input_dim=dim)
    return {"multimodal": multimodal}
