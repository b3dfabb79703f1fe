"""Checks that every operator must pass: test_operators.py runs them; test_faults.py tests that they catch faults."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton.language as tl
from poison import GuardedMemory, assert_bands, guarded, guarded_args, spread
from torch import Tensor
from triton.runtime import interpreter

from bench.ops.accuracy import judge
from bench.ops.registry import Case, Entry, TensorMaker, each_tensor, listed, to_dtype
from bench.static.counters import counting
from bench.static.races import assert_decided, backward, forward, ordered_launches, shuffled
from voxkern.kernels import launch_config

if TYPE_CHECKING:
    from voxkern.tts import TTS  # needs more packages than the kernels' tests


class Zeros(TensorMaker):
    """Makes zeros instead of random numbers: gigabytes of zeros take neither time nor memory until they are read."""

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def results(entry: Entry, call: Callable[..., Any], args: dict[str, Any]) -> list[Tensor]:
    """Run `call`, which computes the operator `entry`; return the results, then the arguments that it writes to."""
    returned = call(**args)
    if isinstance(returned, Tensor):
        returned = [returned]
    return [*(returned or []), *(args[name] for name in entry.op.mutates)]


def launched(entry: Entry, args: dict[str, Any]) -> list[Tensor]:
    """Run the launcher of an operator, and return what :func:`results` returns.

    The results lie between two bands of poison (see ``poison.py``), and the launcher must not write to the bands. If
    the operator returns no results, the caller must pass :func:`guarded` copies of the arguments that the operator
    writes to. The bands of these copies are checked.
    """

    def call(**args: Any) -> Any:
        out = entry.op.declare(**args)
        if out is None:
            entry.op.launch(**args)
            for name in entry.op.mutates:
                assert_bands(args[name])
            return None
        guards = [guarded(one) for one in ([out] if isinstance(out, Tensor) else out)]
        entry.op.launch(guards[0] if isinstance(out, Tensor) else tuple(guards), **args)
        for guard in guards:
            assert_bands(guard)
        return guards

    return results(entry, call, args)


CPU = torch.device("cpu")


def tiles_of(arch: str) -> AbstractContextManager[None]:
    """Use the launch configs of `arch` in the ``with`` block; if `arch` is "own", use those of the test's device."""
    return nullcontext() if arch == "own" else launch_config.target_arch(arch)


def own_or(arch: str, device: torch.device, first: str | None = None) -> AbstractContextManager[None]:
    """Use the launch configs of `arch` on the CPU, and a GPU's own on a GPU, in the ``with`` block.

    A test that is parametrised by several architectures gives the first of them as `first`. On a GPU the test is
    skipped for the others, because it would run again with the same tiles.
    """
    if device.type == "cpu":
        return launch_config.target_arch(arch)
    if first not in (None, arch):
        pytest.skip("a GPU has its own tiles")
    return nullcontext()


def moved(args: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the arguments with every tensor copied to `device`; unlike ``Tensor.to``, this keeps all strides."""

    def move(arg: Tensor) -> Tensor:
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=device).copy_(arg)

    return each_tensor(move, args)


def assert_accurate(
    entry: Entry,
    case: Case,
    dtype: str,
    apart: str | None = None,
    device: torch.device = CPU,
    make: TensorMaker | None = None,
) -> None:
    """Check the accuracy of an operator against its reference in fp64, on guarded arguments.

    The largest error may be at most twice that of the reference in `dtype`, plus 1e-6 x the RMS of the fp64 result.
    The RMS error has a limit by dtype, see bench/ops/accuracy.py. Integer results must equal those of the reference
    in `dtype`. `apart` names an argument that is passed with gaps between its rows. `make` makes the arguments; None
    makes those of `dtype`.
    """
    args = entry.args(case, make or TensorMaker.of(dtype, str(device)))
    truth = results(entry, entry.reference, to_dtype(args, torch.float64))
    plain = results(entry, entry.reference, guarded_args(args))
    mine = guarded_args(args)
    if apart is not None:
        mine[apart] = spread(args[apart])
    for out, same_dtype, exact in zip(launched(entry, mine), plain, truth, strict=True):
        if not out.dtype.is_floating_point:
            assert torch.equal(out, same_dtype)
            continue
        verdict = judge(out, same_dtype, exact)
        assert verdict.right, f"{entry.name} {case.name} {dtype}: {verdict}"


def assert_no_races(entry: Entry, case: Case, apart: str | None = None) -> None:
    """Check that no two blocks conflict at an address, and that no lane leaves the arguments.

    Blocks run in order and in reverse order. If the entry declares atomics in `ordered_by`, the
    blocks also run in a random order. All memory has guards, so that a lane which leaves an argument
    does not enter another. `apart` names an argument that is passed with gaps between its rows.
    """
    runs = []
    for order in (forward, backward, shuffled) if entry.ordered_by else (forward, backward):
        args = guarded_args(entry.args(case, TensorMaker.of(case.float_dtype)))
        if apart is not None:
            args[apart] = spread(args[apart])
        with GuardedMemory(), ordered_launches(order, entry.ordered_by, listed(args)) as launches:
            entry.op.run(**args)
        runs.append(launches)
    assert_decided(runs)


def assert_bytes_once(entry: Entry, case: Case, dtype: str, arch: str) -> None:
    """Check that each weight is read from DRAM once, and is loaded at most once for each tile of output rows.

    The weights are the arguments in ``entry.read_once``. The sizes are those of `case`, and the tiles those of `arch`.
    """
    args = entry.args(case, (Zeros if case.public else TensorMaker).of(dtype))
    with launch_config.target_arch(arch), counting(whole=not entry.regular_grid, indirect=listed(args)) as launches:
        entry.op.run(**args)
    tiled = {"BLOCK_M", f"BLOCK_{entry.rows}"} & set(launches[0].constants)
    # row tiles are the first axis of the grid; a kernel without tiles of rows loads the weights for each row
    row_tiles = launches[0].grid[0] if tiled else case.sizes[entry.rows]
    for name in entry.read_once:
        if args[name] is None:
            continue
        traffic = [launch.of(args[name]) for launch in launches if args[name].data_ptr() in launch.pointers.values()]
        least = args[name].numel() * args[name].element_size()
        assert sum(t.dram for t in traffic) == least, f"{name}: {traffic}, but {least:,} bytes from DRAM are enough"
        assert sum(t.again for t in traffic) <= least * (row_tiles - 1), (
            f"{name} is loaded more than once by one of {row_tiles} row tiles: {traffic}"
        )


def stand_in_for_overlap(
    patch: pytest.MonkeyPatch, wait: Callable[[], Any] = lambda: None, prefetch: Callable[[Any], Any] = lambda _: None
) -> None:
    """Give Triton's interpreter the instructions of overlapping launches, which it does not have.

    A kernel's wait calls `wait`, and a prefetch calls `prefetch` with the NumPy array of its addresses.
    """

    def inline_assembly(_: Any, assembly: str, constraints: str, values: Any, *rest: Any) -> SimpleNamespace:
        assert assembly.startswith("prefetch.global.L2")
        prefetch(values[0].data)
        return SimpleNamespace(get_result=lambda i: None)

    patch.setattr(tl.extra.cuda, "gdc_wait", wait)
    patch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    patch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_assembly)


def with_reference_codec(tts: "TTS") -> "TTS":
    """Put the reference codec back into an accelerated model: the interpreter takes 10 s for a fused codec's chunk."""
    vars(tts.model.audio_tokenizer).pop("stream", None)
    return tts
