"""Read the weights of a checkpoint folder: one safetensors file, or several files that an index lists."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "consolidated.safetensors"
INDEX = "*.safetensors.index.json"  # holds {"weight_map": {tensor: file}}, the index of Hugging Face's sharded files
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EIGHT_BITS = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
DTYPES = FLOATS | EIGHT_BITS


class CheckpointError(ValueError):
    """Raised for a checkpoint folder that cannot be used; the message names the file, and the wrong tensor if any."""


@dataclass(frozen=True)
class TensorInfo:
    """Holds the file, shape and dtype of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Return the file, shape and dtype of each tensor of a checkpoint, by name; only the files' headers are read.

    If the folder has no ``consolidated.safetensors``, the files of its index are read.

    Raises:
        CheckpointError: a file is missing or truncated, a tensor has none of DTYPES, or the index and its files do not
            have the same tensors.
    """
    weights = folder / WEIGHTS
    indices = [path for path in sorted(folder.glob(INDEX)) if not path.name.startswith(".")]
    if weights.exists() or not indices:
        return _table_of_file(weights)
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: has several indices of weights: {', '.join(i.name for i in indices)}")
    file_of = _read_index(indices[0])
    table: dict[str, TensorInfo] = {}
    for file in sorted(set(file_of.values())):
        of_file = _table_of_file(folder / file)
        expected = {name for name in file_of if file_of[name] == file}
        if wrong := sorted(expected ^ of_file.keys()):
            has, lacks = (file, indices[0].name) if wrong[0] in of_file else (indices[0].name, file)
            raise CheckpointError(f"{folder}: {wrong[0]} is in {has}, but not in {lacks} ({len(wrong)} such tensors)")
        table |= of_file
    return table


def usual_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """Return the dtype of most values of a checkpoint that have more than 8 bits.

    If that dtype is float64, return float32, because the kernels have no float64.

    Raises:
        CheckpointError: no tensor has more than 8 bits.
    """
    n_values: Counter[torch.dtype] = Counter()
    for info in tensors:
        if info.dtype not in EIGHT_BITS.values():
            n_values[info.dtype] += info.numel
    if not n_values:
        raise CheckpointError("no tensor of the checkpoint has more than 8 bits")
    usual = n_values.most_common(1)[0][0]
    return torch.float32 if usual == torch.float64 else usual


def read_tensors(table: dict[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors, memory-mapped, the largest first.

    The files are opened again after each 1/32 of all bytes, so that the pages of tensors already used are unmapped.
    """
    names = sorted(table, key=lambda name: -table[name].numel)
    limit = sum(info.numel * info.dtype.itemsize for info in table.values()) // 32
    files: dict[Path, Any] = {}
    n_read = 0
    for name in names:
        path = table[name].file
        if path not in files:
            files[path] = safe_open(path, "pt")
        tensor = files[path].get_tensor(name)
        n_read += tensor.nbytes
        yield name, tensor
        del tensor
        if n_read > limit:
            files, n_read = {}, 0


def is_finite(x: Tensor) -> bool:
    """Return whether all values of `x` are finite.

    For all dtypes but e4m3, only the minimum and maximum are checked: both are NaN if any value is. This check runs at
    31 GB/s, but ``isfinite`` would run at 0.5 GB/s.
    """
    if x.numel() == 0:
        return True
    if x.dtype == torch.float8_e4m3fn:  # it has no infinity, and NaN has all bits but the sign set
        return not bool((x.view(torch.uint8) & 0x7F == 0x7F).any())
    low, high = torch.aminmax(x)
    return bool(low.isfinite() & high.isfinite())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, which may begin with a byte order mark.

    Raises:
        CheckpointError: the file is missing, is not a JSON object, or has a key twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise CheckpointError(f"{path}: has the key {twice!r} twice in one object")
        return found

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _table_of_file(path: Path) -> dict[str, TensorInfo]:
    table = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{path}: {name} is {part.get_dtype()}, must be one of {', '.join(DTYPES)}")
                table[name] = TensorInfo(path, tuple(part.get_shape()), dtype)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from error
    return table


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor, by the tensor's name."""
    index = read_json(path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: must have the object 'weight_map', which maps each tensor to its file")
    for name, file in files.items():
        # a file of another folder, such as "../x.safetensors", is not part of the checkpoint
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} must be in a .safetensors file of the same folder, got {file!r}")
    return files
