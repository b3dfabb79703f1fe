"""Functions that read and write checkpoint folders in Mistral's format; weights are read memory-mapped.

::

    params.json                     the configuration
    consolidated.safetensors        all tensors, with the names of VoxtralTTS.state_dict(); or several files and
                                    an index, such as consolidated.safetensors.index.json
    tekken.json                     the tokenizer, with the number of embeddings of each voice
    voice_embedding/NAME.pt         one tensor [N, dim] per voice (or NAME.safetensors)
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .heap import return_freed_memory
from .output_file import replacing
from .quantized_files import linears_in_8_bits, row_scales, without_activation_scales
from .reference import Config, VoxtralTTS
from .reference.params_schema import FORMATS_ON_DISK
from .reference.quantized import FORMATS, format_of, quantizable, quantize_weight, replace_linears
from .voice import check_rows
from .weight_files import (
    WEIGHTS,
    CheckpointError,
    TensorInfo,
    is_finite,
    read_json,
    read_tensors,
    tensor_table,
    usual_dtype,
)

PARAMS, TOKENIZER, VOICES = "params.json", "tekken.json", "voice_embedding"
FILES = [PARAMS, "consolidated*.safetensors", "consolidated*.index.json", TOKENIZER, f"{VOICES}/*"]
ENCODER = ("audio_tokenizer.input_proj.", "audio_tokenizer.encoder_blocks.")


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
        return Path(snapshot_download(str(source), allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source}: not a folder, and the hub download failed: {error}") from error


def read_params(folder: Path) -> dict[str, Any]:
    """Return the content of ``params.json``.

    Raises:
        CheckpointError: the file is missing, is not a JSON object, or has a key twice.
    """
    return read_json(folder / PARAMS)


def read_checkpoint(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    on_tensor: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Read a checkpoint folder into memory.

    On the CPU, tensors that keep their dtype stay memory-mapped. Other tensors are converted one at a time, the largest
    first, so that the peak memory is little more than the model's. With `quantize`, all tensors are copied. 8-bit
    weights and their scales keep their dtypes.

    Args:
        folder: a folder with the files listed at the top of this module.
        dtype: dtype of the model; None takes the dtype of most values in the checkpoint, or float32 if that dtype is
            float64. All tensors are converted to it, because the kernels and the KV cache have one dtype.
        device: device of the model.
        quantize: "int8" or "fp8" quantises the large weights of a checkpoint that has no 8-bit weights, see
            :mod:`voxkern.reference.quantized`.
        on_tensor: is called with the number of elements of each tensor that was read.

    Raises:
        ValueError: `quantize` is unknown, or the checkpoint's weights have 8 bits already.
        CheckpointError: a file is missing or wrong; the message names the file, and the tensor if one is wrong.
        ConfigError: ``params.json`` describes a model that voxkern cannot run.
    """
    config = Config.from_params(read_params(folder))
    on_disk = config.quantization
    if quantize is not None:
        format_of(quantize)  # refuses an unknown name
        if on_disk:
            raise ValueError(f"quantize is {quantize!r}, but the weights of {folder} are in {on_disk} already")
        config = replace(config, quantization=quantize)
    table = without_activation_scales(tensor_table(folder)) if on_disk else tensor_table(folder)
    with torch.device("meta"):
        model = VoxtralTTS(config, encoder=any(name.startswith(ENCODER) for name in table))
        linears = quantizable(model)
        stored = linears_in_8_bits(folder, table, linears, on_disk)
        scales = {f"{name}.qscale_weight": linear.out_features for name, linear in stored.items()}
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        _check_names(folder, table, shapes | {name: table[name].shape for name in scales})
        to_quantize = linears if quantize else {}
        if config.quantization:
            replace_linears(model, stored | to_quantize, FORMATS[config.quantization])
    if dtype is None:
        dtype = usual_dtype(table.values())
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(table):
        info, layer, n = table[name], name.removesuffix(".weight"), tensor.numel()
        if name in scales:
            state[name] = row_scales(name, info, tensor, scales[name]).to(device)
        elif quantize and layer in to_quantize:
            state[name], scale = quantize_weight(tensor.to(device), FORMATS[quantize])
            _check_finite(name, info, scale)  # the scale is not finite if a value of its row is not finite
            state[f"{layer}.qscale_weight"] = scale
        else:
            # With `quantize`, tensors are copied, because a mapped one keeps the 16-bit weights around it mapped too.
            kept = info.dtype if layer in stored else dtype
            state[name] = tensor.to(device=device, dtype=kept, copy=quantize is not None)
            _check_finite(name, info, state[name])  # a large value of another dtype is infinite in fp16
        del tensor  # the file's pages stay mapped as long as the tensor exists
        if on_tensor is not None:
            on_tensor(n)
    model.load_state_dict(state, strict=True, assign=True)
    model.mm_audio_embeddings.audio_codebook_embeddings.offsets = (
        model.mm_audio_embeddings.audio_codebook_embeddings.offsets.to(device)
    )
    voices = {name: voice.to(device) for name, voice in read_voices(folder, config.backbone.dim, dtype).items()}
    if quantize:
        return_freed_memory()  # quantize_weight() has made and freed many fp32 blocks
    return Checkpoint(model.eval().requires_grad_(False), voices, folder)


