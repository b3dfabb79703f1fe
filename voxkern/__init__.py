"""Text to speech with Voxtral-class models, on Triton kernels or in plain PyTorch.

>>> import voxkern
>>> tts = voxkern.load()
>>> tts.generate("seven three one", seed=7).save("out.wav")  # doctest: +SKIP
"""

from . import reference
from .accelerate import accelerate, restore
from .audio import Audio, Timings
from .checkpoint import CheckpointError
from .reference import Config, ConfigError
from .tts import TTS, load

__version__ = "0.1.0"
__all__ = [
    "TTS", "Audio", "CheckpointError", "Config", "ConfigError", "Timings", "accelerate", "load", "reference", "restore",
]  # fmt: skip
