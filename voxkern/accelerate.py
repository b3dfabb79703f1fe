"""Install a faster computation of a model, and remove it.

On a GPU, fused modules run the model through Triton kernels. On a CPU, linear layers get packed weights.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from .engine.make import fused_backbone_of
from .integrations.server_heads import accelerate_servers, restore_servers
from .packed.model import is_packed, pack, unpack
from .reference.attention import Attention
from .reference.backbone import Backbone
from .reference.codec import AudioTokenizer
from .reference.flow_head import FlowHead
from .reference.layers import FeedForward
from .reference.mlp_head import FlowMatchingAudioMLP
from .reference.moe import MoEBlock
from .reference.quantized import QuantizedLinear, format_of
from .reference.transformer_head import FlowMatchingAudioTransformer
from .validation import is_interpreted, require_triton, to_int

log = logging.getLogger(__name__)


def accelerate(model: Any, max_batch: int = 1, quantize: str | None = None) -> list[str]:
    """Make a model's backbone, flow head and codec faster: through Triton kernels, or on a CPU with packed weights.

    Kernels read the model's own weights. On a CPU outside of Triton's interpreter, voxkern's own modules get packed
    weights in place of the plain ones, see :func:`voxkern.packed.model.pack`. On a CPU, `max_batch` has no effect.
    After a move between a CPU and a GPU, call this function again.

    Calls and their arguments stay the same, and results stay the same up to rounding. Weights may be loaded, moved,
    copied and saved as before, but packed layers have no attribute ``weight``. If a layer is replaced by one with
    weights in another format, call this function again. Accelerated parts compute no gradients: :func:`restore` a model
    before training. A second call prepares an accelerated model again, for example for another `max_batch`.

    Args:
        model: a :class:`voxkern.reference.VoxtralTTS`, or any module that contains its backbone, flow head or codec.
            The flow head of vLLM-Omni or SGLang-Omni is supported too: give a module that contains the head, with its
            weights loaded and on their device. vLLM-Omni's wrapper of the head must not have captured its graphs yet.
            See :mod:`voxkern.integrations.server_heads`. A server's head that differs from the supported ones is not
            replaced, and a logged warning gives the reason.
        max_batch: the most requests of one call, 1..64. A server's call may have more, which run in groups of
            at most `max_batch`. Launch configs depend on `max_batch`, and so do the last bits of a result.
        quantize: "int8" or "fp8" quantises copies of the large weights of a server's head. The kernels then read half
            the bytes. The head keeps its own weights for :func:`restore`, so this takes more memory, not less. Call
            :func:`accelerate` again after the weights are loaded, moved or written, because the copies do not follow.
            To quantise voxkern's own model, use ``load(..., quantize=...)``.

    Returns:
        Names of the replaced modules and methods, such as
        ``["hidden_states", "acoustic_transformer", "audio_tokenizer.stream"]``. On a CPU, these are the packed layers,
        the norms, ``hidden_states`` and the flow head's ``solve``.

    Raises:
        ValueError: no part of the model has kernels or can be packed, or the kernels cannot run a codec of these
            sizes. `max_batch` is not in 1..64, or on a CPU less than 1. `quantize` is unknown, or given for voxkern's
            own model. Weights that one launch reads have different formats.
        TypeError: `max_batch` is not an integer.
        ModuleNotFoundError: Triton is not installed.
        RuntimeError: a server's head is on a device on which kernels cannot run.
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    own = [name for name, one in modules.items() if isinstance(one, Backbone | FlowHead | AudioTokenizer)]
    if quantize is not None:
        format_of(quantize)
        if own:
            raise ValueError(
                f"quantize is {quantize!r}, but {own[0] or 'the model'} is voxkern's own: use load(..., quantize=...)"
            )
    if own and not is_interpreted() and next(modules[own[0]].parameters()).device.type == "cpu":
        to_int("max_batch", max_batch, 1, None)
        del modules  # this dict would keep the plain weights in memory during packing
        return _accelerate_on_cpu(model, own)
    if own:
        unpack(model)
    require_triton()
    return _accelerate_on_kernels(model, max_batch, quantize)


