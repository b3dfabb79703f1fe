"""Tests that no key of params.json is ignored: unknown keys and wrong values are errors that name the key."""

import copy
import dataclasses
import json
import math
import typing
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from voxkern.checkpoint import read_params
from voxkern.random_checkpoint import TINY_MOE, public_params, tiny_params
from voxkern.reference import Config, ConfigError, VoxtralTTS
from voxkern.reference.config import (
    AcousticTransformerConfig,
    AudioModelConfig,
    BackboneConfig,
    CodecConfig,
    MoEConfig,
    VelocityMLPConfig,
)
from voxkern.tts import DEMO

AUDIO = "multimodal.audio_model_args."
ENCODING, HEAD = AUDIO + "audio_encoding_args.", AUDIO + "acoustic_transformer_args."
CODEC = "multimodal.audio_tokenizer_args."
SECTIONS = ["", "multimodal.", AUDIO, ENCODING, HEAD, CODEC, "moe."]
STAGES = CODEC + "decoder_transformer_lengths_str"

# keys of the public checkpoint's params.json that public_params() lacks, and keys of Mistral's other models
PUBLIC_EXTRAS = {
    "model_parallel": 1,
    "max_position_embeddings": 128000,
    ENCODING + "interleave_audio_tokens_per_segment": 8192,
    ENCODING + "interleave_text_tokens_per_segment": 8192,
    ENCODING + "single_trailing_segment": False,
    HEAD + "rope_theta": 10000.0,
    AUDIO + "p_uncond": 0.0,
    AUDIO + "text_feature_bugged": False,
    AUDIO + "condition_dropped_token_id": 42,
}
OTHER_EXTRAS = {
    "model_max_length": 131072,
    "max_batch_size": 0,
    "dropout": 0.1,
    "activation": "silu",
    "ada_rms_norm_t_cond": False,
    "ada_rms_norm_t_cond_dim": 32,
    "tied_embeddings": False,
    HEAD + "sigma": 0.01,
    HEAD + "sigma_max": 1,
    HEAD + "n_decoding_steps": 8,
    AUDIO + "p_uncond": 0.2,
    "moe.renorm_strategy": "WEIGHTS",
    "moe.use_load_balancing_bias": False,
}

# (prefix of the section, its class, whether the velocity network is an MLP)
READ = [
    ("", BackboneConfig, False),
    ("moe.", MoEConfig, False),
    (AUDIO, AudioModelConfig, False),
    (HEAD, AcousticTransformerConfig, False),
    (HEAD, VelocityMLPConfig, True),
    (CODEC, CodecConfig, False),
]
MAY_BE_ZERO = {
    "num_shared_experts", "first_k_dense_replace", "audio_token_id", "begin_audio_token_id", "layer_scale_init",
}  # fmt: skip
NUMBERS = [
    pytest.param(prefix + field.name, typing.get_type_hints(cls)[field.name], mlp, id=f"{cls.__name__}-{field.name}")
    for prefix, cls, mlp in READ
    for field in dataclasses.fields(cls)
    if typing.get_type_hints(cls)[field.name] in (int, float)
]


