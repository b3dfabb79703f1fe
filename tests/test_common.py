"""Tests of the device functions in kernels/common.py, each through a small kernel."""

import random

import pytest
import torch
import triton
import triton.language as tl

from voxkern.kernels.common import cast, dot, normals, philox, round_half_even

B = 256


@triton.jit
def _cast_kernel(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, cast(tl.load(p_x + o), p_y.dtype.element_ty))


@triton.jit
def _round_kernel(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, round_half_even(tl.load(p_x + o)))


@triton.jit
def _dot_kernel(p_a, p_b, p_c, B: tl.constexpr):
    o_m, o_n = tl.arange(0, B)[:, None] * B, tl.arange(0, B)[None, :]
    b_c = dot(tl.load(p_a + o_m + o_n), tl.load(p_b + o_m + o_n), tl.load(p_c + o_m + o_n))
    tl.store(p_c + o_m + o_n, b_c)


@triton.jit
def _noise_kernel(p_seed, p_frame, p_table, p_words, p_normals, GROUPS: tl.constexpr):
    o_g = tl.arange(0, GROUPS)
    seed, frame = tl.load(p_seed), tl.load(p_frame)
    b_w0, b_w1, b_w2, b_w3 = philox(seed, frame, o_g)
    tl.store(p_words + 4 * o_g, b_w0.to(tl.int64))
    tl.store(p_words + 4 * o_g + 1, b_w1.to(tl.int64))
    tl.store(p_words + 4 * o_g + 2, b_w2.to(tl.int64))
    tl.store(p_words + 4 * o_g + 3, b_w3.to(tl.int64))
    b_n0, b_n1, b_n2, b_n3 = normals(seed, frame, o_g, p_table)
    tl.store(p_normals + 4 * o_g, b_n0)
    tl.store(p_normals + 4 * o_g + 1, b_n1)
    tl.store(p_normals + 4 * o_g + 2, b_n2)
    tl.store(p_normals + 4 * o_g + 3, b_n3)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_as_torch_does(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (64 * B,), generator=generator).int()
    bits[: 8 * B] = bits[: 8 * B] & ~0x7FFF  # about half are ties of bf16
    x = bits.view(torch.float32)
    x[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    x = x.to(device)
    y = torch.empty(len(x), dtype=dtype, device=device)
    for part in range(0, len(x), B):
        _cast_kernel[(1,)](x[part:], y[part:], B)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_round_half_even_on_every_tie_of_the_codes(device: torch.device) -> None:
    x = (torch.arange(B, device=device) - B // 2).float() / 2
    y = torch.empty(B, device=device)
    _round_kernel[(1,)](x, y, B)
    assert torch.equal(y, torch.round(x))
    x = torch.nextafter(x, torch.tensor(float("inf"), device=device))
    _round_kernel[(1,)](x, y, B)
    assert torch.equal(y, torch.round(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_sums_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in (0, 1))
    c = torch.full((32, 32), 1000.0, device=device)
    expected = c.double() + a.double() @ b.double()
    _dot_kernel[(1,)](a, b, c, 32)
    torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=0)


def philox_in_integers(key: int, counter: list[int]) -> list[int]:
    """Return the four words of Philox4x32-10 (Salmon et al., SC 2011), computed in Python's integers."""
    c, (k0, k1), mask = counter, (key & 0xFFFFFFFF, key >> 32), 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def test_philox_in_integers_gives_the_published_answers() -> None:
    assert philox_in_integers(0, [0, 0, 0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    key, counter = 0x299F31D0A4093822, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox_in_integers(key, counter) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1, -1, random.Random(3).getrandbits(62)])
def test_noise_is_philox_through_the_quantiles_of_the_normal(seed: int, device: torch.device) -> None:
    groups, frame = 16, 1234
    table = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float().to(device)
    words = torch.empty(4 * groups, dtype=torch.int64, device=device)
    noise = torch.empty(4 * groups, device=device)
    key, counter = torch.tensor([seed], device=device), torch.tensor([frame], device=device)
    _noise_kernel[(1,)](key, counter, table, words, noise, groups)
    expected = [w for group in range(groups) for w in philox_in_integers(seed % 2**64, [group, frame, 0, 0])]
    assert words.tolist() == expected
    assert torch.equal(noise, table[words >> 16])
