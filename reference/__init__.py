"""The model in plain PyTorch: the kernels are tested against it, it runs on a CPU, and it can be trained."""

from .attention import PagedCache
from .backbone import Backbone
from .codec import AudioTokenizer
from .codec_stream import CodecStream
from .config import Config, ConfigError
from .flow_head import FlowHead
from .mlp_head import FlowMatchingAudioMLP
from .model import VoxtralTTS
from .moe import MoEBlock
from .transformer_head import FlowMatchingAudioTransformer

__all__ = [
    "AudioTokenizer",
    "Backbone",
    "CodecStream",
    "Config",
    "ConfigError",
    "FlowHead",
    "FlowMatchingAudioMLP",
    "FlowMatchingAudioTransformer",
    "MoEBlock",
    "PagedCache",
    "VoxtralTTS",
]
