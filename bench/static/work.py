"""The launches of a frame with their bytes and multiply-adds.

The fused modules run on tensors without memory, and the launchers that they call are replaced by a recorder. The
recorded launches are therefore exactly those that voxkern makes. Their bytes and multiply-adds are those that the
operators' entries state (``partly``, ``weights`` and ``multiply_adds`` in bench/ops/registry.py).
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import voxkern
from bench.ops.registry import Entry, entries
from bench.static.traffic import fewest
from voxkern.engine import fused_runner
from voxkern.engine.kv_cache import PAGE_SIZE, KVCache
from voxkern.fused import backbone as fused_backbone
from voxkern.fused import codec as fused_codec
from voxkern.fused import flow_head as fused_flow_head
from voxkern.fused import mlp_head as fused_mlp_head
from voxkern.fused import transformer_head as fused_transformer_head
from voxkern.kernels.launch_config import target_arch
from voxkern.random_checkpoint import public_params
from voxkern.reference import Config, VoxtralTTS
from voxkern.reference.backbone import Backbone
from voxkern.reference.codec import AudioTokenizer

CONTEXT = 400  # tokens before the frame: a voice of 150, a sentence, and about ten seconds of speech
CHUNK = 1  # frames that the codec decodes at once: the engine decodes each frame as soon as it is generated
# file that calls launchers -> part of the frame. voxkern/fused/moe.py is not included: the public model has no experts.
MODULES: dict[ModuleType, str] = {
    fused_backbone: "backbone", fused_flow_head: "flow head", fused_transformer_head: "flow head",
    fused_mlp_head: "flow head", fused_runner: "bookkeeping", fused_codec: "codec",
}  # fmt: skip
# operator -> its case in the ledger, without the last part ``bN``; other operators have the case ``bN``
CASES = {
    "linear": "down-", "token_attention_linear": "wo-", "token_attention": "middle-", "semantic_argmax": "frame-",
    "flow_start": "frame-", "flow_step": "frame-", "flow_finish": "frame-",
}  # fmt: skip
# Operator -> the argument with a row for each row of activations, or for each request. For other operators this is `x`,
# or the first tensor if there is no `x`.
ROWS = {
    "token_attention": "h_qkv", "semantic_argmax": "h", "paged_attention": "q", "update_decode_state": "codes",
    "token_attention_linear": "residual", "codec_dequantise": "codes", "codec_update_state": "new_frames",
    "codec_attention": "qkv",
}  # fmt: skip
# Operators in which tiles of rows share the weights. All operators with an argument `max_rows` also do.
SHARED_WEIGHTS = {
    "token_attention_linear", "semantic_argmax", "codec_conv", "moe_experts_up", "moe_experts_down",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """Launches of one kind in a frame.

    Attributes:
        operator: the operator's name in the ledger. For an operator that the ledger does not have, the predicted
            running time is limited by bandwidth and multiply-adds alone, not by the bytes that a block has in flight.
        case: the case's name in the ledger, without its last part ``bN``.
        launch: index of the launch among those of one call.
        times: number of launches.
        rows: rows of activations; requests, if `tiled` is false.
        prepared: the most rows that the launch is prepared for. This number selects the launch config.
        tiled: whether tiles of rows share the weights. Otherwise each request reads all weights.
        weights: bytes of weights that one launch reads.
        cache: bytes of keys and values that one launch reads.
        moved: bytes of activations that one launch reads and writes.
        multiply_adds: multiply-adds of one launch's products.
    """

    operator: str
    case: str = ""
    launch: int = 0
    times: float
    rows: int
    prepared: int
    tiled: bool = True
    weights: int = 0
    cache: int = 0
    moved: int = 0
    multiply_adds: int = 0

    @property
    def dram(self) -> int:
        """The fewest bytes that one launch can move, see bench/static/traffic.py."""
        return self.weights + self.cache + self.moved


def launches(work: Iterable[Work]) -> float:
    """Return the number of launches. A frame's share of a codec chunk may make it a fraction."""
    return sum(one.times for one in work)


def dram_bytes(work: Iterable[Work]) -> int:
    """Return the fewest bytes that the launches can move, summed over all launches."""
    return round(sum(one.times * one.dram for one in work))


def weight_bytes(work: Iterable[Work]) -> int:
    """Return the bytes of weights, summed over all launches."""
    return round(sum(one.times * one.weights for one in work))


def total_multiply_adds(work: Iterable[Work]) -> int:
    """Return the multiply-adds of all launches: of matrix products, and of attention over the cache."""
    return round(sum(one.times * one.multiply_adds for one in work))


@functools.cache
def entry_of(operator: str) -> Entry:
    """Return the registry's entry of an operator."""
    return next(entry for entry in entries() if entry.name == operator)


Record = Callable[..., None]  # takes the part of the frame, the operator's name, its launcher, and the arguments


@contextmanager
def intercepted(record: Record) -> Iterator[None]:
    """Within the ``with`` block, call `record` instead of each launcher that a file in MODULES calls."""
    with ExitStack() as stack:
        for module, part in MODULES.items():
            for name in [name for name in vars(module) if name.startswith("launch_")]:
                operator = name.removeprefix("launch_")
                replaced = functools.partial(record, part, operator, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, replaced))
        yield


