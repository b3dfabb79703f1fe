"""The ``params.json`` of the demo voice, a small model of the public model's structure."""

from ..params import make_params
from .data import VOICES

N_SPECIAL_TOKENS = 64

PARAMS = make_params(
    backbone={
        "dim": 192, "n_layers": 5, "head_dim": 32, "hidden_dim": 512, "n_heads": 8, "n_kv_heads": 2,
        "vocab_size": N_SPECIAL_TOKENS + 256 + 1024, "max_seq_len": 1024, "rope_theta": 10000.0,
    },
    acoustic={
        "input_dim": 192, "dim": 192, "n_layers": 3, "head_dim": 32, "hidden_dim": 512, "n_heads": 8, "n_kv_heads": 2,
    },
    codec={
        "semantic_dim": 64, "dim": 192, "hidden_dim": 512, "head_dim": 32, "n_heads": 6, "n_kv_heads": 6,
        "layer_scale_init": 0.1,
        "encoder_transformer_lengths_str": "1,1,1,1", "encoder_convs_kernels_str": "4,4,4,3",
        "encoder_convs_strides_str": "2,2,2,1", "decoder_transformer_lengths_str": "1,1,1,2",
    },
    semantic_codebook_size=766,
    voices=VOICES,
)  # fmt: skip


def spellings(word: str) -> tuple[str, ...]:
    """Return a word's four spellings: without and with a space before it, in lower case and capitalised."""
    return word, " " + word, word.capitalize(), " " + word.capitalize()


def word_id(word: int) -> int:
    """Return the token id of the first spelling of a word, given as an index into WORDS.

    The ids of the words come after those of the special tokens and of the 256 bytes.
    """
    return N_SPECIAL_TOKENS + 256 + len(spellings("")) * word
