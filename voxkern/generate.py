"""The frame loop: hidden state -> codes -> next input -> hidden state, for a group of requests.

Same seed, same sound: rows run in zero-padded blocks of a fixed number of rows and attention request by request, so
nothing that a request computes depends on who else is in the batch. (On a CPU, ``F.linear`` in fp32 gives a row other
bits in a batch of 2 than alone, and in a batch of 6 other bits at the last two places: measured.)
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache import PagePool, pages_for
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
    """

    prompt: Tensor
    seed: int
    cfg_alpha: float
    max_frames: int


@dataclass(eq=False)
class Utterance:
    """What a request has said.

    Attributes:
        frames: codes so far, int64 [37] each with the +2 offset; END is not among them.
        ended: the model said END.
        prefill_seconds: wall time of its prompt.
        frames_seconds: wall time from its prompt's end to its own end.
    """

    request: Request
    frames: list[Tensor] = field(default_factory=list)
    ended: bool = False
    prefill_seconds: float = 0.0
    frames_seconds: float = 0.0


@dataclass(eq=False)
class Running(Utterance):
    """An utterance and what it needs to go on.

    Attributes:
        hidden: [dim], the backbone's last state.
        pages: int32, pages of the cache.
        length: tokens in the cache.
    """

    hidden: Tensor = field(kw_only=True)
    pages: Tensor = field(kw_only=True)
    length: int = field(kw_only=True)


@torch.inference_mode()
def speak(
    model: VoxtralTTS,
    requests: list[Request],
    block_rows: int,
    steps: int,
    solver: str,
    looks: Iterator[int],
    on_frame: Callable[[int], None] | None = None,
) -> Generator[Sequence[Utterance]]:
    """Speak a group of requests side by side; each leaves when it ends.

    Args:
        model: the host.
        requests: at least one.
        block_rows: rows that are computed at once, see the module's docstring.
        steps: evaluations of the velocity a frame.
        solver: "euler" or "ab2".
        looks: rising numbers of frames, after each of which the utterances so far are wanted.
        on_frame: called with the number of frames done after each.

    Yields:
        The utterances, in the order of their requests: at each look, and at the end.
    """
    tokens = [len(request.prompt) + request.max_frames for request in requests]
    weight = model.norm.weight
    pool = PagePool(model.config.backbone, sum(map(pages_for, tokens)), weight.dtype, weight.device)
    clock = time.perf_counter()
    utterances = []
    for request, n_tokens in zip(requests, tokens, strict=True):
        utterance = prefill(model, pool, request, pool.take(n_tokens))
        clock, before = time.perf_counter(), clock
        utterance.prefill_seconds = clock - before
        utterances.append(utterance)
    running, look = utterances, next(looks, 0)
    for n_frames in range(1, max(request.max_frames for request in requests) + 1):
        for block in blocks(running, block_rows):
            speak_frame(model, block, block_rows, steps, solver)
        done = [u for u in running if u.ended or len(u.frames) == u.request.max_frames]
        running = [u for u in running if u not in done]
        for utterance in done:
            utterance.frames_seconds = time.perf_counter() - clock
            pool.give_back(utterance.pages)
        if on_frame is not None:
            on_frame(n_frames)
        if not running:
            break
        if n_frames == look:
            yield utterances
            look = next(looks, 0)
        for block in blocks(running, block_rows):
            step_backbone(model, pool, block, block_rows)
    yield utterances


def prefill(model: VoxtralTTS, pool: PagePool, request: Request, pages: Tensor) -> Running:
    """Run a prompt, by itself."""
    length = len(request.prompt)
    lengths = torch.tensor([length], device=pages.device)
    states = model.hidden_states(request.prompt.unsqueeze(0), PagedCache(pool.pool, pages.unsqueeze(0), lengths))
    return Running(request, hidden=states[0, -1], pages=pages, length=length)


def speak_frame(model: VoxtralTTS, block: list[Running], rows: int, steps: int, solver: str) -> None:
    """Turn the hidden states of a block into a frame of codes each, or into its end."""
    device = block[0].hidden.device
    seeds = seed_tensor([u.request.seed for u in block] + [0] * (rows - len(block))).to(device)
    frames = torch.tensor([len(u.frames) for u in block] + [0] * (rows - len(block)), device=device)
    alpha = torch.tensor([u.request.cfg_alpha for u in block] + [0.0] * (rows - len(block)), device=device)
    x = noise(seeds, frames, model.config.audio.n_acoustic_codebook)
    codes = model.acoustic_transformer(_padded([u.hidden for u in block], rows), alpha, x, steps, solver)
    ended = (codes[:, 0] == END_AUDIO).tolist()
    for i, utterance in enumerate(block):
        utterance.ended = ended[i]
        if not utterance.ended:
            utterance.frames.append(codes[i])


def step_backbone(model: VoxtralTTS, pool: PagePool, block: list[Running], rows: int) -> None:
    """Feed each utterance's last frame back and keep the new hidden state."""
    for utterance in block:
        utterance.length += 1
    codes = _padded([u.frames[-1] for u in block], rows)
    lengths = torch.tensor([u.length for u in block] + [0] * (rows - len(block)), device=codes.device)
    table = torch.zeros(rows, max(len(u.pages) for u in block), dtype=torch.int32, device=codes.device)
    for i, utterance in enumerate(block):
        table[i, : len(utterance.pages)] = utterance.pages
    states = model.hidden_states(model.embed_codes(codes).unsqueeze(1), PagedCache(pool.pool, table, lengths))
    for i, utterance in enumerate(block):
        utterance.hidden = states[i, 0]


def blocks(utterances: list[Running], rows: int) -> Iterator[list[Running]]:
    """Consecutive runs of at most `rows`."""
    for start in range(0, len(utterances), rows):
        yield utterances[start : start + rows]


def _padded(rows: list[Tensor], n: int) -> Tensor:
    """Stack, and fill up with zero rows to `n`."""
    return torch.stack(rows + [torch.zeros_like(rows[0])] * (n - len(rows)))
