"""The decode state's update after a frame: which requests go on, and with how many tokens."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import END_AUDIO
from .launch_config import FP_FUSION
from .operator import expect, expect_batch, operator

__all__ = ["update_decode_state"]


@triton.jit(
    do_not_specialize_on_alignment=["p_codes", "p_max_frames", "p_lengths", "p_n_frames", "p_last_codes", "p_valid"],
)
def _update_decode_state_kernel(
    p_codes, p_max_frames, p_lengths, p_n_frames, p_last_codes, p_valid, K: tl.constexpr, COLUMNS: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    length, frame = tl.load(p_lengths + i_b), tl.load(p_n_frames + i_b)
    semantic = tl.load(p_codes + i_b * K)
    if length == 0 or semantic == END_AUDIO:
        tl.store(p_valid + i_b, 0)
        tl.store(p_lengths + i_b, 0)
        return
    o_k = tl.arange(0, COLUMNS)
    b_codes = tl.load(p_codes + i_b * K + o_k, mask=o_k < K, other=0)
    tl.store(p_last_codes + i_b * K + o_k, b_codes, mask=o_k < K)
    tl.store(p_valid + i_b, 1)
    tl.store(p_n_frames + i_b, frame + 1)
    is_last = frame + 1 >= tl.load(p_max_frames + i_b)
    tl.store(p_lengths + i_b, tl.where(is_last, 0, length + 1))


def launch_update_decode_state(
    codes: Tensor, max_frames: Tensor, lengths: Tensor, n_frames: Tensor, last_codes: Tensor, valid: Tensor
) -> None:
    """The arguments are those of :func:`update_decode_state`, unchecked."""
    B, K = codes.shape
    constants: dict[str, Any] = {
        "K": K,
        "COLUMNS": triton.next_power_of_2(K),
        "num_warps": 1,
        "enable_fp_fusion": FP_FUSION,
    }
    _update_decode_state_kernel[(B,)](codes, max_frames, lengths, n_frames, last_codes, valid, **constants)


@operator(launch_update_decode_state, mutates=("lengths", "n_frames", "last_codes", "valid"))
def update_decode_state(
    codes: Tensor, max_frames: Tensor, lengths: Tensor, n_frames: Tensor, last_codes: Tensor, valid: Tensor
) -> None:
    """Keep a frame's codes and move on to the next frame, on the device: no frame waits for the host to see END.

    A request of length 0 is not there, and its codes are left alone. One whose semantic code is END, or whose frame was
    its last, gets length 0 from here on: END's own frame is not kept. All others get a frame and a token more.

    Args:
        codes: int64 [B, 1 + K] with the +2 offset, semantic first.
        max_frames: int64 [B], the most frames of each request.
        lengths: int32 [B], tokens in the cache, then with the next frame's.
        n_frames: int64 [B], frames kept so far.
        last_codes: int64 [B, 1 + K], the last frame that was kept.
        valid: int64 [B], whether this one is: 1 or 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong.
    """
    B, K = expect("last_codes", last_codes, ("B", "1 + K"), dtype=torch.int64)
    expect_batch("last_codes", B, 1, 64)
    expect("codes", codes, (B, K), like=last_codes)
    expect("max_frames", max_frames, (B,), like=last_codes)
    expect("lengths", lengths, (B,), like=last_codes, dtype=torch.int32)
    expect("n_frames", n_frames, (B,), like=last_codes)
    expect("valid", valid, (B,), like=last_codes)