def changed(params: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of params in which the keys with the given paths have other values."""
    params = copy.deepcopy(params)
    for path, value in changes.items():
        *sections, key = path.split(".")
        parent = params
        for section in sections:
            parent = parent[section]
        parent[key] = value
    return params


def params_with(changes: dict[str, Any], mlp: bool = False) -> dict[str, Any]:
    """Return tiny params with experts, in which the keys with the given paths have other values."""
    return changed({**tiny_params(mlp), "moe": TINY_MOE}, changes)


def refused(path: str, value: Any, named: str, mlp: bool = False) -> None:
    """Check that params with this value are refused by one error that has `named`."""
    with pytest.raises(ConfigError) as error:
        Config.from_params(params_with({path: value}, mlp))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("yarn", {"factor": 36, "original_max_position_embeddings": 8192, "beta": 32, "alpha": 1}, "yarn = {"),
        ("yarn", {}, "yarn = {} is not supported"),
        ("llama_4_scaling", {"original_max_position_embeddings": 8192, "beta": 0.1}, "llama_4_scaling = {"),
        ("quantization", {"qformat_weight": "int4"}, "quantization = {'qformat_weight': 'int4'} is not supported"),
        ("quantization", {"qformat_weight": []}, "quantization = {'qformat_weight': []} is not supported"),
        ("quantization", {"qformat_weight": "int8", "qscheme_act": "ROW"}, "quantization = {"),
        ("quantization", {"qformat_weight": "int8", "foo": 1}, "quantization = {"),
        ("quantization", {"qscheme_act": "TENSOR"}, "quantization = {"),
        ("quantization", {"quant_method": "compressed-tensors"}, "quantization = {"),
        ("quantization", "fp8", "quantization = 'fp8' is not supported"),
        ("quantization", [], "quantization = [] is not supported"),
        ("quantization_config", {}, "quantization_config is unknown"),
        ("sliding_window", 4096, "sliding_window = 4096 is not supported"),
        ("activation", "gelu", "activation = 'gelu' is not supported"),
        ("model_type", "voxtral_realtime", "model_type = 'voxtral_realtime' is not supported"),
        ("use_biases", 0, "use_biases = 0 is not supported"),
        ("causal", 1, "causal = 1 is not supported"),
        ("ada_rms_norm_t_cond", True, "ada_rms_norm_t_cond = True is not supported"),
        ("kv_lora_rank", 256, "kv_lora_rank is unknown"),
        ("multimodal.bos_token_id", 2, "multimodal.bos_token_id = 2 is not supported"),
        ("multimodal.whisper_model_args", {}, "multimodal.whisper_model_args is unknown"),
        (AUDIO + "codebook_sizes", "8192,21", AUDIO + "codebook_sizes is unknown"),
        (AUDIO + "text_feature_bugged", True, AUDIO + "text_feature_bugged = True is not supported"),
        (AUDIO + "p_uncond", math.nan, AUDIO + "p_uncond must lie in 0..1, got nan"),
        (ENCODING + "interleave_text_tokens_per_segment", 8, "interleave_text_tokens_per_segment = 8"),
        (ENCODING + "num_codebooks", 37.0, ENCODING + "num_codebooks must be int, got 37.0"),
        (ENCODING + "sampling_rate", True, ENCODING + "sampling_rate must be int, got True"),
        (ENCODING + "frame_rate", "12.5", ENCODING + "frame_rate must be float, got '12.5'"),
        (HEAD + "sigma_max", 2.0, HEAD + "sigma_max = 2.0 is not supported"),
        (HEAD + "cfg_alpha", 1.5, HEAD + "cfg_alpha is unknown"),
        (HEAD + "rope_theta", math.inf, HEAD + "rope_theta must lie in"),
        (HEAD + "kind", "", HEAD + "kind must be one of"),
        (CODEC + "channels", True, CODEC + "channels = True is not supported"),
        (CODEC + "channels", 2, CODEC + "channels = 2 is not supported"),
        (CODEC + "half_attn_window_upon_downsampling", 1, "half_attn_window_upon_downsampling must be bool, got 1"),
        ("moe.use_load_balancing_bias", True, "moe.use_load_balancing_bias = True is not supported"),
        ("max_position_embeddings", 512, "max_seq_len (1024) must be at most max_position_embeddings (512)"),
        ("model_max_length", 512, "max_seq_len (1024) must be at most model_max_length (512)"),
    ],
)
def test_what_would_change_results_is_refused_by_name(path: str, value: Any, named: str) -> None:
    refused(path, value, named)


@pytest.mark.parametrize("prefix", SECTIONS)
def test_an_unknown_key_is_refused_in_every_section(prefix: str) -> None:
    refused(prefix + "foo", 1, f"{prefix}foo is unknown and may change what the model computes")


def test_all_unknown_keys_are_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        Config.from_params(params_with({f"{prefix}foo": {} for prefix in SECTIONS} | {"n_layers": 0}))
    assert all(f"{prefix}foo is unknown" in str(error.value) for prefix in SECTIONS)
    assert "n_layers must lie in" in str(error.value)


@pytest.mark.parametrize(
    "quantization", [None, "NO_SCALES", {}, {"qformat_weight": None}, {"a": None, "qscheme_act": "NO_SCALES"}]
)
def test_no_quantization_is_harmless(quantization: Any) -> None:
    params = params_with({"quantization": quantization})
    assert Config.from_params(params) == Config.from_params(params_with({}))


@pytest.mark.parametrize("activations", [None, "NO_SCALES", "TENSOR"])
@pytest.mark.parametrize(("on_disk", "format_"), [("int8", "int8"), ("fp8_e4m3", "fp8")])
def test_the_format_of_8_bit_weights(on_disk: str, format_: str, activations: str | None) -> None:
    params = params_with({"quantization": {"qformat_weight": on_disk, "qscheme_act": activations}})
    plain = Config.from_params(params_with({}))
    assert Config.from_params(params) == dataclasses.replace(plain, quantization=format_)
    assert plain.quantization is None


@pytest.mark.parametrize("prefix", SECTIONS)
def test_null_counts_as_absent(prefix: str) -> None:
    params = params_with({f"{prefix}{key}": None for key in ("foo", "yarn", "llama_4_scaling", "use_biases", "kind")})
    assert Config.from_params(params) == Config.from_params(params_with({}))


def test_null_gives_the_default() -> None:
    params = params_with({"moe": None, "max_seq_len": None, CODEC + "voice": None, CODEC + "norm_eps": None})
    config = Config.from_params(params)
    assert (config.backbone.moe, config.backbone.max_seq_len) == (None, 4096)
    assert (config.codec.norm_eps, config.voices) == (0.01, ())
    moe = Config.from_params(params_with({"moe.expert_hidden_dim": None})).backbone.moe
    assert moe is not None
    assert moe.expert_hidden_dim == tiny_params()["hidden_dim"]


@pytest.mark.parametrize("path", list(OTHER_EXTRAS))
def test_harmless_keys_load(path: str) -> None:
    Config.from_params(params_with({path: OTHER_EXTRAS[path], "max_seq_len": 512}))


def test_the_public_checkpoints_keys_load() -> None:
    assert Config.from_params(changed(public_params(), PUBLIC_EXTRAS)) == Config.from_params(public_params())


def test_the_demo_loads() -> None:
    assert Config.from_params(read_params(DEMO)).voices == ("slt", "rms")


@pytest.mark.parametrize(("path", "kind", "mlp"), NUMBERS)
def test_every_number_has_a_type_and_a_range(path: str, kind: type, mlp: bool) -> None:
    name = path.rpartition(".")[2]
    wrong: list[Any] = [math.inf, -math.inf, math.nan, -1, -0.5, 10**400, 1e39, 10**5000, True, False, "1", [1], {}]
    for value in wrong:
        refused(path, value, path + " must ", mlp)
    if kind is int:
        refused(path, 2.0, f"{path} must be int, got 2.0", mlp)
    if name in MAY_BE_ZERO:
        assert isinstance(Config.from_params(params_with({path: 0}, mlp)), Config)
    else:
        refused(path, 0, f"{path} must lie in", mlp)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_theta", 1e39),
        ("rope_theta", 0.5),
        ("norm_eps", 1e-46),
        ("norm_eps", 5e-324),
        ("norm_eps", 2),
        (CODEC + "layer_scale_init", 1e30),
        ("moe.routed_scale", 1e5),
        (CODEC + "acoustic_codebook_size", 1),
        (CODEC + "sampling_rate", 1),
        (HEAD + "n_decoding_steps", 65),
        ("dim", 2**31),
        ("n_heads", 2**20),
    ],
)
def test_extreme_numbers_are_refused(path: str, value: float) -> None:
    refused(path, value, f"{path} must lie in")


@pytest.mark.parametrize(
    ("path", "value"),
    [("rope_theta", 1), ("rope_theta", 10**9), ("rope_theta", 1e11), ("norm_eps", 1e-12), ("moe.routed_scale", 2.5)],
)
def test_usual_numbers_are_accepted(path: str, value: float) -> None:
    config = Config.from_params(params_with({path: value})).backbone
    found = getattr(config.moe if path.startswith("moe.") else config, path.rpartition(".")[2])
    assert (found, type(found)) == (value, float)


@pytest.mark.parametrize(
    "value",
    ["", ",", "2,,2", "2,2,2,", "2,2,-2,2", "0,1,1,1", "1.5,1,1,1", "２,1,1,1", "1_0,1,1,1", "+1,1,1,1", "1;1;1;1",
     "999,1,1,1", "9" * 5000, ",".join("1" * 17), "1,1,1,1\n", 1111, [1, 1, 1, 1]],
)  # fmt: skip
def test_a_wrong_list_of_stages_is_named(value: Any) -> None:
    refused(STAGES, value, STAGES + " must be")


def test_spaces_in_a_list_of_stages_are_accepted() -> None:
    stages = Config.from_params(params_with({STAGES: " 1, 1,1 ,1"})).codec.decoder_stages
    assert [n_layers for n_layers, _, _ in stages] == [1, 1, 1, 1]


def test_windows_are_at_least_one() -> None:
    path = CODEC + "attn_sliding_window_size"
    refused(path, 7, "attn_sliding_window_size (7) must be at least 8")
    with torch.device("meta"):
        codec = VoxtralTTS(Config.from_params(params_with({path: 8}))).audio_tokenizer
    assert [codec.decoder_blocks[i].window for i in (1, 3, 5, 7)] == [1, 2, 4, 8]
    never_halved = {path: 1, CODEC + "half_attn_window_upon_downsampling": False}
    assert Config.from_params(params_with(never_halved)).codec.attn_sliding_window_size == 1


def test_the_frame_rate_is_sensible() -> None:
    no_frame_rate = {ENCODING + "frame_rate": None}
    for patch in (1, 2, 2**20):
        with pytest.raises(ConfigError, match=r"frame rate.* must lie in 1\.\.1000 Hz"):
            Config.from_params(params_with({CODEC + "pretransform_patch_size": patch, **no_frame_rate}))


@pytest.mark.parametrize("path", ["multimodal", *(prefix[:-1] for prefix in SECTIONS[2:])])
@pytest.mark.parametrize("value", [[], [1], "", "a", 0, 1, 1.5, False, True])
def test_a_section_must_be_an_object(path: str, value: Any) -> None:
    refused(path, value, path + " must be a JSON object")


def test_an_empty_section_has_missing_keys() -> None:
    refused("moe", {}, "missing keys: moe.num_experts, moe.num_experts_per_tok")


@pytest.mark.parametrize(
    ("voices", "names"),
    [({}, ()), ([], ()), (["b", "a"], ("b", "a")), ({"b": 0, "a": 1}, ("b", "a")), ({"b": 1, "A": 0}, ("a", "b"))],
)
def test_voices_are_an_array_or_an_object(voices: Any, names: tuple[str, ...]) -> None:
    assert Config.from_params(params_with({CODEC + "voice": voices})).voices == names


@pytest.mark.parametrize("voices", [5, 0, "ada", "", True, 1.5, [1], [["a"]], [None], {"a": "b"}, {"a": 0.5}])
def test_wrong_voices_are_named(voices: Any) -> None:
    refused(CODEC + "voice", voices, CODEC + "voice must be")


def test_audio_tokens_differ() -> None:
    refused(AUDIO + "audio_token_id", 25, "audio_token_id and begin_audio_token_id must differ, but both are 25")


@pytest.mark.parametrize("params", [None, [], "", 1])
def test_params_must_be_an_object(params: Any) -> None:
    with pytest.raises(ConfigError, match="params must be the dict"):
        Config.from_params(params)


def paths(params: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the paths of all keys, also of those that have objects."""
    found = []
    for key, value in params.items():
        found += [prefix + key, *(paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


def cheap(config: Config) -> bool:
    """Return whether the model has few enough modules to be created in a test."""
    backbone, codec = config.backbone, config.codec
    experts = backbone.moe.num_experts if backbone.moe else 1
    stages = codec.encoder_stages + codec.decoder_stages
    layers = backbone.n_layers * experts + config.acoustic_transformer.n_layers + sum(n for n, _, _ in stages)
    return layers <= 100


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-2, 300), st.floats(), st.floats(0, 1), st.text(),
        st.sampled_from(["1", "1,1,1,1", "2,2,2,1", "1,2,2,2", "4,4,4,4", "sum", 10**400, 2**31 - 1, 2**20, 64]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_of_any_key_is_refused_or_gives_a_model(data: Any) -> None:
    mlp = data.draw(st.booleans())
    path = data.draw(st.sampled_from(paths(params_with({}, mlp))))
    params = params_with({path: data.draw(VALUES)}, mlp)
    try:
        config = Config.from_params(params)
    except ConfigError:
        return
    if cheap(config):
        with torch.device("meta"):
            VoxtralTTS(config, encoder=True)
    assert Config.from_params(json.loads(json.dumps(params))) == config
