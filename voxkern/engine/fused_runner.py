"""Run requests on fused modules, in static memory: a frame only launches kernels, and waits for nothing.

Lengths, frame numbers and codes stay on the device. If a request generates END, has a frame with NaN or infinity, or
reaches its frame limit, a kernel sets its length to 0. The host learns of this with a delay of one frame. Until then,
the request keeps its slot.

If the codec is fused, its launches follow those of the frame, in the same graph.
"""

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from ..fused.backbone import FusedBackbone, TokenBatch
from ..fused.flow_head import FusedHead
from ..kernels.decode_state import launch_update_decode_state
from ..kernels.launch_config import overlapped
from ..kernels.operator import on_device
from ..reference import VoxtralTTS
from ..reference.noise import seed_tensor
from .codec_runner import CodecRunner
from .cuda_graphs import BatchGraphs, Capture, weight_addresses
from .kv_cache import KVCache, pages_for
from .request import Request
from .runner import FrameOutput, backbone_weights_version

# Each pair of steps and solver has one batch, with its own memory and graphs. When a new batch would exceed this number
# of batches, the oldest batches without requests are dropped; batches with requests are kept even above it.
MAX_DECODE_BATCHES = 4


class DecodeBatch:
    """Generates the frames of all requests that have the same number of steps and the same solver, in static memory.

    Each slot has one row in each tensor.

    Attributes:
        slots: the slots that hold a request of this batch.
        lengths: int32 [slots], tokens of each request in the KV cache; 0 if the slot is free or its request is over.
        n_frames: int64 [slots], frames kept so far; a frame with END is not counted.
        codes: int64 [slots, 37], the last frame of each request, see :attr:`FrameOutput.codes`.
        valid: int64 [slots], 1 if the slot's row of `codes` is a new frame, else 0.
    """

    def __init__(
        self,
        model: VoxtralTTS,
        n_slots: int,
        kv_cache: KVCache,
        max_seq_len: int,
        steps: int,
        solver: str,
        codec: CodecRunner | None = None,
        capture: Capture | None = None,
        overlap: bool = False,
    ) -> None:
        """Allocate `n_slots` free rows; with `capture`, also capture the graphs of a frame.

        If `codec` is fused, its launches are part of a frame. `overlap` is whether the launches of a frame overlap.
        """
        self._backbone, self._flow_head = fused_modules_of(model)
        self._kv, self._steps, self._solver = kv_cache.kv, steps, solver
        self._codec = codec if codec is not None and codec.is_fused else None
        self._overlap = overlap
        weight = model.norm.weight
        device, config = weight.device, model.config
        self.slots: set[int] = set()
        self._block_table = torch.zeros(n_slots, pages_for(max_seq_len), dtype=torch.int32, device=device)
        self._seeds = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self._cfg_alpha = torch.zeros(n_slots, dtype=torch.float32, device=device)
        self._max_frames = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(n_slots, config.backbone.dim, dtype=weight.dtype, device=device)
        self.lengths = torch.zeros(n_slots, dtype=torch.int32, device=device)
        self.n_frames = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self.codes = torch.zeros(n_slots, config.audio.n_codebooks, dtype=torch.int64, device=device)
        self.valid = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self._run = self.launch if capture is None else BatchGraphs(self.launch, n_slots, capture)

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Write a request into the row of its slot."""
        self.slots.add(slot)
        self._block_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        self._seeds[slot : slot + 1] = seed_tensor([request.seed])
        self._cfg_alpha[slot], self._max_frames[slot] = request.cfg_alpha, request.max_frames
        self._hidden[slot] = hidden
        self.lengths[slot], self.n_frames[slot] = len(request.prompt), 0

    def remove(self, slot: int) -> None:
        """Free the row of a slot."""
        self.slots.discard(slot)
        self.lengths[slot] = self.valid[slot] = 0

    def generate_frame(self) -> FrameOutput:
        """Generate a frame for all requests, by running all rows up to the last row in use.

        The output is in memory that the next frame overwrites.
        """
        samples = self._run(max(self.slots) + 1)
        return FrameOutput(sorted(self.slots), self.codes, self.valid, samples)

    def launch(self, rows: int) -> Tensor | None:
        """Launch a frame of the first `rows` rows. The first call with this number of rows also allocates memory.

        Returns:
            The samples of all slots, see :meth:`CodecRunner.launch`, or None if the codec is not fused.
        """
        hidden, lengths = self._hidden[:rows], self.lengths[:rows]
        with overlapped(self._overlap):
            codes, next_embedding = self._flow_head.generate_codes(
                hidden, self._cfg_alpha[:rows],
                steps=self._steps, solver=self._solver, seed=self._seeds[:rows], frame=self.n_frames[:rows],
            )  # fmt: skip
            with on_device("update_decode_state", codes):
                launch_update_decode_state(
                    codes, self._max_frames[:rows], lengths, self.n_frames[:rows], self.codes[:rows], self.valid[:rows]
                )
            self._backbone.decode(next_embedding, self._kv, self._block_table[:rows], lengths, hidden)
            return None if self._codec is None else self._codec.launch(self.codes, self.valid)


class FusedRunner:
    """Implements :class:`voxkern.engine.runner.ModelRunner` on fused modules, with a batch per (steps, solver)."""

    deferred = True

    def __init__(
        self,
        model: VoxtralTTS,
        n_slots: int,
        kv_cache: KVCache,
        max_seq_len: int,
        codec: CodecRunner,
        capture: Capture | None = None,
        overlap: bool = False,
    ) -> None:
        """Make `n_slots` slots, at most the accelerated model's `max_batch`; with `capture`, frames replay graphs.

        `overlap` is whether the launches of a frame overlap.
        """
        self.model, self.n_slots, self.kv_cache, self.max_seq_len = model, n_slots, kv_cache, max_seq_len
        self._codec, self._capture, self._overlap = codec, capture, overlap
        self._addresses, self._streams = weight_addresses(model), codec.streams
        self._backbone, self._flow_head = fused_modules_of(model)
        self._batches: dict[tuple[int, str], DecodeBatch] = {}
        self._block_table = torch.zeros(1, pages_for(max_seq_len), dtype=torch.int32, device=kv_cache.kv.device)

    def refresh_weights(self) -> None:
        """Rebuild the flow head's tables; drop all batches and graphs if memory that they use was replaced.

        Such memory is a weight, which then has a new address or dtype, or the codec's streams.
        """
        self._flow_head.refresh()
        if (found := weight_addresses(self.model)) != self._addresses or self._codec.streams is not self._streams:
            self._batches, self._addresses, self._streams = {}, found, self._codec.streams

    def weights_version(self) -> Hashable:
        """Return the version of the backbone's weights, see :func:`voxkern.engine.runner.backbone_weights_version`."""
        return backbone_weights_version(self.model)

    def prefill(self, embeddings: Tensor, pages: list[int], n_past: int) -> Tensor:
        """Run a prompt, in six launches per layer (more with experts).

        A prompt in parts gives the same bits as the whole prompt.
        """
        self._block_table[0, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        batch = TokenBatch.of([len(embeddings)], [n_past + len(embeddings)], embeddings.device)
        states = self._backbone.prefill(embeddings, batch, self.kv_cache.kv, self._block_table)
        return self._backbone.norm(states[-1:])[0]

    def add(self, slot: int, request: Request, hidden: Tensor, pages: list[int]) -> None:
        """Put a request into the batch of its steps and solver; make the batch if it is missing."""
        key = (request.steps, request.solver)
        if key not in self._batches:
            idle = [known for known, batch in self._batches.items() if not batch.slots]
            for known in idle[: max(0, len(self._batches) - MAX_DECODE_BATCHES + 1)]:
                del self._batches[known]
            self._batches[key] = DecodeBatch(
                self.model,
                self.n_slots,
                self.kv_cache,
                self.max_seq_len,
                *key,
                self._codec,
                self._capture,
                self._overlap,
            )
        self._batches[key].add(slot, request, hidden, pages)

    def remove(self, slot: int) -> None:
        """Free a slot in the batch that holds it."""
        for batch in self._batches.values():
            if slot in batch.slots:
                batch.remove(slot)

    def generate_frame(self) -> Iterator[FrameOutput]:
        """Generate a frame of each batch that has requests.

        With a fused codec, each batch decodes its own frame. The codec then runs once for each batch, and leaves the
        state of the other batches' rows as it is.
        """
        for batch in self._batches.values():
            if batch.slots:
                yield batch.generate_frame()


def fused_modules_of(model: VoxtralTTS) -> tuple[FusedBackbone, FusedHead]:
    """Return the fused backbone and the fused flow head of an accelerated model."""
    backbone, flow_head = model.hidden_states, model.acoustic_transformer.forward
    assert isinstance(backbone, FusedBackbone)
    assert isinstance(flow_head, FusedHead)
    return backbone, flow_head
