"""The launches of a frame with their bytes and multiply-adds.

The fused modules run on tensors without memory, and the launchers that they call are replaced by a recorder. The
recorded launches are therefore exactly those that voxkern makes. Their bytes and multiply-adds are those that the
operators' entries state (``partly``, ``weights`` and ``multiply_adds`` in bench/ops/registry.py).
"""

import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

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
from voxkern.reference.model import model_without_memory
from voxkern.reference.quantized import FORMATS

CONTEXT = 400  # tokens before the frame: a voice of 150, a sentence, and about ten seconds of speech
CHUNK = 1  # frames that the codec decodes at once: the engine decodes each frame as soon as it is generated
# file that calls launchers -> part of the frame. voxkern/fused/moe.py is not included: the public model has no experts.
MODULES: dict[ModuleType, str] = {
    fused_backbone: "backbone", fused_flow_head: "flow head", fused_transformer_head: "flow head",
    fused_mlp_head: "flow head", fused_runner: "bookkeeping", fused_codec: "codec",
}  # fmt: skip
# Operator -> the argument with a row for each row of activations, or for each request. For other operators this is `x`,
# or the first tensor if there is no `x`.
ROWS = {
    "semantic_argmax": "h", "paged_attention": "q", "update_decode_state": "codes",
    "token_attention_linear": "residual", "codec_dequantise": "codes", "codec_update_state": "new_frames",
    "codec_attention": "qkv",
}  # fmt: skip
# operator -> the arguments that each column of tiles reads; other operators with tiles of columns read `x`
READ_BY_COLUMNS = {"token_attention_linear": ("qkv",), "semantic_argmax": ("h",)}


