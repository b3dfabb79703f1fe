"""A plugin of vLLM: vLLM-Omni's Voxtral TTS with its flow head on kernels, in every worker.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins`` and calls it in each of its processes. It
does nothing unless the environment has ``VOXKERN_VLLM=1``. Then the head is accelerated as soon as its weights are
loaded, and what vLLM-Omni captures of it as soon as there is something to capture with. One line in vLLM's log says
what was done or why it was not; either way the server goes on.
"""

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..accelerate import accelerate

SWITCH = "VOXKERN_VLLM"
SERVER_PACKAGE = "vllm_omni.model_executor.models.voxtral_tts"
MAX_BATCH = 32  # the most requests that vLLM-Omni captures a graph for; more run in groups

log = logging.getLogger("vllm.plugins.voxkern")  # below vLLM's own logger, which decides where it is written


def register() -> None:
    """Hook into vLLM-Omni's classes, once a process."""
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
    except Exception as why:  # a server that runs without voxkern must run
        _tell_why_not("vLLM-Omni", why)


def _call_after(owner: type, name: str, then: Callable[[Any], None]) -> None:
    """Have `then` called with the object after each call of the method."""
    method = getattr(owner, name)
    if hasattr(method, "_voxkern"):
        return

    @functools.wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        try:
            then(self)
        except Exception as why:  # as above
            _tell_why_not(type(self).__name__, why)
        return result

    both._voxkern = True  # type: ignore[attr-defined]
    setattr(owner, name, both)


def _accelerate_head(model: Any) -> None:
    replaced = accelerate(model, MAX_BATCH)
    log.info("voxkern runs %s of %s, and what is captured of it", " and ".join(replaced), type(model).__name__)


def _accelerate_captured(wrapper: Any) -> None:
    if "forward" in vars(wrapper.acoustic_transformer):  # otherwise it was told already why not
        accelerate(wrapper, MAX_BATCH)


def _tell_why_not(what: str, why: Exception) -> None:
    log.warning("voxkern leaves %s as it is: %s: %s", what, type(why).__name__, why)
