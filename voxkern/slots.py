"""Requests side by side, a frame at a time: what an engine drives, and how plain PyTorch does it.

Same seed, same sound: rows run in zero-padded blocks of a fixed number of rows and attention request by request, so
nothing that a request computes depends on who else is there. (On a CPU, ``F.linear`` in fp32 gives a row other bits in
a batch of 2 than alone, and in a batch of 6 other bits at the last two places: measured.) For the same reason a prompt
is always run in two parts, its voice's and the rest, whether or not the voice's is in the cache already.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from .cache import PagePool, Voice
from .reference import VoxtralTTS
from .reference.attention import PagedCache
from .reference.config import END_AUDIO
from .reference.noise import noise, seed_tensor

BLOCK_ROWS = 4  # requests a block when several may run; the flow head then sees 24 rows, a whole number of tiles


@dataclass(frozen=True)
class Request:
    """One utterance to speak.

    Attributes:
        prompt: [T, dim], embeddings of voice and text.
        seed: of its noise.
        cfg_alpha: strength of the guidance.
        max_frames: where it is cut off.
        steps: evaluations of the velocity a frame.
        solver: "euler" or "ab2".
        voice: what the prompt's first rows are made of; None for a prompt in one part.
    """

    prompt: Tensor
    seed: int
    cfg_alpha: float
    max_frames: int
    steps: int
    solver: str
    voice: Voice | None = None

    @property
    def n_tokens(self) -> int:
        """The most that it ever has in the cache."""
        return len(self.prompt) + self.max_frames


@dataclass(frozen=True)
class Said:
    """A frame of all slots, on the device.

    Attributes:
        codes: int64 [slots, 37] with the +2 offset; they mean something where `kept` is 1.
        kept: int64 [slots], 1 or 0: nobody is there, or the model said END.
    """

    codes: Tensor
    kept: Tensor


class Slots(Protocol):
    """Places for requests, and the model that runs them.

    Attributes:
        n: places.
        pool: the cache, whose pages the engine deals out.
        max_tokens: that a request may have.
        late: what a frame said is best read when the next has been launched.
    """

    n: int
    pool: PagePool
    max_tokens: int
    late: bool

    def begin(self) -> None:
        """Nobody is there: whatever was made of weights is made anew from them as they are."""

    def stamp(self) -> Hashable:
        """What is another when the weights of the backbone are."""

    def prefill(self, rows: Tensor, pages: list[int], past: int) -> Tensor:
        """Run the rows [T, dim] of a prompt that come after `past` tokens; the last's state, [dim]."""

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        """A request whose prompt has been run takes an empty slot."""

    def leave(self, slot: int) -> None:
        """The slot is empty; what its last frame said is not looked at."""

    def frame(self) -> Said:
        """A frame of everybody. Who ended, or was cut off at its limit, says nothing more."""


@dataclass(eq=False)
class Running:
    """A request in a slot of :class:`TorchSlots`.

    Attributes:
        request: what is asked.
        slot: its place.
        state: [dim], the backbone's last.
        pages: int32, of the cache.
        length: tokens in the cache.
        n_frames: said so far.
        codes: [37], the last frame.
    """

    request: Request
    slot: int
    state: Tensor
    pages: Tensor
    length: int
    n_frames: int = 0
    codes: Tensor = field(default_factory=lambda: torch.empty(0))


