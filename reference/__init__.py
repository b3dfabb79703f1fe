"""Plain PyTorch: the truth that every kernel is held against, the CPU path, and what is trained."""

from .config import Config, ConfigError
from .model import VoxtralTTS

__all__ = ["Config", "ConfigError", "VoxtralTTS"]
