"""Make the engine of a model: on the fused modules if the model is accelerated, and on the reference modules if not."""

from typing import TYPE_CHECKING

from torch import nn

from ..packed.backbone import PackedBackbone
from ..reference import VoxtralTTS
from .codec_runner import CodecRunner
from .cuda_graphs import capture_for
from .engine import Engine
from .kv_cache import PAGE_SIZE, KVCache, pages_for
from .runner import TorchRunner

if TYPE_CHECKING:
    from ..fused.backbone import FusedBackbone  # needs Triton

MAX_FRAMES = 2048  # 164 s; vLLM-Omni has the same limit
PROMPT_TOKENS = 512  # the default KV cache has space for this many prompt tokens per request, and MAX_FRAMES frames


def new_engine(
    model: VoxtralTTS, max_batch: int, cache_tokens: int | None, graphs: bool, overlap: bool = False
) -> Engine:
    """Make an engine for a model in its present dtype and on its present device.

    Args:
        model: the model.
        max_batch: the most requests that run side by side.
        cache_tokens: tokens of the KV cache. None takes space for 2560 tokens of each request, and one page for its
            voice. If the limit of the model or the kernels is below 2560 tokens, it takes that limit instead.
        graphs: whether an accelerated model's launches are replayed as CUDA graphs, if it is on a GPU.
        overlap: whether an accelerated model's launches in a frame overlap.

    Raises:
        ValueError: the model's weights have several dtypes or devices.
    """
    fused_backbone, weight, config = fused_backbone_of(model), model.norm.weight, model.config
    for name, other in model.named_parameters():
        if (other.dtype, other.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"the model must have one dtype and one device, but norm.weight is {weight.dtype} on {weight.device}, "
                f"and {name} is {other.dtype} on {other.device}"
            )
    positions, n = config.backbone.max_seq_len, max_batch
    if fused_backbone is not None:
        positions, n = min(positions, fused_backbone.max_seq_len), min(n, fused_backbone.max_batch)
    # one page more for each request, because the prefix cache also holds the last, partly filled page of a voice
    default = n * (pages_for(min(positions, MAX_FRAMES + PROMPT_TOKENS)) + 1)
    n_pages = default if cache_tokens is None else pages_for(cache_tokens)
    kv_cache = KVCache(config.backbone, n_pages, weight.dtype, weight.device)
    longest = min(positions, n_pages * PAGE_SIZE)
    codec = CodecRunner(model, n)
    if fused_backbone is None:
        return Engine(TorchRunner(model, n, kv_cache, longest), codec, config.audio.n_codebooks)
    from .fused_runner import FusedRunner  # needs Triton

    capture = capture_for(weight.device) if graphs else None
    runner = FusedRunner(model, n, kv_cache, longest, codec, capture, overlap)
    return Engine(runner, codec, config.audio.n_codebooks)


def fused_backbone_of(model: nn.Module) -> "FusedBackbone | None":
    """Return the fused backbone of a model that is accelerated by kernels, or None."""
    found = vars(model).get("hidden_states")
    return None if isinstance(found, PackedBackbone) else found
