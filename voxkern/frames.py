"""The frame loop on kernels: what a group of requests says, frame by frame, with no host in between.

Lengths, frame numbers and codes stay on the device. A request that says END, or reaches its limit, gets length 0 there
and then; the host learns of it some frames late, which costs those frames' time and nothing else.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .cache import PagePool, pages_for
from .generate import Request, Utterance
from .kernels.backbone import launch_advance
from .kernels.operator import on_device
from .reference import VoxtralTTS
from .reference.noise import seed_tensor
from .twins.backbone import BackboneTwin, Rows
from .twins.head import HeadTwin

LOOK = 8  # frames from one look at who is still there to the next: on a GPU each waits for the device


class Frames:
    """A group of requests on kernels.

    Attributes:
        lengths: int32 [B], tokens of each with the next frame's; 0 has ended.
        frames: int64 [B], frames kept.
        history: int64 [B, max_frames, 37], their codes with the +2 offset.
    """

    def __init__(self, model: VoxtralTTS, requests: list[Request], steps: int, solver: str) -> None:
        """Prefill the prompts.

        Args:
            model: accelerated for as many requests or more.
            requests: at least one.
            steps: evaluations of the velocity a frame.
            solver: "euler" or "ab2".
        """
        self._backbone = cast(BackboneTwin, model.hidden_states)
        self._flow = cast(HeadTwin[Any, Any, Any], model.acoustic_transformer.forward)
        self._steps, self._solver = steps, solver
        weight, prompts = model.norm.weight, [len(request.prompt) for request in requests]
        device, limits = weight.device, [request.max_frames for request in requests]
        tokens = [prompt + limit for prompt, limit in zip(prompts, limits, strict=True)]
        pool = PagePool(model.config.backbone, sum(map(pages_for, tokens)), weight.dtype, device)
        self._pool, self._table = pool.pool, torch.zeros(len(requests), pages_for(max(tokens)), dtype=torch.int32)
        for row, n_tokens in zip(self._table, tokens, strict=True):
            row[: pages_for(n_tokens)] = pool.take(n_tokens).cpu()
        self._table = self._table.to(device)
        self._seeds = seed_tensor([request.seed for request in requests]).to(device)
        self._alpha = torch.tensor([request.cfg_alpha for request in requests], device=device)
        self._limits = torch.tensor(limits, device=device)
        self.lengths = torch.tensor(prompts, dtype=torch.int32, device=device)
        self.frames = torch.zeros(len(requests), dtype=torch.int64, device=device)
        shape = (len(requests), max(limits), model.config.audio.n_codebooks)
        self.history = torch.zeros(shape, dtype=torch.int64, device=device)

        rows = Rows.of(prompts, prompts, device)
        prompt = torch.cat([request.prompt for request in requests])
        states = self._backbone.prefill(prompt, rows, self._pool, self._table)
        self._hidden = self._backbone.norm(states[rows.starts[1:].long() - 1])
        self._flow.refresh()

    def frame(self) -> None:
        """A frame of each request that is still there: launches and nothing else, once one has been made."""
        codes, following = self._flow.frame(
            self._hidden, self._alpha, steps=self._steps, solver=self._solver, seed=self._seeds, frame=self.frames
        )
        with on_device("advance", self.history):
            launch_advance(codes, self._limits, self.lengths, self.frames, self.history)
        self._hidden = self._backbone.decode(following, self._pool, self._table, self.lengths)


@torch.inference_mode()
def speak(
    model: VoxtralTTS,
    requests: list[Request],
    steps: int,
    solver: str,
    looks: Iterator[int],
    on_frame: Callable[[int], None] | None = None,
) -> Generator[Sequence[Utterance]]:
    """What :func:`voxkern.generate.speak` does, on kernels.

    Args:
        model: accelerated for as many requests or more.
        requests: at least one.
        steps: evaluations of the velocity a frame.
        solver: "euler" or "ab2".
        looks: rising numbers of frames, after each of which the utterances so far are wanted.
        on_frame: called with the number of frames done after each, and up to 7 times after the last.

    Yields:
        The utterances, in the order of their requests: at each look, and at the end.
    """
    start = time.perf_counter()
    group = Frames(model, requests, steps, solver)
    if group.history.is_cuda:
        torch.cuda.synchronize(group.history.device)  # launches return before they are done
    begun, ended_at, look = time.perf_counter(), [0.0] * len(requests), next(looks, 0)
    for n_frames in range(1, max(request.max_frames for request in requests) + 1):
        group.frame()
        if on_frame is not None:
            on_frame(n_frames)
        if (n_frames % LOOK == 0 or n_frames == look) and not _note_ends(group.lengths, ended_at):
            break
        if n_frames == look:
            yield _utterances(group, requests, begun - start, [at - begun for at in ended_at])
            look = next(looks, 0)
    _note_ends(group.lengths, ended_at)
    yield _utterances(group, requests, begun - start, [at - begun for at in ended_at])


def _utterances(group: Frames, requests: list[Request], prefill: float, seconds: list[float]) -> list[Utterance]:
    """What a group has said so far; `seconds` of those that are still there mean nothing."""
    utterances = []
    rows = zip(requests, group.history, group.frames.tolist(), group.lengths.tolist(), seconds, strict=True)
    for request, said, frames, length, frames_seconds in rows:
        ended = not length and frames < request.max_frames
        utterances.append(Utterance(request, list(said[:frames]), ended, prefill, frames_seconds))
    return utterances


def _note_ends(lengths: Tensor, ended_at: list[float]) -> bool:
    """Write down when requests were first seen to have ended; whether any is still there."""
    there, now = lengths.tolist(), time.perf_counter()
    for i, length in enumerate(there):
        if not length and not ended_at[i]:
            ended_at[i] = now
    return any(there)
