"""The whole model: backbone, flow head and codec, with the checkpoint's tensor names."""

import torch
from torch import Tensor

from .backbone import Backbone
from .codec import AudioTokenizer
from .config import AcousticTransformerConfig, AudioModelConfig, Config, VelocityMLPConfig
from .flow_head import FlowHead
from .mlp_head import FlowMatchingAudioMLP
from .quantized import Format, quantizable, replace_linears
from .transformer_head import FlowMatchingAudioTransformer


def make_head(config: AcousticTransformerConfig | VelocityMLPConfig, audio: AudioModelConfig) -> FlowHead:
    """Create the flow head that `config` describes: the transformer or the residual MLP."""
    if isinstance(config, VelocityMLPConfig):
        return FlowMatchingAudioMLP(config, audio)
    return FlowMatchingAudioTransformer(config, audio)


class VoxtralTTS(Backbone):
    """The whole text-to-speech model: the backbone, with the flow head and the codec as submodules.

    The modules are named as in the checkpoint, so a strict ``load_state_dict`` loads a checkpoint.

    Args:
        config: the model's sizes.
        encoder: whether to create the codec's encoder; the public checkpoint has no weights for the encoder.
    """

    def __init__(self, config: Config, encoder: bool = False) -> None:
        super().__init__(config.backbone, config.audio)
        self.config = config
        self.acoustic_transformer = make_head(config.acoustic_transformer, config.audio)
        self.audio_tokenizer = AudioTokenizer(config.codec, encoder)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embed text tokens, int [..., T] -> [..., T, dim]."""
        return self.mm_audio_embeddings.tok_embeddings(tokens)  # type: ignore[no-any-return]

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed frames, int [..., 37] codes with the +2 offset -> [..., dim].

        The embedding of a generated frame is the backbone's next input, and no text embedding is added to it.
        """
        return self.mm_audio_embeddings.audio_codebook_embeddings(codes)  # type: ignore[no-any-return]


def model_without_memory(config: Config, dtype: torch.dtype, format_: Format | None = None) -> VoxtralTTS:
    """Create a model on the meta device, for its shapes alone.

    Args:
        config: the model's sizes.
        dtype: dtype of the weights.
        format_: the format of the large weights, or None for `dtype`.
    """
    with torch.device("meta"):
        model = VoxtralTTS(config).to(dtype).requires_grad_(False)
        if format_ is not None:
            replace_linears(model, quantizable(model), format_)
    return model
