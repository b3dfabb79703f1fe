"""The public model's flow head, with a small bidirectional transformer as its velocity network.

The transformer runs over three tokens [x, t, h]: the flow's state, the time, and the backbone's hidden state.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .attention import TransformerBlock, attention
from .config import AcousticTransformerConfig, AudioModelConfig
from .flow_head import FlowHead, time_embedding
from .layers import RMSNorm, upcast


class FlowMatchingAudioTransformer(FlowHead):
    """The flow head of the public model; its modules are named as in the checkpoint's ``acoustic_transformer``."""

    config: AcousticTransformerConfig

    def __init__(self, config: AcousticTransformerConfig, audio: AudioModelConfig) -> None:
        super().__init__()
        self.config, self.audio = config, audio
        self.input_projection = nn.Linear(audio.n_acoustic_codebook, config.dim, bias=False)
        self.time_projection = nn.Linear(config.dim, config.dim, bias=False)
        self.llm_projection = nn.Linear(config.input_dim, config.dim, bias=False)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.dim, config.hidden_dim, config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
            )
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.semantic_codebook_output = nn.Linear(config.dim, audio.semantic_rows, bias=False)
        self.acoustic_codebook_output = nn.Linear(config.dim, audio.n_acoustic_codebook, bias=False)

    def project_time(self, t: Tensor) -> Tensor:
        """Project flow times in 0..1 to t tokens, [...] -> [..., dim]."""
        weight = self.time_projection.weight
        return self.time_projection(time_embedding(t, self.config.dim).to(weight.dtype))  # type: ignore[no-any-return]

    def project_hidden(self, h: Tensor) -> Tensor:
        """Project hidden states to h tokens, [B, input_dim] -> [B, dim]; zeros give zeros, as there is no bias."""
        return self.llm_projection(h)  # type: ignore[no-any-return]

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        x = self.input_projection(x.to(hidden.dtype))
        tokens = torch.stack((x, time.expand_as(x), hidden), dim=1)  # [B, 3, dim]
        *layers, last = self.layers
        attend = partial(attention, causal=False)
        for layer in layers:
            tokens = layer(tokens, attend)
        tokens = last(tokens, attend, n_queries=1)  # only the x token's output is used
        return upcast(self.acoustic_codebook_output(self.norm(tokens[:, 0])))
