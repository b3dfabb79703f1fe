"""Compare the public server's flow head with ours: launches and DRAM bytes of a frame, at the public shapes.

``python -m bench server_cost`` needs vLLM-Omni to count the server's head; docs/serving.md explains how to install it.
Without it, the command prints what is missing, and the counts of our kernels and of our plain PyTorch module.

Kernels are counted by the formulas of their entries (bench/static/work.py). PyTorch modules run on zeros on the CPU,
and every operator counts as one launch, except views and allocations. These are lower bounds, because one operator may
start several kernels. One and two requests are run, and the cost of more follows by arithmetic.

An operator's bytes are those of its distinct input and output tensors, each read or written once. The kernels are
counted by the same rule. On both sides, small tensors may stay in a GPU's L2 cache.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.command_line import parser_of
from bench.results import ResultRow
from bench.static.work import dram_bytes, frame, launches, public, weight_bytes
from voxkern.integrations.server_heads import CAPTURED_METHOD
from voxkern.random_checkpoint import public_params
from voxkern.reference.config import AcousticTransformerConfig
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

BATCHES, STEPS = (1, 32), 7
COMMAND = "python -m bench server_cost"
SERVER_PACKAGE = "vllm_omni.model_executor.models.voxtral_tts"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Cost:
    """The cost of a frame.

    Attributes:
        launches: kernels launched.
        dram: bytes from and to DRAM, weights included.
        weights: bytes of weights.
    """

    launches: int
    dram: int
    weights: int


class Counter(TorchDispatchMode):
    """Adds up the launches, the bytes and the bytes of weights of the operators within the ``with`` block.

    The argument `weights` is the set of the addresses of the weights' storages.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.storages, self.launches, self.dram, self.weights = weights, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            # keyed by address, shape and strides, so that a tensor updated in place counts once
            for tensor in {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}.values():
                self.dram += distinct_bytes(tensor)
                if tensor.untyped_storage().data_ptr() in self.storages:
                    self.weights += distinct_bytes(tensor)
        return out


def distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements at distinct addresses. An expanded dimension counts as one element."""
    n = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


@torch.no_grad()
def counted(call: Callable[[], object], module: nn.Module) -> Cost:
    """Count the cost of a call, after a first call that fills the module's caches.

    The call does not run in inference mode, which would dispatch a cast as ``aten.to``. This operator is marked as a
    view even if it copies.

    Args:
        call: the call to count.
        module: the module with the weights.
    """
    call()
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with Counter(storages) as counter:
        call()
    return Cost(counter.launches, counter.dram, counter.weights)


def of_batch(B: int, one: Cost, two: Cost) -> Cost:
    """Return the cost of `B` requests, extrapolated from the costs of one and of two.

    Bytes of weights stay the same, and each further request adds the same bytes of activations.

    Raises:
        ValueError: one and two requests differ in launches or weights, so that `B` cannot be extrapolated from them.
    """
    if (one.launches, one.weights) != (two.launches, two.weights):
        raise ValueError(f"one request costs {one} and two cost {two}: they take different paths")
    return Cost(one.launches, one.dram + (B - 1) * (two.dram - one.dram), one.weights)


def kernels(B: int) -> Cost:
    """Return the cost of our flow head's frame of `B` requests on kernels."""
    work = frame(B, STEPS)["flow head"]
    return Cost(round(launches(work)), dram_bytes(work), weight_bytes(work))


def plain(module: FlowMatchingAudioTransformer, B: int) -> Cost:
    """Count our flow head's frame of `B` requests in plain PyTorch; `module` must be in bf16."""
    h, alpha, noise = _inputs(module.config.input_dim, module.audio.n_acoustic_codebook, B)
    return counted(lambda: module(h, alpha, noise, STEPS), module)


