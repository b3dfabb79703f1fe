"""Tests of paged attention at the lengths, head groups, head sizes, pages and windows where kernels tend to fail."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from bench.ops.accuracy import judge
from bench.ops.paged_attention import paged_attention_reference, poisoned, prefill_attention_reference
from bench.ops.qkv import pages_of, rope_append_reference, rope_of
from bench.static.counters import counting
from voxkern.kernels import launch_config
from voxkern.kernels.paged_attention import (
    launch_paged_attention,
    paged_attention,
    paged_attention_scratch,
    prefill_attention,
    span_of,
)
from voxkern.kernels.qkv import norm_qkv_append, rope_append

LENGTHS = [300, 0, 1, 63, 64, 1000, 65]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache(lengths: list[int], heads: int, page: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kv_cache [pages, 2, heads, page, D], a block table and the lengths, int32.

    Pages are shuffled, and the places in a page without a token hold NaN.
    """
    on_device, table = pages_of(lengths, page, "cpu")
    pages = 2 * sum(-(-length // page) for length in lengths) + 1
    return poisoned(random(pages, 2, heads, page, D, dtype=dtype), table, lengths), table, on_device


def assert_accurate(out: Tensor, plain: Tensor, truth: Tensor) -> None:
    verdict = judge(out, plain, truth)
    assert verdict.right, str(verdict)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 6])
def test_decode_is_right(group: int, D: int, page: int, dtype: str) -> None:
    assert_decode_is_right(group, D, page, dtype)


def test_decode_is_right_in_pages_of_128() -> None:
    assert_decode_is_right(6, 64, 128, "bf16")


def assert_decode_is_right(group: int, D: int, page: int, dtype: str) -> None:
    kv_cache, table, lengths = cache(LENGTHS, 2, page, D, DTYPES[dtype])
    q = random(len(LENGTHS), 2 * group * D, dtype=DTYPES[dtype], seed=1)
    with launch_config.target_arch("sm_90" if page >= 64 else "interpreter"):
        out = paged_attention(q, kv_cache, table, lengths, 0, 1024)
    truth = paged_attention_reference(q.double(), kv_cache.double(), table, lengths, 0, 1024)
    assert_accurate(out, paged_attention_reference(q, kv_cache, table, lengths, 0, 1024), truth)
    assert not out[1].any()  # the request of length 0