def work_of(operator: str, args: Mapping[str, Any], part: str = "") -> list[Work]:
    """Return the launches of one call of an operator.

    Args:
        operator: the operator's name.
        args: the call's arguments by name, and its result as ``out``.
        part: the part of the frame. The codec calls an operator at several shapes, but CASES has one case per operator.
            In the codec, :attr:`Work.operator` is therefore ``codec NAME``, which the ledger does not have.
    """
    entry, name = entry_of(operator), f"codec {operator}" if part == "codec" else operator
    first = next(name for name, arg in args.items() if isinstance(arg, Tensor) and name != "out")
    rows = len(args[ROWS.get(operator, "x" if "x" in args else first)])
    if operator == "token_attention":
        rows //= 2  # a row for each branch of a request
    prepared = args.get("max_rows") or args.get("max_batch") or rows
    tokens = 6 if operator == "token_attention_linear" else 1  # three tokens, with and without the hidden state
    traffic = fewest(entry, args)
    work = Work(
        operator=name, case=CASES.get(operator, ""), times=1, rows=rows, prepared=tokens * prepared,
        tiled="max_rows" in args or operator in SHARED_WEIGHTS, weights=traffic.weights, cache=traffic.cache,
        moved=traffic.moved, multiply_adds=entry.multiply_adds(args),
    )  # fmt: skip
    if operator != "semantic_argmax":
        return [work]
    # the first launch finds the greatest logit of each tile of codes, and the second the greatest of all tiles
    return [work, replace(work, launch=1, tiled=False, weights=0, moved=8 * rows, multiply_adds=0)]


def recorded(run: Callable[[], object], context: float = 0) -> dict[str, list[Work]]:
    """Return a dict from each part of the frame to its launches in a call on fused modules.

    Equal launches are one Work with `times`.

    Args:
        run: the call. A first call, which may make tables, is not recorded.
        context: tokens of each request that attention reads.
    """
    found: dict[str, Counter[Work]] = {}

    def record(part: str, operator: str, launch: Callable[..., None], *args: Any) -> None:
        named = dict(inspect.signature(launch).bind(*args).arguments)
        works = work_of(operator, _with_one_token(named) if operator == "paged_attention" else named, part)
        if operator == "paged_attention":
            (one,) = works
            cache, products = int(one.cache * context), int(one.multiply_adds * context)
            works = [replace(one, cache=cache, multiply_adds=products)]
        found.setdefault(part, Counter()).update(works)

    with torch.inference_mode(), target_arch("sm_90"), intercepted(record):  # the size of scratch needs an architecture
        run()
        found.clear()
        run()
    return {part: [replace(one, times=n) for one, n in works.items()] for part, works in found.items()}


def _with_one_token(args: Mapping[str, Any]) -> dict[str, Any]:
    return {**args, "lengths": torch.ones(len(args["lengths"]), dtype=torch.int32, device="cpu")}


def decode_step(backbone: Backbone, B: int) -> Callable[[], object]:
    """Return a call that decodes one token of `B` requests, each with a page of its own, on the backbone's device."""
    config, fused = backbone.backbone_config, fused_backbone.FusedBackbone(backbone, B)
    like = backbone.norm.weight
    kv = like.new_zeros(config.n_layers, B, 2, config.n_kv_heads, PAGE_SIZE, config.head_dim)
    table = torch.arange(B, dtype=torch.int32, device=like.device).view(B, 1)
    lengths, u = like.new_ones(B, dtype=torch.int32), like.new_zeros(B, config.dim)
    return lambda: fused.decode(u, kv, table, lengths)


def backbone_step(backbone: Backbone, B: int, context: float) -> list[Work]:
    """Return the launches of one token of `B` requests through a backbone on the meta device."""
    return recorded(decode_step(backbone, B), context)["backbone"]


def codec_chunk(codec: AudioTokenizer, B: int, frames: int) -> list[Work]:
    """Return one frame's share of the launches that decode a chunk of `frames` frames of `B` requests."""
    stream = fused_codec.FusedCodec(codec)(B)
    device = stream.state.past_frames.device
    codes = torch.empty(B, 1 + codec.config.acoustic_dim, frames, dtype=torch.int64, device=device)
    new_frames = torch.empty(B, dtype=torch.int64, device=device)
    work = recorded(lambda: stream.chunk(codes, new_frames))["codec"]
    return [replace(one, times=one.times / frames) for one in work]


@functools.cache
def public() -> Config:
    """Return the public model's config."""
    return Config.from_params(public_params())


@functools.cache
def public_model() -> VoxtralTTS:
    """Return the public model in bf16, without memory."""
    with torch.device("meta"):
        return VoxtralTTS(public()).bfloat16().requires_grad_(False)


@functools.cache
def frame(B: int, steps: int, context: int = CONTEXT) -> dict[str, list[Work]]:
    """Return a dict from each part of the public model's frame to its launches.

    The parts are the backbone, the flow head, the bookkeeping and the codec.

    Args:
        B: number of requests, and max_batch.
        steps: number of evaluations of the velocity.
        context: number of tokens of each request before the frame.
    """
    model = public_model()
    voxkern.accelerate(model, B)
    with torch.device("meta"):
        kv_cache = KVCache(model.config.backbone, 2, torch.bfloat16, torch.device("meta"))
        batch = fused_runner.DecodeBatch(model, B, kv_cache, PAGE_SIZE, steps, "euler")
        parts = recorded(lambda: batch.launch(B), context)
        voxkern.restore(model)
        return parts | {"codec": codec_chunk(model.audio_tokenizer, B, CHUNK)}
