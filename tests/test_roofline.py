"""Tests of the roofline: its formulas against counts in the interpreter, its predictions against sums by hand."""

from dataclasses import replace

import pytest
import torch
from plant import case_of, entry_of

from bench.ops.registry import TensorMaker
from bench.report.figures import fits
from bench.results import ResultRow
from bench.static import roofline
from bench.static.counters import Traffic, counting
from bench.static.frame import LAYERS, backbone_cost, cache_traffic, frame_cost, public_backbone, public_head
from bench.static.roofline import (
    BATCHES,
    GPUS,
    OPTIMISTIC,
    OVERLAPPED,
    PESSIMISTIC,
    SOLVERS,
    bound,
    compare_with_measured,
    floor,
    frame_on,
    in_flight,
    l2_bytes,
    parts_bytes,
    predict,
)
from bench.static.search import NAMES as SEARCHED
from bench.static.search import frame_times
from bench.static.traffic import with_result
from bench.static.work import (
    CONTEXT,
    Work,
    codec_chunk,
    dram_bytes,
    frame,
    launches,
    public,
    total_multiply_adds,
    weight_bytes,
    work_of,
)
from voxkern.fused.codec import FusedCodec
from voxkern.random_checkpoint import tiny_params
from voxkern.reference import Config
from voxkern.reference.codec import AudioTokenizer

# requests -> DRAM bytes of flow head and backbone, as ``python -m bench frame`` prints them
COUNTED = {1: (4.751e9, 6.056e9), 32: (5.615e9, 6.137e9)}
HEADS = {1: 95, 32: 95}  # requests -> launches of the flow head


def whole(B: int, steps: int = 7, gpu: str = "H100 SXM") -> list[Work]:
    return _all(frame_on(GPUS[gpu], B, steps))


def _all(parts: dict[str, list[Work]]) -> list[Work]:
    return [one for part in parts.values() for one in part]


def one_launch(operator: str, B: int, rows: int, gpu: str = "H100 SXM") -> Work:
    """Return a launch of the flow head with the most weights among those of an operator with so many rows."""
    found = [one for one in frame_on(GPUS[gpu], B, 7)["flow head"] if (one.operator, one.rows) == (operator, rows)]
    return replace(max(found, key=lambda one: one.weights), times=1)


def dram_and_parts(work: list[Work]) -> int:
    """Return the launches' fewest bytes from memory plus the bytes of the parts of tiles that blocks share."""
    return dram_bytes(work) + round(sum(one.times * parts_bytes(one) for one in work))


def without_attention(work: list[Work]) -> list[Work]:
    return [one for one in work if one.operator != "paged_attention"]  # cache_traffic counts its bytes


@pytest.mark.parametrize("B", COUNTED)
def test_launches_and_products_are_the_counted_ones(B: int) -> None:
    head, embeddings = public_head("meta")
    parts, counted = frame(B, 7), frame_cost(head, B, embeddings, count_bytes=False)
    assert launches(parts["flow head"]) == counted.launches == HEADS[B]
    assert total_multiply_adds(parts["flow head"]) == counted.multiply_adds
    counted = backbone_cost(public_backbone("meta"), B, count_bytes=False)
    assert launches(parts["backbone"]) == counted.launches == 131
    assert total_multiply_adds(without_attention(parts["backbone"])) == counted.multiply_adds
    assert launches(parts["bookkeeping"]) == 1


