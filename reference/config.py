"""The model's configuration, read from Mistral's ``params.json``.

Every size of the model comes from here, for example layer counts, head dimensions and numbers of codebooks. An error
names each required key that is missing, each value that is of the wrong type, out of range or unsupported, and each
unknown key. If there are none, an error names all contradictions. Without these checks, a model with a wrong size or an
ignored key could load and produce noise instead of speech.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from .params_reader import ConfigError as ConfigError
from .params_reader import ParamsReader, shown
from .params_schema import ACOUSTIC, AUDIO, CODEC, ENCODING, MOE, MULTIMODAL, RANGES, TOP

N_SPECIAL_CODES = 2  # ids 0 and 1 of every codebook are EMPTY and END, so code c has id c + 2, the +2 offset
EMPTY_AUDIO, END_AUDIO = 0, 1
NOT_FINITE = -1  # the semantic code of a frame that has NaN or infinity, see FlowHead.forward


@dataclass(frozen=True)
class MoEConfig:
    """The sizes of the backbone's mixture of experts, named as in Mistral Small 4; Mixtral has a subset of these keys.

    Attributes:
        num_experts: number E of routed experts.
        num_experts_per_tok: number k of routed experts that each token uses.
        num_shared_experts: number of experts that every token uses, with weight 1.
        expert_hidden_dim: hidden width of one expert. Params without this key, such as Mixtral's, give the width as
            ``hidden_dim`` at the top level.
        first_k_dense_replace: number of leading layers with a dense feed-forward instead of experts.
        route_every_n: a layer after these leading ones has experts only if its index is a multiple of this number.
        routed_scale: factor on the renormalised routing weights.
        num_expert_groups: number of groups that the experts are split into; 1 means no groups.
        num_expert_groups_per_tok: number of groups that the experts of one token may come from.
    """

    num_experts: int
    num_experts_per_tok: int
    expert_hidden_dim: int
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    route_every_n: int = 1
    routed_scale: float = 1.0
    num_expert_groups: int = 1
    num_expert_groups_per_tok: int = 1

    def in_layer(self, i_layer: int) -> bool:
        """Return whether layer `i_layer`, counted from 0, has experts."""
        return i_layer >= self.first_k_dense_replace and i_layer % self.route_every_n == 0

    def problems(self) -> list[str]:
        """Return a description of each contradiction between these sizes; the list is empty if there is none."""
        found = []
        if self.num_experts_per_tok > self.num_experts:
            found.append(
                f"moe.num_experts_per_tok ({self.num_experts_per_tok}) must lie in 1..moe.num_experts "
                f"({self.num_experts})"
            )
        if self.num_experts % self.num_expert_groups:
            found.append(
                f"moe.num_expert_groups ({self.num_expert_groups}) must divide moe.num_experts ({self.num_experts})"
            )
        if self.num_expert_groups_per_tok > self.num_expert_groups:
            found.append(
                f"moe.num_expert_groups_per_tok ({self.num_expert_groups_per_tok}) must lie in "
                f"1..moe.num_expert_groups ({self.num_expert_groups})"
            )
        open_to_each = self.num_experts // self.num_expert_groups * self.num_expert_groups_per_tok
        if not found and self.num_experts_per_tok > open_to_each:
            found.append(
                f"moe.num_experts_per_tok ({self.num_experts_per_tok}) is more than the {open_to_each} experts that "
                f"a token may use with moe.num_expert_groups_per_tok ({self.num_expert_groups_per_tok})"
            )
        return found


@dataclass(frozen=True)
class BackboneConfig:
    """The sizes of the backbone.

    The backbone is a transformer with grouped-query attention, interleaved RoPE and RMSNorm. The feed-forward is
    SwiGLU, or a mixture of SwiGLU experts if `moe` is given.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    rope_theta: float
    norm_eps: float
    vocab_size: int
    max_seq_len: int = 4096
    moe: MoEConfig | None = None


@dataclass(frozen=True)
class AcousticTransformerConfig:
    """The sizes of a flow head with a transformer as its velocity network (``"kind": "transformer"``, the default).

    Attributes:
        n_decoding_steps: default number of evaluations of the velocity network per frame.
    """

    input_dim: int
    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float = 1e-5
    n_decoding_steps: int = 7  # the public checkpoint lacks this key, and vLLM-Omni also uses 7

    @property
    def time_dim(self) -> int:
        """Number of sinusoids that embed the flow time."""
        return self.dim