@pytest.mark.parametrize("window", [1, 7, 64, 300])
def test_a_window_is_all_that_is_seen(window: int) -> None:
    """A query sees only the last `window` tokens: the keys and values before the window may be anything, even NaN.

    The windows range from shorter than a tile to longer than a span of 256 tokens.
    """
    kv_cache, table, lengths = cache(LENGTHS, 2, 16, 64, torch.float32)
    for pages, length in zip(table.tolist(), LENGTHS, strict=True):
        for position in range(max(length - window, 0)):
            kv_cache[pages[position // 16], :, :, position % 16] = torch.nan
    q = random(len(LENGTHS), 6 * 64, seed=2)
    out = paged_attention(q, kv_cache, table, lengths, window, 1024)
    truth = torch.zeros_like(out, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        if length:
            positions = torch.arange(max(length - window, 0), length)
            k, v = kv_cache[table[b, positions // 16].long(), :, :, positions % 16].double().unbind(1)  # [S, Hkv, D]
            heads = q[b].double().view(2, 3, 64)
            p = (torch.einsum("hgd,shd->hgs", heads, k) / 8).softmax(-1)
            truth[b] = torch.einsum("hgs,shd->hgd", p, v).flatten()
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("group", "D", "page", "window"), [(1, 64, 16, 0), (4, 128, 64, 0), (6, 64, 64, 9)])
def test_prefill_is_right(group: int, D: int, page: int, window: int, dtype: str) -> None:
    """One launch runs prompts of different lengths, of which one is empty and one continues after 100 tokens.

    One case has a window that is shorter than a tile.
    """
    new, past = [65, 0, 1, 63, 30], [0, 0, 0, 0, 100]
    wanted = [a + b for a, b in zip(new, past, strict=True)]
    kv_cache, table, lengths = cache(wanted, 2, page, D, DTYPES[dtype])
    cu_seqlens = torch.tensor([0, *new]).cumsum(0).int()
    q = random(sum(new), 2 * (group + 2) * D, dtype=DTYPES[dtype], seed=3)
    arguments = (table, cu_seqlens, lengths, window, max(new), 2 * group)
    with launch_config.target_arch("sm_90" if page == 64 else "interpreter"):
        out = prefill_attention(q, kv_cache, *arguments)
    truth = prefill_attention_reference(q.double(), kv_cache.double(), *arguments)
    assert_accurate(out, prefill_attention_reference(q, kv_cache, *arguments), truth)


def test_prefill_is_right_for_many_tokens() -> None:
    """300 tokens fill 19 pages.

    With 6 query heads per key head, each token takes 8 columns of a tile, two of them empty.
    """
    kv_cache, table, lengths = cache([300], 1, 16, 128, torch.bfloat16)
    cu_seqlens, q = torch.tensor([0, 300], dtype=torch.int32), random(300, 8 * 128, dtype=torch.bfloat16, seed=7)
    arguments = (table, cu_seqlens, lengths, 0, 300, 6)
    with launch_config.target_arch("sm_90"):
        out = prefill_attention(q, kv_cache, *arguments)
    truth = prefill_attention_reference(q.double(), kv_cache.double(), *arguments)
    assert_accurate(out, prefill_attention_reference(q, kv_cache, *arguments), truth)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("window", [0, 20, 64])
def test_a_prefill_in_parts_is_the_whole(window: int, arch: str) -> None:
    """A prompt run in parts gives the same bits as in one launch, wherever the parts begin."""
    kv_cache, table, _ = cache([130], 2, 16, 32, torch.bfloat16)
    q, parts, done = random(130, 8 * 32, dtype=torch.bfloat16, seed=8), [], 0

    def prefill(first: int, end: int) -> Tensor:
        cu_seqlens = torch.tensor([0, end - first], dtype=torch.int32)
        return prefill_attention(
            q[first:end], kv_cache, table, cu_seqlens, torch.tensor([end], dtype=torch.int32), window, end - first, 4
        )

    with launch_config.target_arch(arch):
        for part in (17, 33, 1, 50, 29):
            parts.append(prefill(done, done + part))
            done += part
        assert torch.equal(torch.cat(parts), prefill(0, 130))


def test_a_prefill_row_of_no_request_gives_zeros() -> None:
    """In a padded batch, a request of length 0 may have rows.

    These rows give zeros, and the request's block table entries are never read.
    """
    kv_cache, table, _ = cache([10, 16], 2, 16, 32, torch.float32)
    table[1] = 1 << 30
    cu_seqlens, lengths = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([10, 0], dtype=torch.int32)
    out = prefill_attention(random(8, 8 * 32, seed=9), kv_cache, table, cu_seqlens, lengths, 0, 5, 4)
    assert out[:3].all()
    assert not out[3:].any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.sampled_from([16, 32]),
    st.sampled_from([(1, 1), (2, 2), (3, 1)]),
    st.integers(0, 100),
)
def test_any_lengths(wanted: list[int], page: int, heads: tuple[int, int], window: int) -> None:
    """Decode agrees with fp64, and so does a prefill of one query that ends at the same token."""
    group, kv = heads
    kv_cache, table, lengths = cache(wanted, kv, page, 8, torch.float32)
    q = random(len(wanted), group * kv * 8, seed=4)
    out = paged_attention(q, kv_cache, table, lengths, window, 96)
    truth = paged_attention_reference(q.double(), kv_cache.double(), table, lengths, window, 96)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    cu_seqlens = torch.tensor([0, *[min(n, 1) for n in wanted]]).cumsum(0).int()
    if cu_seqlens[-1]:
        there = [i for i, n in enumerate(wanted) if n]
        one = prefill_attention(q[there], kv_cache, table, cu_seqlens, lengths, window, 1, group * kv)
        torch.testing.assert_close(one.double(), truth[there], rtol=1e-5, atol=1e-5)


def test_spans_are_of_the_prepared_length() -> None:
    assert [span_of(n) for n in (1, 4096, 16384, 16385, 262_144)] == [256, 256, 256, 512, 4096]
    kv_cache, table, lengths = cache([1000], 1, 64, 16, torch.float32)
    q = random(1, 32)
    results, scratch = [], paged_attention_scratch(q, kv_cache, 4096)
    for _ in range(2):  # twice: the first launch must leave the counters at zero
        out = torch.full_like(q, torch.nan)
        with counting(whole=True) as launches:
            launch_paged_attention(out, q, kv_cache, table, lengths, 0, 4096, scratch)
        assert launches[0].grid == (4, 1, 1)
        assert not scratch[1].any()
        results.append(out)
    assert torch.equal(*results)
    # a batch with a longer request has a wider table: more blocks, the same bits
    wide = torch.cat((table, torch.zeros(1, 40, dtype=torch.int32)), 1)
    assert torch.equal(paged_attention(q, kv_cache, wide, lengths, 0, 4096), results[0])


@pytest.mark.parametrize("shift", [-1, 2], ids=["backwards", "from the third"])
def test_spans_may_end_in_any_order(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that ends last adds up all spans in their own order, so any order of ends gives the same bits."""
    kv_cache, table, lengths = cache([1000, 600], 2, 64, 32, torch.bfloat16)
    q, builder = random(2, 8 * 32, dtype=torch.bfloat16), interpreter.interpreter_builder
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


def test_a_window_at_the_end_of_262_144_tokens() -> None:
    """A window of 4160 tokens reaches over two spans of 4096 tokens.

    All block table entries before the window are the number of one page, which holds NaN.
    """
    PAGE, window, context = 64, 4160, 262_144
    n = window // PAGE
    kv_cache = random(1 + n, 2, 1, PAGE, 64, dtype=torch.bfloat16)
    kv_cache[0] = torch.nan
    table, own = torch.zeros(1, context // PAGE, dtype=torch.int32), torch.arange(1, 1 + n, dtype=torch.int32)
    table[0, -n:] = own
    q, lengths = random(1, 4 * 64, dtype=torch.bfloat16), torch.tensor([context], dtype=torch.int32)
    with launch_config.target_arch("sm_90"), counting(whole=True) as launches:
        out = paged_attention(q, kv_cache, table, lengths, window, context)
    assert launches[0].grid == (64, 1, 1)
    alone = (own.view(1, n), torch.tensor([window], dtype=torch.int32), 0, window)
    truth = paged_attention_reference(q.double(), kv_cache.double(), *alone)
    assert_accurate(out, paged_attention_reference(q, kv_cache, *alone), truth)


def test_offsets_past_two_to_the_31() -> None:
    """The last page starts 2.4e9 elements after the first, where 32-bit offsets would wrap.

    The memory between the pages is never touched.
    """
    PAGE, D, stride = 16, 64, 1_200_000_000
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 2 * PAGE * D)), dtype=torch.float16)
    kv_cache = memory.as_strided((3, 2, 1, PAGE, D), (stride, PAGE * D, PAGE * D, D, 1))
    small = random(3, 2, 1, PAGE, D, dtype=torch.float16)
    table, lengths = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    kv_cache[2], kv_cache[1] = small[2], small[1]
    q = random(1, 2 * D, dtype=torch.float16)
    out = paged_attention(q, kv_cache, table, lengths, 0, 32)
    assert torch.equal(out, paged_attention(q, small, table, lengths, 0, 32))
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(prefill_attention(q, kv_cache, table, cu_seqlens, lengths, 0, 1, 2), out)

    rope, qkv = rope_of(32, D, "cpu"), random(1, 4 * D, dtype=torch.float16, seed=5)
    requests, positions = torch.zeros(1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    for cache_of_mine in (kv_cache, small):
        rope_append(rope, requests, positions, table, qkv.clone(), cache_of_mine)
    assert torch.equal(kv_cache[2], small[2])
    x, w = random(1, 32, dtype=torch.float16), random(2 * D, 32, dtype=torch.float16)
    for cache_of_mine in (kv_cache, small):
        norm_qkv_append(
            x, x[0], w, w[:D], w[D:], rope, table, torch.tensor([5], dtype=torch.int32), q, cache_of_mine, 1e-5, 1
        )
    assert torch.equal(kv_cache[2], small[2])


def test_other_layouts_are_read_as_they_are() -> None:
    """Kernels read and write a cache that stores tokens before heads, as vLLM's caches do."""
    kv_cache, table, lengths = cache([70, 33], 2, 16, 32, torch.float32)
    other = kv_cache.transpose(2, 3).contiguous().transpose(2, 3)
    assert not other.is_contiguous()
    q = random(2, 128)
    assert torch.equal(
        paged_attention(q, other, table, lengths, 0, 128), paged_attention(q, kv_cache, table, lengths, 0, 128)
    )
    rope, qkv = rope_of(70, 32, "cpu"), random(2, 6 * 32, seed=6)
    requests, positions = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([69, 0], dtype=torch.int32)
    rope_append(rope, requests, positions, table, qkv.clone(), other)
    rope_append_reference(rope, requests, positions, table, qkv.clone(), kv_cache)
    torch.testing.assert_close(other, kv_cache, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_heads_of_an_odd_size_cannot_be_rotated() -> None:
    """In heads of an odd size, the last pair of columns would reach into the next head."""
    table, one = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    kv_cache, rope, x, w = torch.zeros(1, 2, 2, 16, 25), torch.ones(8, 2, 12), torch.ones(1, 32), torch.ones(100, 32)
    message = "kv_cache has heads of 25 columns, but this number must be even"
    with pytest.raises(ValueError, match=message):
        rope_append(rope, one, one, table, torch.ones(1, 8 * 25), kv_cache)
    with pytest.raises(ValueError, match=message):
        norm_qkv_append(x, x[0], w, w[:50], w[:50], rope, table, one, torch.ones(1, 100), kv_cache, 1e-5, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_cache": torch.ones(9, 2, 2, 24, 32)}, ValueError, "pages of 24 tokens but must have 16, 32, 64 or 128"),
        ({"kv_cache": torch.ones(9, 2, 3, 16, 32)}, ValueError, "q has 128 columns but must have a multiple of 3"),
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
def test_errors_name_the_argument(change: dict, error: type[Exception], message: str) -> None:
    kv_cache, table, lengths = cache([70, 33], 2, 16, 32, torch.float32)
    arguments = {"q": random(2, 128), "kv_cache": kv_cache, "block_table": table, "lengths": lengths}
    with pytest.raises(error, match=message):
        paged_attention(**(arguments | {"window": 0, "max_seq_len": 128} | change))
