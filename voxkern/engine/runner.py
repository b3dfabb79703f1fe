"""Model runners: the interface that the engine drives, and its implementation on the reference modules.

The same seed gives the same sound, because a request's results do not depend on the other requests. To that end rows
run in zero-padded blocks of a fixed number of rows, and attention runs request by request. On a CPU, the bits of a row
of fp32 ``F.linear`` differ between a row alone, in a batch of 2, and at the end of a batch of 6 (measured). For the
same reason a prompt always runs in two parts, its prefix and the rest, whether or not the cache has the prefix.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from ..packed.linear import weights_version
from ..reference import VoxtralTTS
from ..reference.attention import PagedCache
from ..reference.config import END_AUDIO, N_SPECIAL_CODES, NOT_FINITE
from ..reference.noise import noise, seed_tensor
from .kv_cache import KVCache
from .request import Request

# Rows of a block if several requests may run. The flow head then has 24 rows (4 requests x 2 branches x 3 tokens), a
# multiple of 8.
BLOCK_ROWS = 4


@dataclass(frozen=True)
class FrameOutput:
    """Holds one frame of some slots, on the device.

    Attributes:
        slots: the slots that the frame belongs to. The other slots' rows mean nothing, and their `valid` is 0.
        codes: int64 [slots, 37] without the +2 offset. If `valid` is 1, a row is the new frame. If a request has ended
            in this frame, the semantic code is END - 2. If the frame has NaN or
            infinity, the semantic code is NOT_FINITE - 2.
        valid: int64 [slots], 1 for a new frame, 0 if the slot is free or its request is over.
        samples: fp32 [slots, samples_per_frame], the frame's sound, or None if the codec is yet to decode the codes.
    """

    slots: list[int]
    codes: Tensor
    valid: Tensor
    samples: Tensor | None = None


class ModelRunner(Protocol):
    """Runs the prompts and the frames of the requests in its slots.

    Attributes:
        n_slots: number of slots, the most requests that run side by side.
        kv_cache: the KV cache; the engine allocates its pages.
        max_seq_len: the most tokens that a request may have.
        deferred: whether the engine may read a frame's output after it has launched the next frame.
    """

    n_slots: int
    kv_cache: KVCache
    max_seq_len: int
    deferred: bool

    def refresh_weights(self) -> None:
        """Rebuild everything derived from the weights; the engine calls this when no request is running."""

    def weights_version(self) -> Hashable:
        """Return a value that changes when a weight of the backbone's layers or embeddings changes."""

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        """Run T rows of a prompt, [T, dim], after its first `n_past` tokens; return the last hidden state, [dim]."""

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Put a request into a free slot; `hidden` is the hidden state that :meth:`prefill` returned for its prompt."""

    def remove(self, slot: int) -> None:
        """Free a slot; output of the slot that has not been read yet is ignored."""

    def generate_frame(self) -> Iterator[FrameOutput]:
        """Generate a frame for every request that has not ended, failed or reached its frame limit.

        Yields:
            The frames of groups of requests. A group's output may be overwritten when the next group runs.
        """


@dataclass(eq=False)
class RunningRequest:
    """Holds the state of a request in a slot of :class:`TorchRunner`.

    Attributes:
        request: the request itself.
        slot: the request's slot.
        hidden: [dim], the backbone's last hidden state.
        pages: int32 [n], the request's pages of the KV cache.
        length: number of the request's tokens in the KV cache.
        n_frames: number of frames generated so far.
        codes: int64 [37], the last frame with the +2 offset.
    """

    request: Request
    slot: int
    hidden: Tensor
    pages: Tensor
    length: int
    n_frames: int = 0
    codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))


class TorchRunner:
    """Implements :class:`ModelRunner` on the reference modules."""

    deferred = False

    def __init__(self, model: VoxtralTTS, n_slots: int, kv_cache: KVCache, max_seq_len: int) -> None:
        """Make `n_slots` slots; a single slot runs in blocks of one row, because fewer rows are faster."""
        self.model, self.n_slots, self.kv_cache, self.max_seq_len = model, n_slots, kv_cache, max_seq_len
        self._rows = block_rows(n_slots)
        self._running: dict[int, RunningRequest] = {}

    def refresh_weights(self) -> None:
        """Do nothing, because nothing is derived from the weights."""

    def weights_version(self) -> Hashable:
        """Return the version of the backbone's weights, see :func:`backbone_weights_version`."""
        return backbone_weights_version(self.model)

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        """Run a prompt alone, because in a batch its bits would depend on the lengths of the other prompts."""
        device = embeddings.device
        table = torch.tensor([pages], dtype=torch.int32, device=device)
        lengths = torch.tensor([n_past + len(embeddings)], device=device)
        return self.model.hidden_states(embeddings.unsqueeze(0), PagedCache(self.kv_cache.kv, table, lengths))[0, -1]

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Put a request into a free slot; its first frame is generated from `hidden`."""
        table = torch.tensor(pages, dtype=torch.int32, device=hidden.device)
        self._running[slot] = RunningRequest(request, slot, hidden, table, len(request.prompt))

    def remove(self, slot: int) -> None:
        """Free a slot; do nothing if :meth:`generate_frame` has freed it, because the request is over."""
        self._running.pop(slot, None)

    def generate_frame(self) -> Iterator[FrameOutput]:
        """Run the backbone on the last frame of each request that has a frame, then generate the next frame of all."""
        slots = sorted(self._running)
        for block in blocks([r for r in self._running.values() if r.n_frames], self._rows):
            decode_block(self.model, self.kv_cache.kv, block, self._rows)
        weight = self.model.norm.weight
        codes = torch.zeros(self.n_slots, self.model.config.audio.n_codebooks, dtype=torch.int64, device=weight.device)
        valid = torch.zeros(self.n_slots, dtype=torch.int64, device=weight.device)
        for (steps, solver), group in groupby(sorted(self._running.values(), key=_steps_and_solver), _steps_and_solver):
            for block in blocks(list(group), self._rows):
                generate_block(self.model, block, self._rows, steps, solver)
        for r in list(self._running.values()):
            codes[r.slot] = r.codes - N_SPECIAL_CODES
            is_over = int(r.codes[0]) in (END_AUDIO, NOT_FINITE)
            valid[r.slot] = int(not is_over)
            if is_over or r.n_frames == r.request.max_frames:
                self.remove(r.slot)
        yield FrameOutput(slots, codes, valid)


def generate_block(model: VoxtralTTS, block: list[RunningRequest], rows: int, steps: int, solver: str) -> None:
    """Generate a frame of codes, END or NOT_FINITE for each request in a block, from its hidden state."""
    device, padding = block[0].hidden.device, [0] * (rows - len(block))
    seeds = seed_tensor([r.request.seed for r in block] + padding).to(device)
    frames = torch.tensor([r.n_frames for r in block] + padding, device=device)
    alpha = torch.tensor([r.request.cfg_alpha for r in block] + padding, dtype=torch.float32, device=device)
    x = noise(seeds, frames, model.config.audio.n_acoustic_codebook)
    codes = model.acoustic_transformer(_padded([r.hidden for r in block], rows), alpha, x, steps, solver)
    for r, row in zip(block, codes, strict=False):  # not strict: the codes of the padding rows are dropped
        r.codes = row
        r.n_frames += 1


def decode_block(model: VoxtralTTS, kv: Tensor, block: list[RunningRequest], rows: int) -> None:
    """Run the backbone on the last frame of each request in a block, and store the new hidden state."""
    for r in block:
        r.length += 1
    codes = _padded([r.codes for r in block], rows)
    lengths = torch.tensor([r.length for r in block] + [0] * (rows - len(block)), device=codes.device)
    table = torch.zeros(rows, max(len(r.pages) for r in block), dtype=torch.int32, device=codes.device)
    for i, r in enumerate(block):
        table[i, : len(r.pages)] = r.pages
    states = model.hidden_states(model.embed_codes(codes).unsqueeze(1), PagedCache(kv, table, lengths))
    for i, r in enumerate(block):
        r.hidden = states[i, 0]


def block_rows(n: int) -> int:
    """Return the number of rows of a block if at most `n` requests run side by side."""
    return BLOCK_ROWS if n > 1 else 1


def blocks(running: list[RunningRequest], rows: int) -> Iterator[list[RunningRequest]]:
    """Split `running` into consecutive blocks of at most `rows` requests."""
    for start in range(0, len(running), rows):
        yield running[start : start + rows]


def backbone_weights_version(model: VoxtralTTS) -> Hashable:
    """Return a value that changes when a weight of the backbone's layers or embeddings changes."""
    return weights_version(model.layers, model.mm_audio_embeddings)


def _steps_and_solver(running: RunningRequest) -> tuple[int, str]:
    return running.request.steps, running.request.solver


def _padded(rows: list[Tensor], n: int) -> Tensor:
    """Stack `rows`, and append zero rows up to `n`."""
    return torch.stack(rows + [torch.zeros_like(rows[0])] * (n - len(rows)))
