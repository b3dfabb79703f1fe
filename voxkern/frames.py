"""Requests side by side on kernels: static rows, a frame of which is launches with no host in between.

Lengths, frame numbers and codes stay on the device. A request that says END, or reaches its limit, gets length 0 there
and then; the host learns of it a frame late, which costs that frame's time and nothing else.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .cache import PagePool, pages_for
from .graphs import Capture, Graphs, addresses
from .kernels.backbone import launch_advance
from .kernels.operator import on_device
from .reference import VoxtralTTS
from .reference.noise import seed_tensor
from .slots import Request, Said, weights_stamp
from .twins.backbone import BackboneTwin, Rows
from .twins.head import HeadTwin

KINDS = 4  # steps and solvers whose rows, and graphs, are kept while nobody asks for them


class Frames:
    """Static rows of requests of one number of steps and one solver.

    Attributes:
        there: slots that are taken.
        lengths: int32 [slots], tokens of each with the next frame's; 0 is empty, or has ended.
        frames: int64 [slots], frames kept.
        said: int64 [slots, 37], the last frame of each with the +2 offset.
        kept: int64 [slots], 1 where it is new.
    """

    def __init__(
        self,
        model: VoxtralTTS,
        n: int,
        pool: PagePool,
        max_tokens: int,
        steps: int,
        solver: str,
        capture: Capture | None = None,
    ) -> None:
        """`n` empty rows; with `capture` a frame is a graph, which is made here."""
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
        self.said = torch.zeros(n, config.audio.n_codebooks, dtype=torch.int64, device=device)
        self.kept = torch.zeros(n, dtype=torch.int64, device=device)
        self._run = self.launch if capture is None else Graphs(self.launch, n, capture)

    def join(self, slot: int, request: Request, state: Tensor, pages: list[int]) -> None:
        """Write a request into its row."""
        self.there.add(slot)
        self._table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._seeds[slot : slot + 1] = seed_tensor([request.seed])
        self._alpha[slot], self._limits[slot] = request.cfg_alpha, request.max_frames
        self._states[slot] = state
        self.lengths[slot], self.frames[slot] = len(request.prompt), 0

    def leave(self, slot: int) -> None:
        """Empty a row."""
        self.there.discard(slot)
        self.lengths[slot] = self.kept[slot] = 0

    def frame(self) -> Said:
        """A frame of everybody, in the first rows up to the last that is taken; the next writes over what it said."""
        self._run(max(self.there) + 1)
        return Said(self.said, self.kept)

    def launch(self, rows: int) -> None:
        """A frame of the first rows: launches and nothing else, once one of as many rows has been made."""
        states, lengths = self._states[:rows], self.lengths[:rows]
        codes, following = self._flow.frame(
            states, self._alpha[:rows],
            steps=self._steps, solver=self._solver, seed=self._seeds[:rows], frame=self.frames[:rows],
        )  # fmt: skip
        with on_device("advance", codes):
            launch_advance(codes, self._limits[:rows], lengths, self.frames[:rows], self.said[:rows], self.kept[:rows])
        self._backbone.decode(following, self._pool, self._table[:rows], lengths, states)


class KernelSlots:
    """:class:`voxkern.slots.Slots` on kernels: rows of their own for each kind of steps that somebody asks for."""

    late = True

    def __init__(
        self, model: VoxtralTTS, n: int, pool: PagePool, max_tokens: int, capture: Capture | None = None
    ) -> None:
        """`n` places, at most as many as the model is accelerated for; `capture` makes graphs of frames."""
        self.model, self.n, self.pool, self.max_tokens = model, n, pool, max_tokens
        self._capture, self._addresses = capture, addresses(model)
        self._backbone, self._flow = twins_of(model)
        self._kinds: dict[tuple[int, str], Frames] = {}
        self._table = torch.zeros(1, pages_for(max_tokens), dtype=torch.int32, device=pool.pool.device)

    def begin(self) -> None:
        """The flow head's tables, which weights may have changed under, and graphs, if they lie elsewhere now."""
        self._flow.refresh()
        if (found := addresses(self.model)) != self._addresses:
            self._kinds, self._addresses = {}, found

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
            idle = [known for known, frames in self._kinds.items() if not frames.there]
            for known in idle[: max(0, len(self._kinds) - KINDS + 1)]:
                del self._kinds[known]
            self._kinds[kind] = Frames(self.model, self.n, self.pool, self.max_tokens, *kind, self._capture)
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
