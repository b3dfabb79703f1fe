"""Make checkpoints with random weights: a tiny model for tests, or a model with the public model's exact shapes."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_checkpoint
from .reference import Config, VoxtralTTS
from .reference.params import make_params

N_SPECIAL_TOKENS = 64  # special tokens of the tiny tokenizer; the public one has 1000
SPECIAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]", 6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]",
    13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 26: "[OUTPUT_AUDIO]", 34: "[TRANSCRIBE]",
    35: "[REPEAT_AUDIO_TEXT]", 36: "[NEXT_AUDIO_TEXT]",
}  # fmt: skip

PUBLIC_VOICES = {
    "casual_female": 214, "casual_male": 147, "cheerful_female": 132, "neutral_female": 218, "neutral_male": 169,
    "pt_male": 144, "pt_female": 175, "nl_male": 138, "nl_female": 146, "it_male": 168, "it_female": 172,
    "fr_male": 97, "fr_female": 97, "es_male": 208, "es_female": 138, "de_male": 163, "de_female": 147,
    "ar_male": 67, "hi_male": 94, "hi_female": 86,
}  # fmt: skip
TINY_VOICES = {"ada": 5, "bob": 9}

# a mixture of experts in the tiny model's second layer, with every key of Mistral's own format
TINY_MOE = {
    "num_experts": 12, "num_experts_per_tok": 3, "num_shared_experts": 1, "expert_hidden_dim": 48,
    "first_k_dense_replace": 1, "route_every_n": 1, "routed_scale": 1.0, "num_expert_groups": 1,
    "num_expert_groups_per_tok": 1,
}  # fmt: skip

# flow heads with a residual MLP; the large one is as wide as those of MAR-H and VibeVoice-1.5B
TINY_MLP = {"kind": "adaln_mlp", "use_biases": True, "input_dim": 64, "dim": 48, "n_layers": 2, "hidden_dim": 80}
FULL_MLP = {"kind": "adaln_mlp", "use_biases": True, "input_dim": 3072, "dim": 1536, "n_layers": 3, "hidden_dim": 1536}


def public_params(velocity_mlp: bool = False) -> dict[str, Any]:
    """Return the keys of Voxtral-4B-TTS-2603's ``params.json`` that are known and used.

    `velocity_mlp` replaces the flow head's velocity network by a residual MLP.
    """
    return make_params(
        backbone={
            "dim": 3072, "n_layers": 26, "head_dim": 128, "hidden_dim": 9216, "n_heads": 32, "n_kv_heads": 8,
            "vocab_size": 131072, "max_seq_len": 65536,
        },
        acoustic=FULL_MLP if velocity_mlp else {
            "input_dim": 3072, "dim": 3072, "n_layers": 3, "head_dim": 128, "hidden_dim": 9216, "n_heads": 32,
            "n_kv_heads": 8,
        },
        codec={
            "semantic_dim": 256, "dim": 1024, "hidden_dim": 4096, "head_dim": 128, "n_heads": 8, "n_kv_heads": 8,
        },
        semantic_codebook_size=8192,
        voices=list(PUBLIC_VOICES),
    )  # fmt: skip


def tiny_params(velocity_mlp: bool = False) -> dict[str, Any]:
    """Return the ``params.json`` of a model with the public structure and 0.6 M parameters.

    The model has only 62 semantic codes, so that it generates END by chance. `velocity_mlp` is as in
    :func:`public_params`.
    """
    return make_params(
        backbone={
            "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 160, "n_heads": 4, "n_kv_heads": 2,
            "vocab_size": N_SPECIAL_TOKENS + 256, "max_seq_len": 1024,
        },
        acoustic=TINY_MLP if velocity_mlp else {
            "input_dim": 64, "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 160, "n_heads": 4,
            "n_kv_heads": 2,
        },
        codec={
            "semantic_dim": 24, "dim": 64, "hidden_dim": 128, "head_dim": 16, "n_heads": 4, "n_kv_heads": 4,
            "decoder_transformer_lengths_str": "1,1,1,1", "encoder_transformer_lengths_str": "1,1,1,1",
        },
        semantic_codebook_size=62,
        voices=list(TINY_VOICES),
    )  # fmt: skip


def make_checkpoint(
    folder: Path,
    full: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    encoder: bool = False,
    overrides: dict[str, Any] | None = None,
    velocity_mlp: bool = False,
) -> Path:
    """Write a checkpoint with random weights; a model with random weights generates noise.

    Args:
        folder: the folder to write, created if it is missing.
        full: True makes the public shapes (8.0 GB in bf16), False a tiny model.
        seed: seed of the weights.
        dtype: dtype of every tensor.
        encoder: whether to include the codec's encoder, which the public checkpoint lacks.
        overrides: top-level keys of ``params.json`` to replace, with the new values.
        velocity_mlp: whether the flow head's velocity network is a residual MLP instead of the public transformer.

    Returns:
        `folder`.
    """
    params = {**(public_params if full else tiny_params)(velocity_mlp), **(overrides or {})}
    config = Config.from_params(params)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VoxtralTTS(config, encoder).state_dict().items()}
    generator = torch.Generator("cpu").manual_seed(seed)
    state = {name: random_tensor(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    lengths = PUBLIC_VOICES if full else TINY_VOICES
    voices = {
        name: random_normal((length, config.backbone.dim), generator).to(dtype) for name, length in lengths.items()
    }
    # the small tokenizer works for both sizes of model, because its ids are within any vocabulary
    write_checkpoint(folder, params, state, json.dumps(byte_tokenizer(lengths)), voices)
    return folder


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return random weights on the generator's device, with which activations keep their scale.

    So the codes spread over all levels.
    """
    if name.endswith("cluster_usage"):
        return torch.rand(shape, dtype=torch.float32, generator=generator, device=generator.device) * 9 + 1
    noise = random_normal(shape, generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if name.endswith("_scale"):
        return 0.3 + 0.1 * noise
    if "norm" in name or name.endswith("original0"):
        return 1 + 0.1 * noise
    if "embedding" in name or name.endswith("original1"):
        return noise
    return noise / math.sqrt(shape[-1])


def random_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return standard normal numbers, fp32 on the generator's device."""
    return torch.randn(shape, dtype=torch.float32, generator=generator, device=generator.device)


def byte_tokenizer(voices: dict[str, int]) -> dict[str, Any]:
    """Return the content of a ``tekken.json`` with the 256 bytes as text tokens; `voices` has each prefix length."""
    return {
        "config": {
            "pattern": "(?s).+",
            "num_vocab_tokens": 256,
            "default_vocab_size": N_SPECIAL_TOKENS + 256,
            "default_num_special_tokens": N_SPECIAL_TOKENS,
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": chr(i) if i < 128 else None}
            for i in range(256)
        ],
        "special_tokens": [
            {"rank": i, "token_str": SPECIAL_TOKENS.get(i, f"<SPECIAL_{i}>"), "is_control": True}
            for i in range(N_SPECIAL_TOKENS)
        ],
        "audio": {
            "sampling_rate": 24000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
            "voice_num_audio_tokens": voices,
        },
    }
