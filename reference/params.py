"""The keys of ``params.json`` that models of different sizes share."""

from collections.abc import Iterable
from typing import Any

__all__ = ["make_params"]


def make_params(
    backbone: dict[str, Any],
    acoustic: dict[str, Any],
    codec: dict[str, Any],
    semantic_codebook_size: int,
    voices: Iterable[str],
) -> dict[str, Any]:
    """Return a model's ``params.json``: the given keys, and the keys that models of all sizes share.

    Args:
        backbone: keys at the top level.
        acoustic: keys of the flow head, ``acoustic_transformer_args``.
        codec: keys of the codec, ``audio_tokenizer_args``.
        semantic_codebook_size: the number of semantic codes.
        voices: names of the voices.
    """
    codebooks = {"semantic_codebook_size": semantic_codebook_size, "acoustic_codebook_size": 21}
    return {
        "use_biases": False,
        "causal": True,
        "rope_theta": 1000000.0,
        "norm_eps": 1e-5,
        "tied_embeddings": True,
        "model_type": "voxtral_tts",
        **backbone,
        "multimodal": {
            "bos_token_id": 1,
            "audio_model_args": {
                **codebooks,
                "n_acoustic_codebook": 36,
                "audio_encoding_args": {
                    "codebook_pattern": "parallel",
                    "num_codebooks": 37,
                    "sampling_rate": 24000,
                    "frame_rate": 12.5,
                },
                "audio_token_id": 24,
                "begin_audio_token_id": 25,
                "input_embedding_concat_type": "sum",
                "acoustic_transformer_args": {"use_biases": False, **acoustic, "sigma": 1e-5, "sigma_max": 1.0},
            },
            "audio_tokenizer_args": {
                "channels": 1,
                "sampling_rate": 24000,
                "pretransform_patch_size": 240,
                "patch_proj_kernel_size": 7,
                **codebooks,
                "acoustic_dim": 36,
                "conv_weight_norm": True,
                "causal": True,
                "attn_sliding_window_size": 16,
                "half_attn_window_upon_downsampling": True,
                "qk_norm": True,
                "qk_norm_eps": 1e-6,
                "use_biases": False,
                "norm_eps": 1e-2,
                "layer_scale": True,
                "layer_scale_init": 0.01,
                "decoder_transformer_lengths_str": "2,2,2,2",
                "decoder_convs_kernels_str": "3,4,4,4",
                "decoder_convs_strides_str": "1,2,2,2",
                **codec,
                "voice": {name: i for i, name in enumerate(voices)},
            },
        },
    }