@pytest.mark.parametrize("B", COUNTED)
def test_bytes_are_those_that_were_counted(B: int) -> None:
    parts = frame(B, 7)
    assert dram_and_parts(parts["flow head"]) == pytest.approx(COUNTED[B][0], rel=0.01)
    assert dram_bytes(without_attention(parts["backbone"])) == pytest.approx(COUNTED[B][1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("B", COUNTED)
def test_bytes_are_the_counted_ones(B: int) -> None:
    head, embeddings = public_head()
    parts = frame(B, 7)
    assert dram_and_parts(parts["flow head"]) == pytest.approx(frame_cost(head, B, embeddings).dram, rel=0.01)
    counted = backbone_cost(public_backbone(), B).dram
    assert dram_bytes(without_attention(parts["backbone"])) == pytest.approx(counted, rel=0.01)


def test_keys_and_values_are_the_counted_ones() -> None:
    counted = LAYERS * cache_traffic(CONTEXT).kv
    for B in (1, 32):
        assert sum(one.times * one.cache for one in frame(B, 7)["backbone"]) == B * counted


def test_the_codec_is_the_fused_modules_launches_and_its_modules_weights() -> None:
    tiny = AudioTokenizer(Config.from_params(tiny_params()).codec).bfloat16()
    stream = FusedCodec(tiny, 1)(1)
    codes = torch.zeros(1, 37, 1, dtype=torch.int64)
    with torch.inference_mode(), counting() as seen:
        stream.chunk(codes, torch.ones(1, dtype=torch.int64))
    # a stage of the tiny codec has one layer, a stage of the public codec has two
    assert launches(codec_chunk(tiny, 1, 1)) == len(seen) == 27
    with torch.device("meta"):
        codec = AudioTokenizer(public().codec).bfloat16()
    assert launches(codec_chunk(codec, 1, 1)) == 47
    weights = sum(p.numel() for name, p in codec.named_parameters() if p.ndim > 1 and "quantizer" not in name)
    gains = sum(p.numel() for name, p in codec.named_parameters() if name.endswith("original0"))
    last = codec.output_proj.conv.weight.numel()  # fp32, as the sound is
    work = codec_chunk(codec, 1, 25)
    assert 25 * weight_bytes(work) == pytest.approx(2 * (weights - gains + last), rel=1e-6)
    assert 2 * total_multiply_adds(work) == pytest.approx(1094.7e6, rel=1e-4)


def test_the_floor_by_hand() -> None:
    """One request on an H100 streams 11.1 GB at 3.35 TB/s, which takes 3.32 ms."""
    layer = 3072 * 4096 + 2 * 3072 * 1024 + 4096 * 3072 + 3 * 3072 * 9216
    once = 8194 * 3072 + 3072 * 3072 + 6144 * 3072  # semantic codes, projection of the hidden state, its q | k | v
    projections = 2 * 7 * 36 * 3072  # input and output projections of the state x, in 7 evaluations
    # weights read once per frame, because the engine decodes frames one by one; the last convolution's are fp32
    codec = 2 * (149_417_975 + 7 * 1024 * 240)
    # in each evaluation, an fp32 weight with 36 columns stands for q, k and v of the first layer
    head = 7 * (2 * (3 * layer - 6144 * 3072) + 4 * 6144 * 36)
    streamed = 2 * (26 * layer + once + projections) + head + 400 * 26 * 2 * 1024 * 2 + codec
    assert floor(whole(1), GPUS["H100 SXM"]) == pytest.approx(streamed / 3.35e12, rel=1e-6)
    assert streamed / 3.35e12 == pytest.approx(3.325e-3, rel=1e-3)


def test_a_launch_that_bandwidth_limits_by_hand() -> None:
    """All 288 blocks run at once, because 3 blocks fit on each of 132 multiprocessors.

    With 64 KiB in flight, one block would take 4.2 us, less than the 37.6 us that all bytes take from DRAM.
    """
    bytes_ = 4 * 9216 * 3072 + 2 * (3072 + 6 * (3072 + 9216))
    by_hand = 1.5e-6 + 0.7e-6 + bytes_ / (0.9 * 3.35e12)
    gate_and_up = one_launch("norm_swiglu", 1, 6)
    assert gate_and_up.kernel is not None
    assert gate_and_up.kernel.blocks == 288
    assert predict([gate_and_up], GPUS["H100 SXM"]) == pytest.approx(by_hand, rel=1e-6)
    assert bound([gate_and_up], GPUS["H100 SXM"]) == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(39.8e-6, rel=1e-3)


def test_a_launch_that_latency_limits_by_hand() -> None:
    """The flow head's step for one request is one block.

    The block's eight stages keep 7 x 24 KiB of its 492 kB in flight.
    """
    (step,) = [one for one in frame(1, 7)["flow head"] if one.operator == "flow_step"]
    found = predict([replace(step, times=1)], GPUS["H100 SXM"])
    assert found == pytest.approx(2.2e-6 + 491_812 / (7 * 24 * 1024) * 0.7e-6, rel=1e-3)


def test_attention_on_amd_has_one_step_in_flight() -> None:
    """Two of the kernel's three stages would hold 64 KiB, but its 34,816 bytes of shared memory hold one stage.

    A span of 256 tokens has four steps of 64 tokens, each with 32 KiB for one key head.
    """
    (attention,) = [one for one in frame_on(GPUS["MI300X"], 1, 7)["backbone"] if one.operator == "paged_attention"]
    assert in_flight(attention, "gfx942") == 34_816
    assert in_flight(attention, "gfx942") < 2 * 64 * 128 * 2 * 2


def test_a_launch_that_products_limit_by_hand() -> None:
    """On an L4, 384 rows are 6 tiles of 64. Each is divided among a sixth of 2 x 58 blocks, so there are 6 x 19 blocks.

    Each multiprocessor runs at most two of them, one after the other or at once.
    """
    many = one_launch("norm_swiglu", 64, 384, "L4")
    a_block = 2 * 384 * 2 * 9216 * 3072 / (6 * 19) / (0.5 * 121e12 / 58)
    assert predict([many], GPUS["L4"]) == pytest.approx(2.2e-6 + 2 * a_block, rel=1e-6)


def test_a_launch_that_instructions_limit_by_hand() -> None:
    """With a slow clock, the time is that of the instructions: each of four schedulers issues one a clock.

    288 blocks with 32 rows of w1 and of w3 run on 132 multiprocessors: three on the busiest.
    """
    one = one_launch("norm_swiglu", 1, 6)
    assert one.kernel is not None
    row = roofline.binary(one.kernel, "sm_90")
    assert row is not None
    assert one.kernel.grid == (1, 288, 1)
    steps, slow = 3072 // one.kernel.constant("BLOCK_K"), replace(GPUS["H100 SXM"], clock=1e8)
    by_hand = 3 * steps * row.step * one.kernel.warps / 4 / 1e8
    assert predict([one], slow) == pytest.approx(2.2e-6 + by_hand, rel=1e-6)


def test_a_launch_that_l2_limits_by_hand() -> None:
    """With a slow L2, the time is that of the weights, and of the rows for each of 288 tiles of columns."""
    some = replace(one_launch("norm_swiglu", 8, 48), moved=0)
    assert some.kernel is not None
    assert some.kernel.grid == (1, 288, 1)
    bytes_ = 2 * 2 * 3072 * 9216 + 287 * 2 * 48 * 3072
    slow = replace(GPUS["H100 SXM"], l2_bandwidth=1e12)
    assert predict([some], slow) == pytest.approx(2.2e-6 + bytes_ / 1e12, rel=1e-6)


def test_a_launch_whose_parts_take_time_by_hand() -> None:
    """192 rows are 2 tiles of 96, and each divides 24 tiles of 128 weights among 66 blocks: 2.75 blocks a tile.

    Of the 24 tiles, 6 begin and 18 do not begin where a block begins. So 66 + 18 parts are stored for a tile of rows.
    They are written to memory, and written and read through L2.
    """
    down = replace(one_launch("linear", 32, 192), moved=0)
    assert down.kernel is not None
    assert down.kernel.grid == (2, 66, 1)
    assert down.kernel.pieces == (2, 2 * (66 + 18))
    parts = 2 * (66 + 18) * 96 * 128 * 4
    slow = replace(GPUS["H100 SXM"], l2_bandwidth=1e12)
    bytes_ = 2 * 2 * 3072 * 9216 + 23 * 2 * 192 * 9216 + 2 * parts
    assert predict([down], slow) == pytest.approx(2.2e-6 + bytes_ / 1e12, rel=1e-6)
    slow = replace(GPUS["H100 SXM"], bandwidth=1e12)
    assert predict([down], slow) == pytest.approx(2.2e-6 + (2 * 3072 * 9216 + parts) / 0.9e12, rel=1e-6)


def test_rows_that_pad_a_tile_take_their_time() -> None:
    """For 4 requests, 24 rows take the time of a tile of 32. The bound has only the 24 rows.

    There are 144 tiles, so one of 132 multiprocessors computes two.
    """
    some = one_launch("norm_swiglu", 4, 24)
    assert some.padded_multiply_adds == 32 * 2 * 3072 * 9216
    assert some.multiply_adds == 24 * 2 * 3072 * 9216
    slow = replace(GPUS["H100 SXM"], flops=1e12)
    a_tile = 2 * 32 * 2 * 3072 * 64
    assert predict([some], slow) == pytest.approx(2.2e-6 + 2 * a_tile / (0.5e12 / 132), rel=1e-6)
    assert bound([some], slow) == pytest.approx(2.2e-6 + 2 * 24 * 2 * 3072 * 9216 / 0.5e12, rel=1e-6)


def test_rows_without_queries_take_their_time_in_a_launch_with_shares() -> None:
    """In the last layer, 64 of 192 rows have queries: one of three tiles of rows. Its blocks multiply q, k and v."""
    layers = [one for one in frame_on(GPUS["MI300X"], 32, 7)["flow head"] if one.operator == "norm_qkv"]
    (last,) = [one for one in layers if one.rows == 192 and one.multiply_adds < 192 * 6144 * 3072]
    assert last.multiply_adds == (64 * 4096 + 192 * 2048) * 3072
    assert last.padded_multiply_adds == 192 * 6144 * 3072
    slow, a_block = replace(GPUS["MI300X"], flops=1e12), 2 * 192 * 6144 * 3072 / (3 * 101)
    assert predict([replace(last, times=1)], slow) == pytest.approx(2.2e-6 + a_block / (0.5e12 / 304), rel=1e-6)


def test_steps_that_cost_their_multiply_adds_by_hand() -> None:
    """On an RTX 4090, 64 pairs are 4 tiles of 16, and each divides 48 tiles of 96 steps among 32 blocks.

    A step of the 32 tiles of queries costs 1. A step of the 16 tiles of keys and values costs 3. The cost of a block is
    (32 + 3 * 16) * 96 / 32 = 240. A block with only queries has 240 steps, in 3 tiles; the mean is 144. A step loads
    8 KB of weights, and 5 steps are in flight.
    """
    gpu = GPUS["RTX 4090"]
    launches = [one for one in frame_on(gpu, 32, 7)["flow head"] if one.operator == "norm_qkv_attention"]
    (last,) = [replace(one, times=1) for one in launches if one.kernel and one.kernel.constant("N_TOKENS") == 1]
    assert last.kernel is not None
    assert last.kernel.grid == (4, 32, 1)
    assert last.kernel.pieces[0] == 3
    assert last.kernel.step_imbalance == 240 / 144
    assert last.padded_multiply_adds == (64 * 4096 + 192 * 2048) * 3072
    waits = 2.2e-6 + 3 * 0.7e-6  # seconds
    attention = 2 * 16 * (2 * 4 + 6) * 128 * 128  # bytes through L2, if every multiprocessor moved a block's
    by_hand = waits + attention / 4.9e12 + 2 * last.padded_multiply_adds / 0.5e12
    assert predict([last], replace(gpu, flops=1e12)) == pytest.approx(by_hand, rel=1e-6)
    loads = (240 * 8192 + last.moved / 128) / (5 * 8192) * 0.7e-6 + 2 * 0.7e-6
    fast = replace(gpu, flops=1e18, clock=1e12, bandwidth=1e15, l2_bandwidth=1e15)
    assert predict([last], fast) == pytest.approx(waits + attention / 1e15 + loads, rel=1e-6)


def test_steps_that_cost_less_than_their_multiply_adds_by_hand() -> None:
    """On an A100, a step of keys or values costs 2, but has three times the multiply-adds of a step of queries.

    So blocks with only keys or values take longest. Each of 54 blocks has an equal share of the total cost,
    (32 + 2 * 16) * 48.
    """
    gpu = GPUS["A100 80GB"]
    launches = [one for one in frame_on(gpu, 32, 7)["flow head"] if one.operator == "norm_qkv_attention"]
    (last,) = [one for one in launches if one.kernel and one.kernel.constant("N_TOKENS") == 1]
    assert last.kernel is not None
    assert last.kernel.grid == (2, 54, 1)
    assert last.padded_multiply_adds / last.kernel.blocks == 64 * 48 / 54 / 2 * (3 * 32 * 128 * 64)


@pytest.mark.parametrize(("operator", "case"), [("linear", "odd-residual"), ("norm_swiglu", "odd-many")])
def test_bytes_through_l2_are_the_counted_ones(operator: str, case: str) -> None:
    """The interpreter counts each access of a launch with shares; the model has the same sum."""
    entry = entry_of(operator)
    args = entry.args(case_of(entry, case), TensorMaker(torch.bfloat16))
    with counting() as launches:
        entry.op.run(**args)
    traffic = launches[0].traffic()
    parts, norm = traffic["p_parts"], traffic.get("p_norm", Traffic(0, 0))
    one = work_of(operator, with_result(entry, args))
    assert one.kernel is not None
    assert one.kernel.pieces[1] > 0
    squares = 0 if operator == "linear" else one.kernel.pieces[1] * one.kernel.constant("ROW_TILES") * 16 * 4
    assert parts.dram == parts.again == parts_bytes(one) + squares
    counted = sum(one.dram + one.again for name, one in traffic.items() if name != "p_arrived")
    assert counted == l2_bytes(one) + 2 * squares + norm.again


def test_a_frame_with_8_bit_weights_reads_half_the_bytes() -> None:
    """The backbone, the flow head and the semantic head read 8 bits a weight, and the rest of the frame as before."""
    plain, int8, fp8 = (dram_bytes(_all(frame(1, 7, format_=format_))) for format_ in (None, "int8", "fp8"))
    assert int8 == fp8
    assert 0.50 < int8 / plain < 0.52
    times = {name: predict(_all(frame_on(gpu, 1, 7, "int8")), gpu) for name, gpu in GPUS.items()}
    assert times["H100 SXM"] < 2.65e-3
    assert times["RTX 4090"] < 7.3e-3
    assert times["L4"] / 80e-3 < 0.30  # of the time of the sound
    for name, gpu in GPUS.items():
        assert times[name] < 0.9 * predict(whole(1, gpu=name), gpu), name


# The predicted time of a frame over its bound, at most, at batch 1, 8 and 32.
WORST = {
    "H100 SXM": (1.02, 1.03, 1.05), "H200": (1.02, 1.04, 1.06), "B200": (1.04, 1.05, 1.20),
    "A100 80GB": (1.01, 1.02, 1.03), "RTX 4090": (1.01, 1.01, 1.02), "RTX 5090": (1.02, 1.03, 1.05),
    "MI300X": (1.10, 1.08, 1.10), "MI355X": (1.09, 1.10, 1.23),
}  # fmt: skip


@pytest.mark.parametrize("name", WORST)
def test_frames_are_near_their_bound(name: str) -> None:
    for B, most in zip((1, 8, 32), WORST[name], strict=True):
        work = whole(B, gpu=name)
        assert 1 <= predict(work, GPUS[name]) / bound(work, GPUS[name]) <= most


def test_overlap_saves_half_of_the_time_between_launches() -> None:
    """A launch takes 1.1 us less, and the frame of one request is within 1.22 of the floor on an H100."""
    gpu = GPUS["H100 SXM"]
    usual, less = (predict(whole(1), gpu, assume) for assume in (roofline.USUAL, OVERLAPPED))
    assert usual - less == pytest.approx(1.1e-6 * launches(whole(1)), rel=1e-6)
    assert less < 1.22 * floor(whole(1), gpu)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "H100 SXM" else pytest.mark.slow) for one in SEARCHED]
)
def test_no_other_tiles_are_much_better(name: str) -> None:
    ours, best = frame_times(32, GPUS[name])
    assert best <= ours <= 1.02 * best


