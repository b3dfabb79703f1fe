"""Tests of paged attention at the lengths, head groups, head sizes, pages and windows where kernels tend to fail."""

import mmap
from functools import partial
from itertools import accumulate

import pytest
import torch
from checks import CPU, moved, own_or
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from bench.ops.accuracy import judge
from bench.ops.paged_attention import paged_attention_reference, poisoned, prefill_attention_reference
from bench.ops.qkv import pages_of, rope_of
from bench.ops.rope import rope_append_reference
from bench.static.counters import counting
from voxkern.kernels import launch_config
from voxkern.kernels.paged_attention import (
    launch_paged_attention,
    paged_attention,
    paged_attention_scratch,
    prefill_attention,
    span_of,
)
from voxkern.kernels.qkv import norm_qkv_append
from voxkern.kernels.rope import rope_append

LENGTHS = [300, 0, 1, 63, 64, 1000, 65]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ints(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def cache(
    lengths: list[int], heads: int, page: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kv_cache [pages, 2, heads, page, D], a block table and the lengths, int32.

    Pages are shuffled, and the places in a page without a token hold NaN.
    """
    _, table = pages_of(lengths, page, "cpu")
    pages = 2 * sum(-(-length // page) for length in lengths) + 1
    kv_cache = poisoned(random(pages, 2, heads, page, D, device=CPU, dtype=dtype), table, lengths)
    return kv_cache.to(device), table.to(device), ints(lengths, device)


def assert_accurate(out: Tensor, plain: Tensor, truth: Tensor) -> None:
    verdict = judge(out, plain, truth)
    assert verdict.right, str(verdict)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 4, 6])
def test_decode_is_right(group: int, D: int, page: int, dtype: str, device: torch.device) -> None:
    assert_decode_is_right(group, D, page, dtype, device)


def test_decode_is_right_in_pages_of_128(device: torch.device) -> None:
    assert_decode_is_right(6, 64, 128, "bf16", device)


def assert_decode_is_right(group: int, D: int, page: int, dtype: str, device: torch.device) -> None:
    kv_cache, table, lengths = cache(LENGTHS, 2, page, D, DTYPES[dtype], device)
    q = random(len(LENGTHS), 2 * group * D, device=device, dtype=DTYPES[dtype], seed=1)
    with own_or("sm_90" if page >= 64 else "interpreter", device):
        out = paged_attention(q, kv_cache, table, lengths, 0, 1024)
    truth = paged_attention_reference(q.double(), kv_cache.double(), table, lengths, 0, 1024)
    assert_accurate(out, paged_attention_reference(q, kv_cache, table, lengths, 0, 1024), truth)
    assert not out[1].any()  # the request of length 0


@pytest.mark.parametrize("window", [1, 7, 64, 300])
def test_a_window_is_all_that_is_seen(window: int, device: torch.device) -> None:
    """A query sees only the last `window` tokens: the keys and values before the window may be anything, even NaN.

    The windows range from shorter than a tile to longer than a span of 256 tokens.
    """
    kv_cache, table, lengths = cache(LENGTHS, 2, 16, 64, torch.float32, device)
    for pages, length in zip(table.tolist(), LENGTHS, strict=True):
        for position in range(max(length - window, 0)):
            kv_cache[pages[position // 16], :, :, position % 16] = torch.nan
    q = random(len(LENGTHS), 6 * 64, device=device, seed=2)
    out = paged_attention(q, kv_cache, table, lengths, window, 1024)
    truth = torch.zeros_like(out, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        if length:
            positions = torch.arange(max(length - window, 0), length, device=device)
            k, v = kv_cache[table[b, positions // 16].long(), :, :, positions % 16].double().unbind(1)  # [S, Hkv, D]
            heads = q[b].double().view(2, 3, 64)
            p = (torch.einsum("hgd,shd->hgs", heads, k) / 8).softmax(-1)
            truth[b] = torch.einsum("hgs,shd->hgd", p, v).flatten()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("group", "D", "page", "window"), [(1, 64, 16, 0), (4, 128, 64, 0), (6, 64, 64, 9)])
def test_prefill_is_right(group: int, D: int, page: int, window: int, dtype: str, device: torch.device) -> None:
    """One launch runs prompts of different lengths, of which one is empty and one continues after 100 tokens.

    One case has a window that is shorter than a tile.
    """
    new, past = [65, 0, 1, 63, 30], [0, 0, 0, 0, 100]
    wanted = [a + b for a, b in zip(new, past, strict=True)]
    kv_cache, table, lengths = cache(wanted, 2, page, D, DTYPES[dtype], device)
    cu_seqlens = ints([0, *accumulate(new)], device)
    q = random(sum(new), 2 * (group + 2) * D, device=device, dtype=DTYPES[dtype], seed=3)
    arguments = (table, cu_seqlens, lengths, window, max(new), 2 * group)
    with own_or("sm_90" if page == 64 else "interpreter", device):
        out = prefill_attention(q, kv_cache, *arguments)
    truth = prefill_attention_reference(q.double(), kv_cache.double(), *arguments)
    assert_accurate(out, prefill_attention_reference(q, kv_cache, *arguments), truth)


def test_prefill_is_right_for_many_tokens(device: torch.device) -> None:
    """300 tokens fill 19 pages.

    With 6 query heads per key head, each token takes 8 columns of a tile, two of them empty.
    """
    kv_cache, table, lengths = cache([300], 1, 16, 128, torch.bfloat16, device)
    q = random(300, 8 * 128, device=device, dtype=torch.bfloat16, seed=7)
    arguments = (table, ints([0, 300], device), lengths, 0, 300, 6)
    with own_or("sm_90", device):
        out = prefill_attention(q, kv_cache, *arguments)
    truth = prefill_attention_reference(q.double(), kv_cache.double(), *arguments)
    assert_accurate(out, prefill_attention_reference(q, kv_cache, *arguments), truth)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("window", [0, 20, 64])
def test_a_prefill_in_parts_is_the_whole(window: int, arch: str, device: torch.device) -> None:
    """A prompt run in parts gives the same bits as in one launch, wherever the parts begin."""
    kv_cache, table, _ = cache([130], 2, 16, 32, torch.bfloat16, device)
    q, parts, done = random(130, 8 * 32, device=device, dtype=torch.bfloat16, seed=8), [], 0

    def prefill(first: int, end: int) -> Tensor:
        cu_seqlens, lengths = ints([0, end - first], device), ints([end], device)
        return prefill_attention(q[first:end], kv_cache, table, cu_seqlens, lengths, window, end - first, 4)

    with own_or(arch, device, first="interpreter"):
        for part in (17, 33, 1, 50, 29):
            parts.append(prefill(done, done + part))
            done += part
        assert torch.equal(torch.cat(parts), prefill(0, 130))


def test_a_prefill_row_of_no_request_gives_zeros(device: torch.device) -> None:
    """In a padded batch, a request of length 0 may have rows.

    These rows give zeros, and the request's block table entries are never read.
    """
    kv_cache, table, _ = cache([10, 16], 2, 16, 32, torch.float32, device)
    table[1] = 1 << 30
    q, cu_seqlens, lengths = random(8, 8 * 32, device=device, seed=9), ints([0, 3, 8], device), ints([10, 0], device)
    out = prefill_attention(q, kv_cache, table, cu_seqlens, lengths, 0, 5, 4)
    assert out[:3].all()
    assert not out[3:].any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.sampled_from([16, 32]),
    st.sampled_from([(1, 1), (2, 2), (3, 1)]),
    st.integers(0, 100),
)
def test_any_lengths(device: torch.device, wanted: list[int], page: int, heads: tuple[int, int], window: int) -> None:
    """Decode agrees with fp64, and so does a prefill of one query that ends at the same token."""
    group, kv = heads
    kv_cache, table, lengths = cache(wanted, kv, page, 8, torch.float32, device)
    q = random(len(wanted), group * kv * 8, device=device, seed=4)
    out = paged_attention(q, kv_cache, table, lengths, window, 96)
    truth = paged_attention_reference(q.double(), kv_cache.double(), table, lengths, window, 96)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    cu_seqlens = ints([0, *accumulate(min(n, 1) for n in wanted)], device)
    if cu_seqlens[-1]:
        there = [i for i, n in enumerate(wanted) if n]
        one = prefill_attention(q[there], kv_cache, table, cu_seqlens, lengths, window, 1, group * kv)
        torch.testing.assert_close(one.double(), truth[there], rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter("launches are recorded")
def test_spans_are_of_the_prepared_length() -> None:
    assert [span_of(n) for n in (1, 4096, 16384, 16385, 262_144)] == [256, 256, 256, 512, 4096]
    kv_cache, table, lengths = cache([1000], 1, 64, 16, torch.float32, CPU)
    with counting(whole=True) as launches:
        paged_attention(random(1, 32, device=CPU), kv_cache, table, lengths, 0, 4096)
    assert launches[0].grid == (4, 1, 1)


def test_a_launch_leaves_the_counters_of_spans_at_zero(device: torch.device) -> None:
    kv_cache, table, lengths = cache([1000], 1, 64, 16, torch.float32, device)
    q = random(1, 32, device=device)
    results, scratch = [], paged_attention_scratch(q, kv_cache, 4096)
    for _ in range(2):
        out = torch.full_like(q, torch.nan)
        launch_paged_attention(out, q, kv_cache, table, lengths, 0, 4096, scratch)
        assert not scratch[1].any()
        results.append(out)
    assert torch.equal(*results)
    # a batch with a longer request has a wider table: more blocks, the same bits
    wide = torch.cat((table, table.new_zeros(1, 40)), 1)
    assert torch.equal(paged_attention(q, kv_cache, wide, lengths, 0, 4096), results[0])


@pytest.mark.interpreter("the test chooses the order of the blocks")
@pytest.mark.parametrize("shift", [-1, 2], ids=["backwards", "from the third"])
def test_spans_may_end_in_any_order(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that ends last adds up all spans in their own order, so any order of ends gives the same bits."""
    kv_cache, table, lengths = cache([1000, 600], 2, 64, 32, torch.bfloat16, CPU)
    q, builder = random(2, 8 * 32, device=CPU, dtype=torch.bfloat16), interpreter.interpreter_builder
    expected = paged_attention(q, kv_cache, table, lengths, 0, 1024)
    set_dim, set_index, seen = builder.set_grid_dim, builder.set_grid_idx, []

    def dim(*grid: int) -> None:
        seen[:] = [grid]
        set_dim(*grid)

    def index(*i: int) -> None:
        n = seen[0][0]
        seen.append((n - 1 - i[0] if shift < 0 else (i[0] + shift) % n, *i[1:]))
        set_index(*seen[-1])

    monkeypatch.setattr(builder, "set_grid_dim", dim)
    monkeypatch.setattr(builder, "set_grid_idx", index)
    out = paged_attention(q, kv_cache, table, lengths, 0, 1024)
    assert seen[0] == (4, 2, 2)
    assert seen[1][0] == (3 if shift < 0 else 2)
    assert len(set(seen[1:])) == 16
    assert torch.equal(out, expected)


def at_the_end_of_262_144_tokens(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Return the arguments of a window of 4160 tokens, which reaches over two spans of 4096 tokens.

    All block table entries before the window are the number of one page, which holds NaN.
    """
    PAGE, window, context = 64, 4160, 262_144
    n = window // PAGE
    kv_cache = random(1 + n, 2, 1, PAGE, 64, device=device, dtype=torch.bfloat16)
    kv_cache[0] = torch.nan
    table = ints([0] * (context // PAGE - n) + list(range(1, 1 + n)), device)[None]
    q = random(1, 4 * 64, device=device, dtype=torch.bfloat16)
    return q, kv_cache, table, ints([context], device), window, context


def test_a_window_at_the_end_of_262_144_tokens(device: torch.device) -> None:
    q, kv_cache, table, _, window, _ = arguments = at_the_end_of_262_144_tokens(device)
    with own_or("sm_90", device):
        out = paged_attention(*arguments)
    alone = (table[:, table[0] > 0], ints([window], device), 0, window)
    truth = paged_attention_reference(q.double(), kv_cache.double(), *alone)
    assert_accurate(out, paged_attention_reference(q, kv_cache, *alone), truth)


@pytest.mark.interpreter("launches are recorded")
def test_262_144_tokens_have_64_spans() -> None:
    with launch_config.target_arch("sm_90"), counting() as launches:
        paged_attention(*at_the_end_of_262_144_tokens(CPU))
    assert launches[0].grid == (64, 1, 1)


def unwritten(n: int, device: torch.device) -> Tensor:
    """Return n fp16 elements. On the CPU, they take no memory until they are written."""
    if device.type == "cpu":
        return torch.frombuffer(mmap.mmap(-1, 2 * n), dtype=torch.float16)
    return torch.empty(n, dtype=torch.float16, device=device)


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    """The last page starts 2.4e9 elements after the first, where 32-bit offsets would wrap.

    The memory between the pages is never touched.
    """
    PAGE, D, stride = 16, 64, 1_200_000_000
    halves = partial(random, device=device, dtype=torch.float16)
    memory = unwritten(2 * stride + 2 * PAGE * D, device)
    kv_cache = memory.as_strided((3, 2, 1, PAGE, D), (stride, PAGE * D, PAGE * D, D, 1))
    small = halves(3, 2, 1, PAGE, D)
    table, lengths = ints([2, 1], device)[None], ints([20], device)
    kv_cache[2], kv_cache[1] = small[2], small[1]
    q = halves(1, 2 * D)
    out = paged_attention(q, kv_cache, table, lengths, 0, 32)
    assert torch.equal(out, paged_attention(q, small, table, lengths, 0, 32))
    assert torch.equal(prefill_attention(q, kv_cache, table, ints([0, 1], device), lengths, 0, 1, 2), out)

    rope, qkv = rope_of(32, D, "cpu").to(device), halves(1, 4 * D, seed=5)
    for cache_of_mine in (kv_cache, small):
        rope_append(rope, ints([0], device), ints([3], device), table, qkv.clone(), cache_of_mine)
    assert torch.equal(kv_cache[2], small[2])
    x, w = halves(1, 32), halves(2 * D, 32)
    for cache_of_mine in (kv_cache, small):
        norm_qkv_append(x, x[0], w, w[:D], w[D:], rope, table, ints([5], device), q, cache_of_mine, 1e-5, 1)
    assert torch.equal(kv_cache[2], small[2])


def test_other_layouts_are_read_as_they_are(device: torch.device) -> None:
    """Kernels read and write a cache that stores tokens before heads, as vLLM's caches do."""
    kv_cache, table, lengths = cache([70, 33], 2, 16, 32, torch.float32, device)
    other = kv_cache.transpose(2, 3).contiguous().transpose(2, 3)
    assert not other.is_contiguous()
    q = random(2, 128, device=device)
    assert torch.equal(
        paged_attention(q, other, table, lengths, 0, 128), paged_attention(q, kv_cache, table, lengths, 0, 128)
    )
    rope, qkv = rope_of(70, 32, "cpu").to(device), random(2, 6 * 32, device=device, seed=6)
    requests, positions = ints([0, 1], device), ints([69, 0], device)
    rope_append(rope, requests, positions, table, qkv.clone(), other)
    rope_append_reference(rope, requests, positions, table, qkv.clone(), kv_cache)
    torch.testing.assert_close(other, kv_cache, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_heads_of_an_odd_size_cannot_be_rotated(device: torch.device) -> None:
    """In heads of an odd size, the last pair of columns would reach into the next head."""
    table, one, ones = ints([0], device)[None], ints([1], device), partial(torch.ones, device=device)
    kv_cache, rope, x, w = ones(1, 2, 2, 16, 25), ones(8, 2, 12), ones(1, 32), ones(100, 32)
    message = "kv_cache has heads of 25 columns, but this number must be even"
    with pytest.raises(ValueError, match=message):
        rope_append(rope, one, one, table, ones(1, 8 * 25), kv_cache)
    with pytest.raises(ValueError, match=message):
        norm_qkv_append(x, x[0], w, w[:50], w[:50], rope, table, one, ones(1, 100), kv_cache, 1e-5, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_cache": torch.ones(9, 2, 2, 24, 32)}, ValueError, "pages of 24 tokens but must have 16, 32, 64 or 128"),
        (
            {"kv_cache": torch.ones(9, 2, 3, 16, 32)},
            ValueError,
            r"q has 128 columns but must have H \* 32, with H a multiple of 3",
        ),
        (
            {"kv_cache": torch.ones(9, 2, 2, 16, 32).half()},
            TypeError,
            "kv_cache is torch.float16 but must be torch.float32",
        ),
        ({"block_table": torch.zeros(2, 5).long()}, TypeError, "block_table is torch.int64 but must be torch.int32"),
        ({"lengths": torch.zeros(3).int()}, ValueError, r"lengths is \[3\] but must be \[2\]"),
        ({"window": -1}, ValueError, "window is -1"),
        (
            {"max_seq_len": 64},
            ValueError,
            "block_table has 5 pages of 16 tokens per request but must have at most 4, because max_seq_len is 64",
        ),
    ],
)
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str, device: torch.device) -> None:
    kv_cache, table, lengths = cache([70, 33], 2, 16, 32, torch.float32, device)
    arguments = {"q": random(2, 128, device=device), "kv_cache": kv_cache, "block_table": table, "lengths": lengths}
    with pytest.raises(error, match=message):
        paged_attention(**(arguments | {"window": 0, "max_seq_len": 128} | moved(change, device)))
