"""Tests of Philox against its published vectors, and of what the noise depends on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxkern.reference.noise import noise, noise_words, philox, quantile_table, seed_tensor

# counter, key, result: "philox4x32 10" in the file kat_vectors of Random123
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_vectors(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(int(word) for word in philox(_words(*counter), _words(*key))) == expected


def test_layout_of_counter_and_key() -> None:
    seed, frame = 0x299F31D0_A4093822, 0x85A308D3
    words = noise_words(seed_tensor([seed]), torch.tensor([frame]), 36)
    for call in (0, 3, 8):
        expected = philox(_words(call, frame, 0, 0), _words(0xA4093822, 0x299F31D0))
        assert [int(w) for w in words[0, 4 * call : 4 * call + 4]] == [int(w) for w in expected]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_a_row_depends_on_its_seed_and_frame_only(seed: int, frame: int, n: int) -> None:
    alone = noise(seed_tensor([seed]), torch.tensor([frame]), n)
    among = noise(seed_tensor([3, seed, 2**64 - 1]), torch.tensor([7, frame, 0]), n + 3)
    assert torch.equal(alone[0], among[1, :n])
    assert alone.isfinite().all()


def test_neighbouring_seeds_and_frames_differ() -> None:
    x = noise(seed_tensor([0, 1, 2**32, 2**63, 2**64 - 1, 0]), torch.tensor([0, 0, 0, 0, 0, 1]), 36)
    assert len({tuple(row.tolist()) for row in x}) == 6


def test_normal() -> None:
    table = quantile_table().double()
    assert table.diff().gt(0).all()
    assert abs(float(table.square().mean()) - 1) < 3e-5
    assert float((table + table.flip(0)).abs().max()) < 1e-6
    x = noise(seed_tensor(range(20000)), torch.zeros(20000), 36).double()
    # standard errors of 720,000 draws: mean 0.0012, variance 0.0017, kurtosis 0.0058
    assert abs(float(x.mean())) < 0.005
    assert abs(float(x.var()) - 1) < 0.007
    assert abs(float(x.pow(4).mean()) - 3) < 0.03


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="2\\^64"):
        seed_tensor([seed])
