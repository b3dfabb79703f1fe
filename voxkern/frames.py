"""Requests side by side on kernels: static rows, a frame of which is launches with no host in between.

Lengths, frame numbers and codes stay on the device. A request that says END, or reaches its limit, gets length 0 there
and then; the host learns of it a frame late, which costs that frame's time and nothing else.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .cache import PagePool, pages_for
from .kernels.backbone import launch_advance
from .kernels.operator import on_device
from .reference import VoxtralTTS
from .reference.noise import seed_tensor
from .slots import Request, Said, weights_stamp
from .twins.backbone import BackboneTwin, Rows
from .twins.head import HeadTwin

FRAMES = 256  # of the history to begin with: 20 s


class Frames:
    """Static rows of requests of one number of steps and one solver.

    Attributes:
        there: slots that are taken.
        lengths: int32 [slots], tokens of each with the next frame's; 0 is empty, or has ended.
        frames: int64 [slots], frames kept.
        history: int64 [slots, frames, 37], their codes with the +2 offset; it grows with what is asked for.
    """

    def __init__(self, model: VoxtralTTS, n: int, pool: PagePool, max_tokens: int, steps: int, solver: str) -> None:
        """`n` empty rows."""
        self._backbone, self._flow = twins_of(model)
        self._pool, self._steps, self._solver = pool.pool, steps, solver
        weight = model.norm.weight
        device, config = weight.device, model.config
        self.there: set[int] = set()
        self._table = torch.zeros(n, pages_for(max_tokens), dtype=torch.int32, device=device)
        self._seeds = torch.zeros(n, dtype=torch.int64, device=device)
        self._alpha = torch.zeros(n, dtype=torch.float32, device=device)
        self._limits = torch.zeros(n, dtype=torch.int64, device=device)
        self._states = torch.zeros(n, config.backbone.dim, dtype=weight.dtype, device=device)
        self.lengths = torch.zeros(n, dtype=torch.int32, device=device)
        self.frames = torch.zeros(n, dtype=torch.int64, device=device)
        self.history = torch.zeros(n, FRAMES, config.audio.n_codebooks, dtype=torch.int64, device=device)

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        """Write a request into its row."""
        if request.max_frames > self.history.shape[1]:  # what it holds of others is theirs already
            shape = (len(self.history), 2 * request.max_frames, self.history.shape[2])
            self.history = self.history.new_zeros(shape)
        self.there.add(slot)
        self._table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._seeds[slot : slot + 1] = seed_tensor([request.seed])
        self._alpha[slot], self._limits[slot] = request.cfg_alpha, request.max_frames
        self._states[slot] = state
        self.lengths[slot], self.frames[slot] = len(request.prompt), 0

    def leave(self, slot: int) -> None:
        """Empty a row."""
        self.there.discard(slot)
        self.lengths[slot] = 0

    def frame(self) -> Said:
        """A frame of everybody, in the first rows up to the last that is taken."""
        rows = max(self.there) + 1
        before = self.frames.clone()
        codes, states = self.launch(rows)
        self._states[:rows] = states
        said = torch.zeros_like(self.history[:, 0])
        said[:rows] = codes
        return Said(said, self.frames - before)

    def launch(self, rows: int) -> tuple[Tensor, Tensor]:
        """A frame of the first rows: launches and nothing else, once one of as many rows has been made.

        Returns:
            Codes int64 [rows, 37] and states [rows, dim], in memory that the next frame writes again.
        """
        codes, following = self._flow.frame(
            self._states[:rows], self._alpha[:rows],
            steps=self._steps, solver=self._solver, seed=self._seeds[:rows], frame=self.frames[:rows],
        )  # fmt: skip
        with on_device("advance", self.history):
            launch_advance(
                codes, self._limits[:rows], self.lengths[:rows], self.frames[:rows], self.history[:rows]
            )  # fmt: skip
        return codes, self._backbone.decode(following, self._pool, self._table[:rows], self.lengths[:rows])


class KernelSlots:
    """:class:`voxkern.slots.Slots` on kernels: rows of their own for each kind of steps that somebody asks for."""

    late = True

    def __init__(self, model: VoxtralTTS, n: int, pool: PagePool, max_tokens: int) -> None:
        """`n` places, at most as many as the model is accelerated for."""
        self.model, self.n, self.pool, self.max_tokens = model, n, pool, max_tokens
        self._backbone, self._flow = twins_of(model)
        self._kinds: dict[tuple[int, str], Frames] = {}
        self._table = torch.zeros(1, pages_for(max_tokens), dtype=torch.int32, device=pool.pool.device)

    def begin(self) -> None:
        """The flow head's tables, which weights may have changed under."""
        self._flow.refresh()

    def stamp(self) -> Hashable:
        """See :func:`voxkern.slots.weights_stamp`."""
        return weights_stamp(self.model)

    def prefill(self, rows: Tensor, pages: list[int], past: int) -> Tensor:
        """In six launches a layer; a prompt in parts has the bits of the whole."""
        self._table[0, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        of = Rows.of([len(rows)], [past + len(rows)], rows.device)
        return self._backbone.norm(self._backbone.prefill(rows, of, self.pool.pool, self._table)[-1:])[0]

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        """Among those of its steps and solver."""
        kind = (request.steps, request.solver)
        if kind not in self._kinds:
            self._kinds = {known: frames for known, frames in self._kinds.items() if frames.there}
            self._kinds[kind] = Frames(self.model, self.n, self.pool, self.max_tokens, *kind)
        self._kinds[kind].join(slot, request, state, pages)

    def leave(self, slot: int) -> None:
        """Whatever its kind."""
        for frames in self._kinds.values():
            if slot in frames.there:
                frames.leave(slot)

    def frame(self) -> Said:
        """Kind by kind."""
        said = [frames.frame() for frames in self._kinds.values() if frames.there]
        if len(said) == 1:
            return said[0]
        kept = torch.stack([one.kept for one in said])  # [kinds, slots]
        codes = torch.stack([one.codes for one in said])  # [kinds, slots, 37]
        return Said((codes * kept.unsqueeze(2)).sum(0), kept.sum(0))


def twins_of(model: VoxtralTTS) -> tuple[BackboneTwin, HeadTwin[Any, Any, Any]]:
    """Of an accelerated model."""
    backbone, flow = model.hidden_states, model.acoustic_transformer.forward
    assert isinstance(backbone, BackboneTwin)
    assert isinstance(flow, HeadTwin)
    return backbone, flow
