"""Model runners: what the engine drives, and how the reference modules do it.

Same seed, same sound: rows run in zero-padded blocks of a fixed number of rows, and attention request by request, so
nothing that a request computes depends on the other requests. (On a CPU, ``F.linear`` in fp32 gives a row other bits in
a batch of 2 than alone, and in a batch of 6 other bits at the last two places: measured.) For the same reason a prompt
is always run in two parts, its prefix and the rest, whether or not the prefix is in the cache already.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from ..reference import VoxtralTTS
from ..reference.attention import PagedCache
from ..reference.config import END_AUDIO
from ..reference.noise import noise, seed_tensor
from .kv_cache import KVCache
from .request import Request

BLOCK_ROWS = 4  # requests a block when several may run; the flow head then sees 24 rows, a whole number of tiles


@dataclass(frozen=True)
class FrameOutput:
    """A frame of all slots, on the device.

    Attributes:
        codes: int64 [slots, 37] with the +2 offset; meaningful where `valid` is 1.
        valid: int64 [slots], 1 or 0: the slot is free, or its request has ended.
    """

    codes: Tensor
    valid: Tensor


class ModelRunner(Protocol):
    """Runs prompts and frames of the requests in its slots.

    Attributes:
        n_slots: requests that run side by side.
        kv_cache: whose pages the engine allocates.
        max_seq_len: that a request may have.
        deferred: a frame's output is best read when the next frame has been launched.
    """

    n_slots: int
    kv_cache: KVCache
    max_seq_len: int
    deferred: bool

    def refresh_weights(self) -> None:
        """Called when no request is running: rebuild everything derived from the weights."""

    def weights_version(self) -> Hashable:
        """A value that changes when the weights of the backbone do."""

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        """Run the rows [T, dim] of a prompt that come after `n_past` tokens; the last's hidden state, [dim]."""

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Put a request whose prompt has been run into a free slot."""

    def remove(self, slot: int) -> None:
        """Free a slot; the output of its last frame is not read."""

    def generate_frame(self) -> FrameOutput:
        """Generate a frame of every request that has neither ended nor reached its limit."""


@dataclass(eq=False)
class RunningRequest:
    """A request in a slot of :class:`TorchRunner`.

    Attributes:
        request: what is to be generated.
        slot: its place.
        hidden: [dim], the backbone's last hidden state.
        pages: int32, of the cache.
        length: tokens in the cache.
        n_frames: generated so far.
        codes: [37], the last frame.
    """

    request: Request
    slot: int
    hidden: Tensor
    pages: Tensor
    length: int
    n_frames: int = 0
    codes: Tensor = field(default_factory=lambda: torch.empty(0))


class TorchRunner:
    """:class:`ModelRunner` on the reference modules."""

    deferred = False

    def __init__(self, model: VoxtralTTS, n_slots: int, kv_cache: KVCache, max_seq_len: int) -> None:
        """Make `n_slots` slots; a single one runs in blocks of one row, which is the fastest."""
        self.model, self.n_slots, self.kv_cache, self.max_seq_len = model, n_slots, kv_cache, max_seq_len
        self._rows = block_rows(n_slots)
        self._running: dict[int, RunningRequest] = {}

    def refresh_weights(self) -> None:
        """Do nothing: weights are read in every product, and nothing is derived from them."""

    def weights_version(self) -> Hashable:
        """See :func:`backbone_weights_version`."""
        return backbone_weights_version(self.model)

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        """Run a prompt by itself: in a batch, its bits would depend on the other prompts' lengths."""
        device = embeddings.device
        table = torch.tensor([pages], dtype=torch.int32, device=device)
        lengths = torch.tensor([n_past + len(embeddings)], device=device)
        return self.model.hidden_states(embeddings.unsqueeze(0), PagedCache(self.kv_cache.kv, table, lengths))[0, -1]

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Its first frame is generated from `hidden`."""
        table = torch.tensor(pages, dtype=torch.int32, device=hidden.device)
        self._running[slot] = RunningRequest(request, slot, hidden, table, len(request.prompt))

    def remove(self, slot: int) -> None:
        """Free a slot; its request may have ended, and left it, already."""
        self._running.pop(slot, None)

    def generate_frame(self) -> FrameOutput:
        """Feed back the last frame of each request that has one, then generate the next of all, block by block."""
        for block in blocks([r for r in self._running.values() if r.n_frames], self._rows):
            decode_block(self.model, self.kv_cache.kv, block, self._rows)
        weight = self.model.norm.weight
        codes = torch.zeros(self.n_slots, self.model.config.audio.n_codebooks, dtype=torch.int64, device=weight.device)
        valid = torch.zeros(self.n_slots, dtype=torch.int64, device=weight.device)
        for (steps, solver), group in groupby(sorted(self._running.values(), key=_steps_and_solver), _steps_and_solver):
            for block in blocks(list(group), self._rows):
                generate_block(self.model, block, self._rows, steps, solver)
        for r in list(self._running.values()):
            if r.codes[0] != END_AUDIO:
                codes[r.slot], valid[r.slot] = r.codes, 1
            if r.codes[0] == END_AUDIO or r.n_frames == r.request.max_frames:
                self.remove(r.slot)
        return FrameOutput(codes, valid)


def generate_block(model: VoxtralTTS, block: list[RunningRequest], rows: int, steps: int, solver: str) -> None:
    """Generate a frame of codes, or END, from the hidden state of each request in a block."""
    device, padding = block[0].hidden.device, [0] * (rows - len(block))
    seeds = seed_tensor([r.request.seed for r in block] + padding).to(device)
    frames = torch.tensor([r.n_frames for r in block] + padding, device=device)
    alpha = torch.tensor([r.request.cfg_alpha for r in block] + padding, dtype=torch.float32, device=device)
    x = noise(seeds, frames, model.config.audio.n_acoustic_codebook)
    codes = model.acoustic_transformer(_padded([r.hidden for r in block], rows), alpha, x, steps, solver)
    for r, row in zip(block, codes, strict=False):  # padding rows have codes too
        r.codes = row
        r.n_frames += 1


def decode_block(model: VoxtralTTS, kv: Tensor, block: list[RunningRequest], rows: int) -> None:
    """Feed back the last frame of each request in a block, and keep the new hidden state."""
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
    """Rows a block where `n` requests may run."""
    return BLOCK_ROWS if n > 1 else 1


def blocks(running: list[RunningRequest], rows: int) -> Iterator[list[RunningRequest]]:
    """Consecutive runs of at most `rows`."""
    for start in range(0, len(running), rows):
        yield running[start : start + rows]


def backbone_weights_version(model: VoxtralTTS) -> Hashable:
    """Another one when a weight that prompts go through is another tensor, or was written to.

    What is written through ``.data``, or to weights made in inference mode, leaves no trace.
    """
    weights = (*model.layers.parameters(), *model.mm_audio_embeddings.parameters())
    return tuple((id(w), w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype) for w in weights)


def _steps_and_solver(running: RunningRequest) -> tuple[int, str]:
    return running.request.steps, running.request.solver


def _padded(rows: list[Tensor], n: int) -> Tensor:
    """Stack, and fill up with zero rows to `n`."""
    return torch.stack(rows + [torch.zeros_like(rows[0])] * (n - len(rows)))
