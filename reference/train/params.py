"""The ``params.json`` of the demo voice, a small model of the public model's structure."""

from typing import Any

from .data import VOICES

N_SPECIAL_TOKENS = 64
_CODEBOOKS = {"semantic_codebook_size": 766, "acoustic_codebook_size": 21}

PARAMS: dict[str, Any] = {
    "dim": 192,
    "n_layers": 5,
    "head_dim": 32,
    "hidden_dim": 512,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": N_SPECIAL_TOKENS + 256 + 1024,
    "max_seq_len": 1024,
    "use_biases": False,
    "causal": True,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "tied_embeddings": True,
    "model_type": "voxtral_tts",
    "multimodal": {
        "bos_token_id": 1,
        "audio_model_args": {
            **_CODEBOOKS,
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
            "acoustic_transformer_args": {
                "input_dim": 192, "dim": 192, "n_layers": 3, "head_dim": 32, "hidden_dim": 512, "n_heads": 8,
                "n_kv_heads": 2, "use_biases": False, "sigma": 1e-5, "sigma_max": 1.0,
            },
        },
        "audio_tokenizer_args": {
            "channels": 1,
            "sampling_rate": 24000,
            "pretransform_patch_size": 240,
            "patch_proj_kernel_size": 7,
            **_CODEBOOKS,
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
            "layer_scale_init": 0.1,
            "semantic_dim": 64, "dim": 192, "hidden_dim": 512, "head_dim": 32, "n_heads": 6, "n_kv_heads": 6,
            "encoder_transformer_lengths_str": "1,1,1,1",
            "encoder_convs_kernels_str": "4,4,4,3",
            "encoder_convs_strides_str": "2,2,2,1",
            "decoder_transformer_lengths_str": "1,1,1,2",
            "decoder_convs_kernels_str": "3,4,4,4",
            "decoder_convs_strides_str": "1,2,2,2",
            "voice": {name: i for i, name in enumerate(VOICES)},
        },
    },
}  # fmt: skip


def spellings(word: str) -> tuple[str, ...]:
    """Return a word's four spellings: without and with a space before it, in lower case and capitalised."""
    return word, " " + word, word.capitalize(), " " + word.capitalize()


def word_id(word: int) -> int:
    """Return the token id of the first spelling of a word, given as an index into WORDS.

    The ids of the words come after those of the special tokens and of the 256 bytes.
    """
    return N_SPECIAL_TOKENS + 256 + len(spellings("")) * word
