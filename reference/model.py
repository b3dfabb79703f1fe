"""The whole model: backbone, flow head and codec under the checkpoint's names."""

from torch import Tensor

from .backbone import Backbone
from .codec import AudioTokenizer
from .config import AcousticTransformerConfig, AudioModelConfig, Config, VelocityMLPConfig
from .flow_head import FlowHead
from .mlp_head import FlowMatchingAudioMLP
from .transformer_head import FlowMatchingAudioTransformer


def make_head(config: AcousticTransformerConfig | VelocityMLPConfig, audio: AudioModelConfig) -> FlowHead:
    """The flow head that `config` chooses."""
    if isinstance(config, VelocityMLPConfig):
        return FlowMatchingAudioMLP(config, audio)
    return FlowMatchingAudioTransformer(config, audio)


class VoxtralTTS(Backbone):
    """Text and voice embeddings to hidden states, hidden states to codes, codes to sound.

    The module tree is the checkpoint's tensor names, so loading is a strict ``load_state_dict``.
    """

    def __init__(self, config: Config, encoder: bool = False) -> None:
        """`encoder`: also the codec's encoder, which the public checkpoint lacks."""
        super().__init__(config.backbone, config.audio)
        self.config = config
        self.acoustic_transformer = make_head(config.acoustic_transformer, config.audio)
        self.audio_tokenizer = AudioTokenizer(config.codec, encoder)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int [..., T] text ids -> [..., T, dim]."""
        return self.mm_audio_embeddings.tok_embeddings(tokens)  # type: ignore[no-any-return]

    def embed_codes(self, codes: Tensor) -> Tensor:
        """int [..., 37] codes with the +2 offset -> [..., dim]: the whole next input of the backbone."""
        return self.mm_audio_embeddings.audio_codebook_embeddings(codes)  # type: ignore[no-any-return]
