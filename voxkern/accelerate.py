"""Install fused modules in the place of a model's own computation, and remove them again."""

import importlib.util
import logging
from typing import Any

from torch import nn

from .integrations.server_heads import accelerate_servers, restore_servers
from .reference.backbone import Backbone
from .reference.codec import AudioTokenizer
from .reference.flow_head import FlowHead
from .reference.mlp_head import FlowMatchingAudioMLP
from .reference.transformer_head import FlowMatchingAudioTransformer

log = logging.getLogger(__name__)


def accelerate(model: Any, max_batch: int = 1) -> list[str]:
    """Run what voxkern has kernels for through them, on the model's own weights.

    Weights may be loaded, moved, copied and saved as before. A model that is accelerated already is prepared anew.

    Args:
        model: a :class:`voxkern.reference.VoxtralTTS`, or any module that holds its parts. Or a module that holds the
            flow head of vLLM-Omni or SGLang-Omni, with its weights loaded and on their device, or vLLM-Omni's wrapper
            of one before it captures its graphs; see :mod:`voxkern.integrations.server_heads`. A part like one of these
            that is not known is left as it is, and a warning says why.
        max_batch: the most requests a call may have, 1..64; a server's may have more, and they run in groups.
            Settings, and so the last bits of a result, belong to it.

    Returns:
        Names of the modules that were replaced, and of methods: the backbone's ``hidden_states``, the codec's
        ``stream``.

    Raises:
        ValueError: the model has no part that voxkern knows.
        RuntimeError: Triton is not installed, or a server's head is where no kernel runs.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed, and kernels need it; the model runs without them as it is")
    from .fused.backbone import FusedBackbone
    from .fused.codec import FusedCodec
    from .fused.flow_head import FusedHead
    from .fused.mlp_head import FusedMLPHead
    from .fused.transformer_head import FusedTransformerHead

    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    embeddings = modules.get("mm_audio_embeddings.audio_codebook_embeddings.embeddings")
    replaced, left = accelerate_servers(model, max_batch)
    table = embeddings if isinstance(embeddings, nn.Embedding) else None
    for name, module in modules.items():
        if isinstance(module, Backbone):
            module.hidden_states = FusedBackbone(module, max_batch)  # type: ignore[method-assign]
            replaced.append(f"{name}.hidden_states".lstrip("."))
        if isinstance(module, FlowMatchingAudioTransformer | FlowMatchingAudioMLP):
            fused: FusedHead[Any, Any, Any]
            if isinstance(module, FlowMatchingAudioMLP):
                fused = FusedMLPHead(module, max_batch, table)
            else:
                fused = FusedTransformerHead(module, max_batch, table)
            module.forward, module.solve = fused, fused.solve  # type: ignore[method-assign]
            replaced.append(name or type(module).__name__)
        if isinstance(module, AudioTokenizer):
            module.stream = FusedCodec(module)  # type: ignore[method-assign, assignment]
            replaced.append(f"{name}.stream".lstrip("."))
    if not replaced:
        reasons = "".join(f"; {name} is not known: {why}" for name, why in left.items())
        raise ValueError(f"{type(model).__name__} has no part that voxkern has kernels for{reasons}")
    for name, why in left.items():
        log.warning("%s is left as it is: %s", name, why)
    log.info("accelerated: %s", ", ".join(replaced))
    return replaced


def restore(model: Any) -> list[str]:
    """Undo :func:`accelerate`.

    Returns:
        Names of what was put back.
    """
    restored = restore_servers(model)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, Backbone) and "hidden_states" in vars(module):
            del module.hidden_states
            restored.append(f"{name}.hidden_states".lstrip("."))
        if isinstance(module, FlowHead) and "forward" in vars(module):
            del module.forward, module.solve
            restored.append(name or type(module).__name__)
        if isinstance(module, AudioTokenizer) and "stream" in vars(module):
            del module.stream
            restored.append(f"{name}.stream".lstrip("."))
    return restored
