"""Tests that every registered operator must pass. No operator is named here."""

import pytest
import torch
from checks import assert_accurate, assert_bytes_once, assert_no_races, tiles_of
from poison import GuardedMemory, assert_bands, guarded, poison_pages, spread
from torch import Tensor

from bench.ops.registry import Case, Entry, TensorMaker, entries, listed
from bench.static.counters import counting
from voxkern.kernels.launch_config import architecture

ENTRIES = entries(architecture())
ODD = [(entry, case) for entry in ENTRIES for case in entry.cases if not case.public]
FIRST = [(entry, case) for entry, case in ODD if case.name == "odd-mlp" or case is entry.cases[0]]
PUBLIC = [(entry, case) for entry in ENTRIES for case in entry.cases if case.public]


def named(pairs: list[tuple[Entry, Case]]) -> list[object]:
    return [pytest.param(entry, case, id=f"{entry.name}-{case.name}") for entry, case in pairs]


def make(case: Case, device: torch.device) -> TensorMaker:
    """Return a maker of tensors in the case's last dtype that is not an 8-bit format."""
    return TensorMaker.of(case.float_dtype, str(device))


def per_operator() -> list[object]:
    return named(FIRST)


def in_each_dtype(pairs: list[tuple[Entry, Case]]) -> list[object]:
    return [
        pytest.param(entry, case, dtype, id=f"{entry.name}-{case.name}-{dtype}")
        for entry, case in pairs
        for dtype in case.dtypes
    ]


def with_tiles_of_gpus(pairs: list[tuple[Entry, Case]]) -> list[object]:
    """Return every case in each dtype with the tiles of an NVIDIA and an AMD GPU; two of three dtypes are slow each.

    bf16 and fp16 have the same tiles. So the tiles of both GPUs run, and each dtype but fp16 runs on one of them.
    """
    return [
        pytest.param(
            entry, case, dtype, arch, id=f"{entry.name}-{case.name}-{dtype}-{arch}",
            marks=() if dtype == usual or len(case.dtypes) == 1 else pytest.mark.slow,
        )
        for entry, case in pairs
        for dtype in case.dtypes
        for arch, usual in (("sm_90", "bf16"), ("gfx942", "fp32"))
        if entry.runs_on(arch)
    ]  # fmt: skip


@pytest.mark.parametrize(("entry", "case", "dtype"), in_each_dtype(ODD))
def test_right(entry: Entry, case: Case, dtype: str, device: torch.device) -> None:
    assert_accurate(entry, case, dtype, device=device)


@pytest.mark.interpreter("a GPU has its own tiles")
@pytest.mark.parametrize(("entry", "case", "dtype", "arch"), with_tiles_of_gpus(ODD))
def test_right_with_the_tiles_of_a_gpu(entry: Entry, case: Case, dtype: str, arch: str) -> None:
    with tiles_of(arch):
        assert_accurate(entry, case, dtype)


@pytest.mark.only_gpu
@pytest.mark.parametrize(("entry", "case", "dtype"), in_each_dtype(PUBLIC))
def test_right_at_public_shapes(entry: Entry, case: Case, dtype: str, device: torch.device) -> None:
    assert_accurate(entry, case, dtype, device=device)


@pytest.mark.interpreter("the addresses of all lanes are recorded")
@pytest.mark.parametrize(("entry", "case"), named(ODD))
def test_no_blocks_race_and_no_lane_leaves_its_arguments(entry: Entry, case: Case) -> None:
    assert_no_races(entry, case)


@pytest.mark.slow
@pytest.mark.interpreter("the addresses of all lanes are recorded")
@pytest.mark.parametrize(
    ("entry", "case", "arch"),
    [
        pytest.param(entry, case, arch, id=f"{entry.name}-{case.name}-{arch}")
        for entry, case in ODD
        for arch in ("sm_90", "gfx942")
        if entry.runs_on(arch)
    ],
)
def test_no_blocks_race_with_the_tiles_of_a_gpu(entry: Entry, case: Case, arch: str) -> None:
    with tiles_of(arch):
        assert_no_races(entry, case)


@pytest.mark.slow
@pytest.mark.interpreter("the addresses of all lanes are recorded")
@pytest.mark.parametrize(("entry", "case"), per_operator())
def test_no_lane_enters_a_gap_between_rows(entry: Entry, case: Case) -> None:
    for name, arg in entry.args(case, TensorMaker()).items():
        if isinstance(arg, Tensor) and arg.ndim > 1:
            refusal = None
            try:
                assert_no_races(entry, case, apart=name)
            except ValueError as error:
                refusal = str(error)
            assert refusal is None or (name in refusal and "must be contiguous" in refusal)


@pytest.mark.parametrize(("entry", "case"), per_operator())
def test_rows_apart_are_right_or_refused(entry: Entry, case: Case, device: torch.device) -> None:
    for name, arg in entry.args(case, make(case, device)).items():
        if isinstance(arg, Tensor) and arg.ndim > 1:
            refusal = None
            try:
                assert_accurate(entry, case, case.float_dtype, apart=name, device=device)
            except ValueError as error:
                refusal = str(error)
            assert refusal is None or (name in refusal and "must be contiguous" in refusal)


