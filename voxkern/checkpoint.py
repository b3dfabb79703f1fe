"""Functions that read and write checkpoint folders in Mistral's format; weights are read memory-mapped.

::

    params.json                     the configuration
    consolidated.safetensors        all tensors, with the names of VoxtralTTS.state_dict()
    tekken.json                     the tokenizer, with the number of embeddings of each voice
    voice_embedding/NAME.pt         one tensor [N, dim] per voice (or NAME.safetensors)
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .reference import Config, VoxtralTTS

PARAMS, WEIGHTS, TOKENIZER, VOICES = "params.json", "consolidated.safetensors", "tekken.json", "voice_embedding"
ENCODER = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class CheckpointError(ValueError):
    """Raised for a checkpoint folder that cannot be used; the message names the file, and the wrong tensor if any."""


@dataclass(frozen=True)
class TensorInfo:
    """Holds the shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """Holds the model and the voices of a checkpoint in memory.

    Attributes:
        model: the reference model, in eval mode, without gradients.
        voices: maps each voice's name to its embeddings, [N, dim] in the model's dtype. In a prompt, they replace N
            [AUDIO] tokens.
        folder: the folder that was read; the tokenizer is ``folder / "tekken.json"``.
    """

    model: VoxtralTTS
    voices: dict[str, Tensor]
    folder: Path


def find_folder(source: str | Path) -> Path:
    """Return the folder of a checkpoint: `source` itself, or the folder with the download if `source` is a hub id.

    The download shows its progress.

    Raises:
        CheckpointError: `source` is neither a folder nor a hub id that can be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder (and not a hub id of the form OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[PARAMS, WEIGHTS, TOKENIZER, f"{VOICES}/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: not a folder, and the hub download failed: {error}") from error


def read_params(folder: Path) -> dict[str, Any]:
    """Return the content of ``params.json``.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    path = folder / PARAMS
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(params).__name__}")
    return params


def read_checkpoint(folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint folder into memory.

    On the CPU, tensors that keep their dtype stay memory-mapped. Other tensors are converted one at a time, the largest
    first, so that the peak memory is little more than the model's.

    Args:
        folder: a folder with the files listed at the top of this module.
        dtype: dtype of the model; None keeps the checkpoint's.
        device: device of the model.

    Raises:
        CheckpointError: a file is missing or wrong; the message names the file, and the tensor if one is wrong.
        ConfigError: ``params.json`` describes a model that voxkern cannot run.
    """
    config = Config.from_params(read_params(folder))
    path = folder / WEIGHTS
    tensors = tensor_table(path)
    with torch.device("meta"):
        model = VoxtralTTS(config, encoder=any(name.startswith(ENCODER) for name in tensors))
    _check_names(
        path,
        {name: t.shape for name, t in tensors.items()},
        {name: tuple(t.shape) for name, t in model.state_dict().items()},
    )
    state = {}
    names = sorted(tensors, key=lambda name: -tensors[name].numel)
    for name, tensor in _read_tensors(path, names, path.stat().st_size // 32):
        state[name] = tensor.to(device=device, dtype=dtype)
        del tensor  # the file's pages stay mapped as long as the tensor exists
    model.load_state_dict(state, strict=True, assign=True)
    model.mm_audio_embeddings.audio_codebook_embeddings.offsets = (
        model.mm_audio_embeddings.audio_codebook_embeddings.offsets.to(device)
    )
    voices = {
        name: voice.to(device=device, dtype=model.norm.weight.dtype)
        for name, voice in read_voices(folder, config.backbone.dim).items()
    }
    return Checkpoint(model.eval().requires_grad_(False), voices, folder)


def tensor_table(path: Path) -> dict[str, TensorInfo]:
    """Return the shape and dtype of each tensor in a safetensors file, by name; only the file's header is read.

    Raises:
        CheckpointError: the file is missing or truncated, or a tensor is not floating-point.
    """
    table = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                dtype = _FLOATS.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is {part.get_dtype()}, must be one of {', '.join(_FLOATS)}")
                table[name] = TensorInfo(tuple(part.get_shape()), dtype)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from error
    return table


def read_voices(folder: Path, dim: int) -> dict[str, Tensor]:
    """Return the voices of a checkpoint folder, a dict from names in lower case to embeddings [N, dim].

    The dict is empty if the folder ``voice_embedding`` is missing.

    Raises:
        CheckpointError: a voice cannot be read, is not floating-point [N, dim], or has a value that is not finite.
    """
    voices = {}
    for path in sorted((folder / VOICES).glob("*")):
        if path.suffix not in (".pt", ".safetensors"):
            continue
        voice = _read_voice(path)
        if voice.ndim != 2 or voice.shape[1] != dim or not voice.shape[0] or voice.dtype not in _FLOATS.values():
            raise CheckpointError(f"{path}: a voice must be floats [N, {dim}], got {voice.dtype} {list(voice.shape)}")
        if not is_finite(voice):
            raise CheckpointError(f"{path}: holds a value that is not finite")
        voices[path.stem.lower()] = voice
    return voices


def write_checkpoint(
    folder: Path, params: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: str, voices: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint folder that :func:`read_checkpoint` can read.

    Args:
        folder: the folder to write. A missing folder is created; existing files of a checkpoint are replaced.
        params: the content of ``params.json``.
        state: the model's ``state_dict()``.
        tokenizer: the text of ``tekken.json``.
        voices: maps each voice's name to its embeddings, [N, dim].
    """
    (folder / VOICES).mkdir(parents=True, exist_ok=True)
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes the file readable by its owner only
    for name, voice in voices.items():
        save_file({"embedding": voice.contiguous()}, folder / VOICES / f"{name}.safetensors")


def is_finite(x: Tensor) -> bool:
    """Return whether all values of `x` are finite.

    Only the minimum and maximum are checked: both are NaN if any value is. The check runs at 31 GB/s, but ``isfinite``
    would run at 0.5 GB/s.
    """
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool(low.isfinite() & high.isfinite())


def _read_tensors(path: Path, names: list[str], remap_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors `names` in order.

    The file is opened again after every `remap_bytes`, so that the pages of tensors already used are unmapped.
    """
    left = iter(names)
    name = next(left, None)
    while name is not None:
        read = 0
        with safe_open(path, "pt") as file:
            while name is not None and read <= remap_bytes:
                tensor = file.get_tensor(name)
                if not is_finite(tensor):
                    raise CheckpointError(f"{path}: {name} holds a value that is not finite")
                read += tensor.nbytes
                yield name, tensor
                del tensor
                name = next(left, None)


def _check_names(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a tensor of this model" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])}, but params.json requires {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"{path}: " + "; ".join(problems[:8]) + more)


def _read_voice(path: Path) -> Tensor:
    try:
        if path.suffix == ".pt":
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            value = next(iter(load_file(path).values()), None)
    except Exception as error:  # torch.load passes on every kind of exception of its unpickler
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: must hold one tensor, got {type(value).__name__}")
    return value