@dataclass(frozen=True)
class VelocityMLPConfig:
    """The sizes of a flow head with a residual MLP as its velocity network (``"kind": "adaln_mlp"``).

    The MLP is that of MAR, see ``mlp_head.py``. In MAR, `hidden_dim` equals `dim`; here they may differ.

    Attributes:
        n_decoding_steps: default number of evaluations of the velocity network per frame.
    """

    input_dim: int
    dim: int
    n_layers: int
    hidden_dim: int
    norm_eps: float = 1e-6
    time_dim: int = 256  # number of sinusoids that embed the flow time
    n_decoding_steps: int = 7


HEADS = {"transformer": AcousticTransformerConfig, "adaln_mlp": VelocityMLPConfig}


@dataclass(frozen=True)
class AudioModelConfig:
    """The sizes of the codebooks, and the ids of the two audio tokens in the text vocabulary."""

    semantic_codebook_size: int
    acoustic_codebook_size: int
    n_acoustic_codebook: int
    audio_token_id: int = 24
    begin_audio_token_id: int = 25

    @property
    def n_codebooks(self) -> int:
        """Number of codes in one frame: one semantic code and one code per acoustic codebook."""
        return 1 + self.n_acoustic_codebook

    @property
    def semantic_rows(self) -> int:
        """Number of rows of ``semantic_codebook_output``: codes and special codes, padded to a multiple of 128."""
        return _round_up(self.semantic_codebook_size + N_SPECIAL_CODES, 128)

    @property
    def embedding_offsets(self) -> tuple[int, ...]:
        """First row of each codebook in the embedding table of all codebooks."""
        semantic = self.semantic_codebook_size + N_SPECIAL_CODES
        acoustic = self.acoustic_codebook_size + N_SPECIAL_CODES
        return (0, *(semantic + acoustic * j for j in range(self.n_acoustic_codebook)))

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the embedding table: all codes and special codes, padded to a multiple of 128."""
        last = self.embedding_offsets[-1] + self.acoustic_codebook_size + N_SPECIAL_CODES
        return _round_up(last, 128)


@dataclass(frozen=True)
class CodecConfig:
    """The sizes of the neural codec (``audio_tokenizer_args``): causal convolutions and windowed ALiBi transformers."""

    semantic_codebook_size: int
    semantic_dim: int
    acoustic_codebook_size: int
    acoustic_dim: int
    dim: int
    hidden_dim: int
    head_dim: int
    n_heads: int
    n_kv_heads: int
    sampling_rate: int = 24000
    pretransform_patch_size: int = 240
    patch_proj_kernel_size: int = 7
    attn_sliding_window_size: int = 16
    half_attn_window_upon_downsampling: bool = True
    qk_norm_eps: float = 1e-6
    norm_eps: float = 1e-2
    layer_scale_init: float = 1e-2
    encoder_transformer_lengths_str: str = "2,2,2,2"
    encoder_convs_kernels_str: str = "4,4,4,3"
    encoder_convs_strides_str: str = "2,2,2,1"
    decoder_transformer_lengths_str: str = "2,2,2,2"
    decoder_convs_kernels_str: str = "3,4,4,4"
    decoder_convs_strides_str: str = "1,2,2,2"

    @property
    def latent_dim(self) -> int:
        """Number of channels of the quantised latent: the semantic vector and one channel per acoustic codebook."""
        return self.semantic_dim + self.acoustic_dim

    @property
    def encoder_stages(self) -> list[tuple[int, int, int]]:
        """The encoder's stages in order, each as (transformer layers, kernel size, stride)."""
        return _stages(self, "encoder")

    @property
    def decoder_stages(self) -> list[tuple[int, int, int]]:
        """The decoder's stages in order, each as (transformer layers, kernel size, stride)."""
        return _stages(self, "decoder")

    @property
    def samples_per_frame(self) -> int:
        """Number of audio samples in one frame: 1920 in the public model."""
        return self.pretransform_patch_size * math.prod(stride for _, _, stride in self.decoder_stages)


