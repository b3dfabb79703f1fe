"""Tests of reading params.json: the public model's file gives its shapes, and errors name what is wrong."""

import copy
from typing import Any

import pytest
import torch

from voxkern.random_checkpoint import public_params, tiny_params
from voxkern.reference import Config, ConfigError, VoxtralTTS
from voxkern.reference.config import VelocityMLPConfig


def test_public_shapes() -> None:
    config = Config.from_params(public_params())
    with torch.device("meta"):
        state = VoxtralTTS(config).state_dict()
    assert len(state) == 386
    assert sum(t.numel() for t in state.values()) == 4_002_353_392
    expected = {
        "mm_audio_embeddings.tok_embeddings.weight": (131072, 3072),
        "mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight": (9088, 3072),
        "layers.25.attention.wk.weight": (1024, 3072),
        "layers.0.feed_forward.w2.weight": (3072, 9216),
        "norm.weight": (3072,),
        "acoustic_transformer.input_projection.weight": (3072, 36),
        "acoustic_transformer.layers.2.attention.wo.weight": (3072, 4096),
        "acoustic_transformer.semantic_codebook_output.weight": (8320, 3072),
        "acoustic_transformer.acoustic_codebook_output.weight": (36, 3072),
        "audio_tokenizer.quantizer.semantic_codebook.embedding_sum": (8192, 256),
        "audio_tokenizer.decoder_blocks.0.conv.parametrizations.weight.original1": (1024, 292, 3),
        "audio_tokenizer.decoder_blocks.2.conv.parametrizations.weight.original0": (1024, 1, 1),
        "audio_tokenizer.decoder_blocks.6.conv.parametrizations.weight.original1": (1024, 1024, 4),
        "audio_tokenizer.decoder_blocks.7.layers.1.attention.q_norm.weight": (1024,),
        "audio_tokenizer.decoder_blocks.7.layers.1.attention_scale": (1024,),
        "audio_tokenizer.output_proj.conv.parametrizations.weight.original1": (240, 1024, 7),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert config.frame_rate == 12.5
    assert config.codec.samples_per_frame == 1920
    assert config.audio.embedding_offsets[:3] == (0, 8194, 8217)
    with torch.device("meta"):
        assert len(VoxtralTTS(config, encoder=True).state_dict()) == 386 + 114


def test_codec_windows() -> None:
    with torch.device("meta"):
        codec = VoxtralTTS(Config.from_params(public_params()), encoder=True).audio_tokenizer
    assert [codec.decoder_blocks[i].layers[0].attention.window for i in (1, 3, 5, 7)] == [2, 4, 8, 16]
    assert [codec.encoder_blocks[i].layers[0].attention.window for i in (0, 2, 4, 6)] == [16, 8, 4, 2]


def test_moe_forms() -> None:
    native = {"num_experts": 8, "num_experts_per_tok": 2, "expert_hidden_dim": 64, "num_shared_experts": 1}
    moe = Config.from_params({**tiny_params(), "moe": native}).backbone.moe
    assert moe is not None
    assert (moe.num_experts, moe.expert_hidden_dim, moe.num_shared_experts, moe.routed_scale) == (8, 64, 1, 1.0)
    mixtral = Config.from_params({**tiny_params(), "moe": {"num_experts": 8, "num_experts_per_tok": 2}}).backbone.moe
    assert mixtral is not None
    assert mixtral.expert_hidden_dim == 160
    every = {**native, "first_k_dense_replace": 1, "route_every_n": 2}
    moe = Config.from_params({**tiny_params(), "moe": every}).backbone.moe
    assert moe is not None
    assert [moe.in_layer(i) for i in range(6)] == [False, False, True, False, True, False]


def _set(params: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        params = params[parent]
    if value is None:
        del params[key]
    else:
        params[key] = value


ACOUSTIC = "multimodal.audio_model_args.acoustic_transformer_args."


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("dim", None, "missing keys: dim"),
        ("multimodal", None, "multimodal"),
        ("multimodal.audio_model_args.semantic_codebook_size", None, "audio_model_args.semantic_codebook_size"),
        ("n_layers", "26", "n_layers must be int"),
        ("n_layers", -1, r"n_layers must lie in 1\.\.1024, got -1"),
        ("sliding_window", 4096, "sliding_window = 4096 is not supported"),
        ("use_biases", True, "use_biases"),
        (ACOUSTIC + "input_dim", 65, r"input_dim \(65\) != dim \(64\)"),
        (ACOUSTIC + "dim", 32, "acoustic_transformer_args.dim"),
        (ACOUSTIC + "n_kv_heads", 3, "n_heads"),
        (ACOUSTIC + "n_decoding_steps", 65, "n_decoding_steps"),
        (ACOUSTIC + "kind", "unet", "acoustic_transformer_args.kind must be one of transformer, adaln_mlp, got 'unet'"),
        (ACOUSTIC + "kind", ["adaln_mlp"], "acoustic_transformer_args.kind must be one of"),
        (
            ACOUSTIC + "kind",
            "adaln_mlp",
            "acoustic_transformer_args.n_heads is not allowed if acoustic_transformer_args.kind is 'adaln_mlp'",
        ),
        (
            ACOUSTIC + "time_dim",
            256,
            "acoustic_transformer_args.time_dim is not allowed if acoustic_transformer_args.kind is 'transformer'",
        ),
        ("multimodal.audio_tokenizer_args.semantic_codebook_size", 63, "semantic_codebook_size"),
        ("multimodal.audio_tokenizer_args.acoustic_dim", 35, "acoustic_dim"),
        ("multimodal.audio_tokenizer_args.decoder_convs_strides_str", "1,2,2", "encoder_\\*_str"),
        ("multimodal.audio_tokenizer_args.decoder_convs_strides_str", "1,2,2,1", "strides"),
        ("multimodal.audio_model_args.audio_encoding_args.frame_rate", 25.0, "frame_rate"),
        ("multimodal.audio_model_args.audio_token_id", 5000, "vocab_size"),
        ("moe", {"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("moe", {"num_experts": 12, "num_experts_per_tok": 3, "num_expert_groups": 5}, "num_expert_groups"),
        ("moe", {"num_experts": 12, "num_experts_per_tok": 4, "num_expert_groups": 4}, "more than the 3 experts"),
        ("moe", {"num_experts": 8, "num_experts_per_tok": 2, "route_every_n": 0}, "route_every_n"),
        ("moe", {"num_experts_per_tok": 3}, "moe.num_experts"),
        ("moe", [1], "moe"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, named: str) -> None:
    params = copy.deepcopy(tiny_params())
    _set(params, path, value)
    with pytest.raises(ConfigError, match=named):
        Config.from_params(params)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_dim", None, "missing keys: multimodal.audio_model_args.acoustic_transformer_args.hidden_dim"),
        ("input_dim", 65, r"input_dim \(65\) != dim \(64\)"),
        ("time_dim", 31, "time_dim if the kind is adaln_mlp"),
        ("use_biases", False, r"use_biases = False is not supported \(only True\)"),
        ("head_dim", 16, "head_dim is not allowed if acoustic_transformer_args.kind is 'adaln_mlp'"),
        ("n_layers", 2.0, "n_layers must be int"),
    ],
)
def test_what_is_wrong_with_a_velocity_mlp_is_named(key: str, value: Any, named: str) -> None:
    params = copy.deepcopy(tiny_params(velocity_mlp=True))
    assert isinstance(Config.from_params(params).acoustic_transformer, VelocityMLPConfig)
    _set(params, ACOUSTIC + key, value)
    with pytest.raises(ConfigError, match=named):
        Config.from_params(params)


def test_all_problems_in_one_error() -> None:
    params = tiny_params()
    del params["dim"], params["n_heads"]
    with pytest.raises(ConfigError, match="dim, n_heads"):
        Config.from_params(params)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp8_matmul is unknown.*init is unknown"):
        Config.from_params({**tiny_params(), "fp8_matmul": 1, "init": {}})