@pytest.mark.parametrize("name", GPUS)
def test_no_prediction_is_under_the_floor(name: str) -> None:
    gpu = GPUS[name]
    for steps in SOLVERS.values():
        work = [whole(B, steps, name) for B in BATCHES]
        floors = [floor(one, gpu) for one in work]
        assert floors == sorted(floors)
        for one, least in zip(work, floors, strict=True):
            kind, usual, unkind = (predict(one, gpu, assume) for assume in (OPTIMISTIC, roofline.USUAL, PESSIMISTIC))
            assert least < kind < usual < unkind
            assert least < bound(one, gpu) < usual


def test_more_work_or_a_lesser_gpu_takes_no_less() -> None:
    gpu = GPUS["H100 SXM"]
    times = [predict(whole(B), gpu) for B in BATCHES]
    assert times == sorted(times)
    assert predict(whole(1, 4), gpu) < predict(whole(1, 7), gpu)
    for lesser in (replace(gpu, bandwidth=3e12), replace(gpu, flops=5e14)):
        for B in (1, 64):
            assert predict(whole(B), lesser) >= predict(whole(B), gpu)
            assert floor(whole(B), lesser) >= floor(whole(B), gpu)


def test_the_ledger_has_a_binary_of_every_launch_but_the_last() -> None:
    """Every launch has a row in the ledger, except the convolution to sound. The ledger has that one in fp32 only.

    The model assumes that a launch without a row reaches the bound, so a wrong name would go unnoticed.
    """
    for name, gpu in GPUS.items():
        for B in BATCHES:
            for one in whole(B, gpu=name):
                assert one.kernel is not None
                found = roofline.binary(one.kernel, gpu.arch)
                is_last = (
                    one.operator == "codec codec_conv"
                    and one.kernel.constant("N") == public().codec.pretransform_patch_size
                )
                assert (found is None) == is_last, (one, gpu.arch)


