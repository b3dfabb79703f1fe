"""The providers to time: voxkern's kernels, plain PyTorch, torch.compile, and installed public implementations.

A :class:`Trial` is one operator or module, at one shape in one dtype, with the calls of all its providers. A provider's
results are compared with fp64 before the provider is timed. A wrong provider is reported and not timed. The
providers that need a GPU have not been run on a GPU.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.ops.accuracy import CEILINGS, judge
from bench.ops.registry import DTYPES, Case, Entry, TensorMaker, each_tensor, listed, to_dtype
from bench.static.traffic import fewest_bytes
from voxkern.validation import can_overlap

# provider -> (packages that the provider needs, whether it needs a GPU)
PROVIDERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "voxkern": (("triton",), True),
    "voxkern-overlap": (("triton",), True),  # with launches that overlap; whole frames only
    "voxkern-packed": ((), False),  # with packed weights; modules only, on a CPU
    "torch": ((), False),
    "torch.compile": ((), False),
    "vllm-omni": (("vllm", "vllm_omni"), False),
    "transformers": (("transformers",), False),
    "flashinfer": (("flashinfer",), True),
}
Results = list[Tensor]
Check = Callable[[Results, Results, Results], str]


def missing(device: str) -> dict[str, str]:
    """Return provider -> what is missing, such as "no GPU", for the providers that cannot run on `device` here."""
    found = {}
    for name, (packages, gpu) in PROVIDERS.items():
        lacks = [f"no {package}" for package in packages if importlib.util.find_spec(package) is None]
        lacks += ["no GPU"] if gpu and not device.startswith("cuda") else []
        if name == "voxkern-overlap" and not lacks and not can_overlap(torch.device(device)):
            lacks = ["no GPU of compute capability 9.0 or newer"]
        if name == "voxkern-packed" and device.startswith("cuda"):
            lacks = ["packed weights are for a CPU"]
        if lacks:
            found[name] = ", ".join(lacks)
    return found


class LazyCall:
    """A provider's call, built by `make` at the first use.

    An error in `make` is then reported for this provider, and does not prevent the timing of others.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = make

    @cached_property
    def _call(self) -> Callable[..., Any]:
        return self._make()

    def __call__(self, **args: Any) -> Any:
        """Run the provider's call, after building it if this is the first use."""
        return self._call(**args)


@dataclass(frozen=True)
class Trial:
    """An operator or module to time, at one shape in one dtype, with the calls of its providers.

    Attributes:
        subject: name of the operator or module.
        shape: name of the case.
        dtype: bf16, fp16 or fp32.
        args: the arguments by name. A call may write to them in place.
        variants: provider -> its call, which takes `args` as keywords.
        reference: plain PyTorch's call. It checks the results even if plain PyTorch is not timed.
        exact: computes the fp64 results.
        complaint: (results, plain PyTorch's results, fp64 results) -> a message if the results are wrong, else "".
        nbytes: the fewest bytes that a call moves; 0 if they were not counted.
        mutates: names of the arguments that a call writes to, which are results too.
        rotates: whether `args` hold all data that a call reads, weights included. Calls on different copies of `args`
            then use different memory.
        steps: solver and evaluations of the velocity, such as ``euler:7``.
        of_peers: provider -> its own `complaint`, for providers that compute with less precision.
    """

    subject: str
    shape: str
    dtype: str
    args: Mapping[str, Any]
    variants: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    exact: Callable[[], Results]
    complaint: Check
    nbytes: int = 0
    mutates: tuple[str, ...] = ()
    rotates: bool = True
    steps: str = ""
    of_peers: Mapping[str, Check] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Subject, shape, dtype and steps, for messages."""
        return " ".join(filter(None, (self.subject, self.shape, self.dtype, self.steps)))

    def only(self, providers: Sequence[str]) -> "Trial":
        """Return this trial without the providers that are not named in `providers`."""
        return replace(self, variants={name: call for name, call in self.variants.items() if name in providers})

    def results(self, call: Callable[..., Any]) -> Results:
        """Run a call on a new copy of the arguments, and return its results, then the arguments that it writes to."""
        return results_of(call, self.copies(1)[0], self.mutates)

    def copies(self, n: int) -> list[dict[str, Any]]:
        """Return `n` copies of the arguments."""
        return [each_tensor(Tensor.clone, self.args) for _ in range(n)]

    @property
    def held(self) -> int:
        """Bytes of all tensors among the arguments."""
        tensors = [arg for arg in (*self.args.values(), *listed(self.args)) if isinstance(arg, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def truth(self) -> tuple[Results, Results]:
        """Plain PyTorch's results and the fp64 results, with which the results of every provider are compared."""
        return self.results(self.reference), self.exact()

    def fault(self, provider: str) -> str:
        """Run a provider, and return a message if it raises or its results are wrong, else an empty string."""
        plain, exact = self.truth
        try:
            found = plain if provider == "torch" else self.results(self.variants[provider])
        except Exception as error:  # any error of one provider must leave the others to be timed
            return f"{provider} fails at {self.name}: {type(error).__name__}: {error}"
        what = self.of_peers.get(provider, self.complaint)(found, plain, exact)
        return f"{provider} is wrong at {self.name}: {what}" if what else ""


