"""Whole frames and single modules to time: the demo voice's, and modules of the public sizes with random weights.

All calls of a trial use one copy of the weights. The weights of the public head and layer are larger than any cache,
but the demo voice's are not. Bytes per second are not given, because a head reads its weights once a step;
``bench/static/frame.py`` counts the bytes of a frame.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import voxkern
from bench.micro.providers import Check, LazyCall, Trial, by_codes, by_distance, by_frame, missing, results_of
from bench.ops.registry import FLOATS, ROOT, to_dtype
from voxkern.checkpoint import read_checkpoint, read_params
from voxkern.kernels.launch_config import overlapped
from voxkern.packed.linear import PackedLinear
from voxkern.packed.model import pack
from voxkern.random_checkpoint import public_params, random_tensor
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.attention import PagedCache
from voxkern.reference.backbone import Backbone
from voxkern.reference.codec import AudioTokenizer
from voxkern.reference.config import N_SPECIAL_CODES, MoEConfig
from voxkern.reference.flow_head import FlowHead
from voxkern.reference.layers import upcast
from voxkern.reference.model import make_head
from voxkern.reference.moe import MoEBlock
from voxkern.reference.quantized import FORMATS, quantizable, quantize_linears

DEMO = ROOT / "voxkern" / "demo"
PUBLIC_MODEL_BYTES = 60e9  # GPU memory for the public model and for its fp64 copy, which checks the results
# evaluations of the velocity; tokens in the cache, about 30 s of speech; tokens of a page
STEPS, CONTEXT, PAGE = 7, 400, 64


class BenchPoint(NamedTuple):
    """Identifies a trial: the module's name, the name of its shape, the dtype and the device."""

    subject: str
    shape: str
    dtype: str
    device: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, where kernels run."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class ModuleBench:
    """A module to time at one shape.

    Attributes:
        name: name of the module.
        shape: name of the shape.
        build: function of a :class:`BenchPoint` that returns its trial.
        dtypes: dtypes that the module is timed in.
        large: whether the module has the public sizes. Making such a module takes gigabytes and seconds.
    """

    name: str
    shape: str
    build: Callable[[BenchPoint], Trial]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    large: bool = False


def trial_of(
    point: BenchPoint,
    module: nn.Module,
    run: Callable[..., Any],
    args: Mapping[str, Any],
    complaint: Check,
    ours: Callable[[], Callable[..., Any]],
    peers: Mapping[str, Callable[..., Any]] | None = None,
    steps: str = "",
) -> Trial:
    """Return a trial of ``run(module, **args)``.

    Args:
        point: subject, shape, dtype and device of the trial.
        module: the reference module.
        run: function of the module and the arguments that returns the results.
        args: the arguments by name.
        complaint: checks the results, see :class:`bench.micro.providers.Trial`.
        ours: makes the call that runs kernels, which has the same arguments and results.
        peers: provider -> its call, with the same arguments and results.
        steps: solver and evaluations, such as ``euler:7``.
    """

    def exact() -> list[Tensor]:
        return results_of(partial(run, copy.deepcopy(module).double()), to_dtype(args, torch.float64))

    calls: dict[str, Callable[..., Any]] = {"torch": partial(run, module), **(peers or {})}
    calls["torch.compile"] = torch.compile(partial(run, module), dynamic=False)
    if point.on_gpu:
        calls["voxkern"] = LazyCall(ours)
    elif point.dtype != "fp32":  # fp32 weights are not packed
        calls["voxkern-packed"] = LazyCall(partial(use_packed_weights, run, module))
    return Trial(
        point.subject,
        point.shape,
        point.dtype,
        args,
        calls,
        calls["torch"],
        exact,
        complaint,
        rotates=False,
        steps=steps,
    )


def use_kernels(run: Callable[..., Any], module: nn.Module, max_batch: int) -> Callable[..., Any]:
    """Return the call of `run` on an accelerated copy of the module."""
    accelerated = copy.deepcopy(module)
    voxkern.accelerate(accelerated, max_batch)
    return partial(run, accelerated)