@dataclass(frozen=True)
class KernelLaunch:
    """A launch of a Triton kernel.

    Attributes:
        kernel: the kernel's name.
        grid: blocks along x, y and z.
        constants: (name, value) of the kernel's sizes and tiles, in the order of their names.
        warps: warps of a block.
        stages: stages of the software pipeline, or None if the launch does not say.
        format: the format of the weights, "int8" or "fp8", or None if they are not quantised.
    """

    kernel: str
    grid: tuple[int, int, int]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int | None
    format: str | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def column_tiles(self) -> int:
        """Number of tiles along the weights' rows."""
        return self.weight_tiles if self.constant("SHARES", 0) else self.grid[1]

    @property
    def weight_tiles(self) -> int:
        """Number of tiles of N rows of weights, and of N_KV rows of the keys' and of the values' weights."""
        tile, n_kv = self.constant("BLOCK_N"), self.constant("N_KV", 0)
        return -(-self.constant("N") // tile) + 2 * -(-n_kv // tile)

    @property
    def padded_rows(self) -> int:
        """Number of rows of activations, with those that pad the tiles of rows."""
        return self.grid[0] * self.constant("BLOCK_M", self.constant("BLOCK_B")) * self.constant("ROW_TILES")

    @property
    def pieces(self) -> tuple[int, int]:
        """The most tiles that one block works on, and the number of parts of tiles that all blocks store."""
        if not self.constant("SHARES", 0):
            return 1, 0
        steps, cost = -(-self.constant("K") // self.constant("BLOCK_K")), self.constant("KV_COST")
        most, parts = pieces_of_shares(self.grid[1], self.column_tiles, steps, self._cheap_tiles, cost)
        return most, self.grid[0] * parts

    @property
    def step_imbalance(self) -> float:
        """Steps of a block that has only steps that cost 1, divided by the mean number of steps of a block."""
        tiles, cost = self.column_tiles, self.constant("KV_COST")
        return (tiles + (tiles - self._cheap_tiles) * (cost - 1)) / tiles

    @property
    def multiply_adds_factor(self) -> float:
        """The most multiply-adds of a block, divided by the mean of a block if each step has the rows of all tokens."""
        cost = self.constant("KV_COST")
        if cost == 1:
            return 1.0
        # The most are in a block with only steps of queries, or in one with only steps of keys or values. The second
        # has 1 / KV_COST as many steps.
        return self.step_imbalance * max(self.constant("N_TOKENS") / self.constant("ROW_TILES"), 1 / cost)

    @property
    def _cheap_tiles(self) -> int:
        """Number of tiles with steps that cost 1 where blocks share tiles, see kernels/shares.py."""
        return -(-self.constant("N") // self.constant("BLOCK_N"))

    def constant(self, name: str, missing: int = 1) -> int:
        """Return the constant `name`, or `missing` if the kernel has no such constant."""
        return dict(self.constants).get(name, missing)


@functools.cache
def pieces_of_shares(blocks: int, tiles: int, steps: int, cheap_tiles: int, cost: int) -> tuple[int, int]:
    """Return :attr:`KernelLaunch.pieces` for one tile of rows, `tiles` tiles of columns, and `steps` steps of each."""
    cheap_steps, most, parts = cheap_tiles * steps, 0, 0
    total_cost = tiles * steps + (tiles * steps - cheap_steps) * (cost - 1)
    before = [total_cost * i // blocks for i in range(blocks + 1)]  # the cost of all steps before each block's
    firsts = [one if one < cheap_steps else cheap_steps + (one - cheap_steps) // cost for one in before]
    for first, end in itertools.pairwise(firsts):
        mine = range(first // steps, -(-end // steps))
        most = max(most, len(mine))
        parts += sum(first > tile * steps or end < (tile + 1) * steps for tile in mine)
    return most, parts


@dataclass(frozen=True, kw_only=True)
class Work:
    """Launches of one kind in a frame.

    Attributes:
        operator: the operator's name; ``codec NAME`` in the codec.
        kernel: the kernel with its blocks and tiles, or None for work that is not one launch of a kernel.
        times: number of launches.
        rows: rows of activations, or requests.
        weights: bytes of weights that one launch reads.
        cache: bytes of keys and values that one launch reads.
        moved: bytes of activations that one launch reads and writes.
        columns_read: bytes of activations that each column of tiles reads.
        multiply_adds: multiply-adds of one launch's products.
        padded_multiply_adds: the most multiply-adds of a block, times the number of blocks. They include the rows that
            pad the tiles. Where blocks share tiles, every row counts as a row with queries, unless the kernel has
            KV_COST > 1.
    """

    operator: str
    kernel: KernelLaunch | None = None
    times: float
    rows: int
    weights: int = 0
    cache: int = 0
    moved: int = 0
    columns_read: int = 0
    multiply_adds: int = 0
    padded_multiply_adds: int = 0

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


signature = functools.cache(inspect.signature)  # a frame has hundreds of launches by some twenty launchers
Record = Callable[..., None]  # takes the part of the frame, the operator's name, its launcher, and the arguments


@contextmanager
def intercepted(record: Record) -> Iterator[None]:
    """Within the ``with`` block, call `record` instead of each launcher that a file in MODULES calls."""

    def call(part: str, operator: str, launch: Callable[..., None], *args: Any, **named: Any) -> None:
        bound = signature(launch).bind(*args, **named)
        bound.apply_defaults()
        record(part, operator, launch, *bound.args)

    with ExitStack() as stack:
        for module, part in MODULES.items():
            for name in [name for name in vars(module) if name.startswith("launch_")]:
                operator = name.removeprefix("launch_")
                replaced = functools.partial(call, part, operator, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, replaced))
        yield


def kernels_of(launch: Callable[[], None]) -> list[KernelLaunch]:
    """Return the launches of kernels that a call makes. No kernel runs, so the tensors may be on the meta device."""
    found: list[KernelLaunch] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*_: Any, **named: Any) -> None:
            x, y, z = (*grid, 1, 1)[:3]
            constants = tuple(sorted((name, value) for name, value in named.items() if name.isupper()))
            found.append(
                KernelLaunch(kernel.__name__, (x, y, z), constants, named.get("num_warps", 4), named.get("num_stages"))
            )

        return run

    with mock.patch.object(KernelInterface, "__getitem__", record):
        launch()
    return found


def work_of(operator: str, args: Mapping[str, Any], part: str = "") -> Work:
    """Return the launch of one call of an operator.

    Args:
        operator: the operator's name.
        args: the call's arguments by name, and its result as ``out``.
        part: the part of the frame. In the codec, :attr:`Work.operator` is ``codec NAME``.
    """
    entry, name = entry_of(operator), f"codec {operator}" if part == "codec" else operator
    kernels = kernels_of(functools.partial(entry.op.launch, **args))
    kernel = replace(kernels[0], format=entry.format(args)) if len(kernels) == 1 else None
    first = next(name for name, arg in args.items() if isinstance(arg, Tensor) and name != "out")
    row_argument = ROWS.get(operator, "x" if "x" in args else first)
    traffic = fewest(entry, args)
    padded = entry.multiply_adds(_with_whole_tiles(args, row_argument, kernel) if kernel else args)
    columns_read = [args[name] for name in READ_BY_COLUMNS.get(operator, ("x",)) if name in args]
    return Work(
        operator=name, kernel=kernel, times=1, rows=len(args[row_argument]),
        weights=traffic.weights, cache=traffic.cache, moved=traffic.moved,
        columns_read=sum(tensor.numel() * tensor.element_size() for tensor in columns_read),
        multiply_adds=entry.multiply_adds(args),
        padded_multiply_adds=round(padded * (kernel.multiply_adds_factor if kernel else 1.0)),
    )  # fmt: skip


def _with_whole_tiles(args: Mapping[str, Any], row_argument: str, kernel: KernelLaunch) -> dict[str, Any]:
    """Return the arguments padded to whole tiles of rows. Where blocks share tiles, all rows get queries.

    With shares, blocks for rows without queries are idle in the steps of queries. Steps of other blocks are not moved
    to them, so the launch takes as long as if all rows had queries.
    """
    tile = kernel.constant("BLOCK_M", kernel.constant("BLOCK_B")) * kernel.constant("ROW_TILES")

    def rounded(n: int) -> int:
        return -(-n // tile) * tile

    rows = args[row_argument]
    padded = {**args, row_argument: rows.new_empty(rounded(len(rows)), *rows.shape[1:], device="meta")}
    if "n_tokens" in args:  # queries of all tokens; multiply_adds_factor removes those that a kernel does not compute
        return padded | {"n_tokens": 3}
    if "q_rows" in args:
        return padded | {"q_rows": rounded(len(rows) if kernel.constant("SHARES", 0) else args["q_rows"])}
    return padded


def recorded(
    run: Callable[[], object], context: float = 0, arch: str = "sm_90", multiprocessors: int = 132
) -> dict[str, list[Work]]:
    """Return a dict from each part of the frame to its launches in a call on fused modules.

    Equal launches are one Work with `times`.

    Args:
        run: the call. A first call, which may make tables, is not recorded.
        context: tokens of each request that attention reads.
        arch: the GPU's architecture, which determines the launch configs.
        multiprocessors: the GPU's number of multiprocessors, which determines the grids of launches with shares.
    """
    found: dict[str, Counter[Work]] = {}

    def record(part: str, operator: str, launch: Callable[..., None], *args: Any) -> None:
        named = dict(signature(launch).bind(*args).arguments)
        if operator == "paged_attention":
            one = _with_context(work_of(operator, _with_one_token(named), part), context)
        else:
            one = work_of(operator, named, part)
        found.setdefault(part, Counter())[one] += 1

    with torch.inference_mode(), target_arch(arch, multiprocessors):
        with intercepted(lambda *_: None):
            run()
        with intercepted(record):
            run()
    return {part: [replace(one, times=n) for one, n in works.items()] for part, works in found.items()}


def _with_context(one: Work, context: float) -> Work:
    """Return the attention of requests with `context` tokens, from that of requests with one token."""
    assert one.kernel is not None
    spans = math.ceil(context / one.kernel.constant("SPAN"))
    kernel, products = replace(one.kernel, grid=(spans, *one.kernel.grid[1:])), int(one.multiply_adds * context)
    return replace(
        one, kernel=kernel, cache=int(one.cache * context), multiply_adds=products, padded_multiply_adds=products
    )


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


def backbone_step(
    backbone: Backbone, B: int, context: float, arch: str = "sm_90", multiprocessors: int = 132
) -> list[Work]:
    """Return the launches of one token of `B` requests through a backbone on the meta device."""
    return recorded(decode_step(backbone, B), context, arch, multiprocessors)["backbone"]


def codec_chunk(
    codec: AudioTokenizer, B: int, frames: int, arch: str = "sm_90", multiprocessors: int = 132
) -> list[Work]:
    """Return one frame's share of the launches that decode a chunk of `frames` frames of `B` requests."""
    stream = fused_codec.FusedCodec(codec, B)(B)
    device = stream.state.past_frames.device
    codes = torch.empty(B, 1 + codec.config.acoustic_dim, frames, dtype=torch.int64, device=device)
    new_frames = torch.empty(B, dtype=torch.int64, device=device)
    work = recorded(lambda: stream.chunk(codes, new_frames), 0, arch, multiprocessors)["codec"]
    return [replace(one, times=one.times / frames) for one in work]


@functools.cache
def public() -> Config:
    """Return the public model's config."""
    return Config.from_params(public_params())


@functools.cache
def public_model(format_: str | None = None) -> VoxtralTTS:
    """Return the public model in bf16, without memory; with `format_`, its large weights are "int8" or "fp8"."""
    return model_without_memory(public(), torch.bfloat16, None if format_ is None else FORMATS[format_])


@functools.cache
def frame(
    B: int,
    steps: int,
    context: int = CONTEXT,
    arch: str = "sm_90",
    multiprocessors: int = 132,
    format_: str | None = None,
) -> dict[str, list[Work]]:
    """Return a dict from each part of the public model's frame to its launches.

    The parts are the backbone, the flow head, the bookkeeping and the codec.

    Args:
        B: number of requests, and max_batch.
        steps: number of evaluations of the velocity.
        context: number of tokens of each request before the frame.
        arch: the GPU's architecture, which determines the launch configs.
        multiprocessors: the GPU's number of multiprocessors, which determines the grids of launches with shares.
        format_: the format of the large weights, "int8" or "fp8", or None for bf16.
    """
    model = public_model(format_)
    voxkern.accelerate(model, B)
    with torch.device("meta"):
        kv_cache = KVCache(model.config.backbone, 2, torch.bfloat16, torch.device("meta"))
        batch = fused_runner.DecodeBatch(model, B, kv_cache, PAGE_SIZE, steps, "euler")
        parts = recorded(lambda: batch.launch(B), context, arch, multiprocessors)
        voxkern.restore(model)
        return parts | {"codec": codec_chunk(model.audio_tokenizer, B, CHUNK, arch, multiprocessors)}
