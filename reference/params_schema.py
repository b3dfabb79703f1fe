"""The keys of ``params.json`` that are not fields of the config classes, and the ranges of all numbers.

A key that is neither read into a config nor listed here is refused, because it may change what the model computes.
"""

from dataclasses import dataclass, field
from typing import Any

# the sections, each named by the keys that lead to it, joined by dots
TOP = ""
MULTIMODAL = "multimodal"
AUDIO = "multimodal.audio_model_args"
ENCODING = "multimodal.audio_model_args.audio_encoding_args"
ACOUSTIC = "multimodal.audio_model_args.acoustic_transformer_args"
CODEC = "multimodal.audio_tokenizer_args"
MOE = "moe"


@dataclass(frozen=True)
class OtherKeys:
    """The keys of one section that are not read into a config.

    Attributes:
        only: maps a key to the one value that voxkern supports; None means that the key is supported only as null.
        harmless: the keys that change no result, each mapped to the type of its value. Some of these keys repeat or
            limit a size of the model; config.py compares them with the model's sizes.
    """

    only: dict[str, Any]
    harmless: dict[str, type] = field(default_factory=dict)


OTHER_KEYS = {
    TOP: OtherKeys(
        only={
            "model_type": "voxtral_tts",
            "use_biases": False,
            "causal": True,
            "qk_norm": False,
            "activation": "silu",
            "sliding_window": None,
            "yarn": None,  # scales the angles of RoPE
            "llama_4_scaling": None,  # scales the queries by position
            "ada_rms_norm_t_cond": False,  # the time-conditioned norm of Voxtral Realtime
        },
        harmless={
            "model_parallel": int,  # number of GPUs that the weights were split over; the file holds all weights
            "max_batch_size": int,  # a limit of mistral-inference
            "max_position_embeddings": int,  # used only by yarn; max_seq_len must not exceed it
            "model_max_length": int,  # max_seq_len must not exceed it
            "tied_embeddings": bool,  # concerns the text logits only, which are never computed
            "dropout": float,  # acts in training only
            "ada_rms_norm_t_cond_dim": int,  # used only if ada_rms_norm_t_cond is true
        },
    ),
    MULTIMODAL: OtherKeys(only={"bos_token_id": 1}),  # prompts begin with the tokenizer's <s>, which has id 1
    AUDIO: OtherKeys(
        only={"input_embedding_concat_type": "sum", "text_feature_bugged": False},
        harmless={
            "p_uncond": float,  # probability in training that the flow head gets zeros as hidden state
            "condition_dropped_token_id": int,  # for training; guidance uses zeros instead of this token
        },
    ),
    ENCODING: OtherKeys(
        only={
            "codebook_pattern": "parallel",
            # With shorter segments, the model would alternate segments of text and of frames. By default, a part has
            # at most 400 characters and 2048 frames, which fit into one segment of each kind.
            "interleave_audio_tokens_per_segment": 8192,
            "interleave_text_tokens_per_segment": 8192,
            "single_trailing_segment": False,
        },
        harmless={"num_codebooks": int, "sampling_rate": int, "frame_rate": float},  # if given, equal to the model's
    ),
    # use_biases depends on the kind of head and is checked in config.py
    ACOUSTIC: OtherKeys(
        only={"sigma_max": 1.0},  # standard deviation of the noise that the flow starts from
        harmless={
            "sigma": float,  # standard deviation of the noise that training leaves at time 1
            "rope_theta": float,  # public checkpoints have it, but their flow head has no RoPE
        },
    ),
    CODEC: OtherKeys(
        only={
            "channels": 1,
            "use_biases": False,
            "causal": True,
            "qk_norm": True,
            "layer_scale": True,
            "conv_weight_norm": True,
        }
    ),
    MOE: OtherKeys(only={"renorm_strategy": "WEIGHTS", "use_load_balancing_bias": False}),
}

# the value of quantization.qformat_weight -> the format's name in quantized.py
FORMATS_ON_DISK = {"int8": "int8", "fp8_e4m3": "fp8"}

MAX_SIZE = 2**20  # with this limit and those below, each tensor has fewer than 2^63 bytes: no size overflows
MAX_COUNT = 1024
MAX_HEADS = 4096
MAX_POSITIONS = 2**31 - 1  # the kernels' positions are int32
# the smallest and the largest power of two that are normal fp32 numbers; a smaller eps may act as 0
SMALLEST, LARGEST = 2.0**-126, 2.0**127

# (lowest, highest) of a number, by its type
DEFAULT_RANGES: dict[type, tuple[float, float]] = {int: (1, MAX_SIZE), float: (SMALLEST, 1)}
# (lowest, highest) of each key that has another range than its type
RANGES: dict[str, tuple[float, float]] = {
    "n_layers": (1, MAX_COUNT),
    "n_heads": (1, MAX_HEADS),
    "n_kv_heads": (1, MAX_HEADS),
    "head_dim": (1, MAX_HEADS),
    "max_seq_len": (1, MAX_POSITIONS),
    "max_position_embeddings": (1, MAX_POSITIONS),
    "model_max_length": (1, MAX_POSITIONS),
    "max_batch_size": (0, MAX_SIZE),
    "model_parallel": (1, MAX_COUNT),
    "rope_theta": (1, LARGEST),  # below 1, later pairs would rotate faster than earlier ones
    "num_experts": (1, MAX_COUNT),
    "num_experts_per_tok": (1, MAX_COUNT),
    "num_shared_experts": (0, MAX_COUNT),  # Mixtral has none
    "first_k_dense_replace": (0, MAX_COUNT),  # 0: experts from the first layer on
    "route_every_n": (1, MAX_COUNT),
    "num_expert_groups": (1, MAX_COUNT),
    "num_expert_groups_per_tok": (1, MAX_COUNT),
    "routed_scale": (SMALLEST, 1024),  # 0 would switch the routed experts off; the largest known scale is 16
    "acoustic_codebook_size": (2, MAX_SIZE),  # levels from -1 to 1, so at least two
    "n_acoustic_codebook": (1, MAX_COUNT),
    "acoustic_dim": (1, MAX_COUNT),
    "audio_token_id": (0, MAX_SIZE),
    "begin_audio_token_id": (0, MAX_SIZE),
    "condition_dropped_token_id": (0, MAX_SIZE),
    "n_decoding_steps": (1, 64),  # the solver's MAX_STEPS
    "sampling_rate": (1000, MAX_SIZE),  # Hz
    "frame_rate": (1, 1000),  # Hz
    "patch_proj_kernel_size": (1, MAX_COUNT),
    "layer_scale_init": (0, 1024),  # the value before training, which may be 0; not used after training
    "sigma": (0, 1),
    "p_uncond": (0, 1),
    "dropout": (0, 1),
}
# a codec's ``*_str`` key holds numbers joined by commas: the most numbers allowed, and the largest value of each
MAX_STAGES, MAX_STAGE_VALUE = 16, 256