@dataclass(frozen=True)
class Config:
    """The sizes of a whole Voxtral-class model; :meth:`from_params` reads and checks the sizes.

    Attributes:
        backbone: sizes of the backbone.
        acoustic_transformer: sizes of the flow head's velocity network, which is a transformer or a residual MLP.
        audio: sizes of the codebooks, and ids of the audio tokens.
        codec: sizes of the codec.
        voices: names of the preset voices, in the checkpoint's order.
        quantization: the format of 8-bit weights, "int8" or "fp8", or None if no weights are quantised.
    """

    backbone: BackboneConfig
    acoustic_transformer: AcousticTransformerConfig | VelocityMLPConfig
    audio: AudioModelConfig
    codec: CodecConfig
    voices: tuple[str, ...] = ()
    quantization: str | None = None

    @property
    def frame_rate(self) -> float:
        """Frames per second: 12.5 in the public model."""
        return self.codec.sampling_rate / self.codec.samples_per_frame

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Self:
        """Return the configuration that the dict of a ``params.json`` describes.

        Raises:
            ConfigError: keys are missing, unknown or unsupported, or values are of the wrong type or out of range; the
                message names them all. Values that contradict each other are reported only if there are no such keys.
        """
        if not isinstance(params, dict):
            raise ConfigError(f"params must be the dict of a params.json, got {type(params).__name__}")
        reader = ParamsReader(params)
        for section in (MULTIMODAL, AUDIO, CODEC, ACOUSTIC):
            reader.open(section)
        for section in (ENCODING, MOE):
            reader.open(section, required=False)
        head = _head(reader)
        backbone = reader.read(BackboneConfig, TOP, skip=("moe",))
        moe = _read_moe(reader, backbone.get("hidden_dim"))
        acoustic, audio = reader.read(head, ACOUSTIC), reader.read(AudioModelConfig, AUDIO)
        codec, voices = reader.read(CodecConfig, CODEC), reader.names(CODEC, "voice")
        quantization = reader.quantization()
        reader.check_other_keys()
        reader.raise_problems()
        config = cls(
            backbone=BackboneConfig(**backbone, moe=MoEConfig(**moe) if moe else None),
            acoustic_transformer=head(**acoustic),
            audio=AudioModelConfig(**audio),
            codec=CodecConfig(**codec),
            voices=voices,
            quantization=quantization,
        )
        problems = _contradictions(config) or _disagreements(config, reader)
        if problems:
            raise ConfigError("params.json contradicts itself: " + "; ".join(problems))
        return config


def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _stages(codec: CodecConfig, side: str) -> list[tuple[int, int, int]]:
    columns = []
    for what in ("transformer_lengths", "convs_kernels", "convs_strides"):
        columns.append([int(part) for part in getattr(codec, f"{side}_{what}_str").split(",")])
    return list(zip(*columns, strict=True))


def _head(reader: ParamsReader) -> type[AcousticTransformerConfig] | type[VelocityMLPConfig]:
    """Return the config class of the flow head, and record the keys of the other kind of head as problems."""
    kind = reader.get(ACOUSTIC, "kind")
    kind = "transformer" if kind is None else kind
    if kind not in list(HEADS):  # a list, because a JSON value need not be hashable
        reader.wrong.append(f"{ACOUSTIC}.kind must be one of {', '.join(HEADS)}, got {shown(kind)}")
        kind = "transformer"
    reader.check_only(ACOUSTIC, "use_biases", kind == "adaln_mlp")
    fields = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in HEADS.items()}
    reader.wrong += [
        f"{ACOUSTIC}.{key} is not allowed if acoustic_transformer_args.kind is {kind!r}"
        for key in sorted(set.union(*fields.values()) - fields[kind])
        if reader.get(ACOUSTIC, key) is not None
    ]
    return HEADS[kind]


def _read_moe(reader: ParamsReader, hidden_dim: int | None) -> dict[str, Any]:
    """Return the values for :class:`MoEConfig`, or an empty dict if there is no section ``moe``."""
    if hidden_dim is None or reader.get(MOE, "expert_hidden_dim") is not None:
        return reader.read(MoEConfig, MOE)
    moe = reader.read(MoEConfig, MOE, skip=("expert_hidden_dim",))
    return {"expert_hidden_dim": hidden_dim, **moe} if moe else {}  # Mixtral's experts have the width hidden_dim


