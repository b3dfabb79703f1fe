"""Compile all kernels of a model in advance, with every set of constants that a frame or a prompt needs.

Triton stores compiled kernels on disk, under a key made of source, constants and architecture. Compiling needs no GPU
of that architecture. The usual launches are made on tensors without memory, under a driver that compiles kernels but
runs none.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

from .accelerate import accelerate
from .engine.kv_cache import PAGE_SIZE, KVCache
from .reference import Config
from .reference.model import model_without_memory
from .reference.quantized import FORMATS, format_of
from .validation import require_triton, to_int

ROWS = (1, 2, 3, 8)  # rows of batches and prompts to compile; the ledger checks that other numbers need no others


@torch.inference_mode()
def warm_up(
    config: Config,
    arch: str,
    max_batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    on_binary: Callable[[str], None] | None = None,
    quantize: str | None = None,
    overlap: bool = False,
) -> int:
    """Compile the kernels that a model from :func:`voxkern.load` launches with the same arguments.

    Args:
        config: the model's configuration; weights are not needed.
        arch: architecture such as "sm_90", one of ``ARCHITECTURES`` in :mod:`voxkern.compile_only`.
        max_batch: the most requests that run side by side, 1..64.
        dtype: dtype of the weights.
        on_binary: called with a kernel's name for each binary that is ready, compiled now or found on disk.
        quantize: "int8" or "fp8" if `load` quantises the large weights of a checkpoint in 16 or 32 bits.
        overlap: whether launches overlap; `arch` must then be sm_90 or newer.

    Returns:
        The number of binaries that are ready.

    Raises:
        ValueError: `arch` is unknown or too old for `overlap`, `max_batch` is not in 1..64, `quantize` is unknown, or
            the configuration's weights have 8 bits already.
        TypeError: `max_batch` is not an integer.
        ModuleNotFoundError: Triton is not installed.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET=1).
    """
    require_triton()
    max_batch = to_int("max_batch", max_batch, 1, None)
    format_ = None if quantize is None else format_of(quantize)
    if config.quantization:
        if format_ is not None:
            raise ValueError(f"quantize is {quantize!r}, but the weights are {config.quantization} already")
        format_ = FORMATS[config.quantization]
    from triton import knobs

    from .compile_only import OVERLAPPING, compiling_for
    from .engine.fused_runner import DecodeBatch, fused_modules_of
    from .fused.backbone import TokenBatch
    from .fused.codec import FusedCodecStream
    from .kernels.launch_config import overlapped

    if overlap and arch not in OVERLAPPING:
        raise ValueError(f"overlap needs one of the architectures {', '.join(OVERLAPPING)}, got {arch!r}")
    ready: set[str] = set()

    def note(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        if hash in ready:
            return
        ready.add(hash)
        if on_binary is not None:
            on_binary(name)

    hooks = knobs.runtime.kernel_load_start_hook
    with compiling_for(arch), torch.device("meta"):
        hooks.add(note)
        try:
            model = model_without_memory(config, dtype, format_)
            accelerate(model, max_batch)
            kv_cache = KVCache(config.backbone, 2, dtype, torch.device("meta"))
            # two steps, because the last step runs other kernels than the first
            decode_batch = DecodeBatch(model, max_batch, kv_cache, PAGE_SIZE, 2, "euler", overlap=overlap)
            batches = sorted({min(n, max_batch) for n in ROWS})
            for n in batches:
                decode_batch.launch(n)
            backbone, _ = fused_modules_of(model)
            table = torch.zeros(1, 1, dtype=torch.int32)
            codec = model.audio_tokenizer
            for n in batches:
                codes = torch.zeros(n, 1 + codec.config.acoustic_dim, 1, dtype=torch.int64)
                with overlapped(overlap):
                    cast(FusedCodecStream, codec.stream(n)).chunk(codes, torch.zeros(n, dtype=torch.int64))
            for n in ROWS:
                batch = TokenBatch.of([n], [n], torch.device("meta"))
                u = torch.zeros(n, config.backbone.dim, dtype=dtype)
                backbone.norm(backbone.prefill(u, batch, kv_cache.kv, table)[-1:])
        finally:
            hooks.remove(note)
    return len(ready)
