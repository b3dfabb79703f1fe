"""Text to speech with Voxtral-class models, on Triton kernels or in plain PyTorch.

>>> import voxkern
>>> tts = voxkern.load()
>>> tts.generate("seven three one", seed=7).save("out.wav")  # doctest: +SKIP
"""

from pathlib import Path as _Path

# Git writes text files in place of the symbolic links voxkern/kernels and voxkern/reference if it may not make links
if not all(_Path(__file__).with_name(name).is_dir() for name in ("kernels", "reference")):
    raise ImportError(
        "voxkern/kernels and voxkern/reference must be symbolic links to ../kernels and ../reference, but this "
        "checkout has none. Allow links (on Windows: turn on Developer Mode), then run `git config core.symlinks true` "
        "and `git checkout -- voxkern`"
    )

from . import reference
from .accelerate import accelerate, restore
from .audio import Audio, Timings
from .reference import Config, ConfigError
from .tts import TTS, load
from .weight_files import CheckpointError

__version__ = "0.1.0"
__all__ = [
    "TTS", "Audio", "CheckpointError", "Config", "ConfigError", "Timings", "accelerate", "load", "reference", "restore",
]  # fmt: skip
