"""Put twins in the place of a model's own computation, and take them out again."""

import importlib.util
import logging
from typing import Any

from torch import nn

from .reference.backbone import Backbone
from .reference.codec import AudioTokenizer
from .reference.flow import FlowHead, FlowMatchingAudioTransformer
from .reference.velocity_mlp import FlowMatchingAudioMLP
from .servers import accelerate_servers, restore_servers

log = logging.getLogger(__name__)


def accelerate(model: Any, max_batch: int = 1) -> list[str]:
    """Run what voxkern has kernels for through them, on the model's own weights.

    Weights may be loaded, moved, copied and saved as before. A model that is accelerated already is prepared anew.

    Args:
        model: a :class:`voxkern.reference.VoxtralTTS`, or any module that holds its parts. Or a module that holds the
            flow head of vLLM-Omni or SGLang-Omni, with its weights loaded and on their device, or vLLM-Omni's wrapper
            of one before it captures its graphs; see :mod:`voxkern.servers`. A part like one of these that is not
            known is left as it is, and a warning says why.
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
    from .twins.backbone import BackboneTwin
    from .twins.codec import CodecTwin
    from .twins.flow import FlowTwin
    from .twins.head import HeadTwin
    from .twins.velocity_mlp import MLPTwin

    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    embeddings = modules.get("mm_audio_embeddings.audio_codebook_embeddings.embeddings")
    replaced, left = accelerate_servers(model, max_batch)
    table = embeddings if isinstance(embeddings, nn.Embedding) else None
    for name, module in modules.items():
        if isinstance(module, Backbone):
            module.hidden_states = BackboneTwin(module, max_batch)  # type: ignore[method-assign]
            replaced.append(f"{name}.hidden_states".lstrip("."))
        if isinstance(module, FlowMatchingAudioTransformer | FlowMatchingAudioMLP):
            twin: HeadTwin[Any, Any, Any]
            if isinstance(module, FlowMatchingAudioMLP):
                twin = MLPTwin(module, max_batch, table)
            else:
                twin = FlowTwin(module, max_batch, table)
            module.forward, module.solve = twin, twin.solve  # type: ignore[method-assign]
            replaced.append(name or type(module).__name__)
        if isinstance(module, AudioTokenizer):
            module.stream = CodecTwin(module)  # type: ignore[method-assign, assignment]
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
