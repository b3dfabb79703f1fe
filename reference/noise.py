"""The flow head's initial noise, which depends only on a request's seed and on the frame's number in the request.

The generator is the counter-based Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011). The key is the 64-bit seed, and the counter is (codebook // 4, frame, 0, 0). One call of Philox returns the
random words of four codebooks. A table of quantiles turns each word into a standard normal. Only integer arithmetic
and the table are used, so the kernels' noise and this noise have the same bits on every machine.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

QUANTILE_BITS = 16  # the table's outermost quantile is 4.3 sigma, and the table's variance is 1 - 2e-5
_LOW = 0xFFFFFFFF


def seed_tensor(seeds: Iterable[int]) -> Tensor:
    """Return B seeds, each in 0 .. 2^64 - 1, as an int64 tensor [B] with the same 64 bits.

    Raises:
        ValueError: a seed is outside 0 .. 2^64 - 1.
    """
    seeds = list(seeds)
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2^64 - 1, got {seed}")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], dtype=torch.int64, device="cpu")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Run the ten rounds of Philox4x32-10.

    Args:
        counter: four int64 tensors of 32-bit words.
        key: two int64 tensors of 32-bit words.

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # an int64 product wraps modulo 2^64, so its 64 bits are those of the unsigned product
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) & _LOW ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def noise_words(seed: Tensor, frame: Tensor, n_codebooks: int) -> Tensor:
    """Return one random 32-bit word per request and acoustic codebook, for one frame of each request.

    Args:
        seed: int64 [B], see :func:`seed_tensor`.
        frame: int [B], number of the frame in the request, counted from 0.
        n_codebooks: number K of acoustic codebooks.

    Returns:
        int64 [B, K], each in 0 .. 2^32 - 1.
    """
    frame = frame.long().unsqueeze(1)
    call = torch.arange(-(-n_codebooks // 4), device=seed.device).unsqueeze(0)
    zero = torch.zeros_like(frame)
    key = (seed.unsqueeze(1) & _LOW, (seed.unsqueeze(1) >> 32) & _LOW)
    words = philox((call, frame, zero, zero), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :n_codebooks]  # [B, K]


@cache
def quantile_table() -> Tensor:
    """Return the standard normal quantiles at (i + 1/2) / 2^16 for i from 0 to 65535, fp32 [65536]."""
    n = 1 << QUANTILE_BITS
    quantiles: Tensor = torch.special.ndtri((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n)
    return quantiles.float()


def noise(seed: Tensor, frame: Tensor, n_codebooks: int) -> Tensor:
    """Return the initial noise of one frame of each request: standard normals, fp32 [B, K].

    The arguments are those of :func:`noise_words`.
    """
    index = noise_words(seed, frame, n_codebooks) >> (32 - QUANTILE_BITS)
    return quantile_table().to(seed.device)[index]