def _contradictions(config: Config) -> list[str]:
    backbone, acoustic, audio, codec = config.backbone, config.acoustic_transformer, config.audio, config.codec
    found: list[str] = list(backbone.moe.problems()) if backbone.moe else []

    def same(a_name: str, a: Any, b_name: str, b: Any) -> None:
        if a != b:
            found.append(f"{a_name} ({a}) != {b_name} ({b})")

    same("acoustic_transformer_args.input_dim", acoustic.input_dim, "dim", backbone.dim)
    for name in ("semantic_codebook_size", "acoustic_codebook_size"):
        same(f"audio_model_args.{name}", getattr(audio, name), f"audio_tokenizer_args.{name}", getattr(codec, name))
    same(
        "audio_model_args.n_acoustic_codebook", audio.n_acoustic_codebook,
        "audio_tokenizer_args.acoustic_dim", codec.acoustic_dim,
    )  # fmt: skip
    same("codec n_kv_heads", codec.n_kv_heads, "codec n_heads", codec.n_heads)
    if isinstance(acoustic, AcousticTransformerConfig):
        same("acoustic_transformer_args.dim", acoustic.dim, "acoustic_transformer_args.input_dim", acoustic.input_dim)
    for name, part in (("", backbone), ("acoustic_transformer_args.", acoustic)):
        if not isinstance(part, VelocityMLPConfig) and part.n_heads % part.n_kv_heads:
            found.append(f"{name}n_heads ({part.n_heads}) must be a multiple of n_kv_heads ({part.n_kv_heads})")
    if backbone.head_dim % 2 or acoustic.time_dim % 2:
        found.append(
            "head_dim must be even, and so must acoustic_transformer_args.dim (acoustic_transformer_args.time_dim if "
            "the kind is adaln_mlp)"
        )
    if max(audio.audio_token_id, audio.begin_audio_token_id) >= backbone.vocab_size:
        found.append(f"audio_token_id and begin_audio_token_id must be less than vocab_size ({backbone.vocab_size})")
    if audio.audio_token_id == audio.begin_audio_token_id:
        found.append(f"audio_token_id and begin_audio_token_id must differ, but both are {audio.audio_token_id}")
    return found + _codec_contradictions(codec)


def _codec_contradictions(codec: CodecConfig) -> list[str]:
    try:
        encoder, decoder = codec.encoder_stages, codec.decoder_stages
    except ValueError:
        return ["the three encoder_*_str keys must have equally many numbers; likewise the three decoder_*_str keys"]
    found = []
    factor = math.prod(stride for _, _, stride in encoder)
    if factor != math.prod(stride for _, _, stride in decoder):
        found.append("the strides in encoder_convs_strides_str and decoder_convs_strides_str must have equal products")
    if any(s not in (1, 2) or k < s for stages in (encoder, decoder) for _, k, s in stages):
        found.append("codec strides must be 1 or 2, and each codec kernel must be at least as long as its stride")
    if decoder[0][2] != 1:
        found.append("the first decoder stride must be 1")
    if codec.half_attn_window_upon_downsampling and codec.attn_sliding_window_size < factor:
        found.append(
            f"attn_sliding_window_size ({codec.attn_sliding_window_size}) must be at least {factor}, because each "
            "encoder stride of 2 halves it"
        )
    return found


def _disagreements(config: Config, reader: ParamsReader) -> list[str]:
    """Describe each repeated size and each limit that contradicts the config, and a frame rate that is out of range."""
    found = []
    for key, value in (
        ("num_codebooks", config.audio.n_codebooks),
        ("sampling_rate", config.codec.sampling_rate),
        ("frame_rate", config.frame_rate),
    ):
        repeated = reader.get(ENCODING, key)
        if repeated not in (None, value):
            found.append(f"audio_encoding_args.{key} ({repeated}) != the model's ({value})")
    for key in ("max_position_embeddings", "model_max_length"):
        limit = reader.get(TOP, key)
        if limit is not None and limit < config.backbone.max_seq_len:
            found.append(f"max_seq_len ({config.backbone.max_seq_len}) must be at most {key} ({limit})")
    low, high = RANGES["frame_rate"]
    if not low <= config.frame_rate <= high:
        found.append(
            f"the frame rate, sampling_rate ({config.codec.sampling_rate}) / samples per frame "
            f"({config.codec.samples_per_frame}), must lie in {low}..{high} Hz"
        )
    return found