def results_of(call: Callable[..., Any], args: Mapping[str, Any], mutates: Sequence[str] = ()) -> Results:
    """Call `call` with `args`, and return the tensors that it returns, then the arguments that it writes to."""
    returned = call(**args)
    returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return [*returned, *(args[name] for name in mutates)]


def operator_trial(entry: Entry, case: Case, dtype: str, device: str) -> Trial:
    """Return the trial of an operator at one of its shapes."""
    args = entry.args(case, TensorMaker.of(dtype, device))
    variants = {"torch": entry.reference, "torch.compile": torch.compile(entry.reference, dynamic=False)}
    if device.startswith("cuda"):
        variants["voxkern"] = entry.op.run
    if entry.name == "paged_attention" and "flashinfer" not in missing(device):
        variants["flashinfer"] = LazyCall(partial(flashinfer_attention, args))
    return Trial(
        entry.name, case.name, dtype, args, variants, entry.reference,
        exact=lambda: results_of(entry.reference, to_dtype(args, torch.float64), entry.op.mutates),
        complaint=partial(by_verdict, CEILINGS[DTYPES[dtype]]),
        nbytes=fewest_bytes(entry, args), mutates=entry.op.mutates,
    )  # fmt: skip


def by_verdict(ceiling: float, found: Results, plain: Results, exact: Results) -> str:
    """Check results by the accuracy rule of kernels (``bench/ops/accuracy.py``). Integers must equal plain PyTorch's.

    `ceiling` is the ceiling of the arguments' dtype. Some results are fp32 for arguments of any dtype. For these, plain
    PyTorch has rounded intermediate results, and would not pass the fp32 ceiling. The tests check such results of
    kernels against the fp32 ceiling.

    Returns:
        A message if a result is wrong, else an empty string.
    """
    for i, (out, same_dtype, truth) in enumerate(zip(found, plain, exact, strict=True)):
        if not out.dtype.is_floating_point:
            if not torch.equal(out, same_dtype):
                return f"result {i}: {int((out != same_dtype).sum())} of {out.numel()} integers differ"
        else:
            verdict = replace(judge(out, same_dtype, truth), ceiling=ceiling)
            if not verdict.right:
                return f"result {i}: {verdict}"
    return ""


def by_distance(found: Results, plain: Results, exact: Results) -> str:
    """Check the results of a whole module, and return a message if one is wrong, else an empty string.

    The RMS error may be at most twice plain PyTorch's, which must be below 5 % of the truth's RMS.
    """
    for i, (out, same_dtype, truth) in enumerate(zip(found, plain, exact, strict=True)):
        rms = _rms(truth)
        ours, torchs = (_rms(one.double() - truth) / max(rms, 1e-30) for one in (out, same_dtype))
        if not ours <= 2 * torchs + 1e-6 or not torchs < 0.05:
            return f"result {i}: the RMS error is {ours:.3g} of the truth's RMS, plain torch's is {torchs:.3g}"
    return ""


def by_codes(found: Results, plain: Results, exact: Results, slack: float = 0.02) -> str:
    """Check codes [B, 37], and return a message if they are wrong, else an empty string.

    The mean distance of acoustic codes from fp64's, in levels, may be at most twice plain PyTorch's + `slack`. Plain
    PyTorch's must be below 0.5. A semantic code must be fp64's or plain PyTorch's.
    """
    (codes, *_), (same_dtype, *_), (truth, *_) = found, plain, exact
    semantic = (codes[:, 0] == truth[:, 0]) | (codes[:, 0] == same_dtype[:, 0])
    if not semantic.all():
        return f"{int((~semantic).sum())} of {len(codes)} semantic codes differ"
    ours, torchs = ((one[:, 1:] - truth[:, 1:]).abs().double().mean().item() for one in (codes, same_dtype))
    if not torchs < 0.5:
        return f"acoustic codes of plain torch are off by {torchs:.3f} levels in the mean"
    if ours > 2 * torchs + slack:
        return f"acoustic codes are off by {ours:.3f} levels in the mean where plain torch's are by {torchs:.3f}"
    return ""


def by_frame(found: Results, plain: Results, exact: Results) -> str:
    """Check a whole frame: its codes by :func:`by_codes`, and the results from given codes by :func:`by_distance`."""
    codes = by_codes(found[:1], plain[:1], exact[:1])
    return codes or by_distance(found[1:], plain[1:], exact[1:])


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def flashinfer_attention(args: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return the call of FlashInfer's paged decode on the same cache, which has the layout that FlashInfer calls HND.

    FlashInfer's plan is made before the call, and is therefore not timed.
    """
    flashinfer = importlib.import_module("flashinfer")
    q, kv_cache, block_table, lengths = (args[name] for name in ("q", "kv_cache", "block_table", "lengths"))
    HKV, PAGE, D = kv_cache.shape[2:]
    counts = (lengths + PAGE - 1) // PAGE
    indptr = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    indices = torch.cat([row[:n] for row, n in zip(block_table, counts.tolist(), strict=True)]).int()
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    last = (lengths - (counts - 1).clamp(min=0) * PAGE).int()
    wrapper.plan(indptr, indices, last, q.shape[1] // D, HKV, D, PAGE, q_data_type=q.dtype, kv_data_type=kv_cache.dtype)
    return lambda q, kv_cache, **_: wrapper.run(q.view(len(q), -1, D), kv_cache).flatten(1)