def read_voices(folder: Path, dim: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the voices of a checkpoint folder, a dict from names in lower case to embeddings [N, dim].

    The dict is empty if the folder ``voice_embedding`` is missing. Hidden files are left out: a Mac writes a
    ``._ada.pt`` beside ``ada.pt``.

    Args:
        folder: the checkpoint folder.
        dim: width of the backbone.
        dtype: dtype of the result; None keeps the files'.

    Raises:
        CheckpointError: a voice cannot be read, is not floating-point [N, dim], or has a value that is not finite in
            `dtype`; or two files have the same voice's name.
    """
    voices: dict[str, Tensor] = {}
    files = _voice_files(folder)
    for path in files:
        name = path.stem.lower()
        if name in voices:
            same = " and ".join(file.name for file in files if file.stem.lower() == name)
            raise CheckpointError(f"{path.parent}: {same} are both the voice {name!r}")
        voice = _read_voice(path)
        try:
            voices[name] = check_rows(check_rows(voice, dim, "a voice").to(dtype), dim, "a voice")
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return voices


def write_checkpoint(
    folder: Path, params: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: str, voices: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint folder that :func:`read_checkpoint` can read.

    Args:
        folder: the folder to write. A missing folder is created. An existing checkpoint is replaced, and its
            voices are deleted. Each new file is written beside the old one and then renamed.
        params: the content of ``params.json``.
        state: the model's ``state_dict()``.
        tokenizer: the text of ``tekken.json``.
        voices: maps each voice's name to its embeddings, [N, dim].
    """
    (folder / VOICES).mkdir(parents=True, exist_ok=True)
    for name, text in ((PARAMS, json.dumps(params, indent=2) + "\n"), (TOKENIZER, tokenizer)):
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    _write_tensors(folder / WEIGHTS, state)
    for path in _voice_files(folder):
        path.unlink()
    for name, voice in voices.items():
        _write_tensors(folder / VOICES / f"{name}.safetensors", {"embedding": voice})


def quantize_checkpoint(
    source: Path, target: Path, quantize: str, on_tensor: Callable[[int], None] | None = None
) -> None:
    """Read a checkpoint that has no 8-bit weights, and write it with 8-bit weights.

    All other tensors, and the voices, are written in the dtype of most values.

    Args:
        source: the checkpoint folder to read.
        target: the folder to write, see :func:`write_checkpoint`.
        quantize: "int8" or "fp8".
        on_tensor: is called with the number of elements of each tensor that was read.

    Raises:
        ValueError: `quantize` is unknown, or the checkpoint's weights have 8 bits already.
        CheckpointError: the checkpoint cannot be read.
    """
    format_of(quantize)
    names = {format_: name for name, format_ in FORMATS_ON_DISK.items()}
    params = read_params(source) | {"quantization": {"qformat_weight": names[quantize], "qscheme_act": "NO_SCALES"}}
    try:
        tokenizer = (source / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{source / TOKENIZER}: {error}") from error
    checkpoint = read_checkpoint(source, quantize=quantize, on_tensor=on_tensor)
    write_checkpoint(target, params, checkpoint.model.state_dict(), tokenizer, checkpoint.voices)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new)
        new.chmod(0o644)  # safetensors makes the file readable by its owner only


def _voice_files(folder: Path) -> list[Path]:
    files = sorted((folder / VOICES).glob("*"))
    return [path for path in files if path.suffix in (".pt", ".safetensors") and not path.name.startswith(".")]


def _check_finite(name: str, info: TensorInfo, tensor: Tensor) -> None:
    if not is_finite(tensor):
        wrong = f"has a value that is NaN, infinite or too large for {str(tensor.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{info.file}: {name} {wrong}")


def _check_names(folder: Path, found: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a tensor of this model" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name].shape)}, but params.json requires {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"{folder}: " + "; ".join(problems[:8]) + more)


def _read_voice(path: Path) -> Tensor:
    try:
        if path.suffix == ".pt":
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path)
            value = next(iter(tensors.values())) if len(tensors) == 1 else tensors
    except Exception as error:  # torch.load passes on every kind of exception of its unpickler
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: must hold one tensor, got {type(value).__name__}")
    return value
