"""Count the launches, multiply-adds and bytes of a frame in the flow heads and the backbone, at the public shapes.

``python -m bench frame`` runs the fused modules' own code in Triton's interpreter, with the tiles of sm_90. Three
modules are counted: the public flow head, a layer of the public backbone, and a flow head with an MLP as its velocity
network, 1536 wide. If the blocks of a launch differ only in their addresses, only the first, second and last block
along each axis run. The results are therefore incomplete, and are not used. The fewest bytes that a launch
can move are counted too: each weight that it uses, and each activation that it reads or writes, once.
"""

import inspect
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # set before triton is imported, because the counters need the interpreter

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.command_line import parser_of
from bench.results import ResultRow
from bench.static.counters import counting
from bench.static.interpreter import speed_up
from bench.static.traffic import fewest
from bench.static.work import decode_step, entry_of, intercepted, kernels_of
from voxkern.fused.flow_head import FusedHead
from voxkern.fused.mlp_head import FusedMLPHead
from voxkern.fused.transformer_head import FusedTransformerHead
from voxkern.kernels import launch_config
from voxkern.kernels.norm_linear import launch_norm_linear
from voxkern.kernels.paged_attention import launch_paged_attention, paged_attention_scratch
from voxkern.random_checkpoint import public_params
from voxkern.reference import Config
from voxkern.reference.backbone import Backbone
from voxkern.reference.flow_head import FlowHead
from voxkern.reference.mlp_head import FlowMatchingAudioMLP
from voxkern.reference.model import make_head
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

