"""Registry entries of the codec decoder's kernels, on chunks of frames at the shapes of the public model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.registry import Args, Case, Entry, TensorMaker
from voxkern.kernels.codec import PAD_MODES, codec_conv, codec_dequantise, codec_update_state
from voxkern.reference.codec_stream import last_rows
from voxkern.reference.layers import upcast


def chunk_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return the frame counts and the parity of a chunk.

    The requests in turn have decoded 0, 1 or 32 frames before the chunk. In the chunk they in turn have `s.T`,
    `s.T` - 1 and so on down to 0 frames.
    """
    i = torch.arange(s.B)
    made = {
        "past_frames": (i % 3) ** 5,
        "new_frames": s.T - i % (s.T + 1),
        "parity": torch.ones(1, dtype=torch.int32),
    }
    return {name: tensor.to(make.device) for name, tensor in made.items()}


def codec_dequantise_reference(
    codes: Tensor, new_frames: Tensor, embedding_sum: Tensor, cluster_usage: Tensor, levels: int
) -> Tensor:
    """Dequantise codes as the reference's quantiser does; codes beyond a request's new frames count as 0."""
    is_valid = torch.arange(codes.shape[2], device=codes.device) < new_frames.unsqueeze(1)
    codes = codes.where(is_valid.unsqueeze(1), 0)
    semantic = upcast(embedding_sum)[codes[:, 0]] / upcast(cluster_usage)[codes[:, 0]].clamp(min=1e-5).unsqueeze(-1)
    acoustic = codes[:, 1:].transpose(1, 2).to(semantic.dtype) * (2 / (levels - 1)) - 1
    return torch.cat((semantic, acoustic), dim=2).to(embedding_sum.dtype).flatten(0, 1)


