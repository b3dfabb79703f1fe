"""A vLLM plugin that accelerates the flow head of vLLM-Omni's Voxtral TTS in every worker.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in each vLLM process.
With ``VOXKERN_VLLM=1`` in the environment, the head is accelerated as soon as its weights are loaded. The method that
vLLM-Omni captures in CUDA graphs is replaced as soon as the wrapper with this method is made. One line in vLLM's log
reports what was accelerated, or why nothing was accelerated. The server runs in both cases. If ``VOXKERN_VLLM`` is
unset, empty or 0, the plugin does nothing.

If ``VOXKERN_VLLM_QUANTIZE`` is also set to int8 or fp8, kernels read copies of the head's large weights in 8 bits.
"""

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..accelerate import accelerate

SWITCH, QUANTIZE = "VOXKERN_VLLM", "VOXKERN_VLLM_QUANTIZE"
SERVER_PACKAGE = "vllm_omni.model_executor.models.voxtral_tts"
MAX_BATCH = 32  # the largest batch that vLLM-Omni captures a CUDA graph for; larger batches run in groups

log = logging.getLogger("vllm.plugins.voxkern")  # a child of vLLM's logger, which decides where messages are written


def register() -> None:
    """Patch vLLM-Omni's classes so that flow heads are accelerated; a second call in a process changes nothing."""
    if os.environ.get(SWITCH, "0") in ("", "0"):
        return
    try:
        model = import_module(
            f"{SERVER_PACKAGE}.voxtral_tts_audio_generation"
        ).VoxtralTTSAudioGenerationForConditionalGeneration
        wrapper = import_module(
            f"{SERVER_PACKAGE}.cuda_graph_acoustic_transformer_wrapper"
        ).CUDAGraphAcousticTransformerWrapper
        _call_after(model, "load_weights", _accelerate_head)
        _call_after(wrapper, "__init__", _accelerate_captured)
    except Exception as why:  # an error of voxkern must never stop the server
        _tell_why_not("vLLM-Omni", why)


def _call_after(owner: type, name: str, then: Callable[[Any], None]) -> None:
    """Patch method `name` of class `owner` so that each call is followed by ``then(self)``."""
    method = getattr(owner, name)
    if hasattr(method, "_voxkern"):
        return

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        try:
            then(self)
        except Exception as why:  # an error of voxkern must never stop the server
            _tell_why_not(type(self).__name__, why)
        return result

    both._voxkern = True  # type: ignore[attr-defined]
    setattr(owner, name, both)


def _accelerate_head(model: Any) -> None:
    quantize = _format()
    replaced = accelerate(model, MAX_BATCH, quantize)
    weights = f", with copies of its large weights in {quantize}" if quantize else ""
    log.info(
        "voxkern accelerates %s of %s, also inside CUDA graphs%s", " and ".join(replaced), type(model).__name__, weights
    )


def _accelerate_captured(wrapper: Any) -> None:
    if "forward" in vars(wrapper.acoustic_transformer):  # otherwise the log has the reason already
        accelerate(wrapper, MAX_BATCH, _format())


def _format() -> str | None:
    """Return the format of the 8-bit copies, or None if QUANTIZE is unset, empty or 0."""
    value = os.environ.get(QUANTIZE, "0")
    return None if value in ("", "0") else value


def _tell_why_not(what: str, why: Exception) -> None:
    log.warning("voxkern leaves %s as it is: %s: %s", what, type(why).__name__, why)
