"""The backbone's last norm and its bookkeeping at the shapes of the public model."""

from typing import Any

import torch
from torch import Tensor

from bench.registry import Case, Entry, Maker
from voxkern.kernels.backbone import advance, rms_norm
from voxkern.reference.config import END_AUDIO
from voxkern.reference.linear import rms_norm as rms_norm_reference


def rms_norm_inputs(s: Any, make: Maker) -> dict[str, Any]:
    """A weight near 1."""
    return {"x": make(s.M, s.K), "weight": make(s.K, mean=1.0, std=0.1), "eps": 1e-5}


def advance_reference(
    codes: Tensor, limits: Tensor, lengths: Tensor, frames: Tensor, said: Tensor, kept: Tensor
) -> None:
    """Request by request."""
    for b, frame in enumerate(codes):
        kept[b] = lengths[b] != 0 and frame[0] != END_AUDIO
        if not kept[b]:
            lengths[b] = 0
            continue
        said[b] = frame
        frames[b] += 1
        lengths[b] = 0 if frames[b] == limits[b] else lengths[b] + 1


def advance_inputs(s: Any, make: Maker) -> dict[str, Any]:
    """Requests that go on, that are not there, that end, and that are at their limit, in turn."""
    i = torch.arange(s.B)
    codes = (i[:, None] + torch.arange(s.K)) % 20 + 2
    codes[i % 4 == 2, 0] = END_AUDIO
    frames = i % s.max_frames
    made = {
        "codes": codes,
        "limits": (frames + 1).where(i % 4 == 3, s.max_frames),
        "lengths": (i + 5).where(i % 4 != 1, 0).int(),
        "frames": frames,
        "said": torch.full((s.B, s.K), -1),
        "kept": torch.full((s.B,), -1),
    }
    return {name: tensor.to(make.device) for name, tensor in made.items()}


ENTRIES = [
    Entry(
        op=rms_norm,
        reference=rms_norm_reference,
        inputs=rms_norm_inputs,
        cases=(
            Case("odd", {"M": 5, "K": 150}),
            Case("odd-wide", {"M": 3, "K": 3001}),
            Case("b1", {"M": 1, "K": 3072}, public=True),
            Case("b32", {"M": 32, "K": 3072}, public=True, dtypes=("bf16",)),
        ),
        stage=lambda c: 0,
        once=(),
        product=False,
    ),
    Entry(
        op=advance,
        reference=advance_reference,
        inputs=advance_inputs,
        cases=(
            Case("odd", {"B": 7, "K": 37, "max_frames": 3}, dtypes=("bf16",)),
            Case("odd-codes", {"B": 13, "K": 9, "max_frames": 50}, dtypes=("bf16",)),
            Case("b1", {"B": 1, "K": 37, "max_frames": 2048}, public=True, dtypes=("bf16",)),
            Case("b32", {"B": 32, "K": 37, "max_frames": 2048}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 0,
        once=(),
        alike=False,
        product=False,
    ),
]