def test_rows_say_what_they_are() -> None:
    rows = roofline.rows()
    kinds = {(row.subject in GPUS, row.how, row.unit) for row in rows}
    times, counts = {(True, "predicted", "ms")}, {(on_gpu, "counted", "1") for on_gpu in (True, False)}
    assert kinds == times | counts | {(False, "counted", "B")}
    wanted = {"metric": "launches of the flow head", "steps": "euler:7", "dtype": "bf16"}
    assert len({row.key for row in rows}) == len(rows)
    counted = {(row.subject, row.shape): row.value for row in rows if fits(row, wanted)}
    for shape in ("frame-b1", "frame-b8", "frame-b32"):
        for gpu in GPUS:  # 14 launches of attention, or none
            is_fused = shape == "frame-b1" or gpu not in ("B200", "MI300X", "MI355X")
            assert counted[gpu, shape] == (95 if is_fused else 109), (gpu, shape)


def test_measured_frames_are_laid_over() -> None:
    """Only voxkern's measured frame on a known GPU is compared with the model.

    Another subject, provider or GPU, and a predicted time, are left out. The rows are invented.
    """
    row = ResultRow(
        "micro", "frame", "time", 5000.0, "us", "measured", "none", "voxkern", "frame-b1", "bf16", "euler:7",
        device="NVIDIA H100 80GB HBM3",
    )  # fmt: skip
    others = [replace(row, subject="linear"), replace(row, how="predicted"), replace(row, device="NVIDIA L40S")]
    others += [replace(row, provider="torch"), replace(row, provider="copy", value=350.0)]
    ((found, least, expected),) = compare_with_measured([row, *others])
    assert found == row
    assert least == pytest.approx(1e3 * floor(whole(1), GPUS["H100 SXM"]))
    assert expected == pytest.approx(1e3 * predict(whole(1), GPUS["H100 SXM"]))