class TorchSlots:
    """:class:`Slots` on the reference modules."""

    late = False

    def __init__(self, model: VoxtralTTS, n: int, pool: PagePool, max_tokens: int) -> None:
        """`n` places; one alone runs in blocks of one row, which is the fastest."""
        self.model, self.n, self.pool, self.max_tokens = model, n, pool, max_tokens
        self._rows = block_rows(n)
        self._running: dict[int, Running] = {}

    def begin(self) -> None:
        """Weights are read in every product: nothing is made of them."""

    def stamp(self) -> Hashable:
        """See :func:`weights_stamp`."""
        return weights_stamp(self.model)

    def prefill(self, rows: Tensor, pages: list[int], past: int) -> Tensor:
        """By itself: a request's bits would depend on how many rows its neighbours have."""
        device = rows.device
        table = torch.tensor([pages], dtype=torch.int32, device=device)
        lengths = torch.tensor([past + len(rows)], device=device)
        return self.model.hidden_states(rows.unsqueeze(0), PagedCache(self.pool.pool, table, lengths))[0, -1]

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        """Its next frame is made from `state`."""
        table = torch.tensor(pages, dtype=torch.int32, device=state.device)
        self._running[slot] = Running(request, slot, state, table, len(request.prompt))

    def leave(self, slot: int) -> None:
        """It may have ended by itself."""
        self._running.pop(slot, None)

    def frame(self) -> Said:
        """Backbone steps of those who have said something, then frames of all: block by block."""
        for block in blocks([r for r in self._running.values() if r.n_frames], self._rows):
            step_backbone(self.model, self.pool.pool, block, self._rows)
        weight = self.model.norm.weight
        codes = torch.zeros(self.n, self.model.config.audio.n_codebooks, dtype=torch.int64, device=weight.device)
        kept = torch.zeros(self.n, dtype=torch.int64, device=weight.device)
        for (steps, solver), alike in groupby(sorted(self._running.values(), key=_kind), _kind):
            for block in blocks(list(alike), self._rows):
                speak_frame(self.model, block, self._rows, steps, solver)
        for r in list(self._running.values()):
            if r.codes[0] != END_AUDIO:
                codes[r.slot], kept[r.slot] = r.codes, 1
            if r.codes[0] == END_AUDIO or r.n_frames == r.request.max_frames:
                self.leave(r.slot)
        return Said(codes, kept)


def speak_frame(model: VoxtralTTS, block: list[Running], rows: int, steps: int, solver: str) -> None:
    """Turn the states of a block into a frame of codes each, or into its end."""
    device, padding = block[0].state.device, [0] * (rows - len(block))
    seeds = seed_tensor([r.request.seed for r in block] + padding).to(device)
    frames = torch.tensor([r.n_frames for r in block] + padding, device=device)
    alpha = torch.tensor([r.request.cfg_alpha for r in block] + padding, dtype=torch.float32, device=device)
    x = noise(seeds, frames, model.config.audio.n_acoustic_codebook)
    codes = model.acoustic_transformer(_padded([r.state for r in block], rows), alpha, x, steps, solver)
    for r, said in zip(block, codes, strict=False):  # padding rows say something too
        r.codes = said
        r.n_frames += 1


def step_backbone(model: VoxtralTTS, pool: Tensor, block: list[Running], rows: int) -> None:
    """Feed each one's last frame back and keep the new state."""
    for r in block:
        r.length += 1
    codes = _padded([r.codes for r in block], rows)
    lengths = torch.tensor([r.length for r in block] + [0] * (rows - len(block)), device=codes.device)
    table = torch.zeros(rows, max(len(r.pages) for r in block), dtype=torch.int32, device=codes.device)
    for i, r in enumerate(block):
        table[i, : len(r.pages)] = r.pages
    states = model.hidden_states(model.embed_codes(codes).unsqueeze(1), PagedCache(pool, table, lengths))
    for i, r in enumerate(block):
        r.state = states[i, 0]


def block_rows(n: int) -> int:
    """Rows a block where `n` requests may run."""
    return BLOCK_ROWS if n > 1 else 1


def blocks(running: list[Running], rows: int) -> Iterator[list[Running]]:
    """Consecutive runs of at most `rows`."""
    for start in range(0, len(running), rows):
        yield running[start : start + rows]


def weights_stamp(model: VoxtralTTS) -> Hashable:
    """Another one when a weight that prompts go through is another tensor, or was written to.

    What is written through ``.data``, or to weights made in inference mode, leaves no trace.
    """
    weights = (*model.layers.parameters(), *model.mm_audio_embeddings.parameters())
    return tuple((id(w), w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype) for w in weights)


def _kind(running: Running) -> tuple[int, str]:
    return running.request.steps, running.request.solver


def _padded(rows: list[Tensor], n: int) -> Tensor:
    """Stack, and fill up with zero rows to `n`."""
    return torch.stack(rows + [torch.zeros_like(rows[0])] * (n - len(rows)))