@pytest.mark.interpreter("launches are recorded, with the interpreter's tiles")
@pytest.mark.parametrize(("entry", "case"), named(ODD))
def test_odd_shapes_have_two_tiles_and_a_partial_last_one(entry: Entry, case: Case) -> None:
    args = entry.args(case, TensorMaker.of(case.float_dtype))
    with counting(indirect=listed(args)) as launches:
        entry.op.run(**args)
    for launch in launches:
        tiles = {name[6:]: size for name, size in launch.constants.items() if name.startswith("BLOCK_")}
        for dim, tile in tiles.items():
            size = case.sizes.get(dim, tile + 1)
            assert size > tile, f"{dim} = {size} fits into one tile of {tile}"
            assert size % tile or tile == 1, f"{dim} = {size} is a whole number of tiles of {tile}"


def test_every_operator_has_its_shapes() -> None:
    for entry in ENTRIES:
        assert sum(not case.public for case in entry.cases) >= 2, entry.name
        # token_attention_linear is for one request, and norm_qkv_attention for more than one
        wanted = {"token_attention_linear": {"b1"}, "norm_qkv_attention": {"b4", "b32"}}.get(entry.name, {"b1", "b32"})
        assert wanted <= {case.name.rpartition("-")[2] for case in entry.cases if case.public}, entry.name
        assert entry.op.__doc__, entry.name
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(("entry", "case"), per_operator())
def test_opcheck(entry: Entry, case: Case, device: torch.device) -> None:
    torch.library.opcheck(entry.op.op, (), entry.args(case, make(case, device)))


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "case", "dtype"), in_each_dtype(FIRST))
def test_opcheck_in_each_dtype(entry: Entry, case: Case, dtype: str, device: torch.device) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if dtype == "fp8":
        checks.remove("test_schema")  # it compares arguments by torch.allclose, which does not take e4m3
    torch.library.opcheck(entry.op.op, (), entry.args(case, TensorMaker.of(dtype, str(device))), test_utils=checks)


@pytest.mark.parametrize(("entry", "case"), per_operator())
def test_compiles_into_one_graph(entry: Entry, case: Case, device: torch.device) -> None:
    torch._dynamo.reset()
    args = entry.args(case, make(case, device))
    mine, theirs = ({name: a.clone() if isinstance(a, Tensor) else a for name, a in args.items()} for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(lambda: entry.op(**mine), fullgraph=True, backend="aot_eager")(), entry.op(**theirs)
        )
    for name in entry.op.mutates:
        torch.testing.assert_close(mine[name], theirs[name])


@pytest.mark.parametrize(("entry", "case"), per_operator())
def test_gradients_are_refused(entry: Entry, case: Case, device: torch.device) -> None:
    args = entry.args(case, make(case, device))
    weights = entry.read_once or [name for name, a in args.items() if isinstance(a, Tensor) and a.is_floating_point()]
    if not weights:
        pytest.skip("the operator takes integers only")
    asked = {name: a.requires_grad_() if name in weights and a is not None else a for name, a in args.items()}
    with pytest.raises(RuntimeError, match=f"{entry.name}: an argument requires gradients"):
        entry.op(**asked)
    with torch.inference_mode():
        entry.op(**asked)


@pytest.mark.interpreter("bytes are counted by address")
@pytest.mark.parametrize(
    ("entry", "case", "dtype"),
    [
        pytest.param(
            entry, case, dtype, id=f"{entry.name}-{case.name}-{dtype}",
            marks=() if (case.name.endswith("b1") and dtype == "bf16") or not case.public else pytest.mark.slow,
        )
        for entry, case in PUBLIC + ODD
        if entry.regular_grid == case.public
        for dtype in [one for one in ("bf16", "int8") if one in case.dtypes] or [case.float_dtype]
    ],
)  # fmt: skip
def test_no_weight_byte_is_loaded_twice(entry: Entry, case: Case, dtype: str) -> None:
    assert_bytes_once(entry, case, dtype, "sm_90")


def test_poison_is_where_it_should_be() -> None:
    cache = poison_pages(torch.zeros(4, 2, 3), torch.tensor([[3, 1], [1, 1]], dtype=torch.int32))
    assert cache.isnan().flatten(1).all(1).tolist() == [True, False, True, False]
    rows = spread(torch.ones(3, 5))
    assert rows.stride() == (21, 1)
    assert rows.as_strided((3, 21), (21, 1))[:, 5:].isnan().all()
    assert torch.empty(3).isnan().all()  # conftest.py poisons fresh memory
    columns = guarded(torch.ones(3, 8)[:, 2:5])
    assert columns.stride() == (8, 1)
    assert columns.as_strided((2, 8), (8, 1))[:, 3:].isnan().all()
    with GuardedMemory():
        result = torch.empty_like(torch.ones(3, 4))
    assert_bands(result)
    whole = guarded(torch.zeros(7, dtype=torch.int64))
    assert_bands(whole)
    whole.as_strided((8,), (1,))[7] = 0
    with pytest.raises(AssertionError, match="1 elements were written around"):
        assert_bands(whole)