def server(B: int) -> dict[str, Cost]:
    """Count a frame of `B` requests of vLLM-Omni's flow head, called eagerly and as it is captured in CUDA graphs.

    Returns:
        "eager" and "captured" -> cost.

    Raises:
        ImportError: vLLM-Omni or one of its requirements is missing.
    """
    generation = import_module(f"{SERVER_PACKAGE}.voxtral_tts_audio_generation")
    wrapper_class = import_module(f"{SERVER_PACKAGE}.voxtral_tts").CUDAGraphAcousticTransformerWrapper
    args = copy.deepcopy(public_params()["multimodal"]["audio_model_args"])
    args["acoustic_transformer_args"]["n_decoding_steps"] = STEPS
    head = zeroed(generation.FlowMatchingAudioTransformer(args).bfloat16())
    wrapper = wrapper_class(SimpleNamespace(acoustic_transformer=head), [B])
    dim = args["acoustic_transformer_args"]["input_dim"]
    # The wrapper runs its warm-up on the CPU as on a GPU. Only the capture is skipped, because it needs a GPU.
    with (
        mock.patch.object(torch.accelerator, "synchronize"),
        mock.patch.object(wrapper_class, "_capture_graph_for_size"),
    ):
        wrapper._warmup_and_capture(torch.device("cpu"), torch.bfloat16, dim)
    h, alpha, noise = (t.bfloat16() for t in _inputs(dim, args["n_acoustic_codebook"], B))
    return {
        "eager": counted(lambda: head(h, alpha), head),
        "captured": counted(lambda: getattr(wrapper, CAPTURED_METHOD)(h, alpha.unsqueeze(1), noise), head),
    }


def missing() -> str | None:
    """Return why the server's module cannot be imported, or None if it can."""
    try:
        for name in ("voxtral_tts_audio_generation", "voxtral_tts"):
            import_module(f"{SERVER_PACKAGE}.{name}")
    except ImportError as error:
        return str(error)
    return None


def costs() -> Iterator[tuple[int, str, str, Cost]]:
    """Yield (batch, provider, path, cost) for all heads that can be counted here."""
    config, audio = public().acoustic_transformer, public().audio
    assert isinstance(config, AcousticTransformerConfig)
    with torch.device("meta"):
        module = FlowMatchingAudioTransformer(config, audio).bfloat16()
    module = zeroed(module.to_empty(device="cpu"))
    found = [{"plain PyTorch": plain(module, B)} for B in (1, 2)]
    theirs = [server(B) for B in (1, 2)] if missing() is None else []
    for B in BATCHES:
        yield B, "voxkern", "kernels", kernels(B)
        for provider, pair in (("torch", found), ("vllm-omni", theirs)):
            if pair:
                one, two = pair
                for path in one:
                    yield B, provider, path, of_batch(B, one[path], two[path])


def rows() -> list[ResultRow]:
    """Count all costs, and return rows of them. The heads run on the CPU for half a minute."""
    found = []
    for B, provider, path, cost in costs():
        counts = {"launches": (cost.launches, "1"), "bytes": (cost.dram, "B"), "bytes of weights": (cost.weights, "B")}
        for metric, (value, unit) in counts.items():
            row = ResultRow(
                "server_cost", f"flow head, {path}", metric, value, unit, "counted", COMMAND,
                provider=provider, shape=f"frame-b{B}", dtype="bf16", steps=f"euler:{STEPS}",
            )  # fmt: skip
            found.append(row)
    return found


def zeroed(module: ModuleT) -> ModuleT:
    """Set a module's parameters to zero, turn its gradients off, and return the module in eval mode."""
    for parameter in module.requires_grad_(False).parameters():
        nn.init.zeros_(parameter)
    return module.eval()


def _inputs(dim: int, K: int, B: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(B, dim, dtype=torch.bfloat16), torch.ones(B), torch.zeros(B, K)


def main(arguments: Sequence[str]) -> int:
    """Print one line for each batch, provider and path."""
    parser_of("server_cost", __doc__).parse_args(arguments)
    why = missing()
    print(f"The flow head's frame, public shapes, bf16, {STEPS} evaluations; counted, nothing was run on a GPU.")
    if why is not None:
        print(f"The public server's head is not counted: {why} (it needs vllm-omni, see docs/serving.md)")
    print("batch  provider   path           launches  GB from DRAM  of them weights")
    for B, provider, path, cost in costs():
        print(
            f"{B:5d}  {provider:9s}  {path:13s}  {cost.launches:8d}  {cost.dram / 1e9:12.3f}  "
            f"{cost.weights / 1e9:15.3f}",
            flush=True,
        )
    return 0
