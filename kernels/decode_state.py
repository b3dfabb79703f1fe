"""The update of the decode state after a frame: which requests continue, and how many tokens each one has.

For each request b, with its N codes of this frame, the semantic one first::

    lengths[b] == 0                     valid = 0                   no request, nothing else changes
    otherwise                           last_codes = codes - 2, and:
        codes[b, 0] == END              valid = 0, lengths = 0      the request ends, without this frame
        codes[b, 0] == NOT_FINITE       valid = 0, lengths = 0      the request fails: the frame has NaN or infinity
        any other code                  valid = 1, n_frames += 1    the frame is kept
                                        lengths = 0 if n_frames >= max_frames else lengths + 1

One block of one warp updates one request: a row of 37 codes and four numbers. The update runs on the device, so no
frame waits for the host to read END. The host later reads from `last_codes` why a request is over. `last_codes` has no
+2 offset, because neither the codec nor a sound's codes have it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import END_AUDIO, N_SPECIAL_CODES, NOT_FINITE
from .launch_config import launch_options
from .operator import expect, expect_batch, operator
from .overlap import OFF, wait_for_launches

__all__ = ["update_decode_state"]


@triton.jit(
    do_not_specialize_on_alignment=["p_codes", "p_max_frames", "p_lengths", "p_n_frames", "p_last_codes", "p_valid"],
)
def _update_decode_state_kernel(
    p_codes, p_max_frames, p_lengths, p_n_frames, p_last_codes, p_valid, N: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_b = tl.program_id(0).to(tl.int64)
    length, frame = tl.load(p_lengths + i_b), tl.load(p_n_frames + i_b)
    semantic = tl.load(p_codes + i_b * N)
    o_n = tl.arange(0, COLUMNS)
    m_n = o_n < tl.where(length == 0, 0, N)
    b_codes = tl.load(p_codes + i_b * N + o_n, mask=m_n, other=0)
    tl.store(p_last_codes + i_b * N + o_n, b_codes - N_SPECIAL_CODES, mask=m_n)
    length = tl.where(semantic == NOT_FINITE, 0, length)
    if length == 0 or semantic == END_AUDIO:
        tl.store(p_valid + i_b, 0)
        tl.store(p_lengths + i_b, 0)
        return
    tl.store(p_valid + i_b, 1)
    tl.store(p_n_frames + i_b, frame + 1)
    is_last = frame + 1 >= tl.load(p_max_frames + i_b)
    tl.store(p_lengths + i_b, tl.where(is_last, 0, length + 1))


def launch_update_decode_state(
    codes: Tensor, max_frames: Tensor, lengths: Tensor, n_frames: Tensor, last_codes: Tensor, valid: Tensor
) -> None:
    """Run :func:`update_decode_state` without checking the arguments."""
    B, N = codes.shape
    constants = launch_options() | {"N": N, "COLUMNS": triton.next_power_of_2(N), "num_warps": 1}
    _update_decode_state_kernel[(B,)](codes, max_frames, lengths, n_frames, last_codes, valid, **constants)


@operator(launch_update_decode_state, mutates=("lengths", "n_frames", "last_codes", "valid"))
def update_decode_state(
    codes: Tensor, max_frames: Tensor, lengths: Tensor, n_frames: Tensor, last_codes: Tensor, valid: Tensor
) -> None:
    """Keep the codes of a frame, and update each request's state for the next frame.

    Length 0 means that a row has no running request; the row's codes are ignored. If the semantic code is END or
    NOT_FINITE (-1), the request gets length 0, and this frame is not kept. A request that reaches its `max_frames`
    keeps this frame and gets length 0. Any other request keeps this frame and gets one token more.

    Args:
        codes: int64 [B, N], the codes of this frame with the +2 offset, the semantic code first (N = 37).
        max_frames: int64 [B], the most frames that each request may have.
        lengths: int32 [B], tokens in the KV cache; updated to include the next frame's token.
        n_frames: int64 [B], the number of frames kept so far; updated.
        last_codes: int64 [B, N], receives `codes` of each request without the +2 offset, also of a frame that is not
            kept.
        valid: int64 [B], receives 1 where this frame is kept, 0 elsewhere.

    Raises:
        ValueError: B is not in 1..64.
    """
    B, N = expect("last_codes", last_codes, ("B", "N"), dtype=torch.int64)
    expect_batch("last_codes", B, 1, 64)
    expect("codes", codes, (B, N), like=last_codes)
    expect("max_frames", max_frames, (B,), like=last_codes)
    expect("lengths", lengths, (B,), like=last_codes, dtype=torch.int32)
    expect("n_frames", n_frames, (B,), like=last_codes)
    expect("valid", valid, (B,), like=last_codes)