def codec_dequantise_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with invalid codes beyond each request's new frames, and a codebook vector with usage 0."""
    new_frames = chunk_inputs(s, make)["new_frames"]
    b, k, t = torch.meshgrid(torch.arange(s.B), torch.arange(1 + s.K), torch.arange(s.T), indexing="ij")
    codes = (7 * b + 3 * k + 5 * t) % min(s.size, 21)
    usage = make(s.size, mean=5.0)
    usage[min(s.size, 21) // 2] = 0.0
    return {
        "codes": codes.to(make.device).where(t.to(make.device) < new_frames.view(-1, 1, 1), -(1 << 40)),
        "new_frames": new_frames,
        "embedding_sum": make(s.size, s.dim) * usage.clamp(min=1e-5).unsqueeze(1),
        "cluster_usage": usage,
        "levels": 21,
    }


def codec_conv_reference(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    past_frames: Tensor,
    new_frames: Tensor,
    parity: Tensor,
    rate: int,
    pad_mode: str,
) -> None:
    """Convolve a chunk: multiply each window of n + 1 rows by the weight. The first windows begin before the chunk.

    The results are written to `y`, and the last n rows to `conv_state`.
    """
    B, n, K = conv_state.shape[1:]
    now, x = int(parity), x.view(B, -1, K)
    missing = {
        "zero": torch.zeros_like(x[:, :1]).expand(-1, n, -1),
        "replicate": x[:, :1].expand(-1, n, -1),
        "reflect": x[:, 1 : n + 1].flip(1),
    }[pad_mode]
    rows = torch.cat(
        (torch.where((past_frames == 0).view(-1, 1, 1), missing, conv_state[now]), x), dim=1
    )  # [B, n + T, K]
    windows = rows.unfold(1, n + 1, 1).transpose(2, 3).flatten(2)  # [B, T, (n + 1) K]
    is_valid = torch.arange(x.shape[1], device=x.device) < (new_frames * rate).unsqueeze(1)
    y.copy_((F.linear(windows.to(weight.dtype), weight) * is_valid.unsqueeze(2)).flatten(0, 1))
    conv_state[1 - now] = last_rows(rows, new_frames * rate, n)


def codec_conv_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments for a convolution over each row and the `s.n` rows before it.

    `s.pad_mode` is an index into PAD_MODES. With `s.narrow` other than 0, `x` and `conv_state` are bf16, and the weight
    keeps its dtype.
    """
    M, narrow = s.B * s.T * s.rate, getattr(s, "narrow", 0)
    x, conv_state = make(M, s.K), make(2, s.B, s.n, s.K)
    return {
        "y": make(M, s.N),
        "x": x.bfloat16() if narrow else x,
        "weight": make(s.N, (s.n + 1) * s.K, std=((s.n + 1) * s.K) ** -0.5),
        "conv_state": conv_state.bfloat16() if narrow else conv_state,
        "rate": s.rate,
        "pad_mode": PAD_MODES[s.pad_mode],
        **chunk_inputs(s, make),
    }


def codec_update_state_reference(new_frames: Tensor, past_frames: Tensor, parity: Tensor) -> None:
    """Add the chunk's frames to `past_frames` and flip the parity, in place."""
    past_frames += new_frames
    parity.copy_(1 - parity)


FIRST = {"N": 1024, "K": 292, "n": 2, "pad_mode": 1, "rate": 1}
UP = {"N": 2048, "K": 1024, "n": 1, "pad_mode": 0}
SOUND = {"N": 240, "K": 1024, "n": 6, "pad_mode": 2, "rate": 8}


def _n_frames(args: Args) -> int:
    return int(args["codes"].shape[0] * args["codes"].shape[2])


ENTRIES = [
    Entry(
        op=codec_dequantise,
        reference=codec_dequantise_reference,
        inputs=codec_dequantise_inputs,
        cases=(
            Case("odd", {"B": 3, "T": 5, "dim": 24, "K": 36, "size": 62}),
            Case("odd-few", {"B": 5, "T": 3, "dim": 75, "K": 5, "size": 7}),
            Case("b1", {"B": 1, "T": 1, "dim": 256, "K": 36, "size": 8192}, public=True, dtypes=("bf16",)),
            Case("b32", {"B": 32, "T": 1, "dim": 256, "K": 36, "size": 8192}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
        uses_matrix_unit=False,
        partly={
            "embedding_sum": lambda args: _n_frames(args) * int(args["embedding_sum"].shape[1]),
            "cluster_usage": _n_frames,
        },
    ),
    Entry(
        op=codec_conv,
        reference=codec_conv_reference,
        inputs=codec_conv_inputs,
        cases=(
            Case("odd", {"B": 5, "T": 3, "N": 50, "K": 75, "n": 2, "pad_mode": 1, "rate": 1}),
            Case("odd-reflect", {"B": 3, "T": 2, "N": 37, "K": 70, "n": 6, "pad_mode": 2, "rate": 8}),
            Case(
                "odd-narrow",
                {"B": 3, "T": 2, "N": 37, "K": 70, "n": 6, "pad_mode": 2, "rate": 8, "narrow": 1},
                dtypes=("fp32",),
            ),
            Case("odd-zero", {"B": 7, "T": 3, "N": 66, "K": 129, "n": 1, "pad_mode": 0, "rate": 2}),
            Case("up-b1", {"B": 1, "T": 1, **UP, "rate": 4}, public=True, dtypes=("bf16",)),
            Case("up-b32", {"B": 32, "T": 1, **UP, "rate": 4}, public=True, dtypes=("bf16",)),
            Case("first-b1", {"B": 1, "T": 1, **FIRST}, public=True, dtypes=("bf16",)),
            Case("sound-b1", {"B": 1, "T": 1, **SOUND}, public=True, dtypes=("fp32",)),
            Case("sound-narrow-b1", {"B": 1, "T": 1, **SOUND, "narrow": 1}, public=True, dtypes=("fp32",)),
        ),
        rows="B",
        regular_grid=False,
    ),
    Entry(
        op=codec_update_state,
        reference=codec_update_state_reference,
        inputs=lambda s, make: chunk_inputs(s, make),
        cases=(
            Case("odd", {"B": 7, "T": 3}, dtypes=("bf16",)),
            Case("odd-one", {"B": 1, "T": 5}, dtypes=("bf16",)),
            Case("b1", {"B": 1, "T": 1}, public=True, dtypes=("bf16",)),
            Case("b32", {"B": 32, "T": 1}, public=True, dtypes=("bf16",)),
        ),
        rows="B",
        stage=lambda c: 0,
        read_once=(),
        regular_grid=False,
        uses_matrix_unit=False,
    ),
]