STEPS = 7
LAYERS = 26
MAX_SEQ_LEN, PAGE = 4096, 64
# In a regular grid, blocks differ only in their addresses along each axis. These operators launch only such grids, once
# `parts` has split their launches where needed. In launches of all other operators, every block runs and is counted.
REGULAR_GRID = {
    "norm_linear", "norm_swiglu", "linear", "token_attention_linear", "semantic_argmax", "rms_norm", "adaln_modulation",
    "adaln_linear_silu",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of one call of a launcher, or of a frame.

    Attributes:
        launches: kernels launched.
        multiply_adds: multiply-adds of the matrix products.
        dram: DRAM bytes.
        fewest: the fewest DRAM bytes possible.
        scratch: the DRAM bytes of the launches' scratch memory: parts of tiles, and counters. `dram` includes them. A
            launch writes and reads these bytes, so they may stay in a GPU's L2 cache.
    """

    launches: int
    multiply_adds: int
    dram: int = 0
    fewest: int = 0
    scratch: int = 0


def frame_cost(
    head: FlowMatchingAudioTransformer | FlowMatchingAudioMLP,
    B: int,
    embeddings: torch.nn.Embedding,
    count_bytes: bool = True,
) -> Cost:
    """Return the cost of a head's frame of 7 steps for `B` requests, with `B` as max_batch.

    Args:
        head: the flow head, with a transformer or an MLP as its velocity network.
        B: number of requests.
        embeddings: embeddings of the codes, which are summed to the backbone's next input.
        count_bytes: count DRAM bytes too. If False, the head may be on the meta device.
    """
    calls: dict[str, list[Cost]] = defaultdict(list)
    is_mlp = isinstance(head, FlowMatchingAudioMLP)
    fused: FusedHead = (FusedMLPHead if is_mlp else FusedTransformerHead)(head, B, embeddings)
    weight = head.semantic_codebook_output.weight
    h = torch.zeros(B, head.config.input_dim, dtype=weight.dtype, device=weight.device)
    alpha = torch.ones(B, device=weight.device)
    seed, frame = (torch.zeros(B, dtype=torch.int64, device=weight.device) for _ in range(2))
    with torch.inference_mode(), launch_config.target_arch("sm_90"):
        with intercepted(lambda *args: None):
            fused.step_tables("euler", STEPS)  # made once, not in each frame, so these launches are not counted
        with counted(calls, count_bytes):
            fused.generate_codes(h, alpha, seed=seed, frame=frame, steps=STEPS)
    return total(cost for costs in calls.values() for cost in costs)


def backbone_cost(backbone: Backbone, B: int, count_bytes: bool = True) -> Cost:
    """Return the cost of one token of each of `B` requests through 26 layers, without the bytes of attention.

    Args:
        backbone: a backbone with one layer, which is counted 26 times.
        B: number of requests, and max_batch.
        count_bytes: count DRAM bytes too. If False, the backbone may be on the meta device.
    """
    calls: dict[str, list[Cost]] = defaultdict(list)
    with torch.inference_mode(), launch_config.target_arch("sm_90"), counted(calls, count_bytes):
        decode_step(backbone, B)()
    return total(cost for name, costs in calls.items() for cost in costs * (1 if name == "rms_norm" else LAYERS))


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    return Cost(*map(sum, zip(*map(astuple, costs), strict=True)))


@dataclass(frozen=True)
class CacheTraffic:
    """Bytes of one layer's attention over the cache of one request.

    Attributes:
        kv: DRAM bytes of keys and values.
        again: bytes of keys and values that blocks read again. With one block per query head, each key would be read
            four times.
        fewest: the fewest bytes of keys and values that can be read.
        parts: DRAM bytes of the partial results, which are written for each span of the context.
    """

    kv: int
    again: int
    fewest: int
    parts: int


def cache_traffic(context: int, dtype: torch.dtype = torch.bfloat16) -> CacheTraffic:
    """Count the bytes of one layer's attention over one request of `context` tokens, at the public shapes.

    The bytes of B such requests are B times these.
    """
    H, HKV, D, pages = 32, 8, 128, -(-context // PAGE)
    q, out = torch.zeros(1, H * D, dtype=dtype), torch.empty(1, H * D, dtype=dtype)
    kv_cache = torch.zeros(pages, 2, HKV, PAGE, D, dtype=dtype)
    block_table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(1, pages)
    lengths = torch.tensor([context], dtype=torch.int32)
    scratch = paged_attention_scratch(q, kv_cache, MAX_SEQ_LEN)
    with launch_config.target_arch("sm_90"), counting(whole=True) as launches:
        launch_paged_attention(out, q, kv_cache, block_table, lengths, 0, MAX_SEQ_LEN, scratch)
    traffic = launches[0].traffic()
    parts = traffic["p_partial"].dram if "p_partial" in traffic else 0
    cached = traffic["p_kv"]
    return CacheTraffic(cached.dram, cached.again, 2 * HKV * context * D * dtype.itemsize, parts)


@contextmanager
def counted(calls: dict[str, list[Cost]], count_bytes: bool) -> Iterator[None]:
    """Count the launchers that fused modules call within the ``with`` block, and append each call's cost to `calls`.

    Args:
        calls: the operator's name -> costs, in the order of the calls.
        count_bytes: count DRAM bytes too. Calls with the same form are counted once, as a frame's steps repeat them.
    """
    known: dict[object, tuple[int, int]] = {}

    def record(part: str, name: str, launch: Callable[..., None], *args: Any) -> None:
        named, entry = dict(inspect.signature(launch).bind(*args).arguments), entry_of(name)
        if name == "flow_finish" and count_bytes:
            # The semantic codes must be valid row numbers of the embeddings. Their launch did not write them, because
            # only a few of its blocks ran.
            named["semantic"].zero_()
        if name == "paged_attention":  # cache_traffic counts its bytes
            calls[name].append(Cost(1, 0))
            return
        dram = least = scratch = 0
        if count_bytes:
            if (form := _form(name, args)) not in known:
                counts = [_bytes(one, *some) for one, some in parts(name, launch, args)]
                known[form] = sum(dram for dram, _ in counts), sum(scratch for _, scratch in counts)
            dram, scratch = known[form]
            least = fewest(entry, named).total
        calls[name].append(Cost(1, entry.multiply_adds(named), dram, least, scratch))

    with intercepted(record):
        yield


def _form(name: str, args: tuple[Any, ...]) -> object:
    """Return what the bytes of a call depend on: shapes, numbers, and which arguments start at the same address."""
    leaves = tree_leaves(args)
    places = [leaf.data_ptr() if isinstance(leaf, Tensor) else None for leaf in leaves]
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return name, *shapes, *map(places.index, places)


def parts(name: str, launch: Callable[..., None], args: tuple[Any, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    """Split a launch on an irregular grid into launches on regular grids with the same bytes.

    A launch with shares is not split.

    The launch that computes q, k and v becomes three launches. The launch that computes the modulations becomes one
    launch for each layer. tests/test_frame.py checks that the bytes are the same.

    Args:
        name: the launcher's name without ``launch_``.
        launch: the launcher.
        args: the launcher's arguments.

    Returns:
        (name, (launcher, *arguments)) of each launch.
    """
    found: list[tuple[str, tuple[Any, ...]]] = []
    if any(kernel.constant("SHARES", 0) for kernel in kernels_of(lambda: launch(*args))):
        return [(name, (launch, *args))]  # all of its blocks are counted
    if name == "adaln_modulation":
        out, times, states, weights, biases, max_rows = args
        for weight, bias in zip(weights, biases, strict=True):
            result = out.new_empty(*out.shape[:2], len(weight))
            # the second weight is empty, because the kernel takes at least two weights
            alone = result, times, states, [weight, weight[:0]], [bias, bias[:0]], max_rows
            found.append((name, (launch, *alone)))
        return found
    if name not in ("norm_qkv", "norm_qkv_append"):
        return [(name, (launch, *args))]
    named = inspect.signature(launch).bind(*args).arguments
    x, norm, eps, max_rows = (named[key] for key in ("x", "norm", "eps", "max_rows"))
    q_rows = named.get("q_rows", len(x))
    for weight, rows in ((named["wq"], q_rows), (named["wk"], len(x)), (named["wv"], len(x))):
        result = x.new_empty(rows, len(weight))
        found.append(("norm_linear", (launch_norm_linear, result, x[:rows], norm, weight, eps, max_rows)))
    return found


def _bytes(name: str, launch: Callable[..., None], *args: Any) -> tuple[int, int]:
    """Return a launch's DRAM bytes, and those of its scratch memory."""
    lists = [tensor for arg in args if isinstance(arg, list) for tensor in arg]
    with counting(whole=name not in REGULAR_GRID, indirect=lists) as launches:
        launch(*args)
    dram = sum(traffic.dram for one in launches for traffic in one.traffic().values())
    return dram, sum(one.scratch() for one in launches)


def plain_multiply_adds(head: FlowHead, B: int) -> int:
    """Return the multiply-adds of a frame in a usual implementation of the head.

    In such an implementation, 6B rows (2B in the MLP) pass through the whole velocity network in every step.
    """
    if isinstance(head, FlowMatchingAudioMLP):
        step = sum(p.numel() for name, p in head.named_parameters() if name.startswith(("input", "res_", "final")))
        hidden = head.cond_embed.weight.numel()
        return STEPS * 2 * B * step + B * head.semantic_codebook_output.weight.numel() + 2 * B * hidden
    assert isinstance(head, FlowMatchingAudioTransformer)
    layer = sum(p.numel() for name, p in head.layers[0].named_parameters() if "norm" not in name)
    step = 6 * B * layer * len(head.layers)
    step += 2 * B * (head.input_projection.weight.numel() + head.acoustic_codebook_output.weight.numel())
    once = B * head.semantic_codebook_output.weight.numel() + 2 * B * head.llm_projection.weight.numel()
    return STEPS * step + once


def public_head(device: str = "cpu", velocity_mlp: bool = False) -> tuple[Any, torch.nn.Embedding]:
    """Return a flow head and the embeddings of codes at the public shapes, in bf16, all zeros.

    Args:
        device: the device of both. On "meta" their tensors have no memory.
        velocity_mlp: whether the head's velocity network is the MLP.
    """
    config = Config.from_params(public_params(velocity_mlp))
    with torch.device("meta"):
        head = make_head(config.acoustic_transformer, config.audio).bfloat16()
        embeddings = torch.nn.Embedding(config.audio.embedding_rows, config.backbone.dim).bfloat16()
    for module in (head, embeddings):
        if device != "meta":
            module.to_empty(device=device)
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
        module.requires_grad_(False)
    return head, embeddings


def public_backbone(device: str = "cpu") -> Backbone:
    """Return a backbone of the public shapes with one layer and a vocabulary of 64, in bf16, all zeros.

    On the device "meta" the backbone has no memory.
    """
    params = public_params() | {"n_layers": 1, "vocab_size": 64}
    config = Config.from_params(params)
    with torch.device("meta"):
        backbone = Backbone(config.backbone, config.audio).bfloat16()
    if device != "meta":
        backbone.to_empty(device=device)
        for parameter in backbone.parameters():
            torch.nn.init.zeros_(parameter)
    return backbone.requires_grad_(False)


def rows() -> list[ResultRow]:
    """Count all figures, print each when it is counted, and return the rows. Counting takes 12 minutes."""
    speed_up()
    found = []
    for velocity_mlp, B in itertools.product((False, True), (1, 32)):
        head, embeddings = public_head(velocity_mlp=velocity_mlp)
        cost, plain = frame_cost(head, B, embeddings), plain_multiply_adds(head, B)
        name = "flow head, residual MLP" if velocity_mlp else "flow head, transformer"
        found += _rows(name, f"frame-b{B}", cost, plain)
    backbone = public_backbone()
    for B in (1, 32):
        found += _rows("backbone", f"frame-b{B}", backbone_cost(backbone, B))
    for context in (64, 400, 1000, 4096):
        traffic, shape = cache_traffic(context), f"context {context}"
        found.append(_row("keys and values", shape, "bytes", LAYERS * traffic.kv, "B"))
        found.append(_row("keys and values", shape, "of the fewest bytes", traffic.kv / traffic.fewest, "1"))
        found.append(_row("keys and values", shape, "bytes of spans' parts", LAYERS * traffic.parts, "B"))
    return found


def _rows(subject: str, shape: str, cost: Cost, plain: int | None = None) -> list[ResultRow]:
    figures = {"launches": (cost.launches, "1"), "bytes": (cost.dram, "B")}
    figures |= {"of the fewest bytes": (cost.dram / cost.fewest, "1"), "multiply-adds": (cost.multiply_adds, "1")}
    if plain is not None:
        figures["of the usual multiply-adds"] = (cost.multiply_adds / plain, "1")
    return [_row(subject, shape, metric, value, unit) for metric, (value, unit) in figures.items()]


def _row(subject: str, shape: str, metric: str, value: float, unit: str) -> ResultRow:
    steps = f"euler:{STEPS}" if subject.startswith("flow") else ""
    print(f"{subject:24s} {shape:13s} {metric:26s} {value:.6g} {unit}", flush=True)
    return ResultRow(
        "frame", subject, metric, value, unit, "counted", "python -m bench frame", "voxkern", shape, "bf16", steps
    )


def main(arguments: Sequence[str]) -> int:
    """Print a line for each figure."""
    parser_of("frame", __doc__).parse_args(arguments)
    rows()
    return 0