def use_packed_weights(run: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """Return the call of `run` on a copy of the module with packed weights."""
    packed = copy.deepcopy(module)
    pack(packed)
    return partial(run, packed)


def demo(dtype: str, device: str) -> VoxtralTTS:
    """Return the demo voice's model."""
    return read_checkpoint(DEMO, FLOATS[dtype], device).model.requires_grad_(False)


def demo_head(dtype: str, device: str) -> FlowHead:
    """Return the demo voice's flow head."""
    return demo(dtype, device).acoustic_transformer


def public_head(dtype: str, device: str) -> FlowHead:
    """Return a flow head of the public sizes with random weights; for "int8" and "fp8", large weights have 8 bits."""
    config = Config.from_params(public_params())
    plain = "bf16" if dtype in FORMATS else dtype
    head: FlowHead = filled(lambda: make_head(config.acoustic_transformer, config.audio), plain, device)
    if dtype in FORMATS:
        quantize_linears(head, quantizable(head), FORMATS[dtype])
    return head


@lru_cache(maxsize=1)
def public_model(dtype: str, device: str) -> VoxtralTTS:
    """Return a whole model of the public sizes with random weights; the last one is kept for other batch sizes."""
    config = Config.from_params(public_params())
    model: VoxtralTTS = filled(lambda: VoxtralTTS(config), dtype, device)
    return model


def public_layer(dtype: str, device: str) -> Backbone:
    """Return a backbone of the public sizes with one layer, a vocabulary of 64 and random weights."""
    config = Config.from_params(public_params() | {"n_layers": 1, "vocab_size": 64})
    backbone: Backbone = filled(lambda: Backbone(config.backbone, config.audio), dtype, device)
    return backbone


def filled(make: Callable[[], nn.Module], dtype: str, device: str) -> Any:
    """Return the module that `make` makes, with random weights that keep the magnitude of activations."""
    with torch.device("meta"):
        module = make()
    generator = torch.Generator(device).manual_seed(0)
    state = {name: random_tensor(name, t.shape, generator).to(FLOATS[dtype]) for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Return random normal numbers in fp32 of this shape. Equal seeds give equal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head_args(head: FlowHead, B: int) -> dict[str, Tensor]:
    """Return a flow head's arguments for `B` requests: hidden states of RMS 1, guidance of 1.2, and noise."""
    weight = head.input_projection.weight
    return {
        "h": numbers(B, head.config.input_dim).to(weight),
        "cfg_alpha": torch.full((B,), 1.2, device=weight.device),
        "noise": numbers(B, head.audio.n_acoustic_codebook, seed=2).to(weight.device),
    }


def head_trial(
    point: BenchPoint, make: Callable[[str, str], FlowHead], B: int, params: Callable[[], dict[str, Any]]
) -> Trial:
    """Return a trial of a flow head, which turns hidden states into a frame of codes.

    Args:
        point: subject, shape, dtype and device of the trial.
        make: function of a dtype and a device that returns the head.
        B: number of requests.
        params: returns the contents of the ``params.json`` from which the public server builds the same head.
    """
    head = make(point.dtype, point.device)
    lacks_peer = point.dtype in FORMATS or "vllm-omni" in missing(point.device)
    peers = {} if lacks_peer else {"vllm-omni": LazyCall(lambda: server_head(head, params()))}

    def run(head: FlowHead, h: Tensor, cfg_alpha: Tensor, noise: Tensor) -> Tensor:
        return head(h, cfg_alpha, noise, STEPS)  # type: ignore[no-any-return]

    ours = partial(use_kernels, run, head, B)
    trial = trial_of(point, head, run, head_args(head, B), by_codes, ours, peers, f"euler:{STEPS}")
    # vLLM-Omni keeps the flow's state in bf16. Therefore 3 of the demo voice's 36 codes in a frame differ. With
    # other weights, some codes differ by several levels.
    return replace(trial, of_peers={"vllm-omni": partial(by_codes, slack=0.1)})


def server_head(head: FlowHead, params: dict[str, Any]) -> Callable[..., Tensor]:
    """Return the call of vLLM-Omni's own module on the same weights. The module uses our noise and draws none."""
    server = import_module("vllm_omni.model_executor.models.voxtral_tts.voxtral_tts_audio_generation")
    args = copy.deepcopy(params["multimodal"]["audio_model_args"])
    args["acoustic_transformer_args"]["n_decoding_steps"] = STEPS
    theirs = server.FlowMatchingAudioTransformer(args).eval()
    theirs.load_state_dict(head.state_dict(), assign=True, strict=False)
    # this moves the table of times; the weights are on the device already
    theirs.to(head.semantic_codebook_output.weight.device)

    def run(h: Tensor, cfg_alpha: Tensor, noise: Tensor) -> Tensor:
        with mock.patch.object(torch, "randn", return_value=noise.to(h.dtype)):
            return theirs(h, cfg_alpha)  # type: ignore[no-any-return]

    return run


def cache_args(backbone: Backbone, B: int) -> dict[str, Tensor]:
    """Return a KV cache of :data:`CONTEXT` tokens for each request. A step writes the last of these tokens.

    The entries are `kv` [layers, pages, 2, n_kv_heads, PAGE, head_dim], `block_table` int32 [B, pages of a request] and
    `lengths` int32 [B].
    """
    config, weight = backbone.backbone_config, backbone.norm.weight
    pages = -(-CONTEXT // PAGE)
    return {
        "kv": numbers(config.n_layers, B * pages, 2, config.n_kv_heads, PAGE, config.head_dim).to(weight),
        "block_table": torch.arange(B * pages, dtype=torch.int32, device=weight.device).view(B, pages),
        "lengths": torch.full((B,), CONTEXT, dtype=torch.int32, device=weight.device),
    }


def step(backbone: Backbone, u: Tensor, kv: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Run one token of each request, u [B, dim], through all layers, and return the hidden states [B, dim]."""
    return backbone.hidden_states(u.unsqueeze(1), PagedCache(kv, block_table, lengths))[:, 0]


def backbone_trial(point: BenchPoint, make: Callable[[str, str], Backbone], B: int) -> Trial:
    """Return a trial of a backbone's step: one token of each of `B` requests."""
    backbone = make(point.dtype, point.device)
    args = {"u": numbers(B, backbone.backbone_config.dim).to(backbone.norm.weight)} | cache_args(backbone, B)
    return trial_of(point, backbone, step, args, by_distance, partial(use_kernels, step, backbone, B))


class CodecFrame:
    """Decodes one frame of codes of `B` requests to sound.

    Every call restarts the streams, so the same codes give the same sound.
    """

    def __init__(self, B: int) -> None:
        self.B, self.streams = B, dict[int, Any]()

    def __call__(self, codec: AudioTokenizer, codes: Tensor) -> Tensor:
        """Decode codes, int64 [B, 37] without the offset, to samples [B, 1, 1920].

        A stream is made once for each codec, because making it folds weights.
        """
        if id(codec) not in self.streams:
            self.streams[id(codec)] = codec.stream(self.B)
        stream = self.streams[id(codec)]
        stream.restart(torch.ones(self.B, dtype=torch.bool, device=codes.device))
        return stream.decode(codes.unsqueeze(2))  # type: ignore[no-any-return]


def codec_trial(point: BenchPoint, B: int) -> Trial:
    """Return a trial of the demo voice's codec: a frame of codes of `B` requests to sound."""
    codec, sound = demo(point.dtype, point.device).audio_tokenizer, CodecFrame(B)
    codes = random_codes(B).to(point.device)
    return trial_of(point, codec, sound, {"codes": codes}, by_distance, partial(use_kernels, sound, codec, B))


def frame_trial(point: BenchPoint, make: Callable[[str, str], VoxtralTTS], B: int) -> Trial:
    """Return a trial of a whole frame of `B` requests: codes, their sound, and the next hidden states.

    Sound and hidden states are computed from given codes, not from the codes of the frame. If rounding flipped one of
    the frame's codes, sound and hidden states could not be compared with fp64's.
    """
    model, sound = make(point.dtype, point.device), CodecFrame(B)
    args = head_args(model.acoustic_transformer, B) | cache_args(model, B)
    args["given"] = random_codes(B).to(point.device) + N_SPECIAL_CODES

    def run(
        model: VoxtralTTS, h: Tensor, cfg_alpha: Tensor, noise: Tensor, given: Tensor, **cache: Tensor
    ) -> list[Tensor]:
        codes = model.acoustic_transformer(h, cfg_alpha, noise, STEPS)
        wave = sound(model.audio_tokenizer, given - N_SPECIAL_CODES)
        return [codes, wave, step(model, model.embed_codes(given), **cache)]

    ours = partial(use_kernels, run, model, B)
    trial = trial_of(point, model, run, args, by_frame, ours, steps=f"euler:{STEPS}")
    if "voxkern" not in trial.variants:
        return trial
    kernels = trial.variants["voxkern"]

    def overlapping(**args: Tensor) -> list[Tensor]:
        with overlapped():
            found: list[Tensor] = kernels(**args)
            return found

    return replace(trial, variants={**trial.variants, "voxkern-overlap": overlapping})


def random_codes(B: int) -> Tensor:
    """Return random codes in 0..20 without the offset, int64 [B, 37]."""
    return torch.randint(21, (B, 37), generator=torch.Generator().manual_seed(3))


# (dim, hidden_dim, experts). Mistral Small 4's layer is 4096 wide. A token uses 4 of 128 experts, and a shared expert;
# each has 2048 hidden columns. Here the layer has 16 experts, which fit into a desktop GPU's memory. On a CPU, both
# widths are also a quarter of the model's.
SMALL_4, SMALL_4_CPU = (4096, 2048, 16), (1024, 512, 16)


def moe_trial(point: BenchPoint, sizes: tuple[int, int, int], B: int) -> Trial:
    """Return a trial of a mixture of experts with its norm and residual.

    The block in Hugging Face's transformers has no norm and no residual. Our norm and residual are added to its call.

    Args:
        point: subject, shape, dtype and device of the trial.
        sizes: dim, hidden_dim of an expert, number of experts.
        B: number of rows.
    """
    dim, hidden, n_experts = sizes
    moe = MoEConfig(n_experts, 4, hidden, 1)
    layer = filled(lambda: MoEBlock(dim, moe, 2, 1, 8, 1e-5), point.dtype, point.device)
    absent = missing(point.device)
    peers = {} if "transformers" in absent else {"transformers": LazyCall(lambda: transformers_block(layer, moe, dim))}
    args = {"x": numbers(B, dim).to(layer.gate.weight)}

    def run(layer: MoEBlock, x: Tensor) -> Tensor:
        packed = isinstance(layer.shared_experts.w1, PackedLinear)
        u = upcast(x) if packed else x  # a backbone with packed weights has fp32 activations
        return (u + layer.mixture(layer.ffn_norm(u).unsqueeze(1))[:, 0]).to(x.dtype)

    return trial_of(point, layer, run, args, by_distance, lambda: fused_moe(layer, B), peers)


def fused_moe(layer: Any, B: int) -> Callable[..., Tensor]:
    """Return the call that runs the layer on kernels.

    :class:`FusedMoE` is used directly: ``accelerate()`` installs it only inside a fused backbone.
    """
    from voxkern.fused.moe import FusedMoE

    fused = FusedMoE(layer, B)

    def run(x: Tensor) -> Tensor:
        fused.run(stream := x.clone())
        return stream

    return run


def transformers_block(layer: Any, moe: MoEConfig, dim: int) -> Callable[..., Tensor]:
    """Return the call of Hugging Face's Mistral 4 mixture, with our norm before it and our residual after it.

    The weights are the layer's, in the layout of Hugging Face's module.
    """
    models = import_module("transformers.models.mistral4.modeling_mistral4")
    weight = layer.gate.weight
    config = models.Mistral4Config(
        hidden_size=dim, moe_intermediate_size=moe.expert_hidden_dim, n_routed_experts=moe.num_experts,
        num_local_experts=moe.num_experts, num_experts_per_tok=moe.num_experts_per_tok, n_group=1, topk_group=1,
        n_shared_experts=moe.num_shared_experts, routed_scaling_factor=1.0, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"  # the implementation that from_pretrained() chooses
    theirs = models.Mistral4MoE(config).to(weight).requires_grad_(False)
    experts, shared = layer.experts, layer.shared_experts
    for target, tensors in (
        (theirs.gate.weight, weight),
        (theirs.experts.gate_up_proj, torch.stack([torch.cat((e.w1.weight, e.w3.weight)) for e in experts])),
        (theirs.experts.down_proj, torch.stack([e.w2.weight for e in experts])),
        (theirs.shared_experts.gate_proj.weight, shared.w1.weight),
        (theirs.shared_experts.up_proj.weight, shared.w3.weight),
        (theirs.shared_experts.down_proj.weight, shared.w2.weight),
    ):
        target.copy_(tensors)
    return lambda x: x + theirs(layer.ffn_norm(x).unsqueeze(1))[:, 0]


def modules(device: str) -> list[ModuleBench]:
    """Return all modules to time on `device`. On a CPU the mixture of experts is smaller.

    Whole frames of the public model are included on a GPU of more than 60 GB.
    """
    small_4 = SMALL_4 if device.startswith("cuda") else SMALL_4_CPU
    mixture, found = "x".join(map(str, small_4)), list[ModuleBench]()
    for B in (1, 8):
        found += [
            ModuleBench("frame", f"demo-b{B}", partial(frame_trial, make=demo, B=B)),
            ModuleBench("flow_head", f"demo-b{B}", partial(head_trial, make=demo_head, B=B, params=demo_params)),
            ModuleBench("backbone", f"demo-b{B}", partial(backbone_trial, make=demo, B=B)),
            ModuleBench("codec_chunk", f"demo-b{B}", partial(codec_trial, B=B)),
            ModuleBench("moe_block", f"{mixture}-b{B}", partial(moe_trial, sizes=small_4, B=B), ("bf16",)),
        ]
    if device.startswith("cuda") and torch.cuda.get_device_properties(device).total_memory > PUBLIC_MODEL_BYTES:
        found += [  # bench/static/roofline.py finds measured frames by these names, and compares them with predictions
            ModuleBench("frame", f"frame-b{B}", partial(frame_trial, make=public_model, B=B), ("bf16",), large=True)
            for B in (1, 8, 32)
        ]
    for B in (1, 4, 16):
        public = partial(head_trial, make=public_head, B=B, params=public_params)
        dtypes = ("bf16", *FORMATS) if B == 1 else ("bf16",)
        found.append(ModuleBench("flow_head", f"public-b{B}", public, dtypes, large=True))
    layer = partial(backbone_trial, make=public_layer, B=1)
    return [*found, ModuleBench("backbone", "public-layer-b1", layer, ("bf16",), large=True)]


def demo_params() -> dict[str, Any]:
    """Return the demo voice's ``params.json``."""
    return read_params(DEMO)
