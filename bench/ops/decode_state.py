"""Registry entry of the decode state's update after a frame, at the shapes of the public model."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.decode_state import update_decode_state
from voxkern.reference.config import END_AUDIO, N_SPECIAL_CODES, NOT_FINITE


def update_decode_state_reference(
    codes: Tensor, max_frames: Tensor, lengths: Tensor, n_frames: Tensor, last_codes: Tensor, valid: Tensor
) -> None:
    """Update the decode state request by request, in place."""
    for b, frame in enumerate(codes):
        if lengths[b] != 0:
            last_codes[b] = frame - N_SPECIAL_CODES
        valid[b] = lengths[b] != 0 and int(frame[0]) not in (END_AUDIO, NOT_FINITE)
        if not valid[b]:
            lengths[b] = 0
            continue
        n_frames[b] += 1
        lengths[b] = 0 if n_frames[b] == max_frames[b] else lengths[b] + 1


def update_decode_state_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments in which requests in turn continue, are absent, end with END, and end at `max_frames`."""
    i = torch.arange(s.B)
    codes = (i[:, None] + torch.arange(s.K)) % 20 + 2
    codes[i % 4 == 2, 0] = END_AUDIO
    n_frames = i % s.max_frames
    made = {
        "codes": codes,
        "max_frames": (n_frames + 1).where(i % 4 == 3, s.max_frames),
        "lengths": (i + 5).where(i % 4 != 1, 0).int(),
        "n_frames": n_frames,
        "last_codes": torch.full((s.B, s.K), -1),
        "valid": torch.full((s.B,), -1),
    }
    return {name: tensor.to(make.device) for name, tensor in made.items()}


ENTRIES = [
    Entry(
        op=update_decode_state,
        reference=update_decode_state_reference,
        inputs=update_decode_state_inputs,
        cases=(
            Case("odd", {"B": 7, "K": 37, "max_frames": 3}, dtypes=("bf16",)),
            Case("odd-codes", {"B": 13, "K": 9, "max_frames": 50}, dtypes=("bf16",)),
            Case("b1", {"B": 1, "K": 37, "max_frames": 2048}, public=True, dtypes=("bf16",)),
            Case("b32", {"B": 32, "K": 37, "max_frames": 2048}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
        uses_matrix_unit=False,
    ),
]