def _accelerate_on_cpu(model: nn.Module, own: list[str]) -> list[str]:
    """Pack the modules named in `own`. A module that is nested in another of them is packed with the outer one."""
    outermost = [
        name for name in own if not any(name.startswith(f"{other}.".lstrip(".")) for other in own if other != name)
    ]
    _remove_fused(model)
    replaced = [f"{name}.{part}".lstrip(".") for name in outermost for part in pack(model.get_submodule(name))]
    if not replaced and not is_packed(model):
        raise ValueError(
            f"{type(model).__name__} has no part that is faster on a CPU: cast it to bf16 or fp16, or use it as it is"
        )
    log.info("accelerated on the CPU: %d modules and methods", len(replaced))
    return replaced


def _accelerate_on_kernels(model: Any, max_batch: int, quantize: str | None) -> list[str]:
    from .fused.backbone import MAX_BATCH, FusedBackbone
    from .fused.codec import FusedCodec
    from .fused.flow_head import FusedHead
    from .fused.mlp_head import FusedMLPHead
    from .fused.transformer_head import FusedTransformerHead

    max_batch = to_int("max_batch", max_batch, 1, MAX_BATCH)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    _expect_equal_formats(modules)
    embeddings = modules.get("mm_audio_embeddings.audio_codebook_embeddings.embeddings")
    replaced, left = accelerate_servers(model, max_batch, quantize)
    table = embeddings if isinstance(embeddings, nn.Embedding) else None
    for name, module in modules.items():
        if isinstance(module, Backbone):
            module.hidden_states = FusedBackbone(module, max_batch)  # type: ignore[method-assign]
            replaced.append(f"{name}.hidden_states".lstrip("."))
        if isinstance(module, FlowMatchingAudioTransformer | FlowMatchingAudioMLP):
            fused: FusedHead
            if isinstance(module, FlowMatchingAudioMLP):
                fused = FusedMLPHead(module, max_batch, table)
            else:
                fused = FusedTransformerHead(module, max_batch, table)
            module.forward, module.solve = fused, fused.solve  # type: ignore[method-assign]
            replaced.append(name or type(module).__name__)
        if isinstance(module, AudioTokenizer):
            module.stream = FusedCodec(module, max_batch)  # type: ignore[method-assign, assignment]
            replaced.append(f"{name}.stream".lstrip("."))
    if not replaced:
        reasons = "".join(f"; {name} is not supported: {why}" for name, why in left.items())
        raise ValueError(f"{type(model).__name__} has no part that voxkern has kernels for{reasons}")
    for name, why in left.items():
        log.warning("%s is left as it is: %s", name, why)
    log.info("accelerated: %s", ", ".join(replaced))
    return replaced


def restore(model: Any) -> list[str]:
    """Remove what :func:`accelerate` installed, so that the model computes exactly as before.

    On a CPU, the packed layers become new ``nn.Linear`` layers: an optimizer needs their new parameters.

    Returns:
        Names of the restored modules and methods; empty if the model was not accelerated.
    """
    restored = restore_servers(model)
    if isinstance(model, nn.Module):
        restored += _remove_fused(model) + unpack(model)
    return restored


def _remove_fused(model: nn.Module) -> list[str]:
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, Backbone) and fused_backbone_of(module) is not None:
            del module.hidden_states
            restored.append(f"{name}.hidden_states".lstrip("."))
        if isinstance(module, FlowHead) and "forward" in vars(module):
            del module.forward, module.solve
            restored.append(name or type(module).__name__)
        if isinstance(module, AudioTokenizer) and "stream" in vars(module):
            del module.stream
            restored.append(f"{name}.stream".lstrip("."))
    return restored


def _expect_equal_formats(modules: Mapping[str, nn.Module]) -> None:
    """Check that weights which one launch of a kernel reads together have one format.

    These are q, k and v of an attention, w1 and w3 of a feed-forward, and each of w1, w2 and w3 of all experts.

    Args:
        modules: the modules of a model by name.

    Raises:
        ValueError: two such weights have different formats.
    """
    for name, module in modules.items():
        groups: list[list[nn.Module]] = []
        if isinstance(module, Attention):
            groups = [[module.wq, module.wk, module.wv]]
        elif isinstance(module, FeedForward):
            groups = [[module.w1, module.w3]]
        elif isinstance(module, MoEBlock):
            feeds = [*module.experts, *([module.shared_experts] if module.n_shared else [])]
            groups = [[getattr(feed, weight) for feed in feeds] for weight in ("w1", "w2")]
        for group in groups:
            dtypes = {one.weight.dtype for one in group if isinstance(one, QuantizedLinear | nn.Linear)}
            if len(dtypes) > 1:
                found = " and ".join(sorted(map(str, dtypes)))
                raise ValueError(f"{name} has weights in {found}, which one kernel reads: they must have one format")
