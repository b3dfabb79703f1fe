"""The autoregressive backbone, which computes one hidden state per embedded text token or 80 ms frame."""

import torch
from torch import Tensor, nn

from .attention import Attend, PagedCache, TransformerBlock, append, attention, paged_attention, rope_table, rotate
from .config import AudioModelConfig, BackboneConfig
from .layers import RMSNorm, upcast
from .moe import MoEBlock


class CodebookEmbeddings(nn.Module):
    """The embedding table of all codebooks: it has one row for each code and each special code of each codebook."""

    def __init__(self, audio: AudioModelConfig, dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(audio.embedding_rows, dim)
        self.offsets: Tensor  # device="cpu" below, because on the "meta" device the offsets would have no values
        self.register_buffer("offsets", torch.tensor(audio.embedding_offsets, device="cpu"), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed frames; a frame's embedding is the sum of the table's rows for the frame's codes.

        The sum is computed in fp32 (fp64 in an fp64 model) and rounded once to the table's dtype.

        Args:
            codes: int [..., 37] with the +2 offset; the number of codes, 37 in the public model, comes from the config.

        Returns:
            [..., dim].
        """
        rows = self.embeddings(codes + self.offsets)  # [..., 37, dim]
        return upcast(rows).sum(-2).to(rows.dtype)


class AudioEmbeddings(nn.Module):
    """The backbone's embedding tables for text tokens and for frames, named as in the checkpoint."""

    def __init__(self, backbone: BackboneConfig, audio: AudioModelConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(backbone.vocab_size, backbone.dim)
        self.audio_codebook_embeddings = CodebookEmbeddings(audio, backbone.dim)


class Backbone(nn.Module):
    """The decoder-only transformer: embeddings, layers and final norm, named as in the checkpoint.

    The backbone has no language-model head, because generating speech does not need text logits.
    """

    def __init__(self, config: BackboneConfig, audio: AudioModelConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.mm_audio_embeddings = AudioEmbeddings(config, audio)
        self.layers = nn.ModuleList(_layer(config, i_layer) for i_layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def hidden_states(self, u: Tensor, cache: PagedCache | None = None) -> Tensor:
        """Run the layers over T tokens of each request.

        Args:
            u: [B, T, dim], embeddings.
            cache: the keys and values of each request's earlier tokens; the keys and values of the T tokens are
                appended. ``cache.lengths`` includes the T tokens. None means that the T tokens are whole sequences,
                from position 0.

        Returns:
            [B, T, dim], after the final norm. The output of a row with length 0 in `cache` is undefined.
        """
        config, T = self.backbone_config, u.shape[1]
        positions = torch.arange(T, device=u.device)
        if cache is not None:
            positions = positions + cache.lengths.unsqueeze(1) - T  # [B, T]
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta)
        dtype = torch.promote_types(u.dtype, torch.float32)
        cos, sin = cos.to(dtype), sin.to(dtype)  # once, instead of in each layer
        for i_layer, layer in enumerate(self.layers):
            u = layer(u, _attend(cos, sin, cache, i_layer))
        return self.norm(u)  # type: ignore[no-any-return]


def _layer(config: BackboneConfig, i_layer: int) -> TransformerBlock | MoEBlock:
    sizes = (config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps)
    if config.moe is not None and config.moe.in_layer(i_layer):
        return MoEBlock(config.dim, config.moe, *sizes)
    return TransformerBlock(config.dim, config.hidden_dim, *sizes)


def _attend(cos: Tensor, sin: Tensor, cache: PagedCache | None, i_layer: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = torch.split(rotate(torch.cat((q, k), dim=-2), cos, sin), [q.shape[-2], k.shape[-2]], dim=-2)
        if cache is None:
            return attention(q, k, v, causal=True)
        append(cache.kv[i_layer], k, v, cache.block_table, cache.lengths)
        return paged_attention(q, cache.kv[i_layer], cache.block_table, cache.lengths)

    return attend
